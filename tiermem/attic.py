"""Content that is found by name: labels on pages, and the attic.

The attic is a hidden range of the page table, one row for each slot of the drive's tier, without
addresses. Its pages belong to no region and rest on the drive: what a persisted slab held when it
was opened, and the labelled pages of regions that were closed since. They leave by the NVMe
tier's policy like any other, and `adopt` hands their slots to vacant pages of a region.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tiermem.contents import page_keys
from tiermem.descent import Descent
from tiermem.errors import NotOurs, PageLost
from tiermem.keyindex import Keys
from tiermem.plan import Plan
from tiermem.table import DOOMED, IS_RETIRED, LABELLED, STALE, Rows
from tiermem.tier import AT_LOST, AT_NONE, AT_NVME, GPU, NVME, Mask, Slots

Numbers = npt.NDArray[np.uint32]


@dataclass(frozen=True, slots=True)
class Stored:
    """Slots of the drive whose content is known: int32[n], uint64[n, 2], uint32[n], uint32[n]."""

    slots: Slots
    keys: Keys
    depths: Numbers
    tenants: Numbers


class Attic(Descent):
    """Verbs on labelled pages. A unit has one key, of which each of its pages gets its own."""

    def label(self, rows: Rows, keys: Keys) -> None:
        """The bytes of these pages (whole units) are the content of these keys, one a unit.

        Until the next write, free or loss. Raises NotOurs, PageLost.
        """
        table = self.table
        if not table.at[rows].all() or (table.flags[rows] & DOOMED).any():
            raise NotOurs(f"{len(rows)} pages to label, not all of them allocated")
        if (table.at[rows] == AT_LOST).any():
            raise PageLost(f"{len(rows)} pages to label, some lost: they hold no content")
        if len(rows):
            self.contents.label(rows, page_keys(keys, len(rows) // len(keys)))
            table.flags[rows] |= LABELLED
            if self.onlooker is not None:
                self.onlooker.named(table.heads(rows), keys[:, 0])
            self._note_stored(rows)
            self._note_unsaved(rows)

    def places(self, keys: Keys, tenant: int) -> npt.NDArray[np.uint8]:
        """uint8[n]: where a unit of this tenant with each content has its first page, or NONE."""
        tenants = self.table.tenant
        rows = self.contents.find(keys, lambda rows, _: tenants[rows] == tenant)
        places: npt.NDArray[np.uint8] = np.where(rows < 0, AT_NONE, self.table.at[rows])
        return places.astype(np.uint8)

    def open_attic(self, slots: int) -> None:
        """Keep labelled content on the drive when its region closes; once, before the first move.

        slots: how many the drive's tier will ever have.
        """
        assert self.attic is None, "the attic is open"
        self.attic = self.table.extend(slots)

    def restore(self, held: Stored, now: int) -> None:
        """What the drive held when it was opened is in the attic, oldest first; slots are free."""
        self.pools[NVME].claim(held.slots)
        self._put_away(held, now)
        self.counts["restored"] += len(held.slots)

    def in_attic(self, keys: Keys, tenant: int, unit_pages: int) -> Rows:
        """int32[n, unit_pages]: the attic's pages of these units; -1 throughout where not whole."""
        attic, table = self.attic, self.table
        if attic is None or not len(keys):
            return np.full((len(keys), unit_pages), -1, np.int32)
        first, last = attic.first, attic.first + attic.pages

        def rests_there(rows: Rows, _: npt.NDArray[np.intp]) -> Mask:
            there: Mask = (rows >= first) & (rows < last) & (table.tenant[rows] == tenant)
            return there & table.movable(rows, NVME)

        rows = self.contents.find(page_keys(keys, unit_pages), rests_there)
        units = rows.reshape(len(keys), unit_pages)
        whole = (units >= 0).all(axis=1)
        _, once = np.unique(units[:, 0], return_index=True)
        whole &= np.isin(np.arange(len(keys)), once)  # a content asked for twice is given once
        units[~whole] = -1
        return units

    def adopt(
        self, heads: Rows, shelved: Rows, now: int, *, parents: Rows, depths: Rows | None
    ) -> list[Plan]:
        """Vacant units take over pages of the attic, found just now: they rest on the drive.

        heads int32[n]; shelved int32[n, unit_pages], from `in_attic`; depths: by default as they
        were when the pages were labelled.
        """
        table = self.table
        rows, old = table.pages(heads), shelved.reshape(-1)
        assert not table.at[rows].any(), "a page that adopts is vacant"
        plans: list[Plan] = []
        retired = rows[table.shown[rows] == IS_RETIRED]
        if len(retired):  # another content's frame must not be taken back
            frames = table.slot(GPU)[retired].copy()
            self.pools[GPU].reuse(frames)
            plans.append(self._begin([self._hide_unowned(retired, frames)]))
        table.parent[heads] = parents
        table.depth[heads] = table.depth[shelved[:, 0]] if depths is None else depths
        slots, keys = table.slot(NVME)[old].copy(), self.contents.keys(old)
        self._leave_tier(NVME, old, now)
        table.slot(NVME)[old] = -1
        table.at[old] = AT_NONE
        table.flags[old] = 0
        self._rest_on_drive(rows, slots, keys, now)
        if self.onlooker is not None:
            self.onlooker.named(heads, keys[:: shelved.shape[1], 0])
        self._note_stored(rows[np.isin(old, self._noted())])
        self.counts["adopted"] += len(rows)
        return plans

    def unlabel(self) -> Slots:
        """No label counts any more, and the attic is empty: int32[n] slots to be forgotten.

        What is being copied to the drive lands as bytes without a name.
        """
        table = self.table
        rows = np.flatnonzero((table.flags & LABELLED) != 0).astype(np.int32)
        slots = table.slot(NVME)[rows]
        table.flags[rows] &= ~LABELLED
        self._unrecorded.clear()
        if self.attic is not None:
            inside = (rows >= self.attic.first) & (rows < self.attic.first + self.attic.pages)
            self._doom(rows[inside], 0)
            self._reap()
        return slots[slots >= 0]

    def take_unrecorded(self) -> Stored:
        """Labelled pages that have come to the drive since the last call.

        None once the GPU has failed: a stream went on without bytes that it had waited for, and
        what was computed from others in their place may be among these.
        """
        table = self.table
        rows = np.unique(self._noted())
        self._unrecorded.clear()
        if GPU in self.failed_tiers:
            rows = rows[:0]
        held = (table.flags[rows] & (LABELLED | STALE)) == LABELLED
        return self._stored(rows[held & (table.slot(NVME)[rows] >= 0)])

    def _shelve(self, rows: Rows, now: int) -> None:
        """Pages that are to be freed leave their labelled copies on the drive to the attic."""
        if self.attic is None:
            return
        table, pool = self.table, self.pools[NVME]
        bad = (table.flags[rows] & (LABELLED | STALE | DOOMED)) != LABELLED
        bad |= (table.slot(NVME)[rows] < 0) | (table.busy[rows] > 0)
        bad |= (table.pins[rows] > 0) | (table.waiters[rows] > 0)
        bad |= np.isin(table.unit[rows], table.unit[rows[bad]])
        rows = rows[~bad]
        if not len(rows):
            return
        # The policy learns of them anew, in the order of their last use.
        rows = rows[np.argsort(table.stamp[table.unit[rows]], kind="stable")]
        held = self._stored(rows)
        resting = table.at[rows] == AT_NVME
        pool.reuse(held.slots[~resting])
        self._leave_tier(NVME, rows[resting], now)
        table.at[rows[resting]] = AT_LOST
        table.flags[rows] &= ~LABELLED
        table.slot(NVME)[rows] = -1
        self._put_away(held, now)
        later = np.isin(rows, self._noted())
        self._note_stored((self.attic.first + held.slots[later]).astype(np.int32))
        self.counts["shelved"] += len(rows)

    def _put_away(self, held: Stored, now: int) -> None:
        """Slots that are used become pages of the attic, each in the row of its number."""
        assert self.attic is not None
        if not len(held.slots):
            return
        rows = (self.attic.first + held.slots).astype(np.int32)
        self.table.tenant[rows] = held.tenants
        self.table.depth[rows] = held.depths
        self.table.parent[rows] = -1
        self._rest_on_drive(rows, held.slots, held.keys, now)

    def _rest_on_drive(self, rows: Rows, slots: Slots, keys: Keys, now: int) -> None:
        """Pages without bytes get labelled ones, in used slots of the drive."""
        table, pool = self.table, self.pools[NVME]
        table.slot(NVME)[rows] = slots
        pool.owner[slots] = rows
        pool.tenant[slots] = table.tenant[rows]
        table.at[rows] = AT_NVME
        table.flags[rows] = LABELLED
        table.gen[rows] += 1
        self.contents.label(rows, keys)
        heads = table.heads(rows)
        self._stamp_units(heads)
        self._entered(NVME, heads, now, self.contents.keys(heads)[:, 0])

    def _noted(self) -> Rows:
        return np.concatenate([*self._unrecorded, np.empty(0, np.int32)])

    def _stored(self, rows: Rows) -> Stored:
        table = self.table
        depths = table.depth[table.unit[rows]]
        return Stored(
            table.slot(NVME)[rows].copy(),
            self.contents.keys(rows),
            depths.astype(np.uint32),
            table.tenant[rows].astype(np.uint32),
        )
