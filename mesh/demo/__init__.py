"""The demo: the whole idea on one machine, with real processes and a real model. Nothing here is imported by anything
else.

    run ── story ──┬── children ── controller, agents A, B, C     (python -m kvmesh.cli …)
                   │            └─ engines of A and B             (python -m kvmesh.demo.engine, JSON lines)
                   ├── model ──── convert                         (python -m kvmesh.demo.convert, once)
                   └── account                                    what people see
"""

from __future__ import annotations


def run(*, json: bool = False, model: str | None = None) -> int:
    """Run the demo and return the exit code: 0 when all went as it should, 1 when not, 130 after Ctrl-C.

    `json`: print the figures as one JSON document instead of the account. `model`: a transformers model folder to use
    instead of SmolLM2-135M-Instruct. Raises `SettingsError` when the model is missing or not usable.
    """
    from kvmesh.demo.main import run as run_

    return run_(json=json, model=model)
