"""Who is there and who holds what: membership, journal, following, map. Imports `kvmesh.transport` only."""
