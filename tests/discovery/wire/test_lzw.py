"""LZW as Go writes it: what a Serf agent sent, what an independent encoder writes, and what is none."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmesh.discovery.wire import Cause, WireError
from kvmesh.discovery.wire.compression import header, unwrap
from kvmesh.discovery.wire.lzw import decompress

from . import golden
from .support import CLEAR, END, Bits, compressed, lzw, lzw_zeros

LIMIT = 1 << 20


def codes(*values: int) -> bytes:
    """Codes of 9 bits."""
    bits = Bits()
    for value in values:
        bits.write(value, 9)
    return bits.finish()


def test_what_a_serf_agent_compressed() -> None:
    plain = unwrap(golden.PACKET_COMPRESSED[1:], LIMIT)
    assert plain[:2] == b"\x07\x03"
    assert b"Adjustment" in plain
    assert compressed(plain) == golden.PACKET_COMPRESSED, "our test's encoder writes what Go's does"


@pytest.mark.parametrize(
    ("values", "plain"),
    [
        ((CLEAR, END), b""),
        ((END,), b""),
        ((97, END), b"a"),
        ((CLEAR, 97, 98, 258, END), b"abab"),
        ((CLEAR, 97, 258, 259, END), b"aaaaaa"),
        ((CLEAR, 97, 98, CLEAR, 99, 258, END), b"abccc"),
        ((CLEAR, 97, END, 300, 300), b"a"),
    ],
)
def test_by_hand(values: tuple[int, ...], plain: bytes) -> None:
    assert decompress(codes(*values), LIMIT) == plain


@pytest.mark.parametrize(
    "data", [b"", b"a", codes(CLEAR, 97), codes(CLEAR, 258, END), codes(97, 259, END), b"\xff" * 9]
)
def test_what_is_none(data: bytes) -> None:
    with pytest.raises(WireError) as caught:
        decompress(data, LIMIT)
    assert caught.value.cause is Cause.COMPRESSION


@given(st.binary(max_size=2000) | st.text("ab", max_size=3000).map(str.encode))
def test_an_encoder_of_its_own(plain: bytes) -> None:
    assert decompress(lzw(plain), LIMIT) == plain


@pytest.mark.parametrize("symbols", [1, 2, 256])
def test_through_full_tables(symbols: int) -> None:
    rng = random.Random(symbols)
    plain = bytes(rng.randrange(symbols) for _ in range(12_000))
    assert decompress(lzw(plain), len(plain)) == plain


def test_a_full_table_that_is_not_cleared_stays_as_it_is() -> None:
    rng = random.Random(7)
    literals = [rng.randrange(256) for _ in range(5000)]
    bits, size = Bits(), 258
    for number, code in enumerate([*literals, 4095, 258, END]):
        bits.write(code, min(12, size.bit_length()))
        size = min(4096, size + (number > 0))
    pair = bytes(literals[:2])
    last = bytes(literals[4095 - 258 : 4095 - 258 + 2])
    assert decompress(bits.finish(), LIMIT) == bytes(literals) + last + pair


@pytest.mark.parametrize("codes", [1, 2, 255, 446, 3838])
def test_very_many_zeros(codes: int) -> None:
    zeros = bytes(codes * (codes + 1) // 2)
    assert decompress(lzw_zeros(codes), len(zeros)) == zeros
    assert codes == 3838 or lzw(zeros) == lzw_zeros(codes)


def test_output_is_bounded() -> None:
    bomb = lzw(bytes(100_000))
    assert len(bomb) < 1000
    with pytest.raises(WireError) as caught:
        decompress(bomb, 99_999)
    assert caught.value.cause is Cause.TOO_LARGE
    assert len(decompress(bomb, 100_000)) == 100_000


@pytest.mark.parametrize(
    ("data", "cause"),
    [
        (b"", Cause.MALFORMED),
        (b"\x82\xa4Algo\x00\xa3Bu", Cause.MALFORMED),
        (b"\x82\xa4Algo\x01\xa3Buf\xa1a", Cause.COMPRESSION),
        (b"\x82\xa4Algx\x00\xa3Buf\xa1a", Cause.MALFORMED),
        (b"\x82\xa4Algo\x00\xa3Bux\xa1a", Cause.MALFORMED),
        (b"\x82\xa4Algo\x00\xa3Buf\xc0", Cause.MALFORMED),
        (b"\x82\xa4Algo\x00\xa3Buf\xda\x00", Cause.MALFORMED),
        (b"\x82\xa4Algo\x00\xa3Buf\xa2a", Cause.MALFORMED),
        (b"\x82\xa4Algo\x00\xa3Buf\xa1ab", Cause.MALFORMED),
        (b"\x82\xa4Algo\x00\xa3Buf\xdb\xff\xff\xff\xffab", Cause.MALFORMED),
    ],
)
def test_a_wrapping_that_is_none(data: bytes, cause: Cause) -> None:
    with pytest.raises(WireError) as caught:
        unwrap(data, LIMIT)
    assert caught.value.cause is cause


@pytest.mark.parametrize("tag", [b"\xa3", b"\xc4\x03", b"\xc5\0\x03", b"\xc6\0\0\0\x03", b"\xd9\x03", b"\xda\0\x03"])
def test_the_bytes_of_every_age(tag: bytes) -> None:
    packed = codes(CLEAR, END)
    assert len(packed) == 3
    data = b"\x82\xa4Algo\x00\xa3Buf" + tag + packed
    assert header(data[:-3]) == (len(data) - 3, 3)
    assert unwrap(data, LIMIT) == b""
