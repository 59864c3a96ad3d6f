"""Queues of units in numpy: the mechanism that most policies are made of.

A queue is a *log*: an append-only array of (unit, stamp). Stamps are unique and grow; `stamp[unit]`
is that of the unit's newest entry, so moving a unit to the end of any queue is one append, and its
old entry is stale from then on. Reading from the old end passes over stale entries, and a log in
which they dominate is compacted: all verbs cost amortised O(1) a unit (log-structured LRU).
"""

from __future__ import annotations

from typing import TypeVar

import numpy as np
import numpy.typing as npt

from tiermem.policies.base import Candidates, Ids
from tiermem.table import span

Number = TypeVar("Number", bound=np.generic)
Stamps = npt.NDArray[np.int64]

FIRST_ROOM = 1024
FIRST_LOG = 32
"""Entries; a frequency policy may hold a queue for each count."""
SWEEP = 1024
"""Appended entries between two sweeps of the stale old end."""


class _Log:
    """One queue's entries; [head, tail) are in use, stamps ascending."""

    __slots__ = ("head", "size", "stamps", "swept", "tail", "units")

    def __init__(self) -> None:
        self.units: Ids = np.empty(FIRST_LOG, np.int32)
        self.stamps: Stamps = np.empty(FIRST_LOG, np.int64)
        self.head = self.tail = self.swept = 0
        self.size = 0


class Queues:
    """A fixed number of queues over one set of units; a unit is in at most one of them."""

    def __init__(self, count: int = 1) -> None:
        self.of: npt.NDArray[np.int32] = np.full(FIRST_ROOM, -1, np.int32)
        """The queue a unit is in, or -1; one entry for every unit seen so far."""
        self.stamp: Stamps = np.zeros(FIRST_ROOM, np.int64)
        self._logs = [_Log() for _ in range(count)]
        self._last = 0

    def size(self, queue: int) -> int:
        """Units in this queue."""
        return self._logs[queue].size

    def add(self) -> int:
        """One more queue, empty; its number."""
        self._logs.append(_Log())
        return len(self._logs) - 1

    def fit(self, units: Ids) -> int:
        """Make room for these units' rows; how many rows there are now."""
        top = units.item() if len(units) == 1 else int(units.max(initial=-1))
        if top >= len(self.of):
            rows = max(top + 1, 2 * len(self.of))
            self.of, self.stamp = grown(self.of, rows, -1), grown(self.stamp, rows)
        return len(self.of)

    def known(self, units: Ids) -> Ids:
        """The units that are in some queue, in the same order."""
        if len(units) == 1:
            unit = units.item()
            return units if unit < len(self.of) and self.of.item(unit) >= 0 else units[:0]
        try:
            inside = self.of[units] >= 0  # not by a slice, which would end where the column does
        except IndexError:
            units = units[units < len(self.of)]
            inside = self.of[units] >= 0
        return units if inside.all() else units[inside]

    def append(self, queue: int, units: Ids) -> None:
        """Move units, whose rows fit, to the new end of `queue`, in order; the last becomes newest.

        A unit named twice counts where it is named last.
        """
        n = len(units)
        if n == 0:
            return
        log = self._logs[queue]
        if log.tail + n > len(log.units):
            self._make_room(queue, n)
        if n == 1:
            self._append_one(log, queue, units.item())
        else:
            self._append_many(log, queue, units)
        log.swept += n
        if log.swept >= SWEEP:
            self._sweep(log)

    def _append_one(self, log: _Log, queue: int, unit: int) -> None:
        self._last += 1
        log.units[log.tail] = unit
        log.stamps[log.tail] = self.stamp[unit] = self._last
        log.tail += 1
        old = self.of.item(unit)
        if old != queue:
            if old >= 0:
                self._logs[old].size -= 1
            log.size += 1
            self.of[unit] = queue

    def _append_many(self, log: _Log, queue: int, units: Ids) -> None:
        n = len(units)
        stamps, where = np.arange(self._last + 1, self._last + n + 1), span(units)
        self._last += n
        log.units[log.tail : log.tail + n] = units
        log.stamps[log.tail : log.tail + n] = stamps
        log.tail += n
        self.stamp[where] = stamps
        old = self.of[where]
        moved = old != queue
        if moved.any():
            moved &= self.stamp[where] == stamps
            self._leave(old[moved])
            log.size += int(np.count_nonzero(moved))
            self.of[where] = queue

    def remove(self, units: Ids) -> None:
        """Take units out of whatever queue they are in; unknown ones are passed over."""
        if len(units) == 1:
            unit = units.item()
            if unit < len(self.of) and (queue := self.of.item(unit)) >= 0:
                self._logs[queue].size -= 1
                self.of[unit] = -1
                self.stamp[unit] = 0
            return
        units = self.known(units)
        marks, where = np.arange(len(units)), span(units)
        self.stamp[where] = marks
        once = self.stamp[where] == marks  # a unit named twice leaves once
        self._leave(self.of[where if np.count_nonzero(once) == len(units) else units[once]])
        self.of[where] = -1
        self.stamp[where] = 0

    def read(self, queue: int, after: int, width: int) -> tuple[Ids, Stamps, int]:
        """Units of `queue` with stamps above `after`, oldest first: some of about `width`.

        after: 0, or what an earlier read gave. Returns units, their stamps, and the stamp to go on
        from; no units means the end. Appending between two reads is allowed.
        """
        log = self._logs[queue]
        if log.size == 0:
            return log.units[:0], log.stamps[:0], after
        at = log.head
        if at < log.tail and after >= log.stamps[at]:
            at += int(np.searchsorted(log.stamps[at : log.tail], after, side="right"))
        while at < log.tail:
            end = min(at + width, log.tail)
            units, stamps = log.units[at:end], log.stamps[at:end]
            live = self.stamp[units] == stamps
            if live.all():
                return units.copy(), stamps.copy(), int(stamps[-1])
            if at == log.head:
                log.head = at + int(live.argmax()) if live.any() else end
            if live.any():
                return units[live], stamps[live], int(stamps[-1])
            after, at, width = int(stamps[-1]), end, 2 * width
        return log.units[:0], log.stamps[:0], after

    def oldest(self, queue: int, candidates: Candidates, n: int) -> Ids:
        """Up to n units of one queue that may leave, oldest first; nothing changes."""
        found: list[Ids] = []
        after, width = 0, first_width(n)
        while n > 0:
            units, _, after = self.read(queue, after, width)
            if not len(units):
                break
            width *= 2
            units = units[candidates.keep(units)][:n]
            found.append(units)
            n -= len(units)
        return found[0] if len(found) == 1 else joined(found)

    def _leave(self, queues: npt.NDArray[np.int32]) -> None:
        if len(queues) and queues[0] >= 0 and np.count_nonzero(queues == queues[0]) == len(queues):
            self._logs[queues[0]].size -= len(queues)  # all of them are in one
            return
        inside = queues[queues >= 0]
        for queue in np.flatnonzero(np.bincount(inside)) if len(inside) else ():
            self._logs[queue].size -= int(np.count_nonzero(inside == queue))

    def _sweep(self, log: _Log) -> None:
        """Pass over stale entries at the old end, a bounded number, so that reads need not."""
        end = min(log.head + 4 * log.swept, log.tail)
        fresh = self.stamp[log.units[log.head : end]] == log.stamps[log.head : end]
        log.head = log.head + int(fresh.argmax()) if fresh.any() else end
        log.swept = 0

    def _make_room(self, queue: int, n: int) -> None:
        """Compact the log; grow it too unless half of it is free then."""
        log = self._logs[queue]
        used = slice(log.head, log.tail)
        live = self.stamp[log.units[used]] == log.stamps[used]
        units, stamps = log.units[used][live], log.stamps[used][live]
        log.head, log.tail = 0, len(units)
        if 2 * (log.tail + n) > len(log.units):
            room = max(2 * len(log.units), 3 * (log.tail + n))
            log.units, log.stamps = np.empty(room, np.int32), np.empty(room, np.int64)
        log.units[: log.tail], log.stamps[: log.tail] = units, stamps


def first_width(n: int) -> int:
    """How many units to read first for n victims.

    Whoever may take none of them reads twice as many next: a long row of units that may not leave,
    such as those on their way down already, then costs a few reads.
    """
    return n + n // 4 + 8


def grown(column: npt.NDArray[Number], rows: int, fill: int = 0) -> npt.NDArray[Number]:
    """The column with at least `rows` rows, new ones filled."""
    if rows <= len(column):
        return column
    more = np.full(rows - len(column), fill, column.dtype)
    return np.concatenate([column, more])


class Lineage:
    """Parents and depths of the units in a tier; puts answers into an order children first."""

    def __init__(self) -> None:
        self.parent: Ids = np.full(FIRST_ROOM, -1, np.int32)
        self.depth: Ids = np.zeros(FIRST_ROOM, np.int32)
        self._rank: Ids = np.zeros(FIRST_ROOM, np.int32)

    def note(self, units: Ids, parents: Ids, depths: Ids, rows: int) -> None:
        """Remember where units hang; rows: as `Queues.fit` says."""
        if rows > len(self.parent):
            self.parent = grown(self.parent, rows, -1)
            self.depth = grown(self.depth, rows)
            self._rank = grown(self._rank, rows)
        if len(units) == 1:
            self.parent[units.item()], self.depth[units.item()] = parents.item(), depths.item()
        else:
            where = span(units)
            self.parent[where], self.depth[where] = parents, depths

    def children_first(self, units: Ids) -> Ids:
        """The same units; if a parent stands before its child, ordered by depth instead."""
        if len(units) < 2:
            return units
        position = np.arange(len(units), dtype=np.int32)
        self._rank[units] = position
        parent = self.parent[units]
        rank = np.where(parent >= 0, self._rank[parent], len(units))
        # A rank is stale unless the unit at that position is the parent itself.
        before = rank < position
        before[before] = units[rank[before]] == parent[before]
        if not before.any():
            return units
        return units[np.argsort(-self.depth[units], kind="stable")]


def joined(parts: list[Ids]) -> Ids:
    """One array of units."""
    return np.concatenate(parts) if parts else np.empty(0, np.int32)
