"""The pager under a state machine: adversarial copies, queued kernels, invariants at every step.

400 runs of up to 60 steps, the same ones every time; MACHINE_RUNS=5000 draws that many at random.
What the machine is able to catch is shown by `tests/planted_faults.py`.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from random import Random

import numpy as np
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from tests.harness import Harness
from tiermem.books import Crossover
from tiermem.errors import PageInUse, PageLost, TierFailed, TierFull
from tiermem.leased import CLEAN_BYTES, CLEAN_EVERY_MS, LeasedPlanner
from tiermem.planner import Access, Marks, Planner, Request
from tiermem.table import DOOMED, Shown
from tiermem.tier import Place

RUNS = int(os.environ.get("MACHINE_RUNS", "0"))
STEPS = 60
SEEDS = st.integers(0, 2**32 - 1)
STREAMS: tuple[int | None, ...] = (None, 0, 1)
TOUCHES: tuple[int | None, ...] = (None, 0, 1, 1, 2)
ACCESSES: tuple[Access, ...] = ("read", "read", "write", "write", "fresh")
SHAPES = (  # slots of GPU, host and NVMe, pages of a unit
    (4, 3, 6, 1),
    (4, 4, 14, 1),
    (3, 6, 5, 1),
    (3, 0, 5, 1),
    (4, 3, 0, 1),
    (3, 0, 0, 1),
    (6, 4, 8, 2),
    (4, 2, 14, 2),
)


@dataclass(eq=False)
class Work:
    """A request of one user; `stream`: the one that waits for its loads."""

    request: Request
    access: Access
    stream: int | None = None


class PagerMachine(RuleBasedStateMachine):
    """Requests are begun, wait, are finished or abandoned, in any order with everything else."""

    h: Harness
    attic = False

    @initialize(
        seed=SEEDS,
        eager=st.booleans(),
        shape=st.sampled_from(SHAPES),
        marks=st.sampled_from([Marks(1.0, 1.0), Marks(0.8, 0.5)]),
        filled=st.integers(2, 12),
        in_order=st.booleans(),
        crossover=st.sampled_from([Crossover(3, 6), None, Crossover(0, 2), Crossover(9, 9)]),
        leased=st.booleans(),
    )
    def start(
        self,
        seed: int,
        eager: bool,
        shape: tuple[int, int, int, int],
        marks: Marks,
        filled: int,
        in_order: bool,
        crossover: Crossover | None,
        leased: bool,
    ) -> None:
        gpu, host, nvme, unit = shape
        self.h = Harness(
            gpu=gpu, host=host, nvme=nvme, regions=((12, unit, 0), (6, unit, 1)),
            eager=eager, marks=marks, seed=seed, attic=self.attic, in_order=in_order,
            crossover=crossover, planner=LeasedPlanner if leased else Planner,
        )  # fmt: skip
        self.gpu_units = gpu // unit
        self.waiting: list[Work] = []
        self.held: list[Work] = []
        self.stream_of: dict[int, int] = {}
        self.parked: np.ndarray | None = None
        for head in Random(seed).sample(self.vacant(), filled // unit):
            self.write_new(head)

    # ---------------------------------------------------------------- users

    @rule(seed=SEEDS)
    def allocate(self, seed: int) -> None:
        vacant = self.vacant()
        if vacant and not self.waiting:
            self.write_new(Random(seed).choice(vacant))

    @rule(seed=SEEDS)
    def allocate_two(self, seed: int) -> None:
        vacant = self.vacant()
        if len(vacant) > 1 and not self.waiting:
            self.h.allocate(Random(seed).sample(vacant, 2))

    @rule(seed=SEEDS)
    def use(self, seed: int) -> None:
        self._use(Random(seed), None)

    @rule(seed=SEEDS)
    def use_then_let_copies_end(self, seed: int) -> None:
        self._use(Random(seed), None)
        self.copies_end(2)

    @rule(seed=SEEDS)
    def read_a_page_that_is_away(self, seed: int) -> None:
        self._use(Random(seed), "read", away=True)

    @rule(seed=SEEDS)
    def write_a_page_that_leaves(self, seed: int) -> None:
        """A user comes in the middle of a copy down."""
        random = Random(seed)
        self._mover_verb(random, demote=True)
        moving = self.h.table.unit[np.flatnonzero(self.h.table.to != 0)].tolist()
        units = [random.choice(moving)] if moving else []
        if units and self._may_use(units, "write"):
            self._finish_use(units, "write", None)

    @rule(seed=SEEDS)
    def let_a_page_leave_that_a_kernel_will_read(self, seed: int) -> None:
        """It is clean, so nothing is copied and nothing waits for the kernel; its frame must."""
        random = Random(seed)
        away = [u for u in self.units() if self.h.table.at[u] in (Place.HOST, Place.NVME)]
        random.shuffle(away)
        if len(away) > 1 and self._may_use(away[:2], "read"):
            self._finish_use(away[:1], "read", random.choice((0, 1)))
            self.h.carry(self.h.planner.demote(self.h.rows(away[:1]), self.h.now))
            self._finish_use(away[1:2], "read", None)

    @rule(seed=SEEDS)
    def read_a_page_in_place_and_use_it(self, seed: int) -> None:
        """Read by a kernel that may not have run yet when the page is loaded after all."""
        random, stream = Random(seed), seed % 2
        for unit in self._read_in_place(random, stream, 1):
            then = random.choice(ACCESSES)
            self._finish_use([unit], then, None if then == "read" else stream)

    @rule(seed=SEEDS)
    def read_pages_in_place_and_press_them_out(self, seed: int) -> None:
        random, stream = Random(seed), seed % 2
        if self._read_in_place(random, stream, 6):
            for _ in range(2):  # once before the kernels have run, once after
                self._mover_verb(random, demote=True)  # the host may get short
                self.copies_end(2)
                self.mover()
                self.kernels_run(stream)

    @rule(seed=SEEDS)
    def fault(self, seed: int) -> None:
        random = Random(seed)
        units = self.pick(random, self.units(), 2)
        access = random.choice(ACCESSES)
        if not units or len(self.held) + len(self.waiting) > 2:
            return
        if not self._may_use(units, access):
            return
        stream = random.choice((0, 1)) if access == "read" and random.random() < 0.4 else None
        try:
            request = self.h.begin(units, access, stream is not None, random.choice(TOUCHES))
        except (PageLost, TierFull, TierFailed):
            return
        if request.taken:
            self._take(Work(request, access), stream)
        self._enter_ready()

    @rule(seed=SEEDS)
    def fault_and_leave(self, seed: int) -> None:
        self.fault(seed)
        self.leave(seed)

    @rule(seed=SEEDS)
    def read_behind_a_load(self, seed: int) -> None:
        """A kernel is queued while its pages come, and may run before anything else ends."""
        random, stream = Random(seed), seed % 2
        for _ in range(3):  # the first attempts may find no frame
            below = [unit for unit in self.units() if self.h.table.at[unit] == Place.HOST]
            units = self.pick(random, below, 2)
            if not units or not self._may_use(units, "read"):
                return
            try:
                request = self.h.begin(units, "read", True)
            except (PageLost, TierFull, TierFailed):
                return
            if request.taken:
                self._take(work := Work(request, "read"), stream)
                if work.stream is not None:
                    self.held.remove(work)
                    self.h.work(request, "read", stream)
                    self.h.leave(request, stream)
                    self.h.world.streams.advance(stream, random.choice((0, 1000)))
                break
            self.h.advance_for(request)
        self._enter_ready()

    @rule(seed=SEEDS)
    def pin_one_page(self, seed: int) -> None:
        """The short way to a page that rests on the GPU."""
        random = Random(seed)
        units = self.pick(random, self.units(), 1)
        access = random.choice(ACCESSES[:4])
        if units and self.h.table.max_unit_pages == 1 and self._may_use(units, access):
            rows = self.h.rows(units)
            if access != "read":
                self._synchronise(rows, None)
            if self.h.pin_one(units[0], access):
                self.h.leave(Request(rows), None)

    @rule(seed=SEEDS)
    def abandon(self, seed: int) -> None:
        if self.waiting:
            work = self.waiting.pop(Random(seed).randrange(len(self.waiting)))
            self.h.planner.abandon(work.request)

    @rule(seed=SEEDS)
    def leave(self, seed: int) -> None:
        if self.held:
            random = Random(seed)
            work = self.held.pop(random.randrange(len(self.held)))
            stream = random.choice(STREAMS) if work.stream is None else work.stream
            if stream is not None:
                self._synchronise(work.request.rows, stream)
            if stream is not None or work.access != "read":
                self.h.work(work.request, work.access, stream)
            self.h.leave(work.request, stream)

    @rule(seed=SEEDS)
    def free(self, seed: int) -> None:
        units = self.pick(Random(seed), self.units(), 1)
        if not units:
            return
        rows = self.h.rows(units)
        used = (self.h.table.pins[rows] > 0) | (self.h.table.waiters[rows] > 0)
        try:
            self.h.free(rows)
        except PageInUse:
            assert used.any()
        else:
            assert not used.any(), f"pages {rows} were freed while in use"
        self.h.settle_ready()

    # ---------------------------------------------------------------- the world

    @rule(stream=st.sampled_from([0, 1]))
    def kernels_run(self, stream: int) -> None:
        self.h.world.streams.advance(stream)
        self.h.settle_ready()
        self._enter_ready()

    @rule(count=st.integers(1, 3))
    def copies_end(self, count: int) -> None:
        for _ in range(count):
            self.h.step()
        self._enter_ready()

    @rule()
    def mover(self) -> None:
        self.h.observe()
        self.h.carry(self.h.planner.relieve(self.h.now))

    @rule(pages=st.integers(1, 4))
    def clean(self, pages: int) -> None:
        """Under a lease idle pages are copied to the host and stay where they are."""
        if isinstance(self.h.planner, LeasedPlanner):
            self.h.now += CLEAN_EVERY_MS
            self.h.observe()
            self.h.carry(self.h.planner.clean(CLEAN_BYTES // pages, self.h.now))

    @rule(seed=SEEDS)
    def prefetch(self, seed: int) -> None:
        self._mover_verb(Random(seed), demote=False)

    @rule(seed=SEEDS)
    def demote(self, seed: int) -> None:
        self._mover_verb(Random(seed), demote=True)

    @rule(seed=SEEDS)
    def a_copy_will_fail(self, seed: int) -> None:
        random = Random(seed)
        if self.h.routes:
            route = random.choice(list(self.h.routes))
            self.h.routes[route].fail(random.randint(1, 2))

    @rule(seed=SEEDS)
    def a_tier_fails_for_good(self, seed: int) -> None:
        random = Random(seed)
        stores = [r for r in self.h.routes if r[1] != Place.GPU]
        if stores and random.random() < 0.1:
            self.h.routes[random.choice(stores)].latched = True

    @rule(limit=st.integers(2, 6))
    def limit(self, limit: int) -> None:
        """The GPU's budget moves; what is freed is given back and comes again."""
        if self.parked is None:
            self.h.planner.limits[Place.GPU] = max(limit, self.gpu_units)
            self.parked = self.h.planner.surrender()
        else:
            self.h.planner.grow(Place.GPU, self.parked)
            self.parked = None
            self.h.planner.limits.clear()

    @invariant()
    def nothing_is_wrong(self) -> None:
        if hasattr(self, "h"):
            self.h.check()

    # ---------------------------------------------------------------- the end

    def teardown(self) -> None:
        if not hasattr(self, "h"):
            return
        for work in self.waiting:
            self.h.planner.abandon(work.request)
        for work in self.held:
            self.h.leave(work.request, work.stream)
        self.h.drain()
        self.h.check_idle()
        for row in list(self.h.model):  # every page that was written and not lost holds that
            if self.h.table.unit[row] == row and row in self.h.model:
                self._read_back(row)
        self.h.drain()
        self.h.check_idle()

    def _read_back(self, row: int) -> None:
        lost = len(self.h.gone)
        if not self.h.use([row], "read"):
            failed = Place.GPU in self.h.planner.failed_tiers
            assert failed or len(self.h.gone) > lost, f"page {row}: {self.h.refusal}"

    # ---------------------------------------------------------------- parts

    def units(self) -> list[int]:
        table = self.h.table
        rows = np.flatnonzero((table.at != Place.NONE) & ((table.flags & DOOMED) == 0))
        return [int(r) for r in rows if table.unit[r] == r and r < self.h.rows_of_regions]

    def vacant(self) -> list[int]:
        """Units all of whose pages are vacant."""
        table, vacant = self.h.table, set(self.h.vacant)
        return [
            u
            for u in sorted(vacant)
            if table.unit[u] == u and set(self.h.rows([u]).tolist()) <= vacant
        ]

    def pick(self, random: Random, units: list[int], most: int) -> list[int]:
        return random.sample(units, min(len(units), random.randint(1, most)))

    def write_new(self, head: int) -> None:
        if self.h.allocate([head]):
            self.h.use([head], "write")

    def _mover_verb(self, random: Random, demote: bool) -> None:
        units = self.pick(random, self.units(), 3)
        if units:
            verb = self.h.planner.demote if demote else self.h.planner.prefetch
            self.h.carry(verb(self.h.rows(units), self.h.now))

    def _use(self, random: Random, access: Access | None, away: bool = False) -> None:
        units = self.units()
        if away:
            units = [u for u in units if self.h.table.at[u] != Place.GPU]
        chosen = self.pick(random, units, 2)
        which: Access = random.choice(ACCESSES) if access is None else access
        if chosen and self._may_use(chosen, which):
            self._finish_use(chosen, which, random.choice(STREAMS), random.choice(TOUCHES))

    def _finish_use(
        self, units: list[int], access: Access, stream: int | None, touches: int | None = None
    ) -> None:
        if access != "read" or stream is not None:
            self._synchronise(self.h.rows(units), stream)
        self.h.use(units, access, stream, touches)
        self._enter_ready()

    def _read_in_place(self, random: Random, stream: int, most: int) -> list[int]:
        """Queue a read of pages that rest in the host tier and show no frame; which ones."""
        table, hidden = self.h.table, (Shown.NOTHING, Shown.IN_PLACE)
        if self.h.planner.crossover is None:
            return []
        for _ in range(2):
            below = [
                u for u in self.units() if table.at[u] == Place.HOST and table.shown[u] in hidden
            ]
            chosen = random.sample(below, min(most, len(below)))
            if chosen and self._may_use(chosen, "write"):
                self._finish_use(chosen, "read", stream, touches=0)
                return chosen
            self._mover_verb(random, demote=True)
            self.copies_end(3)
        return []

    def _may_use(self, units: list[int], access: str) -> bool:
        """Users do not write what others use at the same time."""
        rows = set(self.h.rows(units).tolist())
        return not any(
            rows & set(other.request.rows.tolist()) and (access != "read" or other.access != "read")
            for other in self.held + self.waiting
        )

    def _take(self, work: Work, stream: int | None) -> None:
        """A taken request waits for its loads, unless a stream can do that."""
        if stream is not None and work.request.pending and self.h.order(work.request, stream):
            self._synchronise(work.request.rows, stream)
            work.stream = stream
            self.held.append(work)
        else:
            self.waiting.append(work)

    def _enter_ready(self) -> None:
        for work in list(self.waiting):
            if work.request.pending:
                continue
            self.waiting.remove(work)
            if work.request.failed or Place.GPU in self.h.planner.failed_tiers:
                self.h.planner.abandon(work.request)
                continue
            self.h.enter(work.request, work.access)
            if work.access != "read":
                self._synchronise(work.request.rows, None)
                self.h.write_now(work.request)
            self.held.append(work)

    def _synchronise(self, rows: np.ndarray, stream: int | None) -> None:
        """As an engine would: work on a page goes to one stream until that has passed."""
        for row in rows.tolist():
            other = self.stream_of.pop(row, None)
            if other is not None and other != stream:
                self.h.world.streams.advance(other, 1000)
            if stream is not None:
                self.stream_of[row] = stream


def machine_settings(runs: int, *, repeat: bool) -> settings:
    """No shrinking, which takes minutes; repeat: the same examples every time."""
    return settings(
        max_examples=runs,
        stateful_step_count=STEPS,
        phases=(Phase.explicit, Phase.generate),
        derandomize=repeat,
        database=None,
        deadline=None,
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
        print_blob=True,
    )


PagerMachine.TestCase.settings = machine_settings(RUNS or 400, repeat=not RUNS)
TestThePagerServesNoWrongBytes = PagerMachine.TestCase
