"""Who has another key, or another label, is refused and counted, by ours and by Serf; what Serf compresses is read."""

from __future__ import annotations
