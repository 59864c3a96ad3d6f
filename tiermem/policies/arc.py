"""ARC (Megiddo and Modha, FAST 2003, figure 4): recency and frequency balance by their ghosts."""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import ClassVar

import numpy as np

from tiermem.policies.base import Candidates, EvictionBase, Ids, Keys
from tiermem.policies.ghost import Names, named
from tiermem.policies.queue import Queues, joined

T1, T2 = 0, 1


class ARC(EvictionBase):
    """T1 holds what was used once, T2 what was used again; p is T1's target size, real-valued."""

    name: ClassVar[str] = "arc"

    def __init__(self, capacity: int, seed: int = 0) -> None:
        super().__init__(capacity, seed)
        self._queues = Queues(2)
        self._names = Names()
        self._ghosts: tuple[OrderedDict[int, None], ...] = (OrderedDict(), OrderedDict())
        self._returning: set[int] = set()
        self._p = 0.0
        self._frequent_came = False
        self._forget = False

    def coming(self, units: Ids, keys: Keys | None, now: int) -> None:
        names = named(units, keys)
        self._returning = {name for name in names if self._adapt(name)}
        b1 = len(self._ghosts[T1])
        # Case IV A: L1 is full and all of it is in T1, so its oldest leaves without a ghost.
        self._forget = not self._returning and b1 == 0 and self._queues.size(T1) >= self.capacity
        self._trim(len(names) - len(self._returning) - self._forget)

    def inserted(self, units: Ids, parents: Ids, depths: Ids, keys: Keys | None, now: int) -> None:
        names = self._names.note(units, keys, self._queues.fit(units))
        back = np.array([name in self._returning or self._adapt(name) for name in names], np.bool_)
        self._queues.append(T2, units[back])
        self._queues.append(T1, units[~back])
        self._trim(0)
        self._frequent_came = self._forget = False

    def accessed(self, units: Ids, now: int) -> None:
        units = self._queues.known(units)
        self._names.evicting[units] = False
        self._queues.append(T2, units)

    def removed(self, units: Ids, now: int) -> None:
        units = self._queues.known(units)
        left = units[self._names.evicting[units]]
        queues = self._queues.of[left].tolist()
        for name, queue in zip(self._names.of(left), queues, strict=True):
            if not (self._forget and queue == T1):
                self._ghosts[queue][name] = None
        self._queues.remove(units)

    def victims(self, candidates: Candidates, n: int, now: int) -> Ids:
        size = self._queues.size(T1)
        # REPLACE takes T1's oldest while |T1| > p; equal is enough if one of B2 comes in.
        over = math.floor(size - self._p) + 1 if self._frequent_came else math.ceil(size - self._p)
        if self._forget:
            over = max(over, 1)
        first = self._queues.oldest(T1, candidates, max(0, min(n, over, size)))
        second = self._queues.oldest(T2, candidates, n - len(first))
        rest = n - len(first) - len(second)
        if rest:
            more = self._queues.oldest(T1, candidates, len(first) + rest)[len(first) :]
            second = joined([second, more])
        answer = joined([first, second])
        self._names.evicting[answer] = True
        return answer

    def _adapt(self, name: int) -> bool:
        """Cases II and III: a ghost returns and moves p; True if there was one."""
        b1, b2 = self._ghosts
        if name in b1:
            self._p = min(float(self.capacity), self._p + max(1.0, len(b2) / len(b1)))
            del b1[name]
        elif name in b2:
            self._p = max(0.0, self._p - max(1.0, len(b1) / len(b2)))
            del b2[name]
            self._frequent_came = True
        else:
            return False
        return True

    def _trim(self, new: int) -> None:
        """Make |L1| + new <= c and |L1| + |L2| + new <= 2c, by forgetting ghosts (case IV)."""
        b1, b2 = self._ghosts
        l1 = self._queues.size(T1) + len(b1)
        both = l1 + self._queues.size(T2) + len(b2)
        while b1 and l1 + new > self.capacity:
            b1.popitem(last=False)
            l1, both = l1 - 1, both - 1
        while b2 and both + new > 2 * self.capacity:
            b2.popitem(last=False)
            both -= 1
