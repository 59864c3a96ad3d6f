"""The short ways of verbs for one page, which a scalar at a time costs a third of its array's way.

Each does what the verb does, where that is simple, or says that it is not; the verb then takes the
long way. NumPy asks 1-2 us for anything about an array of one, and a fault is 60 such things.
"""

from __future__ import annotations

import numpy as np

from tiermem.inplace import InPlace
from tiermem.plan import Copy, Hide, Plan, Request, Show, Step, Zero
from tiermem.table import (
    DIRTY,
    DOOMED,
    IS_FRAME,
    IS_HIDING,
    IS_NOTHING,
    IS_RETIRED,
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
    Slots,
)

_DIRTY, _DOOMED, _ORDERED, _STALE = int(DIRTY), int(DOOMED), int(ORDERED), int(STALE)
_BARRED = _DOOMED | _STALE


class Single(InPlace):
    """Called with the one row of a unit of one page."""

    def _load_one(self, rows: Rows, request: Request, order: bool) -> bool:
        """`fault` of a page that rests below, shows nothing, and finds a free frame."""
        table, row = self.table, rows.item()
        at, flags = table.at.item(row), table.flags.item(row)
        if at not in (AT_HOST, AT_NVME) or table.to.item(row) or flags & _DOOMED:
            return False
        if table.shown.item(row) != IS_NOTHING or self.gauge is not None:
            return False
        if not self._is_room():
            return False
        frames, steps = self._frame(row)
        src = HOST if at == AT_HOST else NVME
        copy = Copy(src, GPU, rows, table.slot(src)[rows], frames, PASSED)
        plan = self._begin([*steps, copy, Show(rows, frames)])
        table.to[row] = AT_GPU
        table.move[row] = plan.id
        table.reads[row] = 0
        self._follow(plan, request)
        self.counts["faulted"] += 1
        request.taken = True
        if order and at == AT_HOST:
            table.flags[row] = flags | _ORDERED
        if request.pins and order and at == AT_HOST:
            table.pins[row] += 1
        elif request.pins:
            table.waiters[row] += 1
        return True

    def _land_one(self, step: Copy, plan_id: int, now: int) -> bool:
        """`_land_up` of a load that ended well and is still wanted."""
        table, row = self.table, step.pages.item()
        flags = table.flags.item(row)
        if table.move.item(row) != plan_id or flags & _BARRED or self.gauge is not None:
            return False
        table.busy[row] -= 1
        table.to[row] = 0
        table.move[row] = 0
        table.slot(GPU)[row] = step.dst_slots.item()
        table.shown[row] = IS_FRAME
        self.pools[step.src].keep(table.slot(step.src)[step.pages])
        self.rankings[step.src].removed(step.pages, now)
        table.at[row] = AT_GPU
        self.rankings[GPU].inserted(step.pages, None, now)
        table.pins[row] += table.waiters.item(row)
        table.waiters[row] = 0
        table.flags[row] = flags & ~_ORDERED
        return True

    def _allocate_one(self, rows: Rows, request: Request) -> bool:
        """`allocate` of a page whose frame is still shown, or that finds a free one; its policy is
        told by the verb."""
        table, row = self.table, rows.item()
        shown = table.shown.item(row)
        if table.at.item(row) or table.busy.item(row) or shown not in (IS_RETIRED, IS_NOTHING):
            return False
        if shown == IS_NOTHING and not self._is_room():
            return False
        table.gen[row] += np.uint32(1)
        table.stamp[row] = self._stamp
        self._stamp += 1
        request.taken = True
        if shown == IS_RETIRED:
            self.pools[GPU].reuse(table.slot(GPU)[rows])
            table.shown[row] = IS_FRAME
            table.at[row] = AT_GPU
            table.flags[row] = DIRTY
            return True
        frames, steps = self._frame(row)
        table.at[row] = AT_LOST
        plan = self._begin([*steps, Show(rows, frames)])
        table.busy[row] += 1
        table.to[row] = AT_GPU
        table.move[row] = plan.id
        self._follow(plan, request)
        return True

    def _is_room(self) -> bool:
        """Whether a frame is free within the limit."""
        pool = self.pools[GPU]
        return bool(pool.free) and pool.free + self._allowed(GPU) > pool.capacity

    def _frame(self, row: int) -> tuple[Slots, list[Step]]:
        """A free frame for this page, and what must be done with it first."""
        pool, tenant = self.pools[GPU], self.table.tenant.item(row)
        frames = pool.take_free(1)
        frame = frames.item()
        pool.owner[frame] = row
        if pool.tenant.item(frame) == tenant:
            return frames, []
        pool.tenant[frame] = tenant
        return frames, [Zero(frames)]

    def _land_blank_one(self, step: Show, plan_id: int) -> bool:
        """`_settle_blank` of a page that was shown and is still wanted."""
        table, row = self.table, step.pages.item()
        flags = table.flags.item(row)
        if table.move.item(row) != plan_id or flags & _BARRED:
            return False
        table.busy[row] -= 1
        table.to[row] = 0
        table.move[row] = 0
        table.slot(GPU)[row] = step.frames.item()
        table.shown[row] = IS_FRAME
        table.at[row] = AT_GPU
        table.flags[row] = flags | _DIRTY
        table.pins[row] += table.waiters.item(row)
        table.waiters[row] = 0
        return True

    def _free_one(self, rows: Rows, now: int) -> list[Plan] | None:
        """`free` of a page that rests on the GPU, has no copy below and no work behind it."""
        table, row = self.table, rows.item()
        if table.at.item(row) != AT_GPU or table.to.item(row) or table.busy.item(row):
            return None
        if table.pins.item(row) or table.waiters.item(row) or table.flags.item(row) & _BARRED:
            return None
        if table.slot(HOST).item(row) >= 0 or table.slot(NVME).item(row) >= 0:
            return None
        if self.admission is not None or self.gauge is not None or (self.eager and self.in_order):
            return None
        if not table.fences.all_passed and not table.fences.is_passed(table.fence[rows]).all():
            return None
        self.rankings[GPU].removed(rows, now)
        frames = table.slot(GPU)[rows]
        if not self.eager:
            self.pools[GPU].keep(frames)
            table.shown[row] = IS_RETIRED
            self._vacate_one(rows)
            return []
        self.pools[GPU].owner[frames.item()] = -1
        table.slot(GPU)[row] = -1
        table.shown[row] = IS_HIDING
        table.busy[row] += 1
        table.at[row] = AT_LOST
        table.flags[row] = DOOMED
        self._doomed = np.concatenate([self._doomed, rows]) if len(self._doomed) else rows
        return [self._begin([Hide(rows, frames)])]

    def _land_hidden_one(self, step: Hide) -> bool:
        """`_settle_hide` of the only page that is doomed: it is vacant now."""
        table, row = self.table, step.pages.item()
        if len(self._doomed) != 1 or self._doomed.item() != row or self.in_order:
            return False
        if table.busy.item(row) != 1 or table.flags.item(row) != _DOOMED or len(step.frees) != 1:
            return False
        if table.slot(HOST).item(row) >= 0 or table.slot(NVME).item(row) >= 0:
            return False
        if self.admission is not None or self.gauge is not None or table.fence.item(row):
            return False
        table.busy[row] = 0
        table.shown[row] = IS_NOTHING
        self.pools[GPU].release(step.frees)
        self._doomed = self._doomed[:0]
        self._vacate_one(step.pages)
        return True

    def _vacate_one(self, rows: Rows) -> None:
        table, row = self.table, rows.item()
        table.at[row] = AT_NONE
        table.flags[row] = 0
        table.fence[row] = 0
        table.reads[row] = 0
        table.parent[row] = -1
        self._reaped.append(rows)
