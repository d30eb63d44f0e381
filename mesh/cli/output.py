"""How answers look: JSON for programs; tables, sizes and ages for people.

A table takes the width of its content. Where the terminal is narrower, columns that a reader can do without are left
out (`Column.wide`, `Column.spare`), and names are folded, never cut. Into a pipe goes plain text, one line a row.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

GAP = 2
"""Between two columns of a table."""
NAME_CELLS_MIN = 12
"""What a name gets at least, where that is possible: below it, a fold looks like a riddle."""
PIPE_COLUMNS = 4096
"""Into a pipe nothing is folded."""


def say(sentence: str) -> None:
    """One sentence of an answer, on stdout."""
    typer.echo(sentence)


def note(sentence: str) -> None:
    """One sentence beside the answer, on stderr: a program that reads stdout does not see it."""
    typer.echo(f"kvmesh: {sentence}", err=True)


def print_json(document: Any, *, one_line: bool = False) -> None:
    """The whole answer for programs. Flushed: who reads a ready line waits for it."""
    typer.echo(json.dumps(document, ensure_ascii=False, indent=None if one_line else 2))
    sys.stdout.flush()


@dataclass(frozen=True)
class Column:
    """One column of a table."""

    title: str
    number: bool = False
    """Aligned to the right."""
    name: bool = False
    """May be folded when the terminal is narrow; nothing else is."""
    wide: bool = False
    """Left out where the table would be wider than the terminal."""
    spare: bool = False
    """Left out where names would have less than `NAME_CELLS_MIN`, and all wide ones are gone already."""


def console() -> Console:
    """stdout as rich sees it: colour and the terminal's width for people, plain text for a pipe."""
    from rich.console import Console

    free = not sys.stdout.isatty() and not os.environ.get("COLUMNS")
    return Console(width=PIPE_COLUMNS if free else None, highlight=False, emoji=False, markup=False)


def show(columns: Sequence[Column], rows: Sequence[Sequence[str]]) -> None:
    """Print a table on stdout."""
    screen = console()
    with screen.capture() as captured:
        screen.print(table(columns, rows, columns_wide=screen.width))
    text = captured.get()
    if not screen.is_terminal:
        text = "".join(f"{line.rstrip()}\n" for line in text.splitlines())
    sys.stdout.write(text)


def table(columns: Sequence[Column], rows: Sequence[Sequence[str]], *, columns_wide: int) -> RenderableType:
    """The rows under their titles, for a console of `columns_wide`."""
    from rich.table import Table
    from rich.text import Text

    built = Table(box=None, padding=(0, GAP, 0, 0), pad_edge=False, header_style="bold")
    shown = _shown(columns, rows, columns_wide)
    for index in shown:
        column = columns[index]
        built.add_column(
            column.title, justify="right" if column.number else "left", no_wrap=not column.name, overflow="fold"
        )
    for row in rows:
        built.add_row(*(Text(printable(row[index]), style=STYLES.get(row[index], "")) for index in shown))
    return built


def _shown(columns: Sequence[Column], rows: Sequence[Sequence[str]], columns_wide: int) -> list[int]:
    """The columns that a table has at this width: of the wide ones, the last go first."""
    from rich.cells import cell_len

    # A column without a single value would only take the place of one that has some.
    shown = [index for index in range(len(columns)) if not rows or any(row[index] not in ("", NOTHING) for row in rows)]
    widths = [max(map(cell_len, (column.title, *(row[i] for row in rows)))) for i, column in enumerate(columns)]
    least = [min(width, NAME_CELLS_MIN) if columns[i].name else width for i, width in enumerate(widths)]
    for index in [index for index in reversed(shown) if columns[index].wide]:
        if _wide(shown, widths) <= columns_wide:
            break
        shown.remove(index)
    for index in [index for index in reversed(shown) if columns[index].spare]:
        if _wide(shown, least) <= columns_wide:
            break
        shown.remove(index)
    return shown


def _wide(shown: Sequence[int], widths: Sequence[int]) -> int:
    return sum(widths[index] + GAP for index in shown) - GAP


NOTHING = "-"
"""What a cell says when there is no value."""
STYLES = {
    "alive": "green", "suspect": "yellow", "failed": "red", "left": "dim",
    "ok": "green", "note": "cyan", "warning": "yellow", "problem": "bold red",
}  # fmt: skip


def printable(text: str) -> str:
    """The text without control characters: names come from peers, and an escape sequence would steer the terminal."""
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text)


def human_bytes(count: int | None) -> str:
    """``4.0 GiB``."""
    if count is None:
        return NOTHING
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(size) < 1024 or unit == "TiB":
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    raise AssertionError("the last unit takes every size")


def human_count(count: int | None) -> str:
    """``12,345``."""
    return NOTHING if count is None else f"{count:,}"


def human_age(seconds: float | None) -> str:
    """A time that has passed, in its largest unit: ``0.4s``, ``12s``, ``3m``, ``2h``, ``5d``."""
    if seconds is None or seconds < 0:
        return NOTHING
    if seconds < 10:
        return f"{seconds:.1f}s"
    for limit, unit_s, unit in ((120, 1, "s"), (7200, 60, "m"), (172800, 3600, "h")):
        if seconds < limit:
            return f"{seconds / unit_s:.0f}{unit}"
    return f"{seconds / 86400:.0f}d"


def human_duration(seconds: float | None) -> str:
    """A short time that was measured: ``0.31 ms``, ``12 ms``, ``1.20 s``."""
    if seconds is None:
        return NOTHING
    milliseconds = seconds * 1000
    if milliseconds < 10:
        return f"{milliseconds:.2f} ms"
    return f"{milliseconds:.0f} ms" if milliseconds < 1000 else f"{seconds:.2f} s"


def counted(count: int, noun: str) -> str:
    """``1 chunk``, ``12 chunks``."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"
