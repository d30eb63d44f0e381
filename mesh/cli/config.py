"""The TOML file of the long-running commands: the same names as the flags, at the top or in a table for one command.

    name = "n1"                      # what is at the top holds for every command that has the flag
    join = ["10.0.0.1:7951"]
    memory = "64GiB"

    [controller]                     # what is in a command's table wins over the top
    mesh-port = 7960

A name may be written with '-' or '_'. A name that no flag has is an error: a misspelt setting must not pass in silence.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import typer

from kvmesh.transport.errors import SettingsError

from .files import read_bytes

NODE_NAMES: dict[str, tuple[type, ...]] = {
    "name": (str,),
    "bind": (str,),
    "mesh_port": (int,),
    "join": (list, str),
    "log_level": (str,),
    "membership": (str,),
    "gossip_port": (int,),
    "advertise": (str,),
    "advertise_mesh_port": (int,),
    "profile": (str,),
    "label": (str,),
    "key_file": (str,),
    "state_dir": (str,),
}
AGENT_NAMES: dict[str, tuple[type, ...]] = {"memory": (str, int), "socket": (str,), "transports": (str,)}
COMMANDS = {"agent": {**NODE_NAMES, **AGENT_NAMES}, "controller": NODE_NAMES}
WORDS = {str: "text", int: "a whole number", list: "a list of texts"}


def load(context: typer.Context, path: Path | None) -> Path | None:
    """The callback of ``--config``: makes the file's values the defaults of every other flag of this command."""
    if path is not None and not context.resilient_parsing:
        context.default_map = read_config(path, str(context.info_name))
    return path


def read_config(path: Path, command: str) -> dict[str, Any]:
    """The settings for `command` in the file, by parameter name. Raises `SettingsError`, naming it."""
    try:
        document = tomllib.loads(read_bytes(path, flag="--config").decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsError(f"--config {path} is not TOML: {error}") from None
    tables = {name: document.pop(name) for name in COMMANDS if isinstance(document.get(name), dict)}
    # One file may serve an agent and a controller, so the top may also hold what only the other one has.
    found = _checked(path, "", document, COMMANDS["agent"])
    for name, table in tables.items():
        settings = _checked(path, f"[{name}] ", table, COMMANDS[name])
        if name == command:
            found |= settings
    return {name: value for name, value in found.items() if name in COMMANDS[command]}


def _checked(path: Path, where: str, table: dict[str, Any], names: dict[str, tuple[type, ...]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    unknown: list[str] = []
    for written, value in table.items():
        name = written.replace("-", "_")
        if name not in names:
            unknown.append(written)
            continue
        if name in found:
            raise SettingsError(f"--config {path}: {where}{written} is given twice, with '-' and with '_'")
        if type(value) not in names[name] or (
            isinstance(value, list) and not all(isinstance(one, str) for one in value)
        ):
            expected = " or ".join(WORDS[kind] for kind in names[name])
            raise SettingsError(f"--config {path}: {where}{written} must be {expected}, not {value!r}")
        found[name] = [value] if name == "join" and isinstance(value, str) else value
        if isinstance(value, int):
            found[name] = str(value)
    if unknown:
        known = ", ".join(name.replace("_", "-") for name in names)
        plural = "is not a setting" if len(unknown) == 1 else "are not settings"
        if not where:
            known += f", and the tables {' and '.join(f'[{name}]' for name in COMMANDS)}"
        raise SettingsError(f"--config {path}: {where}{', '.join(unknown)} {plural}; the settings are {known}")
    return found
