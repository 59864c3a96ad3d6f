"""Priority and retention time, over any policy: some units leave later than others.

Units without a mark leave first, as the inner policy ranks them; then marked ones, by priority;
units whose retention time has not passed leave only when nothing else may. Nobody is refused for
good: a tier whose units are all retained still names victims.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from tiermem.errors import BadPolicy
from tiermem.policies.base import (
    Candidates,
    Eviction,
    EvictionBase,
    Ids,
    Keys,
    Mask,
    RequestFacts,
)
from tiermem.policies.queue import grown, joined

HIGHEST = 100


class Retained(EvictionBase):
    """Another policy, with marks on units: `retain`. A mark ends when its unit leaves the tier."""

    name: ClassVar[str] = "retained"
    leaf_first: ClassVar[bool] = False

    def __init__(
        self,
        capacity: int,
        seed: int = 0,
        over: str | Eviction = "classq",
        **params: object,
    ) -> None:
        """over: the inner policy, which may be running already, or its name; params: its
        arguments."""
        super().__init__(capacity, seed)
        from tiermem.policies.registry import load

        self.inner: Eviction = load(over, capacity, seed, params) if isinstance(over, str) else over
        self._priority: npt.NDArray[np.int16] = np.zeros(0, np.int16)
        self._until: npt.NDArray[np.int64] = np.zeros(0, np.int64)
        self._marked = 0

    def retain(self, units: Ids, priority: int = 0, until: int = 0) -> None:
        """Mark units of the tier. priority: 0 (none) to 100; until: logical ms, 0: no time.

        A parent takes the highest mark of its children: the caller marks whole chains.
        """
        if not 0 <= priority <= HIGHEST:
            raise BadPolicy(f"priority {priority} is not in 0..{HIGHEST}")
        self._fit(units)
        before = self._is_marked(units)
        self._priority[units] = np.maximum(self._priority[units], priority)
        self._until[units] = np.maximum(self._until[units], until)
        self._marked += int(np.count_nonzero(self._is_marked(units) & ~before))

    def coming(self, units: Ids, keys: Keys | None, now: int) -> None:
        getattr(self.inner, "coming", super().coming)(units, keys, now)

    def inserted(self, units: Ids, parents: Ids, depths: Ids, keys: Keys | None, now: int) -> None:
        self._fit(units)
        self.inner.inserted(units, parents, depths, keys, now)

    def accessed(self, units: Ids, now: int) -> None:
        self.inner.accessed(units, now)

    def removed(self, units: Ids, now: int) -> None:
        if self._marked:
            self._fit(units)
            self._marked -= int(np.count_nonzero(self._is_marked(units)))
            self._priority[units] = 0
            self._until[units] = 0
        self.inner.removed(units, now)

    def finished(self, units: Ids, facts: RequestFacts, now: int) -> None:
        self.inner.finished(units, facts, now)

    def victims(self, candidates: Candidates, n: int, now: int) -> Ids:
        if not self._marked:
            return self.inner.victims(candidates, n, now)
        found: list[Ids] = []
        for rank in self._ranks(now):
            some = self.inner.victims(_OfRank(self, candidates, rank, now), n, now)
            found.append(some)
            n -= len(some)
            if n == 0:
                break
        return joined(found)

    def _ranks(self, now: int) -> Iterator[int]:
        """Ranks in their order. Those of marked units are looked up when nothing else is left."""
        yield 0
        marked = np.flatnonzero((self._priority > 0) | (self._until > 0))
        ranks = np.unique(self._rank(marked, now))
        yield from ranks[ranks > 0].tolist()

    def _rank(self, units: npt.NDArray[np.integer], now: int) -> npt.NDArray[np.int64]:
        """Lower leaves first: priority, behind whatever time is still retained."""
        self._fit(units)  # what the inner policy held before it was wrapped was never told here
        ranks: npt.NDArray[np.int64] = self._priority[units].astype(np.int64)
        ranks += (HIGHEST + 1) * (self._until[units] > now)
        return ranks

    def _is_marked(self, units: Ids) -> Mask:
        marked: Mask = (self._priority[units] > 0) | (self._until[units] > 0)
        return marked

    def _fit(self, units: npt.NDArray[np.integer]) -> None:
        rows = int(units.max(initial=-1)) + 1
        if rows > len(self._until):
            rows = max(rows, 2 * len(self._until))
            self._priority, self._until = grown(self._priority, rows), grown(self._until, rows)


class _OfRank:
    """The candidates of one rank."""

    def __init__(self, policy: Retained, inner: Candidates, rank: int, now: int) -> None:
        self._policy, self._inner, self._rank, self._now = policy, inner, rank, now

    def keep(self, units: Ids) -> Mask:
        mine: Mask = self._policy._rank(units, self._now) == self._rank
        mine[mine] = self._inner.keep(units[mine])
        return mine

    def all(self) -> Ids:
        units = self._inner.all()
        mine: Mask = self._policy._rank(units, self._now) == self._rank
        return units[mine]
