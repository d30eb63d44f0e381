"""Runs the demo: the processes, the story, the figures, and an orderly end, also after Ctrl-C or SIGTERM.

Runs in the main thread, which its children are tied to.
"""

from __future__ import annotations

import contextlib
import json
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console

from kvmesh.demo.account import Account, seconds
from kvmesh.demo.children import Children
from kvmesh.demo.cluster import Cluster
from kvmesh.demo.model import NAME, check_packages, convert_model, given_model, kept_model
from kvmesh.demo.story import Story
from kvmesh.view import open_view

FIELDS = ("model", "prompt_tokens", "ttft_cold_s", "ttft_mesh_s", "ttft_local_s", "tokens_reused", "bytes_moved",
          "answers_equal", "survived_kill")  # fmt: skip
"""What the JSON document begins with, in this order; more follows."""


class Stopped(BaseException):
    """SIGTERM or SIGHUP came: end everything, then this process. Not an `Exception`: nothing may swallow it."""

    def __init__(self, number: int) -> None:
        self.exit_code = 128 + number


def run(*, json: bool, model: str | None) -> int:
    """See `kvmesh.demo.run`."""
    check_packages()
    given = given_model(model) if model is not None else None
    account = Account(_console(json))
    try:
        with _stop_on_signals(), Children() as children:
            figures = _show(children, account, given)
    except KeyboardInterrupt:
        account.say("stopped; all processes are ended", "yellow")
        return 128 + signal.SIGINT
    except Stopped as stopped:
        return stopped.exit_code
    if json:
        _print_json(figures)
    return 0 if figures["answers_equal"] and figures["survived_kill"] and not figures["mesh_errors"] else 1


def _show(children: Children, account: Account, given: Path | None) -> dict[str, Any]:
    account.say("kvmesh demo: two nodes share the KV cache of a language model", "bold")
    folder = given or kept_model()
    if folder is None:
        with account.under_way("converting the model") as under_way:
            folder = convert_model(children, lambda *step: under_way.step(step[0], step[1], f"once: {step[2]}"))
    name = NAME if given is None else folder.name
    cluster = Cluster(children)
    with account.under_way("starting the processes") as under_way:
        cluster.start(folder, name, under_way)
    account.say(
        f"{name} runs on nodes A and B; agents on A, B and C; one controller. All are processes on this machine."
    )
    if given is None:
        account.say("So small a model writes fluently and errs often. What counts is that both nodes say the same.")
    with open_view(controller=cluster.controller_address) as view:
        story = Story(cluster, view, account, name)
        story.tell()
    figures = {field: story.figures[field] for field in FIELDS} | story.figures
    times = figures["ttft_cold_s"] / figures["ttft_mesh_s"]
    account.chapter(
        f"Done in {seconds(figures['total_s'])}: with the mesh, node B's first token came {times:.1f} times as soon"
    )
    return figures


def _console(as_json: bool) -> Console:
    """Where the account goes. With ``--json``, stdout is for the document; people may still watch stderr."""
    if as_json:
        return Console(stderr=True, quiet=not sys.stderr.isatty(), highlight=False)
    return Console(highlight=False)


def _print_json(figures: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(figures, ensure_ascii=False, indent=2) + "\n")
    sys.stdout.flush()


@contextlib.contextmanager
def _stop_on_signals() -> Iterator[None]:
    """Turn SIGTERM and SIGHUP into `Stopped`, so that every ``finally`` on the way is run."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, _frame: object) -> None:
        raise Stopped(number)

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
