"""The way up: frames for pages that have none, loads into them, and what becomes of a load.

All of it for requests that have room already (`Room`). A page's frame is a free one, or the oldest
retired one, whose page stops showing it in the same plan.
"""

from __future__ import annotations

import numpy as np

from tiermem.plan import Access, Copy, Hide, Outcome, Plan, Request, Show, Step, Zero
from tiermem.room import Room
from tiermem.table import DIRTY, DOOMED, IS_FRAME, IS_RETIRED, ORDERED, STALE, Rows, span
from tiermem.tier import (
    AT_GPU,
    AT_HOST,
    AT_LOST,
    GPU,
    HOST,
    NVME,
    PASSED,
    Mask,
    Place,
    Slots,
)

_NO_ROWS = np.empty(0, np.int32)
_FEW = 2
_ARRIVED = {HOST: "host_gpu", NVME: "nvme_gpu"}


class Ascent(Room):
    """Brings pages to the GPU: from below, or blank ones with new content."""

    def _split(self, away: Rows, wanted: Rows, touches: int | None) -> tuple[Rows, Rows]:
        """(pages to be shown where they are, pages to be loaded) of a read."""
        room = self._available(wanted) >= self._frameless(away)
        placeable = self._placeable(away, touches, room)
        return away[placeable], away[~placeable]

    def _unplace(self, rows: Rows, request: Request) -> bool:
        """True if pages among these are read in place, and that has to end first."""
        hide = self._end_in_place(rows, request)
        if hide is not None:
            self._follow(hide, request)
        return bool(request.fence.ticks) or (hide is not None and not self.in_order)

    def _bring(self, away: Rows, access: Access, request: Request, now: int, order: bool) -> None:
        """Claim frames for pages below and load them; there is room (`_have_room`)."""
        table = self.table
        back = self._take_back(away)
        if len(back):
            self._moved(back, GPU, now)
        if access == "fresh":
            blank = away[table.at[away] != AT_GPU]
            busy = table.busy[blank] > 0  # a cancelled copy still reads or writes slots of theirs
            for place in (HOST, NVME):
                self._leave_tier(place, blank[table.at[blank] == int(place)], now)
                self._release_slots(blank[(table.slot(place)[blank] >= 0) & ~busy], place)
            table.at[blank] = AT_LOST
            table.flags[blank] = np.where(busy, STALE, np.uint8(0))
            if len(blank):
                self.rankings[GPU].inserted(table.heads(blank), None, now)
            self._blank(blank, request)
            return
        at = table.at[away]
        for place in (HOST, NVME):
            here = at == int(place)
            if here.any():
                rows = away if here.all() else away[here]
                self._load(rows, place, request, ordered=order and place == HOST)

    def _load_bare(self, rows: Rows, request: Request, order: bool) -> bool:
        """`fault` of several pages with which nothing is: they rest in one tier below, no address
        shows anything, and frames are there. False, with nothing done, where it is not so simple.

        Half the questions of the general case (53 to 29 us for 64 pages, 2-core), all of them
        between the end of one group's show and the start of the next's.
        """
        table, n, where = self.table, len(rows), span(rows)
        at = table.at[where]
        src = HOST if at[0] == AT_HOST else NVME
        if self.gauge is not None or np.count_nonzero(at == int(src)) < n:
            return False
        if np.count_nonzero(table.to[where]) or np.count_nonzero(table.shown[where]):
            return False
        if np.count_nonzero(table.flags[where] & DOOMED) or not self._are_available(n, _NO_ROWS):
            return False
        self._found_room()
        ordered = order and src == HOST
        self._load(rows, src, request, ordered)
        self.counts["faulted"] += n
        request.taken = True
        if request.pins:
            (table.pins if ordered else table.waiters)[where] += 1
        return True

    def _load(self, rows: Rows, src: Place, request: Request, ordered: bool) -> None:
        frames, steps = self._frames(rows)
        table = self.table
        copy = Copy(src, GPU, rows, table.slot(src)[rows], frames, PASSED)
        # A page or two are shown by the calling thread, so their copy goes first; a group takes a
        # thread of the window's longer than its copy, so that goes second.
        show = Show(rows, frames)
        steps += [copy, show] if len(rows) <= _FEW else [show, copy]
        plan = self._begin(steps)
        where = span(rows)
        table.to[where] = AT_GPU
        table.move[where] = plan.id
        table.reads[where] = 0
        if ordered:
            table.flags[where] |= ORDERED
        self._follow(plan, request)

    def _blank(self, rows: Rows, request: Request) -> None:
        """Show frames at pages without bytes (LOST): an allocation, or a page written anew.

        The policy was told at once, so that one allocation is one fact, in its order.
        """
        if not len(rows):
            return
        frames, steps = self._frames(rows)
        plan = self._begin([*steps, Show(rows, frames)])
        self.table.busy[rows] += 1
        self.table.to[rows] = AT_GPU
        self.table.move[rows] = plan.id
        self._follow(plan, request)

    def _frames(self, rows: Rows) -> tuple[Slots, list[Step]]:
        """A frame for each page, free ones first, then the oldest retired; what must be done."""
        table, pool = self.table, self.pools[GPU]
        frames = pool.take_free(min(len(rows), pool.free))
        steps: list[Step] = []
        if len(frames) < len(rows):
            hide, stolen = self._steal(len(rows) - len(frames))
            steps.append(hide)
            frames = np.concatenate([frames, stolen])
        pool.owner[frames] = rows
        tenants = table.tenant[span(rows)]
        foreign = frames[pool.tenant[frames] != tenants]
        if len(foreign):
            pool.tenant[frames] = tenants
            steps.append(Zero(foreign))
        return frames, steps

    def _steal(self, n: int) -> tuple[Hide, Slots]:
        """The n oldest retired frames, and what hides the pages that still show them."""
        owners, frames = self._take_kept(GPU, n)
        extra = frames[n:]
        self.pools[GPU].owner[extra] = -1
        self.counts["stolen"] += len(frames)
        return self._hide(owners, extra), frames[:n]

    def _take_back(self, rows: Rows) -> Rows:
        """Pages whose retired frame is still theirs return to it. Returns these pages."""
        table = self.table
        rows = rows[table.shown[rows] == IS_RETIRED]
        if not len(rows):
            return rows
        self._reuse_frames(rows)
        self.counts["taken_back"] += len(rows)
        at = table.at[rows]
        for place in (HOST, NVME):
            self.pools[place].keep(table.slot(place)[rows[at == int(place)]])
        return rows

    def _reuse_frames(self, rows: Rows) -> None:
        where = span(rows)
        self.pools[GPU].reuse(self.table.slot(GPU)[where])
        self.table.shown[where] = IS_FRAME

    def _join(self, rows: Rows, request: Request) -> None:
        """Wait for loads that others began."""
        self.counts["shared_faults"] += len(rows)
        for plan_id in np.unique(self.table.move[rows]).tolist():
            request.pending.add(plan_id)
            self._watch.setdefault(plan_id, []).append(request)

    def _pin(self, rows: Rows) -> None:
        table = self.table
        later = (table.to[rows] != 0) & ((table.flags[rows] & ORDERED) == 0)
        table.pins[rows[~later]] += 1
        table.waiters[rows[later]] += 1

    def _land_up(
        self, step: Copy, plan_id: int, bad: Mask | None, unshown: Rows, failed: set[int], now: int
    ) -> list[Plan]:
        """A load ended: pages that still want it are on the GPU, whoever waited has its pin."""
        table, rows = self.table, step.pages
        if len(rows) == 1 and bad is None and self._land_one(step, plan_id, now):
            self.counts[_ARRIVED[step.src]] += 1
            return []
        where = span(rows)
        table.busy[where] -= 1
        live = table.move[where] == plan_id
        good = live if bad is None else live & ~bad
        all_good = np.count_nonzero(good) == len(rows)
        alive = where if all_good else rows[live]
        landed = rows if all_good else rows[good]
        here = where if all_good else landed
        table.to[alive] = 0
        table.move[alive] = 0
        table.slot(GPU)[here] = step.dst_slots if all_good else step.dst_slots[good]
        table.shown[here] = IS_FRAME
        self.pools[step.src].keep(table.slot(step.src)[here])
        self._moved(landed, GPU, now)
        table.pins[here] += table.waiters[here]
        table.waiters[alive] = 0
        flags = table.flags[rows]
        if not all_good and ((flags & ORDERED != 0) & live & ~good).any():
            self.failed_tiers.add(GPU)  # a stream has gone on without its bytes
        table.flags[alive] &= ~ORDERED
        if (flags & STALE).any():
            self._release_stale(rows)
        self.counts[_ARRIVED[step.src]] += len(landed)
        if self.gauge is not None:
            self.gauge.arrived(landed)
        if all_good:
            return []
        if self.gauge is not None:
            self.gauge.dropped(rows[~good])
        unread = rows[live & ~good]
        failed.update(unread.tolist())
        after = self._read_failed(unread, step.src, now)
        rest, frames = rows[~good], step.dst_slots[~good]
        # Freed, and a stream that waited for this load has work on it: shown until that has ended.
        used = (table.flags[rest] & DOOMED != 0) & ~table.fences.is_passed(table.fence[rest])
        used &= ~np.isin(rest, unshown)
        table.slot(GPU)[rest[used]] = frames[used]
        table.shown[rest[used]] = IS_FRAME
        return after + self._unshow(rest[~used], frames[~used], unshown)

    def _settle_blank(
        self, step: Show, plan_id: int, unshown: Rows, failed: set[int], now: int
    ) -> list[Plan]:
        table, rows = self.table, step.pages
        if len(rows) == 1 and not len(unshown) and self._land_blank_one(step, plan_id):
            return []
        table.busy[rows] -= 1
        live = table.move[rows] == plan_id
        good = live & ~np.isin(rows, unshown)
        table.to[rows[live]] = 0
        table.move[rows[live]] = 0
        landed = rows[good]
        table.slot(GPU)[landed] = step.frames[good]
        table.shown[landed] = IS_FRAME
        table.at[landed] = AT_GPU
        table.flags[landed] |= DIRTY
        table.pins[landed] += table.waiters[landed]
        table.waiters[rows[live]] = 0
        self._release_stale(rows)
        if good.all():
            return []
        broken = rows[live & ~good]
        failed.update(broken.tolist())
        table.flags[broken] &= STALE
        self._leave_tier(GPU, broken, now)
        return self._unshow(rows[~good], step.frames[~good], unshown)

    def _failed_shows(self, plan: Plan, outcome: Outcome) -> Rows:
        for step, bad in zip(plan.steps, outcome.failed, strict=True):
            if isinstance(step, Show) and bad is not None:
                return step.pages[bad]  # a plan has one Show at most
        return _NO_ROWS
