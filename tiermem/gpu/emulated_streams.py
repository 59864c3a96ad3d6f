"""Streams of the CPU device: threads that run Python callables in order, and its copy routes."""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from tiermem.errors import Closed, DriverError, NotOurs
from tiermem.gpu.emulated_frames import EmulatedFrames
from tiermem.native import CALL, Calls, Kind, Program, Queue, Ticket, function, group, pointer
from tiermem.slices import Sliced, cuts
from tiermem.tier import Fence, Mask, Memory, Place, Slots

_STREAMS = 1024
_PATIENCE_S = 300e-6
_SHORT_BYTES = 2 << 20
"""As for the window: so much is copied in about this time."""
_SLICE = 4 << 10
_SLICED = 64 << 10
"""Small, so that what a GPU does with pages of megabytes is done in tests too."""
_KERNEL = ctypes.CFUNCTYPE(ctypes.c_int)
_MARK = Program(np.zeros(0, CALL))


class EmulatedStreams:
    """Engine streams by number, 0 first; `None` is the calling thread, which has no queue.

    A stream whose work failed runs nothing more, as on CUDA.
    """

    def __init__(self) -> None:
        self._ticks = np.zeros(_STREAMS, np.uint64)
        self._queues: list[Queue] = []
        self._lock = threading.Lock()
        self._closed = False

    def new(self) -> int:
        """A further stream; its index."""
        with self._lock:
            if self._closed:
                raise Closed("streams: the device is closed")
            index = len(self._queues)
            if index == _STREAMS:
                raise DriverError(f"streams: this device has {_STREAMS} at most")
            word = self._ticks[index : index + 1]
            self._queues.append(Queue(f"tm-stream-{index}", sticky=True, word=word))
            return index

    def queue(self, stream: int) -> Queue:
        """The queue behind a stream; NotOurs if there is none."""
        if not 0 <= stream < len(self._queues):
            raise NotOurs(f"streams: no stream {stream}; this device has {len(self._queues)}")
        return self._queues[stream]

    def launch(self, stream: int, fn: Callable[[], None]) -> Ticket:
        """Run a callable behind all that is queued; an exception of it is the ticket's error."""
        raised: list[Exception] = []

        def body() -> int:
            try:
                fn()
            except Exception as error:
                raised.append(error)
                return 1
            except BaseException as error:
                raised.append(DriverError(f"stream {stream}: a launched callable ended: {error!r}"))
                return 1
            return 0

        kernel = _KERNEL(body)
        program = Program(group(pointer(kernel), Kind.STATUS), keep=(kernel,))
        return self.queue(stream).submit(program, lambda failure: raised[0])

    def tick(self, stream: int | None) -> tuple[int, int] | None:
        if stream is None:
            return None
        return stream, self.queue(stream).call(_MARK).tick

    def passed(self) -> npt.NDArray[np.uint64]:
        return self._ticks[: len(self._queues)].copy()

    def wait(self, fence: Fence, timeout_s: float | None = None) -> bool:
        end = None if timeout_s is None else time.monotonic() + timeout_s
        for stream, tick in fence.ticks:
            left = None if end is None else max(0.0, end - time.monotonic())
            if not self.queue(stream).wait(tick, left):
                return False
        return True

    def waiting(self, fence: Fence) -> list[Calls]:
        """Calls that wait for what of the fence has not passed."""
        queues = [(self.queue(stream), tick) for stream, tick in fence.ticks]
        return [queue.after(tick) for queue, tick in queues if queue.tick < tick]

    def close(self) -> None:
        """Run all that is queued, then end the threads; a second call does nothing."""
        with self._lock:
            self._closed = True
        for queue in self._queues:
            queue.close()


class Orderly:
    """Copies, or changes of what pages show: a `Done` that streams can wait for."""

    __slots__ = ("_streams", "_ticket")

    def __init__(self, ticket: Ticket, streams: EmulatedStreams) -> None:
        self._ticket = ticket
        self._streams = streams

    @property
    def error(self) -> Exception | None:
        return self._ticket.error

    @property
    def failed(self) -> Mask | None:
        return self._ticket.failed

    def ready(self) -> bool:
        return self._ticket.ready()

    def wait(self, timeout_s: float | None = None) -> bool:
        return self._ticket.wait(timeout_s)

    def order(self, stream: int | None) -> None:
        """Make `stream` wait for this work; without one, the calling thread waits.

        If the work ends without success, nothing later on the stream runs.
        """
        if stream is None:
            self.wait()
        else:
            program = Program(self._ticket.after(), keep=(self._ticket,))
            self._streams.queue(stream).submit(program)


class EmulatedRoute:
    """Copies whole slots between frames (by alias) and host slots, on one thread of its own."""

    def __init__(
        self, frames: EmulatedFrames, host: Memory, streams: EmulatedStreams, *, down: bool
    ) -> None:
        if host.slot_bytes != frames.slot_bytes:
            raise DriverError(f"routes: slots of {host.slot_bytes} and {frames.slot_bytes} bytes")
        self.src, self.dst = (Place.GPU, host.place) if down else (host.place, Place.GPU)
        self._frames = frames
        self._host = host
        self._streams = streams
        self._down = down
        self._memcpy = function("memcpy")
        name = "tm-gpu-to-host" if down else "tm-host-to-gpu"
        self._queue = Queue(name, patience_s=_PATIENCE_S)

    def submit(self, src: Slots, dst: Slots, after: Fence) -> Orderly:
        (done,) = self._submit(src, dst, after, [(0, self._frames.slot_bytes)])
        return done

    def submit_slices(self, src: Slots, dst: Slots, after: Fence) -> Orderly | Sliced:
        """`submit` for who reads the slots from front to back: large groups come in slices."""
        parts = list(cuts(len(src), self._frames.slot_bytes, _SLICE, _SLICED))
        dones = self._submit(src, dst, after, parts)
        return dones[0] if len(dones) == 1 else Sliced([first for first, _ in parts], dones)

    def _submit(
        self, src: Slots, dst: Slots, after: Fence, parts: list[tuple[int, int]]
    ) -> list[Orderly]:
        """Each part of the slots, (first byte, end), in order."""
        frames, slots = (src, dst) if self._down else (dst, src)
        if len(src) != len(dst) or not len(src):
            raise DriverError(f"{self._queue.name}: {len(src)} sources, {len(dst)} destinations")
        self._frames.check(frames)
        here, there = self._frames.addresses(frames), self._host.addresses(slots)
        to, start = (there, here) if self._down else (here, there)
        short = len(src) * self._frames.slot_bytes <= _SHORT_BYTES
        before = self._streams.waiting(after)
        dones: list[Orderly] = []
        for first, end in parts:
            at = np.uint64(first)
            copies = group(self._memcpy, Kind.PLAIN, to + at, start + at, end - first)
            calls = np.concatenate([*before, copies])
            program = Program(calls, entries=len(src), keep=(self._streams,))
            ticket = self._queue.submit(program, short=short)
            dones.append(Orderly(ticket, self._streams))
            before = []
        self._frames.in_flight.add(ticket, frames.copy())
        return dones

    def close(self) -> None:
        """Refuse new work; what was submitted goes on and ends. A second call does nothing."""
        self._queue.close(timeout_s=0.0)

    def join(self) -> None:
        """Close, and wait until everything submitted has ended."""
        self._queue.close()


class Zeroing:
    """Fills frames with zeros on a thread of its own."""

    def __init__(self, frames: EmulatedFrames) -> None:
        self._frames = frames
        self._memset = function("memset")
        self._queue = Queue("tm-zero", patience_s=_PATIENCE_S)

    def submit(self, frames: Slots) -> Ticket:
        self._frames.check(frames)
        at = self._frames.addresses(frames)
        program = Program(group(self._memset, Kind.PLAIN, at, 0, self._frames.slot_bytes))
        short = len(frames) * self._frames.slot_bytes <= _SHORT_BYTES
        ticket = self._queue.submit(program, short=short)
        self._frames.in_flight.add(ticket, frames.copy())
        return ticket

    def close(self) -> None:
        self._queue.close()
