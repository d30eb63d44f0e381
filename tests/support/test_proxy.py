"""The proxy does what it is told, to the byte, and nothing else."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pytest

from tests.support.proxy import Proxy
from tests.support.waiting import wait_until

KIB, MIB = 1 << 10, 1 << 20
PATTERN = bytes(range(256)) * 4096


class Echo:
    """Accepts connections, one after the other, and lets a test speak on the far end of each."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._ends = [self._listener]

    def dial(self, proxy: Proxy) -> tuple[socket.socket, socket.socket]:
        """(Near end, far end) of a new connection through the proxy."""
        before = proxy.accepted
        near = socket.create_connection(("127.0.0.1", proxy.port), timeout=5)
        self._ends.append(near)
        self._listener.settimeout(5)
        far, _ = self._listener.accept()
        far.settimeout(5)
        self._ends.append(far)
        wait_until(lambda: proxy.accepted > before, 5, "the proxy knows the connection")
        return near, far

    def close(self) -> None:
        for end in self._ends:
            end.close()


@pytest.fixture
def echo() -> Iterator[Echo]:
    echo = Echo()
    yield echo
    echo.close()


@pytest.fixture
def proxy(echo: Echo) -> Iterator[Proxy]:
    with Proxy(echo.address, seed=1) as proxy:
        yield proxy


def receive(end: socket.socket, count: int) -> bytes:
    """Exactly `count` bytes, or what came before the end."""
    parts = bytearray()
    while len(parts) < count:
        part = end.recv(count - len(parts))
        if not part:
            break
        parts += part
    return bytes(parts)


@contextmanager
def sending(end: socket.socket, data: bytes) -> Iterator[None]:
    """Send `data` beside the block; the block reads at least so much of it that the sender ends."""

    def send() -> None:
        with suppress(OSError):  # cut: the test looks at the other end
            end.sendall(data)

    thread = threading.Thread(target=send)
    thread.start()
    yield
    thread.join()


def test_bytes_pass_both_ways_and_are_counted(echo: Echo, proxy: Proxy) -> None:
    near, far = echo.dial(proxy)
    with sending(far, PATTERN):
        assert receive(near, len(PATTERN)) == PATTERN
    near.sendall(b"ok")
    assert receive(far, 2) == b"ok"
    wait_until(lambda: (proxy.up.bytes, proxy.down.bytes) == (2, len(PATTERN)), 5, "all bytes are counted")
    assert (proxy.accepted, proxy.connections) == (1, 1)


def test_the_end_of_one_direction_passes_and_the_other_goes_on(echo: Echo, proxy: Proxy) -> None:
    near, far = echo.dial(proxy)
    near.sendall(b"request")
    near.shutdown(socket.SHUT_WR)
    assert receive(far, 100) == b"request"
    far.sendall(b"answer")
    far.close()
    assert receive(near, 100) == b"answer"
    wait_until(lambda: proxy.connections == 0, 5, "the connection has ended")


def test_the_end_of_the_one_who_connected_is_told_to_the_target(echo: Echo, proxy: Proxy) -> None:
    near, far = echo.dial(proxy)
    near.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    near.close()
    with pytest.raises(ConnectionResetError):
        receive(far, 1)


def test_delay_and_jitter_keep_the_order(echo: Echo, proxy: Proxy) -> None:
    near, far = echo.dial(proxy)
    proxy.down.delay_s, proxy.down.jitter_s = 0.03, 0.02
    began = time.monotonic()
    for index in range(20):
        far.sendall(bytes([index]))
    assert receive(near, 1) == b"\0"
    assert time.monotonic() - began >= 0.03
    assert receive(near, 19) == bytes(range(1, 20))
    began = time.monotonic()
    near.sendall(b"up")
    assert receive(far, 2) == b"up"
    assert time.monotonic() - began < 0.03  # the other direction is not delayed


def test_a_delay_costs_no_throughput(echo: Echo, proxy: Proxy) -> None:
    near, far = echo.dial(proxy)
    proxy.down.delay_s = 0.05
    began = time.monotonic()
    with sending(far, PATTERN * 8):
        assert receive(near, 8 * len(PATTERN)) == PATTERN * 8
    # Were each block delayed after the one before, 8 MiB in blocks of at most 1 MiB would take 8 delays at least.
    assert time.monotonic() - began < 8 * 0.05


@pytest.mark.slow  # a rate takes time to see
def test_a_throttled_direction_has_its_rate_over_all_connections(echo: Echo, proxy: Proxy) -> None:
    ends = [echo.dial(proxy) for _ in range(2)]
    proxy.down.bytes_per_s = 4 * MIB
    began = time.monotonic()
    with sending(ends[0][1], PATTERN[: 512 * KIB]), sending(ends[1][1], PATTERN[: 512 * KIB]):
        for near, _ in ends:
            assert receive(near, 512 * KIB) == PATTERN[: 512 * KIB]
    assert 0.2 <= time.monotonic() - began < 1.0  # 1 MiB at 4 MiB/s: a quarter of a second


@pytest.mark.parametrize("resets", [True, False])
@pytest.mark.parametrize("count", [0, 1, 1000, MIB + 1])
def test_a_connection_is_cut_at_the_byte(echo: Echo, proxy: Proxy, count: int, resets: bool) -> None:
    proxy.down.cut_after_bytes, proxy.down.cut_resets = count, resets
    if not count:
        try:
            near = socket.create_connection(("127.0.0.1", proxy.port), timeout=5)
        except ConnectionResetError:  # the reset may come before the connection is seen to stand
            assert resets
            return
        with near:
            assert ends_of(near, 1) == (b"", resets)
        return
    near, far = echo.dial(proxy)
    with sending(far, PATTERN * 2):
        got, reset = ends_of(near, 2 * len(PATTERN))
    assert reset == resets
    wait_until(lambda: proxy.down.bytes == count, 5, "all bytes are counted")
    if not resets:  # a reset may overtake what the kernel has not handed out
        assert got == (PATTERN * 2)[:count]


def ends_of(end: socket.socket, count: int) -> tuple[bytes, bool]:
    """What comes before the end, and whether the end was a reset."""
    parts = bytearray()
    try:
        while part := end.recv(count):
            parts += part
    except ConnectionResetError:
        return bytes(parts), True
    return bytes(parts), False


@pytest.mark.parametrize("resets", [True, False])
def test_open_connections_are_cut_at_once_and_new_ones_may_come(echo: Echo, proxy: Proxy, resets: bool) -> None:
    near, far = echo.dial(proxy)
    near.sendall(b"a")
    assert receive(far, 1) == b"a"
    proxy.cut(reset=resets)
    assert ends_of(near, 1) == (b"", resets)
    assert ends_of(far, 1) == (b"", resets)
    near, far = echo.dial(proxy)
    far.sendall(b"b")
    assert receive(near, 1) == b"b"


def test_a_black_hole_accepts_and_passes_nothing(echo: Echo, proxy: Proxy) -> None:
    proxy.black_hole = True
    near, far = echo.dial(proxy)
    with sending(near, PATTERN * 16):  # ends: it is thrown away, and nobody is held back
        pass
    far.settimeout(0.05)
    with pytest.raises(TimeoutError):
        far.recv(1)
    proxy.black_hole = False
    near.sendall(b"still lost")
    with pytest.raises(TimeoutError):
        far.recv(1)
    near, far = echo.dial(proxy)
    near.sendall(b"a")
    assert receive(far, 1) == b"a"


def test_swallowed_connections_are_dead_and_nobody_is_told(echo: Echo, proxy: Proxy) -> None:
    near, far = echo.dial(proxy)
    near.sendall(b"a")
    assert receive(far, 1) == b"a"
    proxy.swallow()
    wait_until(lambda: all(connection.hole for connection in proxy._open()), 5, "it is a hole")
    near.sendall(b"lost")
    far.settimeout(0.05)
    with pytest.raises(TimeoutError):
        far.recv(1)
    near.close()
    with pytest.raises(TimeoutError):
        far.recv(1)


def test_a_pause_loses_nothing_and_holds_the_sender_back(echo: Echo, proxy: Proxy) -> None:
    near, far = echo.dial(proxy)
    far.sendall(b"a")
    assert receive(near, 1) == b"a"
    proxy.pause()
    data = PATTERN * 32
    with sending(far, data):
        near.settimeout(0.05)
        with pytest.raises(TimeoutError):
            near.recv(1)
        near.settimeout(5)
        assert proxy.down.bytes == 1
        proxy.resume()
        assert receive(near, len(data)) == data


def test_a_pause_of_what_is_open_lets_new_connections_pass(echo: Echo, proxy: Proxy) -> None:
    near, far = echo.dial(proxy)
    proxy.pause(new=False)
    far.sendall(b"later")
    other_near, other_far = echo.dial(proxy)
    other_far.sendall(b"now")
    assert receive(other_near, 3) == b"now"
    near.settimeout(0.02)
    with pytest.raises(TimeoutError):
        near.recv(1)
    near.settimeout(5)
    proxy.resume()
    assert receive(near, 5) == b"later"
    proxy.pause(first=1)
    far.sendall(b"first")
    other_far.sendall(b"second")
    assert receive(near, 5) == b"first"
    other_near.settimeout(0.02)
    with pytest.raises(TimeoutError):
        other_near.recv(1)


def flipped(seed: int, every: float, skip: int, sizes: tuple[int, ...]) -> tuple[bytes, int]:
    """What arrives of zeros that are sent in pieces of these sizes, and how many flips the proxy counted."""
    echo = Echo()
    try:
        with Proxy(echo.address, seed=seed) as proxy:
            proxy.down.flip_every_bytes, proxy.down.flip_skip_bytes = every, skip
            near, far = echo.dial(proxy)
            got = b""
            for size in sizes:
                far.sendall(bytes(size))
                got += receive(near, size)
            return got, proxy.down.flips
    finally:
        echo.close()


def test_flipped_bits_are_counted_and_the_same_for_a_seed_however_the_bytes_come() -> None:
    got, flips = flipped(3, 1000.0, 5000, (100_000,))
    changed = [place for place, byte in enumerate(got) if byte]
    assert flips == len(changed) == sum(byte.bit_count() for byte in got)
    assert 60 <= flips <= 140  # 95 are expected
    assert changed[0] >= 5000
    assert flipped(3, 1000.0, 5000, (7, 93, 49_900, 50_000)) == (got, flips)
    assert flipped(4, 1000.0, 5000, (100_000,)) != (got, flips)


def test_connections_from_before_are_left_as_they_are(echo: Echo, proxy: Proxy) -> None:
    first, second = echo.dial(proxy), echo.dial(proxy)
    proxy.down.flip_every_bytes, proxy.down.flip_first = 10.0, 1
    for (near, far), clean in ((first, True), (second, False)):
        far.sendall(bytes(1000))
        assert (receive(near, 1000) == bytes(1000)) == clean


def test_a_target_that_is_not_there_is_a_connection_that_ends(proxy: Proxy) -> None:
    proxy.target = ""
    with socket.create_connection(("127.0.0.1", proxy.port), timeout=5) as near:
        assert near.recv(1) == b""
    assert proxy.connections == 0
