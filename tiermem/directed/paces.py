"""What the ranks' routes have moved, and how fast they bring pages to the GPU of late."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from tiermem.directed.orders import Moved, Report
from tiermem.stats import Pace
from tiermem.tier import Place

Ends = tuple[Place, Place]


class Paces:
    """Kept from reports, whose counts only grow. All ranks move their part of a unit at once."""

    def __init__(self, routes: Iterable[Ends], page_bytes: int) -> None:
        self._page_bytes = page_bytes
        self._moved: dict[int, Mapping[Ends, Moved]] = {}
        self._paces: dict[Place, dict[int, Pace]] = {
            src: {} for src, dst in sorted(routes) if dst == Place.GPU
        }

    def observe(self, report: Report) -> None:
        before = self._moved.get(report.rank, {})
        self._moved[report.rank] = report.moved
        for src, paces in self._paces.items():
            moved = report.moved.get((src, Place.GPU))
            if moved is not None and moved != before.get((src, Place.GPU)):
                pace = paces.setdefault(report.rank, Pace())
                pace.observe(moved.pages * self._page_bytes, moved.busy_s)

    def gbps(self) -> dict[Place, float]:
        """By where pages come from, 10^9 bytes a second of the slowest rank; infinite where none
        has moved any."""
        return {
            src: min((pace.gbps for pace in paces.values()), default=float("inf"))
            for src, paces in self._paces.items()
        }

    def totals(self) -> dict[Ends, Moved]:
        """Pages of all ranks together by route, and the seconds of all of them."""
        total: dict[Ends, Moved] = {}
        for moved in self._moved.values():
            for ends, one in moved.items():
                more = total.get(ends, Moved(0, 0.0))
                total[ends] = Moved(more.pages + one.pages, more.busy_s + one.busy_s)
        return total
