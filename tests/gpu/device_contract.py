"""What every `Device` must do: the CPU device, CUDA, and the stand-in CUDA driver of these tests.

A subclass says how to open the device and how an engine's streams are driven on it; the tests
use nothing but the protocol and those hooks.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Protocol

import numpy as np
import pytest

from tiermem.errors import Closed, DriverError, TierMemError
from tiermem.nvme.digest import digest as digest_of
from tiermem.nvme.files import memory_at
from tiermem.slices import Arriving
from tiermem.tier import (
    PASSED,
    Addresses,
    Device,
    Done,
    Fence,
    Memory,
    Orderable,
    Slots,
)

LONG_S = 30.0


class Engine(Protocol):
    """How a test plays the engine on one device: streams, and work queued on them.

    `None` as a stream is the calling thread (CPU) or the default stream (CUDA).
    """

    def host(self, slots: int) -> Memory:
        """A host tier that the device's routes can copy to and from."""

    def stream(self) -> int:
        """A stream of the engine's own, as its `Streams.tick` takes it."""

    def hold(self, stream: int) -> Callable[[], None]:
        """Queue work that ends when the returned function is called, not before."""

    def fill(self, stream: int | None, address: int, value: int, nbytes: int) -> None:
        """Queue: set nbytes at a shown address, or at an alias, to the byte `value`."""

    def read(self, stream: int | None, address: int, nbytes: int) -> Callable[[], bytes]:
        """Queue: read nbytes at an address; the returned function waits and gives the bytes."""

    def see(self, stream: int | None, address: int, nbytes: int) -> Callable[[], bytes]:
        """As `read`, but by a kernel, as it must be where a page is shown in place."""

    def close(self) -> None:
        """Free streams and host memory; the device is closed by the test."""


Parts = tuple[Device, Engine]


def slots(*numbers: int) -> Slots:
    return np.array(numbers, np.int32)


def pages(device: Device, start: int, *numbers: int) -> Addresses:
    return np.array([start + n * device.page_bytes for n in numbers], np.uint64)


def finish(done: Done) -> Done:
    """Wait; fail the test on a hang or an error."""
    assert done.wait(LONG_S), "did not end"
    assert done.ready()
    assert done.error is None, done.error
    return done


def refusal(call: Callable[[], Done]) -> TierMemError:
    """The error with which a call was refused, raised at once or carried by its Done."""
    try:
        done = call()
    except TierMemError as error:
        return error
    assert done.wait(LONG_S), "did not end"
    assert isinstance(done.error, TierMemError), "was not refused"
    return done.error


def fence(device: Device, *streams: int) -> Fence:
    ticks = [device.streams.tick(stream) for stream in streams]
    return Fence(tuple(tick for tick in ticks if tick is not None))


class DeviceContract:
    """Inherit, and implement `open`."""

    @contextlib.contextmanager
    def open(self, frames: int, max_frames: int) -> Iterator[Parts]:
        raise NotImplementedError
        yield

    @pytest.fixture
    def parts(self) -> Iterator[Parts]:
        with self.open(8, 12) as (device, engine):
            try:
                yield device, engine
            finally:
                device.close()
                engine.close()

    def byte_at(self, engine: Engine, address: int) -> int:
        return engine.read(None, int(address), 64)()[0]

    # -- frames ---------------------------------------------------------------------------

    def test_the_checksum_of_a_frame_is_that_of_its_bytes(self, parts: Parts) -> None:
        """Bit-equal to what processors compute, also after every one of some single-bit flips."""
        device, engine = parts
        host = engine.host(4)
        down, up = device.routes(host)
        digest = device.digest()
        where = int(host.addresses(slots(2))[0])
        page = np.frombuffer(memory_at(where, device.page_bytes), np.uint8)
        rng = np.random.default_rng(11)
        page[:] = rng.integers(0, 256, len(page), np.uint8)
        finish(up.submit(slots(2), slots(5), PASSED))
        seen = []
        for bit in [*rng.integers(0, 8 * len(page), 6).tolist(), 0, 8 * len(page) - 1]:
            finish(up.submit(slots(2), slots(3), PASSED))
            seen.append(int(digest(device.frames.addresses(slots(3)))[0]))
            assert seen[-1] == digest_of(page.data)
            page[bit // 8] ^= 1 << bit % 8
        assert len(set(seen)) == len(seen)
        several = digest(device.frames.addresses(slots(5, 3, 5)))
        assert several.tolist() == [seen[0], seen[-1], seen[0]]
        assert len(digest(device.frames.addresses(slots()))) == 0
        digest.close()
        for route in (down, up):
            route.close()

    def test_frames_are_backed_and_their_aliases_do_not_overlap(self, parts: Parts) -> None:
        device, _ = parts
        assert device.frames.slot_bytes == device.page_bytes
        assert device.frames.capacity == 8
        assert device.frames.ready <= 8
        aliases = np.sort(device.frames.addresses(slots(*range(8))))
        assert (np.diff(aliases) >= device.page_bytes).all()

    def test_a_frame_keeps_its_bytes_under_its_alias_whatever_is_shown(self, parts: Parts) -> None:
        device, engine = parts
        start = device.reserve(4 * device.page_bytes)
        alias = int(device.frames.addresses(slots(3))[0])
        engine.fill(None, alias, 7, device.page_bytes)
        finish(device.window.show(pages(device, start, 1), slots(3)))
        assert self.byte_at(engine, start + device.page_bytes) == 7
        engine.fill(None, start + device.page_bytes, 9, device.page_bytes)
        assert self.byte_at(engine, alias) == 9
        finish(device.window.hide(pages(device, start, 1)))
        assert self.byte_at(engine, alias) == 9
        finish(device.window.show(pages(device, start, 2), slots(3)))
        last = start + 3 * device.page_bytes - 64
        assert engine.read(None, last, 64)() == bytes([9]) * 64
        finish(device.window.hide(pages(device, start, 2)))

    def test_host_pages_are_read_in_place_and_later_replaced_by_frames(self, parts: Parts) -> None:
        device, engine = parts
        host = device.host_pages(4)
        _, up = device.routes(host)
        start = device.reserve(4 * device.page_bytes)
        for slot in range(4):
            engine.fill(None, int(host.addresses(slots(slot))[0]), 40 + slot, device.page_bytes)
        at = pages(device, start, 0, 1, 3)
        finish(device.window.show(at[:1], slots(5)))
        refusal(lambda: host.show(at, slots(0, 1, 2)))
        finish(host.show(at[1:], slots(2, 1)))
        assert engine.see(None, int(at[1]), 64)()[0] == 42
        assert engine.see(None, int(at[2]), 64)()[0] == 41
        engine.fill(None, int(host.addresses(slots(1))[0]), 9, device.page_bytes)
        assert engine.see(None, int(at[2]), 64)()[0] == 9, "another copy is shown"
        refusal(lambda: device.window.show(at[1:], slots(6, 7)))
        refusal(lambda: host.show(pages(device, start, 2), slots(4)))
        finish(device.window.hide(at))
        finish(up.submit(slots(2, 1), slots(6, 7), PASSED))
        finish(device.window.show(at[1:], slots(6, 7)))
        engine.fill(None, int(host.addresses(slots(1))[0]), 1, device.page_bytes)
        assert [self.byte_at(engine, a) for a in at[1:]] == [42, 9]
        finish(device.window.hide(at[1:]))
        device.release(start, 4 * device.page_bytes)

    def test_zero_clears_whole_frames_and_no_others(self, parts: Parts) -> None:
        device, engine = parts
        aliases = device.frames.addresses(slots(0, 1, 2)).tolist()
        for alias in aliases:
            engine.fill(None, alias, 5, device.page_bytes)
        finish(device.zero(slots(0, 2)))
        read = [engine.read(None, alias, device.page_bytes)() for alias in aliases]
        assert not any(read[0])
        assert not any(read[2])
        assert read[1] == bytes([5]) * device.page_bytes

    def test_parked_frames_are_refused_until_they_are_backed(self, parts: Parts) -> None:
        device, engine = parts
        start = device.reserve(2 * device.page_bytes)
        device.park(slots(6, 7))
        refusal(lambda: device.window.show(pages(device, start, 0), slots(7)))
        device.back(slots(7))
        finish(device.window.show(pages(device, start, 0), slots(7)))
        engine.fill(None, start, 4, device.page_bytes)
        assert self.byte_at(engine, start) == 4
        finish(device.window.hide(pages(device, start, 0)))
        device.back(slots(6))

    def test_frames_can_be_added_up_to_the_most_that_was_said(self, parts: Parts) -> None:
        device, engine = parts
        device.back(slots(8, 9, 10, 11))
        alias = int(device.frames.addresses(slots(11))[0])
        engine.fill(None, alias, 3, device.page_bytes)
        assert self.byte_at(engine, alias) == 3
        with pytest.raises((TierMemError, ValueError)):
            device.back(slots(12))

    # -- window ---------------------------------------------------------------------------

    def test_a_group_is_shown_and_hidden_in_any_order(self, parts: Parts) -> None:
        device, engine = parts
        start = device.reserve(8 * device.page_bytes)
        frames = slots(5, 2, 7, 0, 1)
        at = pages(device, start, 6, 0, 3, 1, 7)
        for frame, alias in zip(frames, device.frames.addresses(frames), strict=True):
            engine.fill(None, int(alias), 10 + int(frame), device.page_bytes)
        finish(device.window.show(at, frames))
        assert [self.byte_at(engine, a) for a in at] == [15, 12, 17, 10, 11]
        finish(device.window.hide(at[::-1].copy()))
        finish(device.window.show(at, frames[::-1].copy()))
        assert [self.byte_at(engine, a) for a in at] == [11, 10, 17, 12, 15]
        finish(device.window.hide(at))

    def test_a_group_of_which_one_address_is_taken_shows_nothing(self, parts: Parts) -> None:
        device, engine = parts
        start = device.reserve(4 * device.page_bytes)
        engine.fill(None, int(device.frames.addresses(slots(0))[0]), 1, device.page_bytes)
        finish(device.window.show(pages(device, start, 2), slots(0)))
        refusal(lambda: device.window.show(pages(device, start, 0, 1, 2), slots(1, 2, 3)))
        assert self.byte_at(engine, start + 2 * device.page_bytes) == 1
        finish(device.window.show(pages(device, start, 0, 1), slots(1, 2)))
        finish(device.window.hide(pages(device, start, 0, 1, 2)))

    def test_a_group_of_which_one_address_shows_nothing_stays_shown(self, parts: Parts) -> None:
        device, engine = parts
        start = device.reserve(4 * device.page_bytes)
        engine.fill(None, int(device.frames.addresses(slots(0))[0]), 6, device.page_bytes)
        finish(device.window.show(pages(device, start, 0, 1), slots(0, 1)))
        refusal(lambda: device.window.hide(pages(device, start, 0, 1, 3)))
        assert self.byte_at(engine, start) == 6
        refusal(lambda: device.window.show(pages(device, start, 1), slots(2)))
        finish(device.window.hide(pages(device, start, 0, 1)))

    def test_what_the_device_cannot_map_is_refused(self, parts: Parts) -> None:
        device, _ = parts
        start = device.reserve(2 * device.page_bytes)
        odd = pages(device, start, 0) + np.uint64(4096)
        if device.page_bytes > 4096:
            refusal(lambda: device.window.show(odd, slots(0)))
        refusal(lambda: device.window.show(pages(device, start, 0), slots(99)))
        finish(device.window.show(pages(device, start, 0), slots(0)))
        finish(device.window.hide(pages(device, start, 0)))

    def test_reservations_do_not_overlap_and_can_be_given_back(self, parts: Parts) -> None:
        device, _ = parts
        size = 4 * device.page_bytes
        first, second = device.reserve(size), device.reserve(size)
        assert abs(first - second) >= size
        assert first % device.page_bytes == second % device.page_bytes == 0
        device.release(first, size)
        device.release(second, size)
        with pytest.raises((ValueError, DriverError)):
            device.reserve(device.page_bytes + 1)

    # -- routes ---------------------------------------------------------------------------

    def test_pages_go_down_and_come_back_equal(self, parts: Parts) -> None:
        device, engine = parts
        host = engine.host(8)
        down, up = device.routes(host)
        frames, there, back = slots(0, 1, 2), slots(5, 0, 3), slots(4, 6, 3)
        for n, alias in enumerate(device.frames.addresses(frames).tolist()):
            engine.fill(None, alias, 20 + n, device.page_bytes)
        now = fence(device, engine.stream())
        assert device.streams.wait(now, LONG_S)
        finish(down.submit(frames, there, PASSED))
        finish(device.zero(frames))
        finish(up.submit(there, back, PASSED))
        for n, alias in enumerate(device.frames.addresses(back).tolist()):
            assert engine.read(None, alias, device.page_bytes)() == (
                bytes([20 + n]) * device.page_bytes
            )

    def test_a_copy_down_waits_for_its_fence(self, parts: Parts) -> None:
        device, engine = parts
        host = engine.host(4)
        down, up = device.routes(host)
        stream = engine.stream()
        alias = int(device.frames.addresses(slots(0))[0])
        engine.fill(None, alias, 1, device.page_bytes)
        release = engine.hold(stream)
        try:
            engine.fill(stream, alias, 2, device.page_bytes)
            done = down.submit(slots(0), slots(1), fence(device, stream))
            assert not done.wait(0.05)
        finally:
            release()
        finish(done)
        finish(up.submit(slots(1), slots(5), PASSED))
        assert self.byte_at(engine, int(device.frames.addresses(slots(5))[0])) == 2

    def test_a_copy_with_a_passed_fence_overtakes_a_held_one(self, parts: Parts) -> None:
        device, engine = parts
        host = engine.host(4)
        down, up = device.routes(host)
        stream = engine.stream()
        release = engine.hold(stream)
        try:
            held = down.submit(slots(0), slots(1), fence(device, stream))
            finish(up.submit(slots(2), slots(5), PASSED))
            assert not held.ready()
        finally:
            release()
        finish(held)

    def test_a_stream_can_wait_for_a_load_without_the_host(self, parts: Parts) -> None:
        device, engine = parts
        host = engine.host(4)
        down, up = device.routes(host)
        busy, reader = engine.stream(), engine.stream()
        frame, spare = (int(a) for a in device.frames.addresses(slots(0, 1)))
        engine.fill(None, spare, 8, device.page_bytes)
        finish(down.submit(slots(1), slots(2), PASSED))
        engine.fill(None, frame, 1, device.page_bytes)
        release = engine.hold(busy)
        try:
            load = up.submit(slots(2), slots(0), fence(device, busy))
            if not isinstance(load, Orderable):
                pytest.skip("loads of this device cannot be ordered")
            load.order(reader)
            seen = engine.read(reader, frame, device.page_bytes)
            assert not load.ready()
        finally:
            release()
        assert seen() == bytes([8]) * device.page_bytes
        finish(load)

    def test_a_stream_reads_pages_from_front_to_back_while_they_come(
        self, parts: Parts, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Behind each slice of a load a stream finds that part of every page."""
        device, engine = parts
        quarter = device.page_bytes // 4
        for module in ("copy", "emulated_streams"):
            monkeypatch.setattr(f"tiermem.gpu.{module}._SLICE", quarter)
            monkeypatch.setattr(f"tiermem.gpu.{module}._SLICED", 2 * device.page_bytes)
        down, up = device.routes(engine.host(4))
        busy, reader = engine.stream(), engine.stream()
        frames = [int(a) for a in device.frames.addresses(slots(0, 1))]
        parts_of = [(page, part) for part in range(4) for page in range(2)]
        for page, part in parts_of:
            engine.fill(None, frames[page] + part * quarter, 1 + 2 * part + page, quarter)
        finish(down.submit(slots(0, 1), slots(3, 0), PASSED))
        for frame in frames:
            engine.fill(None, frame, 99, device.page_bytes)
        few = finish(up.submit_slices(slots(3), slots(0), PASSED))  # type: ignore[attr-defined]
        assert not hasattr(few, "slices"), "a small group goes as one"
        arriving = Arriving()
        release = engine.hold(busy)
        try:
            load = up.submit_slices(  # type: ignore[attr-defined]
                slots(3, 0), slots(0, 1), fence(device, busy)
            )
            arriving.add(load)
            assert len(arriving) == 4
            seen = []
            for page, part in parts_of:
                arriving.order(reader, (part + 1) * quarter)
                assert len(arriving) == 3 - part
                seen.append(engine.read(reader, frames[page] + part * quarter, quarter))
            assert not load.ready()
        finally:
            release()
        for (page, part), read in zip(parts_of, seen, strict=True):
            assert read() == bytes([1 + 2 * part + page]) * quarter
        finish(load)

    def test_a_stream_can_wait_until_pages_are_shown_without_the_host(self, parts: Parts) -> None:
        """Kernels that are queued before their page is shown find it, on any stream."""
        device, engine = parts
        start = device.reserve(32 * device.page_bytes)
        frames = slots(*range(8))
        for frame, alias in zip(frames, device.frames.addresses(frames), strict=True):
            engine.fill(None, int(alias), 1 + int(frame), device.page_bytes)
        finish(device.window.show(pages(device, start, *range(8)), frames))
        for turn in range(1, 4):  # hidden and shown elsewhere, in one go
            old = pages(device, start, *range(8 * turn - 8, 8 * turn))
            new = pages(device, start, *range(8 * turn, 8 * turn + 8))
            hidden, shown = device.window.hide(old), device.window.show(new, frames)
            streams = (engine.stream(), engine.stream())
            for stream in streams:
                shown.order(stream)  # type: ignore[attr-defined]
            seen = [engine.see(s, int(at), 64) for s in streams for at in (new[0], new[7])]
            assert [read() for read in seen] == [bytes([value]) * 64 for value in (1, 8, 1, 8)]
            finish(hidden)
            finish(shown)
        finish(device.window.hide(new))
        device.release(start, 32 * device.page_bytes)

    def test_a_closed_route_ends_what_it_took_and_takes_no_more(self, parts: Parts) -> None:
        device, engine = parts
        host = engine.host(4)
        down, _ = device.routes(host)
        done = down.submit(slots(0, 1), slots(0, 1), PASSED)
        down.close()
        assert done.wait(LONG_S)
        with pytest.raises(Closed):
            down.submit(slots(0), slots(0), PASSED)
        down.close()

    # -- streams --------------------------------------------------------------------------

    def test_a_tick_passes_when_the_work_before_it_has_ended(self, parts: Parts) -> None:
        device, engine = parts
        stream, other = engine.stream(), engine.stream()
        release = engine.hold(stream)
        try:
            held, free = fence(device, stream), fence(device, other)
            assert device.streams.wait(free, LONG_S)
            assert not device.streams.wait(held, 0.02)
            (index, tick), (elsewhere, _) = held.ticks[0], free.ticks[0]
            assert index != elsewhere
            assert device.streams.passed()[index] < tick
        finally:
            release()
        assert device.streams.wait(held, LONG_S)
        assert device.streams.passed()[index] >= tick

    def test_ticks_of_one_stream_grow_and_share_its_index(self, parts: Parts) -> None:
        device, engine = parts
        stream = engine.stream()
        seen = [tick for tick in (device.streams.tick(stream) for _ in range(200)) if tick]
        assert len(seen) == 200
        (index,) = {tick[0] for tick in seen}
        numbers = [tick[1] for tick in seen]
        assert numbers == sorted(set(numbers))
        assert device.streams.wait(Fence((seen[-1],)), LONG_S)
        assert device.streams.passed()[index] == numbers[-1]

    # -- the end --------------------------------------------------------------------------

    def test_closing_twice_is_fine_and_a_closed_device_refuses(self, parts: Parts) -> None:
        device, engine = parts
        down, _ = device.routes(engine.host(2))
        device.close()
        device.close()
        with pytest.raises(Closed):
            device.reserve(device.page_bytes)
        with pytest.raises(Closed):
            down.submit(slots(0), slots(0), PASSED)
