"""What is in which slot, kept on disk: a snapshot and the journals behind it.

    name.snapshot      what held when journal `number` began; replaced by rename
    name.journal.<n>   every PUT and DROP since, in order

Data first, record after: a PUT is appended when its bytes are in the slot, a DROP before the slot
is written again. Nothing is synced on this path, for this is a cache: a killed process loses
nothing that it had appended, a power cut may lose any of it, and what a record says is believed
only when the bytes of the slot agree. A journal that cannot be written any more is worth nothing
without its newest DROPs, so then the whole index is removed and serving goes on without it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tiermem.nvme.files import open_index, write_all
from tiermem.nvme.records import BYTES, RECORD, Kind, Records, seal, seed_of, sound

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Replayed:
    """What the files said: the last sound record of every slot that holds something."""

    records: Records
    number: int
    """The highest journal number in use."""
    read: int
    """Sound records in all files, overtaken ones and DROPs included."""
    damaged: int
    """Records whose seal did not match, and pieces shorter than a record."""
    snapshot: bool
    overtaken: int
    """PUTs that a later record about their slot replaced or dropped."""


class Journal:
    """The open index of a slab; not thread-safe: called under the slab's lock, except `publish`."""

    def __init__(self, directory: Path, name: str, uuid: bytes, number: int, limit: int) -> None:
        """Start journal `number`; the files may come to `limit` bytes beside two snapshots."""
        self._directory = directory
        self._name = name
        self._seed = seed_of(uuid)
        self._limit = limit
        self._fd = -1
        self.number = number
        self.bytes = sum(p.stat().st_size for p in journals(directory, name).values())
        """Bytes of all journals."""
        self.published_bytes = 0
        self._begin(number)

    @property
    def wants_snapshot(self) -> bool:
        """Half of the room is used: time to rotate and publish."""
        return self.bytes * 2 > self._limit

    def room_for(self, n: int) -> bool:
        return self.bytes + n * BYTES <= self._limit

    def append(self, records: Records) -> None:
        """Seal and append records, in one write. OSError if the disk refuses."""
        data = seal(records, self._seed).tobytes()
        write_all(self._fd, data)
        self.bytes += len(data)

    def rotate(self) -> int:
        """Begin the next journal; its number is that of the snapshot to be taken now."""
        self._begin(self.number + 1)
        return self.number

    def publish(self, number: int, records: Records) -> int:
        """Write what held when journal `number` began, then drop the journals before it.

        May run beside `append`. Returns the bytes that were freed, for `released`.
        """
        path = self._directory / f"{self._name}.snapshot"
        new = path.with_suffix(".snapshot.new")
        header = _header(number, len(records))
        fd = open_index(new, truncate=True)
        try:
            write_all(fd, seal(header, self._seed).tobytes())
            for start in range(0, len(records), 1 << 16):
                write_all(fd, seal(records[start : start + (1 << 16)], self._seed).tobytes())
            os.fdatasync(fd)
        finally:
            os.close(fd)
        os.rename(new, path)
        sync_directory(self._directory)
        freed = 0
        for old, journal in journals(self._directory, self._name).items():
            if old < number:
                freed += journal.stat().st_size
                journal.unlink()
        return freed

    def released(self, nbytes: int) -> None:
        """Count out what `publish` freed."""
        self.bytes -= nbytes

    def sync(self) -> None:
        os.fdatasync(self._fd)

    def remove(self) -> None:
        """Take the index away; what is still on disk then belongs to nobody."""
        self.close()
        with contextlib.suppress(OSError):
            for path in files_of(self._directory, self._name):
                path.unlink(missing_ok=True)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _begin(self, number: int) -> None:
        fd = open_index(self._directory / f"{self._name}.journal.{number}", truncate=True)
        try:
            data = seal(_header(number, 0), self._seed).tobytes()
            write_all(fd, data)
        except BaseException:
            os.close(fd)
            raise
        self.close()
        self._fd, self.number = fd, number
        self.bytes += len(data)


def replay(directory: Path, name: str, uuid: bytes, slots: int) -> Replayed:
    """Read snapshot and journals in order; the last word on each slot below `slots` counts."""
    seed = seed_of(uuid)
    parts: list[Records] = []
    read = damaged = 0
    first = 0
    held, bad = _read(directory / f"{name}.snapshot", seed)
    damaged += bad
    snapshot = len(held) > 0
    if snapshot:
        first = int(held["sequence"][0])
        parts.append(held[1:])
        # A snapshot cut short at a record's edge would look whole; its header counts them.
        damaged += max(0, int(held["slot"][0]) - (len(held) - 1) - bad)
    number = first
    for number_, path in sorted(journals(directory, name).items()):
        number = max(number, number_)
        if number_ < first:
            continue
        held, bad = _read(path, seed)
        damaged += bad
        if len(held) and int(held["sequence"][0]) == number_:
            parts.append(held[1:])
    records = np.concatenate(parts) if parts else np.zeros(0, RECORD)
    read = len(records)
    puts = int(np.count_nonzero(records["kind"] == Kind.PUT))
    _, last = np.unique(records["slot"][::-1], return_index=True)
    records = records[::-1][last]
    records = records[records["kind"] == Kind.PUT]
    overtaken = puts - len(records)
    records = records[records["slot"] < slots]
    return Replayed(records, number, read, damaged, snapshot, overtaken)


def journals(directory: Path, name: str) -> dict[int, Path]:
    """Number to path of every journal of this slab."""
    pattern = re.compile(re.escape(name) + r"\.journal\.(\d+)")
    if not directory.is_dir():  # taken away while the slab is in use
        return {}
    found = ((pattern.fullmatch(p.name), p) for p in directory.iterdir())
    return {int(match[1]): p for match, p in found if match}


def files_of(directory: Path, name: str) -> list[Path]:
    """Every file of the index."""
    snapshot = directory / f"{name}.snapshot"
    named = (snapshot, snapshot.with_suffix(".snapshot.new"))
    return [*journals(directory, name).values(), *(p for p in named if p.exists())]


def sync_directory(directory: Path) -> None:
    """Make a rename last."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _header(number: int, count: int) -> Records:
    header = np.zeros(1, RECORD)
    header["kind"], header["sequence"], header["slot"] = Kind.HEADER, number, count
    return header


def _read(path: Path, seed: int) -> tuple[Records, int]:
    """The sound records of a file, header first, and how many were not; none without a header."""
    try:
        data = path.read_bytes()
    except OSError:
        return np.zeros(0, RECORD), 0
    whole = len(data) // BYTES
    records = np.frombuffer(data, RECORD, whole).copy()
    good = sound(records, seed)
    damaged = int(np.count_nonzero(~good)) + (len(data) % BYTES > 0)
    if not whole or not good[0] or records["kind"][0] != Kind.HEADER:
        return np.zeros(0, RECORD), max(damaged, 1)
    return records[good], damaged
