"""Write-behind over fakes: which labelled pages are saved, when, and at whose cost."""

from __future__ import annotations

import numpy as np
import pytest

from tests.harness import ALL_ROUTES, Harness
from tests.test_contents import adopt, close, keys_of, written
from tiermem.backup import IN_FLIGHT
from tiermem.plan import Copy
from tiermem.planner import Marks
from tiermem.policies.admission import Budgeted, SecondTouch, admission
from tiermem.table import DIRTY
from tiermem.tier import AT_GPU, AT_HOST, AT_NVME, GPU, NVME, PASSED, Place

NO_DIRECT = tuple(r for r in ALL_ROUTES if set(r) != {Place.GPU, Place.NVME})


def labelled(h: Harness, *heads: int) -> None:
    """Written, at rest and labelled: content n in page n - 1."""
    written(h, *heads)
    h.drain()
    for head in heads:
        h.planner.label(h.rows([head]), keys_of(head + 1))


def back_up(h: Harness, *, last: bool = False) -> list[int]:
    """Begin what may be begun; the pages of it."""
    plans = h.planner.back_up(h.now, last=last)
    h.carry(plans)
    steps = [step for plan in plans for step in plan.steps if isinstance(step, Copy)]
    assert all(step.stays for step in steps)
    return [row for step in steps for row in step.pages.tolist()]


def saved(h: Harness, *rows: int) -> bool:
    return bool((h.table.slot(NVME)[list(rows)] >= 0).all())


def harness(**shape: object) -> Harness:
    return Harness(**{"gpu": 4, "host": 3, "nvme": 8, "attic": True, **shape})  # type: ignore[arg-type]


@pytest.mark.parametrize("eager", [False, True], ids=["lazy", "eager"])
def test_a_labelled_page_gets_a_copy_on_the_drive_and_stays_where_it_is(eager: bool) -> None:
    h = harness(eager=eager)
    labelled(h, 0, 1)
    h.carry(h.planner.demote(h.rows([1]), h.now))
    h.drain()
    assert back_up(h) == [0, 1]
    assert h.table.at[:2].tolist() == [AT_GPU, AT_HOST]
    assert not h.table.to[:2].any()
    h.check()
    h.drain()
    assert h.table.at[:2].tolist() == [AT_GPU, AT_HOST]
    assert saved(h, 0, 1)
    assert h.planner.pools[NVME].kept == 2
    assert h.table.flags[0] & DIRTY == 0
    assert h.planner.counts["backed_up"] == 2
    assert h.planner.take_unrecorded().keys[:, 0].tolist() == [1, 2]
    h.check_idle()


def test_what_was_saved_leaves_without_a_transfer_and_is_adopted_after_a_close() -> None:
    h = harness(host=0)
    labelled(h, 0, 1)
    back_up(h)
    h.drain()
    h.carry(h.planner.demote(h.rows([0]), h.now))
    assert h.table.at[0] == AT_NVME
    assert h.planner.counts["stepped_down"] == 1
    assert h.planner.counts["gpu_nvme"] == 0
    value = h.model[1]
    close(h, 1)
    assert adopt(h, 5, 2)
    h.vacant.remove(5)
    h.alive.add(5)
    h.model[5] = value
    assert h.use([5], "read")
    h.drain()
    h.check_idle()


def test_a_copy_is_not_written_twice_while_it_lives() -> None:
    h = harness()
    labelled(h, 0)
    assert back_up(h) == [0]
    assert back_up(h) == []  # under way
    h.drain()
    assert back_up(h) == []
    h.planner.label(h.rows([0]), keys_of(7))  # another name of the same bytes
    assert back_up(h) == []
    assert h.planner.unsaved(range(99)) == (0, 0)


def test_without_a_label_or_an_attic_nothing_is_saved() -> None:
    h = harness()
    written(h, 0)
    assert back_up(h) == []
    plain = harness(attic=False)
    labelled(plain, 0)
    assert back_up(plain) == []


def test_a_page_in_use_is_saved_once_it_is_idle() -> None:
    h = harness()
    labelled(h, 0, 1)
    request = h.begin([0], "read")
    h.enter(request, "read")
    assert back_up(h) == [1]
    assert h.planner.awaits_back_up(range(99)) == (False, PASSED)
    h.leave(request, None)
    assert back_up(h) == [0]


def test_a_page_behind_a_queued_kernel_waits_for_it() -> None:
    h = harness()
    labelled(h, 0)
    assert h.use([0], "write", stream=0)
    h.planner.label(h.rows([0]), keys_of(5))
    assert back_up(h) == []
    helps, fence = h.planner.awaits_back_up(range(99))
    assert helps
    assert fence.ticks
    h.world.streams.reach(fence)
    h.observe()
    assert back_up(h) == [0]
    h.drain()
    h.check_idle()


def test_a_page_written_while_it_is_saved_keeps_no_copy() -> None:
    h = harness()
    labelled(h, 0)
    back_up(h)
    assert h.use([0], "write")
    h.drain()
    assert not saved(h, 0)
    assert h.planner.pools[NVME].free == 8
    assert back_up(h) == []  # and its label is gone
    h.planner.label(h.rows([0]), keys_of(5))
    assert back_up(h) == [0]
    h.drain()
    h.check_idle()


def test_a_page_labelled_anew_while_its_old_bytes_are_saved_is_saved_again() -> None:
    h = harness()
    labelled(h, 0)
    back_up(h)
    assert h.use([0], "write")
    h.planner.label(h.rows([0]), keys_of(5))
    assert back_up(h) == []
    h.drain()
    assert not saved(h, 0)
    assert back_up(h) == [0]
    h.drain()
    assert saved(h, 0)
    h.check_idle()


def test_a_page_freed_while_it_is_saved_becomes_vacant_after_it() -> None:
    h = harness()
    labelled(h, 0)
    back_up(h)
    h.free(h.rows([0]))
    h.check()
    h.drain()
    assert h.planner.pools[NVME].free == 8
    h.check_idle()


def test_a_host_page_that_is_wanted_while_it_is_saved_goes_up_and_has_a_copy() -> None:
    h = harness()
    labelled(h, 0)
    h.carry(h.planner.demote(h.rows([0]), h.now))
    h.drain()
    written(h, 1, 2, 3, 4)  # takes the retired frame
    assert back_up(h) == [0]
    assert h.use([0], "read")
    h.drain()
    assert h.table.at[0] == AT_GPU
    assert saved(h, 0)
    h.check_idle()


def test_what_failed_is_tried_again_and_a_drive_that_fails_for_good_is_left_alone() -> None:
    h = harness()
    labelled(h, 0)
    h.routes[GPU, NVME].fail(1)
    back_up(h)
    h.drain()
    assert not saved(h, 0)
    assert back_up(h) == [0]
    h.drain()
    assert saved(h, 0)
    labelled(h, 1)
    h.routes[GPU, NVME].latched = True
    back_up(h)
    h.drain()
    assert back_up(h) == []
    assert h.planner.unsaved(range(99)) == (1, 0)
    assert not h.planner.awaits_back_up(range(99))[0]
    h.check_idle()


def test_units_are_saved_whole() -> None:
    h = harness(gpu=6, regions=((12, 2, 0),), nvme=5)
    labelled(h, 0, 2, 4)
    assert back_up(h) == [0, 1, 2, 3]  # the fifth slot is half a unit
    h.drain()
    h.check_idle()
    assert saved(h, 0, 1, 2, 3)


def test_without_a_route_from_the_gpu_pages_are_saved_from_the_host() -> None:
    h = harness(routes=NO_DIRECT)
    labelled(h, 0)
    assert back_up(h) == []
    h.carry(h.planner.demote(h.rows([0]), h.now))
    h.drain()
    assert back_up(h) == [0]


def test_few_are_in_flight_and_pages_that_must_leave_count_among_them() -> None:
    n = 3 * IN_FLIGHT
    h = harness(gpu=n, host=0, nvme=n, regions=((n, 1, 0),))
    labelled(h, *range(n))
    h.carry(h.planner.demote(h.rows(list(range(10))), h.now))
    assert len(back_up(h)) == IN_FLIGHT - 10
    assert back_up(h) == []
    h.drain()
    assert len(back_up(h)) == IN_FLIGHT
    h.drain()
    assert h.planner.unsaved(range(n)) == (n - 10 - 2 * IN_FLIGHT + 10, 0)


def test_what_admission_refuses_is_asked_for_again_after_another_use() -> None:
    h = harness()
    h.planner.admission = SecondTouch()
    labelled(h, 0, 1)
    assert h.use([1], "read")
    assert back_up(h) == [1]
    assert back_up(h) == []
    assert h.planner.counts["not_admitted"] == 1
    assert h.use([0], "read")
    assert back_up(h) == [0]
    h.drain()
    h.check_idle()


def test_half_of_the_budget_is_kept_for_pages_that_must_leave() -> None:
    h = harness(gpu=12, nvme=12, host=0)
    # 20 units are saved up in 10 s: half of them may go ahead, two at a time.
    h.planner.admission = Budgeted(admission("all"), bytes_per_s=2.0, unit_bytes=1)
    labelled(h, *range(12))
    got = []
    for _ in range(12):
        got.append(len(back_up(h)))
        h.drain()
    assert got == [2] * 5 + [0] * 7
    assert h.planner.awaits_back_up(range(99))[0]
    for _ in range(2):
        got.append(len(back_up(h, last=True)))
        h.drain()
    assert got[-2:] == [2, 0]
    h.check_idle()


def test_what_a_failed_gpu_holds_is_neither_saved_nor_recorded() -> None:
    """A stream went on without a load that failed; nobody knows what it has computed since."""
    h = harness()
    labelled(h, 0)
    assert back_up(h) == [0]
    h.drain()
    assert h.planner.is_unrecorded
    labelled(h, 1)
    h.planner.failed_tiers.add(GPU)
    assert back_up(h) == []
    assert len(h.planner.take_unrecorded().slots) == 0
    assert not h.planner.is_unrecorded


# ---------------------------------------------------------------- a full drive


def test_a_full_drive_gives_old_content_for_new_but_no_spare_and_not_without_end() -> None:
    h = harness(gpu=8, host=0, nvme=8, regions=((24, 1, 0),), marks=Marks(1.0, 1.0))
    labelled(h, *range(8))
    h.carry(h.planner.demote(h.rows(list(range(8))), h.now))
    h.drain()
    assert (h.table.at[:8] == AT_NVME).all()
    labelled(h, *range(8, 16))
    written_before = h.planner.counts["gpu_nvme"]
    for _ in range(20):
        back_up(h)
        h.drain()
    assert h.planner.pools[NVME].kept == 2  # a quarter
    assert h.planner.pools[NVME].free == 1  # for a page that must leave
    assert h.gone == [(0, "evicted"), (1, "evicted"), (2, "evicted")]
    assert h.planner.counts["backed_up"] == 2
    assert h.planner.counts["gpu_nvme"] == written_before
    assert h.planner.unsaved(range(99)) == (6, 0)
    assert len(back_up(h, last=True)) == 1  # none must leave any more
    h.drain()
    assert back_up(h, last=True) == []
    assert not h.planner.awaits_back_up(range(99))[0]
    h.check_idle()


def test_nothing_is_dropped_for_pages_that_cannot_be_saved_now() -> None:
    h = harness(gpu=8, host=0, nvme=8, regions=((24, 1, 0),))
    labelled(h, *range(8))
    h.carry(h.planner.demote(h.rows(list(range(8))), h.now))
    h.drain()
    labelled(h, 8)
    request = h.begin([8], "read")
    h.enter(request, "read")
    for _ in range(4):
        back_up(h)
        h.drain()
    assert h.gone == []


def test_every_page_is_written_once_although_the_drive_is_full_all_the_time() -> None:
    """Back-ups and evictions do not take each other's room."""
    n = 150
    h = harness(gpu=8, host=0, nvme=32, regions=((n, 1, 0),), marks=Marks(0.95, 0.9))
    for unit in range(n):
        labelled(h, unit)
        h.carry(h.planner.relieve(h.now))
        back_up(h)
        h.drain()
        for old in (unit - 3, unit - 11):  # also such as have left
            if old >= 0 and h.table.at[old] in (AT_GPU, AT_NVME):
                assert h.use([old], "read")
        back_up(h)
        h.drain()
    counts = h.planner.counts
    assert counts["dropped"] > n / 2
    assert counts["gpu_nvme"] + counts["backed_up"] == n
    h.check_idle()


def test_nothing_is_dropped_while_the_drive_still_grows() -> None:
    h = harness(gpu=8, host=0, nvme=8, regions=((24, 1, 0),))
    labelled(h, *range(8))
    h.carry(h.planner.demote(h.rows(list(range(8))), h.now))
    h.drain()
    labelled(h, 8)
    h.planner.growing = {NVME}
    assert h.planner.back_up(h.now) == []
    h.planner.growing = set()
    assert len(h.planner.back_up(h.now)) == 1  # room is made


def test_what_finds_no_room_is_waited_for_while_the_drive_still_grows() -> None:
    """As when a space saves right after it was opened: its slots are written once before."""
    h = harness(gpu=4, host=0, nvme=1)
    labelled(h, 0)
    h.carry(h.planner.demote(h.rows([0]), h.now))
    h.drain()
    labelled(h, 1)
    h.planner.growing = {NVME}
    assert back_up(h, last=True) == []
    assert h.planner.unsaved(range(99)) == (1, 0)
    assert h.planner.awaits_back_up(range(99))[0]
    h.planner.growing = set()
    assert not h.planner.awaits_back_up(range(99))[0]


def test_the_same_verbs_give_the_same_back_up() -> None:
    plans = []
    for _ in range(2):
        h = harness()
        labelled(h, 2, 0, 1)
        plans.append(h.planner.back_up(h.now))
    (first,), (second,) = plans
    (a,), (b,) = first.steps, second.steps
    assert isinstance(a, Copy)
    assert isinstance(b, Copy)
    assert a.pages.tolist() == b.pages.tolist() == [2, 0, 1]
    assert np.array_equal(a.dst_slots, b.dst_slots)
    assert (a.src, a.dst) == (GPU, NVME)
