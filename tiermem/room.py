"""Room on the GPU for a request: what can be had at once, what to start, and what to wait for.

A request that finds no room says which plans it awaits and which fence; both end. When neither
could help, the answer is TierFull, with numbers.
"""

from __future__ import annotations

import numpy as np

from tiermem.books import pages_of
from tiermem.compaction import Compaction
from tiermem.errors import TierFailed, TierFull
from tiermem.plan import Copy, Drop, Hide, Request
from tiermem.table import IS_HIDING, IS_RETIRED, Rows, span
from tiermem.tier import AT_GPU, AT_HOST, GPU, HOST, NVME

_NO_ROWS = np.empty(0, np.int32)


class Room(Compaction):
    """Finds frames for requests; evicts through `Descent`, oldest first by the tier's policy."""

    def _have_room(self, n: int, request: Request, now: int, spare_us: Rows = _NO_ROWS) -> bool:
        """True if n frames can be had now. Else the request says what to do and await.

        spare_us: pages of this request, which must not be evicted for it.
        """
        if GPU in self.failed_tiers:
            raise TierFailed("gpu: the tier has failed; reopen the space")
        if self._are_available(n, spare_us):
            self._found_room()
            return True
        have = self._available(spare_us)
        self.table.pins[spare_us] += 1
        try:
            if n > self._allowed(GPU) - self._pinned_frames():
                self._refuse(n)
            short = n - have - self._coming()
            if short > 0:
                request.plans += self._push_down(GPU, short, now, awaited=True)
            if self._available(spare_us) >= n:
                return not request.plans
            request.fence = self.table.fences.point(self.table.fence[self._fenced()])
            if not (self._open or request.fence.ticks or self.growing):
                # All that could make room below is wanted here: the last tier is this one.
                short = n - self._available(spare_us)
                request.plans += self._drop_ranked(GPU, short, now)
        finally:
            self.table.pins[spare_us] -= 1
        request.pending |= set(self._open)
        for plan_id in self._open:
            self._watch.setdefault(plan_id, []).append(request)
        if not (request.pending or request.fence.ticks or self.growing):
            self._refuse(n)
        return False

    def _available(self, spare_us: Rows) -> int:
        """Frames that can be had now within the limit, without those that these pages return to."""
        pool = self.pools[GPU]
        return pool.free + self._stealable(spare_us) - pool.capacity + self._allowed(GPU)

    def _are_available(self, n: int, spare_us: Rows) -> bool:
        """`_available` >= n; where work is queued, no more retired frames are looked at than it
        takes (4,096 of them take 25 us, 64 take 6; 2-core)."""
        pool = self.pools[GPU]
        stolen = n + pool.capacity - self._allowed(GPU) - pool.free
        if not pool.kept:
            return stolen <= 0
        stolen += self._own(spare_us)
        if self.table.fences.all_passed or stolen <= 0:
            return stolen <= pool.kept
        return len(self._idle_kept(GPU, stolen)) >= stolen

    def _own(self, rows: Rows) -> int:
        """How many of these pages have a retired frame."""
        return int(np.count_nonzero(self.table.shown[span(rows)] == IS_RETIRED)) if len(rows) else 0

    def _refuse(self, n: int) -> None:
        pool = self.pools[GPU]
        below = ", ".join(
            f"{p.name.lower()} {self.pools[p].used} of {self.pools[p].capacity} used"
            + (" (failed)" if p in self.failed_tiers else "")
            for p in (HOST, NVME)
        )
        raise TierFull(
            f"gpu: need {n} pages, {pool.free} free, {pool.kept} retired, "
            f"{self._pinned_frames()} of {self._allowed(GPU)} pinned; {below}; "
            "use fewer pages at once, or raise gpu.budget"
        )

    def _pinned_frames(self) -> int:
        """Frames whose pages are pinned, awaited, or wanted by the request at hand."""
        owners = self.pools[GPU].owner
        owners = owners[owners >= 0]
        return int(((self.table.pins[owners] > 0) | (self.table.waiters[owners] > 0)).sum())

    def _frameless(self, rows: Rows) -> int:
        """How many of these pages have no retired frame of their own to return to."""
        return len(rows) - self._own(rows)

    def _stealable(self, spare_us: Rows = _NO_ROWS) -> int:
        """Retired frames whose last work has passed and that are not of these pages."""
        pool = self.pools[GPU]
        if not pool.kept:
            return 0
        own = self._own(spare_us)
        if self.table.fences.all_passed:
            return pool.kept - own
        return len(self._idle_kept(GPU, None)) - own

    def _fenced(self) -> Rows:
        """Unpinned pages with a frame: some may wait for a fence before they can give it up."""
        owners = self.pools[GPU].owner
        if self.crossover is not None:  # host slots that are read in place are held by it, too
            owners = np.concatenate([owners, self.pools[HOST].owner])
        owners = owners[owners >= 0]
        return np.concatenate([self._doomed, owners[self.table.pins[owners] == 0]])

    def _coming(self) -> int:
        """Frames that open plans will free."""
        if self.is_idle():
            return 0
        coming = 0
        for opened in self._open.values():
            for step in opened.plan.steps:
                if isinstance(step, Copy) and step.src == AT_GPU:
                    coming += int((self.table.move[step.pages] == opened.plan.id).sum())
                elif isinstance(step, Hide):
                    coming += len(step.frees)
                elif isinstance(step, Drop):
                    pages = self.table.pages(step.units)
                    coming += int((self.table.at[pages] == AT_GPU).sum())
        return coming + int((self.table.at[self._doomed] == AT_GPU).sum())

    def _rescue(self, rows: Rows) -> None:
        """Pages on their way down that are wanted again: let go of the move, for nothing."""
        table = self.table
        leaving = rows[(table.at[rows] == AT_GPU) & (table.to[rows] != 0)]
        if len(leaving):
            self.counts["rescued"] += len(leaving)
            self._cancel(leaving)

    def _blocked(self, rows: Rows, request: Request) -> bool:
        """Pages being hidden, or on their way from NVMe to the host: wait for those plans."""
        table = self.table
        stuck = rows[(table.shown[rows] == IS_HIDING) | (table.to[rows] == AT_HOST)]
        return bool(len(stuck)) and self._await(stuck, request)

    def _await(self, rows: Rows, request: Request) -> bool:
        for plan_id, opened in self._open.items():
            if any(np.isin(rows, pages_of(step)).any() for step in opened.plan.steps):
                request.pending.add(plan_id)
                self._watch.setdefault(plan_id, []).append(request)
        assert request.pending, "a busy page that no open plan touches"
        return True
