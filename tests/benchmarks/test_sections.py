"""Each benchmark in a tiny form: it runs, its rows have values, and a baseline that is not there is said to be so."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from benchmarks import crossover, keys, local, wire, wire_baselines, wire_bulk, wire_cost, wire_many
from benchmarks.figures import Figure, Section, Skip
from benchmarks.proxy import BURST_S, Link

MIB = 1 << 20


def test_the_wire_has_all_figures_of_the_data_plane() -> None:
    names = {"tcp", "tcp-small", "shm", "leases", "latency", "two-holders", "readers", "memory"}
    assert set(wire.SECTIONS) >= names


def test_keys() -> None:
    assert all(row.value and row.baseline_value for row in keys.chains(1, 4096))


@pytest.mark.slow  # starts agents
@pytest.mark.cluster
@pytest.mark.parametrize(
    ("section", "rows"),
    [
        (lambda rounds: local.copies(rounds, count=4), 2),
        (lambda rounds: local.leases(rounds, count=4), 2),
        (lambda rounds: wire_bulk.tcp_small(rounds, total=MIB), 1),
        (lambda rounds: wire_cost.latency(rounds), 2),
        (lambda rounds: wire_cost.memory(rounds, totals=(8 * MIB,)), 1),
        (lambda rounds: wire_many.two_holders(rounds, total=4 * MIB, link_bytes_per_s=40e6), 1),
        (lambda rounds: wire_many.readers(rounds, total=2 * MIB, nodes=2, gets=2, chunk_bytes=64 << 10), 2),
    ],
    ids=["copies", "leases", "tcp-small", "latency", "memory", "two-holders", "readers"],
)
def test_a_section_in_a_tiny_form(section: Section, rows: int) -> None:
    figures = section(1)
    assert len(figures) == rows
    assert all(row.value is not None and row.value >= 0 and row.skipped is None for row in figures)


@pytest.mark.slow  # starts agents
@pytest.mark.cluster
def test_a_row_of_shared_memory_is_one_or_says_that_the_bytes_went_elsewhere() -> None:
    (row,) = wire_bulk.shm(1, total=4 * MIB)
    assert (row.value is None) == (row.skipped is not None)
    assert row.skipped is None or "bytes went through shared memory" in row.skipped


@pytest.mark.slow  # starts agents, and what is installed of redis and Mooncake
@pytest.mark.cluster
def test_bulk_beside_what_others_use() -> None:
    rows = wire_bulk.tcp(1, total=4 * MIB)
    assert rows[0].ratio is not None
    assert all((row.value is None) == (row.skipped is not None) for row in rows)
    assert [row.goal_ratio for row in rows][:3] == [0.9, 4.0, 1.2]


@pytest.mark.slow  # a model and six agents
@pytest.mark.cluster
@pytest.mark.model
def test_a_crossing_of_a_tiny_model(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=4096, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=256,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path)  # type: ignore[no-untyped-call]
    rows = crossover.measured(1, lengths=(16, 32), links_mbit=(1,), folder=tmp_path, chunk_tokens=16)
    assert [row.unit for row in rows] == ["ms", "ms", "tokens"] * 2
    assert rows[2].value is None, "a link of 1 Mbit/s won against a model of two tiny layers"


def test_a_baseline_that_is_not_installed_is_a_row_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire_baselines, "FOLDER", Path("/nonexistent"))
    monkeypatch.setattr(shutil, "which", lambda *_, **__: None)
    with pytest.raises(Skip, match="redis-server"), wire_baselines.redis_mget(4096, 1):
        pass
    with pytest.raises(Skip, match="no-such-package"):
        wire_baselines.need_package("no-such-package")


@pytest.mark.slow  # a process of its own
def test_a_far_end_that_ends_is_a_row_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire_baselines, "need_package", lambda _: None)
    monkeypatch.setattr(wire_baselines, "FOLDER", Path("/nonexistent"))
    with pytest.raises(Skip, match="mooncake-serve ended"), wire_baselines.mooncake(4096, 1):
        pass


@pytest.mark.slow  # processes of their own
@pytest.mark.parametrize("baseline", [wire_baselines.raw_tcp, wire_baselines.memcpy])
def test_a_baseline_moves_its_bytes(baseline: wire_bulk.Baseline) -> None:
    with baseline(MIB // 16, 3) as call:
        call()


def test_a_copy_is_one_of_all_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    copied: list[int] = []
    monkeypatch.setattr(np, "copyto", lambda target, source: copied.append(len(target)))
    with wire_baselines.memcpy(MIB, 3) as call:
        call()
    assert copied == [MIB] * 3


def test_a_link_gives_its_rate_to_all_that_ask() -> None:
    link = Link(1000.0)
    assert link.delay_s(100, now=10.0) == pytest.approx(0.1 - BURST_S)
    assert link.delay_s(100, now=10.0) == pytest.approx(0.2 - BURST_S)
    assert link.delay_s(100, now=11.0) == pytest.approx(0.1 - BURST_S), "an idle link saves up no more than its burst"


def test_a_crossing_is_the_length_from_which_on_fetching_always_wins() -> None:
    space = local.space(4096)
    rows = crossover.figures_of("a link", [(16, 1.0, 2.0), (32, 3.0, 2.5), (48, 3.5, 4.0)], space)
    assert (rows[-1].value, rows[-1].unit) == (48, "tokens")
    never = crossover.figures_of("a link", [(16, 3.0, 2.0)], space)[-1]
    assert never == Figure("over a link fetching wins from", None, "tokens", skipped=never.skipped)
