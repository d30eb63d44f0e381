"""Moving bytes between two processes. Imports nothing of ours; `discovery` and `mesh` stand on it."""
