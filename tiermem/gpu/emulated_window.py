"""The CPU device's window: frames mapped at reserved addresses, in groups, in order.

The work and the books are in `emulated.c`, so that a group costs the interpreter one submission.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import os
import threading
from bisect import bisect_right
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

import numpy as np
import numpy.typing as npt

from tiermem import toolchain
from tiermem.errors import Closed, DriverError, NotOurs, PageInUse
from tiermem.gpu import mappings
from tiermem.gpu.emulated_frames import EmulatedFrames, InFlight
from tiermem.gpu.emulated_streams import EmulatedStreams, Orderly
from tiermem.native import ALL, CALL, Calls, Failure, Kind, Program, Queue, Ticket, group, pointer
from tiermem.native import address as _address
from tiermem.tier import Addresses, Mask, Slots

_NOTHING = -1
_INLINE_BYTES = 256 << 10
"""The calling thread maps a single page, or a group of up to this size, itself when nothing is
queued: 20 us for a 64 KiB page, 240 for 2 MiB, and about 50 to hand a group over (2-core)."""
_DEPTH = 128
"""Groups queued at most: 64 pages of 64 KiB in each are 100 ms of work, twenty times what the
submitter waits for the interpreter lock beside a busy thread."""
_PATIENCE_S = 300e-6
_SHORT_BYTES = 2 << 20
"""So much is mapped in 240 us; coming back to the lock beside a busy thread costs 5 ms."""

_SOURCE = Path(__file__).parents[1] / "emulated.c"
_Numbers = npt.NDArray[np.uint64]


class Refusal(IntEnum):
    """Why a group was not shown or hidden; as in emulated.c."""

    MISPLACED = 1
    OUTSIDE = 2
    TWICE = 3
    TAKEN = 4
    NOTHING_SHOWN = 5
    NO_FRAME = 6
    PARKED = 7
    CROWDED = 8


_WHY = {
    Refusal.MISPLACED: "is not at a page's start; pages are mapped whole",
    Refusal.OUTSIDE: "is outside the reservation of the group's first address",
    Refusal.TWICE: "stands twice in the group",
    Refusal.TAKEN: "shows something; hide it first",
    Refusal.NOTHING_SHOWN: "shows nothing",
}


@functools.cache
def _function(name: str) -> int:
    return pointer(ctypes.CDLL(str(toolchain.build(_SOURCE)))[name])


@dataclass(frozen=True, slots=True)
class _Range:
    """One reservation; shown[p] is the frame that page p shows, -1 for nothing; slots of the host
    tier, shown in place, follow the frames in number."""

    address: int
    nbytes: int
    shown: Slots
    numbers: _Numbers
    """uint64[3]: `range` of emulated.c"""


class EmulatedWindow:
    """Shows frames at reserved addresses with mmap; refuses what CUDA refuses, with DriverError.

    A refused or failed group changed nothing; the error is in its ticket, except for what is known
    without looking at the pages. Groups take effect in the order in which they are made: all pass
    one queue of one thread, but a page, or a group of up to 256 KiB, is mapped by the calling
    thread when the queue is idle, so that a fault pays no hand-over.

    guard: absent addresses read as zeros (one page of the kernel's, shared by all) instead of
    ending the process; a write still ends it.
    """

    def __init__(
        self, frames: EmulatedFrames, streams: EmulatedStreams, *, guard: bool = False
    ) -> None:
        self.frames = frames
        self._streams = streams
        self.in_flight = InFlight()
        self._page_bytes = frames.slot_bytes
        self._absent = mappings.READ if guard else mappings.NO_ACCESS
        self._ranges: list[_Range] = []
        self._starts: list[int] = []
        self._lock = threading.Lock()
        self._closed = False
        self._last = 0
        self._showing = np.zeros(frames.most, np.int32)
        # A window that reached the kernel's limit could not even hide a page any more, so an
        # eighth is left to the rest of the process.
        books = [self._page_bytes, frames.most, frames.fd, self._absent]
        books += [frames.parked.ctypes.data, self._showing.ctypes.data]
        books += [0, mappings.limit() * 7 // 8, 0, 0]
        self._numbers = np.array(books, np.uint64)
        self._queue = Queue("tm-window", depth=_DEPTH, patience_s=_PATIENCE_S)
        self._show = self._template("em_show")
        self._hide = self._template("em_hide")

    def _template(self, name: str) -> _Numbers:
        """uint64[1, words a call]: a call of which only range and arrays are still missing."""
        calls = group(_function(name), Kind.STATUS, _address(self._numbers), entries=ALL)
        return calls.view(np.uint64).reshape(1, -1)

    def reserve(self, nbytes: int) -> int:
        """Reserve addresses that show nothing; where they start."""
        if nbytes <= 0 or nbytes % self._page_bytes:
            raise DriverError(f"reserve: {nbytes} bytes are no whole pages of {self._page_bytes}")
        start = mappings.reserve(nbytes, self._page_bytes, self._absent)
        shown = np.full(nbytes // self._page_bytes, _NOTHING, np.int32)
        numbers = np.array([start, len(shown), shown.ctypes.data], np.uint64)
        with self._lock:
            self._set_ranges([*self._ranges, _Range(start, nbytes, shown, numbers)])
        return start

    def release(self, address: int, nbytes: int) -> None:
        """Give a reservation back; PageInUse while it shows something."""
        with self.quiet():
            where = next((r for r in self._ranges if r.address == address), None)
            if where is None or where.nbytes != nbytes:
                raise NotOurs(f"release: {address:#x} + {nbytes} is no reservation of this device")
            if count := int(np.count_nonzero(where.shown != _NOTHING)):
                raise PageInUse(f"release: {count} pages of {address:#x} are still shown")
            self._set_ranges([r for r in self._ranges if r is not where])
            mappings.unmap(address, nbytes)

    def _set_ranges(self, ranges: list[_Range]) -> None:
        self._ranges = sorted(ranges, key=lambda r: r.address)
        self._starts = [r.address for r in self._ranges]

    def show(self, addresses: Addresses, frames: Slots) -> Orderly:
        """Map frame frames[i] at addresses[i], whole and read-write. All or nothing."""
        if len(frames) != len(addresses):
            raise DriverError(f"window: {len(addresses)} addresses for {len(frames)} frames")
        slots = np.array(frames, np.int32)
        with self._lock:
            row = self._show.copy()
            row[0, 4], row[0, 5] = _address(slots), len(slots)
            return self._submit(row, addresses, slots)

    def attach(self, fd: int, slots: int) -> None:
        """Let this memory file's pages be shown in place; once."""
        with self.quiet():
            if self._numbers[-1]:
                raise DriverError("window: host pages are attached already")
            self._numbers[-2:] = fd, slots

    def show_in_place(self, addresses: Addresses, slots: Slots) -> Orderly:
        """Map pages of the attached file at page addresses, for reading. All or nothing."""
        if len(slots) and not 0 <= slots.min() <= slots.max() < int(self._numbers[-1]):
            raise DriverError(
                f"window: slots {slots.min()}..{slots.max()}, {int(self._numbers[-1])} host pages"
            )
        return self.show(addresses, slots + np.int32(self.frames.most))

    def hide(self, addresses: Addresses) -> Orderly:
        """Unmap the pages at these addresses, which all show something. All or nothing."""
        with self._lock:
            used = self.in_flight.using(addresses)
            if used is not None and used.any():
                raise DriverError(
                    f"window: {int(used.sum())} of {len(used)} addresses are used by launched "
                    f"work, the first is {int(addresses[used.argmax()]):#x}; wait for its fence"
                )
            row = self._hide.copy()
            row[0, 4] = len(addresses)
            return self._submit(row, addresses, None)

    def _submit(self, row: _Numbers, addresses: Addresses, slots: Slots | None) -> Orderly:
        """The lock is held, so that the order of submission is the order of the calls."""
        n = len(addresses)
        where = self._range(addresses)
        at = np.array(addresses, np.uint64)  # ours: the caller may change its own
        row[0, 2], row[0, 3] = _address(where.numbers), _address(at)
        calls = row.view(CALL)[0]
        program = Program(calls, entries=n, keep=(where, at, slots))
        explain = functools.partial(self._explain, calls, at, slots)
        if n == 1 or n * self._page_bytes <= _INLINE_BYTES:
            ticket = self._queue.call(program, explain)
        else:
            short = n * self._page_bytes <= _SHORT_BYTES
            ticket = self._queue.submit(program, explain, short=short)
        self._last = ticket.tick
        return Orderly(ticket, self._streams)

    def _range(self, addresses: Addresses) -> _Range:
        self._refuse_closed()
        if not len(addresses):
            raise DriverError("window: a group of no pages")
        first = int(addresses[0])
        index = bisect_right(self._starts, first) - 1
        if index < 0 or first >= self._ranges[index].address + self._ranges[index].nbytes:
            raise NotOurs(f"window: {first:#x} is in no reservation of this device")
        return self._ranges[index]

    def _explain(
        self, calls: Calls, addresses: Addresses, slots: Slots | None, failure: Failure
    ) -> DriverError:
        index = int(calls["result"][0]) >> 32
        which = f"window: page {index} of {len(addresses)} at {int(addresses[index]):#x}"
        if failure.code < 0:
            name, text = errno.errorcode[-failure.code], os.strerror(-failure.code)
            return DriverError(f"{which}: {name} ({text}), all undone; {mappings.way_out()}")
        why = Refusal(failure.code)
        if why is Refusal.CROWDED:
            return DriverError(
                f"window: {len(addresses)} more pages would take more than 7/8 of the mappings "
                f"that this process may have; {mappings.way_out()}"
            )
        if slots is not None and why in (Refusal.NO_FRAME, Refusal.PARKED):
            frame = int(slots[index])
            return DriverError(
                f"frames: frame {frame} is parked; put memory behind it with `back`"
                if why is Refusal.PARKED
                else f"frames: no frame {frame}; this device has {self.frames.most}"
            )
        return DriverError(f"{which} {_WHY[why]}")

    @contextmanager
    def quiet(self) -> Iterator[None]:
        """Keep groups out and let those queued end: inside, the books are true and still."""
        with self._lock:
            self._refuse_closed()
            self._queue.wait(self._last)
            yield

    def occupy(self, addresses: Addresses, submit: Callable[[], Ticket]) -> Ticket:
        """Submit work that uses shown pages; until it has ended they cannot be hidden."""
        if not len(addresses):
            return submit()
        with self.quiet():
            where = self._range(addresses)
            pages = (addresses - np.uint64(where.address)) // np.uint64(self._page_bytes)
            outside = pages >= len(where.shown)
            absent = where.shown[np.where(outside, 0, pages)] == _NOTHING
            if (bad := outside | absent).any():
                raise DriverError(
                    f"launch: {int(bad.sum())} of {len(bad)} addresses show nothing, the first is "
                    f"{int(addresses[bad.argmax()]):#x}"
                )
            ticket = submit()
            self.in_flight.add(ticket, addresses.copy())
            return ticket

    def shown(self, frames: Slots) -> Mask:
        """bool[n]: which of these frames some address shows; to be asked while it is quiet."""
        inside = (frames >= 0) & (frames < len(self._showing))
        return inside & (self._showing[np.where(inside, frames, 0)] > 0)

    def _refuse_closed(self) -> None:
        if self._closed:
            raise Closed("window: the device is closed")

    def close(self) -> None:
        """End what is queued, give all addresses back; a second call does nothing."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        self._queue.close()
        for where in self._ranges:
            mappings.unmap(where.address, where.nbytes)
        self._set_ranges([])
