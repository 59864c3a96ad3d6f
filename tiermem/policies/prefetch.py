"""Prefetch: which units to bring up before they are asked for, and how good that was.

A prefetch policy is told what waits and what is expected, and answers with units in the order in
which they should be loaded, within a budget of bytes. Deadlines are logical milliseconds; what
cannot arrive in time is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol, cast

import numpy as np
import numpy.typing as npt

from tiermem.errors import BadPolicy
from tiermem.policies.base import Ids, Mask, PrefetchQuality
from tiermem.policies.queue import grown, joined
from tiermem.policies.registry import import_class

NONE: Ids = np.empty(0, np.int32)
Arrivals = Callable[[Ids], npt.NDArray[np.float64]]


@dataclass(frozen=True, slots=True)
class Budget:
    """What may be loaded now: bytes in all, in units of this size.

    arrivals_ms: float64[n], in how many ms each of these units would be there if they were loaded
    now in this order, from where they are.
    """

    nbytes: int
    unit_bytes: int
    arrivals_ms: Arrivals

    @property
    def units(self) -> int:
        return self.nbytes // self.unit_bytes


class Prefetch(Protocol):
    """Decides what comes up ahead of need."""

    name: str

    def queued(self, request: int, units: Ids, now: int, deadline: int | None = None) -> None:
        """A request waits; units are its chain's absent ones, first block first."""

    def left(self, request: int) -> None:
        """A waiting request has started, or will not."""

    def hinted(self, session: int, units: Ids, at: int | None, probability: float) -> None:
        """A session is expected back at `at` (None: idle, nobody knows when), this probably."""

    def closed(self, session: int) -> None:
        """A session will not come back."""

    def prefetch(self, budget: Budget, now: int) -> Ids:
        """Units to load, in order, without repeats; asked again until it names none."""


class NoPrefetch:
    """Loads when asked."""

    name = "none"

    def queued(self, request: int, units: Ids, now: int, deadline: int | None = None) -> None:
        pass

    def left(self, request: int) -> None:
        pass

    def hinted(self, session: int, units: Ids, at: int | None, probability: float) -> None:
        pass

    def closed(self, session: int) -> None:
        pass

    def prefetch(self, budget: Budget, now: int) -> Ids:
        return NONE


class QueuePrefetch(NoPrefetch):
    """Loads what waiting requests need, in their order."""

    name = "queue"

    def __init__(self) -> None:
        self._waiting: dict[int, tuple[Ids, int | None]] = {}

    def queued(self, request: int, units: Ids, now: int, deadline: int | None = None) -> None:
        self._waiting[request] = (units, deadline)

    def left(self, request: int) -> None:
        self._waiting.pop(request, None)

    def prefetch(self, budget: Budget, now: int) -> Ids:
        named: Ids = NONE
        for request, (units, deadline) in list(self._waiting.items()):
            # What was named for another request is on its way.
            fresh = units[~np.isin(units, named)]
            part = fresh[: max(0, budget.units - len(named))]
            timely = part[: in_time(budget, now, deadline, named, part)]
            # A deadline that cuts a chain cuts it for good.
            rest = fresh[len(part) :] if len(timely) == len(part) else NONE
            self._waiting[request] = (rest, deadline)
            named = joined([named, timely])
        return named


class HintPrefetch(QueuePrefetch):
    """Waiting requests first, then sessions that are expected back, the soonest first."""

    name = "hint"

    def __init__(self, ahead_ms: int = 2_000, likely: float = 0.5) -> None:
        """ahead_ms: how long before a session is due its units are loaded; likely: least
        probability. 2 s is a guess that no measurement of ours supports yet."""
        super().__init__()
        self._ahead_ms, self._likely = ahead_ms, likely
        self._expected: dict[int, tuple[int, Ids]] = {}

    def hinted(self, session: int, units: Ids, at: int | None, probability: float) -> None:
        if at is None or probability < self._likely:
            self._expected.pop(session, None)
        else:
            self._expected[session] = (at, units)

    def closed(self, session: int) -> None:
        self._expected.pop(session, None)

    def prefetch(self, budget: Budget, now: int) -> Ids:
        named = super().prefetch(budget, now)
        due = sorted((at, session) for session, (at, _) in self._expected.items())
        for at, session in due:
            if len(named) >= budget.units or at > now + self._ahead_ms:
                break
            units = self._expected.pop(session)[1]
            # A whole chain or its prefix: blocks behind a gap are of no use.
            part = units[~np.isin(units, named)][: budget.units - len(named)]
            named = joined([named, part[: in_time(budget, now, at, named, part)]])
        return named


def in_time(budget: Budget, now: int, deadline: int | None, before: Ids, units: Ids) -> int:
    """How many of these units are there by the deadline if others are loaded before them."""
    if deadline is None or not len(units):
        return len(units)
    arrivals_ms = budget.arrivals_ms(joined([before, units]))[len(before) :]
    late = arrivals_ms > deadline - now
    return int(late.argmax()) if late.any() else len(units)


POLICIES = {"none": NoPrefetch, "queue": QueuePrefetch, "hint": HintPrefetch}


def prefetch(name: str, params: Mapping[str, object] | None = None) -> Prefetch:
    """The policy called none, queue or hint, or module:Class. Raises BadPolicy.

    params: arguments of its constructor.
    """
    if name not in POLICIES and ":" not in name:
        raise BadPolicy(
            f"no prefetch policy {name!r}; known: {', '.join(POLICIES)}, or module:Class"
        )
    cls = POLICIES.get(name) or import_class(name, name)
    make = cast(Callable[..., Prefetch], cls)
    try:
        return make(**(params or {}))
    except (TypeError, ValueError) as error:
        raise BadPolicy(f"prefetch policy {name!r} with {params}: {error}") from error


_NOT, _COMING, _THERE, _EXCUSED = range(4)


class Quality:
    """Counts how good prefetch was, from what happens to pages; see `base.PrefetchGauge`."""

    def __init__(self, page_bytes: int) -> None:
        self._page_bytes = page_bytes
        self._fate: npt.NDArray[np.uint8] = np.zeros(0, np.uint8)
        self._pushed: Mask = np.zeros(0, np.bool_)
        self._needed = self._loaded = self._used = 0
        self._late = self._wasted = self._polluting = 0
        self.waiting = 0
        """Pages loaded ahead that are neither used nor gone, nor excused."""

    def loaded(self, pages: Ids) -> None:
        self._fit(pages)
        self._settle(pages)
        self._fate[pages] = _COMING
        self._loaded += len(pages)
        self.waiting += len(pages)

    def pushed_out(self, pages: Ids) -> None:
        self._fit(pages)
        self._pushed[pages] = True

    def arrived(self, pages: Ids) -> None:
        self._fit(pages)
        self._fate[pages[self._fate[pages] == _COMING]] = _THERE

    def needed(self, pages: Ids, absent: Ids) -> None:
        self._fit(pages)
        late, used = self._settle(pages)
        self._used += used
        self._late += late
        self._needed += used + len(absent)
        self._polluting += int(np.count_nonzero(self._pushed[absent]))
        self._pushed[pages] = False

    def dropped(self, pages: Ids) -> None:
        self._fit(pages)
        self._wasted += self._settle(pages)[1]

    def gone(self, pages: Ids) -> None:
        self.dropped(pages)
        self._pushed[pages] = False

    def excuse(self, pages: Ids) -> None:
        """These have waited long enough: they do not count as waiting any more."""
        due = pages[(self._fate[pages] == _COMING) | (self._fate[pages] == _THERE)]
        self._fate[due] = _EXCUSED
        self.waiting -= len(due)

    def statistics(self) -> PrefetchQuality:
        return PrefetchQuality(
            needed=self._needed,
            loaded=self._loaded,
            used=self._used,
            late=self._late,
            wasted=self._wasted,
            waiting=self._loaded - self._used - self._wasted,
            polluting=self._polluting,
            page_bytes=self._page_bytes,
        )

    def _settle(self, pages: Ids) -> tuple[int, int]:
        """The fate of these is known. Returns how many were still coming, and how many in all."""
        fate = self._fate[pages]
        counts = np.bincount(fate, minlength=4).tolist()
        self._fate[pages] = _NOT
        self.waiting -= counts[_COMING] + counts[_THERE]
        return counts[_COMING], len(pages) - counts[_NOT]

    def _fit(self, pages: Ids) -> None:
        rows = int(pages.max(initial=-1)) + 1
        if rows > len(self._fate):
            rows = max(rows, 2 * len(self._fate))
            self._fate, self._pushed = grown(self._fate, rows), grown(self._pushed, rows)
