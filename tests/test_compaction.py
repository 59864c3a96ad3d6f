"""The host tier ends elsewhere: the pager's machine with a pool that shrinks and grows."""

from __future__ import annotations

import os
from random import Random

import numpy as np
import pytest
from hypothesis.stateful import rule

from tests.harness import Harness
from tests.test_pager_machine import ACCESSES, SEEDS, PagerMachine, machine_settings
from tiermem.table import Rows
from tiermem.tier import GPU, HOST, NVME, Place, SlotPool

RUNS = int(os.environ.get("MACHINE_RUNS", "0"))


class CompactionMachine(PagerMachine):
    """The host tier ends before its last slot in use, at random moments, and grows again."""

    @rule(seed=SEEDS)
    def end_the_host_tier_elsewhere(self, seed: int) -> None:
        self._end(Random(seed), most=0.3)

    @rule(seed=SEEDS)
    def pages_move_within_the_host_tier(self, seed: int) -> None:
        self._begin_moves(Random(seed))

    @rule(seed=SEEDS)
    def use_a_page_that_moves_within_the_host_tier(self, seed: int) -> None:
        random = Random(seed)
        units = self._begin_moves(random)
        chosen, access = [random.choice(units or [0])], random.choice(ACCESSES)
        if units and self._may_use(chosen, access):
            self._finish_use(chosen, access, None)

    @rule(seed=SEEDS)
    def read_what_has_moved_within_the_host_tier(self, seed: int) -> None:
        random = Random(seed)
        units = self._begin_moves(random, fails=random.random() < 0.5)
        self.h.drain_copies()
        for unit in units:
            if self._may_use([unit], "read"):
                self._finish_use([unit], "read", None)

    def _begin_moves(self, random: Random, fails: bool = False) -> list[int]:
        """Fill the host tier, make a hole in it and end it before its last slot; what moves now."""
        for head in random.sample(self.vacant(), min(2, len(self.vacant()))):
            self.write_new(head)
        self.h.carry(self.h.planner.demote(self.h.rows(self.units()), self.h.now))
        self.h.drain_copies()
        slot = self.h.table.slot(HOST)
        there = sorted(
            (u for u in self.units() if self.h.table.at[u] == HOST), key=slot.__getitem__
        )
        rows_ = self.h.rows(there[:1])
        if len(there) > 1 and not (self.h.table.pins[rows_] + self.h.table.waiters[rows_]).any():
            self.h.free(rows_)
            self.h.drain_copies()
        if fails and (HOST, HOST) in self.h.routes:
            self.h.routes[HOST, HOST].fail(1)
        self._end(random, most=0.0)
        moving = (self.h.table.at == Place.HOST) & (self.h.table.busy > 0)
        return [int(unit) for unit in self.h.table.unit[np.flatnonzero(moving)]]

    def teardown(self) -> None:
        if hasattr(self, "h"):
            for work in self.waiting:
                self.h.planner.abandon(work.request)
            for work in self.held:
                self.h.leave(work.request, work.stream)
            self.waiting, self.held = [], []
            self.h.drain()
            self._leave_what_is_beyond_the_end()
        super().teardown()

    def _end(self, random: Random, most: float) -> None:
        """End the host tier before its last slot in use; sometimes give it all slots again."""
        every = self.h.memories[HOST].capacity
        if not every:
            return
        last = min(every, self.h.planner.host_end()) - 1
        end = every if random.random() < most else max(1, last - random.randint(0, 1))
        self.h.observe()
        self.h.carry(self.h.planner.relieve(self.h.now) + self.h.planner.confine(end, self.h.now))

    def _leave_what_is_beyond_the_end(self) -> None:
        """Nobody uses a page, so the host tier can end where it was told to."""
        planner, end = self.h.planner, self.h.pools[HOST].end
        if any(route.latched for route in self.h.routes.values()):
            return
        for _ in range(2 * self.h.rows_of_regions):
            if planner.host_end() <= end:
                return
            self.h.carry(planner.relieve(self.h.now))
            self.h.drain()
            self.h.carry(planner.confine(end, self.h.now))
            self.h.drain()
        raise AssertionError("pages beyond the end of the host tier")


CompactionMachine.TestCase.settings = machine_settings(RUNS or 200, repeat=not RUNS)
TestAHostTierThatShrinksServesNoWrongBytes = CompactionMachine.TestCase


def rows(*values: int) -> Rows:
    return np.array(values, np.int32)


def on_the_host(h: Harness, units: list[int]) -> None:
    """Write these pages and send them down, the first into the lowest slot."""
    for unit in units:
        assert h.allocate([unit])
        assert h.use([unit], "write")
        h.carry(h.planner.demote(rows(unit), h.now))
        h.drain()


def test_pages_beyond_the_end_move_into_free_slots_before_it() -> None:
    h = Harness(gpu=4, host=6, nvme=6)
    on_the_host(h, [0, 1, 2, 3])
    slot = h.table.slot(HOST)
    assert slot[:4].tolist() == [0, 1, 2, 3]
    h.free(rows(0))
    h.drain()
    h.carry(h.planner.confine(3, h.now))
    assert (h.table.at[3], h.table.to[3], h.table.busy[3]) == (HOST, Place.NONE, 1)
    assert h.planner.host_end() == 4, "the bytes are where they were until the copy has ended"
    h.drain()
    assert slot[1:4].tolist() == [1, 2, 0]
    assert (h.planner.host_end(), h.pools[HOST].capacity) == (3, 3)
    for page in (1, 2, 3):
        assert h.use([page], "read")
    assert h.planner.counts["host_host"] == 1
    h.check_idle()


def test_what_does_not_fit_before_the_end_goes_below() -> None:
    h = Harness(gpu=4, host=4, nvme=6)
    on_the_host(h, [0, 1, 2, 3])
    for _ in range(3):
        h.carry(h.planner.confine(2, h.now) + h.planner.relieve(h.now))
        h.drain()
    assert h.planner.host_end() == 2
    assert sorted(h.table.at[:4].tolist()) == [HOST, HOST, NVME, NVME]
    for page in range(4):
        assert h.use([page], "read")


def test_spares_beyond_the_end_are_given_up_at_once() -> None:
    h = Harness(gpu=4, host=4, nvme=0)
    on_the_host(h, [0, 1])
    assert h.use([1], "read")
    assert h.pools[HOST].is_kept(1)
    assert h.planner.confine(1, h.now) == []
    assert (h.planner.host_end(), int(h.table.slot(HOST)[1])) == (1, -1)
    assert h.table.at[1] == GPU
    h.check_idle()


def test_a_page_that_is_used_while_it_moves_is_loaded_from_where_it_was() -> None:
    h = Harness(gpu=4, host=4, nvme=0)
    on_the_host(h, [0, 1])
    h.free(rows(0))
    h.drain()
    h.carry(h.planner.confine(1, h.now))
    request = h.begin([1], "read")
    assert request.taken
    while request.pending:
        h.advance_for(request)
    h.enter(request, "read")
    h.leave(request, None)
    h.drain()
    assert h.table.at[1] == GPU
    assert h.planner.counts["host_host"] == 0
    h.carry(h.planner.confine(1, h.now))
    h.drain()
    assert h.planner.host_end() == 1
    h.check_idle()


def test_a_tier_that_grows_again_has_its_slots_back_once() -> None:
    h = Harness(gpu=4, host=6, nvme=6)
    on_the_host(h, [0, 1, 2])
    h.planner.confine(1, h.now)
    h.planner.confine(6, h.now)
    assert h.pools[HOST].capacity == 6
    h.drain()
    h.planner.check()
    assert h.pools[HOST].free == 6 - 3


@pytest.mark.parametrize("ends", [(2, 5), (0, 3), (5, 2, 4), (8, 1, 8)])
def test_a_pool_has_exactly_the_slots_before_its_end(ends: tuple[int, ...]) -> None:
    pool = SlotPool(HOST, 4)
    pool.owner[pool.take_free(3)] = [7, 8, 9]
    for end in ends:
        pool.bound(end)
        pool.check()
    pool.release(rows(0, 1, 2))
    pool.check()
    assert (pool.capacity, pool.free, pool.end) == (ends[-1], ends[-1], ends[-1])
    assert sorted(pool.take_free(ends[-1]).tolist()) == list(range(ends[-1]))
