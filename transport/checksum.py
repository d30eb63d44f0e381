"""The checksum that travels with every chunk: XXH3-64 of its bytes, taken at put and verified after every transfer.

It guards against faults of memory, disk and wire (2^-64 for one that goes unseen), not against an adversary: peers are
authenticated before their bytes count. xxhash releases the GIL while it works, so a chunk is verified beside the next
one's copy.
"""

import xxhash


def checksum(buffer: memoryview | bytes | bytearray) -> int:
    """XXH3-64 of `buffer` (contiguous bytes) as an unsigned 64-bit integer."""
    return xxhash.xxh3_64(buffer).intdigest()
