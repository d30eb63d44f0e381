"""What a node says of itself to those that may read it through NIXL, and what of such a claim is believed. Pure.

The metadata is NIXL's own binary form, which no check here can vouch for but for whose it is: it goes to the reading
process alone.
"""

from __future__ import annotations

from typing import Annotated, Final

import msgspec

from .errors import ProtocolError
from .limits import NIXL_METADATA_BYTES_MAX, NIXL_NAME_CHARS_MAX, NIXL_OFFER_BYTES_MAX

OFFER_VERSION: Final = 1


class Offer(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What a peer needs to read this node's arena."""

    version: int
    package: Annotated[str, msgspec.Meta(max_length=NIXL_NAME_CHARS_MAX)]
    """The version of NIXL: it promises nothing between two."""
    agent: Annotated[str, msgspec.Meta(min_length=1, max_length=NIXL_NAME_CHARS_MAX, pattern="^[0-9a-f]+$")]
    """Another one after each start of the serving process."""
    metadata: Annotated[bytes, msgspec.Meta(min_length=1, max_length=NIXL_METADATA_BYTES_MAX)]
    base: Annotated[int, msgspec.Meta(ge=0)]
    size_bytes: Annotated[int, msgspec.Meta(ge=1)]


_offers = msgspec.msgpack.Decoder(Offer)


def parse_offer(data: bytes) -> Offer:
    """A peer's offer. Raises `ProtocolError` for what is none."""
    if len(data) > NIXL_OFFER_BYTES_MAX:
        raise ProtocolError(f"an offer of NIXL with {len(data)} bytes; {NIXL_OFFER_BYTES_MAX} are allowed")
    try:
        offer = _offers.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ProtocolError(f"an offer of NIXL that is malformed: {error}") from None
    if not offer.metadata.startswith(_beginning(offer.agent)):
        raise ProtocolError("an offer of NIXL whose metadata is of another agent")  # it could disturb that one
    if offer.base + offer.size_bytes > 1 << 64:
        raise ProtocolError("an offer of NIXL with an arena that no address space has")
    return offer


def _beginning(agent: str) -> bytes:
    """How the metadata of this agent begins (NIXL 1.5, src/utils/serdes)."""
    return b"nixlSerDes|Agent" + len(agent).to_bytes(8, "little") + agent.encode() + b"|Conns"
