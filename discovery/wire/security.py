"""AES-GCM around packets and streams, with the keys of a keyring.

    version u8 (0 or 1) | nonce 12 | ciphertext | tag 16

Version 0 pads what it encrypts to whole blocks, as in PKCS7; version 1 does not. Ours is 1; both are opened. The key's
length, 16, 24 or 32 bytes, chooses the AES. What is authenticated beside the ciphertext is the caller's: a packet's
label, or a stream's first five bytes and its label. The version is not, which is a weakness of the protocol: flipped,
it opens all the same, with padding that is none, or with some that is left. The checks of padding and the parser refuse
that, but for a user message whose own bytes look like padding.

Nonces are random. With 96 bits, one key is good for 2^32 messages (NIST SP 800-38D, 8.3) over all nodes together:
rotate it before that. At 100 nodes that send 20 packets a second each, this is 24 days.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final

from cryptography.exceptions import InvalidTag

from .errors import Cause, WireError

if TYPE_CHECKING:
    from .keyring import Keyring

VERSION_PADDED: Final = 0
VERSION: Final = 1
NONCE_BYTES: Final = 12
TAG_BYTES: Final = 16
BLOCK_BYTES: Final = 16
OVERHEAD_BYTES: Final = 1 + NONCE_BYTES + TAG_BYTES
"""What version 1 adds."""
_HEADER_BYTES: Final = 1 + NONCE_BYTES


def seal(keyring: Keyring, plain: bytes, authenticated: bytes, version: int = VERSION) -> bytes:
    """`plain`, encrypted with the primary key."""
    if version == VERSION_PADDED:
        padding = BLOCK_BYTES - len(plain) % BLOCK_BYTES
        plain += bytes([padding]) * padding
    nonce = os.urandom(NONCE_BYTES)
    return bytes([version]) + nonce + keyring.ciphers[0].encrypt(nonce, plain, authenticated)


def open_sealed(keyring: Keyring, sealed: bytes, authenticated: bytes) -> bytes:
    """What was encrypted, with whichever key of the keyring; the primary is tried first."""
    if len(sealed) < OVERHEAD_BYTES or sealed[0] > VERSION:
        raise WireError(Cause.UNDECRYPTABLE, "too short, or of no known version of encryption")
    nonce = sealed[1:_HEADER_BYTES]
    ciphertext = sealed[_HEADER_BYTES:]
    for cipher in keyring.ciphers:
        try:
            plain = cipher.decrypt(nonce, ciphertext, authenticated)
        except InvalidTag:
            continue
        return plain if sealed[0] == VERSION else _unpadded(plain)
    raise WireError(Cause.UNDECRYPTABLE, "none of our keys opens it")


def _unpadded(plain: bytes) -> bytes:
    padding = plain[-1] if plain and len(plain) % BLOCK_BYTES == 0 else 0
    if not 0 < padding <= BLOCK_BYTES or not plain.endswith(bytes([padding]) * padding):
        raise WireError(Cause.UNDECRYPTABLE, "it opens, and its padding is none")
    return plain[:-padding]
