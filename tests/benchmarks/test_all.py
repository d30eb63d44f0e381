"""``python -m benchmarks``: which benchmarks there are, and the tables of docs/performance.md."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks import __main__ as all_of_them
from benchmarks.__main__ import BEGIN, END, main, markdown, subjects, write
from benchmarks.figures import Figure, machine, skipped

ROWS = [
    Figure("bytes | moved", 2.0, "GB/s", "a socket", 1.0, goal_ratio=0.9),
    skipped("bytes moved", "GB/s", "a server", "it is not installed", goal_ratio=4.0),
]
DOCUMENT = {"machine": machine(), "rounds": 7, "figures": [{"benchmark": "wire", **row.document()} for row in ROWS]}


def test_every_subject_is_found() -> None:
    assert subjects() == ["crossover", "keys", "local", "wire"]


def test_a_table_for_a_page() -> None:
    lines = markdown(DOCUMENT).splitlines()
    assert "medians of 7 interleaved rounds" in lines[0]
    assert lines[-2:] == [
        "| bytes \\| moved | 2 GB/s | a socket: 1 GB/s | 2.00 x | ≥ 0.9 x met |",
        "| bytes moved | not measured: it is not installed | a server |  | ≥ 4 x |",
    ]


def test_the_tables_replace_what_stood_between_the_marks(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    write(page, "new")
    write(page, "newer")
    assert page.read_text() == f"before\n{BEGIN}\n\nnewer\n\n{END}\nafter\n"
    page.write_text("no marks")
    with pytest.raises(SystemExit, match="no place"):
        write(page, "new")
    assert page.read_text() == "no marks"


def test_a_saved_run_is_shown_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(all_of_them, "run_all", None)
    saved = tmp_path / "figures.json"
    saved.write_text(json.dumps(DOCUMENT))
    monkeypatch.setattr(sys, "argv", ["benchmarks", "--markdown", "--from", str(saved)])
    assert main() == 0
    assert capsys.readouterr().out == markdown(DOCUMENT) + "\n"


@pytest.mark.slow  # a fresh interpreter runs a benchmark
def test_one_run_of_all_is_one_document(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmarks", "--json", "--only", "keys", "--rounds", "1"])
    assert main() == 0
    document = json.loads(capsys.readouterr().out)
    assert set(document) == {"machine", "rounds", "figures"}
    assert {row["benchmark"] for row in document["figures"]} == {"keys"}
    assert all(row["met"] is not None for row in document["figures"])
