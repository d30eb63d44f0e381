"""The commands by name, and what ``kvmesh`` itself understands."""

from __future__ import annotations

from typing import Annotated

import typer

from . import bench, chunks, gossipkeys, look, machine, processes


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"kvmesh {version('kvmesh')}")
        raise typer.Exit


# Plain help: rich's costs 0.15 s at each `--help`, and says no more.
app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.callback(epilog="Exit codes: 0 found or done, 1 nothing found, 2 an error. Every command takes --json.")
def kvmesh(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_version, help="Show the version and exit.")
    ] = False,
) -> None:
    """Share the KV cache of LLM inference engines between machines."""


for command in (
    processes.agent,
    processes.controller,
    look.nodes,
    look.map_,
    look.locate,
    gossipkeys.keys,
    chunks.put,
    chunks.get,
    chunks.pin,
    chunks.unpin,
    chunks.evict,
    gossipkeys.keygen,
    machine.doctor,
    machine.demo,
):
    app.command(name=command.__name__.rstrip("_"))(command)
app.add_typer(bench.app, name="bench")
