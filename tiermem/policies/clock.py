"""CLOCK (Corbato, 1968) as FIFO with re-insertion: a used unit gets one more round."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from tiermem.policies.base import Candidates, EvictionBase, Ids, Keys, Mask
from tiermem.policies.queue import Queues, first_width, grown, joined


class Clock(EvictionBase):
    """The bit is set when a unit is used and clear when it enters; a set bit buys one round."""

    name: ClassVar[str] = "clock"

    def __init__(self, capacity: int, seed: int = 0) -> None:
        super().__init__(capacity, seed)
        self._queue = Queues()
        self._used: Mask = np.zeros(0, np.bool_)

    def inserted(self, units: Ids, parents: Ids, depths: Ids, keys: Keys | None, now: int) -> None:
        rows = self._queue.fit(units)
        self._used = grown(self._used, rows)
        self._used[units] = False
        self._queue.append(0, units)

    def accessed(self, units: Ids, now: int) -> None:
        self._used[self._queue.known(units)] = True

    def removed(self, units: Ids, now: int) -> None:
        self._queue.remove(units)

    def victims(self, candidates: Candidates, n: int, now: int) -> Ids:
        found: list[Ids] = []
        after, width = 0, first_width(n)
        while n > 0:
            units, _, after = self._queue.read(0, after, width)
            if not len(units):
                break
            width *= 2
            units = units[candidates.keep(units)]
            leaves = np.flatnonzero(~self._used[units])[:n]
            # The hand stops behind the last victim: what lies beyond keeps its bit and its place.
            passed = units[: leaves[-1] + 1] if len(leaves) == n else units
            again = passed[self._used[passed]]
            self._used[again] = False
            self._queue.append(0, again)
            found.append(units[leaves])
            n -= len(leaves)
        return joined(found)
