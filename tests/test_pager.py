"""The pager's threads: waiting, settling, being woken, interrupted and closed."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest

from tests.harness import SimpleLru
from tiermem.errors import Closed, TierFull
from tiermem.executor import Executor, Flight
from tiermem.pager import Pager
from tiermem.plan import Plan
from tiermem.planner import Planner
from tiermem.ranking import Ranking
from tiermem.table import PageTable, Rows
from tiermem.testing import FakeMemory, FakeRoute, FakeWindow, World
from tiermem.tier import TIERS, Done, Fence, Finished, Mask, Place, SlotPool, Slots

GPU, HOST = Place.GPU, Place.HOST
LONG_S = 30.0


class GatedRoute:
    """Copies at once; the Done is ready when the gate opens. Safe to use from threads."""

    def __init__(self, route: FakeRoute, world: World) -> None:
        self.src, self.dst = route.src, route.dst
        self.gate = threading.Event()
        self.gate.set()
        self.submitted = threading.Event()
        self._route, self._world = route, world

    def submit(self, src: Slots, dst: Slots, after: Fence) -> Done:
        done = self._route.submit(src, dst, after)
        self._world.finish_all()
        self.submitted.set()
        return _Gated(done, self.gate)

    def close(self) -> None:
        self._route.close()


class _Gated:
    def __init__(self, done: Done, gate: threading.Event) -> None:
        self._done, self._gate = done, gate

    @property
    def error(self) -> Exception | None:
        return self._done.error

    @property
    def failed(self) -> Mask | None:
        return self._done.failed

    def ready(self) -> bool:
        return self._gate.is_set()

    def wait(self, timeout_s: float | None = None) -> bool:
        return self._gate.wait(timeout_s)

    def order(self, stream: int | None) -> None:
        """Streams of this rig do no work, and so wait for nothing."""


class Rig:
    """A pager over fakes that end their work at once, except loads behind a gate."""

    def __init__(self, gpu: int = 2, host: int = 4) -> None:
        self.world = World()
        self.table = PageTable()
        sizes = {GPU: gpu, HOST: host, Place.NVME: 0}
        memories = {p: FakeMemory(p, n) for p, n in sizes.items()}
        self.memories = memories
        self.down = GatedRoute(FakeRoute(self.world, memories[GPU], memories[HOST]), self.world)
        self.up = GatedRoute(FakeRoute(self.world, memories[HOST], memories[GPU]), self.world)
        routes = {(GPU, HOST): self.down, (HOST, GPU): self.up}
        self.window = _Prompt(FakeWindow(self.world), self.world)
        self.planner = Planner(
            self.table,
            {p: SlotPool(p, n) for p, n in sizes.items()},
            {p: Ranking(p, SimpleLru(), self.table) for p in TIERS},
            routes=routes,
            eager=True,
        )
        executor = Executor(
            window=self.window,
            routes=routes,
            zero=lambda frames: Finished(),
            addresses=lambda rows: rows.astype(np.uint64) * 100,
            region_of=lambda rows: self.table.region[rows],
            on_gone=lambda rows, reason: None,
        )
        self.woken = 0
        self.streams = self.world.streams
        self.pager = Pager(
            self.planner,
            executor,
            now=lambda: 0,
            passed=self._passed,
            wait_fence=self._wait_fence,
            wake=self._wake,
        )
        self.table.extend(12)

    def resident(self, *rows: int) -> None:
        self.pager.allocate(ids(*rows))
        self.pager.use(ids(*rows), "write")
        self.pager.unpin(ids(*rows), None)

    def away(self, *rows: int) -> None:
        self.resident(*rows)
        self.pager.decide(lambda: self.planner.demote(ids(*rows), 0))
        assert self.pager.drain(LONG_S)
        assert (self.table.at[ids(*rows)] == HOST).all()

    def _passed(self) -> npt.NDArray[np.uint64]:
        return self.streams.passed()

    def _wait_fence(self, fence: Fence, timeout_s: float) -> bool:
        return self.streams.wait(fence, timeout_s)

    def _wake(self) -> None:
        self.woken += 1


class _Prompt:
    """A window that has done what it was told when it returns."""

    def __init__(self, window: FakeWindow, world: World) -> None:
        self._window, self._world = window, world

    def show(self, addresses: npt.NDArray[np.uint64], frames: Slots) -> Done:
        done = self._window.show(addresses, frames)
        done.wait()
        return done

    def hide(self, addresses: npt.NDArray[np.uint64]) -> Done:
        done = self._window.hide(addresses)
        done.wait()
        return done


def ids(*rows: int) -> Rows:
    return np.array(rows, np.int32)


def background(work: Callable[[], object]) -> tuple[threading.Thread, list[BaseException]]:
    """A thread that keeps what it raised."""
    raised: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, raised


def test_a_use_returns_when_its_load_has_ended_and_holds_the_page() -> None:
    rig = Rig()
    rig.away(0)
    rig.up.gate.clear()
    thread, raised = background(lambda: rig.pager.use(ids(0), "read"))
    assert rig.up.submitted.wait(LONG_S)
    assert thread.is_alive()
    assert rig.table.pins[0] == 0
    rig.up.gate.set()
    thread.join(LONG_S)
    assert not raised
    assert rig.table.pins[0] == 1
    assert rig.pager.fault_latency.statistics().n == 1
    rig.pager.unpin(ids(0), None)
    rig.planner.check()


def test_threads_that_want_one_page_share_its_load() -> None:
    rig = Rig()
    rig.away(0)
    rig.up.gate.clear()
    threads = [background(lambda: rig.pager.use(ids(0), "read")) for _ in range(6)]
    assert rig.up.submitted.wait(LONG_S)
    rig.up.gate.set()
    for thread, raised in threads:
        thread.join(LONG_S)
        assert not raised
    assert rig.table.pins[0] == 6
    assert rig.planner.counts["host_gpu"] == 1
    rig.planner.check()


def test_a_use_of_resident_pages_waits_for_nothing_and_counts_as_no_fault() -> None:
    rig = Rig()
    rig.resident(0, 1)
    before = rig.pager.fault_latency.statistics().n
    rig.pager.use(ids(0, 1), "read")
    rig.pager.unpin(ids(0, 1), None)
    assert rig.pager.use_one(0, True)
    rig.pager.unpin_one(0)
    assert rig.pager.fault_latency.statistics().n == before
    assert not rig.table.pins.any()


def test_one_page_that_is_away_takes_the_long_way() -> None:
    rig = Rig()
    rig.away(0)
    assert not rig.pager.use_one(0, False)
    assert not rig.table.pins.any()


def test_a_use_that_is_refused_pins_nothing() -> None:
    rig = Rig()
    rig.resident(0, 1)
    rig.pager.use(ids(0, 1), "read")
    with pytest.raises(TierFull, match="2 of 2 pinned"):
        rig.pager.allocate(ids(2))
    rig.pager.unpin(ids(0, 1), None)
    assert not rig.table.pins.any()
    rig.planner.check()


def test_a_thread_that_is_interrupted_while_it_waits_leaves_no_pin(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rig = Rig()
    rig.away(0)
    rig.up.gate.clear()

    def interrupt(self: _Gated, timeout_s: float | None = None) -> bool:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(_Gated, "wait", interrupt)
        with pytest.raises(KeyboardInterrupt):
            rig.pager.use(ids(0), "read")
    assert rig.table.waiters[0] == rig.table.pins[0] == 0
    rig.up.gate.set()
    assert rig.pager.drain(LONG_S)
    assert rig.table.at[0] == GPU, "the load went on and nobody holds the page"
    rig.planner.check()


def test_drain_says_when_it_did_not_come_to_the_end() -> None:
    rig = Rig()
    rig.resident(0)
    rig.down.gate.clear()
    rig.pager.decide(lambda: rig.planner.demote(ids(0), 0))
    assert rig.pager.busy()
    assert not rig.pager.drain(0.0)
    rig.down.gate.set()
    assert rig.pager.drain(LONG_S)
    assert not rig.pager.busy()
    assert rig.table.at[0] == HOST


def test_whatever_was_decided_wakes_the_mover() -> None:
    rig = Rig()
    rig.resident(0)
    before = rig.woken
    rig.pager.decide(lambda: rig.planner.demote(ids(0), 0))
    assert rig.woken > before
    assert rig.pager.drain(LONG_S)


def test_a_closed_pager_refuses_work_and_settles_what_is_under_way() -> None:
    rig = Rig()
    rig.resident(0)
    rig.pager.decide(lambda: rig.planner.demote(ids(0), 0))
    rig.pager.close()
    assert rig.table.at[0] == HOST
    for verb in (
        lambda: rig.pager.use(ids(0), "read"),
        lambda: rig.pager.use_one(0, False),
        lambda: rig.pager.allocate(ids(1)),
        lambda: rig.pager.free(ids(0)),
    ):
        with pytest.raises(Closed, match="the space is closed"):
            verb()
    rig.pager.close()


def test_a_thread_that_waits_for_a_frame_goes_on_when_one_is_given_up() -> None:
    rig = Rig(gpu=1, host=4)
    rig.resident(0)
    rig.pager.use(ids(0), "read")
    rig.streams.launch(0, lambda: None)
    rig.pager.unpin(ids(0), rig.streams.tick(0))  # a kernel is behind it
    rig.pager.allocate(ids(1))
    assert rig.table.at[1] == GPU
    assert rig.table.at[0] == HOST
    rig.planner.check()


def test_the_stream_and_not_the_caller_waits_for_loads_some_of_which_were_begun_ahead() -> None:
    rig = Rig(gpu=3)
    rig.away(0, 1)
    rig.up.gate.clear()
    rig.pager.decide(lambda: rig.planner.prefetch(ids(0), 0))
    assert rig.table.to[0] == GPU
    rig.pager.use(ids(0, 1), "read", stream=0)  # would wait for ever
    assert (rig.table.pins[:2] == 1).all()
    assert rig.pager.busy()
    rig.up.gate.set()
    assert rig.pager.drain(LONG_S)
    assert (rig.table.at[:2] == GPU).all()
    assert (rig.table.pins[:2] == 1).all()
    rig.planner.check()


class _Outrun(Pager):
    """The mover takes every plan in hand, and is slow to start it."""

    def _start(self) -> None:
        if self._todo:
            background(super()._start)
            while self._todo:
                time.sleep(0.001)


def test_the_caller_does_not_wait_for_loads_that_the_mover_is_just_starting(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rig = Rig(gpu=3)
    rig.away(0, 1)
    rig.up.gate.clear()
    start = rig.pager.executor.start

    def late(plan: Plan) -> Flight:
        time.sleep(0.05)
        return start(plan)

    monkeypatch.setattr(rig.pager.executor, "start", late)
    rig.pager.__class__ = _Outrun
    thread, raised = background(lambda: rig.pager.use(ids(0, 1), "read", stream=0))
    thread.join(LONG_S / 10)
    waits = thread.is_alive()
    rig.up.gate.set()
    thread.join(LONG_S)
    assert not waits
    assert not raised
    assert rig.pager.drain(LONG_S)
    assert (rig.table.pins[:2] == 1).all()
    rig.planner.check()


class _Overtaken(Pager):
    """Others settle what has ended before whoever has just started it looks."""

    _settling = False

    def _start(self) -> None:
        super()._start()
        if not self._settling:
            self._settling = True
            self.settle_ready()
            self._settling = False


def test_who_needs_room_asks_again_though_others_have_settled_what_made_it() -> None:
    rig = Rig(gpu=3)
    rig.away(0)
    rig.resident(1, 2)
    rig.up.gate.clear()
    rig.pager.decide(lambda: rig.planner.prefetch(ids(0), 0))  # never ends
    rig.pager.__class__ = _Overtaken
    rig.pager.allocate(ids(3))
    assert rig.table.at[3] == GPU
    rig.up.gate.set()
    assert rig.pager.drain(LONG_S)
    rig.planner.check()
