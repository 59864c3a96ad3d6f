"""2Q (Johnson and Shasha, VLDB 1994): a first use waits in a FIFO, a return enters an LRU."""

from __future__ import annotations

from typing import ClassVar

from tiermem.policies.base import Candidates, EvictionBase, Ids, Keys
from tiermem.policies.ghost import Names, Returning, Ring, named
from tiermem.policies.queue import Queues, joined

A1IN, AM = 0, 1


class TwoQueue(EvictionBase):
    """A1in holds a quarter, A1out remembers half a capacity of what left it."""

    name: ClassVar[str] = "2q"

    def __init__(
        self, capacity: int, seed: int = 0, inside: float = 0.25, outside: float = 0.5
    ) -> None:
        """inside, outside: A1in's and A1out's sizes as parts of the capacity."""
        super().__init__(capacity, seed)
        self._kin = max(1, int(capacity * inside))
        self._queues = Queues(2)
        self._names = Names()
        self._ghost = Returning(Ring(max(1, int(capacity * outside))))

    def coming(self, units: Ids, keys: Keys | None, now: int) -> None:
        self._ghost.coming(named(units, keys))

    def inserted(self, units: Ids, parents: Ids, depths: Ids, keys: Keys | None, now: int) -> None:
        back = self._ghost.entered(self._names.note(units, keys, self._queues.fit(units)))
        self._queues.append(AM, units[back])
        self._queues.append(A1IN, units[~back])

    def accessed(self, units: Ids, now: int) -> None:
        units = self._queues.known(units)
        self._names.evicting[units] = False
        self._queues.append(AM, units[self._queues.of[units] == AM])

    def removed(self, units: Ids, now: int) -> None:
        units = self._queues.known(units)
        left = units[self._names.evicting[units] & (self._queues.of[units] == A1IN)]
        for name in self._names.of(left):
            self._ghost.ring.put(name)
        self._queues.remove(units)

    def victims(self, candidates: Candidates, n: int, now: int) -> Ids:
        over = max(0, self._queues.size(A1IN) - self._kin)
        first = self._queues.oldest(A1IN, candidates, min(n, over))
        second = self._queues.oldest(AM, candidates, n - len(first))
        rest = n - len(first) - len(second)
        if rest:
            more = self._queues.oldest(A1IN, candidates, len(first) + rest)[len(first) :]
            second = joined([second, more])
        answer = joined([first, second])
        self._names.evicting[answer] = True
        return answer
