"""Choose the partition of a key, as Kafka does."""

from __future__ import annotations

import struct


def _murmur2(key: bytes) -> int:
    """Return Kafka's hash of a key (Austin Appleby's MurmurHash2, seed 0x9747b28c).

    The embedded log and Kafka use the same hash, so a key has the same partition in the two logs.
    """
    mask, m = 0xFFFFFFFF, 0x5BD1E995
    h = (0x9747B28C ^ len(key)) & mask
    whole = len(key) - len(key) % 4
    for word in struct.unpack(f"<{whole // 4}I", key[:whole]):
        k = word * m & mask
        h = (h * m & mask) ^ ((k ^ k >> 24) * m & mask)
    if whole < len(key):
        h = (h ^ int.from_bytes(key[whole:], "little")) * m & mask
    h = (h ^ h >> 13) * m & mask
    return h ^ h >> 15


def choose_partition(key: bytes, partitions: int) -> int:
    """Return the partition of a key, as Kafka's default partitioner does."""
    return (_murmur2(key) & 0x7FFFFFFF) % partitions
