"""Every benchmark, one after the other: ``python -m benchmarks``. Each runs in a process of its own, as alone.

python -m benchmarks                             a table for each
python -m benchmarks --json                      one document with all figures, each with its benchmark's name
python -m benchmarks --markdown [--from FILE]    the tables of docs/performance.md, from a run or a saved document
python -m benchmarks --write docs/performance.md [--from FILE]      … put where that page has them
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.figures import arguments, goal_text, machine, ratio_text, value_text, where_text

FOLDER = Path(__file__).parent
BEGIN, END = "<!-- figures: python -m benchmarks --write -->", "<!-- end of figures -->"


def subjects() -> list[str]:
    """The names of the benchmarks: the modules of this folder that end with the harness's ``main``."""
    return sorted(path.stem for path in FOLDER.glob("*.py") if path.read_text().endswith(", TITLE)\n"))


def run_all(names: Sequence[str], rounds: int) -> tuple[dict[str, Any], bool]:
    """All figures as one document, and whether every benchmark ran. What they say on stderr passes through."""
    rows: list[dict[str, Any]] = []
    here, whole = machine(), True
    for name in names:
        print(f"benchmarks: {name}", file=sys.stderr, flush=True)
        command = [sys.executable, "-m", f"benchmarks.{name}", "--json", "--rounds", str(rounds)]
        ran = subprocess.run(command, check=False, stdout=subprocess.PIPE, text=True)
        whole = whole and ran.returncode == 0
        if ran.stdout.strip():
            rows += [{"benchmark": name, **row} for row in json.loads(ran.stdout)["figures"]]
    return {"machine": here, "rounds": rounds, "figures": rows}, whole


def markdown(document: Mapping[str, Any]) -> str:
    """The tables of docs/performance.md: one a benchmark, with the machine above."""
    here = document["machine"]
    lines = [f"{where_text(here)}; {here['time']}; medians of {document['rounds']} interleaved rounds."]
    for name in dict.fromkeys(row["benchmark"] for row in document["figures"]):
        lines += ["", f"`python -m benchmarks.{name}`", ""]
        lines += ["| figure | value | baseline | ratio | goal |", "|---|---|---|---|---|"]
        lines += [_markdown_row(row) for row in document["figures"] if row["benchmark"] == name]
    return "\n".join(lines)


def write(page: Path, text: str) -> None:
    """Put the tables between the marks of a page."""
    before, begin, rest = page.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"{page} has no place for the figures: a line {BEGIN} and a line {END}")
    page.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}")


def _markdown_row(row: Mapping[str, Any]) -> str:
    baseline = f"{row['baseline']}: {value_text(row, 'baseline_value')}" if row["baseline"] else ""
    value = f"not measured: {row['skipped']}" if row["skipped"] else value_text(row)
    cells = (row["name"], value, baseline.removesuffix(": "), ratio_text(row), goal_text(row))
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def main() -> int:
    """Run them all; the exit code is 1 if one of them failed to run."""
    parser = arguments("every benchmark, one after the other")
    parser.add_argument("--only", action="append", metavar="NAME", choices=subjects(), help=", ".join(subjects()))
    parser.add_argument("--markdown", action="store_true", help="print markdown tables")
    parser.add_argument("--from", dest="saved", type=Path, metavar="FILE", help="run nothing: a saved --json document")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="put the markdown tables into this page")
    told = parser.parse_args()
    names = told.only or subjects()
    if not (told.json or told.markdown or told.write or told.saved):
        rounds = ["--rounds", str(told.rounds)]
        codes = [
            subprocess.run([sys.executable, "-m", f"benchmarks.{name}", *rounds], check=False).returncode
            for name in names
        ]
        return int(any(codes))
    document, whole = (json.loads(told.saved.read_text()), True) if told.saved else run_all(names, told.rounds)
    if told.write:
        write(told.write, markdown(document))
    if told.json:
        print(json.dumps(document, indent=2))
    elif told.markdown or not told.write:
        print(markdown(document))
    return int(not whole)


if __name__ == "__main__":
    sys.exit(main())
