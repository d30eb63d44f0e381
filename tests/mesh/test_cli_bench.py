"""``kvmesh bench crossover``: the table that the price's formulas give, and what it says to wrong words."""

from __future__ import annotations

import json

import pytest

from kvmesh.cli import crossing
from kvmesh.cli.bench import MODELS
from kvmesh.price import crossover_tokens
from tests.mesh.cli_fakes import Cli


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Cli:
    return Cli(capsys, monkeypatch)


@pytest.mark.parametrize(
    ("model", "dtype", "kv_bytes"),
    [
        ("SmolLM2-135M", "bfloat16", 23_040),
        ("SmolLM2-135M", "float32", 46_080),
        ("Llama-3.1-8B", "bfloat16", 131_072),
        ("Llama-3.1-70B", "bfloat16", 327_680),
        ("Llama-3.1-405B", "float8_e4m3fn", 258_048),
        ("Qwen3-32B", "bfloat16", 262_144),
    ],
)
def test_the_bytes_of_a_token_follow_from_the_published_shape(cli: Cli, model: str, dtype: str, kv_bytes: int) -> None:
    document = json.loads(cli("bench", "crossover", "--model", model, "--dtype", dtype, "--json").out)
    assert {row["kv_bytes_per_token"] for row in document["crossover"]} == {kv_bytes}


def test_each_cell_is_what_the_formula_says(cli: Cli) -> None:
    flags = ["--layers", "32", "--kv-heads", "8", "--head-dim", "128", "--link", "10", "--link", "1"]
    flags += ["--prefill", "5000", "--prefill", "9500", "--rtt-ms", "20", "--chunk-tokens", "64"]
    document = json.loads(cli("bench", "crossover", *flags, "--json").out)
    assert (document["chunk_tokens"], document["rtt_s"]) == (64, 0.02)
    rows = document["crossover"]
    assert [(row["link"], row["prefill_tokens_per_s"]) for row in rows] == [
        ("10 Gbit/s", 5000), ("10 Gbit/s", 9500), ("1 Gbit/s", 5000), ("1 Gbit/s", 9500),
    ]  # fmt: skip
    for row in rows:
        expected = crossover_tokens(131_072, row["bytes_per_s"], 0.02, row["prefill_tokens_per_s"], 64)
        assert row["crossover_tokens"] == expected
    assert [row["crossover_tokens"] is None for row in rows] == [False, False, True, True]
    # By hand: 20 ms / (1/5000 - 131072/1.25e9) s a token is 210.2 tokens, so 4 chunks of 64.
    assert rows[0]["crossover_tokens"] == 256


@pytest.mark.parametrize("columns", [80, 120])
def test_the_table_for_people(cli: Cli, columns: int) -> None:
    ran = cli("bench", "crossover", "--model", "Llama-3.1-8B", env={"COLUMNS": str(columns)})
    assert (ran.code, ran.err) == (0, "")
    lines = ran.out.splitlines()
    assert max(map(len, lines)) <= columns
    assert "Llama-3.1-8B: 128 KiB of KV a token" in lines
    (ten,) = (line for line in lines if line.strip().startswith("10 Gbit/s"))
    assert ten.split() == ["10", "Gbit/s", "9,537", "tokens/s", "256", "256", "never", "never"]


def test_all_models_that_are_listed(cli: Cli) -> None:
    words = [word for name in MODELS for word in ("--model", name)]
    ran = cli("bench", "crossover", *words, "--link", "25", env={"COLUMNS": "80"})
    assert [line.split(":")[0] for line in ran.out.splitlines() if "of KV a token" in line] == list(MODELS)


def test_a_link_that_was_measured(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crossing, "loopback_bytes_per_s", lambda: 2.5e9)
    flags = ["--measure", "--link", "1", "--prefill", "1000", "--model", "SmolLM2-135M"]
    assert "20 Gbit/s measured" in cli("bench", "crossover", *flags).out
    rows = json.loads(cli("bench", "crossover", *flags, "--json").out)["crossover"]
    assert [(row["link"], row["bytes_per_s"]) for row in rows] == [("1 Gbit/s", 1.25e8), ("measured", 2.5e9)]


@pytest.mark.slow  # two agents
@pytest.mark.cluster
def test_two_agents_are_measured_and_gone_again() -> None:
    assert crossing.loopback_bytes_per_s(chunks=2, rounds=1) > 1e6


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--model", "GPT-2"], "--model 'GPT-2': use one of SmolLM2-135M"),
        (["--layers", "2"], "--layers, --kv-heads and --head-dim belong together"),
        (["--dtype", "int3"], "--dtype 'int3': use one of float64"),
        (["--link", "0"], "--link 0: use a number above 0"),
        (["--prefill", "-1"], "--prefill -1: use a number above 0"),
        (["--chunk-tokens", "0"], "--chunk-tokens"),
        (["--rtt-ms", "-1"], "--rtt-ms"),
    ],
)
def test_wrong_words_are_answered_with_the_right_ones(cli: Cli, arguments: list[str], sentence: str) -> None:
    ran = cli("bench", "crossover", *arguments)
    assert (ran.code, ran.out) == (2, "")
    assert sentence in ran.err
    assert len(ran.err.splitlines()) == 1


def test_bench_alone_says_what_there_is(cli: Cli) -> None:
    assert cli("bench").code == 2
    assert "crossover" in cli("bench", "--help").out
