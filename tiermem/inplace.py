"""Pages read where they are: host slots shown at the pages' own addresses, instead of loads.

It pays for large pages that are read seldom (`Crossover`). Such a page stays in the host tier, is
pinned there while it is read, and is loaded like any other once it was read so often that loading
would have cost less; until then it stays shown. For reading only: whoever writes waits for queued
reads, has the address show nothing, and loads.
"""

from __future__ import annotations

import numpy as np

from tiermem.backup import Backup
from tiermem.errors import PageInUse
from tiermem.plan import Plan, Request, ShowInPlace
from tiermem.table import IS_IN_PLACE, IS_NOTHING, Rows
from tiermem.tier import AT_HOST, HOST, Mask

_NO_SLOTS = np.empty(0, np.int32)
_WORN = np.iinfo(np.uint16).max


class InPlace(Backup):
    """The part of a fault that loads nothing. touches: how often the user will read the pages;
    0: in place whatever it costs; None: not in place."""

    def _readable(self, rows: Rows, touches: int | None) -> Mask:
        """bool[n]: pages that are, or are about to be, shown in place and may be read there.

        One that others read, or that queued work still reads, is read there by all.
        """
        table = self.table
        shown = table.shown[rows] == IS_IN_PLACE
        if shown.any():
            used = (table.pins[rows] > 0) | ~table.fences.is_passed(table.fence[rows])
            shown &= used | self._worth(rows, touches, room=False)
        coming = (table.at[rows] == AT_HOST) & (table.to[rows] == AT_HOST)
        return np.asarray(shown | coming)

    def _placeable(self, rows: Rows, touches: int | None, room: bool) -> Mask:
        """bool[n]: which of these absent pages are to be shown in place; whole units."""
        table = self.table
        can = (table.at[rows] == AT_HOST) & (table.to[rows] == 0)
        can &= table.shown[rows] == IS_NOTHING
        can &= self._worth(rows, touches, room)
        if table.max_unit_pages > 1:
            can &= ~np.isin(table.unit[rows], table.unit[rows[~can]])
        return np.asarray(can)

    def _worth(self, rows: Rows, touches: int | None, room: bool) -> Mask:
        assert self.crossover is not None
        reads = self.table.reads[rows]
        if touches is None:
            return np.zeros(len(rows), np.bool_)
        if touches == 0:
            return reads < _WORN
        most = self.crossover.with_room if room else self.crossover.without
        return reads.astype(np.int64) + touches <= most

    def _show_in_place(self, rows: Rows) -> Plan:
        table = self.table
        plan = self._begin([ShowInPlace(rows, table.slot(HOST)[rows].copy())])
        table.busy[rows] += 1
        table.to[rows] = AT_HOST
        table.move[rows] = plan.id
        self.counts["shown_in_place"] += len(rows)
        return plan

    def _count_reads(self, rows: Rows, touches: int | None) -> None:
        table = self.table
        rows = rows[(table.shown[rows] == IS_IN_PLACE) | (table.to[rows] == AT_HOST)]
        if len(rows):
            more = table.reads[rows].astype(np.int64) + max(touches or 1, 1)
            table.reads[rows] = np.minimum(more, _WORN - 1)
            self.counts["read_in_place"] += len(rows)

    def _end_in_place(self, rows: Rows, request: Request) -> Plan | None:
        """What hides those of these pages that are read in place, or the fence to wait for first.

        Raises PageInUse if they are pinned: nobody's pins are waited for.
        """
        table = self.table
        read = rows[table.shown[rows] == IS_IN_PLACE]
        if not len(read):
            return None
        pinned = int((table.pins[read] > 0).sum())
        if pinned:
            raise PageInUse(
                f"{pinned} of {len(rows)} pages are being read in place (first: row "
                f"{int(read[table.pins[read] > 0][0])}); leave that use() before they are written"
            )
        request.fence = table.fences.point(table.fence[read])
        return None if request.fence.ticks else self._begin([self._hide(read, _NO_SLOTS)])

    def _land_in_place(
        self, step: ShowInPlace, plan_id: int, bad: Mask | None, failed: set[int]
    ) -> None:
        """Whoever waited has its pin; a page that could not be shown will be loaded instead."""
        table, rows = self.table, step.pages
        table.busy[rows] -= 1
        good = np.ones(len(rows), np.bool_) if bad is None else ~bad
        live = table.move[rows] == plan_id
        table.to[rows[live]] = 0
        table.move[rows[live]] = 0
        table.shown[rows[good]] = IS_IN_PLACE
        landed = rows[live & good]
        table.pins[landed] += table.waiters[landed]
        table.waiters[rows[live]] = 0
        if bad is not None:
            broken = rows[live & bad]
            table.reads[broken] = _WORN
            failed.update(broken.tolist())
            self.counts["failed_in_place"] += len(broken)
