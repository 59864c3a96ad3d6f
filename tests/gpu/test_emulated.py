"""The CPU device: the contract of all devices, and what is its own."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from tests.gpu.device_contract import (
    LONG_S,
    DeviceContract,
    Engine,
    fence,
    finish,
    pages,
    refusal,
    slots,
)
from tiermem.errors import Closed, DriverError, NotOurs, PageInUse
from tiermem.gpu import mappings
from tiermem.gpu.emulated import EmulatedDevice
from tiermem.tier import PASSED, Addresses, Device, Orderable, Place, Slots

KIB = 1024


class PlainHost:
    """A host tier over one anonymous mapping."""

    place = Place.HOST
    growing = False

    def __init__(self, slot_bytes: int, capacity: int) -> None:
        self.slot_bytes = slot_bytes
        self.capacity = self.ready = capacity
        self.memory = mmap.mmap(-1, slot_bytes * capacity)
        self.start = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))

    def addresses(self, slots: Slots) -> Addresses:
        return slots.astype(np.uint64) * np.uint64(self.slot_bytes) + np.uint64(self.start)

    def resize(self, capacity: int) -> None:
        raise NotImplementedError

    def close(self) -> None:
        """Collected with the object: copies may still be queued."""


class CpuEngine:
    """Callables as kernels, through `launch` alone."""

    def __init__(self, device: EmulatedDevice) -> None:
        self.device = device

    def host(self, slots: int) -> PlainHost:
        return PlainHost(self.device.page_bytes, slots)

    def stream(self) -> int:
        return self.device.new_stream()

    def hold(self, stream: int) -> Callable[[], None]:
        latch = threading.Event()
        self.device.launch(stream, lambda: _pass(latch))
        return latch.set

    def fill(self, stream: int | None, address: int, value: int, nbytes: int) -> None:
        if stream is None:
            ctypes.memset(int(address), value, nbytes)
        else:
            self.device.launch(stream, lambda: _ignore(ctypes.memset(int(address), value, nbytes)))

    def read(self, stream: int | None, address: int, nbytes: int) -> Callable[[], bytes]:
        if stream is None:
            return lambda: ctypes.string_at(int(address), nbytes)
        seen: list[bytes] = []
        done = self.device.launch(
            stream, lambda: seen.append(ctypes.string_at(int(address), nbytes))
        )

        def result() -> bytes:
            finish(done)
            return seen[0]

        return result

    def see(self, stream: int | None, address: int, nbytes: int) -> Callable[[], bytes]:
        return self.read(stream, address, nbytes)

    def close(self) -> None:
        """Streams end with the device."""


def _pass(latch: threading.Event) -> None:
    assert latch.wait(LONG_S)


def _ignore(value: object) -> None:
    """Kernels return nothing."""


class TestContract(DeviceContract):
    page_bytes = 64 * KIB
    guard = False

    @contextlib.contextmanager
    def open(self, frames: int, max_frames: int) -> Iterator[tuple[Device, Engine]]:
        device = EmulatedDevice(self.page_bytes, frames, max_frames, guard=self.guard)
        with device:
            yield device, CpuEngine(device)


class TestContractWithSmallPages(TestContract):
    page_bytes = 4 * KIB


class TestContractWithHugePages(TestContract):
    page_bytes = 2048 * KIB


class TestContractWithGuard(TestContract):
    guard = True


@pytest.fixture
def device() -> Iterator[EmulatedDevice]:
    with EmulatedDevice(64 * KIB, 16, 24) as device:
        yield device


@pytest.fixture
def start(device: EmulatedDevice) -> int:
    return device.reserve(64 * device.page_bytes)


# -- what CUDA refuses --------------------------------------------------------------------------


def test_addresses_outside_every_reservation_are_refused(
    device: EmulatedDevice, start: int
) -> None:
    end = start + 64 * device.page_bytes
    for address in (0, end, end + device.page_bytes, 2**63):
        error = refusal(partial(device.window.show, np.array([address], np.uint64), slots(0)))
        assert isinstance(error, NotOurs | DriverError)
    across = np.array([end - device.page_bytes, end], np.uint64)
    assert "outside" in str(refusal(lambda: device.window.show(across, slots(0, 1))))
    before = np.array([start, start - device.page_bytes], np.uint64)
    assert "outside" in str(refusal(lambda: device.window.show(before, slots(0, 1))))


def test_an_address_twice_in_a_group_is_refused(device: EmulatedDevice, start: int) -> None:
    at = pages(device, start, 3, 1, 3)
    assert "twice" in str(refusal(lambda: device.window.show(at, slots(0, 1, 2))))
    finish(device.window.show(pages(device, start, 1, 3), slots(0, 1)))
    assert "twice" in str(refusal(lambda: device.window.hide(at)))


def test_groups_of_unequal_or_no_length_are_refused(device: EmulatedDevice, start: int) -> None:
    assert refusal(lambda: device.window.show(pages(device, start, 1, 2), slots(0)))
    assert refusal(lambda: device.window.hide(np.empty(0, np.uint64)))


def test_pages_of_unfinished_work_cannot_be_hidden(device: EmulatedDevice, start: int) -> None:
    stream, latch = device.new_stream(), threading.Event()
    at = pages(device, start, 0, 1, 2)
    finish(device.window.show(at, slots(0, 1, 2)))
    work = device.launch(stream, lambda: _pass(latch), at[:2])
    try:
        assert "launched" in str(refusal(lambda: device.window.hide(at)))
        finish(device.window.hide(at[2:]))
    finally:
        latch.set()
    finish(work)
    finish(device.window.hide(at[:2]))


def test_work_on_a_page_that_is_not_shown_is_refused(device: EmulatedDevice, start: int) -> None:
    stream = device.new_stream()
    ran: list[int] = []
    with pytest.raises(DriverError, match="show nothing"):
        device.launch(stream, lambda: ran.append(1), pages(device, start, 5))
    assert device.streams.wait(fence(device, stream), LONG_S)
    assert ran == []


def test_a_reservation_that_shows_something_cannot_be_released(
    device: EmulatedDevice, start: int
) -> None:
    size = 64 * device.page_bytes
    finish(device.window.show(pages(device, start, 9), slots(0)))
    with pytest.raises(PageInUse, match="1 pages"):
        device.release(start, size)
    with pytest.raises(NotOurs):
        device.release(start, size - device.page_bytes)
    finish(device.window.hide(pages(device, start, 9)))
    device.release(start, size)
    with pytest.raises(NotOurs):
        device.release(start, size)


def test_shown_and_used_frames_cannot_be_parked(device: EmulatedDevice, start: int) -> None:
    finish(device.window.show(pages(device, start, 0), slots(3)))
    with pytest.raises(DriverError, match="frame 3 is shown"):
        device.park(slots(2, 3))
    host = PlainHost(device.page_bytes, 4)
    down, _ = device.routes(host)
    stream, latch = device.new_stream(), threading.Event()
    device.launch(stream, lambda: _pass(latch))
    try:
        copied = down.submit(slots(5), slots(0), fence(device, stream))
        with pytest.raises(DriverError, match="frame 5 is used"):
            device.park(slots(5))
    finally:
        latch.set()
    finish(copied)
    device.park(slots(5))
    finish(device.window.show(pages(device, start, 1), slots(3)))
    finish(device.window.hide(pages(device, start, 0)))
    with pytest.raises(DriverError, match="frame 3 is shown"):
        device.park(slots(3))
    finish(device.window.hide(pages(device, start, 1)))
    device.park(slots(3))
    for call in (
        lambda: device.park(slots(5)),
        lambda: down.submit(slots(5), slots(0), PASSED),
        lambda: device.zero(slots(5)),
    ):
        with pytest.raises(DriverError, match="frame 5 is parked"):
            call()


def test_a_parked_frame_comes_back_zeroed(device: EmulatedDevice) -> None:
    alias = int(device.frames.addresses(slots(2))[0])
    ctypes.memset(alias, 7, device.page_bytes)
    device.park(slots(2))
    device.back(slots(2))
    assert not any(ctypes.string_at(alias, device.page_bytes))
    with pytest.raises(DriverError, match="not parked"):
        device.back(slots(2))


def test_parking_gives_memory_back_to_the_system(device: EmulatedDevice) -> None:
    for alias in device.frames.addresses(np.arange(16, dtype=np.int32)).tolist():
        ctypes.memset(alias, 1, device.page_bytes)
    before = _memory_of_frames()
    device.park(slots(4, 5, 6, 7, 12, 13, 14, 15))
    assert before - _memory_of_frames() == 8 * device.page_bytes


def _memory_of_frames() -> int:
    """Bytes that the system holds for the memory files of all CPU devices of this process."""
    files = [f for f in Path("/proc/self/fd").iterdir() if "memfd:tiermem-frames" in _target(f)]
    return sum(file.stat().st_blocks * 512 for file in files)


def _target(link: Path) -> str:
    try:
        return os.readlink(link)
    except OSError:
        return ""


def test_resizing_backs_and_parks_frames(device: EmulatedDevice, start: int) -> None:
    device.frames.resize(20)
    assert (device.frames.capacity, device.frames.ready) == (20, 20)
    finish(device.window.show(pages(device, start, 0), slots(19)))
    finish(device.window.hide(pages(device, start, 0)))
    device.frames.resize(8)
    assert "parked" in str(refusal(lambda: device.window.show(pages(device, start, 0), slots(8))))
    with pytest.raises(DriverError, match="1 to 24"):
        device.frames.resize(25)


def test_impossible_devices_are_refused_with_numbers() -> None:
    with pytest.raises(DriverError, match="5000 bytes"):
        EmulatedDevice(5000, 4)
    with pytest.raises(DriverError, match="8 frames of at most 4"):
        EmulatedDevice(4096, 8, 4)


def test_routes_to_slots_of_another_size_are_refused(device: EmulatedDevice) -> None:
    with pytest.raises(DriverError, match="4096"):
        device.routes(PlainHost(4096, 2))


def test_a_window_refuses_more_pages_than_the_process_may_map() -> None:
    limit = _map_limit()
    n = limit * 7 // 16
    with EmulatedDevice(4096, n + 1) as device:
        start = device.reserve(2 * (n + 1) * 4096)
        # Every second page: no two mappings can become one.
        at = start + np.arange(0, 2 * (n + 1), 2, dtype=np.uint64) * np.uint64(4096)
        frames = np.arange(n + 1, dtype=np.int32)
        finish(device.window.show(at[: n - 2], frames[: n - 2]))
        error = refusal(lambda: device.window.show(at[n - 2 :], frames[n - 2 :]))
        assert f"vm.max_map_count is {limit}" in str(error)
        assert "sysctl" in str(error)
        # Frames that follow one another at addresses that do are one mapping: room again.
        finish(device.window.hide(at[: n - 2]))
        dense = start + np.arange(n, dtype=np.uint64) * np.uint64(4096)
        for part in (slice(0, n // 2), slice(n // 2, n)):
            finish(device.window.show(dense[part], frames[part]))
        finish(device.window.hide(dense))


@pytest.mark.parametrize("left", [60, 61])
def test_a_group_that_fails_in_the_middle_is_undone_and_its_error_names_the_limit(
    left: int,
) -> None:
    """Somebody else's mappings take all but a few; in a child, where nothing else needs any.

    A page takes two mappings: by one more or less, the limit is met or passed.
    """
    _map_limit()
    done = _child(f"""
        import ctypes, mmap, os, resource
        import numpy as np
        from pathlib import Path
        from tiermem.gpu import mappings
        from tiermem.gpu.emulated import EmulatedDevice
        from tiermem.native import Kind, Program, function, group
        device = EmulatedDevice(4096, 64)
        start = device.reserve(129 * 4096)
        at = start + np.arange(1, 129, 2, dtype=np.uint64) * np.uint64(4096)
        frames = np.arange(64, dtype=np.int32)
        for frame, alias in enumerate(device.frames.addresses(frames).tolist()):
            ctypes.memset(alias, frame, 4096)
        device.window.show(at[:8], frames[:8]).wait()
        maps = Path("/proc/self/maps")
        free = mappings.limit() - maps.read_bytes().count(b"\\n") - {left}
        other = mappings.reserve(free * 4096, 4096)
        odd = other + np.arange(1, free - 1, 2, dtype=np.uint64) * np.uint64(4096)
        readable = group(function("mprotect"), Kind.INT, odd, 4096, mmap.PROT_READ)
        assert Program(readable).run() is None
        failed = device.window.show(at[8:], frames[8:])
        failed.wait()
        print(failed.error)
        print(failed.failed.all())
        hidden = device.window.hide(at[:4])
        hidden.wait()
        print(hidden.error)
        mappings.unmap(other, free * 4096)
        # None of the group is shown, so all of it can be; the pages before it still are.
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        for address in at[[0, 8, 20, 63]].tolist():
            pid = os.fork()
            if pid == 0:
                ctypes.string_at(address, 1)
                os._exit(0)
            print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
        device.window.show(at[:4], frames[:4]).wait()
        again = device.window.show(at[8:], frames[8:])
        again.wait()
        print(again.error)
        print([ctypes.string_at(int(a), 1)[0] for a in at] == list(range(64)))
        device.close()
    """)
    lines = done.stdout.splitlines()
    assert done.returncode == 0, done.stderr
    assert "ENOMEM" in lines[0]
    assert "vm.max_map_count is" in lines[0]
    assert lines[1:] == ["True", "None", *["-11"] * 4, "None", "True"]


def _map_limit() -> int:
    limit = mappings.limit()
    if limit > 100_000:
        pytest.skip(f"{limit} mappings are too many to make in a test")
    return limit


# -- window -------------------------------------------------------------------------------------


def test_an_address_sees_another_frame_after_hide_and_show(
    device: EmulatedDevice, start: int
) -> None:
    at, size = pages(device, start, 4), device.page_bytes
    one, two = device.frames.addresses(slots(1, 2)).tolist()
    ctypes.memset(one, 1, size)
    ctypes.memset(two, 2, size)
    for frame, value in ((1, 1), (2, 2), (1, 1)):
        finish(device.window.show(at, slots(frame)))
        assert ctypes.string_at(int(at[0]), size) == bytes([value]) * size
        finish(device.window.hide(at))


def test_calls_take_effect_in_the_order_in_which_threads_make_them(
    device: EmulatedDevice, start: int
) -> None:
    """Large groups are queued, small ones run in the caller if they may: both in one order."""
    large, small = np.arange(16, dtype=np.int32), slots(0)
    everywhere = pages(device, start, *range(16))
    for frame, alias in enumerate(device.frames.addresses(large).tolist()):
        ctypes.memset(alias, frame, device.page_bytes)

    def turn(first: int) -> None:
        at = everywhere + np.uint64(16 * first * device.page_bytes)
        for _ in range(50):
            device.window.show(at, large)
            device.window.hide(at[3:4])
            device.window.show(at[3:4], small)
            device.window.hide(at)
        device.window.show(at, large)
        device.window.hide(at[3:4])
        last = device.window.show(at[3:4], small)
        finish(last)
        seen = [ctypes.string_at(int(a), 1)[0] for a in at]
        assert seen == [0, 1, 2, 0, *range(4, 16)]

    failures: list[BaseException] = []

    def guarded(first: int) -> None:
        try:
            turn(first)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=guarded, args=(first,)) for first in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LONG_S)
    assert failures == []


def test_a_caller_may_change_its_arrays_once_a_group_is_submitted(
    device: EmulatedDevice, start: int
) -> None:
    everywhere, frames = pages(device, start, *range(16)), np.arange(16, dtype=np.int32)
    for frame, alias in enumerate(device.frames.addresses(frames).tolist()):
        ctypes.memset(alias, frame, device.page_bytes)
    for _ in range(50):  # so that the last group is still queued when its arrays change
        device.window.show(everywhere, frames)
        device.window.hide(everywhere)
    at, which = everywhere[::-1].copy(), frames[::-1].copy()
    done = device.window.show(at, which)
    at[:], which[:] = 0, 99
    finish(done)
    assert [ctypes.string_at(int(a), 1)[0] for a in everywhere] == list(range(16))


@pytest.mark.parametrize("seed", range(4))
def test_random_groups_leave_what_a_plain_model_says(
    device: EmulatedDevice, start: int, seed: int
) -> None:
    """Neighbours and strangers, in one group; one group in three has a flaw and changes nothing."""
    draw, size = np.random.default_rng(seed), device.page_bytes
    numbers = np.arange(16, dtype=np.int32)
    for frame, alias in enumerate(device.frames.addresses(numbers).tolist()):
        ctypes.memset(alias, frame, size)
    model: dict[int, int] = {}
    for _ in range(150):
        first, n = int(draw.integers(48)), int(draw.integers(1, 13))
        group = np.arange(first, first + n)
        if draw.random() < 0.3:
            draw.shuffle(group)
        frames = np.arange(n, dtype=np.int32) + draw.integers(4)
        if draw.random() < 0.3:
            draw.shuffle(frames)
        showing = draw.random() < 0.5
        if draw.random() < 0.67:  # what can be done, else mostly refused
            keep = np.array([(page in model) != showing for page in group.tolist()])
            group, frames = group[keep], frames[keep]
        elif showing and draw.random() < 0.5:
            frames[-1] = 99
        if not len(group):
            continue
        at = pages(device, start, *group.tolist())
        right = all((page in model) != showing for page in group.tolist())
        done = device.window.show(at, frames) if showing else device.window.hide(at)
        assert done.wait(LONG_S)
        assert (done.error is None) == (right and not (showing and 99 in frames))
        if done.error is None and showing:
            model.update(zip(group.tolist(), frames.tolist(), strict=True))
        elif done.error is None:
            for page in group.tolist():
                del model[page]
        ends = [(start + p * size, start + (p + 1) * size - 1, f) for p, f in model.items()]
        for low, high, frame in ends:
            assert ctypes.string_at(low, 1)[0] == ctypes.string_at(high, 1)[0] == frame
    absent = [page for page in range(64) if page not in model]
    at = pages(device, start, *absent)
    finish(device.window.show(at, np.resize(numbers, len(absent))))
    finish(device.window.hide(pages(device, start, *range(64))))


def test_a_page_is_shown_by_the_calling_thread_when_nothing_is_queued(
    device: EmulatedDevice, start: int
) -> None:
    assert device.window.show(pages(device, start, 0), slots(0)).ready()
    assert device.window.hide(pages(device, start, 0)).ready()


@pytest.mark.parametrize(
    ("guard", "access", "dies"),
    [
        (False, "ctypes.string_at(start + page, 1)", True),
        (False, "ctypes.memset(start + page, 1, 1)", True),
        (False, "ctypes.string_at(start, 1)", False),
        (True, "assert ctypes.string_at(start + page, 8) == bytes(8)", False),
        (True, "ctypes.memset(start + page, 1, 1)", True),
    ],
)
@pytest.mark.parametrize("hidden_before", [False, True])
def test_a_stray_access_ends_the_process(
    guard: bool, access: str, dies: bool, hidden_before: bool
) -> None:
    code = f"""
        import ctypes, resource
        import numpy as np
        from tiermem.gpu.emulated import EmulatedDevice
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        page = 65536
        device = EmulatedDevice(page, 4, guard={guard})
        start = device.reserve(4 * page)
        both = np.array([start, start + page], np.uint64)
        first = both if {hidden_before} else both[:1]
        device.window.show(first, np.arange(len(first), dtype=np.int32)).wait()
        ctypes.memset(start, 5, page)
        if {hidden_before}:
            ctypes.memset(start + page, 5, page)
            device.window.hide(both[1:]).wait()
        print("before", flush=True)
        {access}
        print("after", flush=True)
        device.close()
    """
    done = _child(code)
    assert done.stdout.split() == (["before"] if dies else ["before", "after"])
    assert done.returncode == (-11 if dies else 0), done.stderr


def _child(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd=Path(__file__).parents[2],
    )


def test_a_child_after_a_fork_is_told_so() -> None:
    done = _child("""
        import os, numpy as np
        from tiermem.gpu.emulated import EmulatedDevice
        device = EmulatedDevice(65536, 4)
        start = device.reserve(65536)
        if os.fork() == 0:
            try:
                device.window.show(np.array([start], np.uint64), np.array([0], np.int32))
            except Exception as error:
                print(type(error).__name__, error, flush=True)
            os._exit(0)
        os.wait()
        device.close()
    """)
    assert "DriverError" in done.stdout
    assert "fork" in done.stdout
    assert done.returncode == 0, done.stderr


# -- streams and routes -------------------------------------------------------------------------


def test_a_callable_that_raises_fails_its_ticket_and_stops_its_stream(
    device: EmulatedDevice,
) -> None:
    stream, other = device.new_stream(), device.new_stream()
    ran: list[int] = []

    def broken() -> None:
        raise ArithmeticError("on purpose")

    failing = device.launch(stream, broken)
    later = device.launch(stream, lambda: ran.append(1))
    assert later.wait(LONG_S)
    assert isinstance(failing.error, ArithmeticError)
    assert isinstance(later.error, Closed)
    assert ran == []
    finish(device.launch(other, lambda: ran.append(2)))
    assert device.streams.wait(fence(device, stream, other), LONG_S)
    assert ran == [2]


def test_streams_run_in_order_and_side_by_side(device: EmulatedDevice) -> None:
    one, two = device.new_stream(), device.new_stream()
    seen: list[int] = []
    there = threading.Event()
    waits = device.launch(one, lambda: _pass(there))
    for n in range(100):
        device.launch(one, partial(seen.append, n))
    finish(device.launch(two, there.set))
    finish(waits)
    assert device.streams.wait(fence(device, one), LONG_S)
    assert seen == list(range(100))


def test_a_route_reads_its_source_when_the_fence_has_passed_and_not_at_submission(
    device: EmulatedDevice,
) -> None:
    host = PlainHost(device.page_bytes, 4)
    down, _ = device.routes(host)
    stream, latch = device.new_stream(), threading.Event()
    alias = int(device.frames.addresses(slots(1))[0])
    ctypes.memset(alias, 1, device.page_bytes)
    device.launch(stream, lambda: _pass(latch))
    done = down.submit(slots(1), slots(2), fence(device, stream))
    ctypes.memset(alias, 2, device.page_bytes)
    latch.set()
    finish(done)
    there = int(host.addresses(slots(2))[0])
    assert ctypes.string_at(there, device.page_bytes) == bytes([2]) * device.page_bytes


@pytest.mark.parametrize("first", [0, 1])
def test_a_fence_over_two_streams_holds_a_copy_until_both_have_passed(
    device: EmulatedDevice, first: int
) -> None:
    host = PlainHost(device.page_bytes, 4)
    down, up = device.routes(host)
    latches = [threading.Event(), threading.Event()]
    streams = [device.new_stream(), device.new_stream()]
    for stream, latch in zip(streams, latches, strict=True):
        device.launch(stream, partial(_pass, latch))
    both = fence(device, *streams)
    done = [down.submit(slots(0), slots(0), both), up.submit(slots(1), slots(1), both)]
    latches[first].set()
    assert device.streams.wait(fence(device, streams[first]), LONG_S)
    assert not done[0].wait(0.02)
    assert not done[1].ready()
    latches[1 - first].set()
    for copied in done:
        finish(copied)


def test_ordering_without_a_stream_makes_the_calling_thread_wait(device: EmulatedDevice) -> None:
    host = PlainHost(device.page_bytes, 2)
    _, up = device.routes(host)
    load = up.submit(slots(0), slots(0), PASSED)
    assert isinstance(load, Orderable)
    load.order(None)
    assert load.ready()


def test_unknown_streams_are_refused(device: EmulatedDevice) -> None:
    with pytest.raises(NotOurs, match="no stream 3"):
        device.streams.tick(3)
    assert device.streams.tick(None) is None


def test_closing_lets_queued_work_end_first() -> None:
    device = EmulatedDevice(64 * KIB, 4)
    host = PlainHost(device.page_bytes, 2)
    down, up = device.routes(host)
    stream, reader, latch = device.new_stream(), device.new_stream(), threading.Event()
    alias = int(device.frames.addresses(slots(0))[0])
    device.launch(stream, lambda: _pass(latch))
    device.launch(stream, lambda: _ignore(ctypes.memset(alias, 9, device.page_bytes)))
    stored = down.submit(slots(0), slots(1), fence(device, stream))
    loaded = up.submit(slots(1), slots(3), fence(device, stream))
    seen: list[bytes] = []
    copy = int(device.frames.addresses(slots(3))[0])
    assert isinstance(loaded, Orderable)
    loaded.order(reader)
    read = device.launch(reader, lambda: seen.append(ctypes.string_at(copy, 1)))
    closing = threading.Thread(target=device.close)
    closing.start()
    latch.set()
    closing.join(LONG_S)
    assert not closing.is_alive()
    for done in (stored, loaded, read):
        finish(done)
    assert len(seen) == 1
    assert ctypes.string_at(int(host.addresses(slots(1))[0]), 1) == b"\x09"


def test_a_closed_device_refuses_everything(device: EmulatedDevice, start: int) -> None:
    stream = device.new_stream()
    device.close()
    for call in (
        lambda: device.reserve(device.page_bytes),
        lambda: device.release(start, 64 * device.page_bytes),
        lambda: device.window.show(pages(device, start, 0), slots(0)),
        lambda: device.window.hide(pages(device, start, 0)),
        lambda: device.launch(stream, lambda: None),
        lambda: device.streams.tick(stream),
        device.new_stream,
        lambda: device.routes(PlainHost(device.page_bytes, 1)),
        lambda: device.zero(slots(0)),
        lambda: device.park(slots(0)),
        lambda: device.back(slots(0)),
    ):
        with pytest.raises(Closed):
            call()
