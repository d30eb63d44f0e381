"""How fast chunks come from other nodes: ``python -m benchmarks.wire [--json] [--rounds N] [--only SECTION]…``.

Every figure of the data plane, each beside its baseline in the same run; docs/performance.md says what they mean. All
of it is on one machine: agents are processes, and the network is loopback.
"""

from __future__ import annotations

from benchmarks import local, wire_bulk, wire_cost, wire_many
from benchmarks.figures import Section, main

TITLE = "wire: chunks from other nodes, on loopback"
SECTIONS: dict[str, Section] = {
    "tcp": wire_bulk.tcp,
    "tcp-small": wire_bulk.tcp_small,
    "shm": wire_bulk.shm,
    "leases": local.leases,
    "latency": wire_cost.latency,
    "two-holders": wire_many.two_holders,
    "readers": wire_many.readers,
    "memory": wire_cost.memory,
}

if __name__ == "__main__":
    main(SECTIONS, TITLE)
