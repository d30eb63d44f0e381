"""``kvmesh bench crossover``: at which prefix length fetching beats computing.

The formulas are those by which an agent decides (`kvmesh.price`); this module only asks them for many links, models and
prefill rates, and shows what they say. ``--measure`` adds what agent to agent gives on this machine.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import typer

from kvmesh.price import crossover_tokens
from kvmesh.transport.errors import SettingsError
from kvmesh.transport.limits import CHUNK_TOKENS_DEFAULT, KIB

from .options import AsJson
from .output import Column, print_json, say, show

GBIT_BYTES = 1e9 / 8
LINKS_GBIT = [1.0, 10.0, 25.0, 100.0, 400.0]
PREFILL_TOKENS_PER_S = [1_000.0, 5_000.0, 20_000.0, 100_000.0]
RTT_MS = 0.5
NEVER = "never"
MEASURED = "measured"


@dataclass(frozen=True, slots=True)
class Shape:
    """What decides how much KV a token has: a key and a value of `head_dim` for each of `kv_heads` in each layer."""

    layers: int
    kv_heads: int
    head_dim: int
    dtype: str = "bfloat16"

    @property
    def kv_bytes_per_token(self) -> int:
        """Over all layers, whole (not sharded)."""
        from kvmesh.keys import DTYPE_BYTES

        return 2 * self.layers * self.kv_heads * self.head_dim * DTYPE_BYTES[self.dtype]


MODELS = {
    "SmolLM2-135M": Shape(30, 3, 64),
    "Qwen3-8B": Shape(36, 8, 128),
    "Qwen3-32B": Shape(64, 8, 128),
    "Llama-3.1-8B": Shape(32, 8, 128),
    "Llama-3.1-70B": Shape(80, 8, 128),
    "Llama-3.1-405B": Shape(126, 8, 128),
}
"""Shapes as published in the config.json of each."""
MODELS_DEFAULT = ["Llama-3.1-8B", "Llama-3.1-70B"]

# Plain help, as the other commands have it.
app = typer.Typer(add_completion=False, rich_markup_mode=None, epilog="Every command takes --json.")


@app.callback()
def bench() -> None:
    """Work out what the mesh gains.

    What was measured against what: python -m benchmarks, in the source tree.
    """


@app.command()
def crossover(
    model: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help=f"Repeat it for several: {', '.join(MODELS)}.", show_default="two Llamas"),
    ] = None,
    layers: Annotated[
        int, typer.Option(min=0, metavar="N", show_default=False, help="Another model: its layers, and")
    ] = 0,
    kv_heads: Annotated[
        int, typer.Option(min=0, metavar="N", show_default=False, help="its KV heads in a layer, and")
    ] = 0,
    head_dim: Annotated[int, typer.Option(min=0, metavar="N", show_default=False, help="the size of a head.")] = 0,
    dtype: Annotated[str, typer.Option(help="What a key is kept in.", metavar="NAME")] = "bfloat16",
    link: Annotated[
        list[float] | None, typer.Option(metavar="GBIT", help="Gbit/s; repeat it.", show_default="1, 10, 25, 100, 400")
    ] = None,
    prefill: Annotated[
        list[float] | None,
        typer.Option(metavar="TOKENS", help="Tokens/s of prefill; repeat it.", show_default="1000 to 100000"),
    ] = None,
    rtt_ms: Annotated[
        float, typer.Option(min=0, metavar="MS", help="What a fetch costs however short it is.")
    ] = RTT_MS,
    chunk_tokens: Annotated[
        int, typer.Option(min=1, metavar="N", help="Whole chunks are fetched.")
    ] = CHUNK_TOKENS_DEFAULT,
    measure: Annotated[
        bool, typer.Option("--measure", help="Also measure two agents on this machine, over TCP.")
    ] = False,
    as_json: AsJson = False,
) -> int:
    """Show from how many tokens on fetching beats computing.

    "never" is a link that brings fewer tokens a second than the engine computes.
    """
    shapes = _shapes(model, (layers, kv_heads, head_dim), dtype)
    links = [(f"{rate:g} Gbit/s", rate * GBIT_BYTES) for rate in _positive("--link", link or LINKS_GBIT)]
    if measure:
        from .crossing import loopback_bytes_per_s

        links.append((MEASURED, loopback_bytes_per_s()))
    rates = _positive("--prefill", prefill or PREFILL_TOKENS_PER_S)
    rows = [
        _row(name, shape.kv_bytes_per_token, words, bytes_per_s, rate, rtt_ms / 1000, chunk_tokens)
        for name, shape in shapes.items()
        for words, bytes_per_s in links
        for rate in rates
    ]
    if as_json:
        print_json({"chunk_tokens": chunk_tokens, "rtt_s": rtt_ms / 1000, "crossover": rows})
    else:
        _print_rows(rows, rates, rtt_ms, chunk_tokens)
    return 0


def _row(
    model: str, kv_bytes: int, link: str, bytes_per_s: float, prefill: float, rtt_s: float, chunk_tokens: int
) -> dict[str, Any]:
    """One cell of the table, as programs read it."""
    return {
        "model": model,
        "kv_bytes_per_token": kv_bytes,
        "link": link,
        "bytes_per_s": bytes_per_s,
        "link_tokens_per_s": bytes_per_s / kv_bytes,
        "prefill_tokens_per_s": prefill,
        "crossover_tokens": crossover_tokens(kv_bytes, bytes_per_s, rtt_s, prefill, chunk_tokens),
    }


def _print_rows(rows: list[dict[str, Any]], rates: list[float], rtt_ms: float, chunk_tokens: int) -> None:
    """A table for each model, with a line for each link."""
    say("Tokens of prefix from which on fetching beats computing, by rate of prefill;")
    say(f"in whole chunks of {chunk_tokens} tokens, {rtt_ms:g} ms for each fetch beside its bytes.")
    columns = (
        Column("link", number=True),
        Column("it brings", number=True),
        *(Column(f"{rate:,.0f} tokens/s" if rate == rates[0] else f"{rate:,.0f}", number=True) for rate in rates),
    )
    for name in dict.fromkeys(row["model"] for row in rows):
        cells = [row for row in rows if row["model"] == name]
        say(f"\n{name}: {cells[0]['kv_bytes_per_token'] / KIB:.4g} KiB of KV a token")
        lines = []
        for first in range(0, len(cells), len(rates)):
            cell = cells[first]
            found = [one["crossover_tokens"] for one in cells[first : first + len(rates)]]
            rate = f"{cell['bytes_per_s'] / GBIT_BYTES:.3g} Gbit/s"
            lines.append(
                [
                    rate + (f" {MEASURED}" if cell["link"] == MEASURED else ""),
                    f"{cell['link_tokens_per_s']:,.0f} tokens/s",
                    *(NEVER if tokens is None else f"{tokens:,}" for tokens in found),
                ]
            )
        show(columns, lines)


def _shapes(names: list[str] | None, numbers: tuple[int, int, int], dtype: str) -> dict[str, Shape]:
    """The models that were asked for. Raises `SettingsError` for one that is not known, and for half a shape."""
    from kvmesh.keys import DTYPE_BYTES

    if dtype not in DTYPE_BYTES:
        raise SettingsError(f"--dtype {dtype!r}: use one of {', '.join(DTYPE_BYTES)}")
    shapes = {}
    for name in names or ([] if any(numbers) else MODELS_DEFAULT):
        if name not in MODELS:
            raise SettingsError(
                f"--model {name!r}: use one of {', '.join(MODELS)}, or --layers, --kv-heads, --head-dim"
            )
        known = MODELS[name]
        shapes[name] = Shape(known.layers, known.kv_heads, known.head_dim, dtype)
    if any(numbers):
        if not all(numbers):
            raise SettingsError("--layers, --kv-heads and --head-dim belong together: give all three")
        shapes["x".join(map(str, numbers))] = Shape(*numbers, dtype)
    return shapes


def _positive(flag: str, values: list[float]) -> list[float]:
    for value in values:
        if not 0 < value < float("inf"):
            raise SettingsError(f"{flag} {value:g}: use a number above 0")
    return values
