"""LFU, and LFU with dynamic ageing (Arlitt et al., 2000): the least used unit leaves."""

from __future__ import annotations

from bisect import insort
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from tiermem.policies.base import Candidates, EvictionBase, Ids, Keys
from tiermem.policies.queue import Queues, grown, joined

Counts = npt.NDArray[np.int64]


class LFU(EvictionBase):
    """Least uses since insertion, then least recently used. Never forgets: for comparison only."""

    name: ClassVar[str] = "lfu"
    ageing: ClassVar[bool] = False

    def __init__(self, capacity: int, seed: int = 0) -> None:
        super().__init__(capacity, seed)
        self._queues = Queues(0)
        self._count: Counts = np.zeros(0, np.int64)
        self._queue_of: dict[int, int] = {}
        self._ranks: list[int] = []
        self._unused: list[int] = []
        self._age = 0

    def inserted(self, units: Ids, parents: Ids, depths: Ids, keys: Keys | None, now: int) -> None:
        self._count = grown(self._count, self._queues.fit(units))
        self._count[units] = 1
        self._queues.append(self._queue(self._age + 1), units)

    def accessed(self, units: Ids, now: int) -> None:
        units = self._queues.known(units)
        if len(units) == 1:
            self._count[units] += 1
        elif len(units):
            units = self._add(units)
        self._place(units, self._age + self._count[units])

    def removed(self, units: Ids, now: int) -> None:
        self._queues.remove(units)

    def victims(self, candidates: Candidates, n: int, now: int) -> Ids:
        found: list[Ids] = []
        empty: list[int] = []
        for rank in self._ranks:
            if n == 0:
                break
            queue = self._queue_of[rank]
            if self._queues.size(queue) == 0:
                empty.append(rank)
                continue
            units = self._queues.oldest(queue, candidates, n)
            found.append(units)
            n -= len(units)
            if self.ageing and len(units):
                self._age = rank
        for rank in empty:
            self._ranks.remove(rank)
            self._unused.append(self._queue_of.pop(rank))
        return joined(found)

    def _add(self, units: Ids) -> Ids:
        """Count one use each; the units without repeats, in the order of their last mention."""
        last, at, times = np.unique(units[::-1], return_index=True, return_counts=True)
        self._count[last] += times
        return units if len(last) == len(units) else last[np.argsort(-at)]

    def _place(self, units: Ids, ranks: Counts) -> None:
        if not len(units):
            return
        if (ranks == ranks[0]).all():
            self._queues.append(self._queue(int(ranks[0])), units)
            return
        order = np.argsort(ranks, kind="stable")
        units, ranks = units[order], ranks[order]
        cuts = np.flatnonzero(np.diff(ranks)) + 1
        for part in np.split(np.arange(len(units)), cuts):
            self._queues.append(self._queue(int(ranks[part[0]])), units[part])

    def _queue(self, rank: int) -> int:
        queue = self._queue_of.get(rank)
        if queue is None:
            queue = self._unused.pop() if self._unused else self._queues.add()
            self._queue_of[rank] = queue
            insort(self._ranks, rank)
        return queue


class LFUDA(LFU):
    """The count starts at the last victim's rank, so what is no longer used grows old."""

    name: ClassVar[str] = "lfuda"
    ageing: ClassVar[bool] = True
