"""The two superblocks of a slab: what it is, whose it is, and whether it was closed in order.

They are written in turn, so a write that is torn leaves the other. The one with the higher epoch
counts. A reader that finds the other one damaged does not know what it said: it then takes the
slab as not closed in order, and skips epochs, because the damaged one may have used the next.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import msgspec
import xxhash

from tiermem.errors import ConfigError

MAGIC = b"tiermem\0"
VERSION = 1
BYTES = 4096
OFFSETS = (0, 32 << 10)
HEADER_BYTES = 64 << 10
"""Where slot 0 begins."""
_FIXED = struct.Struct("<8sIIQQQQ16sIBxxxI")
_SEAL = struct.Struct("<Q")
FINGERPRINT_BYTES = BYTES - _FIXED.size - _SEAL.size


@dataclass(frozen=True, slots=True)
class Superblock:
    """epoch: grows with each write. ready: slots written at least once. pid: the last owner."""

    slot_bytes: int
    slots: int
    ready: int
    epoch: int
    uuid: bytes
    pid: int
    clean: bool
    fingerprint: Mapping[str, str] = field(default_factory=dict)
    version: int = VERSION
    header_bytes: int = HEADER_BYTES

    def pack(self) -> bytes:
        """4,096 bytes; ConfigError if the fingerprint is too long."""
        text = msgspec.json.encode(dict(self.fingerprint))
        if len(text) > FINGERPRINT_BYTES:
            raise ConfigError(
                f"nvme: a fingerprint of {len(text)} bytes; {FINGERPRINT_BYTES} fit, hash the "
                "long values"
            )
        head = _FIXED.pack(
            MAGIC,
            self.version,
            self.header_bytes,
            self.slot_bytes,
            self.slots,
            self.ready,
            self.epoch,
            self.uuid,
            self.pid,
            self.clean,
            len(text),
        )
        body = (head + text).ljust(BYTES - _SEAL.size, b"\0")
        return body + _SEAL.pack(xxhash.xxh3_64_intdigest(body))


def unpack(block: bytes) -> Superblock | None:
    """What a block says; None if it is no sound superblock. Any version with our magic is read."""
    body = block[: -_SEAL.size]
    (seal,) = _SEAL.unpack_from(block, len(body))
    if len(block) != BYTES or seal != xxhash.xxh3_64_intdigest(body):
        return None
    magic, version, header, slot_bytes, slots, ready, epoch, uuid, pid, clean, n = (
        _FIXED.unpack_from(body)
    )
    if magic != MAGIC:
        return None
    fingerprint: dict[str, str] = {}
    if version == VERSION:
        text = body[_FIXED.size : _FIXED.size + n]
        fingerprint = msgspec.json.decode(text, type=dict[str, str])
    return Superblock(
        slot_bytes, slots, ready, epoch, uuid, pid, bool(clean), fingerprint, version, header
    )


def choose(blocks: tuple[bytes, bytes]) -> Superblock | None:
    """The one that counts; None if neither is sound."""
    read = [unpack(block) for block in blocks]
    known = [s for s in read if s is not None]
    if not known:
        return None
    best = max(known, key=lambda s: s.epoch)
    damaged = any(s is None and any(b) for s, b in zip(read, blocks, strict=True))
    # By two: the next write then replaces the damaged one, not the only sound one.
    return replace(best, epoch=best.epoch + 2, clean=False) if damaged else best


def require(found: Superblock, slot_bytes: int, fingerprint: Mapping[str, str], name: str) -> None:
    """ConfigError unless a slab is of this version, page size and fingerprint; names the field."""
    wanted = {"version": VERSION, "page size": slot_bytes, **fingerprint}
    held = {"version": found.version, "page size": found.slot_bytes, **found.fingerprint}
    if found.version > VERSION:
        raise ConfigError(
            f"nvme.path: {name} was made by a newer version (format {found.version}, this one "
            f"reads {VERSION}); upgrade, or use another path"
        )
    for key in (*wanted, *held):
        if wanted.get(key) != held.get(key):
            raise ConfigError(
                f"nvme.path: {name} was made for another {key}: it has {held.get(key)!r}, asked "
                f"for is {wanted.get(key)!r}; remove it, or use another path"
            )
