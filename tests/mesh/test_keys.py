"""Keys: the published vectors, a second implementation, and the properties that everything else relies on."""

from __future__ import annotations

import dataclasses
import hashlib
import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmesh.keys import Namespace, TensorSpec
from kvmesh.transport.errors import NamespaceError
from kvmesh.transport.limits import CHAIN_CHUNKS_MAX

FIELDS: dict[str, Any] = {
    "model": "SmolLM2-135M-Instruct", "revision": "main", "dtype": "bfloat16", "layers": 30, "kv_heads": 3,
    "head_dim": 64, "layout": "torch", "chunk_tokens": 4, "shard": (0, 1), "tenant": "",
}  # fmt: skip
OTHER: dict[str, Any] = {
    "model": "SmolLM2-360M-Instruct", "revision": "v2", "dtype": "float16", "layers": 31, "kv_heads": 4, "head_dim": 65,
    "chunk_tokens": 2, "shard": (0, 2), "tenant": "acme",
}  # fmt: skip
"""For each field, another value."""

TOKENS = list(range(1, 11))
SPEC = TensorSpec("bfloat16", (30, 4, 3, 64))
VECTORS: dict[str, tuple[dict[str, Any], str, list[str]]] = {
    "plain": (
        {},
        "348665d04f37a5c869ff0119d5f7872b58d8863ceed103979289d4c208f09f49",
        [
            "b499830fb08543cc81a363320750e8b110d5bbdf2846d9bce3b139629d078182",
            "47abdb7d17544b63b51ca6257b5832e237ed35a35e0d9a2d4f33e9bc0e262cf9",
        ],
    ),
    "tenant": (
        {"tenant": "acme"},
        "18ec56d59a1b0283e5c754ec04a851475514b0c82a32f40cf28f2a6cb210d8d3",
        [
            "079814000eb69e247a6c723691274ac87ea1bbf9cc08ef99464c57263620b286",
            "f40f3a042396a1faf98ae5317d9a13a876e7dbb1be744eebcac42cabb1828fed",
        ],
    ),
    "second shard": (
        {"shard": (1, 2)},
        "6c2dcbd98d621a654a78ba227b68f1c240160f4660edbcab1a701e1c9bb4705b",
        [
            "dd76228821ef84f9d777b8f530f8c70cb75b6f8c5fc432be194f7af01e4352ad",
            "6a8fe5b519dfd26a87255893f63bccf37df3a33196c46d093040e058ed8359d3",
        ],
    ),
    "another layout": (
        {"layout": "vllm/flash/16", "tensors": {"k": SPEC, "v": SPEC}},
        "550ffeb2a998454139c6549cd63711f95469bedf14a216aa497c9736ceae1c29",
        [
            "143fbeba9f4608b5aed0831d1dda883091b85e4c5c9bb050583a8bb56939b033",
            "4e67550dc934dbbae293372b04a170c49cfbeceac6208147623abd5bec990e23",
        ],
    ),
    "not ASCII": (
        {"model": "Größe/模型", "tenant": "日本"},
        "b43fd9d45145c32f9f7943d73183265cb33df76cc6dea91fc6a1b5ae3f5e5156",
        [
            "c0a86c418d99acef93f17a149ce31fa4afc3fadc982af97dadd671e4f73db4e0",
            "59e71e1f2cda1d3e12ef3975b91c9ea9bb711bb3dfb0722cf9d930ffe2c71eb5",
        ],
    ),
}
"""name: (what differs from FIELDS, the namespace's digest, the keys of TOKENS: two whole chunks of four).
Never to be changed: another value here means that every cache in the field misses."""

token_lists = st.lists(st.integers(0, 2**32 - 1), max_size=40)


def space(**changes: Any) -> Namespace:
    return Namespace(**{**FIELDS, **changes})


def blake2b(data: bytes, size: int, person: str, key: bytes = b"") -> bytes:
    return hashlib.blake2b(data, digest_size=size, key=key, person=person.encode()).digest()


def by_the_formula(
    fields: dict[str, Any], tokens: list[int], tensors: dict[str, TensorSpec]
) -> tuple[bytes, list[bytes]]:
    """The digest and the keys, from the formula in mesh/keys.py's docstring, one step after the other."""
    n = fields["chunk_tokens"]
    tenant_key = blake2b(fields["tenant"].encode(), 64, "kvmesh-tenant")
    parts = ["kvmesh namespace 1"]
    for name in ("model", "revision", "dtype", "layers", "kv_heads", "head_dim", "layout", "chunk_tokens"):
        parts += [name, str(fields[name])]
    parts += ["shard", f"{fields['shard'][0]}/{fields['shard'][1]}"]
    for name, spec in sorted(tensors.items()):
        parts += ["tensor", name, spec.dtype, "x".join(str(size) for size in spec.shape)]
    canonical = b"".join(struct.pack("<I", len(part.encode())) + part.encode() for part in parts)
    digest = blake2b(canonical, 32, "kvmesh-space", tenant_key)
    parent, keys = bytes(32), []
    for i in range(len(tokens) // n):
        chunk = b"".join(struct.pack("<I", token) for token in tokens[i * n : (i + 1) * n])
        parent = blake2b(digest + parent + chunk, 32, "kvmesh-chunk", tenant_key)
        keys.append(parent)
    return digest, keys


@pytest.mark.parametrize("name", VECTORS)
def test_the_published_vectors(name: str) -> None:
    changes, digest, keys = VECTORS[name]
    made = space(**changes)
    assert made.digest.hex() == digest
    assert made.id == digest[:32]
    assert [key.hex() for key in made.chain(TOKENS)] == keys


@given(tokens=token_lists, tenant=st.text(max_size=9), chunk_tokens=st.integers(1, 9))
def test_a_second_implementation_agrees(tokens: list[int], tenant: str, chunk_tokens: int) -> None:
    made = space(tenant=tenant, chunk_tokens=chunk_tokens)
    fields = {**FIELDS, "tenant": tenant, "chunk_tokens": chunk_tokens}
    kv = TensorSpec("bfloat16", (30, 2, 3, chunk_tokens, 64))
    assert (made.digest, made.chain(tokens)) == by_the_formula(fields, tokens, {"kv": kv})


@given(tokens=token_lists, cut=st.integers(0, 40))
def test_the_chain_of_a_prefix_is_a_prefix_of_the_chain(tokens: list[int], cut: int) -> None:
    chain = space().chain(tokens)
    assert space().chain(tokens[:cut]) == chain[: min(cut, len(tokens)) // 4]


@given(tokens=token_lists, cut=st.integers(0, 10))
def test_a_chain_is_extended_from_its_last_key(tokens: list[int], cut: int) -> None:
    chain = space().chain(tokens)
    at = min(cut, len(chain))
    parent = chain[at - 1] if at else bytes(32)
    assert chain[:at] + space().extend(parent, tokens[at * 4 :]) == chain


@given(tokens=st.lists(st.integers(0, 2**32 - 2), min_size=8, max_size=40), where=st.integers(0, 39))
def test_a_changed_token_changes_its_chunk_and_all_that_follow(tokens: list[int], where: int) -> None:
    where %= len(tokens) // 4 * 4
    changed = [token + (i == where) for i, token in enumerate(tokens)]
    same = [a == b for a, b in zip(space().chain(tokens), space().chain(changed), strict=True)]
    assert same == [i < where // 4 for i in range(len(tokens) // 4)]


def test_whole_chunks_only() -> None:
    assert [len(space().chain(TOKENS[:n])) for n in range(10)] == [0, 0, 0, 0, 1, 1, 1, 1, 2, 2]
    assert all(len(key) == 32 for key in space().chain(TOKENS))


@pytest.mark.parametrize("changed", OTHER)
def test_any_changed_field_changes_every_key(changed: str) -> None:
    one, other = space(), space(**{changed: OTHER[changed]})
    assert one.digest != other.digest
    assert one.id != other.id
    assert not set(one.chain(TOKENS)) & set(other.chain(TOKENS))


def test_the_tensors_change_every_key() -> None:
    kv = space().tensors["kv"]
    kinds = [
        space(),
        space(tensors={"kv": kv, "hidden": TensorSpec("float32", (4, 576))}),
        space(tensors={"kv": kv, "hidden": TensorSpec("float16", (4, 576))}),
        space(tensors={"kv": kv, "hidden": TensorSpec("float16", (576, 4))}),
        space(layout="vllm/flash/16", tensors={"kv": kv}),
        space(layout="vllm/flash/16", tensors={"k": kv}),
    ]
    keys = [key for kind in kinds for key in kind.chain(TOKENS)]
    assert len(set(keys)) == 2 * len(kinds)


def test_the_order_in_which_tensors_are_given_does_not_matter() -> None:
    a, b = TensorSpec("float32", (3,)), TensorSpec("uint8", (5, 7))
    one, other = space(layout="x", tensors={"a": a, "b": b}), space(layout="x", tensors={"b": b, "a": a})
    assert one == other
    assert one.digest == other.digest
    assert one.placements == {"a": (0, a), "b": (64, b)}
    assert one.chunk_bytes == 64 + 35


names = st.text(min_size=1, max_size=6)


@given(one=st.tuples(names, names, names), other=st.tuples(names, names, names))
def test_different_names_never_have_the_same_bytes(one: tuple[str, str, str], other: tuple[str, str, str]) -> None:
    def named(model: str, revision: str, layout: str) -> bytes:
        return space(model=model, revision=revision, layout=layout, tensors={"kv": space().tensors["kv"]}).canonical

    assert (one == other) == (named(*one) == named(*other))


@given(tokens=token_lists, tenants=st.lists(st.text(max_size=9), unique=True, max_size=4))
def test_tenants_never_share_a_key(tokens: list[int], tenants: list[str]) -> None:
    keys = [key for tenant in tenants for key in space(tenant=tenant).chain(tokens)]
    assert len(set(keys)) == len(keys)
    assert len({space(tenant=tenant).id for tenant in tenants}) == len(tenants)


@pytest.mark.parametrize("dtype", ["<u4", ">u4", "u8", "i8", ">i8", "i4", "u2", "i2"])
def test_arrays_of_any_whole_dtype_have_the_keys_of_the_list(dtype: str) -> None:
    array = np.array(TOKENS, dtype)
    assert space().chain(array) == space().chain(TOKENS)
    assert space().chain(np.repeat(array, 3)[::3]) == space().chain(TOKENS)


@pytest.mark.slow  # imports torch
def test_every_kind_of_sequence_has_the_keys_of_the_list() -> None:
    import torch

    big = [2**31 - 1, 2**31, 2**32 - 1, 0]
    for tokens in (TOKENS, big):
        expected = space().chain(tokens)
        kinds: list[Any] = [tuple(tokens), np.array(tokens), torch.tensor(tokens), list(np.array(tokens))]
        for given_as in kinds:
            assert space().chain(given_as) == expected
    assert space().chain(torch.tensor(TOKENS, dtype=torch.int32)) == space().chain(range(1, 11))


@pytest.mark.parametrize(
    "tokens",
    [
        [1, 2, 3, -1], [1, 2, 3, 2**32], [1, 2, 3, 4.0], ["1", "2", "3", "4"], [1, 2, 3, None],
        np.array([1, 2, 3, -1]), np.array([1, 2, 3, 2**32]), np.array([1, 2, 3, -1], "i4"), np.array([2**63], "u8"),
        np.array([1.0, 2.0]), np.array([True, False]), np.array([[1, 2], [3, 4]]), np.array(3), "1234",
        b"1234", None, 7,
    ],
    ids=repr,
)  # fmt: skip
def test_tokens_that_are_none_are_refused(tokens: Any) -> None:
    with pytest.raises(NamespaceError, match="token ids must"):
        space().chain(tokens)


@pytest.mark.slow  # imports torch
def test_tensors_that_numpy_cannot_read_are_refused() -> None:
    import torch

    for tensor in (torch.ones(4, dtype=torch.bfloat16), torch.ones(4, device="meta", dtype=torch.int64)):
        with pytest.raises(NamespaceError, match="token ids must"):
            space().chain(tensor)


def test_a_prompt_of_too_many_chunks_is_refused() -> None:
    assert len(space(chunk_tokens=1).chain(np.zeros(CHAIN_CHUNKS_MAX, "u4"))) == CHAIN_CHUNKS_MAX
    with pytest.raises(NamespaceError, match="more than 16384 chunks"):
        space(chunk_tokens=1).chain(np.zeros(CHAIN_CHUNKS_MAX + 1, "u4"))


def test_a_parent_that_is_not_a_key_is_refused() -> None:
    with pytest.raises(NamespaceError, match="parent key has 32 bytes, not 36"):
        space().extend(bytes(36), TOKENS)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model": ""}, "'model' must not be empty"),
        ({"model": None}, "'model' must be text"),
        ({"model": "a\ud800"}, "'model' is .* not valid Unicode"),
        ({"revision": b"main"}, "'revision' must be text"),
        ({"tenant": "\udfff"}, "'tenant' is .* not valid Unicode"),
        ({"dtype": "bf16"}, "'dtype' is 'bf16': use one of .*bfloat16"),
        ({"layers": 0}, "'layers' must be a positive whole number"),
        ({"kv_heads": True}, "'kv_heads' must be a positive whole number"),
        ({"head_dim": 64.0}, "'head_dim' must be a positive whole number"),
        ({"chunk_tokens": -1}, "'chunk_tokens' must be a positive whole number"),
        ({"shard": 0}, "'shard' must be"),
        ({"shard": (0.5, 2)}, "'shard' must be"),
        ({"shard": (0, 1, 2)}, "'shard' must be"),
        ({"shard": (2, 2)}, r"'shard' is \(2, 2\)"),
        ({"shard": (-1, 2)}, r"'shard' is \(-1, 2\)"),
        ({"layout": "vllm"}, "'tensors' must be given for layout 'vllm'"),
        ({"tensors": {"kv": (1, 2)}}, "'tensors' has .* not a TensorSpec"),
        ({"tensors": {7: TensorSpec("int8", (1,))}}, "'tensors' must be text"),
        ({"tensors": {"kv": TensorSpec("bfloat16", (30, 2, 3, 256, 64))}}, "'tensors' has kv as"),
        ({"tensors": {str(i): TensorSpec("int8", (1,)) for i in range(1025)}}, "'tensors' has more than 1024"),
        ({"chunk_tokens": 2**20}, "lower 'chunk_tokens'"),
        ({"revision": "x" * 65536}, "more than 65536 bytes"),
    ],
)
def test_a_wrong_field_is_named(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(NamespaceError, match=named):
        space(**changes)


@pytest.mark.parametrize("shape", [(), (0,), (2, -1), (1.0,), (True,)])
def test_a_wrong_shape_is_refused(shape: Any) -> None:
    with pytest.raises(NamespaceError, match="must be one or more positive sizes"):
        TensorSpec("float32", shape)


def test_a_wrong_dtype_is_refused() -> None:
    with pytest.raises(NamespaceError, match="dtype 'half' is not known"):
        TensorSpec("half", (1,))


def test_a_namespace_is_a_value() -> None:
    assert space() == space()
    assert hash(space()) == hash(space())
    assert space(shard=[0, 1]) == space()  # as it comes from JSON
    assert TensorSpec("int8", [2, 3]) == TensorSpec("int8", (2, 3))  # type: ignore[arg-type]
    assert dataclasses.replace(space(), tenant="acme") == space(tenant="acme")
    with pytest.raises(NamespaceError, match="'tensors' has kv as"):
        dataclasses.replace(space(), chunk_tokens=8)
    assert dataclasses.replace(space(), chunk_tokens=8, tensors={}) == space(chunk_tokens=8)
