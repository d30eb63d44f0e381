"""Gives an input to the code that it is for, and judges the outcome.

    outcome      ok, waiting (a stream that wants more), or the cause of a `WireError`. Anything else is a finding.
    sameness     what was accepted, encoded again, is read as the same; a stream that comes in pieces means the same
    memory       a sampled input takes at most `MEMORY_BASE_BYTES`, and `MEMORY_FACTOR` times its own length

Findings are `AssertionError`s, or whatever the code raised.
"""

from __future__ import annotations

import random
import tracemalloc

from kvmesh.discovery.wire import Message, PacketCodec, PushPull, StreamCodec, WireError, decode, encode
from kvmesh.discovery.wire.lzw import decompress
from kvmesh.transport.limits import MIB, PACKET_BYTES_MAX, STREAM_BYTES_MAX

from .inputs import LABEL, Input, Inputs, Target

OK = "ok"
WAITING = "waiting"
MEMORY_BASE_BYTES = 1 * MIB
"""For what is not a stream: below it are tables, and what a packet decompresses to."""
MEMORY_FACTOR = 64
"""An empty map is one byte on the wire and 64 in memory; a map of all that is 4 KiB long at most."""
STREAM_MEMORY_BASE_BYTES = 3 * STREAM_BYTES_MAX
"""What a stream decompresses to, while it grows, and copied once."""
LZW_OUTPUT_BYTES_MAX = PACKET_BYTES_MAX


class Checks:
    """The code under test, in every configuration of the inputs."""

    def __init__(self, inputs: Inputs) -> None:
        ways = [(keyed, labelled) for keyed in (False, True) for labelled in (False, True)]
        self._packets = {
            (keyed, labelled): PacketCodec(inputs.keyring if keyed else None, LABEL if labelled else "")
            for keyed, labelled in ways
        }
        self._streams = {
            (keyed, labelled): StreamCodec(inputs.keyring if keyed else None, LABEL if labelled else "")
            for keyed, labelled in ways
        }
        self._plain = StreamCodec(None)

    def outcome(self, given: Input) -> str:
        """What became of it. Raises for a finding."""
        try:
            if given.target is Target.DECODE:
                self._read_again(decode(given.data))
            elif given.target is Target.PACKET:
                messages = self._packets[given.keyed, given.labelled].open(given.data)
                assert messages
                for message in messages:
                    self._read_again(message)
            elif given.target is Target.STREAM:
                message_or_none = self._fed(given, [given.data])
                if message_or_none is None:
                    return WAITING
                self._streamed_again(message_or_none)
            else:
                assert len(decompress(given.data, LZW_OUTPUT_BYTES_MAX)) <= LZW_OUTPUT_BYTES_MAX
        except WireError as error:
            return error.cause
        return OK

    def in_pieces(self, given: Input, rng: random.Random, outcome: str) -> None:
        """A stream that comes in pieces must end as the whole of it did. Which defect is seen first may differ."""
        cuts = sorted(rng.randrange(len(given.data) + 1) for _ in range(rng.choice((1, 3, 20))))
        pieces = [given.data[begins:ends] for begins, ends in zip([0, *cuts], [*cuts, len(given.data)], strict=True)]
        try:
            got = OK if self._fed(given, pieces) is not None else WAITING
        except WireError as error:
            got = error.cause
        refused = {OK, WAITING}
        assert got == outcome or not {got, outcome} & refused, f"whole: {outcome}, in pieces: {got}"

    def memory(self, given: Input) -> int:
        """The most bytes that it took. Raises when they are too many."""
        tracemalloc.start()
        try:
            self.outcome(given)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        base = STREAM_MEMORY_BASE_BYTES if given.target is Target.STREAM else MEMORY_BASE_BYTES
        most = base + MEMORY_FACTOR * len(given.data)
        assert peak <= most, f"{peak} bytes of memory for {len(given.data)} bytes of input: at most {most} may be taken"
        return peak

    def _fed(self, given: Input, pieces: list[bytes]) -> Message | None:
        reader = self._streams[given.keyed, given.labelled].reader(answer=given.answer)
        message = None
        for piece in pieces:
            if message is None:
                message = reader.feed(piece)
        return message

    def _read_again(self, message: Message) -> None:
        assert decode(encode(message)) == message

    def _streamed_again(self, message: Message) -> None:
        if type(message) is PushPull and len(message.nodes) > 4:
            message = PushPull(message.join, message.nodes[:4], message.user_state)
        assert self._plain.reader(answer=True).feed(self._plain.seal(message, answer=True)) == message
