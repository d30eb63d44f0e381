"""Parts of chunks: what a slice means as a tensor, wherever it comes from."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import kvmesh
from kvmesh.keys import part_key
from kvmesh.transport.interface import Slice
from tests.support.agents import LocalAgents

SPACE = kvmesh.Namespace(model="m", revision="r", dtype="float32", layers=3, kv_heads=4, head_dim=8, chunk_tokens=16)
CHAIN = SPACE.chain(list(range(32)))
PARTS: list[dict[str, Any]] = [
    {"layers": (1, 2)},
    {"heads": (0, 2)},
    {"heads": (3, 4), "layers": (0, 2)},
    {"tensor": "kv"},
    {"byte_range": (100, 1000)},
]


def content(number: int) -> torch.Tensor:
    return torch.arange(3 * 2 * 4 * 16 * 8, dtype=torch.float32).reshape(3, 2, 4, 16, 8) + 10_000 * number


def expected(whole: torch.Tensor, given: dict[str, Any]) -> torch.Tensor:
    if "byte_range" in given:
        first, end = given["byte_range"]
        return whole.reshape(-1).view(torch.uint8)[first:end]
    layers, heads = given.get("layers", (0, 3)), given.get("heads", (0, 4))
    return whole[layers[0] : layers[1], :, heads[0] : heads[1]]


def taken(data: bytes, part: Slice) -> bytes:
    starts = [part.offset_bytes + number * part.stride_bytes for number in range(part.count)]
    return b"".join(data[start : start + part.run_bytes] for start in starts)


@given(st.data())
def test_the_runs_of_a_part_are_the_bytes_of_the_sliced_tensor(data: st.DataObject) -> None:
    layers, heads, head_dim, tokens = (data.draw(st.integers(1, 4)) for _ in range(4))
    space = kvmesh.Namespace(
        model="m", revision="r", dtype="float16", layers=layers, kv_heads=heads, head_dim=head_dim, chunk_tokens=tokens
    )
    whole = np.arange(2 * layers * heads * tokens * head_dim, dtype=np.float16).reshape(
        layers, 2, heads, tokens, head_dim
    )
    layer = data.draw(st.integers(0, layers - 1))
    layer_end = data.draw(st.integers(layer + 1, layers))
    head = data.draw(st.integers(0, heads - 1))
    head_end = data.draw(st.integers(head + 1, heads))
    part = space.part(layers=(layer, layer_end), heads=(head, head_end))
    cut = whole[layer:layer_end, :, head:head_end]
    assert taken(whole.tobytes(), part.slice) == cut.tobytes()
    assert part.shape == cut.shape
    assert part.slice.end <= space.chunk_bytes


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({}, "give one of the three"),
        ({"heads": (0, 1), "tensor": "kv"}, "give one of the three"),
        ({"heads": (0, 5)}, r"heads is \(0, 5\)"),
        ({"layers": (2, 2)}, r"layers is \(2, 2\)"),
        ({"layers": ()}, r"must be \(first, end\)"),
        ({"heads": []}, r"must be \(first, end\)"),
        ({"layers": 1}, r"must be \(first, end\)"),
        ({"tensor": "hidden"}, "no tensor 'hidden', only kv"),
        ({"byte_range": (0, 1 << 40)}, "byte_range"),
    ],
)
def test_a_part_that_no_chunk_has_is_refused(wrong: dict[str, Any], says: str) -> None:
    with pytest.raises(kvmesh.NamespaceError, match=says):
        SPACE.part(**wrong)


def test_heads_of_a_layout_that_we_do_not_know_are_refused() -> None:
    spec = kvmesh.TensorSpec("float32", (4, 4))
    space = kvmesh.Namespace(
        model="m", revision="r", dtype="float32", layers=1, kv_heads=1, head_dim=1, layout="vllm",
        tensors={"a": spec, "b": spec},
    )  # fmt: skip
    with pytest.raises(kvmesh.NamespaceError, match="layout 'torch' alone"):
        space.part(heads=(0, 1))
    assert space.part(tensor="b").slice == Slice(64, 64)


def test_a_parts_key_depends_on_every_number_but_the_stride_of_one_run() -> None:
    key = b"k" * 32
    keys = {
        part_key(key, Slice(*numbers))
        for numbers in [(0, 8, 16, 2), (1, 8, 16, 2), (0, 7, 16, 2), (0, 8, 17, 2), (0, 8, 16, 3)]
    }
    assert len(keys) == 5
    assert part_key(key, Slice(0, 8, 16, 1)) == part_key(key, Slice(0, 8)) != part_key(b"l" * 32, Slice(0, 8))


@pytest.mark.parametrize("given_", PARTS, ids=str)
def test_a_part_of_what_this_node_holds_is_a_view_of_it(agents: LocalAgents, given_: dict[str, Any]) -> None:
    a = agents.start("a")
    mesh = agents.mesh("a")
    mesh.put(SPACE, {key: content(number) for number, key in enumerate(CHAIN)})
    with mesh.get(SPACE, CHAIN, part=SPACE.part(**given_)) as hit:
        assert (hit.count, hit.reason) == (2, "complete")
        for number, view in enumerate(hit):
            assert torch.equal(view, expected(content(number), given_))
        del view
    agents.wait_for(lambda: a.store.stats().leases == 0)
    assert a.store.stats().chunks == 2


@pytest.mark.parametrize("given_", PARTS, ids=str)
def test_a_part_of_what_a_peer_holds_is_all_that_moves(agents: LocalAgents, given_: dict[str, Any]) -> None:
    agents.start("a")
    b = agents.start("b", join=("a",))
    agents.mesh("a").put(SPACE, {key: content(number) for number, key in enumerate(CHAIN)})
    agents.wait(b, lambda: all(b.node.discovery.map.has("a", key) for key in CHAIN))
    mesh = agents.mesh("b")
    part = SPACE.part(**given_)
    for fetched in (2, 0):  # the second time it is here
        with mesh.get(SPACE, CHAIN, part=part, deadline_s=10) as hit:
            assert (hit.count, hit.fetched) == (2, fetched)
            assert hit.bytes_moved == fetched * part.slice.bytes
            for number, view in enumerate(hit):
                assert torch.equal(view, expected(content(number), given_))
            del view
    assert b.node.transport.stats().bytes_read == 2 * part.slice.bytes
    assert not b.node.discovery.map.has("b", part_key(CHAIN[0], part.slice)), "parts are told to nobody"
    with mesh.get(SPACE, CHAIN, deadline_s=10) as hit:
        assert hit.count == 2
        assert torch.equal(hit[1], content(1))


def test_the_stride_of_one_run_means_nothing_to_a_peer_either(agents: LocalAgents) -> None:
    agents.start("a")
    b = agents.start("b", join=("a",))
    agents.wait_alive(b, "a")
    agents.mesh("a").put(SPACE, {key: content(number) for number, key in enumerate(CHAIN)})
    agents.wait(b, lambda: b.node.discovery.map.has("a", CHAIN[-1]))
    part = kvmesh.Part(Slice(16, 8, 1 << 60, 1), "uint8", (8,), (1,))
    with agents.mesh("b").get(SPACE, CHAIN, deadline_s=5, part=part) as hit:
        assert hit.count == 2
        view = hit[1]
        assert isinstance(view, torch.Tensor)
        assert bytes(view.tolist()) == content(1).numpy().tobytes()[16:24]
        del view
    agents.wait_for(lambda: b.fetcher.stats()["flights"] == 0)


def test_a_slice_from_a_client_is_checked(agents: LocalAgents) -> None:
    agents.start("a")
    mesh = agents.mesh("a")
    mesh.put(SPACE, {CHAIN[0]: content(0)})
    size = SPACE.chunk_bytes
    for numbers in [(0, size + 1, 0, 1), (0, 0, 0, 1), (0, 8, 4, 2), (size - 8, 8, 8, 2), (0, 1, 1, 1 << 40)]:
        part = kvmesh.Part(Slice(*numbers), "uint8", (1,), (1,))
        with pytest.raises(kvmesh.CallerError, match="no such part"), mesh.get(SPACE, CHAIN, part=part) as hit:
            hit.count  # noqa: B018 - waits for the answer
