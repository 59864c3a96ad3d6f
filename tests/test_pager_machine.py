"""The pager under a state machine: adversarial copies, queued kernels, invariants at every step."""

from __future__ import annotations

import os

import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.harness import Harness
from tiermem.errors import PageInUse, PageLost, TierFailed, TierFull
from tiermem.planner import Marks, Request
from tiermem.tier import Place

RUNS = int(os.environ.get("MACHINE_RUNS", "100"))


class PagerMachine(RuleBasedStateMachine):
    """Requests are begun, wait, are finished or abandoned, in any order with everything else."""

    @initialize(
        seed=st.integers(0, 2**16),
        eager=st.booleans(),
        shape=st.sampled_from(
            [(4, 3, 6, 1), (3, 0, 5, 1), (4, 3, 0, 1), (3, 0, 0, 1), (6, 4, 8, 2), (4, 2, 4, 1)]
        ),
        marks=st.sampled_from([Marks(1.0, 1.0), Marks(0.8, 0.5)]),
    )
    def start(self, seed: int, eager: bool, shape: tuple[int, int, int, int], marks: Marks) -> None:
        gpu, host, nvme, unit = shape
        self.h = Harness(
            gpu=gpu, host=host, nvme=nvme, regions=((12, unit, 0), (6, unit, 1)),
            eager=eager, marks=marks, seed=seed,
        )  # fmt: skip
        self.gpu_units = gpu // unit
        self.waiting: list[tuple[Request, str]] = []
        self.held: list[tuple[Request, str]] = []
        self.stream_of: dict[int, int] = {}

    def units(self) -> list[int]:
        table = self.h.table
        rows = np.flatnonzero((table.at != Place.NONE) & ((table.flags & 2) == 0))
        return [int(r) for r in rows if table.unit[r] == r]

    def vacant(self) -> list[int]:
        """Units all of whose pages are vacant."""
        table, vacant = self.h.table, set(self.h.vacant)
        return [
            u
            for u in sorted(vacant)
            if table.unit[u] == u and set(self.h.rows([u]).tolist()) <= vacant
        ]

    def pick(self, data: st.DataObject, units: list[int], most: int) -> list[int]:
        chosen = st.lists(st.sampled_from(units), min_size=1, max_size=most, unique=True)
        return data.draw(chosen)

    @rule(data=st.data())
    def allocate(self, data: st.DataObject) -> None:
        vacant = self.vacant()
        if not vacant or self.waiting:
            return
        self.h.allocate(self.pick(data, vacant, 2))

    @rule(data=st.data(), access=st.sampled_from(["read", "write", "fresh"]))
    def fault(self, data: st.DataObject, access: str) -> None:
        units = self.units()
        if not units or len(self.held) + len(self.waiting) > 3:
            return
        chosen = self.pick(data, units, 2)
        if self._has_writer(chosen, access):
            return
        try:
            request = self.h.begin(chosen, access)  # type: ignore[arg-type]
        except (PageLost, TierFull, TierFailed):
            return
        if request.taken:
            self.waiting.append((request, access))
        self._enter_ready()

    def _has_writer(self, units: list[int], access: str) -> bool:
        """Users do not write what others use at the same time."""
        rows = set(self.h.rows(units).tolist())
        for request, other in self.held + self.waiting:
            if rows & set(request.rows.tolist()) and (access != "read" or other != "read"):
                return True
        return False

    def _enter_ready(self) -> None:
        for entry in list(self.waiting):
            request, access = entry
            if request.pending:
                continue
            self.waiting.remove(entry)
            if request.failed or Place.GPU in self.h.planner.failed_tiers:
                self.h.planner.abandon(request)
                continue
            self.h.enter(request, access)  # type: ignore[arg-type]
            if access != "read":
                self._synchronise(request, None)
                self.h.write_now(request)
            self.held.append(entry)

    def _synchronise(self, request: Request, stream: int | None) -> None:
        """As an engine would: work on a page goes to one stream until that has passed."""
        for row in request.rows.tolist():
            other = self.stream_of.pop(row, None)
            if other is not None and other != stream:
                self.h.world.streams.advance(other, 1000)
            if stream is not None:
                self.stream_of[row] = stream

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def abandon(self, data: st.DataObject) -> None:
        entry = data.draw(st.sampled_from(range(len(self.waiting))))
        request, _ = self.waiting.pop(entry)
        self.h.planner.abandon(request)

    @precondition(lambda self: self.held)
    @rule(data=st.data(), stream=st.sampled_from([None, 0, 1]))
    def leave(self, data: st.DataObject, stream: int | None) -> None:
        entry = data.draw(st.sampled_from(range(len(self.held))))
        request, access = self.held.pop(entry)
        if stream is not None:
            self._synchronise(request, stream)
            self.h.launch(request.rows, stream, write=access != "read")
        self.h.leave(request, stream)

    @rule(stream=st.sampled_from([0, 1]))
    def kernels_run(self, stream: int) -> None:
        self.h.world.streams.advance(stream)
        self.h.settle_ready()
        self._enter_ready()

    @rule(count=st.integers(1, 4))
    def copies_end(self, count: int) -> None:
        for _ in range(count):
            self.h.step()
        self._enter_ready()

    @rule()
    def mover(self) -> None:
        self.h.observe()
        self.h.carry(self.h.planner.relieve(self.h.now))

    @rule(data=st.data())
    def prefetch(self, data: st.DataObject) -> None:
        units = self.units()
        if units:
            rows = self.h.rows(self.pick(data, units, 3))
            self.h.carry(self.h.planner.prefetch(rows, self.h.now))

    @rule(data=st.data())
    def demote(self, data: st.DataObject) -> None:
        units = self.units()
        if units:
            rows = self.h.rows(self.pick(data, units, 3))
            self.h.carry(self.h.planner.demote(rows, self.h.now))

    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        units = self.units()
        if not units:
            return
        rows = self.h.rows(self.pick(data, units, 2))
        used = (self.h.table.pins[rows] > 0) | (self.h.table.waiters[rows] > 0)
        try:
            self.h.carry(self.h.planner.free(rows, self.h.now))
        except PageInUse:
            assert used.any()
        else:
            assert not used.any()
        self.h.settle_ready()

    @rule(data=st.data(), entries=st.integers(1, 2))
    def a_copy_will_fail(self, data: st.DataObject, entries: int) -> None:
        routes = [r for r in self.h.routes if r[0] != Place.GPU]
        if routes:
            self.h.routes[data.draw(st.sampled_from(routes))].fail(entries)

    @rule(data=st.data())
    def a_store_will_fail(self, data: st.DataObject) -> None:
        routes = [r for r in self.h.routes if r[0] == Place.GPU]
        if routes:
            self.h.routes[data.draw(st.sampled_from(routes))].fail(1)

    @rule(limit=st.integers(2, 6))
    def limit(self, limit: int) -> None:
        """The GPU's budget moves; what is freed is given back and comes again."""
        pool = self.h.pools[Place.GPU]
        if limit >= pool.capacity and getattr(self, "parked", None) is not None:
            self.h.planner.grow(Place.GPU, self.parked)
            self.parked = None
            self.h.planner.limits.clear()
        elif getattr(self, "parked", None) is None:
            self.h.planner.limits[Place.GPU] = max(limit, self.gpu_units)
            self.parked = self.h.planner.surrender()

    @invariant()
    def nothing_is_wrong(self) -> None:
        if hasattr(self, "h"):
            self.h.check()

    def teardown(self) -> None:
        if not hasattr(self, "h"):
            return
        for request, _ in self.waiting:
            self.h.planner.abandon(request)
        for request, _ in self.held:
            self.h.leave(request, None)
        self.h.drain()
        self.h.check()
        assert self.h.planner.is_idle(), "work is left over"
        for row in list(self.h.model):
            if self.h.table.at[row] == Place.LOST:
                continue
            self._read_back(row)
        self.h.check()

    def _read_back(self, row: int) -> None:
        """Every page that was written and not lost holds what was written."""
        if self.h.table.unit[row] != row:
            return
        for _ in range(50):
            try:
                request = self.h.begin([row], "read")
            except (PageLost, TierFailed):
                return
            while request.pending:
                self.h.advance_for(request)
            if request.taken and not request.failed:
                self.h.enter(request, "read")
                self.h.leave(request, None)
                return
            self.h.planner.abandon(request)
        raise AssertionError(f"page {row} cannot be read")


PagerMachine.TestCase.settings = settings(
    max_examples=RUNS,
    stateful_step_count=60,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    print_blob=True,
)
TestThePagerServesNoWrongBytes = PagerMachine.TestCase
