"""What people see of the demo: a live account in a terminal, plain lines in a pipe. It computes nothing.

In a terminal, what is under way is shown by a bar that disappears when its result is printed. In a pipe only results
appear. rich refreshes bars from a thread of its own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.padding import Padding
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

INDENT = 2
BAR_CELLS = 40


class UnderWay:
    """A bar, and later perhaps the text that grows, in the place where the result will stand."""

    def __init__(self, console: Console, what: str, live: Live | None) -> None:
        columns = (
            TextColumn("  {task.description}"),
            BarColumn(BAR_CELLS // 2, complete_style="cyan", finished_style="cyan", pulse_style="cyan"),
            TimeElapsedColumn(),
        )
        self._room = console.width - BAR_CELLS // 2 - 16
        self._live = live
        self._progress = Progress(*columns, console=console)
        self._task = self._progress.add_task(_cut(what, self._room), total=None)
        if live is not None:
            live.update(self._progress)

    def step(self, done: int, of: int, what: str) -> None:
        """`done` of `of` steps are done; `what` is being done."""
        self._progress.update(self._task, completed=done, total=of, description=_cut(what, self._room))

    def text(self, text: str) -> None:
        """The answer so far."""
        if self._live is not None:
            self._live.update(_hanging("A", Text(text)))


class Account:
    """The account on one console."""

    def __init__(self, console: Console) -> None:
        self.console = console

    def say(self, text: str, style: str = "") -> None:
        """A sentence of its own."""
        self.console.print(Text(text, style))

    def chapter(self, title: str) -> None:
        """A new part of the story."""
        self.console.print()
        self.console.print(Text(title, "bold"))

    def note(self, text: str, style: str = "") -> None:
        """A sentence within a chapter."""
        self.console.print(Padding(Text(text, style), (0, 0, 0, INDENT)))

    @contextlib.contextmanager
    def under_way(self, what: str) -> Iterator[UnderWay]:
        """What takes long: tell the value how far it is."""
        if not self.console.is_terminal:
            yield UnderWay(self.console, what, None)
            return
        with Live(console=self.console, transient=True, refresh_per_second=10) as live:
            yield UnderWay(self.console, what, live)

    def question(self, text: str) -> None:
        """What is asked."""
        self.console.print(_hanging("Q", Text(text, "italic")))

    def answer(self, answer: Mapping[str, Any], facts: str) -> None:
        """What the model said, and how it went."""
        self.console.print(_hanging("A", Text(answer["text"])))
        first = f"first token after {seconds(answer['ttft_s'])}"
        self.console.print(_hanging("", Text.assemble((f"{first}; ", "bold cyan"), (facts, "cyan"))))

    def times(self, rows: Sequence[tuple[str, float]]) -> None:
        """Times to first token as bars; the first row is what the others are compared with."""
        table = Table(box=None, show_header=False, padding=(0, 2, 0, 0), pad_edge=False)
        base = rows[0][1]
        longest = max(time for _, time in rows)
        room = max(10, min(BAR_CELLS, self.console.width - INDENT - max(len(name) for name, _ in rows) - 30))
        for name, time in rows:
            cells = max(1, round(room * time / longest))
            compared = f"{base / time:.1f} x sooner" if time is not base else ""
            table.add_row(name, Text("█" * cells, "cyan"), Text(seconds(time), "bold"), Text(compared, "green"))
        self.console.print(Padding(table, (0, 0, 0, INDENT)))

    def map(self, nodes: Sequence[Mapping[str, Any]], held: Mapping[str, Mapping[str, Any]]) -> None:
        """Who is there, and what each holds."""
        table = Table(box=None, padding=(0, 3, 0, 0), pad_edge=False, header_style="dim")
        for title, justify in (
            ("node", "left"),
            ("role", "left"),
            ("state", "left"),
            ("chunks", "right"),
            ("size", "right"),
        ):
            table.add_column(title, justify=justify)  # type: ignore[arg-type]
        for node in sorted(nodes, key=lambda node: (node["role"], node["name"])):
            mine = held.get(node["name"])
            chunks, size = (f"{mine['chunks']:,}", size_of(mine["bytes"])) if mine else ("-", "-")
            state = Text(node["state"], "green" if node["state"] == "alive" else "red")
            table.add_row(Text(node["name"], "bold"), node["role"], state, chunks, size)
        self.console.print(Padding(table, (0, 0, 0, INDENT)))

    def verdict(self, good: bool, text: str) -> None:
        """Whether something is as it should be."""
        mark = ("yes  ", "bold green") if good else ("NO   ", "bold red")
        self.console.print(Padding(Text.assemble(mark, text), (0, 0, 0, INDENT)))


def _hanging(mark: str, text: Text) -> Padding:
    """`text` behind a mark, and its further lines below its first."""
    grid = Table.grid(padding=(0, 1, 0, 0))
    grid.add_column(width=1, style="dim")
    grid.add_column()
    grid.add_row(mark, text)
    return Padding(grid, (0, 0, 0, INDENT))


def seconds(value: float) -> str:
    """``4.21 s`` or ``310 ms``."""
    return f"{value:.2f} s" if value >= 1 else f"{value * 1000:.0f} ms"


def size_of(count: float) -> str:
    """``101.2 MiB``."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


def _cut(text: str, room: int) -> str:
    """The end of `text` gives way when the line is full."""
    return text if len(text) <= room else text[: max(0, room - 1)] + "…"
