"""The CPU device's window: frames mapped at reserved addresses, in groups, in order."""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tiermem.errors import Closed, DriverError, NotOurs, PageInUse
from tiermem.gpu import mappings
from tiermem.gpu.emulated_frames import EmulatedFrames, InFlight
from tiermem.native import CALL, Calls, Program, Queue, Ticket
from tiermem.tier import Addresses, Mask, Slots

_NOTHING = -1
_ADDRESS, _OFFSET = 1, 6
"""Columns of a call's numbers: its first and sixth argument stand behind the function."""
_INLINE_BYTES = 256 << 10
"""The calling thread maps a single page, or a group of up to this size, itself when nothing is
queued: 20 us for a 64 KiB page, 240 for 2 MiB, and about 50 to hand a group over (2-core)."""
_DEPTH = 128
"""Groups queued at most: 64 pages of 64 KiB in each are 100 ms of work, twenty times what the
submitter waits for the interpreter lock beside a busy thread."""
_PATIENCE_S = 300e-6
"""A few pages end within it; coming back to the lock beside a busy thread costs 5 ms."""


@dataclass(slots=True)
class _Range:
    """One reservation; shown[p] is the frame that page p shows, -1 for nothing."""

    address: int
    nbytes: int
    shown: Slots


@dataclass(frozen=True, slots=True)
class _Change:
    """A group on its way, what its pages showed before it, and how many more it shows."""

    where: _Range
    pages: npt.NDArray[np.int64]
    before: Slots
    more: int


class EmulatedWindow:
    """Shows frames at reserved addresses with mmap; refuses what CUDA refuses, with DriverError.

    A group is one native program with an undo for each page. Groups take effect in the order in
    which they are made: all pass one queue of one thread, but a page, or a group of up to
    256 KiB, is mapped by the calling thread when the queue is idle: a fault pays no hand-over.

    guard: absent addresses read as zeros (one page of the kernel's, shared by all) instead of
    ending the process; a write still ends it.
    """

    def __init__(self, frames: EmulatedFrames, *, guard: bool = False) -> None:
        self.frames = frames
        self.in_flight = InFlight()
        self._page_bytes = frames.slot_bytes
        self._page = np.uint64(frames.slot_bytes)
        self._absent = mappings.READ if guard else mappings.NO_ACCESS
        self._ranges: list[_Range] = []
        self._starts: list[int] = []
        self._lock = threading.Lock()
        self._closed = False
        self._changes: deque[tuple[Ticket, _Change]] = deque()
        self._pages_shown = 0
        # A window that reached the kernel's limit could not even hide a page any more, so an
        # eighth is left to the rest of the process.
        self._most_mappings = mappings.limit() * 7 // 8
        self._queue = Queue(
            "tm-window", depth=_DEPTH, patience_s=_PATIENCE_S, explain=mappings.explain
        )
        self._show_rows = _numbers(mappings.shown(frames.fd, self._page_bytes, 64))
        self._hide_rows = _numbers(mappings.hidden(self._page_bytes, 64, self._absent))

    def reserve(self, nbytes: int) -> int:
        """Reserve addresses that show nothing; where they start."""
        if nbytes <= 0 or nbytes % self._page_bytes:
            raise DriverError(f"reserve: {nbytes} bytes are no whole pages of {self._page_bytes}")
        address = mappings.reserve(nbytes, self._page_bytes, self._absent)
        where = _Range(address, nbytes, np.full(nbytes // self._page_bytes, _NOTHING, np.int32))
        with self._lock:
            self._set_ranges([*self._ranges, where])
        return address

    def release(self, address: int, nbytes: int) -> None:
        """Give a reservation back; PageInUse while it shows something."""
        with self._lock:
            where = next((r for r in self._ranges if r.address == address), None)
            if where is None or where.nbytes != nbytes:
                raise NotOurs(f"release: {address:#x} + {nbytes} is no reservation of this device")
            self._settle()
            if count := int(np.count_nonzero(where.shown != _NOTHING)):
                raise PageInUse(f"release: {count} pages of {address:#x} are still shown")
            ticket = self._queue.submit(Program(mappings.unmapped(address, nbytes)))
            self._set_ranges([r for r in self._ranges if r is not where])
        ticket.wait()
        if ticket.error is not None:
            raise ticket.error

    def _set_ranges(self, ranges: list[_Range]) -> None:
        self._ranges = sorted(ranges, key=lambda r: r.address)
        self._starts = [r.address for r in self._ranges]

    def show(self, addresses: Addresses, frames: Slots) -> Ticket:
        """Map frame frames[i] at addresses[i], whole and read-write. All or nothing."""
        with self._lock:
            where, pages = self._locate(addresses)
            if len(frames) != len(pages):
                raise DriverError(f"window: {len(pages)} addresses for {len(frames)} frames")
            before = where.shown[pages]
            if np.maximum.reduce(before) != _NOTHING:
                self._refuse(before != _NOTHING, addresses, "show something; hide them first")
            self.frames.check(frames)
            self._refuse_crowd(len(frames))
            program = Program(self._showing(addresses, frames), self._hiding(addresses))
            return self._submit(program, _Change(where, pages, before, len(pages)), frames)

    def hide(self, addresses: Addresses) -> Ticket:
        """Unmap the pages at these addresses, which all show something. All or nothing."""
        with self._lock:
            where, pages = self._locate(addresses)
            before = where.shown[pages]
            if np.minimum.reduce(before) == _NOTHING:
                self._refuse(before == _NOTHING, addresses, "show nothing")
            used = self.in_flight.using(addresses)
            if used is not None and used.any():
                self._refuse(used, addresses, "are used by launched work; wait for its fence")
            program = Program(self._hiding(addresses), self._showing(addresses, before))
            return self._submit(program, _Change(where, pages, before, -len(pages)), _NOTHING)

    def occupy(self, addresses: Addresses, submit: Callable[[], Ticket]) -> Ticket:
        """Submit work that uses shown pages; until it has ended they cannot be hidden."""
        with self._lock:
            self._refuse_closed()
            if len(addresses):
                where, pages = self._locate(addresses)
                self._refuse(where.shown[pages] == _NOTHING, addresses, "show nothing")
            ticket = submit()
            if len(addresses):
                self.in_flight.add(ticket, addresses.copy())
            return ticket

    def shown(self, frames: Slots) -> Mask:
        """bool[n]: which of these frames some address shows, or shall show."""
        with self._lock:
            self._settle()
            ranges = [where.shown for where in self._ranges]
        return np.isin(frames, np.concatenate(ranges)) if ranges else np.zeros(len(frames), bool)

    def _submit(self, program: Program, change: _Change, after: Slots | int) -> Ticket:
        """The lock is held, so that the order of submission is the order of the checks."""
        n = len(change.pages)
        here = n == 1 or n * self._page_bytes <= _INLINE_BYTES
        ticket = self._queue.call(program) if here else self._queue.submit(program)
        change.where.shown[change.pages] = after
        self._pages_shown += change.more
        if not ticket.ready() or ticket.failure is not None:
            self._changes.append((ticket, change))
        return ticket

    def _settle(self) -> None:
        """Set pages of failed groups back to what they show, unless a later group changed them."""
        changes = self._changes
        while changes and changes[0][0].ready():
            ticket, ended = changes.popleft()
            if ticket.failure is None:
                continue
            self._pages_shown -= ended.more
            later = [change.pages for _, change in changes if change.where is ended.where]
            pages, before = ended.pages, ended.before
            if later:
                ours = ~np.isin(pages, np.concatenate(later))
                pages, before = pages[ours], before[ours]
            ended.where.shown[pages] = before

    def _refuse_crowd(self, more: int) -> None:
        """Refuse to show so many pages that the process could run out of mappings."""
        if 2 * (self._pages_shown + more) < self._most_mappings:
            return
        # Neighbours that show nothing, or neighbouring frames, are one mapping.
        now = 2 * more
        for where in self._ranges:
            here, there = where.shown[:-1], where.shown[1:]
            joined = np.where(here == _NOTHING, there == _NOTHING, there == here + 1)
            now += 1 + np.count_nonzero(~joined)
        if now > self._most_mappings:
            raise DriverError(
                f"window: {self._pages_shown + more} pages shown would take up to {now} mappings, "
                f"more than 7/8 of what this process may have; {mappings.way_out()}"
            )

    def _locate(self, addresses: Addresses) -> tuple[_Range, npt.NDArray[np.int64]]:
        """The reservation that holds all of a group, and the page numbers in it; settled."""
        self._refuse_closed()
        if not len(addresses):
            raise DriverError("window: a group of no pages")
        self._settle()
        index = bisect_right(self._starts, int(addresses[0])) - 1
        where = self._ranges[index] if index >= 0 else None
        if where is None:
            raise NotOurs(f"window: {int(addresses[0]):#x} is in no reservation of this device")
        # An address before the start wraps round to far behind the end.
        offsets = addresses - np.uint64(where.address)
        pages, rest = np.divmod(offsets, self._page)
        if np.count_nonzero(rest):
            self._refuse(rest != 0, addresses, "are not at a page's start; pages map whole")
        if int(np.maximum.reduce(pages)) >= len(where.shown):
            self._refuse(offsets >= where.nbytes, addresses, "are outside the reservation")
        numbers = pages.view(np.int64)
        n = len(numbers)
        # Mostly the pages ascend; only else is it worth sorting them.
        if (
            n > 1
            and np.count_nonzero(numbers[1:] > numbers[:-1]) < n - 1
            and len(np.unique(numbers)) < n
        ):
            raise DriverError(f"window: an address stands twice in a group of {n}")
        return where, numbers

    def _showing(self, addresses: Addresses, frames: Slots) -> Calls:
        n = len(addresses)
        if n > len(self._show_rows):
            self._show_rows = _numbers(mappings.shown(self.frames.fd, self._page_bytes, 2 * n))
        rows = self._show_rows[:n].copy()
        rows[:, _ADDRESS] = addresses
        rows[:, _OFFSET] = frames.astype(np.uint64) * self._page
        return rows.view(CALL).reshape(n)

    def _hiding(self, addresses: Addresses) -> Calls:
        n = len(addresses)
        if n > len(self._hide_rows):
            self._hide_rows = _numbers(mappings.hidden(self._page_bytes, 2 * n, self._absent))
        rows = self._hide_rows[:n].copy()
        rows[:, _ADDRESS] = addresses
        return rows.view(CALL).reshape(n)

    def _refuse(self, bad: Mask, addresses: Addresses, why: str) -> None:
        if bad.any():
            raise DriverError(
                f"window: {int(bad.sum())} of {len(bad)} addresses {why}; "
                f"the first is {int(addresses[bad.argmax()]):#x}"
            )

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


def _numbers(calls: Calls) -> npt.NDArray[np.uint64]:
    """uint64[n, words a call]: the same bytes, which copy four times as fast as named fields."""
    return calls.view(np.uint64).reshape(len(calls), -1)
