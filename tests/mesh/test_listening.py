"""The agent's socket path: one agent, one user, whatever a killed one left behind."""

import asyncio
import os
import socket
from pathlib import Path
from unittest.mock import Mock

import pytest

from kvmesh import listening
from kvmesh.listening import Listener
from kvmesh.transport.errors import SettingsError


def test_a_path_that_cannot_be_used_is_refused_with_its_reason(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="shorter"):
        Listener(tmp_path / ("x" * 120), Mock())
    (tmp_path / "file").write_text("")
    with pytest.raises(SettingsError, match=r"directory .* cannot be used"):
        Listener(tmp_path / "file" / "agent.sock", Mock())
    (tmp_path / "agent.sock").mkdir()
    with pytest.raises(SettingsError, match="something else is there already"):
        Listener(tmp_path / "agent.sock", Mock())
    (tmp_path / "link.sock.lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(SettingsError, match="cannot be used"):
        Listener(tmp_path / "link.sock", Mock())
    assert not (tmp_path / "elsewhere").exists()


def test_another_users_directory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = tmp_path / "theirs"
    directory.mkdir()
    os.chown(directory, 12345, 12345)
    with pytest.raises(SettingsError, match="belongs to another user"):
        Listener(directory / "agent.sock", Mock())
    monkeypatch.setattr(listening.os, "getuid", lambda: 12345)
    asyncio.run(close(Listener(directory / "agent.sock", Mock())))


async def close(listener: Listener) -> None:
    await listener.close()


def test_a_socket_that_a_killed_agent_left_is_replaced_and_a_living_ones_is_not(tmp_path: Path) -> None:
    path = tmp_path / "agent.sock"
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(path))

    async def use() -> None:
        first = Listener(path, Mock())
        with pytest.raises(SettingsError, match="another agent serves"):
            Listener(path, Mock())
        assert path.is_socket()
        assert path.stat().st_mode & 0o777 == 0o600
        await first.close()
        assert not path.exists()
        await Listener(path, Mock()).close()

    asyncio.run(use())


def test_a_connection_of_another_user_is_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def use() -> None:
        listener = Listener(tmp_path / "agent.sock", Mock())
        monkeypatch.setattr(listening, "_same_user", lambda _connection: False)
        listener.start()
        reader, writer = await asyncio.open_unix_connection(tmp_path / "agent.sock")
        assert await reader.read() == b""
        writer.close()
        await writer.wait_closed()
        assert listener.clients == 0
        await listener.close()

    asyncio.run(use())


def test_the_owner_of_a_connection_is_told_by_the_kernel() -> None:
    near, far = socket.socketpair()
    with near, far:
        assert listening._same_user(near)
