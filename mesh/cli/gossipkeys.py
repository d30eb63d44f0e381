"""``kvmesh keygen`` and ``kvmesh keys``: the keys that gossip is encrypted with, made and changed.

A rotation is three commands, none of which stops anything: install the new key, use it, remove the old one.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvmesh.transport.errors import SettingsError

from . import reach
from .options import AgentSocket, AsJson, ControllerAddress
from .output import Column, counted, human_count, note, print_json, printable, say, show

if TYPE_CHECKING:
    from kvmesh.discovery.keying import Operation
    from kvmesh.view import View

DONE = {"use": "used by", "install": "installed on", "remove": "removed from"}
NODES_NAMED_MAX = 20
"""Nodes that a sentence is spent on; the JSON document has all."""


def keygen(
    file: Annotated[
        Path | None, typer.Argument(metavar="FILE", help="A new file for it, which only you can read.")
    ] = None,
    as_json: AsJson = False,
) -> int:
    """Make a gossip key. It is printed, or written to a key file."""
    from kvmesh.discovery.wire.keyring import fingerprint, generate, to_text

    key = generate()
    if file is not None:
        _write_new(file, f"{to_text(key)}\n")
    shown = {"file": str(file)} if file is not None else {"key": to_text(key)}
    if as_json:
        print_json(shown | {"fingerprint": fingerprint(key)})
    else:
        say(f"{file} has the new key {fingerprint(key)}" if file is not None else shown["key"])
    return 0


def _write_new(path: Path, text: str) -> None:
    """Write a file that was not there, for its owner alone."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    except FileExistsError:
        raise SettingsError(f"{path} is there already, and a key is never overwritten: give another FILE") from None
    except OSError as error:
        raise SettingsError(f"cannot write {path}: {error.strerror or error}") from None
    try:
        with open(descriptor, "w") as out:
            out.write(text)
            out.flush()
            os.fsync(descriptor)
    except OSError as error:
        with suppress(OSError):
            path.unlink()
        raise SettingsError(f"cannot write {path}: {error.strerror or error}") from None


def keys(
    operation: Annotated[str, typer.Argument(metavar="list|use|install|remove", help="What to do.")],
    key: Annotated[
        str | None,
        typer.Argument(
            metavar="KEY", help="The key in base64; not for list. '-' reads it from stdin.", show_default=False
        ),
    ] = None,
    agent: AgentSocket = None,
    controller: ControllerAddress = None,
    as_json: AsJson = False,
) -> int:
    """List or change the gossip keys of all nodes.

    To rotate: install the new key, use it, remove the old one. Each is done on all nodes that are alive; use and
    remove change nothing when a node would be cut off. A list has fingerprints, never keys.
    """
    wanted = _operation(operation)
    given = _key(wanted, key)
    with reach.view(agent, controller) as view:
        document = view.keys(wanted, given)
        absent = _absent(view) if document["nodes"] else []
    if document["error"] and not document["nodes"]:
        raise SettingsError(document["error"])
    if as_json:
        print_json(document)
    elif wanted == "list":
        _show_keys(document)
    elif not document["error"]:
        done = sum(node["status"] == "ok" for node in document["nodes"])
        say(f"key {document['fingerprint']} {DONE[wanted]} {done:,} of {counted(len(document['nodes']), 'node')}")
    _note_failures(document)
    if absent:
        note(
            printable(
                f"not asked, since they do not answer: {_named(absent)}. A node that misses a change of keys needs the "
                "key file of another one before it starts again"
            )
        )
    return 0 if document["done"] else 1


def _absent(view: View) -> list[str]:
    """Names of our nodes that failed and may come back with the keys that they had."""
    return sorted(node["name"] for node in view.nodes()["nodes"] if node["state"] == "failed" and node["epoch"])


def _named(names: Sequence[str]) -> str:
    shown = ", ".join(names[:NODES_NAMED_MAX])
    return shown if len(names) <= NODES_NAMED_MAX else f"{shown} and {len(names) - NODES_NAMED_MAX:,} more"


def _operation(text: str) -> Operation:
    from kvmesh.discovery.keying import OPERATIONS

    for operation in OPERATIONS:
        if text == operation:
            return operation
    raise SettingsError(f"kvmesh keys {text!r}: use one of {', '.join(OPERATIONS)}")


def _key(operation: str, text: str | None) -> bytes:
    from kvmesh.discovery.wire.keyring import from_text

    if operation == "list":
        if text is not None:
            raise SettingsError("kvmesh keys list shows all keys: give no KEY")
        return b""
    if text is None:
        raise SettingsError(f"kvmesh keys {operation} needs the KEY, or '-' to read it from stdin")
    return from_text(sys.stdin.read() if text == "-" else text)


def _show_keys(document: Mapping[str, Any]) -> None:
    columns = (Column("key"), Column("nodes", number=True), Column("primary on", number=True))
    rows = [
        [one["fingerprint"], human_count(one["nodes"]), human_count(one["primary_nodes"])] for one in document["keys"]
    ]
    show(columns, rows)


def _note_failures(document: Mapping[str, Any]) -> None:
    """Which nodes did not do it, why, and what to do."""
    failures = [node for node in document["nodes"] if node["status"] != "ok"]
    for node in failures[:NODES_NAMED_MAX]:
        note(printable(f"{node['name']}: {node['error']}"))
    if len(failures) > NODES_NAMED_MAX:
        note(f"and {counted(len(failures) - NODES_NAMED_MAX, 'more node')}: --json names them all")
    if document["error"]:
        note(document["error"])
    elif failures:
        note("repeat the command once these nodes can do it; for the others it changes nothing")
