"""Prefetch: which units to bring up before they are asked for, and how good that was.

A prefetch policy is told what waits and what is expected, and answers with units in the order in
which they should be loaded, within a budget of bytes. Deadlines are logical milliseconds; what
cannot arrive in time is left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from tiermem.errors import BadPolicy
from tiermem.policies.base import Ids
from tiermem.policies.queue import joined

NONE: Ids = np.empty(0, np.int32)


@dataclass(frozen=True, slots=True)
class Budget:
    """What may be loaded now: bytes in all, at this rate, in units of this size."""

    nbytes: int
    bytes_per_s: float
    unit_bytes: int


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
        room = budget.nbytes // budget.unit_bytes
        named: Ids = NONE
        for request, (units, deadline) in list(self._waiting.items()):
            # What was named for another request is on its way.
            fresh = units[~np.isin(units, named)]
            sent = len(named)
            part = fresh[: min(room - sent, in_time(budget, now, deadline, sent))]
            named = joined([named, part])
            late = deadline is not None and sent + len(part) < room
            # A deadline that cuts a chain cuts it for good.
            self._waiting[request] = (NONE if late else fresh[len(part) :], deadline)
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
        parts = [super().prefetch(budget, now)]
        room = budget.nbytes // budget.unit_bytes - len(parts[0])
        due = sorted((at, session) for session, (at, _) in self._expected.items())
        for at, session in due:
            if room <= 0 or at > now + self._ahead_ms:
                break
            units = self._expected.pop(session)[1]
            sent = sum(map(len, parts))
            # A whole chain or its prefix: blocks behind a gap are of no use.
            part = units[: min(room, in_time(budget, now, at, sent))]
            parts.append(part[~np.isin(part, joined(parts))])
            room -= len(parts[-1])
        return joined(parts)


def in_time(budget: Budget, now: int, deadline: int | None, before: int) -> int:
    """How many units arrive by the deadline if `before` others go first."""
    if deadline is None:
        return budget.nbytes // budget.unit_bytes
    arrived = max(0, deadline - now) / 1000 * budget.bytes_per_s
    return max(0, int(arrived // budget.unit_bytes) - before)


POLICIES = {"none": NoPrefetch, "queue": QueuePrefetch, "hint": HintPrefetch}


def prefetch(name: str) -> Prefetch:
    """The policy called none, queue or hint."""
    if name not in POLICIES:
        raise BadPolicy(f"no prefetch policy {name!r}; known: {', '.join(POLICIES)}")
    found: Prefetch = POLICIES[name]()
    return found


class Quality:
    """Counts how good prefetch was, from what happened to each unit that it brought up."""

    def __init__(self, unit_bytes: int) -> None:
        self._unit_bytes = unit_bytes
        self._due: dict[int, bool] = {}
        self._needed = self._loaded = self._useful = self._late = self._polluted = 0
        self._pushed_out: set[int] = set()

    def loaded(self, units: Ids, pushed_out: Ids) -> None:
        """Prefetch of `units` has begun; for their room `pushed_out` left the tier."""
        self._loaded += len(units)
        self._due.update(dict.fromkeys(units.tolist(), False))
        self._pushed_out.update(pushed_out.tolist())

    def arrived(self, units: Ids) -> None:
        """These prefetched units are there."""
        self._due.update((unit, True) for unit in units.tolist() if unit in self._due)

    def needed(self, units: Ids, absent: Ids) -> None:
        """A request asked for `units`; `absent` are those it has to load itself now."""
        for unit in units.tolist():
            there = self._due.pop(unit, None)
            if there is not None:
                self._needed += 1
                self._useful += 1
                self._late += not there
        for unit in absent.tolist():
            self._needed += 1
            if unit in self._pushed_out:
                self._pushed_out.discard(unit)
                self._polluted += 1

    def dropped(self, units: Ids) -> None:
        """Units left the tier; one that was prefetched and not used was a waste."""
        for unit in units.tolist():
            self._due.pop(unit, None)

    def statistics(self) -> PrefetchQuality:
        unused = self._loaded - self._useful
        return PrefetchQuality(
            coverage=self._useful / self._needed if self._needed else 0.0,
            accuracy=self._useful / self._loaded if self._loaded else 0.0,
            timeliness=1 - self._late / self._useful if self._useful else 0.0,
            pollution=self._polluted / self._loaded if self._loaded else 0.0,
            wasted_bytes=unused * self._unit_bytes,
        )


@dataclass(frozen=True, slots=True)
class PrefetchQuality:
    """coverage: of the loads that were needed, the part that prefetch did. accuracy: of its loads,
    the part that was used. timeliness: of the used, the part that was there in time. pollution:
    loads of what prefetch had pushed out, a load. wasted_bytes: loaded, and not used so far."""

    coverage: float
    accuracy: float
    timeliness: float
    pollution: float
    wasted_bytes: int
