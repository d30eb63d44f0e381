"""The file of the last known members: private, whole, and never a way into other files."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import pytest

from kvmesh.discovery.network import read_members_file
from kvmesh.discovery.network.members import remove_members_file, write_members_file
from kvmesh.discovery.wire import Endpoint
from kvmesh.transport.limits import MEMBERS_FILE_BYTES_MAX, MEMBERS_REMEMBERED_MAX

V4 = Endpoint(b"\x0a\0\0\1", 7951)
V6 = Endpoint(b"\x20\1\x0d\xb8" + bytes(11) + b"\7", 65535)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "deep" / "state" / "a.members"


def test_what_is_written_is_read_and_only_the_owner_can(path: Path) -> None:
    old = os.umask(0)
    try:
        write_members_file(path, [V4, V6])
    finally:
        os.umask(old)
    assert read_members_file(path) == [V4, V6]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert path.read_text().splitlines()[1:] == ["10.0.0.1:7951", "[2001:db8::7]:65535"]
    write_members_file(path, [])
    assert read_members_file(path) == []
    assert list(path.parent.iterdir()) == [path]
    remove_members_file(path)
    remove_members_file(path)
    assert read_members_file(path) == []


def test_at_most_so_many_are_kept(path: Path) -> None:
    many = [Endpoint(b"\x0a\0" + number.to_bytes(2, "big"), 1) for number in range(MEMBERS_REMEMBERED_MAX + 5)]
    write_members_file(path, many)
    assert read_members_file(path) == many[:MEMBERS_REMEMBERED_MAX]
    path.write_text("".join(f"10.0.0.{number % 256}:{number + 1}\n" for number in range(1000)))
    assert len(read_members_file(path)) == MEMBERS_REMEMBERED_MAX


def test_lines_that_are_no_address_are_passed_over(path: Path) -> None:
    path.parent.mkdir(parents=True)
    lines = [
        b"# 10.0.0.9:1", b"", b"host:7951", b"10.0.0.1", b"10.0.0.1:0", b"10.0.0.1:65536", b"10.0.0.1:-1",
        "10.0.0.1:\u0661".encode(), b"2001:db8::7:65535", b"[10.0.0.1]:7951", b"[2001:db8::7", b"\xff\xfe\0",
        b"  10.0.0.1:7951  ", b"10.0.0.1:7951", b"[::ffff:10.0.0.1]:7951", b"[2001:db8::7]:65535",
    ]  # fmt: skip
    path.write_bytes(b"\n".join(lines))
    assert read_members_file(path) == [V4, V6]


def test_a_huge_file_is_read_to_its_bound(path: Path) -> None:
    path.parent.mkdir(parents=True)
    with path.open("wb") as file:
        file.write(b"10.0.0.1:7951\n")
        file.truncate(100 * MEMBERS_FILE_BYTES_MAX)
    assert read_members_file(path) == [V4]


def test_links_pipes_and_folders_are_not_read(path: Path, tmp_path: Path) -> None:
    path.parent.mkdir(parents=True)
    other = tmp_path / "other"
    other.write_text("10.0.0.1:7951\n")
    path.symlink_to(other)
    assert read_members_file(path) == []
    path.unlink()
    os.mkfifo(path)
    assert read_members_file(path) == []  # and it did not wait for a writer
    path.unlink()
    path.mkdir()
    assert read_members_file(path) == []


def test_nothing_is_written_through_a_link(path: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.write_text("mine")
    path.parent.mkdir(parents=True)
    path.symlink_to(other)
    beside = path.with_name(f".{path.name}.new")
    beside.symlink_to(other)
    write_members_file(path, [V4])
    assert other.read_text() == "mine"
    assert not path.is_symlink()
    assert read_members_file(path) == [V4]
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("call", ["fsync", "replace", "open"])
def test_when_it_cannot_be_written_the_old_one_stays(path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    write_members_file(path, [V4])

    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        with pytest.raises(OSError, match="No space left"):
            write_members_file(path, [V6])
    assert read_members_file(path) == [V4]
    assert list(path.parent.iterdir()) == [path]
    path.with_name(f".{path.name}.new").write_text("of a process that was killed while it wrote")
    write_members_file(path, [V6])
    assert read_members_file(path) == [V6]


def test_a_file_of_another_user_is_not_read(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_members_file(path, [V4])
    monkeypatch.setattr(os, "geteuid", lambda: path.stat().st_uid + 1)
    assert read_members_file(path) == []
