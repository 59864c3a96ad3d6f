"""A load that another thread settles before the thread that asked for it looks again.

Without threads: while the load is being started, a store is decided and its start interrupted, so
that it stays queued. The thread of the load starts it again after the load, and at that moment the
load is settled, as the mover may do at any time.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

import numpy as np
import pytest

from tests.harness import Harness
from tiermem.errors import PageLost
from tiermem.executor import Executor, Flight
from tiermem.pager import Pager
from tiermem.plan import Plan
from tiermem.table import DIRTY, Rows
from tiermem.tier import Finished, Place

AWAY = np.array([0], np.int32)
OTHER = np.array([1], np.int32)


class Prompt(Executor):
    """Carries a plan out before `start` returns. `meddle` runs before each start."""

    meddle: Callable[[], None] = staticmethod(lambda: None)
    harness: Harness

    def start(self, plan: Plan) -> Flight:
        self.meddle()
        flight = super().start(plan)
        self.harness.world.finish_all()
        return flight


class Race:
    """A pager with page AWAY below the GPU and page OTHER on it."""

    def __init__(self, below: Place) -> None:
        sizes = {"gpu": 4, "host": 0, "nvme": 0, below.name.lower(): 6}
        self.harness = Harness(**sizes, eager=True)  # type: ignore[arg-type]  # sizes are ints
        harness = self.harness
        executor = Prompt(
            window=harness.window,
            routes=harness.routes,
            zero=lambda frames: Finished(),
            addresses=lambda rows: rows.astype(np.uint64) * 100,
            region_of=lambda rows: harness.table.region[rows],
            on_gone=lambda rows, reason: None,
        )
        executor.harness = harness
        self.executor = executor
        self.up = harness.routes[below, Place.GPU]
        self.pager = Pager(
            harness.planner,
            executor,
            now=lambda: 0,
            passed=harness.world.streams.passed,
            wait_fence=harness.world.streams.wait,
        )
        for rows in (AWAY, OTHER):
            self.pager.allocate(rows)
            self.use(rows, "fresh")
        self.demote(AWAY)
        self.pager.drain()
        assert harness.table.at[AWAY[0]] == below
        self.settled = 0

    def use(self, rows: Rows, access: str) -> None:
        self.pager.use(rows, access)  # type: ignore[arg-type]  # one of the three words
        self.pager.unpin(rows, None)

    def demote(self, rows: Rows) -> None:
        self.pager.decide(lambda: self.harness.planner.demote(rows, 0))

    def arm(self) -> None:
        """Let the next load be settled by somebody else."""
        steps = iter((self._decide, self._interrupt, self._settle))

        def meddle() -> None:
            next(steps, lambda: None)()

        self.executor.meddle = meddle

    def _decide(self) -> None:
        with suppress(KeyboardInterrupt):
            self.demote(OTHER)

    def _interrupt(self) -> None:
        raise KeyboardInterrupt

    def _settle(self) -> None:
        self.settled = self.pager.settle_ready()


def test_a_write_counts_whoever_settles_its_load() -> None:
    race = Race(Place.HOST)
    race.arm()
    race.use(AWAY, "write")
    assert race.settled == 1
    table = race.harness.table
    assert table.flags[AWAY[0]] & DIRTY
    assert table.slot(Place.HOST)[AWAY[0]] == -1
    race.harness.planner.check()


def test_a_failed_load_is_told_whoever_settles_it() -> None:
    race = Race(Place.NVME)
    race.up.fail(1)
    race.arm()
    with pytest.raises(PageLost):
        race.use(AWAY, "read")
    assert race.settled == 1
    race.harness.planner.check()
