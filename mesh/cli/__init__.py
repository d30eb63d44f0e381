"""The command line: what each command is called and told, how its answer looks, and which exit code it gives.

Owns flags, files, tables, JSON and sentences; refuses to know how an agent, a fetch or a map works. Everything runs on
the main thread. The modules: `entry` (from errors to exit codes), `app` (the commands by name), `options` (flags that
commands share), `config` (the TOML file), `output` (tables, units, JSON), `reach` (where a command finds the cluster),
`files` and `chunkfile` (what a command reads and writes), and the commands themselves: `processes`, `look`, `chunks`,
`gossipkeys`, `machine`.

``kvmesh --help`` must answer at once, so nothing that it imports brings numpy, torch, zmq, asyncio or rich: a command
imports what it needs when it runs. A test holds that.
"""

from .entry import main

__all__ = ["main"]
