"""``kvmesh nodes``, ``map`` and ``locate``: what the cluster says about itself. They read, and change nothing."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvmesh.transport.errors import KVMeshError, SettingsError

from . import reach
from .files import chain_of
from .options import AgentSocket, AsJson, ControllerAddress, Keys, SpaceFile, TokensFile
from .output import (
    NOTHING,
    Column,
    console,
    counted,
    human_age,
    human_bytes,
    human_count,
    human_duration,
    note,
    print_json,
    printable,
    say,
    show,
    table,
)

if TYPE_CHECKING:
    from rich.console import RenderableType

WATCH_INTERVAL_S = 1.0
NAMESPACE_DIGITS = 12
"""Of a namespace's id, in a table: enough to tell them apart. The JSON document has all 32."""
Document = Mapping[str, Any]


def nodes(
    watch: Annotated[bool, typer.Option("--watch", help="Follow the nodes until Ctrl-C.")] = False,
    agent: AgentSocket = None,
    controller: ControllerAddress = None,
    as_json: AsJson = False,
) -> int:
    """Show the nodes: their state, address, and what they hold.

    "head" is how long ago a node's newest head was told, "rtt" the round trip from the process that answers; "by" and
    "rate" are how that process last read from the node, and how fast.
    """
    if watch and as_json:
        raise SettingsError("--watch and --json exclude each other: --json prints one document; repeat the command")
    if watch:
        return _watch_nodes(agent, controller)
    document = _nodes(agent, controller)
    if as_json:
        print_json(document)
    else:
        show(NODE_COLUMNS, node_rows(document))
        for sentence in _conflicts(document):
            note(sentence)
    return 0 if document["nodes"] else 1


def _nodes(agent: Path | None, controller: str | None) -> Document:
    """The document of `nodes`: the process that answers first, as it says it, and the others by name. Who follows the
    table must not see rows that trade places."""
    with reach.view(agent, controller) as view:
        document = view.nodes()
    first, others = document["nodes"][:1], document["nodes"][1:]
    return {**document, "nodes": [*first, *sorted(others, key=lambda node: str(node["name"]))]}


def _conflicts(document: Document) -> list[str]:
    """A sentence for each name that two processes use."""
    return [
        printable(
            f"two processes were called {conflict['name']}: at {conflict['address']} and at "
            f"{conflict['other_address']}; give one another --name"
        )
        for conflict in document.get("conflicts", ())
    ]


NODE_COLUMNS = (
    Column("name", name=True),
    Column("role"),
    Column("state"),
    Column("address"),
    Column("epoch", number=True, wide=True),
    Column("up", number=True, wide=True),
    Column("chunks", number=True),
    Column("bytes", number=True),
    Column("head", number=True, spare=True),
    Column("rtt", number=True),
    Column("by", wide=True),
    Column("rate", number=True, wide=True),
    Column("host", name=True, wide=True),
)


def node_rows(document: Document) -> list[list[str]]:
    """The document of `nodes` for people. What a node's host is made of comes from its own `meta`."""
    return [
        [
            node["name"],
            node["role"],
            node["state"],
            node["address"],
            str(node["epoch"] or NOTHING),
            human_age(node.get("up_s")),
            human_count(node["chunks"]),
            human_bytes(node["bytes"]),
            human_age(node.get("head_age_s")),
            human_duration(node["rtt_s"]),
            node.get("backend") or NOTHING,
            _rate(node.get("bytes_per_s")),
            _host(node.get("meta") or {}),
        ]
        for node in document["nodes"]
    ]


def _rate(bytes_per_s: float | None) -> str:
    return NOTHING if bytes_per_s is None else f"{human_bytes(int(bytes_per_s))}/s"


def _host(meta: Mapping[str, str]) -> str:
    """What `HostFacts.to_meta` said of the node's host. A peer may have written anything there."""
    cpus, memory = meta.get("cpus", ""), meta.get("memory_bytes", "")
    parts = [
        meta.get("gpus", ""),
        counted(int(cpus), "cpu") if cpus.isdecimal() else "",
        human_bytes(int(memory)) if memory.isdecimal() else "",
    ]
    return ", ".join(part for part in parts if part) or NOTHING


def _watch_nodes(agent: Path | None, controller: str | None) -> int:
    """Draw the table again every second. The first look must work; later ones may fail while a process restarts."""
    from rich.console import Group
    from rich.live import Live
    from rich.text import Text

    screen = console()
    if not screen.is_terminal:
        raise SettingsError("--watch draws on a terminal: into a pipe, repeat the command instead")

    def look() -> RenderableType:
        document = _nodes(agent, controller)
        shown = table(NODE_COLUMNS, node_rows(document), columns_wide=screen.width)
        return Group(shown, *(Text(sentence, style="yellow") for sentence in _conflicts(document)))

    seen = shown = look()
    with Live(shown, console=screen, auto_refresh=False) as live, suppress(KeyboardInterrupt):
        while True:
            live.update(shown, refresh=True)
            _pause(WATCH_INTERVAL_S)
            try:
                seen = shown = look()
            except KVMeshError as error:
                shown = Group(seen, Text(str(error), style="yellow"))
    return 0


def _pause(seconds: float) -> None:
    time.sleep(seconds)


def map_(agent: AgentSocket = None, controller: ControllerAddress = None, as_json: AsJson = False) -> int:
    """Show the cache map: what is held, by namespace and by node."""
    with reach.view(agent, controller) as view:
        document = view.map()
    if as_json:
        print_json(document)
    else:
        _print_map(document)
    return 0


def _print_map(document: Document) -> None:
    whole = "complete" if document["complete"] else "not complete yet"
    nodes, spaces = document["nodes"], document["namespaces"]
    say(f"{_entries(document['entries'])} on {counted(len(nodes), 'node')}; the map is {whole}")
    if spaces:
        space_columns = (
            Column("namespace"),
            Column("model", name=True),
            Column("dtype", wide=True),
            Column("layout", wide=True),
            Column("shard", wide=True),
            Column("chunks", number=True),
            Column("bytes", number=True),
        )
        rows = [
            [
                space["id"][:NAMESPACE_DIGITS],
                space.get("model") or NOTHING,
                str(space.get("dtype") or NOTHING),
                str(space.get("layout") or NOTHING),
                "/".join(map(str, space.get("shard") or ())) or NOTHING,
                human_count(space["chunks"]),
                human_bytes(space["bytes"]),
            ]
            for space in spaces
        ]
        say("")
        show(space_columns, rows)
    if nodes:
        tiers = sorted({tier for node in nodes for tier in node["tiers"]})
        columns = (
            Column("node", name=True),
            Column("chunks", number=True),
            Column("bytes", number=True),
            *(Column(tier, number=True) for tier in tiers),
        )
        rows = [
            [
                node["name"],
                human_count(node["chunks"]),
                human_bytes(node["bytes"]),
                *(_tier(node["tiers"].get(tier)) for tier in tiers),
            ]
            for node in nodes
        ]
        say("")
        show(columns, rows)


def _entries(count: int) -> str:
    return "1 entry" if count == 1 else f"{count:,} entries"


def _tier(held: Any) -> str:
    """A tier's share: how many chunks, or what they weigh, as the document has it."""
    if isinstance(held, Mapping):
        return human_bytes(held["bytes"])
    return human_count(held)


def locate(
    tokens: TokensFile = None,
    space: SpaceFile = None,
    key: Keys = None,
    agent: AgentSocket = None,
    controller: ControllerAddress = None,
    as_json: AsJson = False,
) -> int:
    """Show which nodes hold a prompt's front, the longest run first."""
    chain = chain_of(tokens, space, key)
    with reach.view(agent, controller) as view:
        document = view.locate(chain)
    holders = document["holders"]
    if as_json:
        print_json(document)
    elif holders:
        columns = (Column("node", name=True), Column("chunks", number=True), Column("of", number=True), Column("tier"))
        rows = [
            [one["node"], human_count(one["run_chunks"]), human_count(document["chunks"]), one["tier"]]
            for one in holders
        ]
        show(columns, rows)
    else:
        note(f"no node is known to hold the first chunk of {len(chain):,}")
    return 0 if holders else 1
