"""The demo's engine: one process with a model, which answers questions about a document and says what the mesh did for
it.

    python -m kvmesh.demo.engine MODEL_FOLDER NAME AGENT_SOCKET CHUNK_TOKENS

It reads commands as JSON lines from stdin and writes events as JSON lines to stdout, until stdin ends:

    {"do": "ask", "document", "question", "mesh": true, "new_tokens": 24}
        → {"event": "layer", "done", "of"} …  while the prompt is computed
        → {"event": "text", "text"} …         the answer so far
        → {"event": "answer", "text", "tokens", "prompt_tokens", "ttft_s", …}
    {"do": "prefetch", "socket", "document", "question"}
        → {"event": "prefetch", "chunks"}     another node's agent was asked to fetch the prompt's chunks

All in one thread. The real stdout is kept for events: whatever a library prints goes to stderr.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from typing import Any, TextIO

STEPS = ("importing torch and transformers", "loading the model", "measuring")


class Events:
    """The way out: one JSON document a line."""

    def __init__(self, out: TextIO) -> None:
        self._out = out

    def emit(self, event: str, **fields: Any) -> None:
        """Write one event."""
        self._out.write(json.dumps({"event": event, **fields}) + "\n")
        self._out.flush()


class Engine:
    """A model, its tokenizer and its way into the mesh."""

    def __init__(self, folder: str, name: str, socket: str, chunk_tokens: int, events: Events) -> None:
        self._events = events
        self._loading(0)
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils import logging

        from kvmesh.engines.transformers import MeshModel

        logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        self._loading(1)
        self._tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self._loading(2)
        self._model = MeshModel(model.eval(), socket, name=name, chunk_tokens=chunk_tokens)
        self._prefilling = False
        self._follow_layers(model)

    def ask(self, document: str, question: str, *, mesh: bool, new_tokens: int) -> None:
        """Answer greedily, and say how it went."""
        tokens = self._tokens(document, question)
        prompt_tokens = tokens.shape[1]
        self._prefilling = True
        result = self._model.generate(
            tokens, use_mesh=mesh, max_new_tokens=new_tokens, do_sample=False, streamer=_Streamer(self)
        )
        answer = result.sequences[0, prompt_tokens:].tolist()
        self._events.emit(
            "answer",
            text=self._text(answer),
            tokens=answer,
            prompt_tokens=prompt_tokens,
            tokens_reused=result.tokens_reused,
            tokens_fetched=result.tokens_fetched,
            tokens_published=result.tokens_published,
            bytes_moved=result.bytes_moved,
            load_s=result.load_s,
            ttft_s=result.ttft_s,
            total_s=result.total_s,
            mesh_error=result.mesh_error,
        )

    def prefetch(self, socket: str, document: str, question: str) -> None:
        """Ask the agent at `socket` to fetch this prompt's chunks from whoever has them."""
        import kvmesh

        space = self._model.space
        chain = space.chain(self._tokens(document, question)[0])
        with kvmesh.connect(socket) as mesh:
            self._events.emit("prefetch", chunks=mesh.prefetch(space, chain))

    def said(self, tokens: list[int]) -> None:
        """A new token exists: these are the answer's so far."""
        self._prefilling = False
        self._events.emit("text", text=self._text(tokens))

    def _loading(self, step: int) -> None:
        self._events.emit("loading", done=step, of=len(STEPS), what=STEPS[step])

    def _tokens(self, document: str, question: str) -> Any:
        prompt = f"{document}\n{question}"
        if self._tokenizer.chat_template:
            message = [{"role": "user", "content": prompt}]
            prompt = self._tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        return self._tokenizer(prompt, return_tensors="pt", add_special_tokens=False).input_ids

    def _text(self, tokens: list[int]) -> str:
        return " ".join(str(self._tokenizer.decode(tokens, skip_special_tokens=True)).split())

    def _follow_layers(self, model: Any) -> None:
        """Tell how far a prefill is: it is the one long step of an answer."""
        layers = getattr(model.get_decoder(), "layers", ())
        for index, layer in enumerate(layers):

            def done(*_: Any, done: int = index + 1) -> None:
                if self._prefilling:
                    self._events.emit("layer", done=done, of=len(layers))

            layer.register_forward_hook(done)


class _Streamer:
    """What generate() hands the prompt to, and then each token."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._answer: list[int] | None = None

    def put(self, tokens: Any) -> None:
        """The prompt comes first, then one token at a time."""
        if self._answer is None:
            self._answer = []
        else:
            self._answer += tokens.tolist()
            self._engine.said(self._answer)

    def end(self) -> None:
        """Nothing: the whole answer follows as an event of its own."""


def main() -> None:
    """Load, then serve commands until stdin ends."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    events = Events(out)
    folder, name, socket, chunk_tokens = sys.argv[1:]
    engine = Engine(folder, name, socket, int(chunk_tokens), events)
    commands: dict[str, Callable[..., None]] = {"ask": engine.ask, "prefetch": engine.prefetch}
    events.emit("ready")
    for line in sys.stdin:
        command = json.loads(line)
        commands[command.pop("do")](**command)


if __name__ == "__main__":
    main()
