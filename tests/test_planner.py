"""The planner over fakes: every arc of the drawing in `table.py`, and what each refusal says."""

from __future__ import annotations

import numpy as np
import pytest

from tests.harness import ALL_ROUTES, Harness
from tiermem.errors import NotOurs, PageInUse, PageLost, TierFailed, TierFull
from tiermem.leased import LeasedPlanner
from tiermem.plan import Copy, Drop, Hide, Plan, Show, Zero
from tiermem.planner import Access, Marks, Planner, Request
from tiermem.policies.base import Candidates, EvictionBase, Ids, Keys
from tiermem.table import DIRTY, DOOMED, STALE, Shown
from tiermem.tier import Place

GPU, HOST, NVME, LOST, NONE = Place.GPU, Place.HOST, Place.NVME, Place.LOST, Place.NONE
NO_DIRECT = tuple(r for r in ALL_ROUTES if set(r) != {GPU, NVME})


@pytest.fixture(params=[False, True], ids=["lazy", "eager"])
def eager(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


def at(h: Harness, row: int) -> Place:
    return Place(int(h.table.at[row]))


def to(h: Harness, row: int) -> Place:
    return Place(int(h.table.to[row]))


def written(h: Harness, *units: int) -> None:
    """Allocated, written and at rest."""
    for unit in units:
        assert h.allocate([unit])
        assert h.use([unit], "write")
    h.drain()


def demote(h: Harness, *units: int) -> None:
    h.carry(h.planner.demote(h.rows(list(units)), h.now))


def down(h: Harness, place: Place, *units: int) -> None:
    """Take written pages one tier down, to rest there."""
    demote(h, *units)
    h.drain()
    assert {at(h, u) for u in units} == {place}


def pinned(h: Harness, units: list[int], access: Access = "read") -> Request:
    """Hold pages until `leave`."""
    request = h.begin(units, access)
    while not request.taken or request.pending:
        h.advance_for(request)
        if not request.taken:
            request = h.begin(units, access)
    h.enter(request, access)
    return request


def shown(h: Harness, row: int) -> Shown:
    return Shown(int(h.table.shown[row]))


# ---------------------------------------------------------------- the arcs of the drawing


def test_none_to_gpu_by_allocate(eager: bool) -> None:
    h = Harness(eager=eager)
    assert h.allocate([0])
    assert at(h, 0) == GPU
    assert shown(h, 0) == Shown.FRAME
    assert h.table.flags[0] == DIRTY
    h.check()


def test_gpu_to_host_keeps_the_source_until_commit(eager: bool) -> None:
    h = Harness(eager=eager)
    written(h, 0)
    demote(h, 0)
    assert (at(h, 0), to(h, 0), h.table.busy[0]) == (GPU, HOST, 1)
    h.drain()
    assert (at(h, 0), to(h, 0), h.table.busy[0]) == (HOST, NONE, 0)
    assert shown(h, 0) == (Shown.NOTHING if eager else Shown.RETIRED)
    h.check_idle()


def test_a_leaving_page_is_rescued_for_nothing_and_its_landed_copy_is_a_spare(eager: bool) -> None:
    h = Harness(eager=eager)
    written(h, 0)
    demote(h, 0)
    request = h.begin([0], "read")
    assert request.taken
    assert not request.pending
    assert not request.plans
    h.enter(request, "read")
    h.leave(request, None)
    assert (at(h, 0), to(h, 0), h.table.busy[0]) == (GPU, NONE, 1)
    h.drain()
    assert h.planner.counts["rescued"] == h.planner.counts["late_spares"] == 1
    assert h.table.slot(HOST)[0] >= 0
    assert h.table.flags[0] & DIRTY == 0
    h.check_idle()


def test_a_copy_that_lands_after_a_write_is_not_a_spare() -> None:
    h = Harness()
    written(h, 0)
    demote(h, 0)
    assert h.use([0], "write")
    h.drain()
    assert h.planner.counts["late_spares"] == 0
    assert h.table.slot(HOST)[0] < 0
    assert h.pools[HOST].used == h.pools[HOST].kept == 0
    h.check_idle()


def test_a_clean_page_with_a_spare_steps_down_without_a_transfer(eager: bool) -> None:
    h = Harness(eager=eager)
    written(h, 0)
    down(h, HOST, 0)
    assert h.use([0], "read")
    plans = h.planner.demote(h.rows([0]), h.now)
    assert not any(isinstance(step, Copy) for plan in plans for step in plan.steps)
    h.carry(plans)
    h.drain()
    assert at(h, 0) == HOST
    assert h.planner.counts["stepped_down"] == 1
    assert h.use([0], "read")
    h.check()


def test_a_page_whose_frame_is_retired_takes_it_back_without_a_transfer() -> None:
    h = Harness(eager=False)
    written(h, 0)
    down(h, HOST, 0)
    request = h.begin([0], "read")
    assert request.taken
    assert not request.plans
    h.enter(request, "read")
    h.leave(request, None)
    assert h.planner.counts["taken_back"] == 1
    assert h.pools[HOST].kept == 1
    h.check()


def test_a_load_from_the_host_keeps_the_host_copy_as_a_spare() -> None:
    h = Harness(eager=True)
    written(h, 0)
    down(h, HOST, 0)
    request = h.begin([0], "read")
    assert (at(h, 0), to(h, 0)) == (HOST, GPU)
    assert h.table.waiters[0] == 1
    assert h.table.pins[0] == 0
    h.drain()
    assert (at(h, 0), h.table.pins[0], h.table.waiters[0]) == (GPU, 1, 0)
    h.enter(request, "read")
    h.leave(request, None)
    assert h.pools[HOST].kept == 1
    h.check()


def test_host_to_nvme_when_the_host_is_full() -> None:
    h = Harness(gpu=4, host=1, nvme=4, routes=NO_DIRECT)
    written(h, 0, 1)
    down(h, HOST, 0)
    demote(h, 1)
    assert to(h, 0) == NVME
    h.drain()
    assert at(h, 0) == NVME
    assert h.pools[HOST].free == 1
    h.check_idle()


def test_gpu_to_nvme_directly_when_the_host_is_full_and_a_direct_route_exists() -> None:
    h = Harness(gpu=4, host=1, nvme=4)
    written(h, 0, 1)
    down(h, HOST, 0)
    demote(h, 1)
    h.drain()
    assert (at(h, 0), at(h, 1)) == (HOST, NVME)
    h.check_idle()


def test_nvme_to_gpu_keeps_the_nvme_copy() -> None:
    h = Harness(host=0, eager=True)
    written(h, 0)
    demote(h, 0)
    h.drain()
    assert at(h, 0) == NVME
    assert h.use([0], "read")
    assert h.pools[NVME].kept == 1
    h.check()


def test_a_prefetch_without_room_on_the_gpu_stages_pages_in_the_host() -> None:
    h = Harness(gpu=2, host=2, nvme=6, eager=True)
    written(h, 0, 1)
    demote(h, 0, 1)
    h.drain()
    written(h, 2, 3)
    demote(h, 2, 3)  # the host is full: these go to NVMe
    h.drain()
    assert [at(h, r) for r in (0, 1, 2, 3)] == [HOST, HOST, NVME, NVME]
    written(h, 4, 5)  # the GPU is full
    h.free(h.rows([0]))
    h.drain()
    h.carry(h.planner.prefetch(h.rows([2, 3]), h.now))
    assert to(h, 2) == HOST
    assert to(h, 3) == NONE, "there is room for one only"
    h.drain()
    assert at(h, 2) == HOST
    assert h.planner.counts["nvme_host"] == 1
    assert h.use([2], "read")
    h.check()


def test_a_page_that_its_old_frame_still_shows_is_not_staged_and_comes_back_at_once() -> None:
    h = Harness(gpu=4, host=2, nvme=6)
    h.planner.marks[GPU] = Marks(0.5, 0.5)
    written(h, 0, 1)
    demote(h, 0, 1)
    h.drain()
    written(h, 2, 3)
    demote(h, 2, 3)  # the host is full: these go to NVMe, and their frames are retired
    h.drain()
    written(h, 4, 5)  # into free frames, and the GPU is at its mark
    h.free(h.rows([0, 1]))
    h.drain()
    assert [at(h, r) for r in (2, 3)] == [NVME, NVME]
    assert (h.table.shown[[2, 3]] == Shown.RETIRED).all()
    h.carry(h.planner.prefetch(h.rows([2, 3]), h.now))
    assert [to(h, r) for r in (2, 3)] == [NONE, NONE]
    request = h.begin([2, 3], "read")
    assert request.taken
    assert not request.pending
    h.leave(request, None)
    h.check()


def test_a_prefetch_takes_free_frames_and_moves_nothing_else() -> None:
    h = Harness(gpu=2, host=4, nvme=0, eager=True)
    written(h, 0, 1)
    down(h, HOST, 0, 1)
    written(h, 2)
    h.carry(h.planner.prefetch(h.rows([0, 1]), h.now))
    h.drain()
    assert [at(h, r) for r in (0, 1, 2)] == [GPU, HOST, GPU]
    h.check()


def test_a_page_that_cannot_be_read_from_nvme_is_lost_and_its_owner_is_told() -> None:
    h = Harness(host=0, eager=True)
    written(h, 0)
    demote(h, 0)
    h.drain()
    h.routes[NVME, GPU].fail(1)
    request = h.begin([0], "read")
    h.drain()
    assert request.failed == [0]
    h.planner.abandon(request)
    assert at(h, 0) == LOST
    assert h.gone == [(0, "lost")]
    assert not any((h.table.slot(place)[0] >= 0) for place in (GPU, HOST, NVME))
    with pytest.raises(PageLost, match=r'1 of 1 pages lost.*access="fresh"'):
        h.begin([0], "read")
    assert h.use([0], "fresh")
    assert at(h, 0) == GPU
    h.check()


def test_a_failed_load_from_the_host_falls_back_to_the_copy_on_nvme() -> None:
    h = Harness(gpu=1, host=1, nvme=2, eager=True)
    written(h, 0)
    down(h, HOST, 0)
    written(h, 1)
    demote(h, 1)  # to NVMe: the host is full
    h.drain()
    assert at(h, 1) == NVME
    h.free(h.rows([0]))
    h.drain()
    written(h, 2)
    h.carry(h.planner.prefetch(h.rows([1]), h.now))  # staged: host, with a spare on NVMe
    h.drain()
    assert at(h, 1) == HOST
    h.free(h.rows([2]))
    h.drain()
    h.routes[HOST, GPU].fail(1)
    assert h.use([1], "read"), h.refusal
    assert h.planner.counts["failed_reads"] == 1
    assert h.planner.counts["nvme_gpu"] == 1
    assert not h.gone
    h.check()


def test_fresh_use_of_a_page_below_loads_nothing() -> None:
    h = Harness(eager=True)
    written(h, 0)
    down(h, HOST, 0)
    assert h.use([0], "fresh")
    assert h.planner.counts["host_gpu"] == 0
    assert h.pools[HOST].free == h.pools[HOST].capacity
    h.check()


def test_fresh_use_needs_not_wait_for_a_copy_that_still_reads_the_old_bytes() -> None:
    h = Harness(gpu=2, host=1, nvme=4, eager=True)
    written(h, 0)
    down(h, HOST, 0)
    h.planner.marks[HOST] = Marks(0.0, 0.0)
    h.carry(h.planner.relieve(h.now))
    assert (at(h, 0), to(h, 0)) == (HOST, NVME)
    request = pinned(h, [0], "fresh")
    assert h.table.flags[0] & STALE, "the copy reads the slot until it ends"
    assert h.table.busy[0] == 1
    h.check()
    h.write_now(request)
    h.leave(request, None)
    h.planner.marks[HOST] = Marks(1.0, 1.0)
    h.drain()
    assert at(h, 0) == GPU
    assert (h.planner.pools[HOST].used, h.planner.pools[NVME].used) == (0, 0)
    assert h.use([0], "read"), "the new bytes are there"
    h.check_idle()


@pytest.mark.parametrize("in_order", [False, True], ids=["any-order", "in-order"])
def test_in_order_a_page_is_shown_anew_before_its_hide_has_settled(in_order: bool) -> None:
    h = Harness(gpu=2, host=4, nvme=0, in_order=in_order)
    written(h, 0, 1)
    down(h, HOST, 0, 1)
    stealing = h.planner.allocate(h.rows([2]), h.now)
    h.carry(stealing.plans)
    (stolen,) = (s.pages for p in stealing.plans for s in p.steps if isinstance(s, Hide))
    request = h.begin(stolen.tolist(), "read")
    assert request.taken == in_order, "any executor might show it before it is hidden"
    h.check()
    h.alive.add(2)
    h.vacant.remove(2)
    h.drain()
    h.check()
    if in_order:
        h.enter(request, "read")
        h.leave(request, None)


def test_room_is_made_by_clean_pages_at_once_and_by_copies_later() -> None:
    h = Harness(gpu=4, host=8, nvme=0)
    written(h, 0, 1, 2, 3)
    down(h, HOST, 0, 1)
    assert h.use([0, 1], "read")
    assert h.planner.ready() == 0
    plans = h.planner.make_room(3, h.now)
    copied = sum(len(s.pages) for p in plans for s in p.steps if isinstance(s, Copy))
    assert h.planner.ready() + copied == 3
    h.carry(plans)
    assert h.planner.make_room(3, h.now) == [], "what is on its way counts"
    h.drain()
    assert h.planner.ready() == 3
    h.check_idle()


def test_in_order_nothing_is_dropped_that_queued_work_may_touch() -> None:
    h = Harness(gpu=2, host=0, nvme=0, in_order=True, marks=Marks(0.5, 0.5))
    written(h, 0, 1)
    request = pinned(h, [0, 1])
    h.work(request, "read", 0)  # queued
    h.leave(request, 0)
    assert h.planner.relieve(h.now) == []
    h.world.streams.advance(0, 1000)
    h.observe()
    (plan,) = h.planner.relieve(h.now)
    assert isinstance(plan.steps[0], Drop)
    h.carry([plan])
    h.alive -= set(plan.steps[0].units.tolist())
    h.settle_ready()
    h.check()


def test_a_renamed_unit_is_new_to_the_policy() -> None:
    h = Harness(gpu=3, host=3)
    written(h, 0, 1, 2)
    h.planner.rename(h.rows([0]), h.rows([1]), np.array([5], np.int32), h.now)
    assert (h.table.parent[0], h.table.depth[0]) == (1, 5)
    demoted = h.planner.make_room(1, h.now)
    copies = [s for p in demoted for s in p.steps if isinstance(s, Copy)]
    assert [s.pages.tolist() for s in copies] == [[1]], "0 is the newest now"


def test_a_unit_that_is_renamed_while_it_is_shown_blank_is_new_to_the_policy() -> None:
    h = Harness(gpu=3, host=3, in_order=True)
    written(h, 0)
    request = h.planner.allocate(h.rows([2]), h.now)
    written(h, 1)
    assert at(h, 2) == LOST, "its show is under way, and the policy was told of it when planned"
    h.planner.rename(h.rows([2]), h.rows([1]), np.array([5], np.int32), h.now)
    h.carry(request.plans)
    h.drain()
    assert at(h, 2) == GPU
    demoted = h.planner.make_room(2, h.now)
    copies = [s for p in demoted for s in p.steps if isinstance(s, Copy)]
    assert sorted(i for s in copies for i in s.pages.tolist()) == [0, 1], "2 is the newest now"


def test_a_freed_page_is_vacant_at_once_if_idle_and_its_frame_is_used_again(eager: bool) -> None:
    h = Harness(gpu=1, host=0, nvme=0, eager=eager)
    written(h, 0)
    h.free(h.rows([0]))
    h.drain()
    assert at(h, 0) == NONE
    written(h, 1)
    h.check_idle()


def test_a_page_in_flight_is_doomed_first(eager: bool) -> None:
    h = Harness(eager=eager)
    written(h, 0)
    demote(h, 0)
    h.free(h.rows([0]))
    assert h.table.flags[0] & DOOMED
    assert at(h, 0) == GPU
    assert not h.planner.is_idle()
    h.drain()
    assert at(h, 0) == NONE
    assert h.pools[HOST].used == 0
    h.check_idle()


def test_a_freed_page_with_a_kernel_queued_keeps_its_frame_until_the_kernel_has_run(
    eager: bool,
) -> None:
    h = Harness(gpu=1, host=0, nvme=0, eager=eager)
    written(h, 0)
    assert h.use([0], "write", stream=0)
    h.free(h.rows([0]))
    h.settle_ready()
    assert h.table.flags[0] & DOOMED
    assert h.planner.doomed_fence().ticks == ((0, 1),)
    request = h.planner.allocate(h.rows([1]), h.now)
    assert not request.taken
    assert request.fence.ticks == ((0, 1),)
    h.world.streams.advance(0)
    h.drain()
    assert at(h, 0) == NONE
    assert h.allocate([1])
    assert not h.wrong
    h.drain()
    h.check_idle()


def test_a_unit_leaves_the_last_tier_through_on_gone_before_its_slot_is_used_again() -> None:
    h = Harness(gpu=1, host=0, nvme=0)
    written(h, 0)
    request = h.planner.allocate(h.rows([1]), h.now)
    steps = [step for plan in request.plans for step in plan.steps]
    assert [type(s) for s in steps] == [Drop]
    assert h.pools[GPU].owner[0] == 0, "the frame is still the page's"
    h.carry(request.plans)
    assert h.gone == [(0, "evicted")]
    h.drain()
    assert h.allocate([1])
    h.check()


def test_a_stolen_frame_is_hidden_before_it_is_shown_elsewhere() -> None:
    h = Harness(gpu=1, host=1, nvme=0, eager=False)
    written(h, 0)
    down(h, HOST, 0)
    request = h.planner.allocate(h.rows([1]), h.now)
    assert request.taken
    (plan,) = request.plans
    assert [type(step) for step in plan.steps] == [Hide, Show]
    assert shown(h, 0) == Shown.HIDING
    h.carry(request.plans)
    h.drain()
    assert shown(h, 0) == Shown.NOTHING
    assert shown(h, 1) == Shown.FRAME


# ---------------------------------------------------------------- promises


def test_two_faults_on_one_page_share_one_transfer() -> None:
    h = Harness(eager=True)
    written(h, 0)
    down(h, HOST, 0)
    first, second = h.begin([0], "read"), h.begin([0], "read")
    assert len(first.plans) == 1
    assert not second.plans
    assert first.pending == second.pending
    h.drain()
    assert h.table.pins[0] == 2
    assert h.planner.counts["shared_faults"] == 1
    assert h.planner.counts["host_gpu"] == 1


def test_whoever_waits_is_pinned_in_the_same_step_as_the_commit() -> None:
    h = Harness(gpu=1, host=2, nvme=0, eager=True)
    written(h, 0)
    down(h, HOST, 0)
    h.begin([0], "read")
    h.drain()
    assert h.table.pins[0] == 1, "nobody could take the page between its arrival and its pin"


def test_a_fault_is_all_or_nothing() -> None:
    h = Harness(gpu=2, host=4, nvme=0)
    written(h, 0, 1)
    down(h, HOST, 0, 1)
    held = pinned(h, [0])
    before = h.snapshot()
    written(h, 2)
    down(h, HOST, 2)
    with pytest.raises(TierFull, match=r"gpu: need [12] pages, .* of 2 pinned"):
        h.begin([1, 2], "read")
    assert h.snapshot()["pins"] == before["pins"]
    h.leave(held, None)
    h.check()


def test_tier_full_names_every_tier_and_the_way_out() -> None:
    h = Harness(gpu=2, host=1, nvme=0)
    written(h, 0, 1)
    pinned(h, [0, 1])
    with pytest.raises(TierFull) as caught:
        h.planner.allocate(h.rows([2]), h.now)
    assert str(caught.value) == (
        "gpu: need 1 pages, 0 free, 0 retired, 2 of 2 pinned; host 0 of 1 used, nvme 0 of 0 used; "
        "use fewer pages at once, or raise gpu.budget"
    )


def test_when_all_room_below_is_taken_by_the_wanted_pages_the_gpu_drops_one() -> None:
    """Once TierFull for ever: the host's only page was wanted, so nothing could take its place."""
    h = Harness(gpu=1, host=1, nvme=0, eager=True)
    written(h, 0)
    down(h, HOST, 0)
    written(h, 1)
    assert h.use([0], "read"), h.refusal
    assert h.gone == [(1, "evicted")]
    h.drain()
    h.check_idle()


def test_a_pinned_page_is_never_freed() -> None:
    h = Harness()
    written(h, 0)
    request = pinned(h, [0])
    with pytest.raises(PageInUse, match=r"1 of 1 pages are pinned or awaited .*leave their use"):
        h.free(h.rows([0]))
    h.leave(request, None)
    h.free(h.rows([0]))


def test_pages_that_are_not_allocated_are_refused() -> None:
    h = Harness()
    written(h, 0)
    with pytest.raises(NotOurs, match="1 of 2 pages not allocated"):
        h.begin([0, 1], "read")
    with pytest.raises(NotOurs, match="not all of them allocated"):
        h.free(h.rows([0, 1]))
    with pytest.raises(NotOurs, match="not all of them vacant"):
        h.planner.allocate(h.rows([0]), h.now)
    assert h.table.pins.sum() == 0


def test_a_frame_of_another_tenant_is_zeroed_before_it_is_shown(eager: bool) -> None:
    h = Harness(gpu=1, host=1, nvme=0, eager=eager)
    written(h, 0)
    down(h, HOST, 0)
    request = h.planner.allocate(h.rows([12]), h.now)
    kinds = [type(step) for plan in request.plans for step in plan.steps]
    assert Zero in kinds
    assert kinds.index(Zero) < kinds.index(Show)
    h.carry(request.plans)
    h.drain()
    frame = int(h.table.slot(GPU)[12])
    assert h.memories[GPU].words[frame].tolist() == [0, 0]


def test_a_frame_of_the_same_tenant_is_not_zeroed() -> None:
    h = Harness(gpu=1, host=1, nvme=0)
    written(h, 0)
    down(h, HOST, 0)
    request = h.planner.allocate(h.rows([1]), h.now)
    assert not any(isinstance(step, Zero) for plan in request.plans for step in plan.steps)


def test_a_write_makes_every_copy_below_stale_and_free() -> None:
    h = Harness(eager=True)
    written(h, 0)
    down(h, HOST, 0)
    assert h.use([0], "read")
    assert h.pools[HOST].kept == 1
    assert h.use([0], "write")
    assert h.pools[HOST].kept == h.pools[HOST].used == 0
    assert h.table.flags[0] == DIRTY


def test_a_stale_copy_that_a_transfer_still_reads_is_released_when_that_ends() -> None:
    h = Harness(gpu=2, host=1, nvme=2, routes=NO_DIRECT, eager=True)
    written(h, 0)
    down(h, HOST, 0)
    written(h, 1)
    demote(h, 1)  # the host is full: page 0 starts for NVMe
    assert to(h, 0) == NVME
    request = h.begin([0], "write")  # claims it back while the copy reads its host slot
    (load,) = request.pending
    h.flights[load].wait()
    h.settle_ready()
    if not request.pending:
        h.enter(request, "write")
        h.write_now(request)
        if h.table.busy[0]:
            assert h.table.flags[0] & STALE
            assert h.pools[HOST].kept == 1
    h.drain()
    assert h.table.flags[0] & STALE == 0
    assert h.table.slot(HOST)[0] < 0
    h.check()


def test_an_ordered_load_is_pinned_at_once_and_its_page_may_be_freed_behind_the_kernel(
    eager: bool,
) -> None:
    """Once, freeing it hid the frame as soon as the load landed, under the queued kernel."""
    h = Harness(gpu=2, host=2, nvme=0, eager=True)
    h.planner.eager = eager
    written(h, 0)
    h.planner.eager = True
    down(h, HOST, 0)
    h.planner.eager = eager
    request = h.begin([0], "read", order=True)
    assert h.table.pins[0] == 1
    assert to(h, 0) == GPU
    h.check()
    assert h.order(request, 0)
    h.launch(request.rows, 0, write=False)
    h.leave(request, 0)
    h.free(h.rows([0]))
    h.check()
    h.world.finish_all()
    h.settle_ready()
    h.check()
    assert h.table.flags[0] & DOOMED
    assert shown(h, 0) == Shown.FRAME, "the kernel has not run yet"
    h.drain()
    h.check_idle()
    assert at(h, 0) == NONE


def test_a_page_under_an_ordered_load_cannot_be_moved_or_freed_while_pinned() -> None:
    h = Harness(eager=True)
    written(h, 0)
    down(h, HOST, 0)
    h.begin([0], "read", order=True)
    with pytest.raises(PageInUse):
        h.free(h.rows([0]))
    assert not h.planner.demote(h.rows([0]), h.now)


def test_a_stream_waits_for_a_load_that_was_begun_ahead() -> None:
    h = Harness(gpu=4, host=4, nvme=0, eager=True)
    written(h, 0, 1, 2)
    down(h, HOST, 0, 1, 2)
    h.carry(h.planner.prefetch(h.rows([0]), h.now))
    assert to(h, 0) == GPU
    request = h.begin([0, 1], "read", order=True)
    assert h.table.waiters[0] == 1
    assert h.order(request, 0)
    assert (h.table.pins[:2] == 1).all()
    assert not h.table.waiters.any()
    h.check()
    h.launch(request.rows, 0, write=False)
    h.leave(request, 0)
    h.drain()
    h.check_idle()


def test_a_load_that_others_await_is_waited_for() -> None:
    h = Harness(gpu=4, host=4, nvme=0, eager=True)
    written(h, 0)
    down(h, HOST, 0)
    h.carry(h.planner.prefetch(h.rows([0]), h.now))
    h.begin([0], "read")
    request = h.begin([0], "read", order=True)
    assert h.table.waiters[0] == 2
    assert not h.order(request, 0)
    h.drain()
    assert h.table.pins[0] == 2


def test_a_failed_load_that_a_stream_waits_for_fails_the_gpu() -> None:
    h = Harness(eager=True)
    written(h, 0)
    down(h, HOST, 0)
    h.routes[HOST, GPU].fail(1)
    h.begin([0], "read", order=True)
    h.drain()
    assert GPU in h.planner.failed_tiers
    written(h, 1, 2, 3, 4)
    with pytest.raises(TierFailed, match="reopen the space"):
        h.planner.allocate(h.rows([5]), h.now)


def test_a_failed_copy_down_loses_nothing() -> None:
    h = Harness(gpu=1, nvme=0)
    written(h, 0)
    h.routes[GPU, HOST].fail(1)
    demote(h, 0)
    h.drain()
    assert at(h, 0) == GPU
    assert h.table.flags[0] & DIRTY
    assert h.use([0], "read")
    assert HOST not in h.planner.failed_tiers
    h.check_idle()


def test_a_tier_that_says_it_failed_is_not_used_again() -> None:
    h = Harness(nvme=0)
    written(h, 0)
    h.routes[GPU, HOST].latched = True
    demote(h, 0)
    h.drain()
    assert HOST in h.planner.failed_tiers
    assert not h.planner.demote(h.rows([0]), h.now)
    assert h.use([0], "read")


def test_eight_failed_stores_in_a_row_latch_a_tier() -> None:
    h = Harness(nvme=0)
    written(h, 0)
    for attempt in range(8):
        assert HOST not in h.planner.failed_tiers, attempt
        h.routes[GPU, HOST].fail(1)
        demote(h, 0)
        h.drain()
    assert HOST in h.planner.failed_tiers


# ---------------------------------------------------------------- marks and limits


def test_above_the_high_mark_units_leave_until_the_low_mark_oldest_first() -> None:
    h = Harness(gpu=10, host=10, nvme=0, marks=Marks(0.8, 0.5))
    written(h, *range(8))
    h.carry(h.planner.relieve(h.now))
    h.drain()
    assert h.pools[GPU].used == 8, "at the mark, nothing leaves"
    written(h, 8)
    h.carry(h.planner.relieve(h.now))
    h.drain()
    assert [at(h, r) for r in range(9)] == [HOST] * 4 + [GPU] * 5
    h.check_idle()


@pytest.mark.parametrize("allowed", [None, 4], ids=["all-frames", "a-limit"])
def test_headroom_lowers_the_marks_of_the_gpu_by_half_of_what_is_allowed_at_most(
    allowed: int | None,
) -> None:
    h = Harness(gpu=10, host=10, nvme=0, marks=Marks(0.9, 0.8))
    h.planner.headroom = 4
    if allowed is not None:
        h.planner.limits[GPU] = allowed
    written(h, *range(10 if allowed is None else 4))
    h.carry(h.planner.relieve(h.now))
    h.drain()
    assert h.pools[GPU].used == (6 if allowed is None else 2)
    assert not h.planner.is_pressed()
    assert h.pools[HOST].used == (4 if allowed is None else 2), "the host has marks of its own"
    h.check_idle()


def test_what_is_loaded_ahead_may_use_the_headroom() -> None:
    h = Harness(gpu=10, host=10, nvme=0, marks=Marks(0.9, 0.8))
    written(h, *range(9))
    demote(h, *range(6))
    h.drain()
    h.planner.headroom = 5
    assert h.planner.room_ahead() == 6
    h.carry(h.planner.prefetch(h.rows(list(range(6))), h.now))
    h.drain()
    assert h.pools[GPU].used == 9
    h.check_idle()


def test_one_page_within_the_headroom_is_pressure() -> None:
    h = Harness(gpu=10, host=10, nvme=0)
    h.planner.headroom = 4
    written(h, *range(6))
    assert not h.planner.is_pressed()
    written(h, 6)
    assert h.planner.is_pressed()


@pytest.mark.parametrize("headroom", [0, 3, 8])
def test_what_a_lender_is_asked_for_is_the_least_that_keeps_the_marks(headroom: int) -> None:
    h = Harness(gpu=40, host=0, nvme=0, marks=Marks(0.8, 0.5), planner=LeasedPlanner)
    planner = h.planner
    assert isinstance(planner, LeasedPlanner)
    planner.headroom = headroom

    def keeps(used: int, slots: int) -> bool:
        planner.limits[GPU] = slots
        return used <= Planner._target(planner, GPU, "high")

    for used in range(1, 30):
        least = next(slots for slots in range(1, 41) if keeps(used, slots))
        assert least <= planner.beneath_mark(used) <= least + 1, "half of an odd number of slots"
        assert keeps(used, planner.beneath_mark(used))


def test_a_lower_limit_moves_pages_down_and_holds_for_every_later_use() -> None:
    h = Harness(gpu=6, host=12, nvme=0)
    written(h, *range(6))
    h.planner.limits[GPU] = 2
    while plans := h.planner.relieve(h.now):
        h.carry(plans)
        h.drain()
    for row in range(6):
        assert h.use([row], "read"), h.refusal
        h.drain()
        assert h.pools[GPU].used <= 2
    parked = h.planner.surrender()
    assert len(parked) + h.pools[GPU].capacity == 6
    with pytest.raises(TierFull, match="3 of 2 pinned"):
        h.begin([0, 1, 2], "read")
    h.planner.limits.clear()
    h.planner.grow(GPU, parked)
    request = pinned(h, [0, 1, 2])
    h.leave(request, None)
    h.check()


def test_no_more_leaves_than_a_lower_limit_asks_for_while_frames_are_being_hidden() -> None:
    """The host has room for what must leave, and not for more."""
    h = Harness(gpu=16, host=10, nvme=0, marks=Marks(1.0, 1.0))
    written(h, *range(16))
    down(h, HOST, *range(10))
    for row in range(10):
        assert h.use([row], "read")  # their copies stay
    h.planner.limits[GPU] = 8
    for _ in range(3):
        h.carry(h.planner.relieve(h.now))
    h.drain()
    assert h.gone == []
    assert h.pools[GPU].used == 8
    h.check_idle()


def test_way_is_made_once_while_frames_are_being_hidden(eager: bool) -> None:
    h = Harness(gpu=10, host=10, nvme=0, marks=Marks(1.0, 0.2), eager=eager)
    written(h, *range(10))
    down(h, HOST, *range(10))
    for row in range(10):
        assert h.use([row], "read")  # their copies stay
    for _ in range(3):
        short = 3 - h.planner.room_ahead()
        if short > 0:
            h.carry(h.planner.make_way(short, h.now))
    h.drain()
    assert h.pools[GPU].used == 7
    h.check_idle()


def test_demand_does_not_take_frames_above_a_limit_that_has_just_been_lowered() -> None:
    h = Harness(gpu=4, host=8, nvme=0)
    written(h, 0, 1)
    h.planner.limits[GPU] = 2
    assert h.allocate([2])
    h.drain()
    assert h.pools[GPU].used <= 2


def test_spares_in_the_host_are_given_away_before_anything_moves_on() -> None:
    h = Harness(gpu=2, host=1, nvme=4, routes=NO_DIRECT, eager=True)
    written(h, 0)
    down(h, HOST, 0)
    assert h.use([0], "read")
    assert h.pools[HOST].kept == 1
    written(h, 1)
    demote(h, 1)
    assert to(h, 1) == HOST, "it takes the slot of page 0's spare"
    h.drain()
    assert h.planner.counts["host_nvme"] == 0
    assert h.use([0], "read")
    h.check()


def drive_of_spares(spares: int) -> Harness:
    """A full drive of eight slots: copies of pages on the GPU, and pages that are only there."""
    h = Harness(gpu=8, host=0, nvme=8, regions=((24, 1, 0),))
    written(h, *range(8))
    down(h, NVME, *range(8))
    for unit in range(8 - spares, 8):
        assert h.use([unit], "read")
    h.drain()
    assert (h.pools[NVME].kept, h.pools[NVME].used) == (spares, 8 - spares)
    return h


def test_a_full_drive_gives_spares_away_before_pages_that_are_nowhere_else() -> None:
    h = drive_of_spares(6)
    for unit in range(8, 12):  # above a quarter of the drive there are four spares
        written(h, unit)
        down(h, NVME, unit)
    assert h.gone == []
    assert h.pools[NVME].kept == 2
    assert h.planner.counts["gpu_nvme"] == 12
    h.check_idle()


def test_a_quarter_of_the_drive_stays_spares_as_long_as_pages_may_leave() -> None:
    h = drive_of_spares(2)
    for unit in range(8, 11):
        written(h, unit)
        demote(h, unit)
        h.drain()
        demote(h, unit)  # the room is there now
        down(h, NVME, unit)
    assert h.gone == [(0, "evicted"), (1, "evicted"), (2, "evicted")]
    assert h.pools[NVME].kept == 2
    h.check_idle()


def test_what_a_tier_holds_is_not_dropped_for_its_marks_while_it_grows() -> None:
    h = drive_of_spares(0)
    h.planner.marks[NVME] = Marks(0.95, 0.90)
    h.planner.growing = {NVME}  # a slab that was opened again, and is not ready beyond these slots
    assert h.planner.relieve(h.now) == []
    h.planner.growing = set()
    h.carry(h.planner.relieve(h.now))
    h.drain()
    assert {reason for _, reason in h.gone} == {"evicted"}


def test_a_limit_holds_while_its_tier_grows() -> None:
    h = drive_of_spares(0)
    h.planner.growing = {NVME}
    h.planner.limits[NVME] = 6
    h.carry(h.planner.relieve(h.now))
    h.drain()
    assert h.pools[NVME].used <= 6
    assert len(h.gone) == 2


# ---------------------------------------------------------------- units, policies, purity


def test_a_unit_of_two_pages_moves_and_fails_as_one(eager: bool) -> None:
    h = Harness(gpu=4, host=4, nvme=0, regions=((12, 2, 0),), eager=eager)
    written(h, 0, 2)
    h.routes[GPU, HOST].fail(1)  # one page of the unit
    demote(h, 0)
    h.drain()
    assert [at(h, r) for r in (0, 1)] == [GPU, GPU]
    demote(h, 0)
    h.drain()
    assert [at(h, r) for r in (0, 1)] == [HOST, HOST]
    assert h.use([0], "read")
    h.check_idle()


def test_policies_hear_deepest_first_what_enters_leaves_and_is_used() -> None:
    h = Harness(gpu=4, host=4, nvme=0)
    heard: list[tuple[str, list[int]]] = []
    h.planner.rankings[GPU].swap(_Listener(heard), 0)
    request = h.planner.allocate(h.rows([2, 1, 0]), 1, parents=_ids(1, 0, -1), depths=_ids(2, 1, 0))
    h.carry(request.plans)
    h.drain()
    h.planner.touch(h.rows([1, 0]), 2)
    h.carry(h.planner.free(h.rows([2]), 3))
    assert heard == [("inserted", [2, 1, 0]), ("accessed", [1, 0]), ("removed", [2])]


def test_the_same_verbs_give_the_same_plans() -> None:
    def run() -> list[str]:
        h = Harness(gpu=3, host=2, nvme=4, seed=1)
        seen: list[str] = []
        carry = h.carry

        def note(plans: list[Plan]) -> None:
            seen.extend(map(repr, plans))
            carry(plans)

        h.carry = note  # type: ignore[method-assign]
        written(h, 0, 1, 2, 3, 4)
        for row in (0, 3, 1):
            h.use([row], "read")
        h.drain()
        return seen

    assert run() == run()


def _ids(*values: int) -> Ids:
    return np.array(values, np.int32)


class _Listener(EvictionBase):
    """A policy that only writes down what it is told."""

    def __init__(self, heard: list[tuple[str, list[int]]]) -> None:
        super().__init__(0)
        self.heard = heard

    def inserted(self, units: Ids, parents: Ids, depths: Ids, keys: Keys | None, now: int) -> None:
        self.heard.append(("inserted", units.tolist()))

    def accessed(self, units: Ids, now: int) -> None:
        self.heard.append(("accessed", units.tolist()))

    def removed(self, units: Ids, now: int) -> None:
        self.heard.append(("removed", units.tolist()))

    def victims(self, candidates: Candidates, n: int, now: int) -> Ids:
        return _ids()


def test_a_chain_says_where_each_unit_would_be_loaded_from_and_how_much() -> None:
    h = Harness(gpu=4, host=3, nvme=6, regions=((4, 1, 0), (4, 2, 0)), eager=True)
    written(h, 0, 1)
    down(h, HOST, 0)
    assert h.allocate([4])
    assert h.use([4], "write")
    h.drain()
    units = np.array([0, 1, 2, 4], np.int32)
    places, pages = h.planner.chain(units)
    assert places.tolist() == [HOST, GPU, NONE, GPU]
    assert pages.tolist() == [1, 1, 1, 2]
    assert h.planner.queued(HOST) == 0
    h.carry(h.planner.prefetch(h.rows([0]), h.now))
    places, pages = h.planner.chain(units)
    assert (places[0], pages[0]) == (HOST, 0), "on its way: nothing more to copy"
    assert h.planner.queued(HOST) == 1
    assert h.planner.queued(NVME) == 0
    h.drain()
    h.check()
