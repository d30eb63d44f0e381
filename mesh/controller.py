"""The controller: a process with a map of everyone and no store. It answers *locate*, and shows the nodes and the map.

It is a node like the others, without chunks: it follows every journal and keeps nothing that the nodes do not have. Run
none, one or several; any of them may die at any moment, and a new one has the whole map as soon as it has read the
journals.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

from kvmesh.node import Node, Ready, epoch_now, live, open_node
from kvmesh.settings import ControllerSettings


def run(settings: ControllerSettings, on_ready: Ready) -> None:
    """Run a controller until SIGTERM or SIGINT. Raises `SettingsError` for an address that it cannot listen on."""

    async def main(stopping: asyncio.Event) -> None:
        async with open_controller(settings) as node:
            on_ready(node.facts())
            await stopping.wait()

    live(main)


@asynccontextmanager
async def open_controller(settings: ControllerSettings) -> AsyncIterator[Node]:
    """A controller that runs on this loop until the block ends."""
    epoch = epoch_now()

    def stats() -> dict[str, Any]:
        return {"node": settings.name, "epoch": epoch}

    async with AsyncExitStack() as stack:
        node = await open_node(stack, settings, "controller", None, None, epoch, stats)
        stack.push_async_callback(node.discovery.stop)
        await node.discovery.start()
        yield node
