"""The way in and the way out: from arguments to an exit code, with one sentence on stderr for whatever went wrong.

Exit codes are grep's: 0 found (or done), 1 nothing found, 2 an error. A closed pipe and Ctrl-C end a command silently,
with the shell's codes for these. A traceback is shown only for a bug of ours, and only when ``KVMESH_DEBUG`` asks.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Sequence

import typer

from kvmesh.transport.errors import KVMeshError

ERROR = 2
INTERRUPTED = 128 + signal.SIGINT
PIPE_CLOSED = 128 + signal.SIGPIPE


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command (default: the process's own arguments) and return its exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        code = _run(given)
        sys.stdout.flush()
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        _drop_stdout()
        return PIPE_CLOSED
    except KVMeshError as error:
        return _fail(str(error))
    except typer.TyperException as error:
        return _fail(_usage_sentence(error))
    except Exception as error:  # noqa: BLE001 - the last stop: a bug becomes a sentence, and a traceback on request
        return _fail_unexpectedly(error)
    return code


def _run(arguments: list[str]) -> int:
    from .app import app

    command = typer.main.get_command(app)
    try:
        # Not command.main(): it would print usage errors in its own style, and swallow a closed pipe.
        with command.make_context("kvmesh", arguments[:] or ["--help"]) as context:
            code: int = command.invoke(context)
    except typer.Exit as leaving:
        code = leaving.exit_code
    if not arguments:
        return ERROR  # the help was shown, but nothing was asked for
    return code


def _fail(sentence: str) -> int:
    with contextlib.suppress(BrokenPipeError):
        typer.echo(f"kvmesh: {' '.join(sentence.split())}", err=True)
    return ERROR


def _usage_sentence(error: typer.TyperException) -> str:
    """What was wrong with the arguments, and where the right ones are listed."""
    context = getattr(error, "ctx", None)
    where = context.command_path if context else "kvmesh"
    message = error.format_message()
    return f"{message}{'' if message.endswith(('.', '?', '!')) else '.'} See '{where} --help'."


def _fail_unexpectedly(error: Exception) -> int:
    if os.environ.get("KVMESH_DEBUG"):
        import traceback

        traceback.print_exception(error)
        return ERROR
    return _fail(
        f"unexpected {type(error).__name__}: {error}. This is a bug in kvmesh; KVMESH_DEBUG=1 shows where it happened."
    )


def _drop_stdout() -> None:
    """Send what is still buffered to nowhere, or the interpreter complains about the closed pipe when it exits."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
