"""The file of the last known members: where they are reached, for a node that starts again after a crash.

A line each, ``HOST:PORT``, and comments. It is replaced as a whole. What cannot be read in it is passed over: at worst
the node has only its seeds. Whoever leaves on purpose removes it.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
from collections.abc import Sequence
from pathlib import Path

from kvmesh.transport.limits import MEMBERS_FILE_BYTES_MAX, MEMBERS_REMEMBERED_MAX

from .wire.messages import Endpoint


def read_members_file(path: Path) -> list[Endpoint]:
    """The members in the file; none when there is no file, or nothing of use in it."""
    try:
        with path.open("rb") as file:
            text = file.read(MEMBERS_FILE_BYTES_MAX).decode(errors="replace")
    except OSError:
        return []
    found = (_endpoint(line) for line in text.splitlines())
    return [endpoint for endpoint in found if endpoint is not None][:MEMBERS_REMEMBERED_MAX]


def write_members_file(path: Path, members: Sequence[Endpoint]) -> None:
    """Replace the file; only its owner can read it. Raises `OSError`."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    text = "# Where this kvmesh node last saw others. It joins them again after a crash.\n"
    text += "".join(f"{_text(member)}\n" for member in members)
    try:
        descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
        with open(descriptor, "w") as file:
            file.write(text)
            file.flush()
            os.fsync(descriptor)
        beside.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            beside.unlink()
        raise


def remove_members_file(path: Path) -> None:
    """It is not needed any more."""
    with contextlib.suppress(OSError):
        path.unlink()


def _text(endpoint: Endpoint) -> str:
    host = ipaddress.ip_address(endpoint.ip)
    return f"[{host}]:{endpoint.port}" if host.version == 6 else f"{host}:{endpoint.port}"


def _endpoint(line: str) -> Endpoint | None:
    host, _, port = line.strip().rpartition(":")
    try:
        ip = ipaddress.ip_address(host.strip("[]")).packed
    except ValueError:
        return None
    if not (port.isascii() and port.isdigit() and len(port) <= 5 and 0 < int(port) <= 65535):
        return None
    return Endpoint(ip, int(port))
