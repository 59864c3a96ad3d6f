"""Ticks on CUDA streams: a mark is a word that the stream writes and an event that it records.

The word makes polling free (a read of host memory: no call, no lock of the driver); the event
makes other streams wait without the host.
"""

from __future__ import annotations

import ctypes
import threading
import time
from typing import Final

import numpy as np
import numpy.typing as npt

from tiermem.errors import DriverError
from tiermem.gpu.driver import NOT_READY, SUCCESS, Context, CudaError
from tiermem.gpu.routine import A, B, Routine, Step
from tiermem.tier import Fence, Mask

_RING: Final = 64  # events a stream; an older mark is waited for through a later one
_SPIN_S: Final = 150e-6  # longer than one 2 MiB page takes to arrive (95 us, H200, FACTS)
_CHECK_EVERY: Final = 256  # unready polls between two looks for a lost device
_HOST_FLAGS: Final = 1 | 2  # portable, mapped
_EVENT_FLAGS: Final = 2  # no timing: cheaper to record and to wait for
NON_BLOCKING: Final = 1
_OPEN: Final = 0
_SHUT: Final = 1
_WAIT_EQUAL: Final = 1  # CU_STREAM_WAIT_VALUE_EQ
_WAIT_REACHED: Final = 0  # CU_STREAM_WAIT_VALUE_GEQ


class Words:
    """Pinned host words that the device writes: uint64[count], zero at first."""

    def __init__(self, context: Context, count: int) -> None:
        pointer = ctypes.c_uint64()
        with context:
            context.driver.call("cuMemHostAlloc", ctypes.byref(pointer), 8 * count, _HOST_FLAGS)
        self.context = context
        self.address = pointer.value
        raw = (ctypes.c_uint64 * count).from_address(self.address)
        self.values: npt.NDArray[np.uint64] = np.frombuffer(memoryview(raw), np.uint64)
        self.values[:] = 0
        self.used = 0

    def take(self) -> int:
        """The index of a word nobody has."""
        if self.used == len(self.values):
            raise DriverError(f"more than {self.used} streams are in use; close some")
        self.used += 1
        return self.used - 1

    def close(self) -> None:
        if self.address:
            last = self.values.copy()  # Dones may still be asked
            with self.context:
                self.context.driver.attempt("cuMemFreeHost", self.address)
            self.values = last
            self.address = 0


class Gate:
    """A host word that copies down wait for, so that the window can have the copy engine.

    The driver writes page-table entries with the engine that copies to the host: while such
    copies run, cuMemSetAccess takes 1,030 us a page (the engine's time slice) instead of 17, in
    every form of copy and stream that we tried (bench gpu_floor, sections stall and
    floors_beside, H200, driver 580, 2026-11). cuMemUnmap and copies up do not suffer so.
    So copies down go in short pieces with this gate before each, and it is shut during a show:
    one page faulted in beside them takes 321 us instead of 1,050 (bench gpu_floor, fault).
    """

    def __init__(self, words: Words) -> None:
        self._words = words
        self._index = words.take()
        self.address = words.address + 8 * self._index
        self.open_value = np.array([_OPEN], np.uint64)
        self.shut_value = np.array([_SHUT], np.uint64)

    def __enter__(self) -> None:
        """Shut it, for calls by this thread; the window lets one group at a time do so."""
        self._words.values[self._index] = _SHUT

    def __exit__(self, *_: object) -> None:
        self._words.values[self._index] = _OPEN

    def pass_through(self, stream: int) -> None:
        """Let what is queued on `stream` from now on wait until the gate is open."""
        driver = self._words.context.driver
        driver.call("cuStreamWaitValue64", stream, self.address, _OPEN, _WAIT_EQUAL)


class Signal:
    """A count that our threads move and streams wait for, the host not.

    One word of pinned host memory; `word` (uint64[1]) is for whoever counts, such as a `Queue`.
    """

    def __init__(self, words: Words) -> None:
        index = words.take()
        self.word = words.values[index : index + 1]
        at = words.address + 8 * index
        steps = (("cuStreamWaitValue64", A, at, B, _WAIT_REACHED),)
        self._wait_for = Routine(words.context, steps)
        self._lock = threading.Lock()

    def order(self, stream: int | None, count: int) -> None:
        """Make `stream` (None: the default stream) wait until the count is reached."""
        with self._lock:
            self._wait_for.run(stream or 0, count)


class Timeline:
    """The ticks of one stream, from 1. Any thread may call; marks are made one at a time."""

    def __init__(self, words: Words, stream: int) -> None:
        self.stream = stream
        self.failure: CudaError | None = None
        self.index = words.take()
        self._driver = words.context.driver
        self._context = words.context
        self._words = words
        self._events: list[int] = []
        self._mark = self.marking()
        self._wait_for = Routine(words.context, (("cuStreamWaitEvent", A, B, 0),))
        self._tick = 0
        self._lock = threading.Lock()
        self._polls = 0

    def marking(self, *steps: Step) -> Routine:
        """Calls that queue work on this stream, and those of the mark behind it: for `mark`."""
        write = ("cuStreamWriteValue64", self.stream, self._words.address + 8 * self.index, A, 0)
        return Routine(self._context, (*steps, write, ("cuEventRecord", B, self.stream)))

    def mark(self, work: Routine | None = None) -> int:
        """Queue a mark behind all that is on the stream, and behind this work; its tick."""
        with self._lock:
            tick = self._tick + 1
            (work or self._mark).run(tick, self._event(tick))
            self._tick = tick
            return tick

    def _event(self, tick: int) -> int:
        if len(self._events) < _RING:
            handle = ctypes.c_uint64()
            with self._context:
                self._driver.call("cuEventCreate", ctypes.byref(handle), _EVENT_FLAGS)
            self._events.append(handle.value)
            return handle.value
        return self._events[(tick - 1) % _RING]

    def _holding(self, tick: int) -> int:
        """An event that fires once `tick` has passed: its own, or the oldest still kept."""
        return self._events[(max(tick, self._tick - _RING + 1) - 1) % _RING]

    def reached(self) -> int:
        """The last tick that has passed."""
        return int(self._words.values[self.index])

    def passed(self, tick: int) -> bool:
        """True once the tick has passed, or when it never will (`failure` says why)."""
        if int(self._words.values[self.index]) >= tick or self.failure is not None:
            return True
        self._polls += 1
        if self._polls % _CHECK_EVERY == 0:
            self.check(tick)
        return self.failure is not None

    def check(self, tick: int) -> None:
        """Ask the driver whether the mark can still pass; a lost device is kept in `failure`."""
        if not self._events:
            return
        with self._context:
            code = self._driver.attempt("cuEventQuery", self._holding(tick))
        if code not in (SUCCESS, NOT_READY):
            self.failure = self._driver.error("cuEventQuery", code)

    def wait(
        self,
        tick: int,
        timeout_s: float | None = None,
        spin_s: float = _SPIN_S,
        due: float = 0.0,
    ) -> bool:
        """Block until the tick has passed or will not; returns `passed(tick)`.

        Sleeps until `due` (perf_counter) first: every earlier poll would take the interpreter
        lock from a busy thread for nothing. Then spins for at most `spin_s` with the lock held,
        because getting it back costs 5 ms beside such a thread, and sleeps between polls after.
        """
        start = time.perf_counter()
        limit = start + timeout_s if timeout_s is not None else float("inf")
        while not self.passed(tick):
            now = time.perf_counter()
            if now >= limit:
                return False
            if now < due:
                time.sleep(min(due, limit) - now)
                start = now
            elif now - start > spin_s:
                # At most 2 % late.
                sleep_s = min(max((now - start) * 0.02, 10e-6), 1e-3)
                time.sleep(min(sleep_s, limit - now))
        return True

    def order(self, stream: int, tick: int) -> None:
        """Make `stream` wait on the device for the tick."""
        if int(self._words.values[self.index]) < tick:
            with self._lock:
                self._wait_for.run(stream, self._holding(tick))

    def close(self) -> None:
        """Wait for the last mark (it still writes a word), then free the events."""
        with self._lock, self._context:
            if self._events:
                code = self._driver.attempt("cuEventSynchronize", self._holding(self._tick))
                if code != SUCCESS:
                    self.failure = self._driver.error("cuEventSynchronize", code)
            for event in self._events:
                self._driver.attempt("cuEventDestroy", event)
            self._events = []


class CudaDone:
    """Work on one of our streams, up to a tick; not before `due` (perf_counter)."""

    __slots__ = ("_due", "_spin_s", "_tick", "_timeline", "failed")

    def __init__(
        self, timeline: Timeline, tick: int, spin_s: float = _SPIN_S, due: float = 0.0
    ) -> None:
        self._timeline = timeline
        self._tick = tick
        self._spin_s = spin_s
        self._due = due
        self.failed: Mask | None = None

    @property
    def error(self) -> Exception | None:
        return self._timeline.failure if self._timeline.reached() < self._tick else None

    def ready(self) -> bool:
        return self._timeline.passed(self._tick)

    def wait(self, timeout_s: float | None = None) -> bool:
        return self._timeline.wait(self._tick, timeout_s, self._spin_s, self._due)

    def order(self, stream: int | None) -> None:
        """Make `stream` (a CUstream handle; None is the default stream) wait for this work."""
        self._timeline.order(stream or 0, self._tick)


class CudaStreams:
    """Ticks of the engine's streams, by CUstream handle; 0 or None is the default stream."""

    def __init__(self, context: Context, limit: int = 512) -> None:
        self._context = context
        self._words = Words(context, limit)
        self._by_id: dict[int, Timeline] = {}
        self._lines: list[Timeline] = []
        self._lock = threading.Lock()
        self._asked = np.zeros(2, np.uint64)
        capturing, unique = (self._asked.ctypes.data + 8 * i for i in range(2))
        self._ask_capturing = Routine(context, (("cuStreamIsCapturing", A, capturing),))
        self._ask_unique = Routine(context, (("cuStreamGetId", A, unique),))

    def tick(self, stream: int | None) -> tuple[int, int]:
        """Mark a point behind all that is queued on `stream` now; (stream index, tick).

        Raises DriverError while the stream is being captured into a graph: a mark inside a
        graph would pass at every replay.
        """
        line = self._line(stream or 0)
        return line.index, line.mark()

    def _line(self, stream: int) -> Timeline:
        with self._lock:
            self._ask_capturing.run(stream)
            if self._asked.item(0):  # the driver refuses to name a stream that is
                raise DriverError(
                    "tick: the stream is being captured into a CUDA graph; take the tick after the "
                    "capture, and after each replay"
                )
            self._ask_unique.run(stream)
            unique = self._asked.item(1)
        # A handle may be used again for another stream; the id is not.
        line = self._by_id.get(unique)
        if line is None:
            with self._lock:
                line = self._by_id.get(unique)
                if line is None:
                    line = Timeline(self._words, stream)
                    self._lines.append(line)
                    self._by_id[unique] = line
        return line

    def passed(self) -> npt.NDArray[np.uint64]:
        """uint64[streams]: the last tick that has passed on each stream index seen so far."""
        return self._words.values[: len(self._lines)].copy()

    def wait(self, fence: Fence, timeout_s: float | None = None) -> bool:
        """Block until the fence has passed; raises DeviceLost if it never will."""
        limit = time.perf_counter() + timeout_s if timeout_s is not None else None
        for index, tick in fence.ticks:
            line = self._lines[index]
            left = max(limit - time.perf_counter(), 0.0) if limit is not None else None
            if not line.wait(tick, left):
                return False
            if line.failure is not None and line.reached() < tick:
                raise line.failure
        return True

    def order(self, stream: int, fence: Fence) -> None:
        """Make `stream` wait on the device for the fence."""
        for index, tick in fence.ticks:
            self._lines[index].order(stream, tick)

    def close(self) -> None:
        """Wait for the last tick of every stream, then free; a second call does nothing."""
        for line in self._lines:
            line.close()
        self._lines = []
        self._by_id = {}
        self._words.close()
