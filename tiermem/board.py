"""Which content lies where in the one host pool, for every engine that has the pool's file.

A table of fixed size behind the chunks of that file, so it comes and goes with it and belongs to
its user. Nobody locks it. An entry says that a page with this key has this checksum and was at
this offset when that was written; the first two are true for ever, the last is a hint. So whoever
reads a page there compares the checksum of what he has read, and then has the content, or nothing.

An entry carries a checksum of itself, too: one that was torn, by two writers or by one that died,
counts as none. Entries of a process that has ended are removed by whoever hears of it.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Collection
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import numpy.typing as npt
import xxhash

from tiermem.keyindex import Keys
from tiermem.ledger_wake import Owner, myself
from tiermem.tier import Mask

Cells = npt.NDArray[np.int64]
Words = npt.NDArray[np.uint64]

ENTRY_BYTES = 64
WAYS = 8
"""An entry may stand in so many cells; of more contents that fall there, the last ones stay."""
LEAST_CELLS = 32768
PAGE_BYTES = 512 << 10
"""The table has a cell for each so many bytes of the pool: four for a page of 2 MiB."""


class Word(IntEnum):
    """Of an entry; KEY takes two."""

    KEY = 0
    CHECKSUM = 2
    OFFSET = 3
    PID = 4
    START = 5
    WRITER = 6
    CHECK = 7


@dataclass(frozen=True, slots=True)
class Shown:
    """What others show of some keys: is_there bool[n]; the rest, uint64[n], counts where it is."""

    is_there: Mask
    checksums: Words
    offsets: Words


def board_bytes(pool_bytes: int) -> int:
    """The size of the table of a pool: the same in every process."""
    cells = max(LEAST_CELLS, pool_bytes // PAGE_BYTES)
    return ENTRY_BYTES << (cells - 1).bit_length()


class Board:
    """One engine's view of the table. For one thread at a time, but `sweep`, which is for any."""

    def __init__(self, fd: int, first_byte: int, nbytes: int) -> None:
        """fd: the pool's file, in which the table is these bytes; mapped, so it may be closed."""
        mapped = mmap.mmap(fd, nbytes, offset=first_byte)
        self._cells: Words = np.frombuffer(mapped, np.uint64).reshape(-1, ENTRY_BYTES // 8)
        self._owner = myself()
        self._writer = int.from_bytes(os.urandom(8), "little") | 1

    def publish(self, keys: Keys, checksums: Words, offsets: Words) -> Cells:
        """Show these contents, one each at these offsets of the file; where their entries stand."""
        entries = np.zeros((len(keys), ENTRY_BYTES // 8), np.uint64)
        entries[:, Word.KEY : Word.KEY + 2] = keys
        entries[:, Word.CHECKSUM] = checksums
        entries[:, Word.OFFSET] = offsets
        entries[:, [Word.PID, Word.START, Word.WRITER]] = (*self._owner, self._writer)
        first = self._first_cells(keys)
        cells = np.empty(len(keys), np.int64)
        for i, entry in enumerate(entries):
            entry[Word.CHECK] = _check(entry)
            cells[i] = first[i] + self._free_way(int(first[i]), int(keys[i, 1]))
            self._cells[cells[i]] = entry
        return cells

    def withdraw(self, cells: Cells) -> None:
        """Entries of ours that `publish` has put there show nothing, if they are ours still."""
        mine = cells[self._cells[cells, Word.WRITER] == self._writer]
        self._cells[mine] = 0

    def find(self, keys: Keys) -> Shown:
        """What others show of these contents; of what several show, any."""
        entries = self._cells[self._first_cells(keys)[:, None] + np.arange(WAYS)]  # a copy
        same = (entries[..., Word.KEY : Word.KEY + 2] == keys[:, None]).all(axis=2)
        same &= entries[..., Word.WRITER] != self._writer
        found = np.zeros((len(keys), ENTRY_BYTES // 8), np.uint64)
        is_there = np.zeros(len(keys), np.bool_)
        for i, way in np.argwhere(same).tolist():
            entry = entries[i, way]
            if not is_there[i] and entry[Word.CHECK] == _check(entry):
                found[i], is_there[i] = entry, True
        return Shown(is_there, found[:, Word.CHECKSUM], found[:, Word.OFFSET])

    def sweep(self, live: Collection[Owner]) -> int:
        """Remove the entries of all processes but these; how many there were."""
        owners = self._cells[:, [Word.PID, Word.START]]
        gone = owners[:, 0] != 0
        for owner in live:
            gone &= (owners != np.array(owner, np.uint64)).any(axis=1)
        self._cells[gone] = 0
        return int(gone.sum())

    def shown(self) -> int:
        """Entries of ours that stand there: a pass over all cells."""
        return int((self._cells[:, Word.WRITER] == self._writer).sum())

    def close(self) -> None:
        """Withdraw all that is ours; a second call does nothing."""
        self._cells[self._cells[:, Word.WRITER] == self._writer] = 0
        self._cells = self._cells[:0].copy()  # unmapped with the last array over it

    def _first_cells(self, keys: Keys) -> Cells:
        mixed = keys[:, 0] ^ (keys[:, 1] * np.uint64(0x9E3779B97F4A7C15))
        buckets = np.uint64(len(self._cells) // WAYS)
        first: Cells = ((mixed ^ (mixed >> np.uint64(32))) % buckets).astype(np.int64)
        return first * WAYS

    def _free_way(self, first: int, key: int) -> int:
        """A cell among those from `first` on: one without a sound entry, else any."""
        for way in range(WAYS):
            entry = self._cells[first + way]
            if not entry[Word.PID] or entry[Word.CHECK] != _check(entry):
                return way
        return key % WAYS


def _check(entry: Words) -> int:
    return xxhash.xxh3_64_intdigest(entry[: Word.CHECK].tobytes())
