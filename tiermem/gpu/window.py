"""The window: which frame each reserved address shows, changed by groups of driver calls.

A group is one native program with an undo row for every call, so it happens whole or not at all.
Groups run in order on one thread of the window's own, without the interpreter lock; a page or two
are shown by the calling thread when nothing is queued, because a hand-over would cost more than
the 36 us a page that the driver asks (FACTS "CUDA virtual memory", H200).
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from tiermem.errors import Closed, DriverError, NotOurs, PageInUse
from tiermem.gpu.driver import Context, CudaError
from tiermem.gpu.frames import Arena, Handles, access, reserve
from tiermem.native import Calls, Kind, Program, Queue, Ticket, function, group, interleave
from tiermem.tier import Addresses, Done, Finished, Mask, Slots

log = logging.getLogger(__name__)

_INLINE: Final = 2  # pages at most that the calling thread shows itself: 72 us with the lock held
_GUARDS: Final = 4096  # guard pages shown by one program
_READ: Final = 1

Column = int | npt.NDArray[np.uint64]  # one value for a whole group, or one a page


@dataclass(slots=True)
class _Range:
    """One reservation. handles[p] is what page p shows, 0 for nothing; guards do not count."""

    address: int
    nbytes: int
    handles: Handles
    in_place: Mask


@dataclass(frozen=True, slots=True)
class _Face:
    """What n addresses show or shall show: handles, and where their access descriptors are."""

    handles: Handles
    desc: Column
    descs: Column


class Change:
    """A group on its way: a `Done` whose error names the call and the page."""

    __slots__ = ("_context", "_names", "_ticket")

    def __init__(self, context: Context, ticket: Ticket, names: tuple[str, ...]) -> None:
        self._context = context
        self._ticket = ticket
        self._names = names

    @property
    def error(self) -> Exception | None:
        failure = self._ticket.failure
        if failure is None or failure.cancelled:
            return self._ticket.error
        page, row = divmod(failure.index, len(self._names))
        pages = len(self._ticket.program.calls) // len(self._names)
        at = f"page {page} of {pages}, all undone"
        return self._context.driver.error(self._names[row], failure.code, at)

    @property
    def failed(self) -> Mask | None:
        return self._ticket.failed

    def ready(self) -> bool:
        return self._ticket.ready()

    def wait(self, timeout_s: float | None = None) -> bool:
        return self._ticket.wait(timeout_s)


@dataclass(frozen=True, slots=True)
class _Pending:
    """A queued group and what its pages showed before, should it fail."""

    change: Change
    where: _Range
    pages: Slots
    handles: Handles
    in_place: Mask


class CudaWindow:
    """Shows frames at reserved addresses; see `tier.Window`.

    Refuses, before any driver call: addresses outside our reservations or not at a page's start,
    a page that already shows something (show) or shows nothing (hide), a frame without memory.
    guard: addresses that show nothing map one shared page, so that a stray read is not fatal; it
    doubles the cost of a steal, and `reserve` takes 25 us a page (FACTS, H200).
    """

    def __init__(self, context: Context, frames: Arena, *, guard: bool = False) -> None:
        self.context = context
        self.page_bytes = frames.slot_bytes
        self._frames = frames
        self._host: Arena | None = None
        self._ranges: list[_Range] = []
        self._starts = np.zeros(0, np.uint64)
        self._lock = threading.Lock()
        self._closed = False
        self._pending: deque[_Pending] = deque()
        self._last = 0
        driver = context.driver
        self._nothing = function("abs")  # a call that does nothing, to carry an undo row
        self._map = driver.address("cuMemMap")
        self._let = driver.address("cuMemSetAccess")
        self._unmap = driver.address("cuMemUnmap")
        setup = Program(group(driver.address("cuCtxSetCurrent"), Kind.STATUS, context.handle))
        self._queue = Queue("tiermem-window", setup=setup)
        self._guard_desc = access(context.device, flags=_READ)
        self._guard: Arena | None = None
        if guard:
            self._guard = Arena(context, frames.backing, self.page_bytes, 1)
            self._guard.back(np.zeros(1, np.int32))

    # -- reservations -------------------------------------------------------------------------

    def reserve(self, nbytes: int) -> int:
        """Reserve addresses that show nothing (or the guard page); where they start."""
        if nbytes <= 0 or nbytes % self.page_bytes:
            raise DriverError(f"reserve: {nbytes} bytes are no whole pages of {self.page_bytes}")
        self._refuse_closed()
        address = reserve(self.context, nbytes, self.page_bytes)
        n = nbytes // self.page_bytes
        where = _Range(address, nbytes, np.zeros(n, np.uint64), np.zeros(n, np.bool_))
        try:
            self._swap_guards(where, show=True)
        except DriverError:
            self._free(where)
            raise
        with self._lock:
            self._ranges = sorted([*self._ranges, where], key=lambda r: r.address)
            self._starts = np.array([r.address for r in self._ranges], np.uint64)
        return address

    def release(self, address: int, nbytes: int) -> None:
        """Give a reservation back; raises PageInUse while it shows something."""
        with self._lock:
            where = next((r for r in self._ranges if r.address == address), None)
            if where is None or where.nbytes != nbytes:
                raise NotOurs(f"release: {address:#x} + {nbytes} is no reservation of this device")
            self._settle(np.arange(len(where.handles), dtype=np.int32), where)
            if shown := int(np.count_nonzero(where.handles)):
                raise PageInUse(f"release: {shown} pages of {address:#x} are still shown")
            self._ranges = [r for r in self._ranges if r is not where]
            self._starts = np.array([r.address for r in self._ranges], np.uint64)
        self._swap_guards(where, show=False)
        self._free(where)

    def _free(self, where: _Range) -> None:
        with self.context:
            self.context.driver.call("cuMemAddressFree", where.address, where.nbytes)

    def _swap_guards(self, where: _Range, *, show: bool) -> None:
        """Show or hide the guard page at every address of a reservation that shows nothing."""
        hidden = np.flatnonzero(where.handles == 0).astype(np.uint64)
        for first in range(0, len(hidden) if self._guard else 0, _GUARDS):
            part = hidden[first : first + _GUARDS]
            at = part * np.uint64(self.page_bytes) + np.uint64(where.address)
            guard = self._guards(len(at))
            change = self._submit(at, None if show else guard, guard if show else None)
            change.wait()
            if change.error is not None:
                raise change.error

    # -- show and hide ------------------------------------------------------------------------

    def show(self, addresses: Addresses, frames: Slots) -> Done:
        """Map frame frames[i] at addresses[i], whole and read-write. All or nothing."""
        return self._show(addresses, frames, self._frames, False)

    def show_in_place(self, addresses: Addresses, slots: Slots, host: Arena) -> Done:
        """Map pages of `host` at page addresses: kernels read them over the link.

        For reading: whoever writes promotes the page first. All or nothing; `hide` as usual. One
        host arena a window.
        """
        if self._host is None:
            self._host = host
        if self._host is not host or host.slot_bytes != self.page_bytes:
            raise DriverError("window: one arena of host pages, of the device's page size")
        return self._show(addresses, slots, host, True)

    def _show(self, addresses: Addresses, slots: Slots, arena: Arena, in_place: bool) -> Done:
        with self._lock:
            where, pages = self._locate(addresses)
            self._refuse(where.handles[pages] != 0, addresses, "show something")
            self._refuse((slots < 0) | (slots >= arena.slots), slots, "are no slots")
            handles = arena.handles[slots]
            self._refuse(handles == 0, slots, "have no memory behind them")
            desc = arena.backing.access
            new = _Face(handles, desc.ctypes.data, len(desc) // 3)
            return self._change(where, pages, addresses, None, new, in_place)

    def hide(self, addresses: Addresses) -> Done:
        """Unmap the pages at these addresses, which all show something. All or nothing."""
        with self._lock:
            where, pages = self._locate(addresses)
            handles = where.handles[pages]
            self._refuse(handles == 0, addresses, "show nothing")
            return self._change(where, pages, addresses, self._face(where, pages), None, False)

    def _face(self, where: _Range, pages: Slots) -> _Face:
        """What pages show now, with the access that each kind of memory gets."""
        desc = self._frames.backing.access
        if self._host is None or not where.in_place[pages].any():
            return _Face(where.handles[pages], desc.ctypes.data, len(desc) // 3)
        there, in_place = self._host.backing.access, where.in_place[pages]
        at = np.where(in_place, there.ctypes.data, desc.ctypes.data).astype(np.uint64)
        count = np.where(in_place, len(there) // 3, len(desc) // 3).astype(np.uint64)
        return _Face(where.handles[pages], at, count)

    def _guards(self, n: int) -> _Face | None:
        if self._guard is None:
            return None
        handles = np.full(n, self._guard.handles[0], np.uint64)
        return _Face(handles, self._guard_desc.ctypes.data, 1)

    def _refuse(self, bad: Mask, items: Addresses | Slots, why: str) -> None:
        if bad.any():
            first = int(items[int(bad.argmax())])
            raise DriverError(
                f"window: {int(bad.sum())} of {len(items)} {why}, the first is {first:#x}"
            )

    def _refuse_closed(self) -> None:
        if self._closed:
            raise Closed("window: the device is closed")

    def _locate(self, addresses: Addresses) -> tuple[_Range, Slots]:
        """The reservation that holds all of a group, and the page numbers in it; settled."""
        self._refuse_closed()
        low, high = int(addresses.min()), int(addresses.max())
        index = int(np.searchsorted(self._starts, np.uint64(low), side="right")) - 1
        where = self._ranges[index] if index >= 0 else None
        if where is None or high >= where.address + where.nbytes:
            raise NotOurs(f"window: {low:#x} to {high:#x} lie in no one reservation of this device")
        pages, rest = np.divmod(addresses - np.uint64(where.address), np.uint64(self.page_bytes))
        self._refuse(rest != 0, addresses, "are not at a page's start")
        if len(pages) > 1 and len(np.unique(pages)) < len(pages):
            raise DriverError(f"window: an address stands twice in a group of {len(pages)}")
        numbers = pages.astype(np.int32)
        self._settle(numbers, where)
        return where, numbers

    def _settle(self, pages: Slots, where: _Range) -> None:
        """Take back what failed groups were to show; wait for groups that touch these pages."""
        for pending in list(self._pending):
            if (
                not pending.change.ready()
                and pending.where is where
                and np.isin(pages, pending.pages).any()
            ):
                pending.change.wait()
        while self._pending and self._pending[0].change.ready():
            ended = self._pending.popleft()
            if ended.change.error is not None:
                ended.where.handles[ended.pages] = ended.handles
                ended.where.in_place[ended.pages] = ended.in_place

    def _change(
        self,
        where: _Range,
        pages: Slots,
        addresses: Addresses,
        old: _Face | None,
        new: _Face | None,
        in_place: bool,
    ) -> Done:
        """Replace `old` by `new`, in the calling thread or queued. The lock is held."""
        before = where.handles[pages], where.in_place[pages]
        done: Done
        if len(pages) <= _INLINE and self._guard is None and self._queue.tick >= self._last:
            self._now(addresses, old, new)
            done = Finished()
        else:
            guard = self._guards(len(pages))
            done = self._submit(addresses, old or guard, new or guard)
            self._pending.append(_Pending(done, where, pages, *before))
        where.handles[pages] = 0 if new is None else new.handles
        where.in_place[pages] = in_place
        return done

    def _now(self, addresses: Addresses, old: _Face | None, new: _Face | None) -> None:
        """A group of a page or two, in the calling thread, without building a program."""
        call, size = self.context.driver.call, self.page_bytes
        undo: list[tuple[int, int, int, int]] = []
        face = old or new
        assert face is not None
        try:
            for n, (address, handle) in enumerate(
                zip(addresses.tolist(), face.handles.tolist(), strict=True)
            ):
                desc = face.desc if isinstance(face.desc, int) else int(face.desc[n])
                descs = face.descs if isinstance(face.descs, int) else int(face.descs[n])
                if old is not None:
                    call("cuMemUnmap", address, size)
                    undo.append((address, handle, desc, descs))
                else:
                    call("cuMemMap", address, size, 0, handle, 0)
                    undo.append((address, handle, desc, descs))
                    call("cuMemSetAccess", address, size, desc, descs)
        except CudaError:
            attempt = self.context.driver.attempt
            for address, handle, desc, descs in reversed(undo):
                if old is None:
                    attempt("cuMemUnmap", address, size)
                else:
                    attempt("cuMemMap", address, size, 0, handle, 0)
                    attempt("cuMemSetAccess", address, size, desc, descs)
            raise

    def _submit(self, addresses: Addresses, old: _Face | None, new: _Face | None) -> Change:
        rows: list[Calls] = []
        undo_rows: list[Calls] = []
        names: tuple[str, ...] = ()
        unmap = group(self._unmap, Kind.STATUS, addresses, self.page_bytes)
        if old is not None:
            # Undone from the back: mapped again first, then made accessible.
            rows += [group(self._nothing, Kind.PLAIN, addresses), unmap]
            undo_rows += [self._lets(addresses, old), self._maps(addresses, old)]
            names += ("abs", "cuMemUnmap")
        if new is not None:
            rows += [self._maps(addresses, new), self._lets(addresses, new)]
            undo_rows += [unmap, np.zeros_like(unmap)]
            names += ("cuMemMap", "cuMemSetAccess")
        ticket = self._queue.submit(Program(interleave(*rows), interleave(*undo_rows)))
        self._last = ticket.tick
        return Change(self.context, ticket, names)

    def _maps(self, addresses: Addresses, face: _Face) -> Calls:
        return group(self._map, Kind.STATUS, addresses, self.page_bytes, 0, face.handles, 0)

    def _lets(self, addresses: Addresses, face: _Face) -> Calls:
        return group(self._let, Kind.STATUS, addresses, self.page_bytes, face.desc, face.descs)

    # -- the end ------------------------------------------------------------------------------

    def close(self) -> None:
        """End what is queued, hide everything, give the addresses back; twice is fine."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        self._queue.close()
        attempt = self.context.driver.attempt
        with self.context:
            for where in self._ranges:
                self._settle(np.arange(len(where.handles), dtype=np.int32), where)
                pages = (
                    np.arange(len(where.handles))
                    if self._guard is not None
                    else np.flatnonzero(where.handles)
                )
                for page in pages.tolist():
                    attempt("cuMemUnmap", where.address + page * self.page_bytes, self.page_bytes)
                attempt("cuMemAddressFree", where.address, where.nbytes)
        self._ranges = []
        if self._guard is not None:
            self._guard.close()
