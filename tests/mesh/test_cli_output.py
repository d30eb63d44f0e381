"""Units, ages and tables."""

import io
import re

import pytest

from kvmesh.cli.output import (
    Column,
    counted,
    human_age,
    human_bytes,
    human_count,
    human_duration,
    printable,
    show,
)


@pytest.mark.parametrize(
    ("count", "text"),
    [(None, "-"), (0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (4 << 30, "4.0 GiB"), (3 << 50, "3072.0 TiB")],
)
def test_bytes(count: int | None, text: str):
    assert human_bytes(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, "-"), (-1, "-"), (0.04, "0.0s"), (9.94, "9.9s"), (10, "10s"), (119, "119s"), (120, "2m"), (7200, "2h"),
     (86400 * 3, "3d")],
)  # fmt: skip
def test_ages(seconds: float | None, text: str):
    assert human_age(seconds) == text


@pytest.mark.parametrize(("seconds", "text"), [(None, "-"), (0.000312, "0.31 ms"), (0.0124, "12 ms"), (1.2, "1.20 s")])
def test_durations(seconds: float | None, text: str):
    assert human_duration(seconds) == text


def test_counts():
    assert (human_count(None), human_count(12345)) == ("-", "12,345")
    assert (counted(1, "chunk"), counted(0, "chunk"), counted(2000, "chunk")) == ("1 chunk", "0 chunks", "2,000 chunks")


def test_a_name_from_a_peer_cannot_steer_the_terminal():
    assert printable("n1\x1b[2J\r\u202e") == "n1\ufffd[2J\ufffd\ufffd"
    assert printable("größe 2") == "größe 2"


COLUMNS = (Column("name", name=True), Column("note", wide=True), Column("empty"), Column("n", number=True))
ROWS = [["a" * 100, "x", "-", "7"], ["b", "yy", "", "1,234"]]


def test_into_a_pipe_goes_plain_text_of_one_line_a_row(capsys: pytest.CaptureFixture[str], monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    show(COLUMNS, ROWS)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines] == [["name", "note", "n"], ["a" * 100, "x", "7"], ["b", "yy", "1,234"]]
    assert {len(line) for line in lines} == {len(lines[0])}, "numbers end in one column"


@pytest.mark.parametrize("wide", [80, 120])
def test_a_narrow_place_folds_names_and_cuts_nothing(capsys: pytest.CaptureFixture[str], monkeypatch, wide: int):
    monkeypatch.setenv("COLUMNS", str(wide))
    show(COLUMNS, ROWS)
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= wide
    assert out.count("a") == 100 + 1, "the name is whole"
    assert ("note" in out) == (wide == 120)


def test_a_terminal_gets_colour(monkeypatch: pytest.MonkeyPatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr("sys.stdout", terminal)
    monkeypatch.setenv("TERM", "xterm-256color")
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    show((Column("state"),), [["alive"], ["[bold]"]])
    assert re.search(r"\x1b\[32malive", terminal.getvalue())
    assert "[bold]" in terminal.getvalue()
