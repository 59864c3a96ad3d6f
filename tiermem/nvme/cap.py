"""How many slots fit under a byte cap, and what of it is for their index.

The cap covers everything on disk: superblocks, slots, two snapshots and the journals.
"""

from __future__ import annotations

from tiermem.errors import ConfigError
from tiermem.nvme.records import BYTES as RECORD_BYTES
from tiermem.nvme.superblock import HEADER_BYTES

INDEX_BYTES = 64 << 10
"""Set aside for index files beside what each slot brings."""
BLOCK = 4096
"""What a file system rounds the size of a file up to."""


def bytes_for(capacity: int, slot_bytes: int) -> int:
    """Bytes on disk that a slab of `capacity` slots may come to, with its index files."""
    return HEADER_BYTES + INDEX_BYTES + capacity * (slot_bytes + metadata_bytes(slot_bytes))


def slots_for(byte_cap: int, slot_bytes: int) -> int:
    """Slots that fit under a cap."""
    room = byte_cap - HEADER_BYTES - INDEX_BYTES
    return max(0, room // (slot_bytes + metadata_bytes(slot_bytes)))


def metadata_bytes(slot_bytes: int) -> int:
    """Bytes a slot of index files, two snapshots and the journals: 1 %, or four records."""
    return max(slot_bytes // 100, 4 * RECORD_BYTES)


def journal_bytes(byte_cap: int, slot_bytes: int) -> int:
    """What the cap leaves for journals beside slots, two snapshots and rounding to blocks."""
    slots = slots_for(byte_cap, slot_bytes)
    return byte_cap - HEADER_BYTES - slots * (slot_bytes + 2 * RECORD_BYTES) - 6 * BLOCK


def check(byte_cap: int, capacity: int, slot_bytes: int) -> None:
    """ConfigError, with the number that fits, unless so many slots fit."""
    need = bytes_for(capacity, slot_bytes)
    if need > byte_cap:
        raise ConfigError(
            f"nvme.capacity: {capacity} slots of {slot_bytes} bytes need {need} bytes with "
            f"metadata, the cap is {byte_cap}: {slots_for(byte_cap, slot_bytes)} slots fit"
        )
