"""The host tier gets smaller at its end: what lies there moves into slots below, or is given up.

A pool of chunks gives memory back from its end only (`host/pinned.py`), and pages lie anywhere. So
spares beyond the new end are given up, pages beyond it are copied into free slots before it, and a
slot leaves the pool as soon as it is free (`SlotPool.bound`). Such a copy claims no page: who wants
one takes it from where it is, and then the copy was for nothing. How many pages may stay is not
decided here: the limit of the tier says so, and `relieve` moves the others down.
"""

from __future__ import annotations

import numpy as np

from tiermem.books import either
from tiermem.plan import Copy, Plan
from tiermem.single import Single
from tiermem.table import IS_IN_PLACE, STALE, Rows
from tiermem.tier import HOST, PASSED, Mask, Slots

_NO_SLOTS = np.empty(0, np.int32)


class Compaction(Single):
    """Verbs that end the host tier at a slot."""

    def confine(self, slots: int, now: int) -> list[Plan]:
        """End the host tier at a slot: it has slots [0, slots), which bytes stand behind.

        A later call with more makes it larger again. Call it again and again until `host_end` has
        come down to `slots`: pages in use stay where they are until they are let go.
        """
        self.limits[HOST] = slots
        self.pools[HOST].bound(slots)
        if (HOST, HOST) not in self.routes:
            return []
        self._give_up_spares(slots)
        beyond = self._beyond(slots)
        read = beyond[self.table.shown[beyond] == IS_IN_PLACE]
        if len(read):
            return [self._begin([self._hide(read, _NO_SLOTS)])]
        moving = sum(len(step.pages) for step in self._moving_within())
        rows, _ = self._cut(beyond, max(0, self.batch - moving))
        dst = self._slots_before(len(rows))
        rows, _ = self._cut(rows, len(dst))
        self.pools[HOST].release(dst[len(rows) :])
        if len(rows):
            return [self._move_within(rows, dst[: len(rows)])]
        settled = not moving and not self._leaving(HOST) and self.pools[HOST].used <= slots
        if len(beyond) and settled:
            # Less room than one unit takes, in pieces: `relieve` will not make more.
            return self._leave_host(self._first_unit(beyond), now)
        return []

    def host_end(self) -> int:
        """One more than the last slot of the host tier that may still hold or receive bytes."""
        pool = self.pools[HOST]
        owned = np.flatnonzero(pool.owner >= 0)
        return max(pool.end, int(owned[-1]) + 1 if len(owned) else 0)

    def _give_up_spares(self, slots: int) -> None:
        """Release idle copies beyond the end; of a unit, all copies or none."""
        pool, table = self.pools[HOST], self.table
        kept = pool.oldest_kept()
        rows = pool.owner[kept[kept >= slots]]
        rows = table.pages(table.heads(rows[self._is_idle(rows, HOST)]))
        if len(rows):
            self._release_slots(rows, HOST)

    def _beyond(self, slots: int) -> Rows:
        """Idle pages, of whole units, of which one lies beyond the end at least."""
        table = self.table
        owners = self.pools[HOST].owner[slots:]
        heads = table.heads(owners[owners >= 0])
        rows: Rows = table.pages(heads[table.movable(heads, HOST)])
        return rows

    def _first_unit(self, rows: Rows) -> Rows:
        unit: Rows = rows[self.table.unit[rows] == self.table.unit[rows[0]]]
        return unit

    def _slots_before(self, n: int) -> Slots:
        """Up to n slots, all before the end: free ones, then those of the oldest spares."""
        pool = self.pools[HOST]
        slots = pool.take_free(min(n, pool.free))
        if len(slots) < n:
            _, kept = self._take_kept(HOST, n - len(slots))
            inside: Mask = kept < pool.end
            pool.release(kept[~inside])
            slots = np.concatenate([slots, kept[inside]])
            pool.release(slots[n:])
        return slots[:n]

    def _move_within(self, rows: Rows, dst: Slots) -> Plan:
        table, pool = self.table, self.pools[HOST]
        pool.owner[dst] = rows
        pool.tenant[dst] = table.tenant[rows]
        src = table.slot(HOST)[rows].copy()
        return self._begin([Copy(HOST, HOST, rows, src, dst, PASSED, stays=True)])

    def _land_within(self, step: Copy, gens: np.ndarray | None, bad: Mask | None) -> None:
        """A copy within the host tier ended: the page has its new slot, unless somebody came."""
        table, rows = self.table, step.pages
        table.busy[rows] -= 1
        missed = self._whole_units(rows, either(bad, ~self._is_still_there(step, gens)))
        good = np.ones(len(rows), np.bool_) if missed is None else ~missed
        slot, landed = table.slot(HOST), rows[good]
        left = np.concatenate([slot[landed], step.dst_slots[~good]])
        slot[landed] = step.dst_slots[good]
        self.pools[HOST].release(left)
        self._release_stale(rows)
        self.counts["host_host"] += len(landed)

    def _is_still_there(self, step: Copy, gens: np.ndarray | None) -> Mask:
        """bool[n]: pages that rest where they were, unwritten, and that nobody reads there."""
        table, rows = self.table, step.pages
        rests = table.movable(rows, HOST) & (table.shown[rows] != IS_IN_PLACE)
        same = (table.gen[rows] == gens) & (table.slot(HOST)[rows] == step.src_slots)
        return np.asarray(rests & same & ((table.flags[rows] & STALE) == 0))

    def _moving_within(self) -> list[Copy]:
        steps = (step for opened in self._open.values() for step in opened.plan.steps)
        return [s for s in steps if isinstance(s, Copy) and s.src == HOST and s.dst == HOST]
