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
    IS_IN_PLACE,
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
    Place,
    Slots,
)

_DIRTY, _DOOMED, _ORDERED, _STALE = int(DIRTY), int(DOOMED), int(ORDERED), int(STALE)
_BARRED = _DOOMED | _STALE
_NO_SLOTS: Slots = np.empty(0, np.int32)


class Single(InPlace):
    """Called with the one row of a unit of one page."""

    def _load_one(self, rows: Rows, request: Request, order: bool, now: int) -> bool:
        """`fault` of a page that rests below and finds a frame: its own, a free or a stolen one."""
        table, row = self.table, rows.item()
        at, flags = table.at.item(row), table.flags.item(row)
        if at not in (AT_HOST, AT_NVME) or table.to.item(row) or flags & _DOOMED:
            return False
        if self.gauge is not None:
            return False
        src = HOST if at == AT_HOST else NVME
        shown = table.shown.item(row)
        if shown == IS_RETIRED:
            return self._return_one(rows, src, request, now)
        found = self._frame(row) if shown == IS_NOTHING else None
        if found is None:
            return False
        frames, steps = found
        copy = Copy(src, GPU, rows, table.slot(src)[row : row + 1].copy(), frames, PASSED)
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

    def _return_one(self, rows: Rows, src: Place, request: Request, now: int) -> bool:
        """`_take_back` of a page whose old frame still shows its bytes, where that is no more than
        the limit allows."""
        table, row, pool = self.table, rows.item(), self.pools[GPU]
        passed = table.fences.all_passed
        if not (passed or table.fences.has_passed(table.fence.item(row))):
            return False
        others = pool.kept - 1 if passed else 0
        if pool.free + others + self._allowed(GPU) < pool.capacity:
            return False
        self._found_room()
        pool.reuse_one(table.slot(GPU).item(row))
        table.shown[row] = IS_FRAME
        self._arrive_one(rows, src, now)
        self.counts["taken_back"] += 1
        self.counts["faulted"] += 1
        request.taken = True
        if request.pins:
            table.pins[row] += 1
        return True

    def _arrive_one(self, rows: Rows, src: Place, now: int) -> None:
        """The bytes of a page of a lower tier are in its frame, too, and that one counts now."""
        table, row = self.table, rows.item()
        self.pools[src].keep(table.slot(src)[row : row + 1])
        self.rankings[src].removed(rows, now)
        table.at[row] = AT_GPU
        self.rankings[GPU].inserted(rows, None, now)

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
        self._arrive_one(step.pages, step.src, now)
        table.pins[row] += table.waiters.item(row)
        table.waiters[row] = 0
        table.flags[row] = flags & ~_ORDERED
        return True

    def _allocate_one(self, rows: Rows, request: Request) -> bool:
        """`allocate` of a page whose frame is still shown, or that finds another; its policy is
        told by the verb."""
        table, row = self.table, rows.item()
        shown = table.shown.item(row)
        if table.at.item(row) or table.busy.item(row) or shown not in (IS_RETIRED, IS_NOTHING):
            return False
        found = self._frame(row) if shown == IS_NOTHING else None
        if shown == IS_NOTHING and found is None:
            return False
        table.gen[row] += np.uint32(1)
        table.stamp[row] = self._stamp
        self._stamp += 1
        request.taken = True
        if found is None:
            self.pools[GPU].reuse_one(table.slot(GPU).item(row))
            table.shown[row] = IS_FRAME
            table.at[row] = AT_GPU
            table.flags[row] = DIRTY
            return True
        frames, steps = found
        table.at[row] = AT_LOST
        plan = self._begin([*steps, Show(rows, frames)])
        table.busy[row] += 1
        table.to[row] = AT_GPU
        table.move[row] = plan.id
        self._follow(plan, request)
        return True

    def _frame(self, row: int) -> tuple[Slots, list[Step]] | None:
        """A frame for this page, free or retired, and what must be done with it first.

        None: within the limit there is none that is surely idle.
        """
        pool, tenant = self.pools[GPU], self.table.tenant.item(row)
        over = pool.capacity - self._allowed(GPU)
        steps: list[Step] = []
        if pool.free > over:
            frame = pool.take_one()
        elif pool.free or (frame := self._oldest_idle(over)) < 0:
            return None
        else:
            steps.append(self._steal_one(frame))
        self._found_room()
        pool.owner[frame] = row
        frames = np.array([frame], np.int32)
        if pool.tenant.item(frame) != tenant:
            pool.tenant[frame] = tenant
            steps.append(Zero(frames))
        return frames, steps

    def _oldest_idle(self, over: int) -> int:
        """The oldest retired frame if it can be stolen, else -1. over: frames above the limit."""
        table, pool = self.table, self.pools[GPU]
        frame = pool.oldest()
        if frame < 0 or table.max_unit_pages > 1:
            return -1
        if table.fences.all_passed:
            return frame if pool.kept > over else -1
        idle = table.fences.has_passed(table.fence.item(pool.owner.item(frame)))
        return frame if idle and not over else -1

    def _steal_one(self, frame: int) -> Hide:
        """`_steal` of one frame of a page of one."""
        pool = self.pools[GPU]
        pool.reuse_one(frame)
        self.counts["stolen"] += 1
        return self._hide(pool.owner[frame : frame + 1].copy(), _NO_SLOTS)

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
        """`_settle_hide` of a page whose frame was stolen, or of the only one that is doomed: it is
        vacant now."""
        table, row = self.table, step.pages.item()
        if not len(step.frees) and not self.in_order and not table.flags.item(row) & _STALE:
            table.busy[row] -= 1
            table.shown[row] = IS_NOTHING
            return True
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

    def _touch_one(self, rows: Rows, now: int) -> None:
        """`touch` of one page."""
        table, row = self.table, rows.item()
        table.stamp[row] = self._stamp
        self._stamp += 1
        if table.at.item(row) == AT_GPU:
            self.rankings[GPU].accessed(rows, now)
        if self.crossover is not None and table.shown.item(row) == IS_IN_PLACE:
            self.rankings[HOST].accessed(rows, now)
        if self.admission is not None:
            self.admission.used(rows, table.depth[rows], now)
            self._note_unsaved(rows)

    def _unpin_one(self, rows: Rows, tick: tuple[int, int] | None) -> None:
        """`unpin` of one page."""
        table, row = self.table, rows.item()
        if table.pins.item(row) > 0:
            table.pins[row] -= 1
        else:
            table.waiters[row] -= 1
        if tick is not None:
            if table.fences.crowded:
                table.fences.sweep(table.fence)
            table.fence[row] = table.fences.join(table.fence[row : row + 1], *tick).item()
