"""The CUDA device over the stand-in driver: the device contract, and planted driver faults."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.gpu.device_contract import (
    DeviceContract,
    Parts,
    fence,
    finish,
    pages,
    refusal,
    slots,
)
from tests.gpu.standin import StandIn
from tiermem.errors import Closed, DriverError, NotOurs, PageInUse, TierFull
from tiermem.gpu import calibrate, copy
from tiermem.gpu.calibrate import Calibration
from tiermem.gpu.copy import open_stream
from tiermem.gpu.driver import Context, CudaError, DeviceLost
from tiermem.gpu.frames import DEVICE, Backing
from tiermem.gpu.vmm import CudaDevice, HostPages
from tiermem.tier import PASSED

PAGE = 2 << 20
PLAIN = Calibration(page_bytes=PAGE)


class StandInEngine:
    """An engine on the stand-in driver: its memory can be read by the processor."""

    def __init__(self, device: CudaDevice, fake: StandIn) -> None:
        self.device = device
        self.fake = fake
        self.words: list[np.ndarray] = []

    def host(self, slots: int) -> HostPages:
        return self.device.host_pages(slots)

    def stream(self) -> int:
        return open_stream(self.device.context)

    def hold(self, stream: int) -> Callable[[], None]:
        word = np.zeros(1, np.uint32)
        self.words.append(word)
        with self.device.context:
            self.fake.hold(stream, word)

        def release() -> None:
            word[0] = 1

        return release

    def fill(self, stream: int | None, address: int, value: int, nbytes: int) -> None:
        driver = self.device.context.driver
        with self.device.context:
            driver.call("cuMemsetD32Async", address, value * 0x01010101, nbytes // 4, stream or 0)
            if stream is None:
                driver.call("cuStreamSynchronize", 0)

    def read(self, stream: int | None, address: int, nbytes: int) -> Callable[[], bytes]:
        out = np.zeros(nbytes, np.uint8)
        driver = self.device.context.driver
        with self.device.context:
            driver.call("cuMemcpyAsync", out.ctypes.data, address, nbytes, stream or 0)

        def result() -> bytes:
            driver.call("cuStreamSynchronize", stream or 0)
            return out.tobytes()

        return result

    def see(self, stream: int | None, address: int, nbytes: int) -> Callable[[], bytes]:
        return self.read(stream, address, nbytes)

    def close(self) -> None:
        self.words.clear()


@pytest.fixture
def fake() -> Iterator[StandIn]:
    fake = StandIn()
    yield fake
    fake.reset()


@contextlib.contextmanager
def opened(
    fake: StandIn,
    frames: int = 8,
    max_frames: int = 12,
    *,
    guard: bool = False,
    calibration: Calibration = PLAIN,
) -> Iterator[tuple[CudaDevice, StandInEngine]]:
    device = CudaDevice(
        0, PAGE, frames, max_frames, guard=guard, driver=fake.driver(), calibration=calibration
    )
    engine = StandInEngine(device, fake)
    assert device.frames.wait_ready(30)
    before = fake.in_use() - device.frames.capacity * PAGE
    try:
        yield device, engine
    finally:
        fake.reset()
        device.close()
        engine.close()
    assert fake.in_use() <= before, "device memory was not given back"


class TestContract(DeviceContract):
    guard = False

    @contextlib.contextmanager
    def open(self, frames: int, max_frames: int) -> Iterator[Parts]:
        fake = StandIn()
        with opened(fake, frames=frames, max_frames=max_frames, guard=self.guard) as parts:
            yield parts


class TestContractWithAGuardPage(TestContract):
    guard = True

    def test_a_page_that_shows_nothing_can_be_read(self, parts: Parts) -> None:
        device, engine = parts
        start = device.reserve(4 * PAGE)
        assert len(engine.read(None, start + PAGE, 64)()) == 64
        finish(device.window.show(pages(device, start, 1), slots(0)))
        finish(device.window.hide(pages(device, start, 1)))
        assert len(engine.read(None, start + PAGE, 64)()) == 64
        device.release(start, 4 * PAGE)


class TestContractWithoutBatchedCopies(DeviceContract):
    """A driver before CUDA 12.8: another way, the same promises."""

    @contextlib.contextmanager
    def open(self, frames: int, max_frames: int) -> Iterator[Parts]:
        fake = StandIn()
        fake.lack("cuMemcpyBatchAsync")
        with opened(fake, frames=frames, max_frames=max_frames) as parts:
            yield parts


@pytest.mark.parametrize("guard", [False, True])
@pytest.mark.parametrize("n", [2, 6])
@pytest.mark.parametrize("call", ["cuMemMap", "cuMemSetAccess", "cuMemUnmap"])
@pytest.mark.parametrize("nth", [1, 2])
def test_a_group_in_which_any_driver_call_fails_changes_nothing(
    fake: StandIn, guard: bool, n: int, call: str, nth: int
) -> None:
    with opened(fake, guard=guard) as (device, engine):
        start = device.reserve(16 * PAGE)
        at, frames = pages(device, start, *range(n)), slots(*range(n))
        for frame, alias in zip(frames, device.frames.addresses(frames), strict=True):
            engine.fill(None, int(alias), 30 + int(frame), PAGE)
        before = fake.mappings()
        if call != "cuMemUnmap" or guard:
            fake.fail(call, nth, 2)
            error = refusal(lambda: device.window.show(at, frames))
            assert call in str(error)
            assert "CUDA_ERROR_OUT_OF_MEMORY" in str(error)
            assert fake.mappings() == before
        finish(device.window.show(at, frames))
        shown = fake.mappings()
        if call == "cuMemUnmap" or guard:
            fake.fail(call, nth, 2)
            assert call in str(refusal(lambda: device.window.hide(at)))
            assert fake.mappings() == shown
        read = [engine.read(None, int(a), 64)()[0] for a in at]
        assert read == [30 + f for f in range(n)]
        finish(device.window.hide(at))
        assert fake.mappings() == before


def test_a_page_shown_behind_a_queued_group_waits_its_turn(fake: StandIn) -> None:
    with opened(fake) as (device, engine):
        start = device.reserve(16 * PAGE)
        fake.slow(50_000)
        group = device.window.show(pages(device, start, *range(6)), slots(*range(6)))
        one = device.window.show(pages(device, start, 9), slots(7))
        assert not one.ready()
        fake.slow(0)
        finish(one)
        assert group.ready()
        engine.fill(None, start + 9 * PAGE, 2, PAGE)
        finish(device.window.hide(pages(device, start, 9)))
        finish(device.window.hide(pages(device, start, *range(6))))


@pytest.mark.parametrize("n", [1, 6])
def test_pages_of_a_queued_group_that_fails_are_known_to_show_nothing(
    fake: StandIn, n: int
) -> None:
    with opened(fake) as (device, _):
        start = device.reserve(16 * PAGE)
        at, frames = pages(device, start, *range(6)), slots(*range(6))
        fake.slow(20_000)
        fake.fail("cuMemMap", 6, 1)
        group = device.window.show(at, frames)
        assert "show" in str(refusal(lambda: device.window.hide(at[:n])))
        assert group.ready()
        fake.slow(0)
        assert "cuMemMap" in str(refusal(lambda: group))
        finish(device.window.show(at, frames))
        finish(device.window.hide(at))


@pytest.mark.parametrize("fails", [False, True])
def test_copies_down_make_way_for_a_group_that_is_being_shown(fake: StandIn, fails: bool) -> None:
    with opened(fake) as (device, engine):
        down, up = device.routes(engine.host(4))
        start = device.reserve(8 * PAGE)
        before = fake.mappings()
        fake.slow(200_000)
        if fails:
            fake.fail("cuMemMap", 6, 1)
        group = device.window.show(pages(device, start, *range(6)), slots(*range(6)))
        while fake.mappings() == before and not group.ready():
            pass
        done = down.submit(slots(6), slots(1), PASSED)
        finish(up.submit(slots(2), slots(7), PASSED))
        assert not done.ready()
        fake.slow(0)
        assert group.wait(30)
        assert bool(group.error) == fails
        finish(done)


def test_a_page_shown_by_the_calling_thread_leaves_the_way_down_open(fake: StandIn) -> None:
    with opened(fake) as (device, engine):
        down, _ = device.routes(engine.host(4))
        start = device.reserve(8 * PAGE)
        fake.fail("cuMemSetAccess", 1, 1)
        refusal(lambda: device.window.show(pages(device, start, 0), slots(0)))
        finish(down.submit(slots(6), slots(1), PASSED))
        finish(device.window.show(pages(device, start, 0), slots(0)))
        finish(down.submit(slots(6), slots(1), PASSED))


def test_a_full_device_is_a_full_tier_and_keeps_what_it_had(fake: StandIn) -> None:
    with opened(fake) as (device, _):
        fake.limit(fake.in_use() + 2 * PAGE)
        before = fake.in_use()
        with pytest.raises(TierFull, match=r"need 4 pages of 2.*the device gave 2"):
            device.back(slots(8, 9, 10, 11))
        assert fake.in_use() == before
        device.back(slots(8, 9))


def test_a_failed_alias_gives_the_new_memory_back(fake: StandIn) -> None:
    with opened(fake) as (device, _):
        before = fake.in_use()
        fake.fail("cuMemSetAccess", 2, 1)  # of two: frame 8, and 10 with 11
        with pytest.raises(CudaError, match=r"cuMemSetAccess.*alias"):
            device.back(slots(8, 10, 11))
        assert fake.in_use() == before
        device.back(slots(8, 9, 10, 11))


def test_frames_beyond_the_device_stay_missing_and_the_reason_is_kept(fake: StandIn) -> None:
    fake.limit(fake.in_use() + 300 * PAGE)
    driver = fake.driver()
    device = CudaDevice(0, PAGE, 600, driver=driver, calibration=Calibration(page_bytes=PAGE))
    try:
        assert not device.frames.wait_ready(60)
        assert device.frames.ready == 256
        assert isinstance(device.frames.shortage, TierFull)
    finally:
        device.close()


def test_resize_gives_memory_back_and_takes_it_again(fake: StandIn) -> None:
    with opened(fake, frames=8, max_frames=32) as (device, _):
        before = fake.in_use()
        device.frames.resize(20)
        assert fake.in_use() == before + 12 * PAGE
        device.frames.resize(3)
        assert fake.in_use() == before - 5 * PAGE
        with pytest.raises(TierFull, match="33 frames asked for, 32 at most"):
            device.frames.resize(33)
        device.frames.resize(8)


def test_a_copy_that_the_driver_refuses_names_the_entry_and_leaves_the_route_usable(
    fake: StandIn,
) -> None:
    with opened(fake) as (device, engine):
        down, _ = device.routes(engine.host(4))
        fake.fail("entry", 3, 1)
        with pytest.raises(CudaError, match=r"cuMemcpyBatchAsync.*entry 2 of 4"):
            down.submit(slots(0, 1, 2, 3), slots(0, 1, 2, 3), PASSED)
        finish(down.submit(slots(0), slots(0), PASSED))


def test_a_lost_device_ends_every_done_and_latches_the_route(fake: StandIn) -> None:
    with opened(fake) as (device, engine):
        down, _ = device.routes(engine.host(4))
        stream = engine.stream()
        release = engine.hold(stream)
        now = fence(device, stream)
        done = down.submit(slots(0), slots(0), now)
        fake.fail("cuEventQuery", 1, 700)
        assert done.wait(30)
        assert isinstance(done.error, DeviceLost)
        with pytest.raises(DeviceLost):
            down.submit(slots(1), slots(1), PASSED)
        fake.fail("cuEventQuery", 1, 700)
        with pytest.raises(DeviceLost):
            device.streams.wait(now, 30)
        release()


def test_a_kernel_queued_before_its_pages_are_shown_waits_for_the_window(fake: StandIn) -> None:
    with opened(fake) as (device, engine):
        start = device.reserve(8 * PAGE)
        engine.fill(None, int(device.frames.addresses(slots(7))[0]), 6, PAGE)
        fake.slow(200_000)
        shown = device.window.show(pages(device, start, *range(8)), slots(*range(8)))
        stream = engine.stream()
        shown.order(stream)  # type: ignore[attr-defined]
        seen = engine.see(stream, start + 7 * PAGE, 64)
        tick = fence(device, stream)
        assert not device.streams.wait(tick, 0.02)
        assert not shown.ready()
        fake.slow(0)
        assert seen() == bytes([6]) * 64
        finish(shown)
        shown.order(stream)  # type: ignore[attr-defined]  # nothing is left to wait for


def test_no_kernel_reads_the_guard_page_for_one_that_could_not_be_shown(fake: StandIn) -> None:
    """It would not fault there: so the caller waits, and knows before it queues anything."""
    with opened(fake, guard=True) as (device, engine):
        start = device.reserve(8 * PAGE)
        fake.slow(5_000)
        fake.fail("cuMemSetAccess", 8, 2)
        shown = device.window.show(pages(device, start, *range(8)), slots(*range(8)))
        shown.order(engine.stream())  # type: ignore[attr-defined]
        assert shown.ready()
        assert isinstance(shown.error, CudaError)


def test_an_address_whose_hide_fails_is_not_shown_again_to_who_queues_kernels(
    fake: StandIn,
) -> None:
    """It still shows the old frame, which may be another page's by now."""
    with opened(fake) as (device, _):
        start = device.reserve(4 * PAGE)
        at = pages(device, start, *range(4))
        finish(device.window.show(at, slots(*range(4))))
        fake.fail("cuMemUnmap", 4, 1)
        hidden = device.window.hide(at)
        with pytest.raises(DriverError, match="4 of 4 show something"):
            device.window.show(at, slots(4, 5, 6, 7))
        assert isinstance(hidden.error, CudaError)
        finish(device.window.hide(at))


def test_pieces_below_the_measured_size_go_through_the_kernel_and_arrive(fake: StandIn) -> None:
    calibration = Calibration(page_bytes=PAGE, gather_below_down=64 << 10, gather_below_up=64 << 10)
    with opened(fake, calibration=calibration) as (device, engine):
        host = engine.host(2)
        down, up = device.routes(host)
        frame, there = (int(m.addresses(slots(1))[0]) for m in (device.frames, host))
        engine.fill(None, frame, 5, PAGE)
        at = np.arange(128, dtype=np.uint64) * np.uint64(PAGE // 128)
        sizes = np.full(128, PAGE // 128, np.uint64)
        fake.fail("cuMemcpyBatchAsync", 1, 1)
        finish(down.submit_pieces(at + np.uint64(frame), at + np.uint64(there), sizes, PASSED))
        assert ctypes.string_at(there, PAGE) == bytes([5]) * PAGE
        finish(device.zero(slots(1)))
        finish(up.submit_pieces(at + np.uint64(there), at + np.uint64(frame), sizes, PASSED))
        assert engine.read(None, frame, PAGE)() == bytes([5]) * PAGE
        with pytest.raises(CudaError, match="cuMemcpyBatchAsync"):
            down.submit(slots(0), slots(0), PASSED)


def test_a_host_page_is_shown_in_place_and_later_replaced_by_a_frame(fake: StandIn) -> None:
    with opened(fake) as (device, engine):
        host = device.host_pages(3)
        start = device.reserve(4 * PAGE)
        ctypes.memset(int(host.addresses(slots(2))[0]), 9, PAGE)
        at = pages(device, start, 1)
        finish(device.window.show_in_place(at, slots(2), host.arena))
        assert engine.read(None, start + PAGE, 64)() == bytes([9]) * 64
        refusal(lambda: device.window.show(at, slots(0)))
        finish(device.window.hide(at))
        _, up = device.routes(host)
        finish(up.submit(slots(2), slots(4), PASSED))
        ctypes.memset(int(host.addresses(slots(2))[0]), 1, PAGE)
        finish(device.window.show(at, slots(4)))
        assert engine.read(None, start + PAGE, 64)() == bytes([9]) * 64
        many, three = pages(device, start, 0, 2, 3), slots(0, 1, 2)
        finish(device.window.show_in_place(many, three, host.arena))
        mixed = pages(device, start, 0, 1, 2, 3)
        fake.fail("cuMemUnmap", 4, 1)
        refusal(lambda: device.window.hide(mixed))
        assert engine.read(None, start + 3 * PAGE, 64)() == bytes([1]) * 64
        finish(device.window.hide(mixed))


def test_a_reservation_that_still_shows_something_is_not_given_back(fake: StandIn) -> None:
    with opened(fake) as (device, _):
        start = device.reserve(2 * PAGE)
        finish(device.window.show(pages(device, start, 1), slots(0)))
        with pytest.raises(PageInUse, match="1 pages"):
            device.release(start, 2 * PAGE)
        with pytest.raises(NotOurs):
            device.release(start + PAGE, PAGE)
        finish(device.window.hide(pages(device, start, 1)))
        device.release(start, 2 * PAGE)
        with pytest.raises(NotOurs):
            device.window.show(pages(device, start, 0), slots(0))


def test_a_stream_that_is_being_captured_takes_no_tick(fake: StandIn) -> None:
    with opened(fake) as (device, engine):
        stream = engine.stream()
        fake.fail("cuStreamIsCapturing", 1, 1)
        with pytest.raises(DriverError, match="captured into a CUDA graph"):
            device.streams.tick(stream)


def test_host_memory_that_cannot_be_pinned_says_so(fake: StandIn) -> None:
    with opened(fake) as (device, _):
        memory = np.zeros(PAGE, np.uint8)
        fake.fail("cuMemHostRegister", 1, 712)
        with pytest.raises(CudaError, match="cuMemHostRegister"):
            device.register(memory.ctypes.data, PAGE)
        device.register(memory.ctypes.data, PAGE)
        device.unregister(memory.ctypes.data)


@pytest.mark.parametrize("page", [4096, 3 << 20, 0])
def test_a_page_size_that_the_device_cannot_map_is_refused(fake: StandIn, page: int) -> None:
    before = fake.in_use()
    with pytest.raises(DriverError, match="not a multiple of 2"):
        CudaDevice(0, page, 4, driver=fake.driver(), calibration=Calibration(page_bytes=PAGE))
    assert fake.in_use() == before


def test_the_page_is_large_enough_that_the_link_sets_the_pace() -> None:
    fast = Calibration(page_bytes=0, show_us=36, hide_us=20, both_gbps=92)
    assert calibrate.page_for(fast, PAGE) == 2 * PAGE
    slow_driver = Calibration(page_bytes=0, show_us=3600, hide_us=2000, both_gbps=92)
    assert calibrate.page_for(slow_driver, PAGE) == 16 * PAGE
    slow_link = Calibration(page_bytes=0, show_us=36, hide_us=20, both_gbps=20)
    assert calibrate.page_for(slow_link, PAGE) == PAGE


def test_a_size_that_was_disturbed_does_not_send_large_pieces_through_the_kernel() -> None:
    """Whole slices of pages went that way once, and whoever submitted them waited for them."""
    asked: list[int] = []

    def seconds() -> Iterator[tuple[int, float, float]]:
        for size, engines, kernel in [(4, 9.0, 1.0), (8, 2.0, 1.0), (16, 1.0, 1.0), (32, 5.0, 1.0)]:
            asked.append(size)
            yield size, engines, kernel

    assert calibrate.crossover(seconds()) == 16
    assert asked == [4, 8, 16]
    assert calibrate.crossover([(4, 1.0, 1.0)]) == 0
    assert calibrate.crossover([(4, 2.0, 1.0), (8, 2.0, 1.0)]) == 16
    assert 2 * max(calibrate._SIZES) <= copy._SLICE // 4


def test_a_calibration_is_measured_once_and_then_read(
    fake: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    context = Context(fake.driver(), 0)
    backing = Backing(context, DEVICE, 0)
    taken = []

    def short(context: Context, backing: Backing) -> Calibration:
        taken.append(real(context, backing, PAGE))
        return taken[-1]

    real = calibrate.measure
    monkeypatch.setattr(calibrate, "measure", short)
    first = calibrate.load(context, backing)
    assert first.page_bytes % PAGE == 0
    assert first.down_gbps > 0
    assert calibrate.load(context, backing) == first
    assert len(taken) == 1
    calibrate.path(context).write_text('{"format": 0}')
    calibrate.load(context, backing)
    assert len(taken) == 2
    context.close()


def test_nothing_is_taken_by_a_device_after_close(fake: StandIn) -> None:
    with opened(fake) as (device, engine):
        host = engine.host(2)
        start = device.reserve(2 * PAGE)
        done = device.zero(slots(0))
        device.close()
        assert done.wait(30)
        for call in (
            lambda: device.window.show(pages(device, start, 0), slots(0)),
            lambda: device.zero(slots(0)),
            lambda: device.routes(host),
            lambda: device.back(slots(9)),
        ):
            with pytest.raises(Closed):
                call()
