"""The demo's plot: who is asked what, in which order, and what the figures mean.

A question's prompt is the document and then the question, so different questions share all chunks of the document. Node
B answers its first question twice, first without the mesh: that answer is the reference, and its time is `ttft_cold_s`.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from kvmesh.demo import document as texts
from kvmesh.demo.account import Account, seconds, size_of
from kvmesh.demo.cluster import CHUNK_TOKENS, Cluster, wait_for
from kvmesh.view import View

NEW_TOKENS = 24
SEEN_S = 10.0
"""How long the story waits for the mesh to see what happened: a copy, or a death."""


class Story:
    """One telling. `figures` grows with it."""

    def __init__(self, cluster: Cluster, view: View, account: Account, model: str) -> None:
        self._cluster = cluster
        self._view = view
        self._account = account
        self._started = time.monotonic()
        self.figures: dict[str, Any] = {"model": model, "mesh_errors": []}

    def tell(self) -> None:
        """All chapters."""
        self._share()
        notice_of_a = self._spread()
        self._show_map()
        self._kill(notice_of_a)
        self.figures["total_s"] = time.monotonic() - self._started

    def _share(self) -> None:
        """A computes, B fetches what A computed, and has it from then on."""
        account = self._account
        account.chapter("1  Node A reads the document and answers: nobody has computed it yet")
        first = self._ask("A", texts.DOCUMENT, texts.QUESTION_FIRST)
        account.chapter("2  Node B, another question, without the mesh: what it would cost")
        cold = self._ask("B", texts.DOCUMENT, texts.QUESTION_OTHER_NODE, mesh=False)
        account.chapter("3  Node B, the same question, with the mesh: the cache comes from node A")
        fetched = self._ask("B", texts.DOCUMENT, texts.QUESTION_OTHER_NODE)
        equal = fetched["tokens"] == cold["tokens"]
        account.verdict(equal, f"the same answer as without the mesh, token for token ({len(cold['tokens'])} tokens)")
        account.chapter("4  Node B, a third question: the cache is in its own memory now")
        local = self._ask("B", texts.DOCUMENT, texts.QUESTION_AGAIN)
        account.chapter("Time to first token")
        account.times(
            [
                ("B without the mesh", cold["ttft_s"]),
                ("B, fetched from A", fetched["ttft_s"]),
                ("B, in its own memory", local["ttft_s"]),
            ]
        )
        self.figures |= {
            "prompt_tokens": fetched["prompt_tokens"],
            "ttft_cold_s": cold["ttft_s"],
            "ttft_mesh_s": fetched["ttft_s"],
            "ttft_local_s": local["ttft_s"],
            "tokens_reused": fetched["tokens_reused"],
            "bytes_moved": fetched["bytes_moved"],
            "load_s": fetched["load_s"],
            "answers_equal": equal,
            "ttft_first_s": first["ttft_s"],
            "chunk_tokens": CHUNK_TOKENS,
            "answer": fetched["text"],
        }

    def _spread(self) -> list[int]:
        """A reads a second text, and C, a node without an engine, keeps a copy. Returns A's answer."""
        account = self._account
        account.chapter("5  Node A reads a notice; node C, which has no engine, keeps a copy of its cache")
        answer = self._ask("A", texts.NOTICE, texts.QUESTION_NOTICE)
        copied = self._cluster.prefetch("C", texts.NOTICE, texts.QUESTION_NOTICE, by="A")
        seen = wait_for(lambda: self._held_by("C") >= copied > 0, SEEN_S)
        account.note(f"node C holds {self._held_by('C')} chunks" + ("" if seen else ": the copy did not arrive"))
        tokens: list[int] = answer["tokens"]
        return tokens

    def _show_map(self) -> None:
        self._account.chapter("The cache map, as the controller sees it")
        document = self._view.map()
        self._account.map(self._view.nodes()["nodes"], {node["name"]: node for node in document["nodes"]})
        self.figures["map"] = document

    def _kill(self, notice_of_a: Sequence[int]) -> None:
        """A dies; B answers from its own memory at once, and later with what C kept."""
        account = self._account
        account.chapter("6  Node A is killed (kill -9, agent and engine). Node B goes on")
        self._cluster.kill("A")
        own = self._ask("B", texts.DOCUMENT, texts.QUESTION_AFTER)
        noticed = wait_for(lambda: self._state_of("A") != "alive", SEEN_S)
        account.note(
            f"the controller sees that A is {self._state_of('A')}"
            if noticed is not None
            else "A is still believed alive"
        )
        account.chapter("7  Node B is asked about the notice, which only A had computed: C has the copy")
        notice = self._ask("B", texts.NOTICE, texts.QUESTION_NOTICE)
        same = notice["tokens"] == list(notice_of_a)
        account.verdict(same, "the same answer as A gave before it died, token for token")
        self.figures["survived_kill"] = bool(own["tokens"]) and same
        self.figures["after_kill"] = {
            "ttft_local_s": own["ttft_s"],
            "ttft_notice_s": notice["ttft_s"],
            "notice_tokens_fetched": notice["tokens_fetched"],
        }

    def _ask(self, node: str, document: str, question: str, *, mesh: bool = True) -> dict[str, Any]:
        self._account.question(question)
        with self._account.under_way(f"node {node}") as under_way:
            answer = self._cluster.ask(node, document, question, mesh=mesh, new_tokens=NEW_TOKENS, under_way=under_way)
        self._account.answer(answer, facts_of(answer))
        if answer["mesh_error"]:
            self._account.note(f"node {node} had to do without the mesh: {answer['mesh_error']}", "yellow")
            self.figures["mesh_errors"].append(answer["mesh_error"])
        return answer

    def _held_by(self, node: str) -> int:
        return sum(int(one["chunks"]) for one in self._view.map()["nodes"] if one["name"] == node)

    def _state_of(self, node: str) -> str:
        return next((str(one["state"]) for one in self._view.nodes()["nodes"] if one["name"] == node), "gone")


def facts_of(answer: dict[str, Any]) -> str:
    """How an answer came about, in a line."""
    reused, prompt, moved = answer["tokens_reused"], answer["prompt_tokens"], answer["bytes_moved"]
    if not reused:
        return f"computed all {prompt:,} tokens"
    facts = f"reused {reused:,} of {prompt:,} tokens"
    if moved:
        facts += f", moved {size_of(moved)} in {seconds(answer['load_s'])} ({size_of(moved / answer['load_s'])}/s)"
    return facts
