"""The file of the last known members: where they are reached, for a node that starts again after a crash.

A line each, ``HOST:PORT``, and comments. It is replaced as a whole, and only its owner can read it. What cannot be read
in it is passed over: at worst the node has only its seeds. A symlink, a file of another user, or anything else that is
no plain file, is not read, and not written through. Whoever leaves on purpose removes the file.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Sequence
from pathlib import Path

from kvmesh.discovery.wire.messages import Endpoint, text_of
from kvmesh.transport.limits import MEMBERS_FILE_BYTES_MAX, MEMBERS_REMEMBERED_MAX

from .addresses import parse_endpoint


def read_members_file(path: Path) -> list[Endpoint]:
    """The members in the file, each once; none when there is no file, or nothing of use in it."""
    try:
        # Not blocking: a pipe in the file's place would hold up the start of the node for ever.
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            found = os.fstat(descriptor)
            is_ours = stat.S_ISREG(found.st_mode) and found.st_uid == os.geteuid()
            text = os.read(descriptor, MEMBERS_FILE_BYTES_MAX).decode(errors="replace") if is_ours else ""
        finally:
            os.close(descriptor)
    except OSError:
        return []
    members = dict.fromkeys(endpoint for line in text.splitlines() if (endpoint := _endpoint(line)) is not None)
    return list(members)[:MEMBERS_REMEMBERED_MAX]


def write_members_file(path: Path, members: Sequence[Endpoint]) -> None:
    """Replace the file. Its folder is made when it is missing, for the owner alone. Raises `OSError`."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.new")
    text = "# Where this kvmesh node last saw others. It joins them again after a crash.\n"
    text += "".join(f"{text_of(member)}\n" for member in members[:MEMBERS_REMEMBERED_MAX])
    with contextlib.suppress(FileNotFoundError):
        beside.unlink()  # of a process that was killed while it wrote
    try:
        descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        with open(descriptor, "w") as file:
            file.write(text)
            file.flush()
            os.fsync(descriptor)
        beside.replace(path)  # a symlink in the way is replaced itself, not what it leads to
    except BaseException:
        with contextlib.suppress(OSError):
            beside.unlink()
        raise


def remove_members_file(path: Path) -> None:
    """It is not needed any more."""
    with contextlib.suppress(OSError):
        path.unlink()


def _endpoint(line: str) -> Endpoint | None:
    try:
        return parse_endpoint(line.strip())
    except ValueError:
        return None
