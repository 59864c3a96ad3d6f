"""Directed mode: one planner's plans, carried out by the executors of two ranks.

The ranks finish copies at different times and in different orders, and one of them may fail alone.
An outcome counts once both have reported it. A second planner that hears the same verbs and the
same outcomes makes the same plans and has the same table at every step.
"""

from __future__ import annotations

from random import Random

import numpy as np
import pytest

from tests.harness import Harness
from tiermem.books import Crossover
from tiermem.errors import PageLost, TierFailed, TierFull
from tiermem.executor import Flight
from tiermem.plan import Copy, Drop, Hide, Outcome, Plan, Show, ShowInPlace, Step, Zero, merge
from tiermem.planner import Access, Marks, Request
from tiermem.table import DOOMED, Rows
from tiermem.tier import Fence, Place

STREAM = 0


def same_step(a: Step, b: Step) -> bool:
    if isinstance(a, Drop) and isinstance(b, Drop):
        return a.reason == b.reason and np.array_equal(a.units, b.units)
    if isinstance(a, Zero) and isinstance(b, Zero):
        return np.array_equal(a.frames, b.frames)
    if isinstance(a, Hide) and isinstance(b, Hide):
        return np.array_equal(a.pages, b.pages) and np.array_equal(a.frees, b.frees)
    if isinstance(a, Show) and isinstance(b, Show):
        return np.array_equal(a.pages, b.pages) and np.array_equal(a.frames, b.frames)
    if isinstance(a, ShowInPlace) and isinstance(b, ShowInPlace):
        return np.array_equal(a.pages, b.pages) and np.array_equal(a.slots, b.slots)
    if isinstance(a, Copy) and isinstance(b, Copy):
        pairs = ((a.pages, b.pages), (a.src_slots, b.src_slots), (a.dst_slots, b.dst_slots))
        same = all(np.array_equal(x, y) for x, y in pairs)
        return same and (a.src, a.dst, a.after, a.stays) == (b.src, b.dst, b.after, b.stays)
    return False


def same_plans(left: list[Plan], right: list[Plan]) -> bool:
    return len(left) == len(right) and all(
        a.id == b.id
        and len(a.steps) == len(b.steps)
        and all(same_step(x, y) for x, y in zip(a.steps, b.steps, strict=True))
        for a, b in zip(left, right, strict=True)
    )


class Ranks:
    """The first rank's planner directs; the second's is a shadow that must always agree."""

    def __init__(self, seed: int, eager: bool, unit: int, in_order: bool = True) -> None:
        self.random = Random(seed)
        self.ranks = [
            Harness(
                gpu=6, host=4, nvme=10, regions=((12, unit, 0), (6, unit, 1)), eager=eager,
                marks=Marks(0.9, 0.6), seed=seed + other, attic=True, in_order=in_order,
                crossover=Crossover(1, 3),
            )
            for other in (0, 1000)
        ]  # fmt: skip
        self.director, self.shadow = self.ranks
        self.flights: dict[int, list[Flight]] = {}
        self.reported: list[Outcome] = []

    def carry(self, plans: list[Plan], shadows: list[Plan]) -> None:
        assert same_plans(plans, shadows), "the same verbs gave different plans"
        for plan in plans:
            self.flights[plan.id] = [rank.executor.start(plan) for rank in self.ranks]

    def settle_ready(self) -> None:
        """An outcome counts when both ranks have reported."""
        while ended := [p for p, pair in self.flights.items() if all(f.ready() for f in pair)]:
            for plan in ended:
                outcomes = [flight.outcome() for flight in self.flights.pop(plan)]
                self.reported += outcomes
                merged = merge(outcomes)
                self.carry(*[rank.planner.settle(merged, rank.now) for rank in self.ranks])
            self.observe()
            self.carry(*[rank.planner.settle_idle() for rank in self.ranks])
        for rank in self.ranks:
            reaped = rank.planner.take_reaped()
            for row in reaped[reaped < rank.rows_of_regions].tolist():
                rank.vacant.append(row)
                rank.model.pop(row, None)

    def observe(self) -> None:
        """A fence has passed once it has on both ranks."""
        passed = np.minimum(*[rank.world.streams.passed() for rank in self.ranks])
        for rank in self.ranks:
            rank.table.fences.observe(passed)

    def fault(self, rows: Rows, access: Access, touches: int | None) -> Request | None:
        """Until the pages are pinned, on both; None if they cannot be had."""
        for _ in range(50):
            self.observe()
            asked: list[Request] = []
            refused: list[str] = []
            for rank in self.ranks:
                try:
                    fault = rank.planner.fault(rows, access, rank.now, touches=touches)
                    asked.append(fault)
                except (PageLost, TierFailed, TierFull) as error:
                    refused.append(str(error))
            if refused:
                assert refused[0] == refused[1], "only one planner refused"
                return None
            first, second = asked
            assert (first.taken, first.pending) == (second.taken, second.pending)
            self.carry(first.plans, second.plans)
            self.wait(first)
            if first.taken and not first.failed:
                return first
            for rank, request in zip(self.ranks, asked, strict=True):
                rank.planner.abandon(request)
        raise AssertionError(f"pages {rows} cannot be had")

    def wait(self, request: Request) -> None:
        """Until something that an untaken request waits for has happened; all, for a taken one."""
        if request.fence.ticks and not request.pending:
            self._reach(request.fence)
        while request.pending:
            for flight in self.flights[min(request.pending)]:
                flight.wait()
            self.settle_ready()
            if not request.taken:
                break
        self.settle_ready()

    def use(self, units: list[int], access: Access, stream: int | None) -> None:
        for rank in self.ranks:
            rank.now += 1
        touches = self.random.choice((None, 0, 1))
        request = self.fault(self.director.rows(units), access, touches)
        if request is None:
            return
        for rank in self.ranks:
            if access == "fresh":
                for row in request.rows.tolist():
                    rank.model.pop(row, None)
            rank.enter(request, access)
            if stream is None:  # as an engine would, it waits for what it queued on the page
                rank.world.streams.advance(STREAM, 1000)
            rank.work(request, access, stream)
            rank.leave(request, stream)

    def allocate(self, unit: int) -> None:
        rows = self.director.rows([unit])
        for _ in range(50):
            self.observe()
            try:
                first, second = (r.planner.allocate(rows, r.now) for r in self.ranks)
            except TierFull:
                return
            self.carry(first.plans, second.plans)
            self.wait(first)
            if first.taken:
                for rank in self.ranks:
                    rank.alive |= set(rows.tolist())
                    rank.vacant = [row for row in rank.vacant if row not in rank.alive]
                return

    def label(self, rows: Rows) -> None:
        """The scheduler knows what is in a page that it has had written."""
        for rank in self.ranks:
            if not (rank.table.at[rows] == Place.LOST).any():
                rank.planner.label(rows, np.array([[rank.now + 1, 1]], np.uint64))

    def back_up(self) -> None:
        self.observe()
        self.carry(*[rank.planner.back_up(rank.now) for rank in self.ranks])

    def step(self) -> None:
        """Something happens on one rank or the other: they drift apart."""
        rank = self.ranks[self.random.random() < 0.3]
        rank.world.finish()
        if self.random.random() < 0.3:
            rank.world.streams.advance(STREAM)
        self.settle_ready()

    def drain(self) -> None:
        for rank in self.ranks:
            rank.world.streams.advance(STREAM, 1000)
        while self.flights:
            for rank in self.ranks:
                rank.world.finish_all()
            self.settle_ready()
        self.settle_ready()

    def check(self) -> None:
        for rank in self.ranks:
            rank.check()
        assert self.director.snapshot() == self.shadow.snapshot(), "the tables differ"

    def units(self) -> list[int]:
        table = self.director.table
        live = np.flatnonzero((table.at != Place.NONE) & ((table.flags & DOOMED) == 0))
        return [int(u) for u in live if table.unit[u] == u and u < self.director.rows_of_regions]

    def _reach(self, fence: Fence) -> None:
        for rank in self.ranks:
            rank.world.streams.reach(fence)
        self.settle_ready()


def act(ranks: Ranks, failing: bool) -> None:
    """One random verb of the scheduler, or something happening on a rank."""
    random, units = ranks.random, ranks.units()
    heads = ranks.director.table.unit
    vacant = [u for u in ranks.director.vacant if heads[u] == u]
    verb = random.randrange(14)
    if verb < 2 and vacant:
        ranks.allocate(random.choice(vacant))
    elif verb < 7 and units:
        access: Access = random.choice(("read", "read", "write", "fresh"))
        ranks.use([random.choice(units)], access, random.choice((None, STREAM)))
    elif verb == 7 and units:
        rows = ranks.director.rows([random.choice(units)])
        ranks.carry(*[r.planner.demote(rows, r.now) for r in ranks.ranks])
    elif verb == 8 and units:
        rows = ranks.director.rows([random.choice(units)])
        ranks.carry(*[r.planner.prefetch(rows, r.now) for r in ranks.ranks])
    elif verb == 9:
        ranks.carry(*[r.planner.relieve(r.now) for r in ranks.ranks])
    elif verb == 10 and units and random.random() < 0.5:
        rows = ranks.director.rows([random.choice(units)])
        for rank in ranks.ranks:
            rank.alive -= set(rows.tolist())
        ranks.carry(*[r.planner.free(rows, r.now) for r in ranks.ranks])
        ranks.settle_ready()
    elif verb == 12 and units:
        rows = ranks.director.rows([random.choice(units)])
        ranks.label(rows)
    elif verb >= 12:
        ranks.back_up()
    elif verb == 11 and failing:
        route = random.choice(list(ranks.director.routes))
        random.choice(ranks.ranks).routes[route].fail(1)
    ranks.step()


@pytest.mark.parametrize("unit", [1, 2], ids=["pages", "units-of-two"])
@pytest.mark.parametrize("eager", [False, True], ids=["lazy", "eager"])
@pytest.mark.parametrize("failing", [False, True], ids=["sound", "failing"])
@pytest.mark.parametrize("in_order", [False, True], ids=["any-order", "in-order"])
def test_two_ranks_with_different_delays_end_in_the_same_table(
    eager: bool, failing: bool, unit: int, in_order: bool
) -> None:
    moved = saved = 0
    for seed in range(12):
        ranks = Ranks(seed, eager, unit, in_order)
        for _ in range(60):
            act(ranks, failing)
            ranks.check()
        ranks.drain()
        ranks.check()
        moved += sum(rank.planner.counts["gpu_host"] for rank in ranks.ranks)
        saved += sum(rank.planner.counts["backed_up"] for rank in ranks.ranks)
        first, second = ranks.ranks
        assert first.window.shown == second.window.shown, "the ranks show different frames"
        assert first.model == second.model
        for place in (Place.GPU, Place.HOST, Place.NVME):
            rows = np.flatnonzero(first.table.at == place)
            rows = rows[[int(row) in first.model for row in rows]]
            slots = first.table.slot(place)[rows]
            expected = np.array([first.model[int(row)] for row in rows], np.int64)
            for rank in ranks.ranks:
                words = rank.memories[place].words[slots]
                assert (words == expected[:, None]).all(), f"wrong bytes in {place.name}"
    assert moved > 100
    assert saved > 10


def test_an_entry_counts_as_failed_if_it_failed_on_any_rank() -> None:
    good, bad = np.array([False, False]), np.array([False, True])
    error = TierFailed("on one rank")
    merged = merge([Outcome(3, (None, good, None)), Outcome(3, (None, bad, bad), error)])
    assert merged.plan == 3
    assert merged.failed[0] is None
    assert merged.failed[1] is not None
    assert merged.failed[1].tolist() == [False, True]
    assert merged.failed[2] is bad
    assert merged.error is error


def test_a_plan_is_not_settled_while_one_rank_has_not_reported() -> None:
    ranks = Ranks(0, eager=False, unit=1)
    ranks.allocate(0)
    ranks.drain()
    rows = ranks.director.rows([0])
    ranks.carry(*[r.planner.demote(rows, r.now) for r in ranks.ranks])
    ranks.director.world.finish_all()
    ranks.settle_ready()
    assert ranks.director.table.at[0] == Place.GPU
    assert ranks.director.table.to[0] == Place.HOST
    ranks.shadow.world.finish_all()
    ranks.settle_ready()
    assert ranks.director.table.at[0] == Place.HOST
    assert ranks.director.planner.is_idle()


def test_a_failure_on_one_rank_keeps_the_page_on_both() -> None:
    ranks = Ranks(0, eager=False, unit=1)
    ranks.allocate(0)
    ranks.use([0], "write", None)
    ranks.shadow.routes[Place.GPU, Place.HOST].fail(1)
    rows = ranks.director.rows([0])
    ranks.carry(*[r.planner.demote(rows, r.now) for r in ranks.ranks])
    ranks.drain()
    ranks.check()
    assert [int(r.table.at[0]) for r in ranks.ranks] == [Place.GPU, Place.GPU]
    ranks.use([0], "read", None)
    ranks.check()


def test_a_page_is_saved_once_both_ranks_have_written_it() -> None:
    ranks = Ranks(0, eager=False, unit=1)
    ranks.allocate(0)
    ranks.use([0], "write", None)
    rows = ranks.director.rows([0])
    ranks.label(rows)
    ranks.shadow.routes[Place.GPU, Place.NVME].fail(1)
    for _ in range(2):  # the first time one rank fails
        ranks.back_up()
        ranks.director.world.finish_all()
        ranks.settle_ready()
        assert not any(r.planner.counts["backed_up"] for r in ranks.ranks)
        ranks.drain()
        ranks.check()
    assert [r.planner.counts["backed_up"] for r in ranks.ranks] == [1, 1]
    slots = [int(rank.table.slot(Place.NVME)[0]) for rank in ranks.ranks]
    assert slots[0] == slots[1] >= 0
    for rank in ranks.ranks:
        assert (rank.memories[Place.NVME].words[slots[0]] == rank.model[0]).all()
