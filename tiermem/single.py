"""The short ways of verbs for one page, which a scalar at a time costs a third of its array's way.

Each does what the verb does, where that is simple, or says that it is not; the verb then takes the
long way. NumPy asks 1-2 us for anything about an array of one, and a fault is 60 such things.
"""

from __future__ import annotations

import numpy as np

from tiermem.inplace import InPlace
from tiermem.plan import Copy, Request, Show, Step, Zero
from tiermem.table import (
    DIRTY,
    DOOMED,
    IS_FRAME,
    IS_NOTHING,
    IS_RETIRED,
    ORDERED,
    STALE,
    Rows,
)
from tiermem.tier import AT_GPU, AT_HOST, AT_NONE, AT_NVME, GPU, HOST, NVME, PASSED

_DOOMED, _ORDERED, _STALE = int(DOOMED), int(ORDERED), int(STALE)
_BARRED = _DOOMED | _STALE


class Single(InPlace):
    """Called with the one row of a unit of one page."""

    def _load_one(self, rows: Rows, request: Request, order: bool) -> bool:
        """`fault` of a page that rests below, shows nothing, and finds a free frame."""
        table, pool, row = self.table, self.pools[GPU], rows.item()
        at, flags = table.at.item(row), table.flags.item(row)
        if at not in (AT_HOST, AT_NVME) or table.to.item(row) or flags & _DOOMED:
            return False
        if table.shown.item(row) != IS_NOTHING or self.gauge is not None:
            return False
        if pool.free + self._allowed(GPU) - pool.capacity < 1 or not pool.free:
            return False
        frames = pool.take_free(1)
        frame, tenant = frames.item(), table.tenant.item(row)
        pool.owner[frame] = row
        steps: list[Step] = []
        if pool.tenant.item(frame) != tenant:
            pool.tenant[frame] = tenant
            steps.append(Zero(frames))
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

    def _allocate_one(self, rows: Rows) -> bool:
        """`allocate` of a page whose frame is still shown; its policy is told by the verb."""
        table, row = self.table, rows.item()
        if table.at.item(row) or table.shown.item(row) != IS_RETIRED:
            return False
        self.pools[GPU].reuse(table.slot(GPU)[rows])
        table.shown[row] = IS_FRAME
        table.gen[row] += np.uint32(1)
        table.at[row] = AT_GPU
        table.flags[row] = DIRTY
        table.stamp[row] = self._stamp
        self._stamp += 1
        return True

    def _free_one(self, rows: Rows, now: int) -> bool:
        """`free` of a page that rests on the GPU, has no copy below and no work behind it."""
        table, row = self.table, rows.item()
        if table.at.item(row) != AT_GPU or table.to.item(row) or table.busy.item(row):
            return False
        if table.pins.item(row) or table.waiters.item(row) or table.flags.item(row) & _BARRED:
            return False
        if table.slot(HOST).item(row) >= 0 or table.slot(NVME).item(row) >= 0:
            return False
        if self.eager or self.admission is not None or self.gauge is not None:
            return False
        if not table.fences.all_passed and not table.fences.is_passed(table.fence[rows]).all():
            return False
        self.rankings[GPU].removed(rows, now)
        self.pools[GPU].keep(table.slot(GPU)[rows])
        table.shown[row] = IS_RETIRED
        table.at[row] = AT_NONE
        table.flags[row] = 0
        table.fence[row] = 0
        table.reads[row] = 0
        table.parent[row] = -1
        self._reaped.append(rows)
        return True
