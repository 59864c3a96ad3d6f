"""Which pages move, in what order, through which slots. Pure: no I/O, no threads, no clock.

Verbs change the table and return plans; somebody carries the plans out and hands the outcomes to
`settle`, which changes the table again. All verbs are called under one lock, which is never held
while a plan is carried out. `now` is logical time in milliseconds. The same verbs with the same
arguments give the same plans, so one planner can direct the executors of many ranks.

Every wait that a caller is asked to make is for an open plan or for a fence, and both end. So
there is no deadlock: when neither could help, the answer is TierFull.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt

from tiermem.books import Marks, copies, either, pages_of
from tiermem.compaction import Compaction
from tiermem.errors import NotOurs, PageInUse, PageLost, TierFailed, TierFull
from tiermem.plan import Copy, Drop, Hide, Outcome, Plan, Request, Show, ShowInPlace, Step, Zero
from tiermem.policies.base import Keys, RequestFacts
from tiermem.table import (
    DIRTY,
    DOOMED,
    IS_FRAME,
    IS_HIDING,
    IS_IN_PLACE,
    IS_RETIRED,
    LABELLED,
    ORDERED,
    STALE,
    Rows,
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
    PASSED,
    Fence,
    Mask,
    Place,
    Slots,
)

Access = Literal["read", "write", "fresh"]
__all__ = ["Access", "Marks", "Planner", "Request"]

_NO_ROWS = np.empty(0, np.int32)
SOILED = np.iinfo(np.uint16).max
"""Tenant of a frame that could not be zeroed: nobody's, so that it is zeroed before any use."""
_BARRED = DOOMED | STALE
_BARRED_WRITE = _BARRED | LABELLED
_FEW = 2
_ARRIVED = {HOST: "host_gpu", NVME: "nvme_gpu"}


class Planner(Compaction):
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
        if table.at[rows].any():
            raise NotOurs(f"{len(rows)} pages to allocate, not all of them vacant")
        shown = table.shown[rows] == IS_RETIRED
        ready = bool(shown.all())
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
        table.gen[rows] += 1
        back = rows if ready else rows[shown]
        self._reuse_frames(back)
        table.at[back] = AT_GPU
        table.flags[back] = DIRTY
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
        if len(rows) == 1 and access != "fresh" and (touches is None or self.crossover is None):
            request = Request(rows, pins=pin)
            if self._load_one(rows, request, order):
                return request
        at, to = table.at[rows], table.to[rows]
        if not at.all() or (table.flags[rows] & DOOMED).any():
            raise NotOurs(f"{int((at == AT_NONE).sum())} of {len(rows)} pages not allocated")
        if access != "fresh" and (at == AT_LOST).any():
            lost = rows[at == AT_LOST]
            raise PageLost(
                f"{len(lost)} of {len(rows)} pages lost (first: row {int(lost[0])}); "
                'compute them again with access="fresh"'
            )
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

    def rename(self, units: Rows, parents: Rows, depths: Rows, now: int) -> None:
        """These units get other content, at other places of their chains (`fault` fresh follows).

        parents, depths: one a unit. The policy of the GPU hears of those there anew.
        """
        table = self.table
        table.parent[units] = parents
        table.depth[units] = depths
        here = units[table.at[units] == AT_GPU]
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
        table = self.table
        pinned = table.pins[rows] > 0
        if not pinned.all():
            table.waiters[rows[~pinned]] -= 1
        table.pins[rows[pinned]] -= 1
        if tick is not None:
            if table.fences.crowded:
                table.fences.sweep(table.fence)
            table.fence[rows] = table.fences.join(table.fence[rows], *tick)

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
        barred = (table.flags[rows] & DOOMED).any()
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
        for place, ranking in self.rankings.items():
            here = heads[self.table.at[heads] == int(place)]
            if len(here):
                ranking.finished(here, facts, now)
        if self.onlooker is not None:
            self.onlooker.finished(heads, facts, now)

    def prefetch(self, rows: Rows, now: int) -> list[Plan]:
        """Load pages that rest below, as far as room is free without moving anything else.

        Without room on the GPU, pages on NVMe are staged in the host tier.
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
        return request.plans + self._stage(later[table.at[later] == AT_NVME], now)

    def room_ahead(self) -> int:
        """Frames that a prefetch could have now without moving anything."""
        pool = self.pools[GPU]
        below = int(self._mark(GPU, "high")) - pool.used
        return max(0, min(pool.free + self._stealable(), below))

    def make_way(self, n: int, now: int) -> list[Plan]:
        """Start up to n pages of the GPU on their way down for a prefetch; to its low mark only."""
        pool, table = self.pools[GPU], self.table
        n = min(n, pool.used - int(self._mark(GPU, "low")), self.batch) - self._leaving(GPU)
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
        table = self.table
        places = table.at[rows].copy()
        places[(table.flags[rows] & DOOMED) != 0] = AT_NONE
        below = (places == AT_HOST) | (places == AT_NVME)
        shown = (table.shown[rows] == IS_RETIRED) | (table.shown[rows] == IS_IN_PLACE)
        places[below & shown] = AT_GPU
        pages = np.array([e.unit_pages for e in table.extents], np.int64)[table.region[rows]]
        pages[table.to[rows] == AT_GPU] = 0
        return places, pages

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
        return self._push_down(GPU, short, now) if short > 0 else []

    def is_doomed(self, rows: Rows) -> Mask:
        return np.asarray((self.table.flags[rows] & DOOMED) != 0)

    # ---------------------------------------------------------------- verbs of the mover

    def is_pressed(self) -> bool:
        """True if a tier is above its high mark. Needs no lock: it is a hint."""
        return any(
            pool.used > self.marks[place].high * pool.capacity for place, pool in self.pools.items()
        )

    def relieve(self, now: int) -> list[Plan]:
        """Plans that bring each tier below its marks and its limit, the lowest tier first."""
        plans = self._reap()
        for place in (NVME, HOST, GPU):
            pool = self.pools[place]
            if not pool.capacity:
                continue
            excess = pool.used - self._leaving(place)
            if excess > self._mark(place, "high"):
                n = excess - int(self._mark(place, "low"))
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
            if failed_rows:
                request.failed += sorted(failed_rows.intersection(request.rows.tolist()))
            self._touch_landed(request, now)
        return after + self._reap()

    def settle_idle(self) -> list[Plan]:
        """Make doomed pages vacant that have become idle since a fence passed."""
        return self._reap()

    def doomed_fence(self) -> Fence:
        """The point that pages waiting to become vacant are behind."""
        return self.table.fences.point(self.table.fence[self._doomed])

    def all_ordered(self, request: Request) -> bool:
        """True if a stream may wait for everything that this request awaits."""
        rows = request.rows
        if len(rows) == 1:
            flags = self.table.flags.item(rows.item())
            return bool(flags & ORDERED) or not self.table.to.item(rows.item())
        rows = rows[self.table.to[rows] != 0]
        return bool(((self.table.flags[rows] & ORDERED) != 0).all())

    # ---------------------------------------------------------------- bringing pages up

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

    def _load(self, rows: Rows, src: Place, request: Request, ordered: bool) -> None:
        frames, steps = self._frames(rows)
        table = self.table
        copy = Copy(src, GPU, rows, table.slot(src)[rows].copy(), frames, PASSED)
        # A page or two are shown by the calling thread, so their copy goes first; a group takes a
        # thread of the window's longer than its copy, so that goes second.
        show = Show(rows, frames)
        steps += [copy, show] if len(rows) <= _FEW else [show, copy]
        plan = self._begin(steps)
        table.to[rows] = AT_GPU
        table.move[rows] = plan.id
        table.reads[rows] = 0
        if ordered:
            table.flags[rows] |= ORDERED
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
        foreign = frames[pool.tenant[frames] != table.tenant[rows]]
        pool.tenant[frames] = table.tenant[rows]
        if len(foreign):
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
        self.pools[GPU].reuse(self.table.slot(GPU)[rows])
        self.table.shown[rows] = IS_FRAME

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
        table.busy[rows] -= 1
        live = table.move[rows] == plan_id
        good = live if bad is None else live & ~bad
        all_good = bool(good.all())
        alive = rows if all_good else rows[live]
        landed = rows if all_good else rows[good]
        table.to[alive] = 0
        table.move[alive] = 0
        table.slot(GPU)[landed] = step.dst_slots if all_good else step.dst_slots[good]
        table.shown[landed] = IS_FRAME
        self.pools[step.src].keep(table.slot(step.src)[landed])
        self._moved(landed, GPU, now)
        table.pins[landed] += table.waiters[landed]
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

    # ---------------------------------------------------------------- room and waiting

    def _have_room(self, n: int, request: Request, now: int, spare_us: Rows = _NO_ROWS) -> bool:
        """True if n frames can be had now. Else the request says what to do and await.

        spare_us: pages of this request, which must not be evicted for it.
        """
        have = self._available(spare_us)
        if have >= n:
            return True
        if GPU in self.failed_tiers:
            raise TierFailed("gpu: the tier has failed; reopen the space")
        self.table.pins[spare_us] += 1
        try:
            if n > self._allowed(GPU) - self._pinned_frames():
                self._refuse(n)
            short = n - have - self._coming()
            if short > 0:
                request.plans += self._push_down(GPU, short, now)
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
        return int((self.table.shown[rows] != IS_RETIRED).sum())

    def _stealable(self, spare_us: Rows = _NO_ROWS) -> int:
        """Retired frames whose last work has passed and that are not of these pages."""
        pool = self.pools[GPU]
        if not pool.kept:
            return 0
        own = int((self.table.shown[spare_us] == IS_RETIRED).sum())
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
