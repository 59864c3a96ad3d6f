"""Prefetch in a running space: facts in, loads out, within a budget of bytes.

The mover asks the policy; what it names waits here until there is room, which is made between the
GPU's marks. Demand goes first: only so much is under way at once as its route moves in 10 ms.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt

from tiermem.config import Config
from tiermem.facts import Ended, Expected, Fact, Idle, Left, Queued
from tiermem.plan import Plan
from tiermem.planner import Planner
from tiermem.policies.prefetch import Budget, NoPrefetch, Prefetch, Quality, prefetch
from tiermem.policies.recompute import RouteSpeed, arrivals_s
from tiermem.stats import PrefetchStatistics
from tiermem.table import IS_IN_PLACE, Rows
from tiermem.tier import AT_GPU, AT_HOST, AT_NVME, GPU, Mask, Place

log = logging.getLogger(__name__)

BURST_MS = 10.0
"""A load on demand waits behind prefetch for so long at most."""

PATIENCE_MS = 30_000
"""What was loaded ahead and not used for so long does not hold the budget any more: a request was
given up, or a session did not come back. A guess that no measurement of ours supports yet."""

_NO_ROWS = np.empty(0, np.int32)


class Foresight:
    """Drives one prefetch policy. All calls are made under the space's lock."""

    def __init__(
        self,
        planner: Planner,
        quality: Quality,
        page_bytes: int,
        speeds: Callable[[], Mapping[Place, RouteSpeed]],
    ) -> None:
        """speeds: of the routes to the GPU by where they come from, called under the lock."""
        self.quality = quality
        self._failures = 0
        self._most_bytes = 0
        self._policy: Prefetch = NoPrefetch()
        self._planner = planner
        self._page_bytes = page_bytes
        self._speeds = speeds
        self._waiting: dict[int, tuple[Rows, int | None]] = {}
        self._named: Rows = _NO_ROWS
        self._more = False
        self._loads: deque[tuple[int, Rows]] = deque()

    @property
    def is_hungry(self) -> bool:
        """True if there may be more to load as soon as there is room."""
        return bool(len(self._named)) or self._more

    def run(self, policy: Prefetch, most_bytes: int, now: int) -> None:
        """Another policy takes over, and is told which requests wait; another budget holds.

        most_bytes: loaded ahead and not used yet. Sessions are told of as they are hinted again.
        """
        self._policy, self._most_bytes, self._more = policy, most_bytes, True
        self._named = _NO_ROWS
        for number, (chain, deadline) in self._waiting.items():
            self._pass_on(lambda n=number, c=chain, d=deadline: policy.queued(  # type: ignore[misc]
                n, c[self._is_below(c)], now, d
            ))  # fmt: skip

    def tell(self, fact: Fact, chain: Rows, owner: int, now: int) -> None:
        """A fact of one region (its number: owner); chain: the units of its chain, first first."""
        policy = self._policy
        self._more = True
        match fact:
            case Queued():
                deadline = None if fact.within_s is None else now + round(fact.within_s * 1000)
                number = _number(fact.request, owner)
                self._waiting[number] = (chain, deadline)
                below = chain[self._is_below(chain)]
                self._pass_on(lambda: policy.queued(number, below, now, deadline))
            case Left():
                number = _number(fact.request, owner)
                left = self._waiting.pop(number, (_NO_ROWS, None))[0]
                self._named = self._named[~np.isin(self._named, left)]
                self._pass_on(lambda: policy.left(number))
            case Expected():
                at = now + round(fact.in_s * 1000)
                number = _number(fact.session, owner)
                below = chain[self._is_below(chain)]
                self._pass_on(lambda: policy.hinted(number, below, at, fact.probability))
            case Idle():
                number = _number(fact.session, owner)
                self._pass_on(lambda: policy.hinted(number, _NO_ROWS, None, 0.0))
            case Ended():
                self._pass_on(lambda: policy.closed(_number(fact.session, owner)))

    def turn(self, now: int) -> list[Plan]:
        """Load what is named and finds room; ask for more when nothing is left of that."""
        planner, table = self._planner, self._planner.table
        self._excuse(now)
        unit_pages = table.max_unit_pages
        most = max(unit_pages, self._most_bytes // self._page_bytes)  # one unit at least
        left = (most - self.quality.waiting) // unit_pages
        if left <= 0 or GPU in planner.failed_tiers:
            return []
        self._named = self._named[self._is_below(self._named)]
        if not len(self._named):
            units = self._ask(left, unit_pages * self._page_bytes, now)
            self._more = len(units) >= left
            self._named = units[self._is_below(units)]
        rows = table.pages(self._burst(self._named[: min(left, planner.batch)]))
        if not len(rows):
            return []
        short = len(rows) - planner.room_ahead()
        plans = planner.make_way(short, now) if short > 0 else []
        plans += planner.prefetch(rows, now)
        self._loads.append((now, rows[table.to[rows] == AT_GPU]))
        self._named = self._named[self._is_below(self._named)]
        return plans

    def statistics(self) -> PrefetchStatistics:
        return PrefetchStatistics(
            self._policy.name,
            len(self._waiting),
            self._most_bytes,
            self._failures,
            self.quality.statistics(),
        )

    def _ask(self, units: int, unit_bytes: int, now: int) -> Rows:
        """What the policy names now, if it keeps the rules."""
        budget = Budget(units * unit_bytes, unit_bytes, self._arrivals_ms)
        table = self._planner.table
        answer = _NO_ROWS
        try:
            answer = np.asarray(self._policy.prefetch(budget, now), np.int32)
        except Exception as error:  # a policy's bug must not cost its engine a request
            self._replace(f"raised {type(error).__name__}: {error}")
            return _NO_ROWS
        known = answer.ndim == 1 and (not len(answer) or 0 <= answer.min() <= answer.max())
        if not known or (len(answer) and answer.max() >= table.rows):
            self._replace("named what is no unit")
        elif len(answer) > units or (table.unit[answer] != answer).any():
            self._replace(f"named {len(answer)} units where {units} may be loaded, or no units")
        elif len(np.unique(answer)) != len(answer):
            self._replace("named a unit twice")
        else:
            return answer
        return _NO_ROWS

    def _pass_on(self, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as error:  # as above
            self._replace(f"failed on a fact: {type(error).__name__}: {error}")

    def _replace(self, why: str) -> None:
        log.warning("prefetch policy replaced policy=%s by=none reason=%s", self._policy.name, why)
        self._failures += 1
        self._policy = NoPrefetch()

    def _burst(self, units: Rows) -> Rows:
        """As many of these as arrive soon; one at least if nothing is under way."""
        if not len(units):
            return units
        late = self._arrivals_ms(units) > BURST_MS
        n = int(late.argmax()) if late.any() else len(units)
        if not n and not any(self._planner.queued(place) for place in (Place.HOST, Place.NVME)):
            n = 1
        return units[:n]

    def _arrivals_ms(self, units: Rows) -> npt.NDArray[np.float64]:
        places, pages = self._planner.chain(units)
        return 1000 * arrivals_s(places, pages * self._page_bytes, self._speeds())

    def _is_below(self, units: Rows) -> Mask:
        """bool[n]: which of these are below the GPU, seen from nowhere and not on their way up."""
        table = self._planner.table
        at = table.at[units]
        below: Mask = ((at == AT_HOST) | (at == AT_NVME)) & (table.to[units] != AT_GPU)
        below &= table.shown[units] != IS_IN_PLACE
        return below & ~self._planner.is_doomed(units)

    def _excuse(self, now: int) -> None:
        while self._loads and now - self._loads[0][0] > PATIENCE_MS:
            self.quality.excuse(self._loads.popleft()[1])


def load_prefetch(config: Config) -> Prefetch | None:
    """The policy that a configuration names; None if it wants none. Raises BadPolicy."""
    section = config.prefetch
    return prefetch(section.name, section.params) if section.enabled else None


def _number(name: int, owner: int) -> int:
    """One number for a request or session of one region."""
    return (name << 16) | owner
