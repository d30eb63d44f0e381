"""The keyring: rotation by memberlist's rules, and a file that only its owner can read."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from kvmesh.discovery.wire import Keyring, fingerprint, from_text, generate, to_text
from kvmesh.transport.errors import SettingsError
from kvmesh.transport.limits import KEY_FILE_BYTES_MAX, KEYS_PER_RING_MAX

A, B, C = b"a" * 16, b"b" * 24, b"c" * 32


def test_rotation() -> None:
    ring = Keyring([A])
    ring.install(B)
    ring.install(B)
    assert (ring.primary, ring.keys) == (A, (A, B))
    ring.use(B)
    assert (ring.primary, ring.keys) == (B, (B, A))
    ring.remove(A)
    ring.remove(A)
    assert ring.keys == (B,)
    assert len(ring.ciphers) == 1


def test_what_cannot_be() -> None:
    ring = Keyring([A, B, A])
    assert ring.keys == (A, B)
    with pytest.raises(SettingsError, match="primary"):
        ring.remove(A)
    with pytest.raises(SettingsError, match="not installed"):
        ring.use(C)
    for key in (b"", b"x" * 15, b"x" * 33):
        with pytest.raises(SettingsError, match="16, 24 or 32"):
            ring.install(key)
        with pytest.raises(SettingsError):
            Keyring([key])
    with pytest.raises(SettingsError):
        Keyring([])
    full = Keyring([bytes([number]) * 16 for number in range(KEYS_PER_RING_MAX)])
    with pytest.raises(SettingsError, match="remove one"):
        full.install(C)
    full.install(bytes(16))
    assert ring.keys == (A, B)


def test_keys_are_shown_by_their_fingerprints() -> None:
    assert fingerprint(A) == fingerprint(bytes(A))
    assert len({fingerprint(key) for key in (A, B, C)}) == 3
    assert len(fingerprint(A)) == 16
    assert fingerprint(A) in repr(Keyring([A]))
    assert to_text(A) not in repr(Keyring([A]))


def test_keys_as_text() -> None:
    key = generate()
    assert len(key) == 32
    assert key != generate()
    assert from_text(f" {to_text(key)}\n") == key
    for text in ("", "x", "not base64!", to_text(b"short")):
        with pytest.raises(SettingsError) as caught:
            from_text(text)
        assert not text or text not in str(caught.value)


def test_a_file(tmp_path: Path) -> None:
    path = tmp_path / "gossip.key"
    Keyring([C, A]).save(path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert Keyring.load(path).keys == (C, A)
    assert path.read_text().splitlines()[1:] == [to_text(C), to_text(A)]
    ring = Keyring.load(path)
    ring.use(A)
    ring.save(path)
    assert Keyring.load(path).keys == (A, C)
    assert os.listdir(tmp_path) == ["gossip.key"]


def test_what_a_person_wrote(tmp_path: Path) -> None:
    path = tmp_path / "gossip.key"
    path.write_text(f"# ours\n\n  {to_text(B)}  \n # old\n{to_text(A)}")
    path.chmod(0o600)
    assert Keyring.load(path).keys == (B, A)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o611])
def test_a_file_that_others_can_read(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "gossip.key"
    Keyring([A]).save(path)
    path.chmod(mode)
    with pytest.raises(SettingsError, match=f"chmod 600 {path}"):
        Keyring.load(path)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "holds no key"),
        (b"# nothing\n", "holds no key"),
        (b"# one\nnonsense\n", "line 2"),
        (b"\xff\xfe", "not text"),
        (b"#" * (KEY_FILE_BYTES_MAX + 1), "more than"),
    ],
)
def test_a_file_of_something_else(tmp_path: Path, content: bytes, says: str) -> None:
    path = tmp_path / "gossip.key"
    path.write_bytes(content)
    path.chmod(0o600)
    with pytest.raises(SettingsError, match=says):
        Keyring.load(path)


def test_files_that_are_not_there(tmp_path: Path) -> None:
    for path in (tmp_path / "none", tmp_path, Path("/dev/null")):
        with pytest.raises(SettingsError, match=r"--key-file .*`kvmesh keygen|not a file"):
            Keyring.load(path)
    with pytest.raises(SettingsError, match="cannot write"):
        Keyring([A]).save(tmp_path / "no" / "folder")
    (tmp_path / "folder").mkdir()
    with pytest.raises(SettingsError, match="cannot write"):
        Keyring([A]).save(tmp_path / "folder")
    assert os.listdir(tmp_path) == ["folder"], "nothing is left beside it"
