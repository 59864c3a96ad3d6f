"""What the ranks' routes have moved, and how fast they bring pages to the GPU of late."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping

from tiermem.directed.orders import Moved, Report
from tiermem.tier import Place

Ends = tuple[Place, Place]

LATEST = 16
"""Reports of a route that count."""


class Paces:
    """Kept from reports, whose counts only grow. All ranks move their part of a unit at once.

    By the time during which copies were certainly under way: a short one, which ended between two
    looks, says nothing of a route's speed, and a route of which nothing is known is not slow.
    """

    def __init__(self, routes: Iterable[Ends], page_bytes: int) -> None:
        self._page_bytes = page_bytes
        self._moved: dict[int, Mapping[Ends, Moved]] = {}
        self._paces: dict[Place, dict[int, deque[tuple[int, float]]]] = {
            src: {} for src, dst in sorted(routes) if dst == Place.GPU
        }
        self._gbps: dict[Place, float] | None = None  # asked more often than it changes

    def observe(self, report: Report) -> None:
        before = self._moved.get(report.rank, {})
        if before is report.moved or before == report.moved:
            return
        self._moved[report.rank] = report.moved
        self._gbps = None
        for src, paces in self._paces.items():
            moved = report.moved.get((src, Place.GPU), Moved(0, 0.0))
            seen = before.get((src, Place.GPU), Moved(0, 0.0))
            pages, surely_s = moved.pages - seen.pages, moved.surely_s - seen.surely_s
            if pages > 0:
                pace = paces.setdefault(report.rank, deque(maxlen=LATEST))
                pace.append((pages * self._page_bytes, surely_s))

    def gbps(self) -> dict[Place, float]:
        """By where pages come from, 10^9 bytes a second of the slowest rank; infinite where that
        is not known."""
        if self._gbps is None:
            self._gbps = {
                src: min((_gbps(pace) for pace in paces.values()), default=math.inf)
                for src, paces in self._paces.items()
            }
        return self._gbps

    def totals(self) -> dict[Ends, Moved]:
        """Pages of all ranks together by route, and the seconds of all of them."""
        total: dict[Ends, Moved] = {}
        for moved in self._moved.values():
            for ends, one in moved.items():
                more = total.get(ends, Moved(0, 0.0))
                total[ends] = Moved(more.pages + one.pages, more.busy_s + one.busy_s)
        return total


def _gbps(pace: Iterable[tuple[int, float]]) -> float:
    nbytes, seconds = (sum(part) for part in zip(*pace, strict=True))
    return nbytes / seconds / 1e9 if seconds else math.inf
