"""The 64-byte record that says what is in a slot, and the seal that shows damage to it.

Seal: multilinear hashing (Lemire and Kaser, "Strongly universal string hashing is fast", 2014):
the 32-bit words of a record times random 64-bit constants, summed modulo 2^64, upper half kept.
It is one numpy expression over any number of records, and with these constants every single-bit
flip changes it (proved over all bits by a test). The seed is the slab's uuid, so a record of
another slab is no record.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np
import numpy.typing as npt
import xxhash

RECORD = np.dtype(
    [
        ("sequence", "<u8"),
        ("key", "<u8", (2,)),
        ("checksum", "<u8", (2,)),
        ("slot", "<u4"),
        ("length", "<u4"),
        ("tenant", "<u4"),
        ("depth", "<u4"),
        ("kind", "u1"),
        ("algorithm", "u1"),
        ("codec", "u1"),
        ("flags", "u1"),
        ("seal", "<u4"),
    ]
)
"""checksum: the first word for an XXH3, both for the tag of AES_256_GCM. length: bytes that the
codec left of the page; slot_bytes for codec 0, the only one so far."""

BYTES = 64
assert RECORD.itemsize == BYTES

Records = npt.NDArray[np.void]
Mask = npt.NDArray[np.bool_]


class Kind(IntEnum):
    """What a record says. HEADER is the first record of a file and names its number."""

    HEADER = 1
    PUT = 2
    DROP = 3


class Algorithm(IntEnum):
    """What the checksum of a slot is."""

    XXH3_64 = 1
    """over the whole page; read, and written no more"""
    AES_256_GCM = 2
    XXH3_64_PIECES = 3
    """over the XXH3_64s of its 4 KiB pieces (digest.py)"""


def _constants() -> npt.NDArray[np.uint64]:
    words = [xxhash.xxh3_64_intdigest(b"tiermem record word %d" % i) | 1 for i in range(16)]
    return np.array(words, np.uint64)


_FACTORS = _constants()


def _sums(records: Records, seed: int) -> npt.NDArray[np.uint32]:
    words = np.ascontiguousarray(records).view("<u4").reshape(-1, 16).astype(np.uint64)
    sums = (words[:, :15] * _FACTORS[:15]).sum(axis=1, dtype=np.uint64) + np.uint64(seed)
    upper: npt.NDArray[np.uint32] = (sums >> np.uint64(32)).astype(np.uint32)
    return upper


def seal(records: Records, seed: int) -> Records:
    """Write the seal of each record, in place; the same array."""
    records["seal"] = _sums(records, seed)
    return records


def sound(records: Records, seed: int) -> Mask:
    """bool[n]: which records are as they were sealed, for this slab."""
    good: Mask = records["seal"] == _sums(records, seed)
    return good


def seed_of(uuid: bytes) -> int:
    """The seed of a slab's seals; its upper half is never 0, so zeroed records are not sound."""
    return xxhash.xxh3_64_intdigest(uuid) | (1 << 63)
