"""``kvmesh put``, ``get``, ``pin``, ``unpin`` and ``evict``: chunks of the local node, from a shell."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvmesh.transport.errors import SettingsError
from kvmesh.transport.limits import GET_DEADLINE_DEFAULT_S

from . import reach
from .files import chain_of, read_space_and_chain
from .options import AgentSocket, AsJson, Keys, SpaceFile, TokensFile
from .output import counted, human_bytes, note, print_json, say

GivenTokens = Annotated[
    Path,
    typer.Option("--tokens", metavar="T.json", help="The prompt: a JSON list of token ids. '-' reads it from stdin."),
]
GivenSpace = Annotated[
    Path, typer.Option("--space", metavar="SPACE.json", help="The namespace: the fields of kvmesh.Namespace as JSON.")
]


def put(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A safetensors file with chunk.<i>.<tensor name>.")],
    tokens: GivenTokens,
    space: GivenSpace,
    pin: Annotated[bool, typer.Option("--pin", help="Keep the chunks from eviction until they are unpinned.")] = False,
    ttl: Annotated[
        float | None, typer.Option(metavar="SECONDS", help="Forget the chunks after so long.", show_default="never")
    ] = None,
    agent: AgentSocket = None,
    as_json: AsJson = False,
) -> int:
    """Store a file's chunks on the local node."""
    if ttl is not None and not ttl > 0:
        raise SettingsError(f"--ttl {ttl}: give seconds above zero")
    namespace, chain = read_space_and_chain(tokens, space)
    from .chunkfile import open_chunks

    with open_chunks(file, namespace, chain) as chunks, reach.mesh(agent) as mesh:
        fills = {key: chunks.fill(index) for index, key in enumerate(chain[: chunks.chunks])}
        result = mesh.put(namespace, fills, pin=pin, ttl_s=ttl)
        node = mesh.node
    if as_json:
        document = {
            "node": node,
            "namespace": namespace.id,
            "chunks": len(fills),
            "stored": result.stored,
            "existed": result.existed,
            "refused": result.refused,
            "bytes_stored": result.bytes_stored,
        }
        print_json(document)
    else:
        say(
            f"{counted(result.stored, 'chunk')} stored on {node} ({human_bytes(result.bytes_stored)}), "
            f"{result.existed:,} existed, {result.refused:,} refused"
        )
    if result.refused:
        note(
            f"{node} refused {result.refused:,} of {counted(len(fills), 'chunk')}: its arena is full of chunks "
            "that are pinned, in use or of this put; put fewer, unpin some, or start the agent with more --memory"
        )
        return 1
    return 0


def get(
    tokens: GivenTokens,
    space: GivenSpace,
    out: Annotated[Path, typer.Option(metavar="FILE", help="The safetensors file to write.")],
    deadline: Annotated[
        float, typer.Option(metavar="SECONDS", help="How long to wait for chunks from other nodes.")
    ] = GET_DEADLINE_DEFAULT_S,
    agent: AgentSocket = None,
    as_json: AsJson = False,
) -> int:
    """Write what the mesh has of a prompt to a file."""
    if not 0 <= deadline < float("inf"):
        raise SettingsError(f"--deadline {deadline}: give seconds, zero or more")
    namespace, chain = read_space_and_chain(tokens, space)
    from .chunkfile import save_chunks

    with reach.mesh(agent) as mesh, mesh.get(namespace, chain, deadline_s=deadline) as hit:
        count, reason = hit.count, hit.reason
        written = save_chunks(out, namespace, chain[:count], [hit[index] for index in range(count)]) if count else 0
        fetched, moved = hit.fetched, hit.bytes_moved
    if as_json:
        document = {
            "namespace": namespace.id,
            "chunks": len(chain),
            "found": count,
            "fetched": fetched,
            "bytes_moved": moved,
            "reason": reason,
            "file": str(out) if count else None,
            "file_bytes": written,
        }
        print_json(document)
    elif count:
        say(
            f"{count:,} of {counted(len(chain), 'chunk')} written to {out} ({human_bytes(written)}); "
            f"{fetched:,} came from other nodes ({human_bytes(moved)})"
        )
    if not count:
        note(f"no chunk of {len(chain):,} found ({reason}); {out} was not written")
    elif count < len(chain):
        note(f"the other {counted(len(chain) - count, 'chunk')} did not come: {reason}")
    return 0 if count else 1


def pin(
    tokens: TokensFile = None,
    space: SpaceFile = None,
    key: Keys = None,
    agent: AgentSocket = None,
    as_json: AsJson = False,
) -> int:
    """Keep chunks of the local node from eviction."""
    return _mark("pin", "pinned", chain_of(tokens, space, key), agent, as_json)


def unpin(
    tokens: TokensFile = None,
    space: SpaceFile = None,
    key: Keys = None,
    agent: AgentSocket = None,
    as_json: AsJson = False,
) -> int:
    """Let chunks of the local node be evicted again."""
    return _mark("unpin", "unpinned", chain_of(tokens, space, key), agent, as_json)


def evict(
    tokens: TokensFile = None,
    space: SpaceFile = None,
    key: Keys = None,
    agent: AgentSocket = None,
    as_json: AsJson = False,
) -> int:
    """Delete the local node's copies of chunks. Other nodes keep theirs."""
    return _mark("delete", "evicted", chain_of(tokens, space, key), agent, as_json)


def _mark(method: str, done: str, chain: list[bytes], agent: Path | None, as_json: bool) -> int:
    """The three commands that change chunks by key alone, and answer how many they changed."""
    with reach.mesh(agent) as mesh:
        count = {"pin": mesh.pin, "unpin": mesh.unpin, "delete": mesh.delete}[method](chain)
        node = mesh.node
    if as_json:
        print_json({"node": node, "chunks": len(chain), done: count})
    elif count:
        say(f"{count:,} of {counted(len(chain), 'chunk')} {done} on {node}")
    else:
        note(f"no chunk of {len(chain):,} {done} on {node}: it has none of them to change")
    return 0 if count else 1
