"""A pager over adversarial fakes, beside a model that knows what every page must hold."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from tiermem.books import Crossover
from tiermem.errors import NotOurs, PageLost, TierFailed, TierFull
from tiermem.executor import Executor, Flight
from tiermem.plan import Plan
from tiermem.planner import Access, Marks, Planner, Request
from tiermem.policies.base import Candidates, EvictionBase, Ids, Keys
from tiermem.ranking import Ranking
from tiermem.table import PageTable, Rows, Shown
from tiermem.testing import GARBAGE, WORDS, FakeMemory, FakeRoute, FakeWindow, World
from tiermem.tier import TIERS, Done, Place, SlotPool, Slots

ALL_ROUTES = (*((a, b) for a in TIERS for b in TIERS if a != b), (Place.HOST, Place.HOST))
TENANT = 1_000_000


class SimpleLru(EvictionBase):
    """The plainest possible policy, so that a test of the pager tests the pager."""

    name = "simple"
    leaf_first = True

    def __init__(self, capacity: int = 0, seed: int = 0) -> None:
        super().__init__(capacity, seed)
        self._order: dict[int, None] = {}

    def inserted(self, units: Ids, parents: Ids, depths: Ids, keys: Keys | None, now: int) -> None:
        for unit in units.tolist():
            assert unit not in self._order, f"unit {unit} entered twice"
            self._order[unit] = None

    def accessed(self, units: Ids, now: int) -> None:
        for unit in units.tolist():
            if unit in self._order:
                del self._order[unit]
                self._order[unit] = None

    def removed(self, units: Ids, now: int) -> None:
        for unit in units.tolist():
            del self._order[unit]

    def victims(self, candidates: Candidates, n: int, now: int) -> Ids:
        units = np.fromiter(self._order, np.int32)
        return units[candidates.keep(units)][:n]


class Harness:
    """Planner and executor over fakes, driven step by step.

    Every page's two words are (value, value); `model` says which value. A read that finds
    anything else, through the address and the frame shown there, is wrong bytes.
    """

    def __init__(
        self,
        *,
        gpu: int = 4,
        host: int = 3,
        nvme: int = 6,
        regions: tuple[tuple[int, int, int], ...] = ((12, 1, 0), (6, 1, 1)),
        eager: bool = False,
        routes: tuple[tuple[Place, Place], ...] = ALL_ROUTES,
        marks: Marks | None = None,
        seed: int = 0,
        attic: bool = False,
        in_order: bool = False,
        crossover: Crossover | None = None,
        planner: type[Planner] = Planner,
    ) -> None:
        """regions: (pages, unit pages, tenant) each. Plans are always carried out in order."""
        self.world = World(seed)
        self.table = PageTable()
        sizes = {Place.GPU: gpu, Place.HOST: host, Place.NVME: nvme}
        self.memories = {place: FakeMemory(place, n) for place, n in sizes.items()}
        self.pools = {place: SlotPool(place, n) for place, n in sizes.items()}
        rankings = {p: Ranking(p, SimpleLru(), self.table) for p in TIERS}
        self.window = FakeWindow(self.world)
        self.routes = {
            (a, b): FakeRoute(self.world, self.memories[a], self.memories[b])
            for a, b in routes
            if sizes[a] and sizes[b]
        }
        self.gone: list[tuple[int, str]] = []
        self.planner = planner(
            self.table,
            self.pools,
            rankings,
            routes=self.routes,
            eager=eager,
            in_order=in_order,
            marks={p: marks for p in TIERS} if marks else None,
        )
        self.planner.crossover = crossover
        self.executor = Executor(
            window=self.window,
            routes=self.routes,
            zero=self._zero,
            addresses=lambda rows: rows.astype(np.uint64) * 100,
            region_of=lambda rows: self.table.region[rows],
            on_gone=self._on_gone,
            in_place=self.window.show_in_place,
        )
        for pages, unit, tenant in regions:
            self.table.extend(pages, unit, tenant)
        self.vacant = list(range(self.table.rows))
        self.rows_of_regions = self.table.rows
        if attic:
            self.planner.open_attic(nvme)
        self.flights: dict[int, Flight] = {}
        self.model: dict[int, int] = {}  # page -> value, for pages that have been written
        self.alive: set[int] = set()  # pages that are allocated, as far as their owner knows
        self.now = 0
        self.next_value = 1
        self.wrong: list[str] = []
        self.refusal = ""  # the last

    # ------------------------------------------------------------ carrying out and settling

    def carry(self, plans: list[Plan]) -> None:
        for plan in plans:
            self.flights[plan.id] = self.executor.start(plan)

    def settle_ready(self) -> None:
        progress = True
        while progress:
            ended = [f for f in self.flights.values() if f.ready()]
            progress = bool(ended)
            for flight in ended:
                del self.flights[flight.plan.id]
                self.carry(self.planner.settle(flight.outcome(), self.now))
            self.observe()
            self.carry(self.planner.settle_idle())
        reaped = self.planner.take_reaped()
        for row in reaped[reaped < self.rows_of_regions].tolist():
            assert row not in self.vacant, f"page {row} became vacant twice"
            assert row not in self.alive, f"page {row} was taken away and nobody told"
            self.vacant.append(row)
            self.model.pop(row, None)

    def observe(self) -> None:
        self.table.fences.observe(self.world.streams.passed())

    def step(self) -> None:
        self.world.finish()
        self.settle_ready()

    def drain_copies(self) -> None:
        """End every copy that waits for no kernel."""
        for _ in range(len(self.world.pending)):
            self.step()

    def drain(self) -> None:
        """Run everything to its end."""
        for stream in range(2):
            self.world.streams.advance(stream, 1000)
        self.settle_ready()
        while self.flights or self.world.pending:
            self.world.finish_all()
            self.settle_ready()

    # ------------------------------------------------------------ verbs with their checks

    def rows(self, units: list[int]) -> Rows:
        return self.table.pages(np.array(units, np.int32))

    def allocate(self, units: list[int]) -> bool:
        """Allocate vacant units, waiting as long as it takes; False if the tiers are full."""
        rows = self.rows(units)
        while True:
            self.now += 1
            self.observe()
            try:
                request = self.planner.allocate(rows, self.now)
            except (TierFailed, TierFull):
                return False
            self.carry(request.plans)
            if request.taken:
                break
            self.advance_for(request)
        while request.pending:
            self.advance_for(request)
        for row in rows.tolist():
            self.vacant.remove(row)
        if request.failed:
            self.carry(self.planner.free(rows, self.now))
            return False
        self.alive |= set(rows.tolist())
        for row in rows.tolist():
            self._check_fresh(row)
        return True

    def free(self, rows: Rows) -> None:
        self.carry(self.planner.free(rows, self.now))
        self.alive -= set(rows.tolist())

    def use(
        self,
        units: list[int],
        access: Access,
        stream: int | None = None,
        touches: int | None = None,
        inside: Callable[[], None] = lambda: None,
    ) -> bool:
        """Fault, wait, enter, work and leave, in one go; False if the pages cannot be had.

        inside: what else the user does before it leaves.
        """
        for _ in range(50):
            try:
                request = self.begin(units, access, touches=touches)
            except (PageLost, TierFailed, TierFull) as error:
                self.refusal = str(error)
                return False
            except NotOurs:
                assert not set(self.rows(units).tolist()) <= self.alive, "an owned page is denied"
                return False
            if not request.taken:
                self.advance_for(request)
                continue
            while request.pending:
                self.advance_for(request)
            if not request.failed:
                self.enter(request, access)
                self.work(request, access, stream)
                inside()
                self.leave(request, stream)
                return True
            self.planner.abandon(request)
        raise AssertionError(f"units {units} cannot be had")

    def pin_one(self, row: int, access: Access) -> bool:
        """The fast path: pinned and worked on at once, or not pinned at all."""
        self.now += 1
        self.observe()
        if not self.planner.pin_one(row, access != "read", self.now):
            return False
        request = Request(np.array([row], np.int32))
        if access == "read":
            self.verify(row)
        else:
            self.write_now(request)
        return True

    def work(self, request: Request, access: Access, stream: int | None) -> None:
        """What the caller does with pinned pages: by itself, or by a kernel that runs later."""
        if stream is not None:
            self.launch(request.rows, stream, write=access != "read")
        elif access != "read":
            self.write_now(request)

    def begin(
        self,
        units: list[int],
        access: Access,
        order: bool = False,
        touches: int | None = None,
    ) -> Request:
        """One attempt at a fault; the caller finishes it or abandons it."""
        self.now += 1
        self.observe()
        rows = self.rows(units)
        request = self.planner.fault(rows, access, self.now, order=order, touches=touches)
        self.carry(request.plans)
        if access == "fresh" and request.taken:
            for row in request.rows.tolist():  # the old bytes are given up from now on
                self.model.pop(row, None)
        return request

    def order(self, request: Request, stream: int) -> bool:
        """Let a stream wait for this request's loads, as the pager does."""
        if not self.planner.order(request):
            return False
        kernels_only = self.world.random.random() < 0.5
        if not all([self.flights[p].order(stream, kernels_only) for p in request.pending]):
            return False
        self.planner.run_ahead(request, self.now)
        return True

    def advance_for(self, request: Request) -> None:
        """Make something happen that the request may be waiting for."""
        if request.pending:
            plan_id = min(request.pending)
            assert plan_id in self.flights, f"waiting for plan {plan_id}, which nobody carries out"
            self.flights[plan_id].wait()
        elif request.fence.ticks:
            self.world.streams.reach(request.fence)
        self.settle_ready()

    def enter(self, request: Request, access: Access) -> None:
        """The pages of a taken request are pinned: touch, and check or write them."""
        self.planner.touch(request.rows, self.now)
        if access != "read":
            self.planner.wrote(request.rows)
        for row in request.rows.tolist():
            assert self.table.pins[row] > 0, f"page {row} is not pinned"
            resident = self.table.at[row] == Place.GPU
            if access == "read":
                resident |= self.table.shown[row] == Shown.IN_PLACE
            assert resident, f"page {row} is pinned and neither on the GPU nor shown in place"
            if access == "read":
                self.verify(row)

    def launch(self, rows: Rows, stream: int, write: bool) -> None:
        """Queue a kernel that reads, or writes, pinned pages when the stream gets there."""
        values = {}
        for row in rows.tolist():
            if write:
                self.model[row] = self.next_value + TENANT * int(self.table.tenant[row])
                self.next_value += 1
            values[row] = self.model.get(row)

        def kernel() -> None:
            if Place.GPU in self.planner.failed_tiers:
                return
            for row, value in values.items():
                words = self.seen(row)
                if words is None:
                    self.wrong.append(f"kernel touched page {row}, which shows nothing")
                elif write and self.window.shown[row * 100] < 0:
                    self.wrong.append(f"kernel wrote page {row} in place")
                elif write:
                    assert value is not None
                    words[:] = value
                elif value is not None:
                    found = words.tolist()
                    if found != [value] * WORDS:
                        self.wrong.append(f"kernel read {found} in page {row}, not {value}")

        self.world.streams.launch(stream, kernel)

    def leave(self, request: Request, stream: int | None) -> None:
        self.planner.unpin(request.rows, self.world.streams.tick(stream))

    def write_now(self, request: Request) -> None:
        """The caller's own thread writes pinned pages, through their addresses."""
        for row in request.rows.tolist():
            self.model[row] = self.next_value + TENANT * int(self.table.tenant[row])
            self.next_value += 1
            self.memories[Place.GPU].words[self.window.shown[row * 100]] = self.model[row]

    def verify(self, row: int) -> None:
        if row not in self.model or Place.GPU in self.planner.failed_tiers:
            return  # a failed GPU serves nobody: work that waited for its loads never ran
        words = self.seen(row)
        if words is None:
            self.wrong.append(f"page {row} shows nothing")
            return
        found = words.tolist()
        if found != [self.model[row]] * WORDS and not self._kernel_pending(row):
            self.wrong.append(f"read {found} in page {row}, not {self.model[row]}")

    def seen(self, row: int) -> npt.NDArray[np.int64] | None:
        """The words that a page's address shows."""
        slot = self.window.shown.get(row * 100)
        if slot is None:
            return None
        place = Place.GPU if slot >= 0 else Place.HOST
        words: npt.NDArray[np.int64] = self.memories[place].words[slot if slot >= 0 else -1 - slot]
        return words

    def check(self) -> None:
        assert not self.wrong, self.wrong
        self.planner.check()
        for place, ranking in self.planner.rankings.items():
            assert not ranking.fallbacks, f"the policy of {place.name} was told or asked wrongly"

    def check_idle(self) -> None:
        """After `drain`: nothing is left over, and every page is its owner's or vacant."""
        self.check()
        assert self.planner.is_idle(), "work is left over"
        if Place.GPU not in self.planner.failed_tiers:
            assert self.window.shown == self._believed(), "addresses show what the table does not"
        assert not self.table.busy.any(), "a page is busy when nothing is under way"
        held = np.flatnonzero(self.table.at[: self.rows_of_regions] != Place.NONE).tolist()
        assert set(held) == self.alive, "pages that are held are not those that were allocated"
        vacant = set(range(self.rows_of_regions)) - self.alive
        assert set(self.vacant) == vacant, "a page is forgotten"

    def _believed(self) -> dict[int, int]:
        """What each address shows, as the table says."""
        table = self.table
        frames = np.where(
            table.shown == Shown.IN_PLACE, -1 - table.slot(Place.HOST), table.slot(Place.GPU)
        )
        rows = np.flatnonzero(table.shown != Shown.NOTHING)
        return {int(row) * 100: int(frames[row]) for row in rows}

    def snapshot(self) -> dict[str, list[int]]:
        """The table, for comparison with another's."""
        columns = ("at", "to", "flags", "pins", "gen")
        return {name: getattr(self.table, name).tolist() for name in columns}

    # ------------------------------------------------------------ parts

    def _kernel_pending(self, row: int) -> bool:
        return not self.table.fences.is_passed(self.table.fence[[row]]).all()

    def _check_fresh(self, row: int) -> None:
        """A newly allocated page must not show another tenant's bytes."""
        frame = self.window.shown[row * 100]
        word = int(self.memories[Place.GPU].words[frame][0])
        if word > 0 and word // TENANT != int(self.table.tenant[row]):
            self.wrong.append(f"page {row} shows bytes of tenant {word // TENANT}")

    def _zero(self, frames: Slots) -> Done:
        def run(done: object) -> None:
            self.memories[Place.GPU].words[frames] = 0

        done = self.world.submit(run)
        done.wait()
        return done

    def _on_gone(self, units: Rows, reason: str) -> None:
        for row in self.table.pages(units).tolist():
            assert self.table.at[row] != Place.NONE, f"page {row} was vacant before {reason}"
            if row >= self.rows_of_regions:
                continue  # content in the attic is nobody's
            self.gone.append((row, reason))
            self.model.pop(row, None)
            if reason != "lost":
                self.alive.remove(row)


def settle_until(harness: Harness, condition: Callable[[], bool]) -> None:
    for _ in range(1000):
        if condition():
            return
        harness.step()
    raise AssertionError("nothing more happens")


__all__ = ["GARBAGE", "Harness", "SimpleLru", "settle_until"]
