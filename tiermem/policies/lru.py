"""Leaf-first LRU: the unit that was used longest ago leaves, children before their parents.

Because facts arrive deepest first, a parent is always newer than its children, so plain recency
takes leaves first; the lineage only guards against facts that came in another order.
"""

from __future__ import annotations

from typing import ClassVar

from tiermem.policies.base import Candidates, EvictionBase, Ids, Keys
from tiermem.policies.queue import Lineage, Queues


class LRU(EvictionBase):
    """Least recently used, leaf first."""

    name: ClassVar[str] = "lru"
    leaf_first: ClassVar[bool] = True

    def __init__(self, capacity: int, seed: int = 0) -> None:
        super().__init__(capacity, seed)
        self._queue = Queues()
        self._lineage = Lineage()

    def inserted(self, units: Ids, parents: Ids, depths: Ids, keys: Keys | None, now: int) -> None:
        self._lineage.note(units, parents, depths, self._queue.fit(units))
        self._queue.append(0, units)

    def accessed(self, units: Ids, now: int) -> None:
        self._queue.append(0, self._queue.known(units))

    def removed(self, units: Ids, now: int) -> None:
        self._queue.remove(units)

    def victims(self, candidates: Candidates, n: int, now: int) -> Ids:
        return self._lineage.children_first(self._queue.oldest(0, candidates, n))
