"""Which pages move, in what order, through which slots. Pure: no I/O, no threads, no clock.

Verbs change the table and return plans; somebody carries the plans out and hands the outcomes to
`settle`, which changes the table again. All verbs are called under one lock, which is never held
while a plan is carried out. `now` is logical time in milliseconds. The same verbs with the same
arguments give the same plans, so one planner can direct the executors of many ranks.

Every wait that a caller is asked to make is for an open plan or for a fence, and both end. So
there is no deadlock: when neither could help, the answer is TierFull.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from tiermem.ascent import Ascent
from tiermem.books import Marks, copies, either
from tiermem.errors import NotOurs, PageInUse, PageLost
from tiermem.plan import Access, Copy, Drop, Hide, Outcome, Plan, Request, Show, ShowInPlace, Zero
from tiermem.policies.base import Keys, RequestFacts
from tiermem.table import (
    DIRTY,
    DOOMED,
    IS_HIDING,
    IS_IN_PLACE,
    IS_RETIRED,
    LABELLED,
    ORDERED,
    STALE,
    Rows,
    span,
)
from tiermem.tier import (
    AT_GPU,
    AT_HOST,
    AT_LOST,
    AT_NONE,
    AT_NVME,
    GPU,
    HOST,
    NVME,
    Fence,
    Mask,
    Place,
)

__all__ = ["Access", "Marks", "Planner", "Request"]

_NO_ROWS = np.empty(0, np.int32)
SOILED = np.iinfo(np.uint16).max
"""Tenant of a frame that could not be zeroed: nobody's, so that it is zeroed before any use."""
_DOOMED = int(DOOMED)
_BARRED = DOOMED | STALE
_BARRED_WRITE = _BARRED | LABELLED


class Planner(Ascent):
    """All verbs. See `table.py` for the states and arcs, `books.py` for the state."""

    # ---------------------------------------------------------------- verbs of the owner

    def allocate(
        self,
        rows: Rows,
        now: int,
        *,
        parents: Rows | None = None,
        depths: Rows | None = None,
        keys: Keys | None = None,
    ) -> Request:
        """Put frames behind NONE pages (whole units, deepest first). Their bytes are undefined.

        parents, depths, keys: one a unit. Raises TierFull when no wait could help.
        """
        table = self.table
        request = Request(rows, pins=False)
        if len(rows) == 1 and self._allocate_one(rows, request):
            table.parent[rows] = -1 if parents is None else parents
            table.depth[rows] = 0 if depths is None else depths
            self.rankings[GPU].inserted(rows, keys, now)
            return request
        where = span(rows)
        if np.count_nonzero(table.at[where]):
            raise NotOurs(f"{len(rows)} pages to allocate, not all of them vacant")
        shown = table.shown[where] == IS_RETIRED
        ready = np.count_nonzero(shown) == len(rows)
        if not ready:
            if self._blocked(rows, request):
                return request
            if not self._have_room(self._frameless(rows), request, now, spare_us=rows):
                return request
        heads = table.heads(rows)
        table.parent[heads] = -1 if parents is None else parents
        table.depth[heads] = 0 if depths is None else depths
        self._stamp_units(heads)
        request.taken = True
        table.gen[where] += 1
        back = rows if ready else rows[shown]
        here = where if ready else back
        self._reuse_frames(back)
        table.at[here] = AT_GPU
        table.flags[here] = DIRTY
        self.rankings[GPU].inserted(heads, keys, now)
        if self.onlooker is not None:
            self.onlooker.named(heads, keys)
        if not ready:
            blank = rows[~shown]
            table.at[blank] = AT_LOST
            self._blank(blank, request)
        return request

    def fault(
        self,
        rows: Rows,
        access: Access,
        now: int,
        *,
        order: bool = False,
        pin: bool = True,
        touches: int | None = None,
    ) -> Request:
        """Make pages (whole units, deepest first) resident and pin them: all or nothing.

        order: loads from the host may be pinned at once, because the caller makes its stream wait
        for them. touches: how often they will be read, or 0: pages in the host tier may be shown
        there instead (`InPlace`). Raises NotOurs, PageLost, PageInUse (a write of pages that
        others read in place), TierFull; then nothing is pinned.
        """
        table = self.table
        if access != "fresh" and (touches is None or self.crossover is None):
            request = Request(rows, pins=pin)
            if len(rows) == 1:
                taken = self._load_one(rows, request, order, now)
            else:
                taken = len(rows) > 1 and self._load_bare(rows, request, order)
            if taken:
                return request
        if len(rows) > 1 and self._rest_on_gpu(rows):
            request = Request(rows, pins=pin)
            request.taken = True
            if self.gauge is not None and access == "fresh":
                self.gauge.dropped(rows)
            elif self.gauge is not None:
                self.gauge.needed(rows, _NO_ROWS)
            if pin:
                table.pins[span(rows)] += 1
            return request
        at, to = table.at[rows], table.to[rows]
        if not at.all() or (table.flags[rows] & DOOMED).any():
            raise NotOurs(f"{int((at == AT_NONE).sum())} of {len(rows)} pages not allocated")
        if access != "fresh" and (at == AT_LOST).any():
            self._refuse_lost(rows)
        request = Request(rows, pins=pin)
        arriving, absent, moving = _NO_ROWS, _NO_ROWS, bool(to.any())
        if moving:
            self._rescue(rows)
            arriving = rows[to == AT_GPU]
        below = (at != AT_GPU) & (to != AT_GPU)
        in_place = self.crossover is not None and access == "read"
        if in_place:
            readable = self._readable(rows, touches)
            arriving = rows[(to == AT_GPU) | (readable & (to != 0))] if moving else arriving
            below &= ~readable
        away = rows if below.all() else rows[below]
        if len(away):
            if moving:
                self._cancel(away[(table.at[away] == AT_HOST) & (table.to[away] == AT_NVME)])
            if self._blocked(away, request):
                return request
            here, up = self._split(away, rows, touches) if in_place else (_NO_ROWS, away)
            n = self._frameless(up)
            if len(up) and not self._have_room(n, request, now, spare_us=rows):
                return request
            if self.crossover is not None and self._unplace(up, request):
                return request
            if len(here):
                self._follow(self._show_in_place(here), request)
            if self.gauge is not None:
                absent = up[table.shown[up] != IS_RETIRED]  # the others come back for nothing
            if len(up):
                self._bring(up, access, request, now, order)
            self.counts["faulted"] += len(away)
        if len(arriving):
            self._join(arriving, request)
        if in_place:
            self._count_reads(rows, touches)
        request.taken = True
        if self.gauge is not None and access == "fresh":
            self.gauge.dropped(rows)  # bytes that were loaded ahead are overwritten
        elif self.gauge is not None:
            self.gauge.needed(rows, absent)
        if not pin:
            return request
        if len(away) or len(arriving):
            self._pin(rows)
        else:
            table.pins[rows] += 1
        return request

    def _rest_on_gpu(self, rows: Rows) -> bool:
        """Whether there is nothing to do for a use of these pages but to pin them."""
        table, where = self.table, span(rows)
        if np.count_nonzero(table.at[where] != AT_GPU) or np.count_nonzero(table.to[where]):
            return False
        return not np.count_nonzero(table.flags[where] & DOOMED)

    def _refuse_lost(self, rows: Rows) -> None:
        """Where plans are carried out in order, a page that is being shown blank is not lost: the
        step that it was shown for has written it by then."""
        table = self.table
        lost = rows[table.at[rows] == AT_LOST]
        if self.in_order:
            lost = lost[table.to[lost] != AT_GPU]
        if len(lost):
            raise PageLost(
                f"{len(lost)} of {len(rows)} pages lost (first: row {int(lost[0])}); "
                'compute them again with access="fresh"'
            )

    def rename(self, units: Rows, parents: Rows, depths: Rows, now: int) -> None:
        """These units get other content, at other places of their chains (`fault` fresh follows).

        parents, depths: one a unit. The policy of the GPU hears anew of those that it knows: they
        are there, or are being shown blank.
        """
        table = self.table
        table.parent[units] = parents
        table.depth[units] = depths
        at = table.at[units]
        here = units[(at == AT_GPU) | ((at == AT_LOST) & (table.to[units] == AT_GPU))]
        self._leave_tier(GPU, here, now)
        self._entered(GPU, here, now)
        if self.onlooker is not None:
            self.onlooker.named(units, None)

    def pin_one(self, row: int, write: bool, now: int) -> bool:
        """The fast path of `fault` and `touch` for one page that rests on the GPU."""
        table = self.table
        barred = _BARRED_WRITE if write else _BARRED
        if table.at[row] != AT_GPU or table.to[row] or table.flags[row] & barred:
            return False
        if write and (table.slot(HOST)[row] >= 0 or table.slot(NVME)[row] >= 0):
            return False
        if write:
            table.gen[row] += np.uint32(1)
            table.flags[row] |= DIRTY
        table.pins[row] += 1
        table.stamp[row] = self._stamp
        self._stamp += 1
        one = np.array([row], np.int32)
        self.rankings[GPU].accessed(one, now)
        if self.admission is not None:
            self.admission.used(one, table.depth[one], now)
            self._note_unsaved(one)
        if self.gauge is not None:
            self.gauge.needed(one, _NO_ROWS)
        return True

    def touch(self, rows: Rows, now: int) -> None:
        """Tell the GPU's policy that these resident pages were used, deepest first."""
        if len(rows) == 1:
            self._touch_one(rows, now)
        else:
            self._touch(rows, now)

    def _touch(self, rows: Rows, now: int) -> None:
        heads = self.table.heads(rows)
        self._stamp_units(heads)
        here = heads[self.table.at[heads] == AT_GPU]
        if len(here):
            self.rankings[GPU].accessed(here, now)
        if self.crossover is not None:
            there = heads[self.table.shown[heads] == IS_IN_PLACE]
            if len(there):
                self.rankings[HOST].accessed(there, now)
        if self.admission is not None:
            self.admission.used(heads, self.table.depth[heads], now)
            self._note_unsaved(heads)

    def run_ahead(self, request: Request, now: int) -> None:
        """Nobody but a stream waits for these loads: they count as used once they have landed.

        Then all pages of the request are touched, so that order by last use is order by depth.
        """
        request.ahead = True
        self._touch_landed(request, now)

    def _touch_landed(self, request: Request, now: int) -> None:
        if request.ahead and not request.pending:
            table, rows = self.table, request.rows
            if len(rows) == 1:
                row = rows.item()
                if table.at.item(row) == AT_GPU and not table.flags.item(row) & _DOOMED:
                    self._touch_one(rows, now)
                return
            here = (table.at[rows] == AT_GPU) & (table.flags[rows] & DOOMED == 0)
            if here.any():
                self.touch(rows[here], now)

    def wrote(self, rows: Rows) -> None:
        """The pinned pages are about to be written: every copy below is now old."""
        table = self.table
        table.gen[rows] += 1
        table.flags[rows] = (table.flags[rows] & ~LABELLED) | DIRTY
        for place in (HOST, NVME):
            slot = table.slot(place)
            copies = rows[slot[rows] >= 0]
            if not len(copies):
                continue
            busy = table.busy[copies] > 0
            table.flags[copies[busy]] |= STALE
            self._release_slots(copies[~busy], place)

    def unpin(self, rows: Rows, tick: tuple[int, int] | None) -> None:
        """Give pins back. tick: the point on a stream after the last work that may touch them.

        Of a page without a pin yet, its only waiter gives up: the load goes on for nobody.
        """
        if len(rows) == 1:
            self._unpin_one(rows, tick)
        else:
            self._unpin(rows, tick)

    def _unpin(self, rows: Rows, tick: tuple[int, int] | None) -> None:
        table, where = self.table, span(rows)
        pinned = table.pins[where] > 0
        if np.count_nonzero(pinned) == len(rows):
            table.pins[where] -= 1
        else:
            table.waiters[rows[~pinned]] -= 1
            table.pins[rows[pinned]] -= 1
        if tick is not None:
            if table.fences.crowded:
                table.fences.sweep(table.fence)
            table.fence[where] = table.fences.join(table.fence[where], *tick)

    def abandon(self, request: Request) -> None:
        """Give up a taken request, pinned or still waiting; what failed was never pinned."""
        if not (request.taken and request.pins):
            return
        table = self.table
        rows = request.rows
        if request.failed:
            rows = rows[~np.isin(rows, np.array(request.failed, np.int32))]
        waiting = (table.to[rows] != 0) & ((table.flags[rows] & ORDERED) == 0)
        table.waiters[rows[waiting]] -= 1
        table.pins[rows[~waiting]] -= 1
        request.taken = False

    def free(self, rows: Rows, now: int) -> list[Plan]:
        """Forget pages (whole units). They become vacant once idle. Raises PageInUse, NotOurs."""
        table = self.table
        if len(rows) == 1 and (plans := self._free_one(rows, now)) is not None:
            return plans
        barred = np.count_nonzero(table.flags[span(rows)] & DOOMED)
        if not (barred or self.eager) and self._rests_idle(rows):
            self._leave_tier(GPU, rows, now)
            self._vacate(rows)
            return []
        if barred or not table.at[rows].all():
            raise NotOurs(f"{len(rows)} pages to free, not all of them allocated")
        users = table.pins[rows] + table.waiters[rows]
        if users.any():
            used = users > 0
            raise PageInUse(
                f"{int(used.sum())} of {len(rows)} pages are pinned or awaited "
                f"(first: row {int(rows[used][0])}); leave their use() first"
            )
        self._doom(rows, now)
        return self._reap()

    def shelve(self, rows: Rows, now: int) -> list[Plan]:
        """Free pages; labelled content that has a copy on the drive stays there, in the attic."""
        table = self.table
        if not table.at[rows].all() or (table.flags[rows] & DOOMED).any():
            return self.free(rows, now)  # which says what is wrong, before anything is changed
        if not (table.pins[rows] + table.waiters[rows]).any():
            self._shelve(rows, now)
        return self.free(rows, now)

    def finished(self, rows: Rows, facts: RequestFacts, now: int) -> None:
        """Tell the policies what is known of a request that ended (pages deepest first)."""
        heads = self.table.heads(rows)
        at = self.table.at[heads]
        for place, ranking in self.rankings.items():
            here = at == int(place)
            if n := np.count_nonzero(here):
                ranking.finished(heads if n == len(heads) else heads[here], facts, now)
        if self.onlooker is not None:
            self.onlooker.finished(heads, facts, now)

    def prefetch(self, rows: Rows, now: int) -> list[Plan]:
        """Load pages that rest below, as far as room is free without moving anything else.

        Without room on the GPU, units on NVMe are staged in the host tier, but for those of which
        a frame still shows something: they come back for less, and at once.
        """
        table = self.table
        rest = (table.to[rows] == 0) & (table.busy[rows] == 0) & (table.flags[rows] & DOOMED == 0)
        rest &= (table.at[rows] == AT_HOST) | (table.at[rows] == AT_NVME)
        rows = rows[rest & (table.shown[rows] != IS_HIDING) & (table.shown[rows] != IS_IN_PLACE)]
        soon, later = self._cut(rows, self.room_ahead())
        request = Request(soon, pins=False)
        if len(soon):
            self.counts["prefetched"] += len(soon)
            self._bring(soon, "read", request, now, order=False)
            if self.gauge is not None:
                self.gauge.loaded(soon[table.to[soon] == AT_GPU])
        shown = table.unit[later[table.shown[later] == IS_RETIRED]]
        deep = later[(table.at[later] == AT_NVME) & ~np.isin(table.unit[later], shown)]
        return request.plans + self._stage(deep, now)

    def room_ahead(self) -> int:
        """Frames that a prefetch could have now without moving anything."""
        pool = self.pools[GPU]
        below = int(self._mark(GPU, "high")) - pool.used
        return max(0, min(pool.free + self._stealable(), below))

    def make_way(self, n: int, now: int) -> list[Plan]:
        """Start up to n pages of the GPU on their way down for a prefetch; to its low mark only."""
        pool, table = self.pools[GPU], self.table
        n = min(n, pool.used - int(self._mark(GPU, "low")), self.batch) - self._coming()
        if n <= 0:
            return []
        owners = pool.owner[pool.owner >= 0]
        rest = owners[(table.at[owners] == AT_GPU) & (table.to[owners] == 0)]
        plans = self._push_down(GPU, n, now)
        if self.gauge is not None:
            self.gauge.pushed_out(rest[(table.at[rest] != AT_GPU) | (table.to[rest] != 0)])
        return plans

    def demote(self, rows: Rows, now: int) -> list[Plan]:
        """Start moving idle pages of the GPU one tier down: the owner says they are cold."""
        heads = self.table.heads(rows)
        rows = self.table.pages(heads[self.table.movable(heads, GPU)])
        return self._leave_gpu(rows, now, may_drop=False)

    def forget(self, rows: Rows, now: int) -> list[Plan]:
        """Everything of a region that is being closed: free its pages, hide what it shows.

        Labelled content on the drive stays there if there is an attic.
        """
        table = self.table
        alive = rows[(table.at[rows] != AT_NONE) & ((table.flags[rows] & DOOMED) == 0)]
        self._shelve(alive, now)
        plans = self.free(alive, now) if len(alive) else []
        shown = rows[(table.shown[rows] == IS_RETIRED) & (table.at[rows] == AT_NONE)]
        if len(shown):
            frames = table.slot(GPU)[shown].copy()
            self.pools[GPU].reuse(frames)
            plans.append(self._begin([self._hide_unowned(shown, frames)]))
        return plans

    def room(self) -> int:
        """Pages that could get frames within the limit: free, retired, or movable ones."""
        pool = self.pools[GPU]
        owners = pool.owner[pool.owner >= 0]
        over = pool.capacity - self._allowed(GPU)
        return max(0, pool.free + pool.kept + int(self.table.movable(owners, GPU).sum()) - over)

    def chain(self, rows: Rows) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
        """For whole units: uint8[n] where a load would begin, int64[n] the pages that it copies.

        GPU also where the address shows the bytes, in place or in their old frame; no pages where
        they are on their way up.
        """
        table, places = self.table, self.sources(rows)
        pages = np.array([e.unit_pages for e in table.extents], np.int64)[table.region[rows]]
        pages[table.to[rows] == AT_GPU] = 0
        return places, pages

    def sources(self, rows: Rows) -> npt.NDArray[np.uint8]:
        """uint8[n]: where a load of these whole units would begin, as `chain` says."""
        table = self.table
        places = table.at[rows]
        shown = table.shown[rows]
        below = (places == AT_HOST) | (places == AT_NVME)
        places[below & ((shown == IS_RETIRED) | (shown == IS_IN_PLACE))] = AT_GPU
        places[(table.flags[rows] & DOOMED) != 0] = AT_NONE
        return places

    def queued(self, src: Place) -> int:
        """Pages that open plans read from a tier on their way up."""
        return sum(
            len(step.pages)
            for opened in self._open.values()
            for step in opened.plan.steps
            if isinstance(step, Copy) and step.src == src > step.dst
        )

    def allowed(self) -> int:
        """Frames that may be used: those that there are, up to the limit."""
        return self._allowed(GPU)

    def ready(self) -> int:
        """Pages that could get frames now, without waiting for anything."""
        return self._available(_NO_ROWS)

    def coming(self) -> int:
        """Frames that open plans, and pages waiting to become vacant, will free."""
        return self._coming()

    def make_room(self, n: int, now: int) -> list[Plan]:
        """Let `ready` come to n pages: clean ones step down at once, the others are copied down."""
        short = n - self.ready() - self._coming()
        return self._push_down(GPU, short, now, awaited=True) if short > 0 else []

    def is_doomed(self, rows: Rows) -> Mask:
        return np.asarray((self.table.flags[rows] & DOOMED) != 0)

    # ---------------------------------------------------------------- verbs of the mover

    def is_pressed(self) -> bool:
        """True if a tier is above its high mark. Needs no lock: it is a hint."""
        for place, pool in self.pools.items():  # as any() of a generator it takes 1.5 us, not 0.7
            if pool.used > self.marks[place].high * pool.capacity:
                return True
        gpu = self.pools[GPU]
        return gpu.used > self._below_headroom(gpu.capacity)

    def relieve(self, now: int) -> list[Plan]:
        """Plans that bring each tier below its marks and its limit, the lowest tier first.

        Not a lower tier that grows by itself: its marks would be those of what there is so far.
        """
        plans = self._reap()
        for place in (NVME, HOST, GPU):
            pool = self.pools[place]
            grows = place in self.growing and place != GPU
            if grows and pool.used <= self._allowed(place):  # soon nothing has to leave
                continue
            if not pool.capacity or pool.used <= (high := self._target(place, "high")):
                continue
            excess = pool.used - (self._coming() if place == GPU else self._yielding(place))
            if excess > high:
                n = excess - int(self._target(place, "low"))
                n = min(n, self.batch - self._leaving(place))
                plans += self._push_down(place, n, now)
        return plans + self._give_back()

    def settle(self, outcome: Outcome, now: int) -> list[Plan]:
        """Take a plan's outcome into the table. Returns plans that follow from it.

        Whoever waits for the plan is told and pinned in this same step (invariant 10).
        """
        opened = self._open.pop(outcome.plan)
        failed_rows: set[int] = set()
        after: list[Plan] = []
        unshown = self._failed_shows(opened.plan, outcome)
        spoiled, ordered = bool(len(unshown)), _NO_ROWS
        for step, gens, bad in zip(opened.plan.steps, opened.gens, outcome.failed, strict=True):
            match step:
                case Drop():
                    self._settle_drop(step)
                case Hide():
                    if bad is not None or len(step.pages) != 1 or not self._land_hidden_one(step):
                        self._settle_hide(step, bad)
                case Copy(dst=Place.GPU):
                    bad = self._whole_units(step.pages, bad)
                    if len(unshown):
                        bad = either(bad, np.isin(step.pages, unshown))
                    if bad is not None:
                        spoiled = True
                        ordered = step.pages[bad & (self.table.flags[step.pages] & ORDERED != 0)]
                    after += self._land_up(step, opened.plan.id, bad, unshown, failed_rows, now)
                    self._note_failures(step, bad, outcome.error)
                case Copy(src=Place.HOST, dst=Place.HOST):
                    bad = self._whole_units(step.pages, bad)
                    self._land_within(step, gens, bad)
                case Copy():
                    bad = self._whole_units(step.pages, bad)
                    after += self._land_down(step, opened.plan.id, gens, bad, now)
                    self._note_failures(step, bad, outcome.error)
                case Zero() if bad is not None:
                    self.pools[GPU].tenant[step.frames[bad]] = SOILED
                case ShowInPlace():
                    bad = self._whole_units(step.pages, bad)
                    self._land_in_place(step, opened.plan.id, bad, failed_rows)
                case Show() if not copies(opened.plan):
                    after += self._settle_blank(step, opened.plan.id, unshown, failed_rows, now)
                case _:
                    pass
        for request in self._watch.pop(outcome.plan, ()):
            request.pending.discard(outcome.plan)
            if spoiled and request.ahead:
                self.failed_tiers.add(GPU)  # a stream has gone on without them, freed since or not
            if failed_rows:
                request.failed += sorted(failed_rows.intersection(request.rows.tolist()))
                if request.taken and request.pins and not request.ahead:
                    self.table.pins[np.intersect1d(ordered, request.rows)] -= 1
            self._touch_landed(request, now)
        return after + self._reap()

    def settle_idle(self) -> list[Plan]:
        """Make doomed pages vacant that have become idle since a fence passed."""
        return self._reap()

    def doomed_fence(self) -> Fence:
        """The point that pages waiting to become vacant are behind."""
        return self.table.fences.point(self.table.fence[self._doomed])

    def order(self, request: Request) -> bool:
        """True if a stream may wait for everything that this request awaits, which it then must.

        A load from the host that was begun ahead, and that nobody else awaits, is ordered from now
        on: whoever waits for it is pinned at once.
        """
        table, rows = self.table, request.rows
        if len(rows) == 1:
            flags = table.flags.item(rows.item())
            if flags & ORDERED or not table.to.item(rows.item()):
                return True
        late = rows[(table.to[rows] != 0) & ((table.flags[rows] & ORDERED) == 0)]
        loads = (table.to[late] == AT_GPU) & (table.at[late] == AT_HOST)
        if not (loads & (table.waiters[late] == int(request.pins))).all():
            return False
        table.flags[late] |= ORDERED
        if request.pins:
            table.waiters[late] -= 1
            table.pins[late] += 1
        return True
