"""Faults planted below a real space: failing and lagging routes, windows, zeroing, callbacks."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest

from tests.test_region import PAGE, config, filled, verify, write
from tests.waiting import LONG_S, host_slots, until
from tiermem.assemble import Parts, assemble
from tiermem.errors import DriverError, PageInUse, PageLost, TierFailed, TierMemError
from tiermem.gpu.emulated import EmulatedDevice
from tiermem.region import Region
from tiermem.space import Space
from tiermem.testing import DelayedRoute, FailingRoute
from tiermem.tier import Addresses, Done, Fence, Finished, Place, Slots, Window

GPU, HOST, NVME = Place.GPU, Place.HOST, Place.NVME


@contextmanager
def opened(tmp_path: Path, spoil: Callable[[Parts], None], **sizes: int) -> Iterator[Space]:
    """A space over parts that `spoil` has tampered with."""
    given = config(tmp_path, eager=True, **sizes)
    parts = assemble(given)
    spoil(parts)
    with Space(given, parts) as space:
        yield space
        space.check()


class FailingWindow:
    """A window whose shows fail while `failing` is set; nothing is shown then."""

    def __init__(self, window: Window) -> None:
        self._window = window
        self.failing = False

    def show(self, addresses: Addresses, frames: Slots) -> Done:
        if self.failing:
            return Finished(DriverError("show: out of mappings, on purpose"))
        return self._window.show(addresses, frames)

    def hide(self, addresses: Addresses) -> Done:
        return self._window.hide(addresses)


class BrokenReads:
    """A route whose copies end as failed while `failing` is set."""

    def __init__(self, route: FailingRoute) -> None:
        self.src, self.dst = route.src, route.dst
        self._route = route
        self.failing = False

    def submit(self, src: Slots, dst: Slots, after: Fence) -> Done:
        done = self._route.submit(src, dst, after)
        if not self.failing:
            return done
        done.wait()
        return Finished(PageLost("torn, on purpose"), np.ones(len(src), np.bool_))

    def close(self) -> None:
        self._route.close()


# ---------------------------------------------------------------- stores


def test_a_store_that_fails_loses_nothing_and_the_tier_is_given_up(tmp_path: Path) -> None:
    routes: list[FailingRoute] = []

    def spoil(parts: Parts) -> None:
        for key in ((GPU, HOST), (GPU, NVME), (HOST, NVME)):
            parts.routes[key] = route = FailingRoute(parts.routes[key])
            routes.append(route)

    with opened(tmp_path, spoil) as space:
        region = space.reserve(40 * PAGE)
        pages = filled(region, 10)
        for route in routes:
            route.failing = True
        region.hint(pages, "cold")
        space.drain()
        before = region.where(pages)
        for page in pages[before != Place.NONE]:
            with suppress(TierMemError), region.use(int(page)):
                assert (region.view(np.int64)[page] == 1000 + page).all()
        statistics = space.statistics()
        assert statistics.tier(HOST).failed
        assert statistics.counts["failed_copies"] > 0


def test_with_every_lower_tier_failed_the_gpu_still_serves(tmp_path: Path) -> None:
    gone: list[int] = []

    def spoil(parts: Parts) -> None:
        for key in ((GPU, HOST), (GPU, NVME), (HOST, NVME)):
            parts.routes[key] = route = FailingRoute(parts.routes[key])
            route.failing = True

    with opened(tmp_path, spoil) as space:
        region = space.reserve(40 * PAGE, on_gone=lambda pages, why: gone.extend(pages.tolist()))
        for _ in range(5):
            pages = filled(region, 3)
            verify(region, pages)
        assert gone, "pages that found no room were dropped, and their owner told"


# ---------------------------------------------------------------- loads


def test_a_page_that_cannot_be_read_back_is_lost_and_said_to_be(tmp_path: Path) -> None:
    reads: list[BrokenReads] = []
    gone: list[tuple[list[int], str]] = []

    def spoil(parts: Parts) -> None:
        parts.routes[NVME, GPU] = route = BrokenReads(FailingRoute(parts.routes[NVME, GPU]))
        reads.append(route)

    with opened(tmp_path, spoil, host=0) as space:
        region = space.reserve(
            40 * PAGE, on_gone=lambda pages, why: gone.append((pages.tolist(), why))
        )
        pages = filled(region, 8)
        space.drain()
        away = pages[region.where(pages) == NVME]
        reads[0].failing = True
        with pytest.raises(PageLost, match='compute them again with access="fresh"'):
            region.use(away[:1]).__enter__()
        reads[0].failing = False
        until(lambda: gone == [([int(away[0])], "lost")])
        assert region.where(away[:1]).tolist() == [Place.LOST]
        with pytest.raises(PageLost), region.use(away[:1]):
            pass
        verify(region, away[1:])
        write(region, away[:1])
        verify(region, pages)


def test_a_load_from_the_host_that_fails_is_tried_again_and_then_refused(tmp_path: Path) -> None:
    reads: list[BrokenReads] = []

    def spoil(parts: Parts) -> None:
        parts.routes[HOST, GPU] = route = BrokenReads(FailingRoute(parts.routes[HOST, GPU]))
        reads.append(route)

    with opened(tmp_path, spoil, nvme=0) as space:
        region = space.reserve(40 * PAGE)
        host_slots(space, 4)
        pages = filled(region, 2)
        region.hint(pages, "cold")
        space.drain()
        reads[0].failing = True
        with pytest.raises(TierFailed, match="2 of 2 pages could not be loaded in 4 attempts"):
            region.use(pages).__enter__()
        space.check()
        reads[0].failing = False
        verify(region, pages)


def test_others_go_on_while_a_load_lags(tmp_path: Path) -> None:
    lagging: list[DelayedRoute] = []

    def spoil(parts: Parts) -> None:
        parts.routes[HOST, GPU] = route = DelayedRoute(parts.routes[HOST, GPU])
        lagging.append(route)

    with opened(tmp_path, spoil, nvme=0) as space:
        region = space.reserve(40 * PAGE)
        pages = filled(region, 3)
        host_slots(space, 4)
        region.hint(pages[:1], "cold")
        space.drain()
        entered = threading.Event()

        def wait() -> None:
            with region.use(pages[:1]):
                entered.set()

        waiting = threading.Thread(target=wait)
        waiting.start()
        for _ in range(20):
            verify(region, pages[1:])
        assert not entered.is_set()
        while not lagging[0].held:
            verify(region, pages[1:])
        with pytest.raises(PageInUse, match="pinned or awaited"):
            region.free(pages[:1])
        lagging[0].release()
        waiting.join(LONG_S)
        assert entered.is_set()


# ---------------------------------------------------------------- the window


def _spoil_window(windows: list[FailingWindow]) -> Callable[[Parts], None]:
    def spoil(parts: Parts) -> None:
        assert isinstance(parts.device, EmulatedDevice)
        parts.device.window = window = FailingWindow(parts.device.window)
        windows.append(window)

    return spoil


def test_pages_that_cannot_be_shown_are_not_allocated_and_none_is_vacant_twice(
    tmp_path: Path,
) -> None:
    """Once they were given back by the pager and by the region, and handed out to two owners."""
    windows: list[FailingWindow] = []
    with opened(tmp_path, _spoil_window(windows), gpu=8) as space:
        region = space.reserve(6 * PAGE)
        for _ in range(3):
            windows[0].failing = True
            with pytest.raises(TierFailed, match="frames could not be shown"):
                region.allocate(4)
            windows[0].failing = False
            space.drain()
            pages = filled(region, 6)
            assert sorted(pages.tolist()) == list(range(6))
            verify(region, pages)
            region.free(pages)


def test_a_load_that_cannot_be_shown_leaves_the_page_below(tmp_path: Path) -> None:
    windows: list[FailingWindow] = []
    with opened(tmp_path, _spoil_window(windows), nvme=0) as space:
        region = space.reserve(40 * PAGE)
        host_slots(space, 4)
        pages = filled(region, 2)
        region.hint(pages, "cold")
        space.drain()
        windows[0].failing = True
        with pytest.raises(TierFailed):
            region.use(pages).__enter__()
        windows[0].failing = False
        verify(region, pages)


# ---------------------------------------------------------------- zeroing


def test_a_frame_that_could_not_be_zeroed_is_never_shown_to_another_tenant(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing = threading.Event()
    zero = EmulatedDevice.zero

    def unreliable(self: EmulatedDevice, frames: Slots) -> Done:
        return Finished(DriverError("zero: on purpose")) if failing.is_set() else zero(self, frames)

    monkeypatch.setattr(EmulatedDevice, "zero", unreliable)
    with opened(tmp_path, lambda parts: None, host=0, nvme=0) as space:
        first, second = space.reserve(8 * PAGE, tenant=1), space.reserve(8 * PAGE, tenant=2)
        first.free(filled(first, 4))
        space.drain()
        failing.set()
        with pytest.raises(TierFailed):
            second.allocate(2)
        space.check()
        failing.clear()
        space.drain()
        pages = second.allocate(4)
        with second.use(pages):
            assert (second.view(np.int64)[pages] == 0).all()


def test_a_callback_that_raises_does_not_stop_the_space(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def angry(pages: np.ndarray, why: str) -> None:
        raise RuntimeError("the engine is not amused")

    with opened(tmp_path, lambda parts: None, host=0, nvme=0) as space:
        region = space.reserve(12 * PAGE, on_gone=angry)
        filled(region, 8)
        space.drain()
        assert "not amused" in caplog.text
        last = filled(region, 2)
        verify(region, last)


def test_regions_report_nothing_of_other_regions(tmp_path: Path) -> None:
    told: dict[str, list[int]] = {"a": [], "b": []}

    def listener(name: str) -> Callable[[np.ndarray, str], None]:
        return lambda pages, why: told[name].extend(pages.tolist())

    with opened(tmp_path, lambda parts: None, host=0, nvme=0) as space:
        a: Region = space.reserve(8 * PAGE, on_gone=listener("a"))
        b: Region = space.reserve(8 * PAGE, on_gone=listener("b"))
        mine = filled(a, 4)
        filled(b, 4)
        space.drain()
        assert sorted(told["a"]) == sorted(mine.tolist())
        assert told["b"] == []
