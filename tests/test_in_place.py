"""Pages read in place: the arcs of the drawing, and what ends them."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from collections.abc import Iterator

import pytest

from tests.harness import ALL_ROUTES, Harness
from tests.test_planner import at, demote, down, pinned, shown, to, written
from tiermem.books import Crossover
from tiermem.config import Config, Gpu, Host
from tiermem.crossover import crossover
from tiermem.errors import ConfigError, PageInUse
from tiermem.plan import Copy, Hide, Request, ShowInPlace
from tiermem.space import Space
from tiermem.table import IS_IN_PLACE, Shown
from tiermem.tier import Place

GPU, HOST, NVME, NONE = Place.GPU, Place.HOST, Place.NVME, Place.NONE
NO_DIRECT = tuple(r for r in ALL_ROUTES if set(r) != {GPU, NVME})


def below(*units: int, **sizes: int) -> Harness:
    """Written pages that rest in the host tier and show nothing; two touches pay, four if full."""
    h = Harness(eager=True, crossover=Crossover(2, 4), routes=NO_DIRECT, **sizes)  # type: ignore[arg-type]
    written(h, *units)
    down(h, HOST, *units)
    return h


def test_a_page_in_the_host_tier_is_shown_and_pinned_there() -> None:
    h = below(0)
    request = h.begin([0], "read", touches=1)
    assert [type(step) for plan in request.plans for step in plan.steps] == [ShowInPlace]
    assert (at(h, 0), to(h, 0), h.table.waiters[0]) == (HOST, HOST, 1)
    h.drain()
    assert (at(h, 0), to(h, 0), shown(h, 0)) == (HOST, NONE, Shown.IN_PLACE)
    assert (h.table.pins[0], h.table.waiters[0]) == (1, 0)
    h.enter(request, "read")
    h.leave(request, None)
    assert h.planner.counts["shown_in_place"] == 1
    assert h.planner.counts["host_gpu"] == 0
    assert h.pools[GPU].free == h.pools[GPU].capacity
    h.check_idle()


def test_a_page_that_stays_shown_is_read_again_without_a_plan_until_loading_pays() -> None:
    h = below(0)
    assert h.use([0], "read", touches=1)
    again = h.begin([0], "read", touches=1)
    assert again.taken
    assert not again.plans
    h.enter(again, "read")
    h.leave(again, None)
    assert h.use([0], "read", touches=2)
    assert h.table.reads[0] == 4
    assert h.planner.counts["host_gpu"] == 0
    assert h.use([0], "read", touches=1)
    assert (at(h, 0), shown(h, 0), h.table.reads[0]) == (GPU, Shown.FRAME, 0)
    h.check_idle()


def test_fewer_touches_pay_where_a_frame_is_free() -> None:
    h = below(0)
    assert h.use([0], "read", touches=3)
    assert at(h, 0) == GPU
    full = below(0, gpu=1)
    held = written_elsewhere(full)
    assert full.use([0], "read", touches=3)
    assert (at(full, 0), at(full, held)) == (HOST, GPU)
    full.check_idle()


def written_elsewhere(h: Harness) -> int:
    """The GPU is full of another page."""
    written(h, 5)
    return 5


def test_touches_of_none_load_and_of_zero_never_do() -> None:
    h = below(0, 1)
    assert h.use([0], "read")
    assert at(h, 0) == GPU
    for _ in range(20):
        assert h.use([1], "read", touches=0)
    assert shown(h, 1) == Shown.IN_PLACE
    h.check_idle()


def test_two_readers_share_one_showing_and_a_third_joins_what_others_read() -> None:
    h = below(0)
    first = h.begin([0], "read", touches=2)
    second = h.begin([0], "read", touches=2)
    assert second.taken
    assert not second.plans
    assert second.pending == first.pending
    h.drain()
    third = h.begin([0], "read")  # would load, if nobody read it in place
    assert not third.plans
    assert h.table.pins[0] == 3
    for request in (first, second, third):
        h.enter(request, "read")
        h.leave(request, None)
    h.check_idle()


@pytest.mark.parametrize("access", ["write", "fresh"])
def test_a_write_has_the_address_hidden_and_loads(access: str) -> None:
    h = below(0)
    assert h.use([0], "read", touches=1)
    request = h.begin([0], access)  # type: ignore[arg-type]
    assert not request.taken
    assert [type(step) for plan in request.plans for step in plan.steps] == [Hide]
    assert h.use([0], access)  # type: ignore[arg-type]
    assert (at(h, 0), shown(h, 0)) == (GPU, Shown.FRAME)
    assert h.table.slot(HOST)[0] == -1
    assert h.use([0], "read")
    h.check_idle()


def test_a_write_of_what_another_reads_in_place_is_refused_with_numbers() -> None:
    h = below(0, 1)
    request = pinned_in_place(h, 0)
    with pytest.raises(PageInUse, match=r"1 of 2 pages are being read in place \(first: row 0\)"):
        h.begin([0, 1], "write")
    assert h.table.pins[1] == 0
    h.leave(request, None)
    assert h.use([0, 1], "write")
    h.check_idle()


def test_a_write_waits_for_queued_reads() -> None:
    h = below(0)
    assert h.use([0], "read", stream=0, touches=1)
    request = h.begin([0], "write")
    assert not request.taken
    assert not request.plans
    assert request.fence.ticks == ((0, 1),)
    h.world.streams.advance(0)
    assert h.use([0], "write")
    h.check_idle()


def test_a_freed_page_is_shown_until_queued_reads_have_run_and_then_hidden() -> None:
    h = below(0)
    assert h.use([0], "read", stream=0, touches=1)
    h.free(h.rows([0]))
    h.settle_ready()
    assert shown(h, 0) == Shown.IN_PLACE
    assert h.pools[HOST].used == 1
    h.world.streams.advance(0)
    h.settle_ready()
    assert shown(h, 0) == Shown.HIDING
    assert h.pools[HOST].used == 1, "the slot went back while the address may show it"
    h.drain()
    assert (at(h, 0), h.pools[HOST].used) == (NONE, 0)
    h.check_idle()


def test_a_page_freed_while_it_is_being_shown_is_hidden_again() -> None:
    h = below(0)
    request = h.begin([0], "read", touches=1)
    h.planner.abandon(request)
    h.free(h.rows([0]))
    h.drain()
    assert (at(h, 0), shown(h, 0)) == (NONE, Shown.NOTHING)
    h.check_idle()


def test_a_page_leaves_for_nvme_hidden_first_and_only_after_queued_reads() -> None:
    h = below(0, gpu=4, host=1, nvme=4)
    written(h, 1)
    assert h.use([0], "read", stream=0, touches=0)
    demote(h, 1)
    h.settle_ready()
    assert (at(h, 0), to(h, 0), at(h, 1)) == (HOST, NONE, GPU)
    h.world.streams.advance(0)
    h.observe()
    demote(h, 1)
    assert to(h, 0) == NVME
    assert shown(h, 0) == Shown.HIDING
    h.drain()
    assert (at(h, 0), shown(h, 0)) == (NVME, Shown.NOTHING)
    h.check_idle()


def test_a_page_with_a_copy_on_nvme_is_hidden_before_it_steps_down() -> None:
    h = below(0, gpu=4, host=1, nvme=4)
    written(h, 1)
    demote(h, 1)  # 0 goes to NVMe for it
    h.drain()
    demote(h, 1)
    h.drain()
    h.free(h.rows([1]))
    h.drain()
    held = pinned_frames(h)
    h.carry(h.planner.prefetch(h.rows([0]), h.now))  # no frame is free: staged in the host tier
    h.drain()
    assert (at(h, 0), h.table.slot(NVME)[0] >= 0) == (HOST, True)
    assert h.use([0], "read", touches=0)
    h.leave(held, None)
    for _ in range(3):  # 0 is hidden, steps down, 2 takes its slot
        assert at(h, 2) == GPU
        demote(h, 2)
        h.drain()
    assert (at(h, 0), at(h, 2)) == (NVME, HOST)
    assert h.planner.counts["stepped_down"] == 1
    h.check_idle()


def pinned_frames(h: Harness) -> Request:
    """Every frame is in use."""
    units = list(range(2, 2 + h.pools[GPU].capacity))
    written(h, *units)
    return pinned(h, units)


def pinned_in_place(h: Harness, unit: int) -> Request:
    request = h.begin([unit], "read", touches=1)
    while request.pending:
        h.advance_for(request)
    h.enter(request, "read")
    assert shown(h, unit) == Shown.IN_PLACE
    return request


def test_a_page_that_cannot_be_shown_in_place_is_loaded() -> None:
    h = below(0)
    h.window.failing = True
    request = h.begin([0], "read", touches=0)
    h.drain()
    assert request.failed == [0]
    h.planner.abandon(request)
    h.window.failing = False
    assert h.use([0], "read", touches=0)
    assert at(h, 0) == GPU
    assert h.planner.counts["failed_in_place"] == 1
    h.check_idle()


def test_a_page_on_its_way_to_nvme_comes_back_to_be_read_in_place() -> None:
    h = below(0, gpu=4, host=1, nvme=4)
    written(h, 1)
    demote(h, 1)
    assert to(h, 0) == NVME
    request = h.begin([0], "read", touches=0)
    assert request.taken
    h.drain()
    assert (at(h, 0), shown(h, 0)) == (HOST, Shown.IN_PLACE)
    assert h.table.slot(NVME)[0] >= 0, "the copy that landed is a spare"
    h.enter(request, "read")
    h.leave(request, None)
    h.check_idle()


def test_the_pages_of_a_unit_are_shown_and_loaded_together() -> None:
    h = Harness(gpu=6, host=6, regions=((6, 3, 0),), eager=True, crossover=Crossover(1, 1))
    written(h, 0)
    down(h, HOST, 0)
    assert h.use([0], "read", touches=1)
    assert (h.table.shown[:3] == IS_IN_PLACE).all()
    assert h.use([0], "read", touches=1)
    assert (h.table.at[:3] == GPU).all()
    h.check_idle()


def test_a_fault_may_show_some_pages_and_load_others() -> None:
    h = below(0, 1)
    assert h.use([0], "read", touches=2)
    h.table.reads[1] = 4
    request = h.begin([0, 1], "read", touches=2)
    kinds = [type(step) for plan in request.plans for step in plan.steps]
    assert Copy in kinds
    assert ShowInPlace not in kinds
    h.drain()
    h.enter(request, "read")
    assert (at(h, 0), at(h, 1)) == (HOST, GPU)
    h.leave(request, None)
    h.check_idle()


def test_the_crossover_counts_a_page_that_must_leave_and_come_back() -> None:
    assert crossover(load_s=186e-6, place_s=186e-6, touch_s=150e-6) == Crossover(0, 1)
    assert crossover(load_s=72e-6, place_s=188e-6, touch_s=38e-6) == Crossover(0, 0)
    assert crossover(load_s=4e-3, place_s=1e-3, touch_s=1e-3) == Crossover(3, 7)


# ---------------------------------------------------------------- a whole space


@pytest.fixture
def space() -> Iterator[Space]:
    page = 65536
    gpu = Gpu(device="cpu", budget=4 * page, page=page, high=1.0, low=1.0, hide="eager")
    host = Host(capacity=16 * page, high=1.0, low=1.0, read_in_place=True)
    with Space.open(Config(gpu=gpu, host=host)) as opened:
        yield opened


def test_a_region_is_read_in_place_through_its_own_addresses(space: Space) -> None:
    region = space.reserve(8 * space.page_bytes, in_place="always")
    pages, view = region.allocate(4), region.view()
    with region.use(pages, "write"):
        for page in pages.tolist():
            view[page] = page + 1
    region.hint(pages, "cold")
    space.drain()
    with region.use(pages):
        assert (region.where(pages) == Place.HOST).all()
        assert [int(view[p][0]) for p in pages.tolist()] == (pages + 1).tolist()
        with pytest.raises(PageInUse), region.use(int(pages[0]), "write"):
            pass
    with region.use(pages, "write"):
        view[pages[0]] = 77
    with region.use(int(pages[0])):
        assert (view[pages[0]] == 77).all()
    assert space.statistics().counts["read_in_place"] == 4
    space.check()
    region.close()


def test_a_region_may_never_be_read_in_place(space: Space) -> None:
    region = space.reserve(8 * space.page_bytes, in_place="never")
    pages = region.allocate(2)
    region.hint(pages, "cold")
    space.drain()
    with region.use(pages):
        assert (region.where(pages) == Place.GPU).all()
    space.check()


def test_closing_hides_what_is_read_in_place(space: Space) -> None:
    region = space.reserve(4 * space.page_bytes, in_place="always")
    pages = region.allocate(2)
    region.hint(pages, "cold")
    space.drain()
    with region.use(pages):
        pass
    region.close()
    assert space.statistics().tiers[1].used == 0
    space.check()


def test_always_needs_a_host_tier_that_can_be_read_in_place() -> None:
    page = 65536
    gpu = Gpu(device="cpu", budget=4 * page, page=page)
    with Space.open(Config(gpu=gpu, host=Host(capacity=4 * page))) as space:
        with pytest.raises(ConfigError, match=r"read_in_place = true"):
            space.reserve(page, in_place="always")
        with pytest.raises(ConfigError, match="one of pays, always, never"):
            space.reserve(page, in_place="sometimes")  # type: ignore[arg-type]


def test_a_write_through_an_address_that_is_read_in_place_ends_the_process() -> None:
    code = """
        from tiermem.gpu.emulated import EmulatedDevice
        import ctypes, numpy as np
        device = EmulatedDevice(65536, 4)
        host = device.host_pages(2)
        at = device.reserve(65536)
        done = host.show(np.array([at], np.uint64), np.array([1], np.int32))
        done.wait()
        print(ctypes.string_at(at, 4), flush=True)
        ctypes.memset(at, 1, 4)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, timeout=60, check=False
    )
    assert done.stdout == b"b'\\x00\\x00\\x00\\x00'\n"
    assert done.returncode < 0
