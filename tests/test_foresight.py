"""Prefetch in a running space: told facts, loads within its budget, makes way, and is measured."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest

from tests.harness import Harness
from tiermem import Config, Evict, Gpu, Host, Nvme, Space
from tiermem.config import Prefetch
from tiermem.errors import BadPolicy, ConfigError, NotOurs
from tiermem.facts import Ended, Expected, Idle, Left, Queued
from tiermem.foresight import PATIENCE_MS, Foresight
from tiermem.nvme.cap import bytes_for
from tiermem.planner import Marks
from tiermem.policies.base import Ids
from tiermem.policies.prefetch import Budget, HintPrefetch, NoPrefetch, Quality, QueuePrefetch
from tiermem.policies.recompute import RouteSpeed
from tiermem.region import Region
from tiermem.tier import GPU, HOST, NVME, Place

PAGE = 64 << 10
LONG_S = 30.0


def foresight(h: Harness, most: int, gbps: float = np.inf) -> Foresight:
    quality = h.planner.gauge = Quality(1)
    found = Foresight(h.planner, quality, 1, lambda: {p: RouteSpeed(gbps) for p in (HOST, NVME)})
    found.run(HintPrefetch(), most, h.now)
    return found


def below(gpu: int = 4, host: int = 8, pages: int = 8) -> Harness:
    """Pages 0.. rest in the host, and the GPU is empty."""
    h = Harness(gpu=gpu, host=host, nvme=0, regions=((16, 1, 0),), eager=True)
    for page in range(pages):
        assert h.allocate([page])
        assert h.use([page], "write")
        h.carry(h.planner.demote(h.rows([page]), h.now))
        h.drain()
    assert (h.table.at[:pages] == HOST).all()
    return h


def ids(*units: int) -> Ids:
    return np.array(units, np.int32)


def on_gpu(h: Harness) -> list[int]:
    return np.flatnonzero(h.table.at == GPU).tolist()


def turn(h: Harness, ahead: Foresight) -> None:
    h.carry(ahead.turn(h.now))
    h.drain()
    h.check()


# ---------------------------------------------------------------- over the planner


def test_what_waits_is_loaded_in_order_within_the_budget_until_it_is_used() -> None:
    h = below()
    ahead = foresight(h, most=3)
    ahead.tell(Queued(1, [0, 1]), ids(0, 1), 0, h.now)
    ahead.tell(Queued(2, [2, 3]), ids(2, 3), 0, h.now)
    turn(h, ahead)
    assert on_gpu(h) == [0, 1, 2]
    turn(h, ahead)
    assert on_gpu(h) == [0, 1, 2], "the budget is loaded, and nothing of it was used"
    assert ahead.is_hungry
    assert h.use([0, 1], "read")
    turn(h, ahead)
    assert on_gpu(h) == [0, 1, 2, 3]
    assert not ahead.is_hungry
    quality = ahead.statistics().quality
    assert (quality.loaded, quality.used, quality.late, quality.waiting) == (4, 2, 0, 2)
    assert quality.coverage == quality.timeliness == 1.0


def test_a_request_that_left_is_not_loaded_for() -> None:
    h = below(gpu=2)
    ahead = foresight(h, most=4)
    ahead.tell(Queued(1, [0, 1, 2]), ids(0, 1, 2), 0, h.now)
    turn(h, ahead)
    assert on_gpu(h) == [0, 1]
    ahead.tell(Left(1), ids(), 0, h.now)
    h.free(h.rows([0]))
    h.drain()
    turn(h, ahead)
    assert on_gpu(h) == [1]
    assert not ahead.is_hungry


def test_a_session_is_loaded_for_shortly_before_it_is_due_and_not_after_it_ended() -> None:
    h = below()
    ahead = foresight(h, most=4)
    for session, fact in ((1, None), (2, Ended(2)), (3, Idle(3))):
        unit = ids(session)
        ahead.tell(Expected(session, [session], in_s=10), unit, 0, h.now)
        if fact is not None:
            ahead.tell(fact, ids(), 0, h.now)
    ahead.tell(Expected(1, [5], in_s=10), ids(5), 1, h.now)  # another region's session 1
    turn(h, ahead)
    assert on_gpu(h) == []
    h.now += 9_000
    turn(h, ahead)
    assert on_gpu(h) == [1, 5]


def test_way_is_made_down_to_the_low_mark_and_what_it_costs_is_counted() -> None:
    h = below(gpu=4, host=12)
    h.planner.marks[GPU] = Marks(1.0, 0.5)
    for page in (10, 11, 12, 13):
        assert h.allocate([page])
        assert h.use([page], "write")
    ahead = foresight(h, most=4)
    ahead.tell(Queued(1, [0, 1, 2]), ids(0, 1, 2), 0, h.now)
    turn(h, ahead)  # makes way
    assert on_gpu(h) == [12, 13]
    turn(h, ahead)
    assert on_gpu(h) == [0, 1, 12, 13]
    assert ahead.is_hungry, "page 2 waits for room"
    assert h.use([0, 1], "read")
    assert h.use([11], "read")
    quality = ahead.statistics().quality
    assert (quality.used, quality.polluting) == (2, 1)
    assert quality.coverage == 2 / 3


def test_a_page_that_is_used_while_it_is_on_its_way_counts_as_late() -> None:
    h = below()
    ahead = foresight(h, most=4)
    ahead.tell(Queued(1, [0, 1]), ids(0, 1), 0, h.now)
    h.carry(ahead.turn(h.now))
    request = h.begin([0], "read")
    while request.pending:
        h.advance_for(request)
    h.leave(request, None)
    h.drain()
    quality = ahead.statistics().quality
    assert (quality.used, quality.late, quality.timeliness) == (1, 1, 0.0)
    h.free(h.rows([1]))
    h.drain()
    quality = ahead.statistics().quality
    assert (quality.wasted, quality.wasted_bytes, quality.accuracy) == (1, 1, 0.5)


def test_what_leaves_unused_or_never_arrives_is_wasted() -> None:
    h = below()
    ahead = foresight(h, most=2)
    ahead.tell(Queued(1, [0, 1]), ids(0, 1), 0, h.now)
    turn(h, ahead)
    h.carry(h.planner.demote(h.rows([0]), h.now))
    h.drain()
    assert ahead.statistics().quality.wasted == 1
    h.routes[HOST, GPU].fail(1)
    ahead.tell(Queued(2, [2]), ids(2), 0, h.now)
    turn(h, ahead)
    quality = ahead.statistics().quality
    assert (quality.loaded, quality.wasted, quality.waiting) == (3, 2, 1)
    assert on_gpu(h) == [1]


def test_new_content_in_a_page_that_was_pushed_out_is_no_pollution() -> None:
    h = below(gpu=2, pages=1)
    h.planner.marks[GPU] = Marks(1.0, 0.5)
    for page in (10, 11):
        assert h.allocate([page])
        assert h.use([page], "write")
    ahead = foresight(h, most=1)
    ahead.tell(Queued(1, [0]), ids(0), 0, h.now)
    turn(h, ahead)
    turn(h, ahead)
    assert on_gpu(h) == [0, 11]
    h.free(h.rows([10]))
    h.drain()
    h.free(h.rows([11]))
    h.drain()
    assert h.allocate([10])
    h.carry(h.planner.demote(h.rows([10]), h.now))
    h.drain()
    assert h.use([10], "read")
    quality = ahead.statistics().quality
    assert (quality.needed, quality.polluting) == (1, 0)


def test_a_page_whose_frame_still_shows_it_is_taken_back_and_not_counted_as_a_load() -> None:
    h = Harness(gpu=4, host=4, nvme=0, regions=((8, 1, 0),))
    for page in (0, 1):
        assert h.allocate([page])
        assert h.use([page], "write")
    h.carry(h.planner.demote(h.rows([0]), h.now))
    h.drain()
    ahead = foresight(h, most=4)
    ahead.tell(Queued(1, [0]), ids(0), 0, h.now)
    turn(h, ahead)
    assert on_gpu(h) == [0, 1]
    assert h.use([0], "read")
    quality = ahead.statistics().quality
    assert (quality.loaded, quality.used, quality.needed) == (0, 0, 0)


def test_what_nobody_came_for_gives_the_budget_back_after_a_while() -> None:
    h = below()
    ahead = foresight(h, most=1)
    ahead.tell(Queued(1, [0]), ids(0), 0, h.now)
    turn(h, ahead)
    ahead.tell(Queued(2, [1]), ids(1), 0, h.now)
    turn(h, ahead)
    assert on_gpu(h) == [0]
    h.now += PATIENCE_MS + 1
    turn(h, ahead)
    assert on_gpu(h) == [0, 1]


def test_only_so_much_is_under_way_as_a_load_on_demand_may_wait_behind() -> None:
    h = below()
    ahead = foresight(h, most=4, gbps=1 / 4e6)  # a page of one byte takes 4 ms
    ahead.tell(Queued(1, [0, 1, 2, 3]), ids(0, 1, 2, 3), 0, h.now)
    h.carry(ahead.turn(h.now))
    assert h.planner.queued(HOST) == 2
    h.drain()
    slow = foresight(h, most=4, gbps=1 / 4e7)
    slow.tell(Queued(1, [2, 3]), ids(2, 3), 0, h.now)
    h.carry(slow.turn(h.now))
    assert h.planner.queued(HOST) == 1, "one is loaded however slow the route is"
    assert not slow.turn(h.now)
    h.drain()


class Wrong(NoPrefetch):
    """Answers whatever it is told to."""

    name = "wrong"

    def __init__(self, answer: Callable[[], Ids]) -> None:
        self._answer = answer

    def prefetch(self, budget: Budget, now: int) -> Ids:
        return self._answer()


def _raise() -> Ids:
    raise RuntimeError("lost")


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (lambda: ids(0, 0), "twice"),
        (lambda: ids(-1), "no unit"),
        (lambda: ids(99), "no unit"),
        (lambda: ids(0, 1, 2, 3, 4), "5 units where 4"),
        (_raise, "RuntimeError: lost"),
    ],
)
def test_a_policy_that_breaks_the_rules_is_replaced_by_none(
    answer: Callable[[], Ids], says: str, caplog: pytest.LogCaptureFixture
) -> None:
    h = below()
    ahead = foresight(h, most=4)
    ahead.run(Wrong(answer), 4, h.now)
    with caplog.at_level(logging.WARNING):
        turn(h, ahead)
        turn(h, ahead)
    assert on_gpu(h) == []
    assert len(caplog.records) == 1
    assert says in caplog.text
    assert (ahead.statistics().policy, ahead.statistics().failures) == ("none", 1)


def test_a_policy_that_takes_over_is_told_what_waits() -> None:
    h = below()
    ahead = foresight(h, most=4)
    ahead.run(NoPrefetch(), 4, h.now)
    ahead.tell(Queued(1, [0, 1]), ids(0, 1), 0, h.now)
    turn(h, ahead)
    assert on_gpu(h) == []
    ahead.run(QueuePrefetch(), 4, h.now)
    turn(h, ahead)
    assert on_gpu(h) == [0, 1]


# ---------------------------------------------------------------- in a space


def configured(tmp_path: Path, prefetch: Prefetch, gpu: int = 8) -> Config:
    return Config(
        gpu=Gpu(device="cpu", page=PAGE, budget=gpu * PAGE, high=1.0, low=0.5),
        host=Host(capacity=4 * PAGE, high=1.0, low=1.0),
        nvme=Nvme(path=tmp_path / "slab", capacity=bytes_for(32, PAGE), mode="posix"),
        evict=Evict(gpu="lru", host="lru"),
        prefetch=prefetch,
    )


def filled(region: Region, n: int) -> np.ndarray:
    pages = np.concatenate([region.allocate(1) for _ in range(n)])
    words = region.view(np.int64)
    for page in pages.tolist():
        with region.use([page], "fresh"):
            words[page] = 1000 + page
    return pages


def wait_until(condition: Callable[[], bool]) -> None:
    """The mover's turns come by themselves."""
    tick = threading.Event()
    for _ in range(3000):
        if condition():
            return
        tick.wait(0.01)
    raise AssertionError("it never came true")


def test_a_space_loads_for_a_waiting_request_from_host_and_drive(tmp_path: Path) -> None:
    given = configured(tmp_path, Prefetch(name="queue", budget=4 * PAGE))
    with Space.open(given) as space, space.reserve(64 * PAGE) as region:
        pages = filled(region, 20)
        space.drain()
        away = [p for p in pages.tolist() if region.where([p])[0] != Place.GPU][:3]
        region.tell(Queued(7, away, within_s=60))
        wait_until(lambda: (region.where(away) == Place.GPU).all())
        before = space.statistics()
        with region.use(away[::-1]):
            assert (region.view(np.int64)[away, 0] == 1000 + np.array(away)).all()
        region.tell(Left(7))
        after = space.statistics()
        assert after.counts.get("faulted", 0) == before.counts.get("faulted", 0)
        assert before.prefetch is not None
        assert after.prefetch is not None
        assert (before.prefetch.queued, after.prefetch.queued) == (1, 0)
        assert (after.prefetch.policy, after.prefetch.budget) == ("queue", 4 * PAGE)
        assert after.prefetch.quality.used == after.prefetch.quality.loaded == 3
        space.check()


def test_a_space_without_prefetch_takes_facts_and_does_nothing(tmp_path: Path) -> None:
    with Space.open(configured(tmp_path, Prefetch())) as space:
        region = space.reserve(64 * PAGE)
        pages = filled(region, 12)
        space.drain()
        where = region.where(pages)
        region.tell(Queued(7, pages))
        region.tell(Ended(1))
        space.drain()
        assert (region.where(pages) == where).all()
        assert space.statistics().prefetch is None
        with pytest.raises(NotOurs):
            region.tell(Queued(7, [99]))


def test_prefetch_is_turned_on_changed_and_off_while_running(tmp_path: Path) -> None:
    off = configured(tmp_path, Prefetch())
    with Space.open(off) as space:
        region = space.reserve(64 * PAGE)
        pages = filled(region, 16)
        on = msgspec.structs.replace(off, prefetch=Prefetch(name="hint", params={"ahead_ms": 5}))
        assert space.apply(on) == ("prefetch.name", "prefetch.params")
        found = space.statistics().prefetch
        assert found is not None
        assert (found.policy, found.budget) == ("hint", int(0.1 * 8 * PAGE))
        wrong = msgspec.structs.replace(off, prefetch=Prefetch(name="hint", params={"ahead": 5}))
        with pytest.raises(BadPolicy, match="ahead"):
            space.apply(wrong)
        assert space.statistics().prefetch is not None
        space.apply(off)
        assert space.statistics().prefetch is None
        with region.use(pages[:4]):
            pass
        space.check()


@pytest.mark.parametrize(
    "make",
    [
        lambda: Queued(1, [0], within_s=-1),
        lambda: Expected(1, [0], in_s=-1),
        lambda: Expected(1, [0], in_s=1, probability=1.5),
    ],
)
def test_a_fact_that_cannot_be_meant_is_refused(make: Callable[[], object]) -> None:
    with pytest.raises(ConfigError):
        make()
