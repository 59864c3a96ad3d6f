"""The CUDA device on a real GPU: the device contract, latch kernels, pages read in place."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.gpu.device_contract import (
    LONG_S,
    DeviceContract,
    Parts,
    fence,
    finish,
    pages,
    slots,
)
from tiermem.errors import DriverError, TierFull
from tiermem.gpu.calibrate import Calibration
from tiermem.gpu.copy import open_stream
from tiermem.gpu.driver import Context
from tiermem.gpu.gather import Module, launch
from tiermem.gpu.streams import Words
from tiermem.gpu.vmm import CudaDevice
from tiermem.tier import PASSED, Addresses, Fence, Place, Slots

pytestmark = pytest.mark.gpu

PAGE = 2 << 20
MEASURED = Calibration(page_bytes=PAGE, gather_below_down=64 << 10, gather_below_up=64 << 10)

LATCH = """
.version 7.0
.target sm_70
.address_size 64
.visible .entry latch(.param .u64 p_word)
{
  .reg .pred %shut;
  .reg .b32 %seen;
  .reg .b64 %word;
  ld.param.u64 %word, [p_word];
SPIN:
  ld.volatile.global.u32 %seen, [%word];
  setp.eq.u32 %shut, %seen, 0;
  @%shut bra SPIN;
  ret;
}
.visible .entry see(.param .u64 p_dst, .param .u64 p_src, .param .u64 p_words)
{
  .reg .pred %over;
  .reg .b32 %seen, %i<4>;
  .reg .b64 %dst, %src, %words, %at, %step, %offset, %from, %to;
  ld.param.u64 %dst, [p_dst];
  ld.param.u64 %src, [p_src];
  ld.param.u64 %words, [p_words];
  mov.u32 %i0, %ctaid.x;
  mov.u32 %i1, %ntid.x;
  mov.u32 %i2, %tid.x;
  mad.lo.u32 %i3, %i0, %i1, %i2;
  cvt.u64.u32 %at, %i3;
  mov.u32 %i0, %nctaid.x;
  mul.lo.u32 %i3, %i0, %i1;
  cvt.u64.u32 %step, %i3;
NEXT:
  setp.ge.u64 %over, %at, %words;
  @%over bra END;
  shl.b64 %offset, %at, 2;
  add.u64 %from, %src, %offset;
  add.u64 %to, %dst, %offset;
  ld.volatile.global.u32 %seen, [%from];
  st.global.u32 [%to], %seen;
  add.u64 %at, %at, %step;
  bra NEXT;
END:
  ret;
}
"""


class Pinned:
    """Host slots in anonymous memory, pinned through the device."""

    place = Place.HOST
    growing = False

    def __init__(self, device: CudaDevice, count: int, slot_bytes: int = PAGE) -> None:
        self.slot_bytes = slot_bytes
        self.capacity = self.ready = count
        self.memory = np.frombuffer(mmap.mmap(-1, count * slot_bytes), np.uint8)
        self.address = int(self.memory.ctypes.data)
        device.register(self.address, count * slot_bytes)

    def addresses(self, slots: Slots) -> Addresses:
        return slots.astype(np.uint64) * np.uint64(self.slot_bytes) + np.uint64(self.address)

    def resize(self, capacity: int) -> None:
        raise NotImplementedError

    def close(self) -> None:
        """The engine unpins all of its memory when it is closed."""


class CudaEngine:
    """An engine on the GPU. Everything that could wait for running kernels is made ahead."""

    def __init__(self, device: CudaDevice) -> None:
        self.device = device
        # Retained here too, so that the engine can be closed after the device.
        self.context = Context(device.context.driver, device.context.index)
        self.module = Module(self.context, LATCH)
        self.latch = self.module.kernel("latch")
        self.seer = self.module.kernel("see")
        self.words = Words(self.context, 64)
        self.scratch = Pinned(device, 8)
        self.used = 0
        self.closed = False
        self.hosts: list[Pinned] = []
        self.fill(None, int(device.frames.addresses(slots(0))[0]), 0, 64)

    def host(self, count: int) -> Pinned:
        self.hosts.append(Pinned(self.device, count))
        return self.hosts[-1]

    def stream(self) -> int:
        return open_stream(self.device.context)

    def hold(self, stream: int) -> Callable[[], None]:
        index = self.words.take()
        address = self.words.address + 8 * index
        with self.device.context:
            launch(self.device.context, self.latch, (1, 1), 1, stream, address)

        def release() -> None:
            self.words.values[index] = 1

        return release

    def fill(self, stream: int | None, address: int, value: int, nbytes: int) -> None:
        driver = self.device.context.driver
        with self.device.context:
            driver.call("cuMemsetD32Async", address, value * 0x01010101, nbytes // 4, stream or 0)
            if stream is None:
                driver.call("cuStreamSynchronize", 0)

    def read(self, stream: int | None, address: int, nbytes: int) -> Callable[[], bytes]:
        at = self._scratch()
        with self.device.context:
            self.device.context.driver.call("cuMemcpyAsync", at, address, nbytes, stream or 0)
        return lambda: self._bytes(stream, at, nbytes)

    def see(self, stream: int | None, address: int, nbytes: int) -> Callable[[], bytes]:
        at = self._scratch()
        context = self.device.context
        with context:
            launch(context, self.seer, (32, 1), 256, stream or 0, at, address, nbytes // 4)
        return lambda: self._bytes(stream, at, nbytes)

    def _scratch(self) -> int:
        self.used += 1
        return int(self.scratch.addresses(slots(self.used % 8))[0])

    def _bytes(self, stream: int | None, at: int, nbytes: int) -> bytes:
        with self.device.context:
            self.device.context.driver.call("cuStreamSynchronize", stream or 0)
        return ctypes.string_at(at, nbytes)

    def close(self) -> None:
        if self.closed:
            return
        self.closed = True
        self.module.close()
        with self.context:
            for pinned in (self.scratch, *self.hosts):
                self.context.driver.call("cuMemHostUnregister", pinned.address)
        self.words.close()
        self.context.close()


@contextlib.contextmanager
def opened(
    frames: int = 8, max_frames: int = 12, *, guard: bool = False
) -> Iterator[tuple[CudaDevice, CudaEngine]]:
    device = CudaDevice(0, PAGE, frames, max_frames, guard=guard, calibration=MEASURED)
    engine = CudaEngine(device)
    assert device.frames.wait_ready(LONG_S)
    try:
        yield device, engine
    finally:
        device.close()
        engine.close()


class TestContract(DeviceContract):
    guard = False

    @contextlib.contextmanager
    def open(self, frames: int, max_frames: int) -> Iterator[Parts]:
        with opened(frames=frames, max_frames=max_frames, guard=self.guard) as parts:
            yield parts


class TestContractWithAGuardPage(TestContract):
    guard = True

    def test_a_page_that_shows_nothing_can_be_read(self, parts: Parts) -> None:
        device, engine = parts
        start = device.reserve(4 * PAGE)
        assert len(engine.read(None, start + PAGE, 64)()) == 64


def test_pages_are_shown_and_hidden_while_a_kernel_runs_and_groups_keep_their_order() -> None:
    with opened(frames=200, max_frames=200) as (device, engine):
        start = device.reserve(400 * PAGE)
        release = engine.hold(engine.stream())
        try:
            low = pages(device, start, *range(200))
            high = pages(device, start, *range(200, 400))
            frames = np.arange(200, dtype=np.int32)
            dones = [
                device.window.show(low, frames),
                device.window.hide(low),
                device.window.show(high, frames[::-1].copy()),
            ]
            for done in dones:
                finish(done)
        finally:
            release()
        engine.fill(None, int(device.frames.addresses(slots(7))[0]), 3, PAGE)
        assert engine.read(None, int(high[192]), 64)() == bytes([3]) * 64
        finish(device.window.hide(high))


def test_a_load_through_the_alias_is_seen_at_the_page_by_work_ordered_behind_it() -> None:
    with opened() as (device, engine):
        host = engine.host(64)
        host.memory[:] = np.repeat(np.arange(64, dtype=np.uint8), PAGE)
        down, up = device.routes(host)
        start = device.reserve(8 * PAGE)
        at, frames = pages(device, start, *range(8)), np.arange(8, dtype=np.int32)
        reader = engine.stream()
        for turn in range(8):
            there = np.arange(8, dtype=np.int32) * 8 + turn
            load = up.submit(there, frames, fence(device, reader))
            done = device.window.show(at, frames)
            load.order(reader)
            finish(done)
            seen = [engine.read(reader, int(a) + PAGE - 64, 64) for a in at]
            now = fence(device, reader)
            assert [s()[0] for s in seen] == there.tolist()
            assert device.streams.wait(now, LONG_S)
            finish(device.window.hide(at))
        finish(down.submit(frames, frames, PASSED))


@pytest.mark.parametrize("piece", [4096, 16 << 10, 48 << 10, 4080])
def test_small_pieces_go_through_the_kernel_and_arrive_equal(piece: int) -> None:
    with opened() as (device, engine):
        host = engine.host(4)
        down, up = device.routes(host)
        rng = np.random.default_rng(piece)
        host.memory[: 2 * PAGE] = rng.integers(0, 256, 2 * PAGE, np.uint8)
        n = PAGE // (48 << 10)
        at = rng.permutation(n).astype(np.uint64) * np.uint64(48 << 10)
        sizes = np.full(n, piece, np.uint64)
        frame = device.frames.addresses(slots(2))[0]
        src, back = host.addresses(slots(1))[0], host.addresses(slots(3))[0]
        finish(device.zero(slots(2)))
        finish(up.submit_pieces(at + src, at[::-1] + frame, sizes, PASSED))
        finish(down.submit_pieces(at[::-1] + frame, at + back, sizes, PASSED))
        sent = host.memory[PAGE : 2 * PAGE]
        got = host.memory[3 * PAGE :]
        for offset in at.tolist():
            assert (got[offset : offset + piece] == sent[offset : offset + piece]).all()
            assert not got[offset + piece : offset + (48 << 10)].any()


def test_a_host_page_is_read_in_place_by_kernels_and_then_promoted() -> None:
    with opened() as (device, engine):
        host = device.host_pages(4)
        start = device.reserve(4 * PAGE)
        at = pages(device, start, 1, 2)
        for slot in range(4):
            ctypes.memset(int(host.addresses(slots(slot))[0]), 40 + slot, PAGE)
        finish(device.window.show_in_place(at, slots(3, 1), host.arena))
        pinned = engine.host(2)
        down, _ = device.routes(pinned)
        offsets = np.arange(128, dtype=np.uint64) * np.uint64(PAGE // 128)
        sizes = np.full(128, PAGE // 128, np.uint64)
        there = pinned.addresses(slots(0))[0]
        finish(down.submit_pieces(offsets + at[0], offsets + there, sizes, PASSED))
        assert (pinned.memory[:PAGE] == 43).all()
        finish(device.window.hide(at))
        _, lift = device.routes(host)
        finish(lift.submit(slots(3, 1), slots(0, 5), PASSED))
        finish(device.window.show(at, slots(0, 5)))
        ctypes.memset(int(host.addresses(slots(3))[0]), 1, PAGE)
        assert engine.read(None, int(at[0]), PAGE)() == bytes([43]) * PAGE
        assert engine.read(None, int(at[1]), PAGE)() == bytes([41]) * PAGE
        finish(device.window.hide(at))


def test_running_grids_do_not_count_on_seeing_what_comes_through_the_alias() -> None:
    """Invariant 9, both orders: a grid queued behind the load's event sees the page's new bytes;
    one that was launched before the load began has the old ones whatever it reads later."""
    with opened() as (device, engine):
        host = engine.host(1)
        host.memory[:] = 7
        _, up = device.routes(host)
        start = device.reserve(PAGE)
        engine.fill(None, int(device.frames.addresses(slots(2))[0]), 3, PAGE)
        finish(device.window.show(pages(device, start, 0), slots(2)))
        early, late = engine.stream(), engine.stream()
        before = engine.see(early, start, PAGE)
        load = up.submit(slots(0), slots(2), fence(device, early))
        load.order(late)
        release = engine.hold(late)
        after = engine.see(late, start, PAGE)
        finish(load)
        release()
        assert before() == bytes([3]) * PAGE, "the load overtook the grid that its fence names"
        assert after() == bytes([7]) * PAGE, "a grid behind the load's event saw old bytes"
        host.memory[:] = 9
        release = engine.hold(late)
        held = engine.see(late, start, PAGE)
        again = up.submit(slots(0), slots(2), fence(device, late))
        assert not again.wait(0.05), "the load did not wait for the grid that its fence names"
        release()
        assert held() == bytes([7]) * PAGE
        finish(again)
        again.order(late)
        assert engine.see(late, start, PAGE)() == bytes([9]) * PAGE
        finish(device.window.hide(pages(device, start, 0)))


def test_frames_can_be_exported_to_another_process() -> None:
    with opened() as (device, _):
        if not device.frames.arena.backing.exportable:
            pytest.skip("this device exports no POSIX file descriptors")
        fd = device.frames.arena.export(3)
        os.fstat(fd)
        os.close(fd)


def test_more_frames_than_the_gpu_has_are_refused_with_numbers() -> None:
    with opened() as (device, _):
        free, _ = device.context.free_bytes()
        rest = CudaDevice(0, 1 << 30, 1, free // (1 << 30) + 8, calibration=MEASURED)
        try:
            before = device.context.free_bytes()[0]
            most = rest.frames.arena.slots
            with pytest.raises(TierFull, match=r"need \d+ pages of 1.*the device gave"):
                rest.back(np.arange(most, dtype=np.int32))
            assert device.context.free_bytes()[0] == before
        finally:
            rest.close()


def test_torch_works_beside_the_device_in_one_process() -> None:
    torch = pytest.importorskip("torch")
    with opened() as (device, engine):
        host = engine.host(4)
        down, _ = device.routes(host)
        stream = torch.cuda.Stream()
        start = device.reserve(2 * PAGE)
        finish(device.window.show(pages(device, start, 0), slots(4)))
        with torch.cuda.stream(stream):
            product = torch.ones(512, 512, device="cuda") @ torch.ones(512, 512, device="cuda")
            torch.cuda._sleep(50_000_000)
            engine.fill(stream.cuda_stream, start, 6, PAGE)
        done = down.submit(slots(4), slots(2), fence(device, stream.cuda_stream))
        finish(done)
        assert (host.memory[2 * PAGE : 3 * PAGE] == 6).all()
        assert product.sum().item() == 512.0**3
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(stream):
            graph.capture_begin()
            product.add_(1)
            with pytest.raises(DriverError, match="captured into a CUDA graph"):
                device.streams.tick(stream.cuda_stream)
            graph.capture_end()
        finish(device.window.hide(pages(device, start, 0)))


def test_paging_goes_on_while_an_engine_captures_a_graph() -> None:
    torch = pytest.importorskip("torch")
    with opened() as (device, engine):
        host = engine.host(4)
        down, up = device.routes(host)
        ours = engine.stream()
        start = device.reserve(8 * PAGE)
        x = torch.zeros(1024, device="cuda")
        stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            graph.capture_begin()
            x.add_(1)
            finish(device.window.show(pages(device, start, 0), slots(0)))
            finish(device.window.show(pages(device, start, 1, 2, 3), slots(1, 2, 3)))
            release = engine.hold(ours)
            held = down.submit(slots(0, 1), slots(2, 3), fence(device, ours))
            assert not held.wait(0.05)
            release()
            finish(held)
            finish(up.submit(slots(2), slots(5), PASSED))
            finish(device.zero(slots(4)))
            finish(device.window.hide(pages(device, start, 0, 1, 2, 3)))
            device.back(slots(9))
            device.park(slots(9))
            x.add_(1)
            graph.capture_end()
        graph.replay()
        torch.cuda.synchronize()
        assert x[0].item() == 2.0


def test_the_default_stream_takes_ticks() -> None:
    with opened() as (device, engine):
        engine.fill(None, int(device.frames.addresses(slots(0))[0]), 1, PAGE)
        tick = device.streams.tick(None)
        assert device.streams.tick(0) == (tick[0], tick[1] + 1)
        assert device.streams.wait(Fence((tick,)), LONG_S)


def test_a_kernel_that_reads_a_hidden_page_loses_the_device_and_every_done_ends() -> None:
    code = """
import numpy as np
from tests.gpu.test_cuda_device import MEASURED, PAGE, Pinned, fence, slots
from tiermem.gpu.vmm import CudaDevice
from tiermem.gpu.copy import open_stream
from tiermem.gpu.driver import DeviceLost
from tiermem.errors import TierFailed
from tiermem.tier import PASSED
device = CudaDevice(0, PAGE, 4, calibration=MEASURED)
host = Pinned(device, 4)
down, up = device.routes(host)
start = device.reserve(4 * PAGE)
at = np.arange(128, dtype=np.uint64) * np.uint64(16384)
hidden, there = np.uint64(start), host.addresses(slots(0))[0]
done = down.submit_pieces(at + hidden, at + there, np.full(128, 16384, np.uint64), PASSED)
assert done.wait(30), "the copy did not end"
assert isinstance(done.error, DeviceLost), done.error
try:
    down.submit(slots(0), slots(0), PASSED)
    raise SystemExit("a route took work after the device was lost")
except TierFailed as error:
    print(error)
device.close()
"""
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=root
    )
    assert done.returncode == 0, done.stderr
    assert "restart the process" in done.stdout
