"""The way down: pages leave the GPU and the host, are dropped, freed and reaped.

A page leaves for the nearest tier that has room; clean pages with a spare step down at no cost;
from the last tier a unit leaves through `Drop`, so that its owner hears of it first.
"""

from __future__ import annotations

import numpy as np

from tiermem.books import Books
from tiermem.plan import Copy, Drop, Hide, Plan, Step
from tiermem.table import (
    DIRTY,
    DOOMED,
    IS_FRAME,
    IS_HIDING,
    IS_IN_PLACE,
    IS_NOTHING,
    IS_RETIRED,
    LABELLED,
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
    PASSED,
    TIERS,
    Mask,
    Place,
    Slots,
)

_NO_SLOTS = np.empty(0, np.int32)
_PIECE = 64
"""Frames that are hidden in one go to be given back: the first lose their memory meanwhile."""

SPARE_SHARE = 0.25
"""Of NVMe, for spares; docs/design.md says why."""


class Descent(Books):
    """Verbs that make room below and take pages there."""

    def short_of_limit(self, place: Place) -> int:
        """Slots that the limit allows beyond those that are there."""
        capacity = self.pools[place].capacity
        return self.limits.get(place, capacity) - capacity

    def surrender(self) -> Slots:
        """Free GPU frames above the limit leave the pool, for their memory to be given back."""
        pool = self.pools[GPU]
        above = pool.capacity - self.limits.get(GPU, pool.capacity)
        return pool.remove(above) if above > 0 else _NO_SLOTS

    def _give_back(self) -> list[Plan]:
        """Hide retired frames above the GPU's limit, so that they can be given back."""
        pool = self.pools[GPU]
        excess = pool.capacity - self.limits.get(GPU, pool.capacity) - pool.free
        if excess <= 0:
            return []
        rows, frames = self._take_kept(GPU, excess)
        return [
            self._begin([self._hide_unowned(rows[i : i + _PIECE], frames[i : i + _PIECE])])
            for i in range(0, len(rows), _PIECE)
        ]

    def _push_down(self, place: Place, n: int, now: int, *, awaited: bool = False) -> list[Plan]:
        """Start n pages of a tier on their way down, as its policy ranks them.

        awaited: somebody waits for their frames.
        """
        plans: list[Plan] = []
        while n > 0:
            victims = self.rankings[place].victims(-(-n // self.table.max_unit_pages), now)
            if not len(victims):
                break
            rows = self.table.pages(victims)
            moved = self._leave(place, rows, now, awaited)
            plans += moved
            n -= len(rows)
            if not moved and self.table.movable(victims, place).any():
                break
        return plans

    def _drop_ranked(self, place: Place, n: int, now: int) -> list[Plan]:
        """Drop n pages of a tier, or somewhat more, as its policy ranks them."""
        victims = self.rankings[place].victims(-(-n // self.table.max_unit_pages), now)
        return self._drop(self.table.pages(victims), now, "evicted")

    def _leave(self, place: Place, rows: Rows, now: int, awaited: bool) -> list[Plan]:
        match place:
            case Place.GPU:
                return self._leave_gpu(rows, now, may_drop=True, awaited=awaited)
            case Place.HOST:
                return self._leave_host(rows, now)
            case _:
                return self._drop(rows, now, "evicted")

    def _leave_gpu(
        self, rows: Rows, now: int, *, may_drop: bool, awaited: bool = False
    ) -> list[Plan]:
        """To the host if it has room; straight to NVMe if not; dropped if nothing is below.

        A page that has a host spare steps down at once. Pages left over stay until the host has
        room, which is made here.
        """
        table = self.table
        clean = (table.flags[rows] & DIRTY) == 0
        spare = clean & (table.slot(HOST)[rows] >= 0)
        plans = self._step_down(rows[spare], GPU, HOST, now)
        more, rest, _ = self._start(rows[~spare], GPU, HOST, now)
        plans += more
        if not len(rest):
            return plans
        clean = (table.flags[rest] & DIRTY) == 0
        spare = clean & (table.slot(NVME)[rest] >= 0)
        plans += self._step_down(rest[spare], GPU, NVME, now)
        rest, refused = rest[~spare], _NO_SLOTS
        if self.backlog is None or not self._takes_any_unit(HOST):  # else frames wait for no drive
            more, rest, refused = self._start(rest, GPU, NVME, now)
            plans += more
        if self._usable(HOST):
            short = len(rest) + len(refused)
            if awaited and self.backlog is not None and self._usable(NVME, HOST):
                # What leaves the host for the drive is no room that comes soon.
                short += max(0, self.backlog - self._storing())
            else:
                short -= self._yielding(HOST)
            return plans + (self._push_down(HOST, short, now) if short > 0 else [])
        if may_drop:
            plans += self._drop(self._droppable(refused), now, "not-admitted")
            if not self._usable(NVME, GPU):
                plans += self._drop(self._droppable(rest), now, "evicted")
        return plans

    def _droppable(self, rows: Rows) -> Rows:
        """In order, a page that is dropped is vacant at once: its owner may give it out again."""
        if not self.in_order:
            return rows
        return rows[self.table.fences.is_passed(self.table.fence[rows])]

    def _leave_host(self, rows: Rows, now: int) -> list[Plan]:
        table = self.table
        spare = table.slot(NVME)[rows] >= 0
        read = spare & (table.shown[rows] == IS_IN_PLACE)
        plans = self._step_down(rows[spare & ~read], HOST, NVME, now)
        if read.any():  # once that is done they can step down
            plans.append(self._begin([self._hide(rows[read], _NO_SLOTS)]))
        more, rest, refused = self._start(rows[~spare], HOST, NVME, now)
        plans += more
        plans += self._drop(refused, now, "not-admitted")
        if len(rest) and not self._usable(NVME, HOST):
            plans += self._drop(rest, now, "evicted")
        return plans

    def _usable(self, dst: Place, src: Place = GPU) -> bool:
        """Whether pages can be stored in a tier at all, room or not."""
        return (
            (self.pools[dst].capacity > 0 or dst in self.growing)
            and dst not in self.failed_tiers
            and (src, dst) in self.routes
        )

    def _takes_any_unit(self, dst: Place) -> bool:
        """Whether a unit of the GPU finds room in a tier, sooner or later."""
        return self._usable(dst) and self._allowed(dst) >= self.table.max_unit_pages

    def _start(self, rows: Rows, src: Place, dst: Place, now: int) -> tuple[list[Plan], Rows, Rows]:
        """Begin to copy as many of these pages down as `dst` has slots for.

        (plans, pages without a slot, pages that are not to be written to NVMe)
        """
        if not len(rows) or not self._usable(dst, src):
            return [], rows, _NO_SLOTS
        refused = _NO_SLOTS
        if dst == AT_NVME and self.admission is not None:
            rows, refused = self._ask_admission(rows, now)
        if dst == AT_NVME and self.backlog is not None:
            rows, late = self._cut(rows, max(0, self.backlog - self._storing()))
            self.counts["outpaced"] += len(late)
            refused = np.concatenate([refused, late])
        if not len(rows):
            return [], rows, refused
        plans, slots = self._lower_slots(dst, len(rows), now)
        rows, rest = self._cut(rows, len(slots))
        pool = self.pools[dst]
        pool.release(slots[len(rows) :])
        slots = slots[: len(rows)]
        if not len(rows):
            return plans, rest, refused
        table = self.table
        if self._admitted and dst == AT_NVME:
            self._admitted.difference_update(table.heads(rows).tolist())
        plan = self._copy_down(rows, src, dst, slots)
        table.to[rows] = int(dst)
        table.move[rows] = plan.id
        return [*plans, plan], rest, refused

    def _copy_down(
        self, rows: Rows, src: Place, dst: Place, slots: Slots, *, stays: bool = False
    ) -> Plan:
        """Begin to copy pages into slots that were taken for them; claims none of the pages."""
        table, pool = self.table, self.pools[dst]
        pool.owner[slots] = rows
        pool.tenant[slots] = table.tenant[rows]
        after = table.fences.point(table.fence[rows]) if src == AT_GPU else PASSED
        steps: list[Step] = []
        if src == AT_HOST and not stays:
            read = rows[table.shown[rows] == IS_IN_PLACE]
            steps = [self._hide(read, _NO_SLOTS)] if len(read) else steps
        source = table.slot(src)[rows].copy()
        return self._begin([*steps, Copy(src, dst, rows, source, slots, after, stays)])

    def _ask_admission(self, rows: Rows, now: int) -> tuple[Rows, Rows]:
        """(pages that may be written to NVMe, those that may not). A yes holds until used."""
        assert self.admission is not None
        table, yes = self.table, self._admitted
        heads = table.heads(rows)
        asked = heads[[head not in yes for head in heads.tolist()]]
        no = asked[~self.admission.admit(asked, now)]
        yes.update(asked[~np.isin(asked, no)].tolist())
        bad = np.isin(table.unit[rows], no)
        self.counts["not_admitted"] += int(bad.sum())
        return rows[~bad], rows[bad]

    def _lower_slots(self, place: Place, n: int, now: int) -> tuple[list[Plan], Slots]:
        """Up to n slots of a lower tier, and plans that make more room there for later.

        The host gives all spares away first. On NVMe each saves a write, so a part of it stays
        spares as long as pages may leave; above that they go before what is nowhere else.
        """
        pool = self.pools[place]
        slots = pool.take_free(min(n, pool.free))
        if place == AT_NVME and len(slots) < n:
            over = max(0, pool.kept - int(SPARE_SHARE * pool.capacity))
            slots = self._add_spares(slots, min(n, len(slots) + over), place)
            short, coming = n - len(slots), self._leaving(place)
            plans = self._push_down(place, short - coming, now) if short else []
            if plans or (short and coming):
                return plans, slots
        return [], self._add_spares(slots, n, place)

    def _add_spares(self, slots: Slots, n: int, place: Place) -> Slots:
        """Up to n used slots: these, and those of the oldest spares."""
        short = n - len(slots)
        if short <= 0:
            return slots
        _, kept = self._take_kept(place, short)
        self.pools[place].release(kept[short:])
        return np.concatenate([slots, kept[:short]])

    def _step_down(self, rows: Rows, src: Place, dst: Place, now: int) -> list[Plan]:
        """Clean pages with a spare in `dst` rest there from now on, without a transfer."""
        if self.eager and src == AT_GPU:
            rows = rows[self.table.fences.is_passed(self.table.fence[rows])]
        if not len(rows):
            return []
        self.pools[dst].reuse(self.table.slot(dst)[rows])
        self._moved(rows, dst, now)
        self.counts["stepped_down"] += len(rows)
        if src == AT_GPU:
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
        # A copy that nobody claims is a spare only if nobody wrote since it began (invariant 6).
        late = ~live & whole & (table.gen[rows] == gens) & (slot[rows] < 0)
        late &= (table.flags[rows] & (DOOMED | STALE)) == 0
        late &= (table.at[rows] != AT_NONE) & (table.at[rows] < int(dst))
        spares = rows[late]
        slot[spares] = step.dst_slots[late]
        table.flags[spares] &= ~DIRTY
        pool = self.pools[dst]
        pool.keep(step.dst_slots[late])
        pool.release(step.dst_slots[~(commit | late)])
        self._release_stale(rows)
        self.counts[f"{step.src.name}_{dst.name}".lower()] += len(landed)
        if step.stays:
            self.counts["backed_up" if dst == AT_NVME else "cleaned"] += len(spares)
        else:
            self.counts["late_spares"] += len(spares)
        if dst == AT_NVME:
            self._note_stored(rows[commit | late])
            self._note_unsaved(rows)
        if step.src == AT_GPU:
            return self._retire(landed)
        if dst == AT_NVME:
            self._release_slots(landed, HOST)
        else:
            self.pools[NVME].keep(table.slot(NVME)[landed])
            return self._read_failed(rows[live & ~whole], NVME, now)
        return []

    def _stage(self, rows: Rows, now: int) -> list[Plan]:
        """NVMe to host, into free slots only."""
        pool = self.pools[HOST]
        if not self._usable(HOST, NVME):
            return []
        room = min(pool.free, int(self._mark(HOST, "high")) - pool.used)
        rows, _ = self._cut(rows, max(room, 0))
        return self._start(rows, NVME, HOST, now)[0]

    def _read_failed(self, rows: Rows, src: Place, now: int) -> list[Plan]:
        """Pages that could not be read: fall back to the spare; with none, a disk page is LOST."""
        table = self.table
        if not len(rows):
            return []
        self.counts["failed_reads"] += len(rows)
        if src == AT_HOST:
            spare = rows[(table.slot(NVME)[rows] >= 0) & (table.busy[rows] == 0)]
            return self._step_down(spare, HOST, NVME, now)
        self._leave_tier(NVME, rows, now)
        self._release_slots(rows, NVME)
        table.at[rows] = AT_LOST
        table.flags[rows] &= ~LABELLED
        self.counts["lost"] += len(rows)
        return [self._begin([Drop(table.heads(rows), "lost")])]

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
        at = table.at[rows]
        for place in TIERS:
            here = at == int(place)
            if place == GPU:
                here |= (at == AT_LOST) & (table.to[rows] == AT_GPU)
            if here.any():
                self._leave_tier(place, rows[here], now)
        self._cancel(rows)
        table.flags[rows] = (table.flags[rows] & ~LABELLED) | DOOMED

    def _doom_rows(self, rows: Rows) -> None:
        self.table.flags[rows] |= DOOMED
        self._doomed = np.concatenate([self._doomed, rows]) if len(self._doomed) else rows

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
        read = rows[table.shown[rows] == IS_IN_PLACE] if self.crossover else _NO_SLOTS
        if len(read):
            plans.append(self._begin([self._hide(read, _NO_SLOTS)]))
            if not self.in_order:  # the slot is the page's until the address shows nothing
                self._doomed = np.concatenate([self._doomed, read])
                rows = rows[table.shown[rows] != IS_HIDING]
        shown = rows[table.shown[rows] == IS_FRAME]
        if self.eager and len(shown):
            hide = self._hide_unowned(shown, table.slot(GPU)[shown])
            plans.append(self._begin([hide]))
            if not self.in_order:
                table.at[shown] = AT_LOST
                table.flags[shown] = DOOMED
                self._doomed = np.concatenate([self._doomed, shown])
                rows = rows[table.shown[rows] != IS_HIDING]
        self._vacate(rows)
        return plans

    def _vacate(self, rows: Rows) -> None:
        """Idle pages become NONE; a frame that is still shown is retired, empty."""
        table, n, where = self.table, len(rows), span(rows)
        dirty = (table.flags[where] & (DIRTY | STALE)) == DIRTY  # these have no copy below
        for place in () if np.count_nonzero(dirty) == n else (HOST, NVME):
            held = table.slot(place)[rows] >= 0
            if held.any():
                self._release_slots(rows[held], place)
        frame = table.shown[where] == IS_FRAME
        shown = where if np.count_nonzero(frame) == n else rows[frame]
        self.pools[GPU].keep(table.slot(GPU)[shown])
        table.shown[shown] = IS_RETIRED
        if self.admission is not None:
            heads = table.heads(rows)
            self.admission.gone(heads)
            self._admitted.difference_update(heads.tolist())
        if self.gauge is not None:
            self.gauge.gone(rows)
        table.at[where] = AT_NONE
        table.flags[where] = 0
        table.fence[where] = 0
        table.reads[where] = 0
        table.parent[where] = -1
        self._reaped.append(rows)

    def _rests_idle(self, rows: Rows) -> bool:
        """True if all of these pages are on the GPU, and nothing is under way or queued with any.

        Then nobody uses, awaits or moves them either: that pins a page, or makes it busy.
        """
        table, where = self.table, span(rows)
        if np.count_nonzero(table.at[where] != AT_GPU):
            return False
        if np.count_nonzero(table.pins[where]) or np.count_nonzero(table.busy[where]):
            return False
        return table.fences.all_passed or bool(table.fences.is_passed(table.fence[where]).all())

    def _settle_hide(self, step: Hide, bad: Mask | None) -> None:
        if not self.in_order:
            table, where = self.table, span(step.pages)
            table.busy[where] -= 1
            table.shown[where] = IS_NOTHING
            self._release_stale(step.pages)
        if len(step.frees):
            self.pools[GPU].release(step.frees)
        if bad is not None and bad.any():
            self.failed_tiers.add(GPU)
