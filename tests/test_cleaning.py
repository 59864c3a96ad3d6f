"""Copies of idle pages in the host ahead of need: their frames can be given away at once."""

from __future__ import annotations

import numpy as np
import pytest

from tests.harness import Harness
from tests.test_contents import written
from tests.test_planner import demote
from tiermem.books import Marks
from tiermem.leased import CLEAN_AGAIN_MS, CLEAN_BYTES, LeasedPlanner
from tiermem.plan import Copy
from tiermem.table import DIRTY
from tiermem.tier import AT_GPU, AT_HOST, GPU, HOST

PAGE = CLEAN_BYTES // 4


def harness(**shape: object) -> Harness:
    h = Harness(
        **{"gpu": 8, "host": 8, "nvme": 0, "planner": LeasedPlanner, **shape}  # type: ignore[arg-type]
    )
    assert isinstance(h.planner, LeasedPlanner)
    return h


def clean(h: Harness, page_bytes: int = PAGE) -> list[int]:
    """Begin what may be begun; the pages of it."""
    assert isinstance(h.planner, LeasedPlanner)
    h.now += CLEAN_AGAIN_MS
    h.observe()
    plans = h.planner.clean(page_bytes, h.now)
    h.carry(plans)
    steps = [step for plan in plans for step in plan.steps if isinstance(step, Copy)]
    assert all(step.stays for step in steps)
    return [row for step in steps for row in step.pages.tolist()]


def copied(h: Harness, *rows: int) -> bool:
    return bool((h.table.slot(HOST)[list(rows)] >= 0).all())


@pytest.mark.parametrize("in_order", [False, True])
@pytest.mark.parametrize("eager", [False, True], ids=["lazy", "eager"])
def test_idle_pages_get_copies_and_stay_and_then_leave_without_a_transfer(
    eager: bool, in_order: bool
) -> None:
    h = harness(eager=eager, in_order=in_order)
    written(h, 0, 1, 2)
    h.drain()
    assert sorted(clean(h)) == [0, 1, 2]
    h.check()
    h.drain()
    assert (h.table.at[:3] == AT_GPU).all()
    assert copied(h, 0, 1, 2)
    assert not (h.table.flags[:3] & DIRTY).any()
    assert h.pools[HOST].kept == 3
    assert h.planner.counts["cleaned"] == 3
    assert clean(h) == [], "nothing is dirty"
    h.planner.limits[GPU] = 1
    moved = h.planner.counts["gpu_host"]
    while plans := h.planner.relieve(h.now):
        assert not [s for p in plans for s in p.steps if isinstance(s, Copy)]
        h.carry(plans)
        h.drain()
    assert (h.table.at[:3] == AT_HOST).sum() >= 2
    assert h.planner.counts["gpu_host"] == moved
    for row in range(3):
        assert h.use([row], "read")  # compares the bytes
    h.drain()
    h.check_idle()


def test_the_longest_unused_come_first_and_only_so_many_at_a_time() -> None:
    h = harness()
    written(h, 0, 1, 2, 3, 4, 5)
    assert h.use([0], "read")
    h.drain()
    assert clean(h) == [1, 2, 3, 4]
    assert clean(h) == [], "four pages are the most that may be under way"
    h.drain()
    assert clean(h) == [5, 0]
    h.drain()
    assert clean(h) == []
    h.check_idle()


def test_what_must_leave_comes_first() -> None:
    h = harness()
    written(h, 0, 1, 2, 3, 4, 5)
    h.carry(h.planner.demote(h.rows([0, 1, 2]), h.now))
    assert clean(h) == [3], "four pages may be under way, and three leave"
    h.drain()
    assert clean(h) == [4, 5]
    h.drain()
    h.check_idle()


def test_a_page_written_meanwhile_has_no_copy() -> None:
    h = harness()
    written(h, 0, 1)
    h.drain()
    assert sorted(clean(h)) == [0, 1]
    assert h.use([0], "write")
    h.drain()
    assert not copied(h, 0)
    assert copied(h, 1)
    assert h.table.flags[0] & DIRTY
    assert clean(h) == [0], "it is idle again"
    h.drain()
    assert copied(h, 0)
    h.planner.limits[GPU] = 1
    h.carry(h.planner.relieve(h.now))
    h.drain()
    assert h.use([0], "read")
    h.check()


def test_pages_in_use_and_behind_work_have_their_turn_later() -> None:
    h = harness()
    written(h, 0, 1, 2)
    h.drain()
    request = h.begin([0], "read")
    h.enter(request, "read")
    assert h.use([1], "write", stream=0)
    assert clean(h) == [2]
    h.drain()
    assert clean(h) == [1]
    h.leave(request, None)
    h.drain()
    assert clean(h) == [0]
    h.drain()
    h.check_idle()


def test_a_look_at_all_frames_that_found_nothing_is_not_repeated_at_once() -> None:
    h = harness()
    assert isinstance(h.planner, LeasedPlanner)
    written(h, 0)
    request = h.begin([0], "read")
    h.enter(request, "read")
    assert clean(h) == []
    h.leave(request, None)
    h.observe()
    assert h.planner.clean(PAGE, h.now + CLEAN_AGAIN_MS - 1) == []
    assert clean(h) == [0]
    h.drain()
    h.check_idle()


def test_only_free_slots_of_the_host_are_taken() -> None:
    h = harness(host=3)
    written(h, 0, 1, 2, 3)
    h.carry(h.planner.demote(h.rows([3]), h.now))
    h.drain()
    assert len(clean(h)) == 2
    h.drain()
    assert clean(h) == []
    assert h.pools[HOST].used == 1
    assert h.pools[HOST].kept == 2
    h.carry(h.planner.demote(np.flatnonzero(h.table.flags & DIRTY).astype(np.int32), h.now))
    h.drain()
    assert h.pools[HOST].used == 2, "a page that must leave takes the slot of a copy"
    h.check_idle()


@pytest.mark.parametrize("asked", ["by-the-mover", "by-a-request"])
def test_copies_that_are_under_way_push_no_page_out_of_the_host(asked: str) -> None:
    """They take all of its free slots, and give them back: nothing is full."""
    h = harness(host=4, gpu=8, marks=Marks(1.0, 1.0))
    written(h, *range(8))
    demote(h, 0, 1)
    h.drain()
    written(h, 8, 9)
    assert (h.table.at[[0, 1]] == AT_HOST).all()
    assert len(clean(h)) == 2
    h.planner.limits[GPU] = 7
    if asked == "by-the-mover":
        h.carry(h.planner.relieve(h.now))
    else:
        h.carry(h.planner.make_room(1, h.now))
    assert h.gone == []
    h.drain()
    while plans := h.planner.relieve(h.now):
        h.carry(plans)
        h.drain()
    assert h.gone == []
    assert h.pools[GPU].used == 7
    h.check_idle()


def test_copies_that_are_under_way_are_not_above_the_mark_of_the_host() -> None:
    h = harness(host=4, gpu=8, marks=Marks(0.75, 0.5))
    written(h, *range(4))
    demote(h, 0, 1)
    h.drain()
    assert len(clean(h)) == 2
    assert h.pools[HOST].used == 4
    h.carry(h.planner.relieve(h.now))
    h.drain()
    assert h.gone == []
    h.check_idle()


def test_units_are_copied_whole() -> None:
    h = harness(regions=((12, 3, 0),), host=8)
    written(h, 0, 3)
    h.drain()
    assert len(clean(h)) == 3, "four pages may be under way, a unit has three"
    h.drain()
    assert len(clean(h)) == 3
    h.drain()
    assert copied(h, *range(6))
    h.check_idle()


def test_nothing_is_copied_where_the_host_cannot_be_written() -> None:
    h = harness()
    written(h, 0)
    h.drain()
    h.planner.failed_tiers.add(HOST)
    assert clean(h) == []
    h.check_idle()
