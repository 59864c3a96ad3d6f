"""The pager's machine with names: pages are labelled, closed into the attic and adopted again.

What an adopted page holds is compared with what its content held when it was labelled, through
the same reads that the machine makes anyway.
"""

from __future__ import annotations

import os
from random import Random

import numpy as np
from hypothesis import strategies as st
from hypothesis.stateful import invariant, rule

from tests.test_pager_machine import SEEDS, PagerMachine, machine_settings
from tiermem.keyindex import Keys
from tiermem.table import LABELLED, STALE, Rows, Shown
from tiermem.tier import NVME, Place

RUNS = int(os.environ.get("MACHINE_RUNS", "0"))


def key_of(number: int) -> Keys:
    return np.array([[number, 5]], np.uint64)


class ContentsMachine(PagerMachine):
    """`known`: key to the values of a unit's pages when it got that key, and its tenant."""

    attic = True

    def known(self) -> dict[int, tuple[list[int], int]]:
        if not hasattr(self, "_known"):
            self._known: dict[int, tuple[list[int], int]] = {}
        return self._known

    @rule(seed=SEEDS)
    def label(self, seed: int) -> None:
        for head in self.pick(Random(seed), self.units(), 6):
            if self._is_complete(self.h.rows([head])):
                self._label(head)

    @rule(seed=SEEDS, stream=st.sampled_from([0, 1]))
    def label_what_a_kernel_will_write(self, seed: int, stream: int) -> None:
        """As an engine does: the label is given when the work is queued, within the same use."""
        units = self.pick(Random(seed), self.units(), 1)
        if not units or not self._may_use(units, "write"):
            return
        self._synchronise(self.h.rows(units), stream)

        def label() -> None:
            self._label(units[0])
            self.back_up()

        self.h.use(units, "write", stream, inside=label)
        self.back_up()
        self._enter_ready()

    @rule(seed=SEEDS)
    def label_what_goes_down(self, seed: int) -> None:
        self.label(seed)
        self.demote(seed)

    @rule()
    def back_up(self) -> None:
        self.h.observe()
        self.h.carry(self.h.planner.back_up(self.h.now))

    @rule(seed=SEEDS)
    def label_and_back_up(self, seed: int) -> None:
        self.label(seed)
        self.back_up()

    @rule(seed=SEEDS)
    def write_a_page_that_is_being_saved(self, seed: int) -> None:
        """A user comes in the middle of a copy that its page does not follow."""
        random = Random(seed)
        self.label_and_back_up(seed)
        saving = self._being_saved()
        units = [random.choice(saving)] if saving else []
        if units and self._may_use(units, "write"):
            self._finish_use(units, "write", random.choice((None, 0)))

    @rule(seed=SEEDS)
    def label_anew_while_saving(self, seed: int) -> None:
        self.write_a_page_that_is_being_saved(seed)
        self.label_and_back_up(seed + 1)

    @rule(seed=SEEDS)
    def close(self, seed: int) -> None:
        """As a region does: pages are freed, what is labelled and on the drive stays there."""
        self._close(self.pick(Random(seed), self.units(), 2))

    @rule(seed=SEEDS)
    def close_what_is_on_the_drive(self, seed: int) -> None:
        self._close(self.pick(Random(seed), self._labelled_on_drive(), 2))

    @rule(seed=SEEDS)
    def close_and_adopt(self, seed: int) -> None:
        self.close_what_is_on_the_drive(seed)
        self.adopt(seed)

    @rule(seed=SEEDS)
    def adopt(self, seed: int) -> None:
        random = Random(seed)
        vacant = self.vacant()
        if not vacant or not self.known():
            return
        shown = [head for head in vacant if self.h.table.shown[head] == Shown.RETIRED]
        head = random.choice(shown or vacant)
        unit = len(self.h.rows([head]))
        wanted = sorted(self.known())
        random.shuffle(wanted)
        tenant = int(self.h.table.tenant[head])
        keys = np.concatenate([key_of(k) for k in wanted])
        held = self.h.planner.in_attic(keys, tenant, unit)
        for key, pages in zip(wanted, held, strict=True):
            if pages[0] >= 0:
                self._adopt(head, key, pages[None])
                self.h.use([head], "read")
                return

    @rule()
    def record(self) -> None:
        """What is to be recorded is what the drive's slots really hold."""
        held = self.h.planner.take_unrecorded()
        for slot, key in zip(held.slots.tolist(), held.keys, strict=True):
            if int(key[1]) == 5:
                word = int(self.h.memories[Place.NVME].words[slot][0])
                assert word == self.known()[int(key[0])][0][0], f"slot {slot} has another content"

    @invariant()
    def labels_are_true(self) -> None:
        if not hasattr(self, "h"):
            return
        table = self.h.table
        rows = np.flatnonzero(table.flags[: self.h.rows_of_regions] & LABELLED).astype(np.int32)
        for row in rows[table.unit[rows] == rows].tolist():
            key = int(self.h.planner.contents.keys(np.array([row], np.int32))[0, 0])
            # A user of access "fresh" that still waits has given the bytes up; they are there.
            values = [self.h.model.get(page) for page in self.h.rows([row]).tolist()]
            same = all(a in (None, b) for a, b in zip(values, self.known()[key][0], strict=True))
            assert same, f"page {row} is not what its label says"

    def _labelled_on_drive(self) -> list[int]:
        table = self.h.table
        stored = (table.slot(NVME) >= 0) & ((table.flags & LABELLED) != 0)
        return [unit for unit in self.units() if stored[unit]]

    @invariant()
    def what_is_saved_is_true(self) -> None:
        """A copy on the drive that counts holds what its page holds."""
        if not hasattr(self, "h") or self.h.planner.failed_tiers:
            return
        table, words = self.h.table, self.h.memories[NVME].words
        kept = self.h.pools[NVME].oldest_kept()
        owners = self.h.pools[NVME].owner[kept]
        for row, slot in zip(owners.tolist(), kept.tolist(), strict=True):
            value = self.h.model.get(row)
            if value is not None and not table.flags[row] & STALE:
                assert words[slot].tolist() == [value] * len(words[slot]), f"page {row}, old copy"

    def _label(self, head: int) -> None:
        rows = self.h.rows([head])
        key = len(self.known()) + 1
        values = [self.h.model[row] for row in rows.tolist()]
        self.known()[key] = (values, int(self.h.table.tenant[head]))
        self.h.planner.label(rows, key_of(key))

    def _being_saved(self) -> list[int]:
        """Units with a copy under way that rest where they are."""
        table = self.h.table
        return [u for u in self.units() if table.busy[u] and not table.to[u]]

    def _close(self, units: list[int]) -> None:
        table = self.h.table
        rows = self.h.rows(units)
        if len(rows) and not (table.pins[rows] + table.waiters[rows]).any():
            self.h.carry(self.h.planner.forget(rows, self.h.now))
            self.h.alive -= set(rows.tolist())
            self.h.settle_ready()

    def _adopt(self, head: int, key: int, pages: Rows) -> None:
        values, tenant = self.known()[key]
        heads, none = np.array([head], np.int32), np.array([-1], np.int32)
        plans = self.h.planner.adopt(heads, pages, self.h.now, parents=none, depths=None)
        rows = self.h.rows([head]).tolist()
        assert int(self.h.table.tenant[head]) == tenant, "another tenant's page was adopted"
        for row, value in zip(rows, values, strict=True):
            self.h.vacant.remove(row)
            self.h.alive.add(row)
            self.h.model[row] = value
        self.h.carry(plans)
        assert self.h.table.at[head] == NVME

    def _is_complete(self, rows: Rows) -> bool:
        """Allocated, written, and nobody is about to write."""
        table = self.h.table
        if not all(row in self.h.model for row in rows.tolist()):
            return False
        if ((table.at[rows] == Place.NONE) | (table.at[rows] == Place.LOST)).any():
            return False
        mine = set(rows.tolist())
        works = [w for w in self.held + self.waiting if w.access != "read"]
        return not any(mine & set(w.request.rows.tolist()) for w in works)


ContentsMachine.TestCase.settings = machine_settings(RUNS or 200, repeat=not RUNS)
TestNamesAreTrue = ContentsMachine.TestCase
