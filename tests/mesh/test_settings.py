"""The settings' own checks: each mistake is one sentence that names the flag."""

from pathlib import Path

import pytest

from kvmesh.discovery.swim import profile
from kvmesh.settings import (
    PROFILES,
    AgentSettings,
    ControllerSettings,
    NodeSettings,
    is_loopback,
    name_default,
    parse_address,
    parse_advertise,
    parse_port,
    parse_size,
    parse_transports,
    socket_default,
    state_dir_default,
)
from kvmesh.transport.errors import SettingsError


def test_defaults_are_usable():
    settings = AgentSettings()
    assert settings.name == name_default()
    assert (settings.bind, settings.mesh_port, settings.join) == ("127.0.0.1", 7950, ())
    assert (settings.membership, settings.gossip_port, settings.profile) == ("gossip", 7951, "lan")
    assert (settings.advertise, settings.label, settings.key_file) == ("", "", None)
    assert settings.members_file == state_dir_default() / f"{name_default()}.members"
    assert settings.memory_bytes == 4 << 30
    assert settings.advertise_mesh_port == 0
    assert settings.socket == socket_default()


@pytest.mark.parametrize(
    ("text", "size"),
    [("8GiB", 8 << 30), ("512MB", 512_000_000), ("1.5 gib", 3 << 29), ("4096", 4096), ("64KiB", 65536), ("10b", 10)],
)
def test_sizes(text: str, size: int):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "-1GiB", "8G", "8 GiB x", "1e9", "8,5GiB"])
def test_what_is_not_a_size_is_said_with_an_example(text: str):
    with pytest.raises(SettingsError, match=r"--memory .* is not a size: write for example 8GiB"):
        parse_size(text)


@pytest.mark.parametrize(
    ("text", "address"),
    [("127.0.0.1:7950", ("127.0.0.1", 7950)), ("n1:1", ("n1", 1)), ("[::1]:65535", ("::1", 65535))],
)
def test_addresses(text: str, address: tuple[str, int]):
    assert parse_address(text, flag="--join") == address


@pytest.mark.parametrize("text", ["", "n1", "n1:", ":7950", "n1:0", "n1:65536", "::1:7950", "tcp://n1:7950", "n1:79x"])
def test_what_is_not_an_address_is_said_with_an_example(text: str):
    with pytest.raises(SettingsError, match=r"--join .* is not an address: write HOST:PORT"):
        parse_address(text, flag="--join")


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("10.0.0.5", ("10.0.0.5", None)),
        ("10.0.0.5:7951", ("10.0.0.5", 7951)),
        ("[fd00::5]:1", ("fd00::5", 1)),
        ("[fd00::5]", ("fd00::5", None)),
        ("fd00:0::5", ("fd00::5", None)),
    ],
)
def test_addresses_to_advertise(text: str, address: tuple[str, int | None]):
    assert parse_advertise(text) == address


@pytest.mark.parametrize(
    "text", ["n1", "10.0.0.5:0", "10.0.0.5:65536", "10.0.0.5:", "0.0.0.0:1", "[::]:1", "[10.0.0.5", "[]:1", "1.2.3:4"]
)
def test_what_cannot_be_advertised_is_said_with_an_example(text: str):
    with pytest.raises(SettingsError, match=r"--advertise .* is not an address: write IP or IP:PORT"):
        parse_advertise(text)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2", "127.255.255.254", "::1", "0:0::1", "localhost"])
def test_loopback(host: str):
    assert is_loopback(host)
    assert NodeSettings(bind=host).bind == host


@pytest.mark.parametrize(
    "host", ["0.0.0.0", "::", "10.0.0.1", "128.0.0.1", "::ffff:127.0.0.1", "n1", "", "127.0.0.1:1"]
)
def test_what_is_not_loopback_is_refused(host: str):
    assert not is_loopback(host)
    with pytest.raises(SettingsError, match="loopback only"):
        NodeSettings(bind=host)


def test_the_profiles_are_those_of_the_protocol():
    assert tuple(profile.PROFILES) == PROFILES


@pytest.mark.parametrize("text", ["-1", "65536", "abc", "", "7950 ", "1e3"])
def test_what_is_not_a_port_is_said(text: str):
    with pytest.raises(SettingsError, match=r"--mesh-port .*use a port from 1 to 65535, or 0"):
        parse_port(text)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"name": ""}, "--name ''"),
        ({"name": "two words"}, "--name 'two words'"),
        ({"name": "-n"}, "--name '-n'"),
        ({"name": "n" * 129}, "at most 128"),
        ({"bind": "0.0.0.0"}, "--bind 0.0.0.0: kvmesh listens on loopback only"),
        ({"mesh_port": 70000}, "--mesh-port 70000"),
        ({"join": ("n1",)}, "--join 'n1' is not an address: write HOST:PORT, for example 127.0.0.1:7951"),
        ({"log_level": "loud"}, "--log-level 'loud': use one of debug, info, warning, error"),
        ({"membership": "magic"}, "--membership 'magic': use one of gossip, static"),
        ({"gossip_port": 70000}, "--gossip-port 70000: use a port"),
        ({"advertise": "n1:7951"}, "--advertise 'n1:7951' is not an address: write IP or IP:PORT"),
        ({"advertise_mesh_port": 70000}, "--advertise-mesh-port 70000: use a port from 1 to 65535, or 0 for the one"),
        ({"profile": "moon"}, "--profile 'moon': use one of lan, wan, local"),
        ({"label": "\N{EURO SIGN}" * 86}, "--label: use at most 255 bytes"),
        ({"key_file": Path("k"), "membership": "static"}, "--key-file encrypts gossip"),
        ({"label": "a", "membership": "static"}, "--label is gossip's, which --membership static does without"),
        ({"advertise": "10.0.0.5", "membership": "static"}, "--advertise is told by gossip"),
        ({"join": ("n1",), "membership": "static"}, "for example 127.0.0.1:7950"),
    ],
)
@pytest.mark.parametrize("kind", [NodeSettings, AgentSettings, ControllerSettings])
def test_every_process_checks_what_it_is_told(kind: type[NodeSettings], fields: dict, sentence: str):
    with pytest.raises(SettingsError) as caught:
        kind(**fields)
    assert sentence in str(caught.value)


def test_an_agent_needs_room_and_a_socket_path_that_the_kernel_takes():
    with pytest.raises(SettingsError, match="--memory 100: too small"):
        AgentSettings(memory_bytes=100)
    with pytest.raises(SettingsError, match="at most 107 bytes"):
        AgentSettings(socket=Path("/tmp") / ("x" * 103))
    assert AgentSettings(socket=Path("/tmp") / ("x" * 102)).name == name_default()


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("shm,nixl,zmq", ("shm", "nixl", "zmq")),
        ("nixl, shm", ("nixl", "shm", "zmq")),
        ("zmq,shm", ("shm", "zmq")),
        ("zmq", ("zmq",)),
        ("shm,shm,", ("shm", "zmq")),
        ("", ("zmq",)),
    ],
)
def test_transports_in_order_of_preference_and_zmq_is_always_the_last(text: str, names: tuple[str, ...]):
    assert parse_transports(text) == names
    assert AgentSettings(transports=names).transports == names


def test_a_transport_that_nobody_knows_is_refused_with_those_that_are():
    with pytest.raises(SettingsError, match="--transports 'rdma': use one of shm, nixl, zmq"):
        parse_transports("shm,rdma")
    with pytest.raises(SettingsError, match="--transports 'rdma': use one of"):
        AgentSettings(transports=("rdma", "zmq"))
    for given in (("shm",), (), ("shm", "shm", "zmq"), ("zmq", "shm")):
        with pytest.raises(SettingsError, match="name each once, and zmq last"):
            AgentSettings(transports=given)


def test_the_socket_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("KVMESH_SOCKET", raising=False)
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    monkeypatch.setattr("os.getuid", lambda: 1234)
    assert socket_default() == Path("/tmp/kvmesh-1234/agent.sock")
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/1234")
    assert socket_default() == Path("/run/user/1234/kvmesh/agent.sock")
    monkeypatch.setenv("KVMESH_SOCKET", "/srv/a.sock")
    assert socket_default() == Path("/srv/a.sock")


def test_the_state_is_kept_where_the_environment_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr("os.getuid", lambda: 1234)
    monkeypatch.setenv("XDG_STATE_HOME", "/srv/state")
    assert state_dir_default() == Path("/srv/state/kvmesh")
    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert state_dir_default() == tmp_path / ".local" / "state" / "kvmesh"
    monkeypatch.setenv("HOME", str(tmp_path / "nobody"))
    assert state_dir_default() == Path("/tmp/kvmesh-1234")
    monkeypatch.setenv("HOME", ".")
    assert state_dir_default() == Path("/tmp/kvmesh-1234")


@pytest.mark.parametrize(
    ("devices", "expected"), [(("mlx5_0",), ("shm", "nixl", "zmq")), ((), ("shm", "zmq")), (None, ("shm", "zmq"))]
)
def test_nixl_is_used_unasked_only_where_there_is_rdma(
    devices: tuple[str, ...] | None, expected: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "infiniband"
    if devices is not None:
        folder.mkdir()
        for name in devices:
            (folder / name).mkdir()
    monkeypatch.setattr("kvmesh.settings.RDMA_DEVICES", folder)
    assert AgentSettings().transports == expected
