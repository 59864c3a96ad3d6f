"""Which pages move, in what order, through which slots. Pure: no I/O, no threads, no clock.

Verbs change the table and return plans; somebody carries the plans out and hands the outcomes to
`settle`, which changes the table again. All verbs are called under one lock, which is never held
while a plan is carried out. `now` is logical time in milliseconds. The same verbs with the same
arguments give the same plans, so one planner can direct the executors of many ranks.

Every wait that a caller is asked to make is for an open plan or for a fence, and both end. So
there is no deadlock: when neither could help, the answer is TierFull.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from tiermem.errors import NotOurs, PageInUse, PageLost, TierFailed, TierFull
from tiermem.plan import Copy, Drop, Hide, Outcome, Plan, Show, Step, Zero
from tiermem.policies.base import Keys, RequestFacts
from tiermem.ranking import Ranking
from tiermem.table import DIRTY, DOOMED, ORDERED, STALE, PageTable, Rows, Shown
from tiermem.tier import PASSED, Fence, Mask, Place, SlotPool, Slots

Access = Literal["read", "write", "fresh"]

_NO_ROWS = np.empty(0, np.int32)
_NO_SLOTS = np.empty(0, np.int32)


@dataclass(frozen=True, slots=True)
class Marks:
    """Shares of a tier's capacity: above `high`, units leave until `low` is reached."""

    high: float = 0.95
    low: float = 0.90


@dataclass(eq=False, slots=True)
class Request:
    """What a fault or an allocation came to.

    taken    the pages are pinned, or will be when their plans settle; else: carry out `plans`,
             wait for any of `pending` or for `fence`, and ask again
    plans    to be carried out by the caller, at once
    pending  ids of open plans to wait for; shrinks as they settle
    failed   pages whose load failed; they are not pinned
    """

    rows: Rows
    taken: bool = False
    plans: list[Plan] = field(default_factory=list)
    pending: set[int] = field(default_factory=set)
    fence: Fence = PASSED
    failed: list[int] = field(default_factory=list)
    pins: bool = True


@dataclass(frozen=True, slots=True)
class _Open:
    """A plan that is being carried out."""

    plan: Plan
    gens: tuple[np.ndarray | None, ...]  # of the pages of each Copy, when it began


class Planner:
    """Owns the page table and the slot pools. See `table.py` for the states and arcs."""

    def __init__(
        self,
        table: PageTable,
        pools: Mapping[Place, SlotPool],
        rankings: Mapping[Place, Ranking],
        *,
        routes: Iterable[tuple[Place, Place]],
        marks: Mapping[Place, Marks] | None = None,
        eager: bool = False,
        batch: int = 512,
    ) -> None:
        """pools and rankings for all three tiers (capacity 0 = off).

        routes: which (source, destination) pairs can be copied. batch: pages in flight downward
        per tier at most, for work that nobody waits for.
        """
        self.table = table
        self.pools = dict(pools)
        self.rankings = dict(rankings)
        self.routes = set(routes)
        self.marks = {p: Marks(1.0, 1.0) for p in pools} | dict(marks or {})
        self.eager = eager
        self.batch = batch
        self.counts: Counter[str] = Counter()
        self.failed_tiers: set[Place] = set()
        self.limits: dict[Place, int] = {}
        self._open: dict[int, _Open] = {}
        self._watch: dict[int, list[Request]] = {}
        self._doomed = _NO_ROWS
        self._reaped: list[Rows] = []
        self._next_plan = 1
        self._stamp = 1
        self._failures: Counter[tuple[Place, Place]] = Counter()

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
        if (table.at[rows] != Place.NONE).any() or (table.flags[rows] & DOOMED).any():
            raise NotOurs(f"{len(rows)} pages to allocate, not all of them vacant")
        request = Request(rows, pins=False)
        if self._blocked(rows, request):
            return request
        if not self._have_room(self._frameless(rows), request, now, spare_us=rows):
            return request
        heads = table.heads(rows)
        table.parent[heads] = -1 if parents is None else parents
        table.depth[heads] = 0 if depths is None else depths
        self._stamp_units(heads)
        request.taken = True
        table.flags[rows] = 0
        table.gen[rows] += 1
        back = self._take_back(rows)
        table.at[rows] = Place.LOST
        table.at[back] = Place.GPU
        table.flags[back] = DIRTY
        self.rankings[Place.GPU].inserted(heads, keys, now)
        self._blank(rows[table.at[rows] == Place.LOST], request)
        return request

    def fault(
        self, rows: Rows, access: Access, now: int, *, order: bool = False, pin: bool = True
    ) -> Request:
        """Make pages (whole units, deepest first) resident and pin them: all or nothing.

        order: loads from the host may be pinned at once, because the caller makes its stream wait
        for them. Raises NotOurs, PageLost, TierFull; then nothing is pinned.
        """
        table = self.table
        at = table.at[rows]
        if (at == Place.NONE).any() or (table.flags[rows] & DOOMED).any():
            raise NotOurs(f"{int((at == Place.NONE).sum())} of {len(rows)} pages not allocated")
        if access != "fresh" and (at == Place.LOST).any():
            lost = rows[at == Place.LOST]
            raise PageLost(
                f"{len(lost)} of {len(rows)} pages lost (first: row {int(lost[0])}); "
                'compute them again with access="fresh"'
            )
        request = Request(rows, pins=pin)
        self._rescue(rows)
        to = table.to[rows]
        arriving = rows[to == Place.GPU]
        away = rows[(table.at[rows] != Place.GPU) & (to != Place.GPU)]
        if len(away):
            if access == "fresh" and self._busy(away, request):
                return request
            self._cancel(away[table.at[away] == Place.HOST])
            if self._blocked(away, request):
                return request
            if not self._have_room(self._frameless(away), request, now, spare_us=rows):
                return request
            for place in (Place.HOST, Place.NVME):
                self.counts[f"fault_{place.name.lower()}"] += int((table.at[away] == place).sum())
            self._bring(away, access, request, now, order)
        if len(arriving):
            self._join(arriving, request)
        request.taken = True
        if pin:
            self._pin(rows)
        return request

    def pin_one(self, row: int, write: bool, now: int) -> bool:
        """The fast path of `fault` and `touch` for one page that rests on the GPU."""
        table = self.table
        if table.at[row] != Place.GPU or table.to[row] or table.flags[row] & (DOOMED | STALE):
            return False
        if write and (table.slot(Place.HOST)[row] >= 0 or table.slot(Place.NVME)[row] >= 0):
            return False
        if write:
            table.gen[row] += np.uint32(1)
            table.flags[row] |= DIRTY
        table.pins[row] += 1
        table.stamp[row] = self._stamp
        self._stamp += 1
        self.rankings[Place.GPU].accessed(np.array([row], np.int32), now)
        return True

    def touch(self, rows: Rows, now: int) -> None:
        """Tell the GPU's policy that these resident pages were used, deepest first."""
        heads = self.table.heads(rows)
        self._stamp_units(heads)
        here = heads[self.table.at[heads] == Place.GPU]
        if len(here):
            self.rankings[Place.GPU].accessed(here, now)

    def wrote(self, rows: Rows) -> None:
        """The pinned pages are about to be written: every copy below is now old."""
        table = self.table
        table.gen[rows] += 1
        table.flags[rows] |= DIRTY
        for place in (Place.HOST, Place.NVME):
            slot = table.slot(place)
            copies = rows[slot[rows] >= 0]
            if not len(copies):
                continue
            busy = table.busy[copies] > 0
            table.flags[copies[busy]] |= STALE
            self._release_copies(copies[~busy], place)

    def unpin(self, rows: Rows, tick: tuple[int, int] | None) -> None:
        """Give pins back. tick: the point on a stream after the last work that may touch them."""
        table = self.table
        table.pins[rows] -= 1
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
        waiting = (table.to[rows] == Place.GPU) & ((table.flags[rows] & ORDERED) == 0)
        table.waiters[rows[waiting]] -= 1
        table.pins[rows[~waiting]] -= 1
        request.taken = False

    def free(self, rows: Rows, now: int) -> list[Plan]:
        """Forget pages (whole units). They become vacant once idle. Raises PageInUse, NotOurs."""
        table = self.table
        if (table.at[rows] == Place.NONE).any() or (table.flags[rows] & DOOMED).any():
            raise NotOurs(f"{len(rows)} pages to free, not all of them allocated")
        used = (table.pins[rows] > 0) | (table.waiters[rows] > 0)
        if used.any():
            raise PageInUse(
                f"{int(used.sum())} of {len(rows)} pages are pinned or awaited "
                f"(first: row {int(rows[used][0])}); leave their use() first"
            )
        self._doom(rows, now)
        return self._reap()

    def finished(self, rows: Rows, facts: RequestFacts, now: int) -> None:
        """Tell the policies what is known of a request that ended (pages deepest first)."""
        heads = self.table.heads(rows)
        for place, ranking in self.rankings.items():
            here = heads[self.table.at[heads] == place]
            if len(here):
                ranking.finished(here, facts, now)

    def prefetch(self, rows: Rows, now: int) -> list[Plan]:
        """Load pages that rest below, as far as room is free without moving anything else.

        Without room on the GPU, pages on NVMe are staged in the host tier.
        """
        table = self.table
        rest = (table.to[rows] == 0) & (table.busy[rows] == 0) & (table.flags[rows] & DOOMED == 0)
        rest &= (table.at[rows] == Place.HOST) | (table.at[rows] == Place.NVME)
        rows = rows[rest & (table.shown[rows] != Shown.HIDING)]
        pool = self.pools[Place.GPU]
        room = min(pool.free + self._stealable(), int(self._mark(Place.GPU, "high")) - pool.used)
        soon, later = self._cut(rows, max(room, 0))
        request = Request(soon, pins=False)
        if len(soon):
            self.counts["prefetched"] += len(soon)
            self._bring(soon, "read", request, now, order=False)
        return request.plans + self._stage(later[table.at[later] == Place.NVME], now)

    def demote(self, rows: Rows, now: int) -> list[Plan]:
        """Start moving idle pages of the GPU one tier down: the owner says they are cold."""
        heads = self.table.heads(rows)
        rows = self.table.pages(heads[self.table.movable(heads, Place.GPU)])
        return self._leave_gpu(rows, now, may_drop=False)

    # ---------------------------------------------------------------- verbs of the mover

    def relieve(self, now: int) -> list[Plan]:
        """Plans that bring each tier below its marks and its limit, the lowest tier first."""
        plans = self._reap()
        for place in (Place.NVME, Place.HOST, Place.GPU):
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
                    self._settle_hide(step, bad)
                case Copy(dst=Place.GPU):
                    bad = self._whole_units(step.pages, bad)
                    bad = _either(bad, np.isin(step.pages, unshown))
                    after += self._land_up(step, opened.plan.id, bad, unshown, failed_rows, now)
                    self._note_failures(step, bad, outcome.error)
                case Copy():
                    bad = self._whole_units(step.pages, bad)
                    after += self._land_down(step, opened.plan.id, gens, bad, now)
                    self._note_failures(step, bad, outcome.error)
                case Show() if not _copies(opened.plan):
                    after += self._settle_blank(step, opened.plan.id, unshown, failed_rows, now)
                case _:
                    pass
        for request in self._watch.pop(outcome.plan, ()):
            request.pending.discard(outcome.plan)
            if failed_rows:
                request.failed += sorted(failed_rows.intersection(request.rows.tolist()))
        return after + self._reap()

    def settle_idle(self) -> list[Plan]:
        """Make doomed pages vacant that have become idle since a fence passed."""
        return self._reap()

    def doomed_fence(self) -> Fence:
        """The point that pages waiting to become vacant are behind."""
        return self.table.fences.point(self.table.fence[self._doomed])

    def all_ordered(self, request: Request) -> bool:
        """True if a stream may wait for everything that this request awaits."""
        rows = request.rows[self.table.to[request.rows] == Place.GPU]
        return bool(((self.table.flags[rows] & ORDERED) != 0).all())

    def take_reaped(self) -> Rows:
        """Pages that became vacant since the last call."""
        rows = np.concatenate(self._reaped) if self._reaped else _NO_ROWS
        self._reaped.clear()
        return rows

    def is_doomed(self, rows: Rows) -> Mask:
        return np.asarray((self.table.flags[rows] & DOOMED) != 0)

    def room(self) -> int:
        """Pages that an allocation could get frames for: free, retired, or movable."""
        pool = self.pools[Place.GPU]
        owners = pool.owner[pool.owner >= 0]
        return pool.free + pool.kept + int(self.table.movable(owners, Place.GPU).sum())

    def forget(self, rows: Rows, now: int) -> list[Plan]:
        """Everything of a region that is being closed: free its pages, hide what it shows."""
        table = self.table
        alive = rows[(table.at[rows] != Place.NONE) & ((table.flags[rows] & DOOMED) == 0)]
        plans = self.free(alive, now) if len(alive) else []
        shown = rows[(table.shown[rows] == Shown.RETIRED) & (table.at[rows] == Place.NONE)]
        if len(shown):
            frames = table.slot(Place.GPU)[shown].copy()
            self.pools[Place.GPU].reuse(frames)
            plans.append(self._begin([self._hide_unowned(shown, frames)]))
        return plans

    def is_idle(self) -> bool:
        """True if no plan is open and no page is waiting to become vacant."""
        return not self._open and not len(self._doomed)

    def grow(self, place: Place, slots: Slots) -> None:
        """More slots are backed by bytes now."""
        self.pools[place].add(slots)

    def check(self) -> None:
        """Assert all invariants; also that no plan is lost and nothing leaks."""
        self.table.check(self.pools)
        busy = np.zeros(self.table.rows, np.int64)
        held = {place: 0 for place in self.pools}
        for opened in self._open.values():
            for step in opened.plan.steps:
                if isinstance(step, Copy):
                    np.add.at(busy, step.pages, 1)
                    held[step.dst] += len(step.pages)
                elif isinstance(step, Hide):
                    np.add.at(busy, step.pages, 1)
                    held[Place.GPU] += len(step.frees)
                elif isinstance(step, Show) and not _copies(opened.plan):
                    np.add.at(busy, step.pages, 1)
                    held[Place.GPU] += len(step.frames)
        assert (busy == self.table.busy).all(), "busy differs from the transfers in flight"
        for place, pool in self.pools.items():
            slot = self.table.slot(place)
            owned = int((slot >= 0).sum()) - pool.kept
            assert pool.used == owned + held[place], (
                f"{place.name}: {pool.used} used, {owned} owned and {held[place]} in flight"
            )

    # ---------------------------------------------------------------- bringing pages up

    def _bring(self, away: Rows, access: Access, request: Request, now: int, order: bool) -> None:
        """Claim frames for pages below and load them; there is room (`_have_room`)."""
        table = self.table
        back = self._take_back(away)
        self._moved(back, Place.GPU, now)
        if access == "fresh":
            blank = away[table.at[away] != Place.GPU]
            for place in (Place.HOST, Place.NVME):
                self._leave_tier(place, blank[table.at[blank] == place], now)
                self._release_copies(blank[table.slot(place)[blank] >= 0], place)
            table.at[blank] = Place.LOST
            table.flags[blank] = 0
            if len(blank):
                self.rankings[Place.GPU].inserted(table.heads(blank), None, now)
            self._blank(blank, request)
            return
        for place in (Place.HOST, Place.NVME):
            rows = away[table.at[away] == place]
            if len(rows):
                self._load(rows, place, request, ordered=order and place == Place.HOST)

    def _load(self, rows: Rows, src: Place, request: Request, ordered: bool) -> None:
        frames, steps = self._frames(rows)
        table = self.table
        copy = Copy(src, Place.GPU, rows, table.slot(src)[rows].copy(), frames, PASSED)
        plan = self._begin([*steps, copy, Show(rows, frames)])
        table.to[rows] = Place.GPU
        table.move[rows] = plan.id
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
        self.table.to[rows] = Place.GPU
        self.table.move[rows] = plan.id
        self._follow(plan, request)

    def _frames(self, rows: Rows) -> tuple[Slots, list[Step]]:
        """A frame for each page, free ones first, then the oldest retired; what must be done."""
        table, pool = self.table, self.pools[Place.GPU]
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
        owners, frames = self._take_kept(Place.GPU, n)
        extra = frames[n:]
        self.pools[Place.GPU].owner[extra] = -1
        self.counts["stolen"] += len(frames)
        return self._hide(owners, extra), frames[:n]

    def _take_kept(self, place: Place, n: int) -> tuple[Rows, Slots]:
        """The oldest idle kept slots, now used, and the pages that they were copies of.

        At least n where there are so many: units lose all their slots or none.
        """
        table, pool = self.table, self.pools[place]
        owners = table.pages(table.heads(pool.owner[self._idle_kept(place, n)]))
        slots = table.slot(place)[owners].copy()
        pool.reuse(slots)
        table.slot(place)[owners] = -1
        return owners, slots

    def _hide(self, rows: Rows, frees: Slots) -> Hide:
        """These pages stop showing their frame, which is theirs no more."""
        table = self.table
        table.slot(Place.GPU)[rows] = -1
        table.shown[rows] = Shown.HIDING
        table.busy[rows] += 1
        return Hide(rows, frees)

    def _take_back(self, rows: Rows) -> Rows:
        """Pages whose retired frame is still theirs return to it. Returns these pages."""
        table, pool = self.table, self.pools[Place.GPU]
        rows = rows[table.shown[rows] == Shown.RETIRED]
        if not len(rows):
            return rows
        pool.reuse(table.slot(Place.GPU)[rows])
        table.shown[rows] = Shown.FRAME
        self.counts["taken_back"] += int((table.at[rows] != Place.NONE).sum())
        for place in (Place.HOST, Place.NVME):
            here = rows[table.at[rows] == place]
            self.pools[place].keep(table.slot(place)[here])
        return rows

    def _moved(self, rows: Rows, dst: Place, now: int) -> None:
        """These pages now rest in `dst` (their slot there is set): tell both policies."""
        table = self.table
        for src in (Place.GPU, Place.HOST, Place.NVME):
            self._leave_tier(src, rows[table.at[rows] == src], now)
        table.at[rows] = dst
        self._entered(dst, table.heads(rows), now)

    def _join(self, rows: Rows, request: Request) -> None:
        """Wait for loads that others began."""
        self.counts["shared_faults"] += len(rows)
        for plan_id in np.unique(self.table.move[rows]).tolist():
            request.pending.add(plan_id)
            self._watch.setdefault(plan_id, []).append(request)

    def _pin(self, rows: Rows) -> None:
        table = self.table
        later = (table.to[rows] == Place.GPU) & ((table.flags[rows] & ORDERED) == 0)
        table.pins[rows[~later]] += 1
        table.waiters[rows[later]] += 1

    def _land_up(
        self, step: Copy, plan_id: int, bad: Mask | None, unshown: Rows, failed: set[int], now: int
    ) -> list[Plan]:
        """A load ended: pages that still want it are on the GPU, whoever waited has its pin."""
        table, rows = self.table, step.pages
        table.busy[rows] -= 1
        live = table.move[rows] == plan_id
        good = live if bad is None else live & ~bad
        table.to[rows[live]] = 0
        table.move[rows[live]] = 0
        landed = rows[good]
        table.slot(Place.GPU)[landed] = step.dst_slots[good]
        table.shown[landed] = Shown.FRAME
        self.pools[step.src].keep(table.slot(step.src)[landed])
        self._moved(landed, Place.GPU, now)
        table.pins[landed] += table.waiters[landed]
        table.waiters[rows[live]] = 0
        ordered = (table.flags[rows] & ORDERED) != 0
        if (ordered & live & ~good).any():
            self.failed_tiers.add(Place.GPU)  # a stream has gone on without its bytes
        table.flags[rows[live]] &= ~ORDERED
        self._release_stale(rows)
        self.counts[f"{step.src.name}_gpu".lower()] += len(landed)
        if good.all():
            return []
        unread = rows[live & ~good]
        failed.update(unread.tolist())
        after = self._read_failed(unread, step.src, now)
        return after + self._unshow(rows[~good], step.dst_slots[~good], unshown)

    def _unshow(self, rows: Rows, frames: Slots, unshown: Rows) -> list[Plan]:
        """Frames that were to be shown at these pages and have no use there now become free."""
        never = np.isin(rows, unshown)
        self.pools[Place.GPU].release(frames[never])
        if never.all():
            return []
        return [self._begin([self._hide_unowned(rows[~never], frames[~never])])]

    def _hide_unowned(self, rows: Rows, frames: Slots) -> Hide:
        """Pages that lose their frame; it becomes free once that is done."""
        self.pools[Place.GPU].owner[frames] = -1
        return self._hide(rows, frames)

    def _read_failed(self, rows: Rows, src: Place, now: int) -> list[Plan]:
        """Pages that could not be read: fall back to the spare; with none, a disk page is LOST."""
        table = self.table
        if not len(rows):
            return []
        self.counts["failed_reads"] += len(rows)
        if src == Place.HOST:
            spare = rows[(table.slot(Place.NVME)[rows] >= 0) & (table.busy[rows] == 0)]
            return self._step_down(spare, Place.HOST, Place.NVME, now)
        self._leave_tier(Place.NVME, rows, now)
        self._release_copies(rows, Place.NVME)
        table.at[rows] = Place.LOST
        self.counts["lost"] += len(rows)
        return [self._begin([Drop(table.heads(rows), "lost")])]

    def _settle_blank(
        self, step: Show, plan_id: int, unshown: Rows, failed: set[int], now: int
    ) -> list[Plan]:
        table, rows = self.table, step.pages
        table.busy[rows] -= 1
        live = table.move[rows] == plan_id
        good = live & ~np.isin(rows, unshown)
        table.to[rows[live]] = 0
        table.move[rows[live]] = 0
        landed = rows[good]
        table.slot(Place.GPU)[landed] = step.frames[good]
        table.shown[landed] = Shown.FRAME
        table.at[landed] = Place.GPU
        table.flags[landed] |= DIRTY
        table.pins[landed] += table.waiters[landed]
        table.waiters[rows[live]] = 0
        if good.all():
            return []
        broken = rows[live & ~good]
        failed.update(broken.tolist())
        table.flags[broken] = 0
        self._leave_tier(Place.GPU, broken, now)
        return self._unshow(rows[~good], step.frames[~good], unshown)

    # ---------------------------------------------------------------- moving pages down

    def _push_down(self, place: Place, n: int, now: int) -> list[Plan]:
        """Start n pages of a tier on their way down, as its policy ranks them."""
        plans: list[Plan] = []
        while n > 0:
            victims = self.rankings[place].victims(-(-n // self.table.max_unit_pages), now)
            if not len(victims):
                break
            rows = self.table.pages(victims)
            moved = self._leave(place, rows, now)
            plans += moved
            n -= len(rows)
            if not moved and self.table.movable(victims, place).any():
                break
        return plans

    def _leave(self, place: Place, rows: Rows, now: int) -> list[Plan]:
        match place:
            case Place.GPU:
                return self._leave_gpu(rows, now, may_drop=True)
            case Place.HOST:
                return self._leave_host(rows, now)
            case _:
                return self._drop(rows, now, "evicted")

    def _leave_gpu(self, rows: Rows, now: int, may_drop: bool) -> list[Plan]:
        """To the host if it has room; straight to NVMe if not; dropped if nothing is below.

        A page that has a host spare steps down at once. Pages left over stay until the host has
        room, which is made here.
        """
        table = self.table
        clean = (table.flags[rows] & DIRTY) == 0
        spare = clean & (table.slot(Place.HOST)[rows] >= 0)
        plans = self._step_down(rows[spare], Place.GPU, Place.HOST, now)
        more, rest = self._start(rows[~spare], Place.GPU, Place.HOST, now)
        plans += more
        if not len(rest):
            return plans
        clean = (table.flags[rest] & DIRTY) == 0
        spare = clean & (table.slot(Place.NVME)[rest] >= 0)
        plans += self._step_down(rest[spare], Place.GPU, Place.NVME, now)
        more, rest = self._start(rest[~spare], Place.GPU, Place.NVME, now)
        plans += more
        if not len(rest):
            return plans
        if self._usable(Place.HOST):
            short = len(rest) - self._leaving(Place.HOST)
            return plans + (self._push_down(Place.HOST, short, now) if short > 0 else [])
        if may_drop and not self._usable(Place.NVME, Place.GPU):
            plans += self._drop(rest, now, "evicted")
        return plans

    def _leave_host(self, rows: Rows, now: int) -> list[Plan]:
        table = self.table
        spare = table.slot(Place.NVME)[rows] >= 0
        plans = self._step_down(rows[spare], Place.HOST, Place.NVME, now)
        more, rest = self._start(rows[~spare], Place.HOST, Place.NVME, now)
        plans += more
        if len(rest) and not self._usable(Place.NVME, Place.HOST):
            plans += self._drop(rest, now, "evicted")
        return plans

    def _usable(self, dst: Place, src: Place = Place.GPU) -> bool:
        """Whether pages can be stored in a tier at all, room or not."""
        return (
            self.pools[dst].capacity > 0
            and dst not in self.failed_tiers
            and (src, dst) in self.routes
        )

    def _start(self, rows: Rows, src: Place, dst: Place, now: int) -> tuple[list[Plan], Rows]:
        """Begin to copy as many of these pages down as `dst` has slots for; (plans, the rest)."""
        if not len(rows) or not self._usable(dst, src):
            return [], rows
        plans, slots = self._lower_slots(dst, len(rows), now)
        rows, rest = self._cut(rows, len(slots))
        pool = self.pools[dst]
        pool.release(slots[len(rows) :])
        slots = slots[: len(rows)]
        if not len(rows):
            return plans, rest
        table = self.table
        pool.owner[slots] = rows
        pool.tenant[slots] = table.tenant[rows]
        after = table.fences.point(table.fence[rows]) if src == Place.GPU else PASSED
        copy = Copy(src, dst, rows, table.slot(src)[rows].copy(), slots, after)
        plan = self._begin([copy])
        table.to[rows] = dst
        table.move[rows] = plan.id
        return [*plans, plan], rest

    def _lower_slots(self, place: Place, n: int, now: int) -> tuple[list[Plan], Slots]:
        """Up to n slots of a lower tier, and plans that make more room there for later.

        The host gives spares away first; NVMe keeps them longest, because they save writes.
        """
        pool = self.pools[place]
        slots = pool.take_free(min(n, pool.free))
        short = n - len(slots)
        if not short:
            return [], slots
        plans: list[Plan] = []
        if place == Place.NVME:
            coming = self._leaving(place)
            plans = self._push_down(place, short - coming, now)
            if plans or coming:
                return plans, slots
        _, kept = self._take_kept(place, short)
        pool.release(kept[short:])
        return plans, np.concatenate([slots, kept[:short]])

    def _step_down(self, rows: Rows, src: Place, dst: Place, now: int) -> list[Plan]:
        """Clean pages with a spare in `dst` rest there from now on, without a transfer."""
        if self.eager and src == Place.GPU:
            rows = rows[self.table.fences.is_passed(self.table.fence[rows])]
        if not len(rows):
            return []
        self.pools[dst].reuse(self.table.slot(dst)[rows])
        self._moved(rows, dst, now)
        self.counts["stepped_down"] += len(rows)
        if src == Place.GPU:
            return self._retire(rows)
        self._release_slots(rows, src)
        return []

    def _land_down(
        self, step: Copy, plan_id: int, gens: np.ndarray | None, bad: Mask | None, now: int
    ) -> list[Plan]:
        """A copy downward, or a stage from NVMe to the host, ended."""
        table, rows, dst = self.table, step.pages, step.dst
        slot = table.slot(dst)
        table.busy[rows] -= 1
        live = table.move[rows] == plan_id
        whole = np.ones(len(rows), np.bool_) if bad is None else ~bad
        table.to[rows[live]] = 0
        table.move[rows[live]] = 0
        commit = live & whole
        landed = rows[commit]
        slot[landed] = step.dst_slots[commit]
        table.flags[landed] &= ~DIRTY
        self._moved(landed, dst, now)
        # A cancelled copy is a spare only if nobody wrote since it began (invariant 6).
        late = ~live & whole & (table.gen[rows] == gens) & (slot[rows] < 0)
        late &= (table.flags[rows] & (DOOMED | STALE)) == 0
        late &= (table.at[rows] != Place.NONE) & (table.at[rows] < dst)
        spares = rows[late]
        slot[spares] = step.dst_slots[late]
        table.flags[spares] &= ~DIRTY
        pool = self.pools[dst]
        pool.keep(step.dst_slots[late])
        pool.release(step.dst_slots[~(commit | late)])
        self._release_stale(rows)
        self.counts[f"{step.src.name}_{dst.name}".lower()] += len(landed)
        self.counts["late_spares"] += len(spares)
        if step.src == Place.GPU:
            return self._retire(landed)
        if dst == Place.NVME:
            self._release_slots(landed, Place.HOST)
        else:
            self.pools[Place.NVME].keep(table.slot(Place.NVME)[landed])
            return self._read_failed(rows[live & ~whole], Place.NVME, now)
        return []

    def _retire(self, rows: Rows) -> list[Plan]:
        """The frames of pages that left the GPU: kept and still shown, or hidden at once."""
        if not len(rows):
            return []
        table, pool = self.table, self.pools[Place.GPU]
        frames = table.slot(Place.GPU)[rows]
        if self.eager:
            return [self._begin([self._hide_unowned(rows, frames)])]
        pool.keep(frames)
        table.shown[rows] = Shown.RETIRED
        return []

    def _stage(self, rows: Rows, now: int) -> list[Plan]:
        """NVMe to host, into free slots only."""
        pool = self.pools[Place.HOST]
        if not self._usable(Place.HOST, Place.NVME):
            return []
        room = min(pool.free, int(self._mark(Place.HOST, "high")) - pool.used)
        rows, _ = self._cut(rows, max(room, 0))
        return self._start(rows, Place.NVME, Place.HOST, now)[0]

    # ---------------------------------------------------------------- forgetting pages

    def _drop(self, rows: Rows, now: int, reason: str) -> list[Plan]:
        """Units leave the last tier: the owner hears of it before any slot is reused."""
        if not len(rows):
            return []
        self.counts["dropped"] += len(rows)
        plan = self._begin([Drop(self.table.heads(rows), reason)])
        self._mark_doomed(rows, now)
        return [plan]

    def _settle_drop(self, step: Drop) -> None:
        if step.reason != "lost":
            self._doom_rows(self.table.pages(step.units))

    def _doom(self, rows: Rows, now: int) -> None:
        self._mark_doomed(rows, now)
        self._doom_rows(rows)

    def _mark_doomed(self, rows: Rows, now: int) -> None:
        table = self.table
        arriving = (table.at[rows] == Place.LOST) & (table.to[rows] == Place.GPU)
        self._leave_tier(Place.GPU, rows[arriving | (table.at[rows] == Place.GPU)], now)
        for place in (Place.HOST, Place.NVME):
            self._leave_tier(place, rows[table.at[rows] == place], now)
        self._cancel(rows)
        table.flags[rows] |= DOOMED

    def _doom_rows(self, rows: Rows) -> None:
        self.table.flags[rows] |= DOOMED
        self._doomed = np.concatenate([self._doomed, rows])

    def _reap(self) -> list[Plan]:
        """Doomed pages that are idle and behind whose fence all work has passed become NONE."""
        if not len(self._doomed):
            return []
        table = self.table
        idle = (table.busy[self._doomed] == 0) & table.fences.is_passed(table.fence[self._doomed])
        if not idle.any():
            return []
        rows = self._doomed[idle]
        self._doomed = self._doomed[~idle]
        plans: list[Plan] = []
        shown = rows[table.shown[rows] == Shown.FRAME]
        if self.eager and len(shown):
            table.at[shown] = Place.LOST
            table.flags[shown] = DOOMED
            hide = self._hide_unowned(shown, table.slot(Place.GPU)[shown])
            plans.append(self._begin([hide]))
            self._doomed = np.concatenate([self._doomed, shown])
            rows = rows[table.shown[rows] != Shown.HIDING]
        for place in (Place.HOST, Place.NVME):
            self._release_copies(rows[table.slot(place)[rows] >= 0], place)
        shown = rows[table.shown[rows] == Shown.FRAME]
        self.pools[Place.GPU].keep(table.slot(Place.GPU)[shown])
        table.shown[shown] = Shown.RETIRED
        table.at[rows] = Place.NONE
        table.flags[rows] = 0
        table.fence[rows] = 0
        table.parent[rows] = -1
        self._reaped.append(rows)
        return plans

    def _settle_hide(self, step: Hide, bad: Mask | None) -> None:
        table = self.table
        table.busy[step.pages] -= 1
        table.shown[step.pages] = Shown.NOTHING
        self._release_stale(step.pages)
        if len(step.frees):
            self.pools[Place.GPU].release(step.frees)
        if bad is not None and bad.any():
            self.failed_tiers.add(Place.GPU)

    def _give_back(self) -> list[Plan]:
        """Hide retired frames above the GPU's limit, so that they can be given back."""
        pool = self.pools[Place.GPU]
        excess = pool.capacity - self.limits.get(Place.GPU, pool.capacity) - pool.free
        if excess <= 0:
            return []
        rows, frames = self._take_kept(Place.GPU, excess)
        return [self._begin([self._hide_unowned(rows, frames)])] if len(rows) else []

    def short_of_limit(self, place: Place) -> int:
        """Slots that the limit allows beyond those that are there."""
        capacity = self.pools[place].capacity
        return self.limits.get(place, capacity) - capacity

    def surrender(self) -> Slots:
        """Free GPU frames above the limit leave the pool, for their memory to be given back."""
        pool = self.pools[Place.GPU]
        return pool.remove(pool.capacity - self.limits.get(Place.GPU, pool.capacity))

    # ---------------------------------------------------------------- room and waiting

    def _have_room(self, n: int, request: Request, now: int, spare_us: Rows = _NO_ROWS) -> bool:
        """True if n frames can be had now. Else the request says what to do and await.

        spare_us: pages of this request, which must not be evicted for it.
        """
        pool = self.pools[Place.GPU]
        have = pool.free + self._stealable(spare_us)
        if have >= n:
            return True
        if Place.GPU in self.failed_tiers:
            raise TierFailed("gpu: the tier has failed; reopen the space")
        self.table.pins[spare_us] += 1
        try:
            if n > pool.capacity - self._pinned_frames():
                self._refuse(n)
            short = n - have - self._coming()
            if short > 0:
                request.plans += self._push_down(Place.GPU, short, now)
        finally:
            self.table.pins[spare_us] -= 1
        if pool.free + self._stealable(spare_us) >= n:
            return not request.plans
        request.pending |= set(self._open)
        for plan_id in self._open:
            self._watch.setdefault(plan_id, []).append(request)
        request.fence = self.table.fences.point(self.table.fence[self._fenced()])
        if not request.pending and not request.fence.ticks:
            self._refuse(n)
        return False

    def _refuse(self, n: int) -> None:
        pool = self.pools[Place.GPU]
        below = ", ".join(
            f"{p.name.lower()} {self.pools[p].used} of {self.pools[p].capacity} used"
            + (" (failed)" if p in self.failed_tiers else "")
            for p in (Place.HOST, Place.NVME)
        )
        raise TierFull(
            f"gpu: need {n} pages, {pool.free} free, {pool.kept} retired, "
            f"{self._pinned_frames()} of {pool.capacity} pinned; {below}; "
            "use fewer pages at once, or raise gpu.budget"
        )

    def _pinned_frames(self) -> int:
        """Frames whose pages are pinned, awaited, or wanted by the request at hand."""
        owners = self.pools[Place.GPU].owner
        owners = owners[owners >= 0]
        return int(((self.table.pins[owners] > 0) | (self.table.waiters[owners] > 0)).sum())

    def _frameless(self, rows: Rows) -> int:
        """How many of these pages have no retired frame of their own to return to."""
        return int((self.table.shown[rows] != Shown.RETIRED).sum())

    def _stealable(self, spare_us: Rows = _NO_ROWS) -> int:
        """Retired frames whose last work has passed and that are not of these pages."""
        pool = self.pools[Place.GPU]
        if not pool.kept:
            return 0
        own = int((self.table.shown[spare_us] == Shown.RETIRED).sum())
        if self.table.fences.all_passed:
            return pool.kept - own
        return len(self._idle_kept(Place.GPU, None)) - own

    def _idle_kept(self, place: Place, n: int | None) -> Slots:
        """Up to n kept slots, oldest first, whose pages are idle and behind no open fence."""
        pool = self.pools[place]
        slots = pool.oldest_kept(n)
        idle = self._is_idle(pool.owner[slots], place)
        if idle.all() or n is None or n >= pool.kept:
            return slots[idle]
        slots = pool.oldest_kept()
        return slots[self._is_idle(pool.owner[slots], place)][:n]

    def _is_idle(self, owners: Rows, place: Place) -> Mask:
        if place == Place.GPU:
            return self.table.fences.is_passed(self.table.fence[owners])
        return np.asarray((self.table.busy[owners] == 0) & (self.table.to[owners] == 0))

    def _fenced(self) -> Rows:
        """Unpinned pages with a frame: some may wait for a fence before they can give it up."""
        owners = self.pools[Place.GPU].owner
        owners = owners[owners >= 0]
        return np.concatenate([self._doomed, owners[self.table.pins[owners] == 0]])

    def _coming(self) -> int:
        """Frames that open plans will free."""
        coming = 0
        for opened in self._open.values():
            for step in opened.plan.steps:
                if isinstance(step, Copy) and step.src == Place.GPU:
                    coming += int((self.table.move[step.pages] == opened.plan.id).sum())
                elif isinstance(step, Hide):
                    coming += len(step.frees)
                elif isinstance(step, Drop):
                    pages = self.table.pages(step.units)
                    coming += int((self.table.at[pages] == Place.GPU).sum())
        return coming + int((self.table.at[self._doomed] == Place.GPU).sum())

    def _leaving(self, place: Place) -> int:
        """Pages on their way out of a tier."""
        leaving = 0
        for opened in self._open.values():
            for step in opened.plan.steps:
                if isinstance(step, Copy) and step.src == place < step.dst:
                    leaving += int((self.table.move[step.pages] == opened.plan.id).sum())
                elif isinstance(step, Drop):
                    pages = self.table.pages(step.units)
                    leaving += int((self.table.at[pages] == place).sum())
        return leaving + int((self.table.at[self._doomed] == place).sum())

    def _rescue(self, rows: Rows) -> None:
        """Pages on their way down that are wanted again: let go of the move, for nothing."""
        table = self.table
        leaving = rows[(table.at[rows] == Place.GPU) & (table.to[rows] != 0)]
        if len(leaving):
            self.counts["rescued"] += len(leaving)
            self._cancel(leaving)

    def _cancel(self, rows: Rows) -> None:
        table = self.table
        rows = rows[table.to[rows] != 0]
        table.to[rows] = 0
        table.move[rows] = 0

    def _blocked(self, rows: Rows, request: Request) -> bool:
        """Pages being hidden, or on their way from NVMe to the host: wait for those plans."""
        table = self.table
        stuck = rows[(table.shown[rows] == Shown.HIDING) | (table.to[rows] == Place.HOST)]
        return bool(len(stuck)) and self._await(stuck, request)

    def _busy(self, rows: Rows, request: Request) -> bool:
        busy = rows[self.table.busy[rows] > 0]
        return bool(len(busy)) and self._await(busy, request)

    def _await(self, rows: Rows, request: Request) -> bool:
        for plan_id, opened in self._open.items():
            if any(np.isin(rows, _pages(step)).any() for step in opened.plan.steps):
                request.pending.add(plan_id)
                self._watch.setdefault(plan_id, []).append(request)
        assert request.pending, "a busy page that no open plan touches"
        return True

    # ---------------------------------------------------------------- small parts

    def _begin(self, steps: list[Step]) -> Plan:
        plan = Plan(self._next_plan, tuple(steps))
        self._next_plan += 1
        gens: list[np.ndarray | None] = []
        for step in steps:
            if isinstance(step, Copy):
                self.table.busy[step.pages] += 1
                gens.append(self.table.gen[step.pages].copy())
            else:
                gens.append(None)
        self._open[plan.id] = _Open(plan, tuple(gens))
        return plan

    def _follow(self, plan: Plan, request: Request) -> None:
        request.plans.append(plan)
        request.pending.add(plan.id)
        self._watch.setdefault(plan.id, []).append(request)

    def _entered(self, place: Place, heads: Rows, now: int, keys: Keys | None = None) -> None:
        if len(heads):
            self.rankings[place].inserted(heads, keys, now)

    def _leave_tier(self, place: Place, rows: Rows, now: int) -> None:
        if len(rows):
            self.rankings[place].removed(self.table.heads(rows), now)

    def _stamp_units(self, heads: Rows) -> None:
        self.table.stamp[heads] = np.arange(self._stamp, self._stamp + len(heads), dtype=np.uint64)
        self._stamp += len(heads)

    def _release_copies(self, rows: Rows, place: Place) -> None:
        if len(rows):
            self._release_slots(rows, place)

    def _release_slots(self, rows: Rows, place: Place) -> None:
        slot = self.table.slot(place)
        self.pools[place].release(slot[rows])
        slot[rows] = -1

    def _release_stale(self, rows: Rows) -> None:
        """Old copies of pages that have become idle."""
        table = self.table
        rows = rows[((table.flags[rows] & STALE) != 0) & (table.busy[rows] == 0)]
        if len(rows):
            table.flags[rows] &= ~STALE
            for place in (Place.HOST, Place.NVME):
                self._release_copies(rows[table.slot(place)[rows] >= 0], place)

    def _mark(self, place: Place, which: Literal["high", "low"]) -> float:
        pool = self.pools[place]
        capacity = min(pool.capacity, self.limits.get(place, pool.capacity))
        return float(getattr(self.marks[place], which) * capacity)

    def _cut(self, rows: Rows, n: int) -> tuple[Rows, Rows]:
        """(at most n pages, the rest), never cutting through a unit."""
        unit = self.table.unit
        while 0 < n < len(rows) and unit[rows[n]] == unit[rows[n - 1]]:
            n -= 1
        return rows[:n], rows[n:]

    def _failed_shows(self, plan: Plan, outcome: Outcome) -> Rows:
        failed = [
            step.pages[bad]
            for step, bad in zip(plan.steps, outcome.failed, strict=True)
            if isinstance(step, Show) and bad is not None
        ]
        return np.concatenate(failed) if failed else _NO_ROWS

    def _whole_units(self, rows: Rows, bad: Mask | None) -> Mask | None:
        """A unit failed if any of its pages did."""
        if bad is None or self.table.max_unit_pages == 1:
            return bad
        unit = self.table.unit[rows]
        return np.isin(unit, unit[bad])

    def _note_failures(self, step: Copy, bad: Mask | None, error: Exception | None) -> None:
        """Latch a tier that fails to store again and again, or says that it has failed."""
        route = (step.src, step.dst)
        if bad is None or not bad.any():
            self._failures[route] = 0
            return
        self.counts["failed_copies"] += int(bad.sum())
        self._failures[route] += 1
        if step.dst != Place.GPU and (isinstance(error, TierFailed) or self._failures[route] >= 8):
            self.failed_tiers.add(step.dst)


def _copies(plan: Plan) -> bool:
    return any(isinstance(step, Copy) for step in plan.steps)


def _pages(step: Step) -> Rows:
    match step:
        case Copy() | Show() | Hide():
            return step.pages
        case _:
            return _NO_ROWS


def _either(a: Mask | None, b: Mask) -> Mask | None:
    return b if a is None and b.any() else a if a is None else a | b
