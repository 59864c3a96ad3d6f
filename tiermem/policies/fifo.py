"""FIFO: units leave in the order in which they came; being used changes nothing."""

from __future__ import annotations

from typing import ClassVar

from tiermem.policies.base import Candidates, EvictionBase, Ids, Keys
from tiermem.policies.queue import Queues


class FIFO(EvictionBase):
    """First in, first out."""

    name: ClassVar[str] = "fifo"

    def __init__(self, capacity: int, seed: int = 0) -> None:
        super().__init__(capacity, seed)
        self._queue = Queues()

    def inserted(self, units: Ids, parents: Ids, depths: Ids, keys: Keys | None, now: int) -> None:
        self._queue.fit(units)
        self._queue.append(0, units)

    def removed(self, units: Ids, now: int) -> None:
        self._queue.remove(units)

    def victims(self, candidates: Candidates, n: int, now: int) -> Ids:
        return self._queue.oldest(0, candidates, n)
