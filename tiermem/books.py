"""The planner's books: table, slot pools, policies and open plans, and how they change together.

Each method keeps the invariants of `table.py` by itself. Nothing here decides what should move;
`descent.py` and `planner.py` do.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from tiermem.contents import Contents
from tiermem.errors import TierFailed
from tiermem.plan import Copy, Drop, Hide, Plan, Request, Show, ShowInPlace, Step
from tiermem.policies.base import Admission, Keys, Onlooker, PrefetchGauge
from tiermem.ranking import Ranking
from tiermem.table import (
    DOOMED,
    IS_HIDING,
    IS_NOTHING,
    IS_RETIRED,
    LABELLED,
    ORDERED,
    STALE,
    Extent,
    PageTable,
    Rows,
    span,
)
from tiermem.tier import AT_GPU, AT_NVME, GPU, HOST, NVME, TIERS, Mask, Place, SlotPool, Slots

_NO_ROWS = np.empty(0, np.int32)


@dataclass(frozen=True, slots=True)
class Marks:
    """Shares of a tier's capacity: above `high`, units leave until `low` is reached."""

    high: float = 0.95
    low: float = 0.90


@dataclass(frozen=True, slots=True)
class Crossover:
    """Up to how many touches reading a page in place costs less than loading it.

    with_room, without: where a frame is free, and where another page must leave for it (and,
    later, come back). Measured by `crossover.py`.
    """

    with_room: int
    without: int


@dataclass(frozen=True, slots=True)
class Open:
    """A plan that is being carried out."""

    plan: Plan
    gens: tuple[np.ndarray | None, ...]  # of the pages of each Copy downward, when it began


class Books:
    """The state that all verbs share. Pages of one unit always change together."""

    def __init__(
        self,
        table: PageTable,
        pools: Mapping[Place, SlotPool],
        rankings: Mapping[Place, Ranking],
        *,
        routes: Iterable[tuple[Place, Place]],
        marks: Mapping[Place, Marks] | None = None,
        eager: bool = False,
        in_order: bool = False,
        batch: int = 512,
    ) -> None:
        """pools and rankings for all three tiers (capacity 0 = off).

        in_order: whoever carries plans out starts them in the order in which they were made, so
        an address whose hide has been planned may be shown anew at once.

        routes: which (source, destination) pairs can be copied. batch: pages in flight downward
        per tier at most, for work that nobody waits for.
        """
        self.table = table
        self.pools = dict(pools)
        self.rankings = dict(rankings)
        self.routes = set(routes)
        self.marks = {p: Marks(1.0, 1.0) for p in pools} | dict(marks or {})
        self.headroom = 0  # frames to be free ahead of need whatever the marks; half at most
        self.eager = eager
        self.in_order = in_order
        self.batch = batch
        self.counts: Counter[str] = Counter()
        self.failed_tiers: set[Place] = set()
        self.limits: dict[Place, int] = {}
        self.admission: Admission | None = None  # who is asked before a write to NVMe
        self.backlog: int | None = None  # pages on their way to NVMe, beyond which none are sent
        self.gauge: PrefetchGauge | None = None  # told what becomes of pages loaded ahead
        self.onlooker: Onlooker | None = None  # follows requests, for policies on trial
        self._admitted: set[int] = set()  # units that may be written and found no slot yet
        self.crossover: Crossover | None = None  # None: nothing is read in place
        self.growing: set[Place] = set()  # tiers that will have more slots without our doing
        self.contents = Contents(table)
        self.attic: Extent | None = None
        self._unrecorded: list[Rows] = []
        self._unsaved: dict[int, None] = {}  # labelled units that may have no copy on the drive
        self._open: dict[int, Open] = {}
        self._watch: dict[int, list[Request]] = {}
        self._doomed = _NO_ROWS
        self._reaped: list[Rows] = []
        self._next_plan = 1
        self._stamp = 1
        self._failures: Counter[tuple[Place, Place]] = Counter()

    @property
    def pages(self) -> int:
        """Pages of all regions; those of the attic have no address."""
        return self.table.rows - (0 if self.attic is None else self.attic.pages)

    @property
    def is_unrecorded(self) -> bool:
        """True if labelled pages have come to the drive that it has not been told of."""
        return bool(self._unrecorded)

    def is_idle(self) -> bool:
        """True if no plan is open and no page is waiting to become vacant."""
        return not self._open and not len(self._doomed)

    def grow(self, place: Place, slots: Slots) -> None:
        """More slots are backed by bytes now."""
        self.pools[place].add(slots)

    def check(self) -> None:
        """Assert all invariants; also that no plan is lost and nothing leaks."""
        self.table.check(self.pools, gpu_failed=GPU in self.failed_tiers)
        busy = np.zeros(self.table.rows, np.int64)
        held = {place: 0 for place in self.pools}
        doomed = [self._doomed]
        for opened in self._open.values():
            for step in opened.plan.steps:
                if isinstance(step, Copy):
                    np.add.at(busy, step.pages, 1)
                    held[step.dst] += len(step.pages)
                elif isinstance(step, Hide):
                    np.add.at(busy, step.pages, int(not self.in_order))
                    held[GPU] += len(step.frees)
                elif isinstance(step, ShowInPlace):
                    np.add.at(busy, step.pages, 1)
                elif isinstance(step, Show) and not copies(opened.plan):
                    np.add.at(busy, step.pages, 1)
                    held[GPU] += len(step.frames)
                elif isinstance(step, Drop) and step.reason != "lost":
                    doomed.append(self.table.pages(step.units))
        waiting = np.sort(np.concatenate(doomed))
        marked = np.flatnonzero((self.table.flags & DOOMED) != 0)
        assert np.array_equal(waiting, marked), "a doomed page is forgotten, or doomed twice"
        assert (busy == self.table.busy).all(), "busy differs from the transfers in flight"
        for place, pool in self.pools.items():
            slot = self.table.slot(place)
            owned = int((slot >= 0).sum()) - pool.kept
            assert pool.used == owned + held[place], (
                f"{place.name}: {pool.used} used, {owned} owned and {held[place]} in flight"
            )

    def take_reaped(self) -> Rows:
        """Pages that became vacant since the last call."""
        if not self._reaped:
            return _NO_ROWS
        rows = np.concatenate(self._reaped)
        self._reaped.clear()
        return rows

    def _begin(self, steps: list[Step]) -> Plan:
        plan = Plan(self._next_plan, tuple(steps))
        self._next_plan += 1
        gens: list[np.ndarray | None] = []
        for step in steps:
            gen = None
            if isinstance(step, Copy):
                self._hold(step.pages)
                gen = self.table.gen[step.pages] if step.dst != AT_GPU else None
            gens.append(gen)
        self._open[plan.id] = Open(plan, tuple(gens))
        return plan

    def _hold(self, rows: Rows) -> None:
        """One transfer more has these pages."""
        if len(rows) == 1:  # 0.2 us, and 0.9 as an array
            self.table.busy[rows.item()] += 1
        else:
            self.table.busy[span(rows)] += 1

    def _follow(self, plan: Plan, request: Request) -> None:
        """A request's own plan, which it awaits."""
        request.plans.append(plan)
        request.pending.add(plan.id)
        self._watch.setdefault(plan.id, []).append(request)

    def _take_kept(self, place: Place, n: int) -> tuple[Rows, Slots]:
        """The oldest idle kept slots, now used, and the pages that they were copies of.

        At least n where there are so many: units lose all their slots or none.
        """
        table, pool = self.table, self.pools[place]
        slots = self._idle_kept(place, n)
        owners = pool.owner[slots]
        if table.max_unit_pages > 1:
            owners = table.pages(table.heads(owners))
            slots = table.slot(place)[owners]
        pool.reuse(slots)
        table.slot(place)[span(owners)] = -1
        if place == AT_NVME:
            self._note_unsaved(owners)
        return owners, slots

    def _idle_kept(self, place: Place, n: int | None) -> Slots:
        """Up to n kept slots, oldest first, whose pages are idle and behind no open fence."""
        pool = self.pools[place]
        slots = pool.oldest_kept(n)
        idle = self._is_idle(pool.owner[slots], place)
        if np.count_nonzero(idle) == len(slots):
            return slots
        if n is None or n >= pool.kept:
            return slots[idle]
        slots = pool.oldest_kept()
        return slots[self._is_idle(pool.owner[slots], place)][:n]

    def _is_idle(self, owners: Rows, place: Place) -> Mask:
        if place == AT_GPU:
            return self.table.fences.is_passed(self.table.fence[owners])
        return np.asarray((self.table.busy[owners] == 0) & (self.table.to[owners] == 0))

    def _hide(self, rows: Rows, frees: Slots) -> Hide:
        """These pages stop showing their frame, which is theirs no more."""
        table, where = self.table, span(rows)
        table.slot(GPU)[where] = -1
        if self.in_order:
            table.shown[where] = IS_NOTHING
        else:
            table.shown[where] = IS_HIDING
            table.busy[where] += 1
        return Hide(rows, frees)

    def _hide_unowned(self, rows: Rows, frames: Slots) -> Hide:
        """Pages that lose their frame; it becomes free once that is done, in order at once."""
        self.pools[GPU].owner[frames] = -1
        if self.in_order:
            self.pools[GPU].release(frames)
            frames = _NO_ROWS
        return self._hide(rows, frames)

    def _unshow(self, rows: Rows, frames: Slots, unshown: Rows) -> list[Plan]:
        """Frames that were to be shown at these pages and have no use there now become free."""
        never = np.isin(rows, unshown)
        self.pools[GPU].release(frames[never])
        if never.all():
            return []
        return [self._begin([self._hide_unowned(rows[~never], frames[~never])])]

    def _found_room(self) -> None:
        """A request has the frames that it needs; for whoever counts how long one has not."""

    def _retire(self, rows: Rows) -> list[Plan]:
        """The frames of pages that left the GPU: kept and still shown, or hidden at once."""
        if not len(rows):
            return []
        table, pool = self.table, self.pools[GPU]
        frames = table.slot(GPU)[rows]
        if self.eager:
            return [self._begin([self._hide_unowned(rows, frames)])]
        pool.keep(frames)
        table.shown[rows] = IS_RETIRED
        return []

    def _moved(self, rows: Rows, dst: Place, now: int) -> None:
        """These pages now rest in `dst` (their slot there is set): tell both policies."""
        table = self.table
        where = span(rows)
        at = table.at[where]
        for src in TIERS:
            here = at == int(src)
            if n := np.count_nonzero(here):
                self._leave_tier(src, rows if n == len(rows) else rows[here], now)
        table.at[where] = int(dst)
        self._entered(dst, table.heads(rows), now)

    def _entered(self, place: Place, heads: Rows, now: int, keys: Keys | None = None) -> None:
        if len(heads):
            self.rankings[place].inserted(heads, keys, now)

    def _leave_tier(self, place: Place, rows: Rows, now: int) -> None:
        if len(rows):
            self.rankings[place].removed(self.table.heads(rows), now)
            if self.gauge is not None and place == GPU:
                self.gauge.dropped(rows)

    def _note_stored(self, rows: Rows) -> None:
        """Labelled pages among these may have come to the drive: `take_unrecorded` looks."""
        if self.attic is not None:
            rows = rows[(self.table.flags[rows] & LABELLED) != 0]
            if len(rows):
                self._unrecorded.append(rows)

    def _note_unsaved(self, rows: Rows) -> None:
        """Labelled pages among these are to get a copy on the drive if they have none."""
        if self.attic is None:
            return
        table = self.table
        flags = table.flags[rows]
        bare = (table.slot(NVME)[rows] < 0) | ((flags & STALE) != 0)
        rows = rows[bare & ((flags & LABELLED) != 0)]
        if len(rows):
            self._unsaved.update(dict.fromkeys(table.heads(rows).tolist()))

    def _stamp_units(self, heads: Rows) -> None:
        self.table.stamp[span(heads)] = np.arange(
            self._stamp, self._stamp + len(heads), dtype=np.uint64
        )
        self._stamp += len(heads)

    def _cancel(self, rows: Rows) -> None:
        table = self.table
        rows = rows[table.to[rows] != 0]
        table.to[rows] = 0
        table.move[rows] = 0
        table.flags[rows] &= ~ORDERED

    def _release_slots(self, rows: Rows, place: Place) -> None:
        if len(rows):
            slot = self.table.slot(place)
            self.pools[place].release(slot[rows])
            slot[rows] = -1

    def _release_stale(self, rows: Rows) -> None:
        """Old copies of pages that have become idle."""
        table = self.table
        rows = rows[((table.flags[rows] & STALE) != 0) & (table.busy[rows] == 0)]
        if len(rows):
            table.flags[rows] &= ~STALE
            for place in (HOST, NVME):
                self._release_slots(rows[table.slot(place)[rows] >= 0], place)

    def _leaving(self, place: Place) -> int:
        """Pages on their way out of a tier."""
        if self.is_idle():
            return 0
        leaving = 0
        for opened in self._open.values():
            for step in opened.plan.steps:
                if isinstance(step, Copy) and step.src == place < step.dst:
                    leaving += int((self.table.move[step.pages] == opened.plan.id).sum())
                elif isinstance(step, Drop):
                    pages = self.table.pages(step.units)
                    leaving += int((self.table.at[pages] == int(place)).sum())
        return leaving + int((self.table.at[self._doomed] == place).sum())

    def _yielding(self, place: Place) -> int:
        """Used slots of a lower tier that will be free before long, or spares: those of pages on
        their way out, and those into which pages are copied that stay where they are."""
        spares = sum(len(step.pages) for step in self._copies(place) if step.stays)
        return self._leaving(place) + spares

    def _copies(self, dst: Place) -> list[Copy]:
        """Copies to a tier that are under way."""
        steps = (step for opened in self._open.values() for step in opened.plan.steps)
        return [step for step in steps if isinstance(step, Copy) and step.dst == dst]

    def _storing(self) -> int:
        return sum(len(step.pages) for step in self._copies(NVME))

    def _mark(self, place: Place, which: Literal["high", "low"]) -> float:
        return float(getattr(self.marks[place], which) * self._allowed(place))

    def _target(self, place: Place, which: Literal["high", "low"]) -> float:
        """The mark above which pages leave ahead of need; the headroom is free below it."""
        mark, allowed = self._mark(place, which), self._allowed(place)
        return min(mark, self._below_headroom(allowed)) if place == GPU else mark

    def _below_headroom(self, frames: int) -> int:
        """Of so many frames, those that are not the headroom."""
        return frames - min(self.headroom, frames // 2)

    def _allowed(self, place: Place) -> int:
        """Slots that may be used: those that there are, up to the limit."""
        capacity = self.pools[place].capacity
        return min(capacity, self.limits.get(place, capacity))

    def _cut(self, rows: Rows, n: int) -> tuple[Rows, Rows]:
        """(at most n pages, the rest), never cutting through a unit."""
        unit = self.table.unit
        while 0 < n < len(rows) and unit[rows[n]] == unit[rows[n - 1]]:
            n -= 1
        return rows[:n], rows[n:]

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
        if step.dst != AT_GPU and (isinstance(error, TierFailed) or self._failures[route] >= 8):
            self.failed_tiers.add(step.dst)


def copies(plan: Plan) -> bool:
    return any(isinstance(step, Copy) for step in plan.steps)


def pages_of(step: Step) -> Rows:
    match step:
        case Copy() | Show() | ShowInPlace() | Hide():
            return step.pages
        case _:
            return _NO_ROWS


def either(a: Mask | None, b: Mask) -> Mask | None:
    return b if a is None and b.any() else a if a is None else a | b
