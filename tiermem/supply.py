"""The memory behind a space's slots: tiers that are still growing, and the limit on GPU frames.

Above the limit the planner empties frames and surrenders them; parked, they have no memory behind
them until the limit rises again.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

import numpy as np

from tiermem.assemble import Parts
from tiermem.errors import TierFull
from tiermem.leased import LeasedPlanner
from tiermem.leases import Leases
from tiermem.pager import Pager
from tiermem.sharing import Sharing
from tiermem.tier import GPU, Place, Slots

log = logging.getLogger(__name__)

GROUP = 64
"""Frames that get or lose their memory in one go: somebody waits for the first of them."""


class Supply:
    """For the mover's thread; `limit_to` and `counted_on` also for others."""

    def __init__(
        self,
        parts: Parts,
        configured: Mapping[Place, int],
        pager: Pager,
        leases: Leases,
    ) -> None:
        """configured: slots of each tier once it has grown. The pools hold what is ready now."""
        self.limit: int | None = None  # frames, where no lease says how many
        self.counted_on = 0
        self._device = parts.device
        self._tiers = parts.tiers
        self._configured = configured
        self._pager = pager
        self._planner = pager.planner
        self._sharing, self._pooling = leases.sharing, leases.pooling
        self._ready = {place: pool.capacity for place, pool in self._planner.pools.items()}
        self._parked: Slots = np.empty(0, np.int32)

    def grow(self) -> bool:
        """Take over slots that have become ready; True while more are to come."""
        growing: set[Place] = set()
        for place, tier in self._tiers.items():
            if place == Place.HOST and self._pooling is not None:
                growing |= {place} if self._pooling.growing else set()
                continue
            still = tier.growing  # asked first: what is ready by then counts
            ready = min(tier.ready, self._configured[place])
            if ready > self._ready[place]:
                fresh = np.arange(self._ready[place], ready, dtype=np.int32)
                with self._pager.lock:
                    self._planner.grow(place, fresh)
                self._ready[place] = ready
            if still and ready < self._configured[place]:
                growing.add(place)
        with self._pager.lock:
            self._planner.growing = growing
        return bool(growing)

    def limit_to(self, frames: int) -> None:
        """From now on the GPU's pages are to be so many at most."""
        self.limit = frames
        self._set_limit(frames)

    def keep_limit(self) -> None:
        """The limit once more, since what is counted on may have changed."""
        if self.limit is not None:
            self._set_limit(self.limit)

    def follow_lease(self, sharing: Sharing, planner: LeasedPlanner) -> None:
        """The limit is what the ledger lets us hold; what others may have by then is parked."""
        if Place.GPU in planner.growing:
            return  # what it opens with is charged already, and is still being backed
        sharing.settle(self._backed())
        with self._pager.lock:
            demand = planner.demand()
        self._set_limit(sharing.limit(demand), used=demand.used)
        self.obey_limit()
        sharing.settle(self._backed())
        if sharing.is_report_due():
            with self._pager.lock:
                report = planner.report(self._device.page_bytes)
            sharing.report(report)

    def obey_limit(self) -> None:
        """Give back the memory of frames that are surrendered, or back those that may be had."""
        with self._pager.lock:
            freed = self._planner.surrender()
            short = self._planner.short_of_limit(GPU)
        for some in _groups(freed):
            self._device.park(some)
            self._parked = np.concatenate([self._parked, some])
            if self._sharing is not None:  # whoever waits for them hears at once
                self._sharing.settle(self._backed())
        if short > 0:
            self._back(short)

    def _back(self, short: int) -> None:
        fresh, self._parked = self._parked[:short], self._parked[short:]
        if len(fresh) < short:
            first = self._ready[GPU]
            self._ready[GPU] = first + short - len(fresh)
            new = np.arange(first, self._ready[GPU], dtype=np.int32)
            fresh = np.concatenate([fresh, new])
        for some in _groups(fresh):
            try:
                self._device.back(some)
            except TierFull:
                self._parked = np.concatenate([self._parked, fresh])
                log.warning("limit not reached: the device has no memory for %d pages", len(fresh))
                if self._sharing is not None:
                    self._sharing.no_memory()
                return
            fresh = fresh[len(some) :]
            with self._pager.lock:
                self._planner.grow(GPU, some)

    def _set_limit(self, frames: int, *, used: int | None = None) -> None:
        """Of the GPU's pages, but not below what is counted on and there.

        used: so many were when the limit was found. If more are by now it is not lowered, for
        those that came would leave at once; the next turn knows of them.
        """
        with self._pager.lock:
            pool = self._planner.pools[GPU]
            if used is not None and pool.used > used:
                frames = max(frames, self._planner.allowed())
            self._planner.limits[GPU] = max(frames, min(self.counted_on, pool.capacity))

    def _backed(self) -> int:
        """GPU frames with memory behind them: counted before they get it, until it is gone."""
        return self._ready[GPU] - len(self._parked)


def _groups(frames: Slots) -> list[Slots]:
    return [frames[i : i + GROUP] for i in range(0, len(frames), GROUP)]
