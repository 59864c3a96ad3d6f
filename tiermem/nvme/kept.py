"""A slab that is kept for the next start: whose file it is, its superblocks, and its catalog."""

from __future__ import annotations

import logging
import mmap
import os
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from tiermem.errors import ConfigError, TierFull
from tiermem.keyindex import Keys
from tiermem.nvme.catalog import Catalog, Numbers
from tiermem.nvme.files import FileIo, PosixIo, lock, open_named, read_whole, write_whole
from tiermem.nvme.journal import files_of
from tiermem.nvme.records import Records
from tiermem.nvme.superblock import (
    BYTES,
    HEADER_BYTES,
    OFFSETS,
    Superblock,
    choose,
    require,
)
from tiermem.tier import Slots

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Persist:
    """Keep the slab for the next start. name: one per process rank, unique in the directory.

    fingerprint: what the bytes mean (model, revision, layout, dtype, rank, ...): a slab with
    another one is refused, with the field that differs.
    """

    name: str = "rank0"
    fingerprint: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Recovered:
    """What a reopened slab holds, newest first: slots int32[n], keys uint64[n, 2], depths and
    tenants uint32[n].

    clean: it was closed in order; if not, some of this may not verify when it is loaded, and is
    then a miss. damaged: index records that were not as they had been written.
    """

    slots: Slots
    keys: Keys
    depths: Numbers
    tenants: Numbers
    clean: bool
    damaged: int


class Kept:
    """The superblocks and the catalog of one open file."""

    def __init__(
        self, directory: Path, persist: Persist, slot_bytes: int, io: FileIo, fd: int
    ) -> None:
        """Read what the file is; ConfigError if it is another's. Nothing is written yet."""
        self._directory = directory
        self._name = persist.name
        self._io = io
        self._fd = fd
        name = f"{persist.name}.slab in {directory}"
        found = read_superblocks(io, fd, name)
        self.fresh = found is None
        self.was_clean = found is None or found.clean
        if found is None:
            prints = dict(persist.fingerprint)
            found = Superblock(slot_bytes, 0, 0, 0, os.urandom(16), 0, False, prints)
        else:
            require(found, slot_bytes, persist.fingerprint, name)
        self.superblock = found
        self.slots = min(found.slots, _whole_slots(fd, slot_bytes))
        """Slots that the file holds; fewer than it says if it was cut behind our back."""
        self.first_epoch = found.epoch + 1
        self.catalog: Catalog | None = None

    def attach(
        self, limit: int, lock: threading.Condition, records: Callable[[Slots], Records]
    ) -> Records:
        """Mark the file as in use, on disk, and read the index: the records of what it holds.

        Only after that may a store draw sequence numbers: no later opening draws them again.
        limit: bytes for journals. Raises TierFull if there is no room to write.
        """
        try:
            if self.fresh:
                for path in files_of(self._directory, self._name):
                    path.unlink()
            self.mark(self.superblock.slots, self.superblock.ready, clean=False)
            self.catalog = Catalog(
                self._directory,
                self._name,
                self.superblock.uuid,
                self.slots,
                limit,
                lock,
                records,
            )
        except OSError as error:
            raise TierFull(f"nvme.path: cannot write to {self._directory}: {error}") from error
        return self.catalog.take_found()

    def mark(self, slots: int, ready: int, *, clean: bool) -> None:
        """Write the older superblock and make it last. OSError leaves the other one in force."""
        epoch = self.superblock.epoch + 1
        new = replace(
            self.superblock, epoch=epoch, slots=slots, ready=ready, pid=os.getpid(), clean=clean
        )
        block = memoryview(mmap.mmap(-1, BYTES))
        block[:] = new.pack()
        write_whole(self._io, self._fd, block, OFFSETS[epoch % 2])
        os.fdatasync(self._fd)
        self.superblock = new

    def close(self, slots: int, ready: int, *, clean: bool) -> None:
        """Data, then the last snapshot, then the superblock that vouches for both."""
        catalog = self.catalog
        if catalog is None:
            return
        try:
            os.fdatasync(self._fd)
            catalog.close()
            self.mark(slots, ready, clean=clean and catalog.failure is None)
        except OSError as error:
            log.warning("nvme close=unclean path=%s reason=%s", self._directory, error)


def open_kept(directory: Path, name: str) -> tuple[int, bool]:
    """Open or make `name.slab` and own it: (fd, direct). ConfigError if another process does."""
    path = directory / f"{name}.slab"
    try:
        fd, direct = open_named(path, create=not path.exists())
    except ConfigError:
        if not path.exists():
            raise
        fd, direct = open_named(path, create=False)  # somebody made it in between
    if lock(fd):
        return fd, direct
    found = read_superblocks(PosixIo(), fd, str(path))
    os.close(fd)
    owner = "" if found is None else f" (pid {found.pid})"
    raise ConfigError(
        f"nvme.path: {path} is in use by another process{owner}; give each its own name or path"
    )


def read_superblocks(io: FileIo, fd: int, name: str) -> Superblock | None:
    """The superblock that counts, None for a file without any; ConfigError if none is sound."""
    if os.fstat(fd).st_size == 0:
        return None
    blocks = []
    for offset in OFFSETS:
        block = memoryview(mmap.mmap(-1, BYTES))
        try:
            read_whole(io, fd, block, offset)
        except OSError as error:
            log.warning("nvme superblock offset=%d unreadable reason=%s", offset, error)
            block[:] = b"\xff" * BYTES
        blocks.append(bytes(block))
    found = choose((blocks[0], blocks[1]))
    if found is None and any(any(block) for block in blocks):
        raise ConfigError(
            f"nvme.path: {name} has no sound superblock: it is no slab, or both are damaged; "
            "remove it, or use another path"
        )
    return found


def _whole_slots(fd: int, slot_bytes: int) -> int:
    return max(0, os.fstat(fd).st_size - HEADER_BYTES) // slot_bytes


def none_recovered() -> Recovered:
    """What a new or ephemeral slab holds."""
    nothing = np.zeros(0, np.uint32)
    keys = np.zeros((0, 2), np.uint64)
    return Recovered(np.zeros(0, np.int32), keys, nothing, nothing, True, 0)
