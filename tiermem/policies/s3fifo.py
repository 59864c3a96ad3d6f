"""S3-FIFO (Yang et al., SOSP 2023): a small FIFO sieves what the main FIFO keeps."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import numpy.typing as npt

from tiermem.policies.base import Candidates, EvictionBase, Ids, Keys
from tiermem.policies.ghost import Names, Returning, Ring, named
from tiermem.policies.queue import Queues, first_width, grown, joined

SMALL, MAIN = 0, 1
CAP = 3


class S3FIFO(EvictionBase):
    """Small holds a tenth; two uses there, or a return soon after leaving, lead to main."""

    name: ClassVar[str] = "s3fifo"

    def __init__(self, capacity: int, seed: int = 0, small: float = 0.1, promote: int = 2) -> None:
        """small: part of the capacity; promote: uses in small that lead to main."""
        super().__init__(capacity, seed)
        self._small = max(1, int(capacity * small))
        self._promote = promote
        self._queues = Queues(2)
        self._names = Names()
        self._ghost = Returning(Ring(max(1, capacity - self._small)))
        self._uses: npt.NDArray[np.uint8] = np.zeros(0, np.uint8)

    def coming(self, units: Ids, keys: Keys | None, now: int) -> None:
        self._ghost.coming(named(units, keys))

    def inserted(self, units: Ids, parents: Ids, depths: Ids, keys: Keys | None, now: int) -> None:
        rows = self._queues.fit(units)
        self._uses = grown(self._uses, rows)
        self._uses[units] = 0
        back = self._ghost.entered(self._names.note(units, keys, rows))
        self._queues.append(MAIN, units[back])
        self._queues.append(SMALL, units[~back])

    def accessed(self, units: Ids, now: int) -> None:
        units = self._queues.known(units)
        self._names.evicting[units] = False
        if len(units) == 1 or len(np.unique(units)) == len(units):
            self._uses[units] = np.minimum(self._uses[units] + 1, CAP)
        else:
            more = np.bincount(units, minlength=len(self._uses))
            self._uses[units] = np.minimum(self._uses[units] + more[units], CAP)

    def removed(self, units: Ids, now: int) -> None:
        units = self._queues.known(units)
        left = units[self._names.evicting[units] & (self._queues.of[units] == SMALL)]
        for name in self._names.of(left):
            self._ghost.ring.put(name)
        self._queues.remove(units)

    def victims(self, candidates: Candidates, n: int, now: int) -> Ids:
        sizes = [self._queues.size(SMALL), self._queues.size(MAIN)]
        after, ended = [0, 0], [False, False]
        width = first_width(n)
        found: list[Ids] = []
        while n > 0 and not all(ended):
            over = sizes[SMALL] - self._small + 1
            queue = SMALL if over > 0 or sizes[MAIN] == 0 or ended[MAIN] else MAIN
            queue = MAIN - queue if ended[queue] else queue
            units, stamps, end = self._queues.read(queue, after[queue], width)
            after[queue], ended[queue] = end, not len(units)
            allowed = np.flatnonzero(candidates.keep(units))
            width = width if len(allowed) else 2 * width
            if queue == SMALL and not ended[MAIN]:
                # The balance between the queues is looked at anew after `over` units.
                allowed = self._cut(allowed, max(over, 1), stamps, after)
            leave = self._uses[units[allowed]] < (self._promote if queue == SMALL else 1)
            last = np.flatnonzero(leave)[n - 1 : n]
            if len(last):
                allowed, leave = allowed[: last[0] + 1], leave[: last[0] + 1]
            out, stay = units[allowed[leave]], units[allowed[~leave]]
            self._uses[stay] = 0 if queue == SMALL else self._uses[stay] - 1
            self._queues.append(MAIN, stay)
            if len(stay):
                ended[MAIN] = False
            sizes[queue] -= len(out) if queue == MAIN else len(allowed)
            sizes[MAIN] += len(stay) if queue == SMALL else 0
            found.append(out)
            n -= len(out)
        answer = joined(found)
        self._names.evicting[answer] = True
        return answer

    def _cut(
        self,
        allowed: npt.NDArray[np.intp],
        limit: int,
        stamps: npt.NDArray[np.int64],
        after: list[int],
    ) -> npt.NDArray[np.intp]:
        if len(allowed) > limit:
            allowed = allowed[:limit]
            after[SMALL] = int(stamps[allowed[-1]])
        return allowed
