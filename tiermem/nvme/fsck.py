"""Checks kept slabs from outside: what is readable, stale, torn; and drops what is not readable."""

from __future__ import annotations

import contextlib
import mmap
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from tiermem.errors import ConfigError, PageLost
from tiermem.nvme.catalog import newest_of_each_key
from tiermem.nvme.crypt import TAG_BYTES, Cipher
from tiermem.nvme.digest import is_intact
from tiermem.nvme.files import Buffer, PosixIo, lock, open_named, read_whole
from tiermem.nvme.journal import Journal, Replayed, replay
from tiermem.nvme.kept import read_superblocks
from tiermem.nvme.records import Algorithm, Records
from tiermem.nvme.superblock import HEADER_BYTES, VERSION, Superblock
from tiermem.tier import Mask

Progress = Callable[[int, int], None]
"""Called with (records checked, records to check)."""


@dataclass(frozen=True, slots=True)
class SlabReport:
    """One slab. Pages are counted by what their records say of them.

    readable: the bytes are those that were stored. torn: they are not. stale: a record that a
    newer one about the same slot or content replaced. damaged: a record that is not as written.
    sealed: encrypted and no key was given, so not checked. problem: why nothing could be checked.
    """

    path: str
    slot_bytes: int = 0
    slots: int = 0
    clean: bool = False
    fingerprint: dict[str, str] | None = None
    readable: int = 0
    torn: int = 0
    stale: int = 0
    damaged: int = 0
    sealed: int = 0
    repaired: bool = False
    problem: str | None = None

    @property
    def good(self) -> bool:
        """Nothing is wrong that a repair would drop."""
        return self.problem is None and not self.torn and not self.damaged


def fsck(
    path: str | os.PathLike[str],
    repair: bool = False,
    *,
    key_file: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> list[SlabReport]:
    """Check every slab in a directory, or the one that `path` names, reading all that it holds.

    repair: write a new index with the readable pages only (sealed ones stay). Nobody else may
    have the slab open: that is a problem in the report, as is a file that is no slab.
    Raises ConfigError if there is no slab at `path`.
    """
    place = Path(path)
    slabs = sorted(place.glob("*.slab")) if place.is_dir() else [place]
    if not slabs or not all(p.exists() for p in slabs):
        raise ConfigError(f"no slab at {place}: name a directory with *.slab files, or one of them")
    cipher = None if key_file is None else Cipher.of_file(Path(key_file), create=False)
    return [_check(slab, repair, cipher, progress) for slab in slabs]


def _check(
    path: Path, repair: bool, cipher: Cipher | None, progress: Progress | None
) -> SlabReport:
    report = SlabReport(str(path))
    try:
        with _opened(path) as (fd, found):
            replayed = replay(path.parent, path.stem, found.uuid, found.slots)
            records = newest_of_each_key(replayed.records)
            report = _describe(report, found, replayed, records)
            good, sealed = _verify(fd, found, records, cipher, progress)
            kept = good | sealed
            torn = int(np.count_nonzero(~kept))
            readable, closed = int(good.sum()), int(sealed.sum())
            report = replace(report, readable=readable, torn=torn, sealed=closed)
            if repair and not report.good:
                _write_index(path, found, replayed, records[kept])
                report = replace(report, repaired=True)
    except (ConfigError, OSError) as error:
        return replace(report, problem=str(error))
    return report


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[tuple[int, Superblock]]:
    """The file, owned, and what it is."""
    fd, _ = open_named(path, create=False)
    try:
        if not lock(fd):
            raise ConfigError(f"{path} is in use; stop the process that has it and try again")
        found = read_superblocks(PosixIo(), fd, str(path))
        if found is None:
            raise ConfigError(f"{path} is empty")
        if found.version != VERSION:
            raise ConfigError(f"{path} has format {found.version}, this version reads {VERSION}")
        yield fd, found
    finally:
        os.close(fd)


def _describe(
    report: SlabReport, found: Superblock, replayed: Replayed, records: Records
) -> SlabReport:
    return replace(
        report,
        slot_bytes=found.slot_bytes,
        slots=found.slots,
        clean=found.clean,
        fingerprint=dict(found.fingerprint),
        stale=replayed.overtaken + len(replayed.records) - len(records),
        damaged=replayed.damaged,
    )


def _verify(
    fd: int,
    found: Superblock,
    records: Records,
    cipher: Cipher | None,
    progress: Progress | None,
) -> tuple[Mask, Mask]:
    """(bool[n]: readable, bool[n]: sealed and no key to check it with)."""
    good = np.zeros(len(records), np.bool_)
    sealed = np.zeros(len(records), np.bool_)
    buffer = memoryview(mmap.mmap(-1, found.slot_bytes + TAG_BYTES))
    page = memoryview(bytearray(found.slot_bytes))
    for i, record in enumerate(records):
        if record["algorithm"] == Algorithm.AES_256_GCM and cipher is None:
            sealed[i] = True
        else:
            good[i] = _verify_one(fd, found, record, cipher, buffer, page)
        if progress is not None:
            progress(i + 1, len(records))
    return good, sealed


def _verify_one(
    fd: int, found: Superblock, record: np.void, cipher: Cipher | None, buffer: Buffer, page: Buffer
) -> bool:
    slot, n = int(record["slot"]), found.slot_bytes
    try:
        read_whole(PosixIo(), fd, buffer[:n], HEADER_BYTES + slot * n)
    except OSError:
        return False
    first, second = (int(word) for word in record["checksum"])
    if record["algorithm"] != Algorithm.AES_256_GCM:
        return is_intact(buffer[:n], first, int(record["algorithm"]))
    if cipher is None:
        return False
    try:
        sequence = int(record["sequence"])
        cipher.decrypt(buffer, n, (first, second), page, found.uuid[:4], sequence, slot)
    except PageLost:
        return False
    return True


def _write_index(path: Path, found: Superblock, replayed: Replayed, records: Records) -> None:
    """A snapshot of these records, and one empty journal behind it."""
    journal = Journal(path.parent, path.stem, found.uuid, replayed.number + 1, 1 << 62)
    try:
        journal.publish(journal.rotate(), records)
        journal.sync()
    finally:
        journal.close()
