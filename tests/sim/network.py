"""A network in virtual time: messages are bytes that get lost, doubled, late, reordered, or cut off in one direction.

A process can crash (what it was sent is lost), or be stopped and continued: then its messages and its timers wait, as
in the buffers of a real socket. Everything is drawn from one seeded random source.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Protocol

from tests.sim.clockwork import Clockwork


class Host(Protocol):
    """A process, as the network sees it."""

    def on_request(self, source: str, call: int, data: bytes) -> None: ...

    def on_answer(self, call: int, data: bytes) -> None: ...


@dataclass(slots=True)
class Weather:
    """What happens to a message."""

    loss: float = 0.0
    duplication: float = 0.0
    delay_s: float = 0.001
    """The usual one way delay."""
    late: float = 0.0
    """The share of messages that take up to `late_s`: they overtake nothing and are overtaken."""
    late_s: float = 1.0


class Network:
    """Addresses, and the ways between them."""

    def __init__(self, clockwork: Clockwork, random: Random, weather: Weather) -> None:
        self.weather = weather
        self.cut: set[tuple[str, str]] = set()
        """(from, to) pairs of addresses that nothing passes between."""
        self.sent = 0
        self._clockwork = clockwork
        self._random = random
        self._hosts: dict[str, Host] = {}
        self._stopped: dict[str, list[Callable[[], None]]] = {}
        """Addresses of stopped processes, with what waits for them."""

    def attach(self, address: str, host: Host) -> None:
        self._hosts[address] = host

    def detach(self, address: str) -> None:
        self._hosts.pop(address, None)
        self._stopped.pop(address, None)

    def is_stopped(self, address: str) -> bool:
        return address in self._stopped

    def stop(self, address: str) -> None:
        """SIGSTOP."""
        self._stopped.setdefault(address, [])

    def resume(self, address: str) -> None:
        """SIGCONT: what waited happens now, in its order."""
        for call in self._stopped.pop(address, []):
            call()

    def when_running(self, address: str, call: Callable[[], None]) -> None:
        """Do it now, or when the process runs again."""
        if address in self._stopped:
            self._stopped[address].append(call)
        else:
            call()

    def request(self, source: str, target: str, call: int, data: bytes) -> None:
        self._send(source, target, lambda host: host.on_request(source, call, data))

    def answer(self, source: str, target: str, call: int, data: bytes) -> None:
        self._send(source, target, lambda host: host.on_answer(call, data))

    def _send(self, source: str, target: str, deliver: Callable[[Host], None]) -> None:
        weather, random = self.weather, self._random
        self.sent += 1
        copies = 2 if random.random() < weather.duplication else 1
        for _ in range(copies):
            if random.random() < weather.loss:
                continue
            delay_s = weather.delay_s * random.uniform(0.5, 2.0)
            if random.random() < weather.late:
                delay_s += random.random() * weather.late_s
            self._clockwork.after(delay_s, lambda: self._arrive(source, target, deliver))

    def _arrive(self, source: str, target: str, deliver: Callable[[Host], None]) -> None:
        if (source, target) in self.cut or target not in self._hosts:
            return
        self.when_running(target, lambda: self._hand_over(target, deliver))

    def _hand_over(self, target: str, deliver: Callable[[Host], None]) -> None:
        host = self._hosts.get(target)
        if host is not None:
            deliver(host)
