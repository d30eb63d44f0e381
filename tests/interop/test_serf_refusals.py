"""Who has another key, or another label, is refused and counted, by ours and by Serf alike."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from kvmesh.discovery.wire.keyring import Keyring, generate
from kvmesh.discovery.wire.messages import Ping
from kvmesh.discovery.wire.packets import PacketCodec
from tests.cluster.views import states, wait_states
from tests.interop.support import Mesh, counters, new_key, wait_serf_states
from tests.support.cluster import Process
from tests.support.serf import installed
from tests.support.waiting import wait_until

pytestmark = [
    pytest.mark.skipif(not installed(), reason="serf is not installed"),
    pytest.mark.cluster,
    pytest.mark.slow,  # real processes
]

STREAM_REFUSED = r"\[ERR\] memberlist: failed to receive: .*(encrypt|decrypt|cipher)"
LABELLED = r"\[ERR\] memberlist: failed to receive: Encryption is configured but remote state is not encrypted"
PACKET_REFUSED = r"\[ERR\] memberlist: Decrypt packet failed: No installed keys could decrypt the message"


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[Mesh]:
    with ExitStack() as stack:
        yield Mesh(tmp_path, new_key(), stack)


def refused(process: Process) -> dict[str, Any]:
    return dict(counters(process)["gossip"]["network"]["refused"])


def send(address: str, packet: bytes) -> None:
    host, _, port = address.rpartition(":")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
        udp.sendto(packet, (host, int(port)))


def test_another_key_and_none_at_all_are_refused_by_both_kinds(mesh: Mesh) -> None:
    s = mesh.serf("s")
    a = mesh.ours("a", join=[s.address])
    wrong = mesh.ours("wrong", join=[s.address], key=new_key())
    none = mesh.ours("none", join=[s.address], key="")
    for process in (a, wrong, none):
        process.wait_ready()
    stranger = mesh.serf("stranger", key=new_key())
    bare = mesh.serf("bare", key="")
    wait_states([a], {"a": "alive", "s": "alive"}, 15)

    # Serf refuses their streams and says so; they hear nothing that they could read, and say so.
    wait_until(lambda: s.says(STREAM_REFUSED) >= 2, 15, "Serf has refused the streams of two strangers")
    for process in (wrong, none):
        wait_until(lambda process=process: s.address in process.log, 15, f"{process.name} says that it cannot join")
        assert states(process) == {process.name: "alive"}

    # Ours refuses the streams of Serf agents, and counts them by cause.
    for agent in (stranger, bare):
        with pytest.raises(AssertionError, match="serf join said"):
            agent.join(a.gossip_address)
    assert {name: refused(a)[name] for name in ("undecryptable", "plaintext")} == {"undecryptable": 1, "plaintext": 1}
    with pytest.raises(AssertionError, match="serf join said"):
        stranger.join(none.gossip_address)
    assert refused(none)["encrypted"] >= 1
    assert "--key-file" in a.log

    # And packets likewise.
    ping = PacketCodec(Keyring([generate()])).seal([Ping(1, "s")], crc=False)
    send(s.address, ping)
    wait_until(lambda: s.says(PACKET_REFUSED), 5, "Serf has refused a packet")
    send(a.gossip_address, ping)
    send(a.gossip_address, PacketCodec(None).seal([Ping(1, "a")], crc=False))
    wait_until(
        lambda: (refused(a)["undecryptable"], refused(a)["plaintext"]) == (2, 2), 5, "ours has refused two packets"
    )

    everyone = {"a": "alive", "s": "alive"}
    assert states(a) == everyone
    wait_serf_states([s], everyone, 1)
    # The strangers were refused: that is what was to be shown. Each says why at its end.
    mesh.assert_no_complaints(STREAM_REFUSED, PACKET_REFUSED, r"\[WARN\] agent: error joining: ")


def test_another_label_is_refused_by_both_kinds(mesh: Mesh) -> None:
    s = mesh.serf("s")
    a = mesh.ours("a", join=[s.address], flags=["--label", "mesh"])
    b = mesh.ours("b", join=[s.address])
    for process in (a, b):
        process.wait_ready()
    same = mesh.ours("same", join=[a.gossip_address], flags=["--label", "mesh"])
    other = mesh.ours("other", join=[a.gossip_address], flags=["--label", "other"])
    for process in (same, other):
        process.wait_ready()
    wait_states([a, same], {"a": "alive", "same": "alive"}, 15)
    wait_until(lambda: refused(a).get("wrong_label", 0) >= 1, 15, "a has refused another label")
    with pytest.raises(AssertionError, match="serf join said"):
        s.join(a.gossip_address)
    assert "--label" in a.log
    assert states(other) == {"other": "alive"}
    wait_states([b], {"b": "alive", "s": "alive"}, 15)
    wait_serf_states([s], {"b": "alive", "s": "alive"}, 5)
    # This Serf knows no labels: to it, a labelled stream is one that is not encrypted.
    mesh.assert_no_complaints(LABELLED, r"\[WARN\] agent: error joining: ")
