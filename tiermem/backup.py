"""Write-behind: labelled pages get a copy on the drive before anything forces them to leave.

A page stays where it is, and nothing claims it; what lands is a spare if nobody has written the
page meanwhile. Whoever opened an attic wants content to outlive its process, so `_unsaved` is kept
only then: labelled units without a copy on the drive, in the order in which that came to be known.
"""

from __future__ import annotations

from itertools import islice

import numpy as np

from tiermem.attic import Attic
from tiermem.descent import SPARE_SHARE
from tiermem.plan import Plan
from tiermem.table import DOOMED, LABELLED, STALE, Rows
from tiermem.tier import AT_GPU, AT_HOST, GPU, HOST, NVME, Fence, Mask

IN_FLIGHT = 32
"""Pages on their way to the drive at most, those that must leave included, for more to be begun:
a store that somebody waits for stands behind 64 MiB of these, 20 ms of a drive of 3 GB/s."""
LOOKED_AT = 256
"""Units looked at in one call, so that pages in long use cost little."""
_NO_ROWS = np.empty(0, np.int32)


class Backup(Attic):
    """Verbs that save labelled pages ahead of need."""

    def back_up(self, now: int, *, last: bool = False) -> list[Plan]:
        """Begin to copy labelled pages that rest idle on the GPU or in the host to the drive.

        Call it after `relieve`, again and again: each call begins as much as may be in flight.
        Pages that must leave go first. The rule of admission is asked once, and again after
        another use. last: nothing will follow, so all of the write budget may be spent.
        """
        n = self._may_begin(now, last) if self._unsaved else 0
        if n <= 0 or not self._has_room(last):
            return []
        rows = self._ready_to_save(n)
        plans, room = self._room_for_spares(len(rows), now, last)
        rows, _ = self._cut(rows, room)
        for head in self.table.heads(rows).tolist():
            del self._unsaved[head]
        if len(rows) and self.admission is not None:
            rows, _ = self._ask_admission(rows, now)
            self._admitted.difference_update(self.table.heads(rows).tolist())
        for src in (GPU, HOST):
            here = rows[self.table.at[rows] == int(src)]
            if len(here):
                slots = self.pools[NVME].take_free(len(here))
                plans.append(self._copy_down(here, src, NVME, slots, stays=True))
        return plans

    def unsaved(self, rows: range) -> tuple[int, int]:
        """(units among these rows with content above the drive only, those of them being saved)."""
        saving = [step.pages for step in self._copies(NVME) if step.stays]
        flying = _among(self.table.heads(np.concatenate([*saving, _NO_ROWS])), rows)
        waiting = _among(np.fromiter(self._unsaved, np.int32), rows)
        under_way = int((self.table.slot(NVME)[flying] < 0).sum())
        return under_way + int(self._is_unsaved(waiting).sum()), under_way

    def awaits_back_up(self, rows: range) -> tuple[bool, Fence]:
        """Whether time alone lets the last of these be saved, and the fence that some are behind.

        Not what is in use, nor what finds no room on a drive that has grown to its size.
        """
        heads = _among(np.fromiter(self._unsaved, np.int32), rows)
        heads = heads[self._is_unsaved(heads) & self._is_movable(heads)]
        room = self._has_room(True) or NVME in self.growing
        return bool(room and len(heads)), self.table.fences.point(self.table.fence[heads])

    def _may_begin(self, now: int, last: bool) -> int:
        """Pages that may be added to those that are on their way to the drive."""
        if not (self._usable(NVME, GPU) or self._usable(NVME, HOST)):
            return 0
        unit, most = self.table.max_unit_pages, IN_FLIGHT
        if self.admission is not None:
            ahead = self.admission.ahead(now, last=last)
            most = most if ahead is None else min(most, ahead * unit)
        flying = self._storing()
        return most - flying if flying else max(most, unit if most else 0)

    def _room_for_spares(self, n: int, now: int, last: bool) -> tuple[list[Plan], int]:
        """(plans that make more room for later, how many slots may be taken now, up to n).

        Never another page's spare: that page would be next to be saved, and so on for ever.
        """
        free = self._free_for_spares(last)
        short = min(n - free, self._spares_left() - free) - self._leaving(NVME)
        if short <= 0 or NVME in self.growing:  # which brings more room for nothing
            return [], min(n, free)
        return self._push_down(NVME, short, now), min(n, free)

    def _has_room(self, last: bool) -> bool:
        return self._free_for_spares(last) > 0 or self._spares_left() > 0

    def _free_for_spares(self, last: bool) -> int:
        """Free slots beyond those that are left to pages that must leave, which cannot wait."""
        pool = self.pools[NVME]
        kept_free = 0 if last else min(IN_FLIGHT, pool.capacity // 8)
        return max(0, pool.free - kept_free)

    def _spares_left(self) -> int:
        """Slots that may still become spares at the cost of content that is nowhere else."""
        pool = self.pools[NVME]
        return int(SPARE_SHARE * pool.capacity) - pool.kept - self._storing()

    def _ready_to_save(self, n: int) -> Rows:
        """Up to n pages, of whole units, that can be saved now; what is in use goes to the end."""
        heads = np.fromiter(islice(self._unsaved, LOOKED_AT), np.int32)
        wanted = self._is_unsaved(heads)
        ready = wanted & self._is_movable(heads)
        ready &= self.table.fences.is_passed(self.table.fence[heads])
        for head in heads[~ready].tolist():
            del self._unsaved[head]
        self._unsaved.update(dict.fromkeys(heads[wanted & ~ready].tolist()))
        return self._cut(self.table.pages(heads[ready]), n)[0]

    def _is_unsaved(self, heads: Rows) -> Mask:
        """bool[n]: content that is above the drive only."""
        table = self.table
        flags, at = table.flags[heads], table.at[heads]
        bare = (table.slot(NVME)[heads] < 0) | ((flags & STALE) != 0)
        above = (at == AT_GPU) | (at == AT_HOST)
        unsaved: Mask = bare & above & ((flags & (LABELLED | DOOMED)) == LABELLED)
        return unsaved

    def _is_movable(self, heads: Rows) -> Mask:
        """bool[n]: units that rest idle in a tier from which a route leads to the drive.

        A GPU that has failed may hold what was computed from bytes that never came.
        """
        movable = np.zeros(len(heads), np.bool_)
        for src in (GPU, HOST):
            if self._usable(NVME, src) and not (src == GPU and GPU in self.failed_tiers):
                movable |= self.table.movable(heads, src)
        return movable


def _among(heads: Rows, rows: range) -> Rows:
    return heads[(heads >= rows.start) & (heads < rows.stop)]
