"""SIEVE (Zhang et al., NSDI 2024): a hand passes over a FIFO and takes what was not used."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from tiermem.policies.base import Candidates, EvictionBase, Ids, Keys, Mask
from tiermem.policies.queue import Queues, first_width, grown, joined


class Sieve(EvictionBase):
    """Units never move; a used one is passed over once. Keeps old sessions that were popular."""

    name: ClassVar[str] = "sieve"

    def __init__(self, capacity: int, seed: int = 0) -> None:
        super().__init__(capacity, seed)
        self._queue = Queues()
        self._used: Mask = np.zeros(0, np.bool_)
        self._passed = 0
        """Stamp of the unit that the hand left last; 0: the hand is at the oldest unit."""

    def inserted(self, units: Ids, parents: Ids, depths: Ids, keys: Keys | None, now: int) -> None:
        self._used = grown(self._used, self._queue.fit(units))
        self._used[units] = False
        self._queue.append(0, units)

    def accessed(self, units: Ids, now: int) -> None:
        self._used[self._queue.known(units)] = True

    def removed(self, units: Ids, now: int) -> None:
        self._queue.remove(units)

    def victims(self, candidates: Candidates, n: int, now: int) -> Ids:
        found: list[Ids] = []
        wraps, width = 0, first_width(n)
        while n > 0 and wraps <= 2:
            units, stamps, end = self._queue.read(0, self._passed, width)
            if not len(units):
                wraps, self._passed = wraps + 1, 0
                continue
            width *= 2
            allowed = candidates.keep(units)
            if wraps and found:
                allowed &= ~np.isin(units, joined(found))
            leaves = np.flatnonzero(allowed & ~self._used[units])[:n]
            passed = leaves[-1] + 1 if len(leaves) == n else len(units)
            self._used[units[:passed][allowed[:passed]]] = False
            self._passed = int(stamps[passed - 1]) if passed < len(units) else end
            found.append(units[leaves])
            n -= len(leaves)
        if not len(self._queue.read(0, self._passed, 8)[0]):
            # Nothing newer: what comes next must not stand before the hand.
            self._passed = 0
        return joined(found)
