"""Belady's optimum (1966): the unit whose next use is farthest away leaves. Offline only."""

from __future__ import annotations

import heapq
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from tiermem.policies.base import Candidates, EvictionBase, Ids
from tiermem.policies.queue import grown


class Belady(EvictionBase):
    """Needs to be told the future: `expect` after every use. A simulator can, an engine cannot."""

    name: ClassVar[str] = "belady"
    offline: ClassVar[bool] = True

    def __init__(self, capacity: int, seed: int = 0) -> None:
        super().__init__(capacity, seed)
        self._next: npt.NDArray[np.int64] = np.zeros(0, np.int64)
        self._heap: list[tuple[int, int]] = []

    def expect(self, units: Ids, next_use: npt.NDArray[np.int64]) -> None:
        """next_use: the index of each unit's next access, larger than all others if none."""
        self._next = grown(self._next, int(units.max(initial=-1)) + 1, -1)
        self._next[units] = next_use
        for unit, use in zip(units.tolist(), next_use.tolist(), strict=True):
            heapq.heappush(self._heap, (-use, unit))

    def removed(self, units: Ids, now: int) -> None:
        self._next[units] = -1

    def victims(self, candidates: Candidates, n: int, now: int) -> Ids:
        found: list[int] = []
        back: list[tuple[int, int]] = []
        while self._heap and len(found) < n:
            entry = heapq.heappop(self._heap)
            unit = entry[1]
            if self._next[unit] != -entry[0] or unit in found:
                continue
            back.append(entry)
            if candidates.keep(np.array([unit], np.int32))[0]:
                found.append(unit)
        for entry in back:
            heapq.heappush(self._heap, entry)
        return np.array(found, np.int32)
