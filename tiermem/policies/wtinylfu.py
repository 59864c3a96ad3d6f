"""W-TinyLFU (Einziger et al., 2017) with exact counts: a window LRU feeds a segmented LRU."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import numpy.typing as npt

from tiermem.policies.base import Candidates, EvictionBase, Ids, Keys
from tiermem.policies.ghost import Names, named
from tiermem.policies.queue import Queues, grown, joined

WINDOW, PROBATION, PROTECTED = 0, 1, 2


class WTinyLFU(EvictionBase):
    """What leaves the window replaces the main queue's oldest only if it was used more often."""

    name: ClassVar[str] = "wtinylfu"

    def __init__(
        self, capacity: int, seed: int = 0, window: float = 0.01, sample: int = 10
    ) -> None:
        """window: part of the capacity; sample: capacities of accesses between two halvings."""
        super().__init__(capacity, seed)
        self._window = max(1, int(capacity * window))
        self._main = max(0, capacity - self._window)
        self._protected = int(0.8 * self._main)
        self._sample = sample * capacity
        self._seen = 0
        self._queues = Queues(3)
        self._names = Names()
        self._uses: npt.NDArray[np.int64] = np.zeros(0, np.int64)
        self._absent: dict[int, int] = {}
        self._announced: list[int] = []

    def coming(self, units: Ids, keys: Keys | None, now: int) -> None:
        self._announced = named(units, keys)
        names = self._announced
        while names:
            part, names = names[: self._sample - self._seen], names[self._sample - self._seen :]
            absent = self._absent
            for name in part:
                absent[name] = absent.get(name, 0) + 1
            self._tick(len(part))

    def inserted(self, units: Ids, parents: Ids, depths: Ids, keys: Keys | None, now: int) -> None:
        rows = self._queues.fit(units)
        self._uses = grown(self._uses, rows)
        names = self._names.note(units, keys, rows)
        if names != self._announced:
            self.coming(units, keys, now)
        self._announced = []
        self._uses[units] = [self._absent.pop(name, 0) for name in names]
        self._queues.append(WINDOW, units)
        over = self._queues.size(WINDOW) - self._window
        if over > 0:
            self._queues.append(PROBATION, self._oldest(WINDOW, over))

    def accessed(self, units: Ids, now: int) -> None:
        units = self._queues.known(units)
        while len(units):
            part = units[: max(1, self._sample - self._seen)]
            units = units[len(part) :]
            self._names.evicting[part] = False
            np.add.at(self._uses, part, 1)
            self._tick(len(part))
            of = self._queues.of[part]
            self._queues.append(WINDOW, part[of == WINDOW])
            # Probation's and protected's are kept in one order of use.
            self._queues.append(PROTECTED, part[of != WINDOW])
            over = self._queues.size(PROTECTED) - self._protected
            if over > 0:
                self._queues.append(PROBATION, self._oldest(PROTECTED, over))

    def removed(self, units: Ids, now: int) -> None:
        units = self._queues.known(units)
        uses = self._uses[units].tolist()
        for name, count in zip(self._names.of(units), uses, strict=True):
            if count:
                self._absent[name] = count
        self._queues.remove(units)

    def victims(self, candidates: Candidates, n: int, now: int) -> Ids:
        leaving = self._queues.size(WINDOW) + n - self._window
        contenders = self._queues.oldest(WINDOW, candidates, max(0, min(n, leaving)))
        main = joined(
            [self._queues.oldest(queue, candidates, n) for queue in (PROBATION, PROTECTED)]
        )[:n]
        direct = n - len(contenders)
        out, main = main[:direct], main[direct:]
        if not len(main) and len(contenders):
            out = joined([out, contenders])
        elif len(contenders):
            out = joined([out, self._duel(contenders, main)])
        if len(out) < n:
            out = joined([out, self._rest(candidates, n, out)])
        self._names.evicting[out] = True
        return out

    def _duel(self, contenders: Ids, main: Ids) -> Ids:
        """Each contender against the oldest of main that is left; who is used less leaves."""
        uses = self._uses[contenders].tolist()
        theirs = self._uses[main].tolist()
        out: list[int] = []
        won: list[int] = []
        for i, unit in enumerate(contenders.tolist()):
            if len(won) < len(theirs) and uses[i] > theirs[len(won)]:
                out.append(int(main[len(won)]))
                won.append(unit)
            else:
                out.append(unit)
        self._queues.append(PROBATION, np.array(won, np.int32))
        return np.array(out, np.int32)

    def _rest(self, candidates: Candidates, n: int, out: Ids) -> Ids:
        every = joined(
            [self._queues.oldest(queue, candidates, n) for queue in (WINDOW, PROBATION, PROTECTED)]
        )
        return every[~np.isin(every, out)][: n - len(out)]

    def _oldest(self, queue: int, n: int) -> Ids:
        return self._queues.oldest(queue, _Everything(), n)

    def _tick(self, accesses: int) -> None:
        self._seen += accesses
        if self._seen >= self._sample:
            self._seen = 0
            self._uses >>= 1
            halved = ((name, count >> 1) for name, count in self._absent.items())
            self._absent = {name: count for name, count in halved if count}


class _Everything:
    """Candidates that refuse nothing."""

    def keep(self, units: Ids) -> npt.NDArray[np.bool_]:
        return np.ones(len(units), np.bool_)

    def all(self) -> Ids:
        raise NotImplementedError
