"""Prefetch under the pager's state machine: facts at any moment, and every fate is known."""

from __future__ import annotations

from random import Random

import numpy as np
from hypothesis.stateful import rule, run_state_machine_as_test

from tests.test_pager_machine import RUNS, SEEDS, PagerMachine, machine_settings
from tiermem.facts import Ended, Expected, Fact, Idle, Left, Queued
from tiermem.foresight import Foresight
from tiermem.planner import Marks
from tiermem.policies.prefetch import HintPrefetch, Quality
from tiermem.policies.recompute import RouteSpeed
from tiermem.tier import GPU, HOST, NVME


class ForesightMachine(PagerMachine):
    """The pager, with a prefetch policy that is told of requests and sessions."""

    ahead: Foresight | None = None

    def foresight(self) -> Foresight:
        if self.ahead is None:
            planner = self.h.planner
            planner.marks[GPU] = Marks(1.0, 0.5)
            quality = planner.gauge = Quality(1)
            speeds = {HOST: RouteSpeed(), NVME: RouteSpeed(1e-6)}  # a page of one byte a us
            self.ahead = Foresight(planner, quality, 1, lambda: speeds)
            self.ahead.run(HintPrefetch(ahead_ms=5), 3, self.h.now)
        return self.ahead

    @rule(seed=SEEDS)
    def a_request_waits(self, seed: int) -> None:
        random = Random(seed)
        self._mover_verb(random, demote=True)
        self.copies_end(3)
        below = [u for u in self.units() if self.h.table.at[u] in (HOST, NVME)]
        chain = self.pick(random, below, 4)
        if chain:
            fact = Queued(random.randrange(3), chain, random.choice([None, 0.01]))
            self.foresight().tell(fact, np.array(chain, np.int32), 0, self.h.now)
            for _ in range(3):
                self.look_ahead()
                self.copies_end(random.randrange(1, 3))

    @rule(seed=SEEDS)
    def something_else_is_known(self, seed: int) -> None:
        random = Random(seed)
        number, units = random.randrange(3), self.pick(random, self.units(), 3)
        facts: list[Fact] = [
            Left(number), Idle(number), Ended(number), Expected(number, units, 0.01),
        ]  # fmt: skip
        fact = random.choice(facts)
        self.foresight().tell(fact, np.array(units, np.int32), 0, self.h.now)

    @rule()
    def look_ahead(self) -> None:
        self.h.observe()
        self.h.carry(self.foresight().turn(self.h.now))

    def teardown(self) -> None:
        super().teardown()
        if self.ahead is None:
            return
        for unit in self.units():
            self.h.free(self.h.rows([unit]))
        self.h.drain()
        found = self.ahead.statistics()
        assert found.failures == 0
        assert self.ahead.quality.waiting == found.quality.waiting == 0, "a fate is not known"
        assert found.quality.used + found.quality.wasted == found.quality.loaded
        assert found.quality.late <= found.quality.used <= found.quality.needed
        LOADED.append(found.quality.loaded)


LOADED: list[int] = []


def test_prefetch_breaks_no_invariant_and_every_page_loaded_ahead_has_a_fate() -> None:
    LOADED.clear()
    run_state_machine_as_test(
        ForesightMachine, settings=machine_settings(RUNS or 150, repeat=not RUNS)
    )
    assert sum(LOADED) > len(LOADED) // 2, "the machine hardly ever loads ahead"
