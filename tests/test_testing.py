"""The fakes are as adversarial as they claim, and the contract suites notice what is broken."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from tiermem.errors import Closed, DriverError, TierFailed
from tiermem.policies.base import Candidates, EvictionBase, Ids, Keys
from tiermem.policies.registry import load
from tiermem.testing import (
    GARBAGE,
    DelayedRoute,
    FailingRoute,
    FakeMemory,
    FakeRoute,
    FakeWindow,
    LateRoute,
    RouteContract,
    SomeCandidates,
    World,
    check_answer,
    check_policy,
)
from tiermem.tier import PASSED, Fence, Memory, Place, Route, Slots


def ids(*values: int) -> Slots:
    return np.array(values, np.int32)


def at(*values: int) -> np.ndarray:
    return np.array(values, np.uint64)


def copied_while_written(seed: int) -> tuple[int, int]:
    """What lands when the source is overwritten between submission and completion."""
    world = World(seed)
    src, dst = FakeMemory(Place.GPU, 1), FakeMemory(Place.HOST, 1)
    src.words[0] = 1
    done = FakeRoute(world, src, dst).submit(ids(0), ids(0), PASSED)
    src.words[0] = 2
    world.finish(None)
    assert done.ready()
    return int(dst.words[0][0]), int(dst.words[0][1])


def test_a_copy_reads_its_source_early_late_or_half_and_half() -> None:
    assert {copied_while_written(seed) for seed in range(40)} == {(1, 1), (2, 2), (1, 2)}


def test_the_same_seed_gives_the_same_world() -> None:
    assert [copied_while_written(s) for s in range(20)] == [
        copied_while_written(s) for s in range(20)
    ]


def test_a_copy_behind_a_fence_reads_nothing_before_it() -> None:
    for seed in range(20):
        world = World(seed)
        src, dst = FakeMemory(Place.GPU, 1), FakeMemory(Place.HOST, 1)

        def kernel(memory: FakeMemory = src) -> None:
            memory.words[0] = 9

        world.streams.launch(0, kernel)
        tick = world.streams.tick(0)
        assert tick is not None
        FakeRoute(world, src, dst).submit(ids(0), ids(0), Fence((tick,)))
        world.finish_all()
        assert dst.words[0].tolist() == [9, 9]


def test_copies_end_out_of_order() -> None:
    orders = set()
    for seed in range(20):
        world = World(seed)
        src, dst = FakeMemory(Place.GPU, 3), FakeMemory(Place.HOST, 3)
        route = FakeRoute(world, src, dst)
        dones = [route.submit(ids(i), ids(i), PASSED) for i in range(3)]
        ended: list[int] = []
        while len(ended) < 3:
            world.finish()
            ended += [i for i, d in enumerate(dones) if d.ready() and i not in ended]
        orders.add(tuple(ended))
    assert len(orders) > 2


def test_a_failed_entry_leaves_garbage_and_says_so() -> None:
    world = World()
    src, dst = FakeMemory(Place.GPU, 2), FakeMemory(Place.HOST, 2)
    src.words[:] = 1
    route = FakeRoute(world, src, dst)
    route.fail(1)
    done = route.submit(ids(0, 1), ids(0, 1), PASSED)
    world.finish_all()
    assert done.failed is not None
    assert done.failed.tolist() == [True, False]
    assert isinstance(done.error, DriverError)
    assert dst.words.tolist() == [[GARBAGE] * 2, [1, 1]]
    route.latched = True
    with pytest.raises(TierFailed):
        route.submit(ids(0), ids(0), PASSED)


def test_a_window_refuses_what_cuda_refuses_and_keeps_its_order() -> None:
    world = World()
    window = FakeWindow(world)
    first = window.show(at(100), ids(0))
    over = window.show(at(100), ids(1))
    hidden = window.hide(at(100))
    absent = window.hide(at(100))
    absent.wait()
    assert first.ready()
    assert hidden.ready()
    assert first.error is None
    assert hidden.error is None
    assert isinstance(over.error, DriverError)
    assert isinstance(absent.error, DriverError)
    assert window.shown == {}


def test_a_stream_that_waited_for_a_failed_copy_runs_nothing_more() -> None:
    world, ran = World(), []
    src, dst = FakeMemory(Place.HOST, 1), FakeMemory(Place.GPU, 1)
    route = FakeRoute(world, src, dst)
    route.fail(1)
    done = route.submit(ids(0), ids(0), PASSED)
    done.order(0)  # type: ignore[attr-defined]
    world.streams.launch(0, lambda: ran.append(0))
    world.streams.launch(1, lambda: ran.append(1))
    world.streams.advance(0, 9)
    world.streams.advance(1, 9)
    assert ran == [1]
    assert done.ready()


def test_a_late_route_copies_a_slice_when_it_is_waited_for() -> None:
    src, dst = FakeMemory(Place.HOST, 2), FakeMemory(Place.GPU, 2)
    src.words[:] = [[1, 2], [3, 4]]
    done = LateRoute(src, dst).submit(ids(0, 1), ids(1, 0), PASSED)
    assert (dst.words == GARBAGE).all()
    (first, front), (second, _) = done.slices
    assert (first, second) == (0, 8)
    front.order(None)
    assert dst.words.tolist() == [[3, GARBAGE], [1, GARBAGE]]
    assert not done.ready()
    done.order(None)
    assert dst.words.tolist() == [[3, 4], [1, 2]]
    assert done.ready()


def test_a_delayed_route_ends_when_it_is_released() -> None:
    world = World()
    src, dst = FakeMemory(Place.GPU, 1), FakeMemory(Place.HOST, 1)
    route = DelayedRoute(FakeRoute(world, src, dst))
    done = route.submit(ids(0), ids(0), PASSED)
    world.finish_all()
    assert not done.ready()
    assert not done.wait(0.0)
    assert route.held == 1
    route.release()
    assert done.wait(0.0)
    assert route.held == 0
    route.close()


def test_a_failing_route_refuses_while_it_is_told_to() -> None:
    world = World()
    src, dst = FakeMemory(Place.GPU, 1), FakeMemory(Place.HOST, 1)
    route = FailingRoute(FakeRoute(world, src, dst))
    route.failing = True
    with pytest.raises(TierFailed, match="on purpose"):
        route.submit(ids(0), ids(0), PASSED)
    route.failing = False
    route.submit(ids(0), ids(0), PASSED).wait()
    route.close()


# ---------------------------------------------------------------- contract suites


class TestTheFakeRouteKeepsTheContract(RouteContract):
    def make(self) -> tuple[Memory, Memory, Route, Callable[[], None]]:
        world = World()
        src, dst = FakeMemory(Place.GPU, 8), FakeMemory(Place.HOST, 8)
        return src, dst, FakeRoute(world, src, dst), world.finish_all


class TestALateRouteKeepsTheContract(RouteContract):
    def make(self) -> tuple[Memory, Memory, Route, Callable[[], None]]:
        src, dst = FakeMemory(Place.HOST, 8), FakeMemory(Place.GPU, 8)
        return src, dst, LateRoute(src, dst), lambda: None


class Broken(RouteContract):
    """Copies one slot too few, or takes work after close."""

    def __init__(self, route: Callable[[World, FakeMemory, FakeMemory], Route]) -> None:
        self._route = route

    def make(self) -> tuple[Memory, Memory, Route, Callable[[], None]]:
        world = World()
        src, dst = FakeMemory(Place.GPU, 8), FakeMemory(Place.HOST, 8)
        return src, dst, self._route(world, src, dst), world.finish_all


class Forgetful(FakeRoute):
    def submit(self, src: Slots, dst: Slots, after: Fence):  # type: ignore[no-untyped-def]
        return super().submit(src[:-1] if len(src) > 1 else src, dst[: max(1, len(dst) - 1)], after)


class Tireless(FakeRoute):
    def close(self) -> None:
        pass


def test_the_contract_notices_a_slot_that_was_not_copied() -> None:
    with pytest.raises(AssertionError):
        Broken(Forgetful).test_copies_each_slot_to_its_destination()


def test_the_contract_notices_a_route_that_works_after_close() -> None:
    with pytest.raises(AssertionError, match="a closed route took work"):
        Broken(Tireless).test_refuses_work_after_close_and_closes_twice()


class Twice(EvictionBase):
    """Names its oldest unit twice."""

    name = "twice"

    def __init__(self, capacity: int, seed: int = 0) -> None:
        super().__init__(capacity, seed)
        self._held: list[int] = []

    def inserted(self, units: Ids, parents: Ids, depths: Ids, keys: Keys | None, now: int) -> None:
        self._held += units.tolist()

    def removed(self, units: Ids, now: int) -> None:
        self._held = [u for u in self._held if u not in units.tolist()]

    def victims(self, candidates: Candidates, n: int, now: int) -> Ids:
        return ids(*(self._held[:1] * 2))[:n]


def test_the_policy_suite_passes_lru_and_fails_a_wrong_policy() -> None:
    check_policy(lambda capacity: load("lru", capacity))
    with pytest.raises(AssertionError):
        check_policy(Twice)


def test_an_answer_that_leaves_candidates_over_is_noticed() -> None:
    some = SomeCandidates({1, 2, 3})
    check_answer(some, ids(3, 1), 2)
    check_answer(some, ids(1, 2, 3), 9)
    for wrong in (ids(1, 1), ids(1, 4), ids(1)):
        with pytest.raises(AssertionError):
            check_answer(some, wrong, 2)
    with pytest.raises(AssertionError, match="3 victims, 2 asked for"):
        check_answer(some, ids(1, 2, 3), 2)


def test_closed_fakes_refuse_work() -> None:
    world = World()
    route = FakeRoute(world, FakeMemory(Place.GPU, 1), FakeMemory(Place.HOST, 1))
    route.close()
    with pytest.raises(Closed):
        route.submit(ids(0), ids(0), PASSED)
