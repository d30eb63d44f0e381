"""The keys that gossip is encrypted with: one that seals, and all that open.

The first key is the primary: what this node sends is sealed with it. What comes may be sealed with any of them. So a
cluster rotates without a gap: install the new key everywhere, use it everywhere, remove the old one everywhere.

The key file has one key a line, in base64, the primary first; empty lines and lines that begin with ``#`` say nothing.
It must be readable by its owner alone. `save` replaces it as a whole: a crash leaves the old file or the new one.

Knows no protocol. Used by one loop; files are read and written where it is called.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import hashlib
import os
import secrets
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from kvmesh.transport.errors import SettingsError
from kvmesh.transport.limits import KEY_FILE_BYTES_MAX, KEYS_PER_RING_MAX

KEY_SIZES: Final = (16, 24, 32)
"""AES-128, AES-192 and AES-256."""
FINGERPRINT_BYTES: Final = 8


def generate() -> bytes:
    """A new key, of 32 bytes."""
    return secrets.token_bytes(max(KEY_SIZES))


def to_text(key: bytes) -> str:
    """The key as a key file, and ``serf -encrypt``, have it."""
    return base64.b64encode(key).decode()


def from_text(text: str) -> bytes:
    """The key that `to_text` wrote. Raises `SettingsError` for anything else; the message does not repeat it."""
    try:
        key = base64.b64decode(text.strip(), validate=True)
    except (binascii.Error, ValueError):
        raise SettingsError("a gossip key must be base64; `kvmesh keygen` makes one") from None
    _check(key)
    return key


def fingerprint(key: bytes) -> str:
    """What a key is called where it must not be shown: the same on all nodes. 16 hexadecimal digits."""
    return hashlib.blake2b(key, digest_size=FINGERPRINT_BYTES, person=b"kvmesh gossipkey").hexdigest()


def _check(key: bytes) -> None:
    if len(key) not in KEY_SIZES:
        raise SettingsError(f"a gossip key has 16, 24 or 32 bytes, not {len(key)}; `kvmesh keygen` makes one")


class Keyring:
    """One to `KEYS_PER_RING_MAX` keys, the primary first. Raises `SettingsError` for what cannot be."""

    def __init__(self, keys: Sequence[bytes]) -> None:
        for key in keys:
            _check(key)
        unique = tuple(dict.fromkeys(keys))
        if not 0 < len(unique) <= KEYS_PER_RING_MAX:
            raise SettingsError(f"a keyring of {len(unique)} keys: 1 to {KEYS_PER_RING_MAX} are possible")
        self._set(unique)

    def _set(self, keys: tuple[bytes, ...]) -> None:
        self._keys = keys
        self._ciphers = tuple(AESGCM(key) for key in keys)

    def __repr__(self) -> str:
        return f"Keyring({', '.join(map(fingerprint, self._keys))})"

    @property
    def keys(self) -> tuple[bytes, ...]:
        """All keys, the primary first."""
        return self._keys

    @property
    def primary(self) -> bytes:
        """The key that seals."""
        return self._keys[0]

    @property
    def ciphers(self) -> tuple[AESGCM, ...]:
        """The keys at work, in the order of `keys`."""
        return self._ciphers

    def install(self, key: bytes) -> None:
        """Open what is sealed with `key`, from now on. A key that is there already stays as it is."""
        _check(key)
        if key in self._keys:
            return
        if len(self._keys) == KEYS_PER_RING_MAX:
            raise SettingsError(f"the keyring has {KEYS_PER_RING_MAX} keys: remove one that is no longer used")
        self._set((*self._keys, key))

    def use(self, key: bytes) -> None:
        """Seal with `key`, which must be installed: peers need it before the first packet that is sealed with it."""
        if key not in self._keys:
            raise SettingsError(f"the key {fingerprint(key)} is not installed: install it on all nodes, then use it")
        self._set((key, *(other for other in self._keys if other != key)))

    def remove(self, key: bytes) -> None:
        """Do not open what is sealed with `key` any more. One that is not there is gone already."""
        if key == self.primary:
            raise SettingsError(f"the key {fingerprint(key)} is the primary: use another one first, then remove it")
        self._set(tuple(other for other in self._keys if other != key))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Keyring:
        """The keyring in a file. Raises `SettingsError` if others can read it, or if it holds anything but keys."""
        text = _read_private(Path(path))
        keys = []
        for number, line in enumerate(text.splitlines(), 1):
            if not line.strip() or line.lstrip().startswith("#"):
                continue
            try:
                keys.append(from_text(line))
            except SettingsError as error:
                raise SettingsError(f"{path}, line {number}: {error}") from None
        if not keys:
            raise SettingsError(f"{path} holds no key; `kvmesh keygen` makes one")
        return cls(keys)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Replace the file, which only its owner can read then. Comments in it are lost."""
        lines = ["# gossip keys of kvmesh, the primary first\n", *(f"{to_text(key)}\n" for key in self._keys)]
        _replace_private(Path(path), "".join(lines).encode())


def _read_private(path: Path) -> str:
    """The text of a file that only its owner can read. The open file is checked, not the name: it may change."""
    try:
        with path.open("rb") as file:
            found = os.fstat(file.fileno())
            if not stat.S_ISREG(found.st_mode):
                raise SettingsError(f"{path} is not a file")
            if found.st_mode & 0o077:
                raise SettingsError(f"{path} can be read by others: chmod 600 {path}")
            data = file.read(KEY_FILE_BYTES_MAX + 1)
    except OSError as error:
        why = error.strerror or error
        raise SettingsError(f"--key-file {path}: {why}; `kvmesh keygen {path}` makes one") from None
    if len(data) > KEY_FILE_BYTES_MAX:
        raise SettingsError(f"{path} has more than {KEY_FILE_BYTES_MAX} bytes: that is no file of gossip keys")
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise SettingsError(f"{path} is not text: that is no file of gossip keys") from None


def _replace_private(path: Path, data: bytes) -> None:
    """Write beside the file, and put that in its place once it is on the disk."""
    beside = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        try:
            descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
            with open(descriptor, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(descriptor)
            beside.replace(path)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                beside.unlink()
            raise
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        raise SettingsError(f"cannot write the gossip keys: {error}") from None
