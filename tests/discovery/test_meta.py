"""A node's meta: what goes out comes back, in Serf's form; whatever else may come is foreign, or one ordinary error."""

from __future__ import annotations

from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmesh.discovery.meta import ROLES, Foreign, Meta, decode_meta, public_key_text
from kvmesh.transport.errors import ProtocolError
from kvmesh.transport.limits import NODE_META_BYTES_MAX

KEY = bytes(range(32))
FACTS = {"host": "n1", "gpus": "8xH100", "cpus": "96", "memory_bytes": "2199023255552", "boot": "b" * 36}
META = Meta("agent", 7950, 1_700_000_000_000, (1, 3), KEY, FACTS)
OURS = {"role": "agent", "kvmesh": "1-1", "mesh_port": "7950", "epoch": "5"}

texts = st.text(max_size=40)
metas = st.builds(
    Meta,
    role=st.sampled_from(ROLES),
    mesh_port=st.integers(1, 65535),
    epoch=st.integers(0, 2**64 - 1),
    versions=st.tuples(st.integers(1, 255), st.integers(1, 255)).map(lambda pair: (min(pair), max(pair))),
    public_key=st.just(b"") | st.binary(min_size=32, max_size=32),
    facts=st.dictionaries(texts, texts, max_size=40),
)


def tagged(tags: Any) -> bytes:
    return b"\xff" + msgpack.packb(tags, use_bin_type=False)


def test_it_is_serfs_tags():
    data = META.encode()
    assert data[0] == 255
    assert msgpack.unpackb(data[1:]) == {
        "role": "agent", "kvmesh": "1-3", "mesh_port": "7950", "epoch": "1700000000000",
        "key": "AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8", **FACTS,
    }  # fmt: skip
    assert decode_meta(data) == META


def test_the_old_spec_has_neither_str8_nor_bin():
    # A text of 32 to 255 bytes is where the newer spec would differ.
    data = Meta("agent", 1, 1, facts={"host": "h" * 100}).encode()
    assert b"\xda\x00\x64" + b"h" * 100 in data
    assert b"\xd9\x64" not in data


@given(metas)
def test_what_goes_out_comes_back(meta: Meta):
    data = meta.encode()
    assert len(data) <= NODE_META_BYTES_MAX
    found = decode_meta(data)
    assert isinstance(found, Meta)
    core = (meta.role, meta.mesh_port, meta.epoch, meta.versions, meta.public_key)
    assert (found.role, found.mesh_port, found.epoch, found.versions, found.public_key) == core
    assert found.facts.items() <= meta.facts.items()
    assert found.encode() == data


def test_facts_that_do_not_fit_are_left_out_whole_and_the_least_useful_first():
    wide = {**FACTS, "zone": "z" * 300, "boot": "b" * 300, "gpus": "g" * 100}
    found = decode_meta(Meta("agent", 1, 1, (1, 1), KEY, wide).encode())
    assert isinstance(found, Meta)
    assert dict(found.facts) == {name: wide[name] for name in ("host", "gpus", "cpus", "memory_bytes")}


def test_a_fact_cannot_pose_as_a_tag_of_ours():
    found = decode_meta(Meta("agent", 1, 1, facts={"role": "router", "key": "x", "host": "h"}).encode())
    assert isinstance(found, Meta)
    assert (found.role, found.public_key, found.facts) == ("agent", b"", {"host": "h"})


@pytest.mark.parametrize(
    ("data", "tags", "role"),
    [
        (b"", {}, "serf"),
        (b"web", {"role": "web"}, "web"),
        (b"\xfeweb", {"role": "\N{REPLACEMENT CHARACTER}web"}, "\N{REPLACEMENT CHARACTER}web"),
        (tagged({"dc": "x"}), {"dc": "x"}, "serf"),
        (tagged({"role": "lb", "dc": "x"}), {"role": "lb", "dc": "x"}, "lb"),
        (tagged({"role": "agent"}), {"role": "agent"}, "serf"),
        (tagged([1, 2]), {}, "serf"),
        (tagged({"role": 7}), {}, "serf"),
        (tagged([["kvmesh", "1-1"]]), {}, "serf"),
        (b"\xff", {}, "serf"),
        (b"\xff\xc1", {}, "serf"),
        (b"\xff\xdf\xff\xff\xff\xff", {}, "serf"),
        (b"\xff" + b"\x91" * 511, {}, "serf"),
        (tagged({"role": b"\xff"}), {}, "serf"),
        (b"\xff\x81\x01\xa1x", {}, "serf"),
        (b"\xff\xd6\xff\0\0\0\0", {}, "serf"),
    ],
)
def test_others_are_listed_and_left_alone(data: bytes, tags: dict[str, str], role: str):
    found = decode_meta(data)
    assert isinstance(found, Foreign)
    assert (found.tags, found.role) == (tags, role)


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"role": "king"}, "role 'king' is none of agent, controller, router"),
        ({"role": None}, "role '' is none of"),
        ({"kvmesh": "1"}, "kvmesh '' is no number"),
        ({"kvmesh": "0-1"}, "kvmesh '0' is no number from 1 to 255"),
        ({"kvmesh": "2-1"}, "end before they begin"),
        ({"kvmesh": "1-256"}, "kvmesh '256'"),
        ({"kvmesh": "1-2-3"}, "kvmesh '2-3'"),
        ({"mesh_port": "0"}, "mesh_port '0' is no number from 1 to 65535"),
        ({"mesh_port": "65536"}, "mesh_port '65536'"),
        ({"mesh_port": "07950"}, "mesh_port '07950'"),
        ({"mesh_port": "\N{ARABIC-INDIC DIGIT FIVE}"}, "mesh_port"),
        ({"mesh_port": None}, "mesh_port ''"),
        ({"epoch": "-1"}, "epoch '-1'"),
        ({"epoch": str(2**64)}, "epoch"),
        ({"epoch": "9" * 300}, "epoch"),
        ({"epoch": None}, "epoch ''"),
        ({"key": ""}, "its key is not 32 bytes"),
        ({"key": "AAEC"}, "its key is not 32 bytes"),
        ({"key": "A" * 42 + "B"}, "its key is not 32 bytes"),
        ({"key": public_key_text(KEY) + "="}, "its key is not 32 bytes"),
        ({"key": "+" * 43}, "its key is not 32 bytes"),
        ({"key": "\N{LATIN SMALL LETTER E WITH ACUTE}" * 43}, "its key is not 32 bytes"),
        ({str(number): "" for number in range(40)}, "tags: 32 are allowed"),
    ],
)
def test_what_claims_to_be_ours_keeps_to_the_table(changed: dict[str, str | None], sentence: str):
    tags = {name: value for name, value in {**OURS, **changed}.items() if value is not None}
    with pytest.raises(ProtocolError, match=sentence):
        decode_meta(tagged(tags))


def test_a_tag_twice_or_too_many_bytes_are_errors():
    with pytest.raises(ProtocolError, match="twice"):
        decode_meta(b"\xff\x85" + tagged(OURS)[2:] + msgpack.packb("role") + msgpack.packb("router"))
    with pytest.raises(ProtocolError, match="512 are allowed"):
        decode_meta(bytes(513))


def test_our_own_mistake_does_not_reach_a_peer():
    with pytest.raises(ProtocolError):
        Meta("agent", 0, 1).encode()
    with pytest.raises(ProtocolError):
        Meta("agent", 1, 1, public_key=b"short").encode()


@given(st.binary(max_size=520) | st.binary(max_size=80).map(lambda data: b"\xff" + data))
def test_any_bytes_are_ours_foreign_or_one_error(data: bytes):
    try:
        found = decode_meta(data)
    except ProtocolError:
        return
    assert isinstance(found, (Meta, Foreign))


@given(st.data())
def test_a_flipped_meta_is_ours_foreign_or_one_error(data: st.DataObject):
    changed = bytearray(META.encode())
    for _ in range(data.draw(st.integers(1, 4))):
        changed[data.draw(st.integers(1, len(changed) - 1))] = data.draw(st.integers(0, 255))
    try:
        found = decode_meta(bytes(changed))
    except ProtocolError:
        return
    if isinstance(found, Meta):
        assert decode_meta(found.encode()) == found
