"""Converts a Llama in GGUF to a plain float32 folder of transformers. A process of its own: ``python -m
kvmesh.demo.convert GGUF FOLDER``.

It prints a JSON line for each step. A model that transformers loads from GGUF refuses to be saved, since its
configuration still says that it is quantised, although its weights are not any more: so they go into a fresh model
without that.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

STEPS = ("reading the tokenizer", "reading the weights", "writing the model", "done")


def main() -> None:
    """Convert ``argv[1]`` into the folder ``argv[2]``."""
    gguf, folder = Path(sys.argv[1]), Path(sys.argv[2])
    _tell(0)
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer: Any = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    _tell(1)
    loaded: Any = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    _tell(2)
    config = loaded.config.to_dict()
    config.pop("quantization_config")
    model: Any = LlamaForCausalLM(LlamaConfig(**config))  # type: ignore[no-untyped-call]
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config
    folder.mkdir()
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
    _tell(3)


def _tell(done: int) -> None:
    sys.stdout.write(json.dumps({"done": done, "of": len(STEPS) - 1, "what": STEPS[done]}) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
