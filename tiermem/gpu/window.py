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
from tiermem.native import CALL, Calls, Kind, Program, Queue, Ticket, function, group
from tiermem.tier import Addresses, Done, Finished, Mask, Slots

log = logging.getLogger(__name__)

_INLINE: Final = 2  # pages at most that the calling thread shows itself: 72 us with the lock held
_GUARDS: Final = 4096  # guard pages shown by one program
_READ: Final = 1

Descs = npt.NDArray[np.uint32]
Column = int | npt.NDArray[np.uint64]  # one value for a whole group, or one a page


@dataclass(slots=True)
class _Range:
    """One reservation. handles[p] is what page p shows, 0 for nothing; guards do not count.

    ticks[p] is the last queued group that changes page p.
    """

    address: int
    nbytes: int
    handles: Handles
    in_place: Mask
    ticks: npt.NDArray[np.uint64]


@dataclass(frozen=True, slots=True)
class _Face:
    """What n addresses show or shall show: handles, and where their access descriptors are."""

    handles: Handles
    desc: Column
    descs: Column


@dataclass(frozen=True, slots=True)
class _Template:
    """The calls that one page takes, and their undo rows: unmap the old, map the new.

    Filling a copy a page costs a quarter of building the rows anew (120 to 30 us for 64 pages).
    """

    names: tuple[str, ...]
    rows: Calls
    undo: Calls

    def program(self, addresses: Addresses, old: _Face | None, new: _Face | None) -> Program:
        n, k = len(addresses), len(self.rows)
        rows, undo = np.empty((n, k), CALL), np.empty((n, k), CALL)
        rows[:], undo[:] = self.rows, self.undo
        rows["entry"] = np.arange(n, dtype=np.uint32)[:, None]
        todo, back = rows["args"], undo["args"]
        todo[:, :, 0] = back[:, :, 0] = addresses[:, None]
        if old is not None:
            back[:, 0, 2], back[:, 0, 3] = old.desc, old.descs
            back[:, 1, 3] = old.handles
        if new is not None:
            todo[:, k - 2, 3] = new.handles
            todo[:, k - 1, 2], todo[:, k - 1, 3] = new.desc, new.descs
        return Program(rows.reshape(-1), undo.reshape(-1))


class Change:
    """A group on its way: a `Done` whose error names the call and the page."""

    __slots__ = ("_context", "_names", "_ticket", "tick")

    def __init__(self, context: Context, ticket: Ticket, names: tuple[str, ...]) -> None:
        self._context = context
        self._ticket = ticket
        self._names = names
        self.tick = ticket.tick

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
        self._ranges: list[_Range] = []
        self._lock = threading.Lock()
        self._closed = False
        self._pending: deque[_Pending] = deque()
        self._last = 0
        driver = context.driver
        self._nothing = function("abs")  # a call that does nothing, to carry an undo row
        self._map = driver.address("cuMemMap")
        self._let = driver.address("cuMemSetAccess")
        self._unmap = driver.address("cuMemUnmap")
        self._templates: dict[tuple[bool, bool], _Template] = {}
        setup = Program(group(driver.address("cuCtxSetCurrent"), Kind.STATUS, context.handle))
        self._queue = Queue("tiermem-window", setup=setup)
        self._desc = frames.backing.access
        self._in_place_desc = access(context.device, flags=_READ)
        self._guard_desc = self._in_place_desc
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
        where = _Range(
            address, nbytes, np.zeros(n, np.uint64), np.zeros(n, np.bool_), np.zeros(n, np.uint64)
        )
        try:
            self._swap_guards(where, show=True)
        except DriverError:
            self._free(where)
            raise
        with self._lock:
            self._ranges = [*self._ranges, where]
        return address

    def release(self, address: int, nbytes: int) -> None:
        """Give a reservation back; raises PageInUse while it shows something."""
        with self._lock:
            where = next((r for r in self._ranges if r.address == address), None)
            if where is None or where.nbytes != nbytes:
                raise NotOurs(f"release: {address:#x} + {nbytes} is no reservation of this device")
            self._settle(where, slice(None))
            if shown := int(np.count_nonzero(where.handles)):
                raise PageInUse(f"release: {shown} pages of {address:#x} are still shown")
            self._ranges = [r for r in self._ranges if r is not where]
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

        For reading: a kernel that writes there loses the device, so whoever writes promotes the
        page first. All or nothing; `hide` as usual.
        """
        if host.slot_bytes != self.page_bytes:
            raise DriverError(
                f"window: host pages of {host.slot_bytes} bytes, device pages of {self.page_bytes}"
            )
        return self._show(addresses, slots, host, True)

    def _show(self, addresses: Addresses, slots: Slots, arena: Arena, in_place: bool) -> Done:
        desc = self._in_place_desc if in_place else arena.backing.access
        with self._lock:
            if self._inline(len(addresses)):
                return self._show_now(addresses.tolist(), slots.tolist(), arena, desc, in_place)
            where, pages = self._locate(addresses)
            self._refuse(where.handles[pages] != 0, addresses, "show something")
            self._refuse((slots < 0) | (slots >= arena.slots), slots, "are no slots")
            handles = arena.handles[slots]
            self._refuse(handles == 0, slots, "have no memory behind them")
            new = _Face(handles, desc.ctypes.data, len(desc) // 3)
            return self._change(where, pages, addresses, None, new, in_place)

    def hide(self, addresses: Addresses) -> Done:
        """Unmap the pages at these addresses, which all show something. All or nothing."""
        with self._lock:
            if self._inline(len(addresses)):
                return self._hide_now(addresses.tolist())
            where, pages = self._locate(addresses)
            face = self._face(where, pages)
            self._refuse(face.handles == 0, addresses, "show nothing")
            return self._change(where, pages, addresses, face, None, False)

    def _face(self, where: _Range, pages: Slots) -> _Face:
        """What pages show now, with the access that each kind of memory gets."""
        desc = self._frames.backing.access
        handles, in_place = where.handles[pages], where.in_place[pages]
        if not in_place.any():
            return _Face(handles, desc.ctypes.data, len(desc) // 3)
        there = self._in_place_desc
        at = np.where(in_place, there.ctypes.data, desc.ctypes.data).astype(np.uint64)
        count = np.where(in_place, len(there) // 3, len(desc) // 3).astype(np.uint64)
        return _Face(handles, at, count)

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

    def _find(self, address: int) -> tuple[_Range, int]:
        """The reservation that holds an address, and the page number in it."""
        for where in self._ranges:
            offset = address - where.address
            if 0 <= offset < where.nbytes:
                page, rest = divmod(offset, self.page_bytes)
                if rest:
                    raise DriverError(f"window: {address:#x} is not at a page's start")
                return where, page
        raise NotOurs(f"window: {address:#x} lies in no reservation of this device")

    # -- groups, queued -----------------------------------------------------------------------

    def _locate(self, addresses: Addresses) -> tuple[_Range, Slots]:
        """The reservation that holds all of a group, and the page numbers in it; settled.

        An address that stands twice in a group is left to the driver, which refuses it.
        """
        self._refuse_closed()
        high = int(addresses.max())
        where, _ = self._find(int(addresses.min()))
        if high >= where.address + where.nbytes:
            raise NotOurs(f"window: {high:#x} is not in the reservation of {where.address:#x}")
        pages, rest = np.divmod(addresses - np.uint64(where.address), np.uint64(self.page_bytes))
        self._refuse(rest != 0, addresses, "are not at a page's start")
        numbers = pages.astype(np.int32)
        self._settle(where, numbers)
        return where, numbers

    def _settle(self, where: _Range, pages: Slots | slice) -> None:
        """Wait for queued groups that change these pages; take back what failed groups did not."""
        if self._pending:
            self._queue.wait(int(where.ticks[pages].max()))
            self._reap()

    def _reap(self) -> None:
        while self._pending and self._pending[0].change.tick <= self._queue.tick:
            ended = self._pending.popleft()
            ended.change.wait()
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
    ) -> Change:
        """Queue the replacement of `old` by `new`. The lock is held."""
        before = where.handles[pages], where.in_place[pages]
        guard = self._guards(len(pages))
        change = self._submit(addresses, old or guard, new or guard)
        self._pending.append(_Pending(change, where, pages, *before))
        where.handles[pages] = 0 if new is None else new.handles
        where.in_place[pages] = in_place
        where.ticks[pages] = change.tick
        return change

    def _submit(self, addresses: Addresses, old: _Face | None, new: _Face | None) -> Change:
        key = old is not None, new is not None
        template = self._templates.get(key)
        if template is None:
            template = self._templates[key] = self._template(*key)
        ticket = self._queue.submit(template.program(addresses, old, new))
        self._last = ticket.tick
        return Change(self.context, ticket, template.names)

    def _template(self, old: bool, new: bool) -> _Template:
        size = self.page_bytes
        unmap = group(self._unmap, Kind.STATUS, 0, size)
        shown = group(self._map, Kind.STATUS, 0, size, 0, 0, 0)
        let = group(self._let, Kind.STATUS, 0, size, 0, 0)
        names: tuple[str, ...] = ()
        rows: list[Calls] = []
        undo: list[Calls] = []
        if old:
            # Undone from the back: mapped again first, then made accessible.
            names += ("abs", "cuMemUnmap")
            rows += [group(self._nothing, Kind.PLAIN, 0), unmap]
            undo += [let, shown]
        if new:
            names += ("cuMemMap", "cuMemSetAccess")
            rows += [shown, let]
            undo += [unmap, np.zeros_like(unmap)]
        return _Template(names, np.concatenate(rows), np.concatenate(undo))

    # -- a page or two, in the calling thread ----------------------------------------------------

    def _inline(self, n: int) -> bool:
        """True if a group of n may run here: it is small and everything queued has ended."""
        self._refuse_closed()
        if n > _INLINE or self._guard is not None or self._queue.tick < self._last:
            return False
        self._reap()
        return True

    def _show_now(
        self, addresses: list[int], slots: list[int], arena: Arena, desc: Descs, in_place: bool
    ) -> Done:
        call, size = self.context.driver.call, self.page_bytes
        found = [self._find(address) for address in addresses]
        for (where, page), slot, address in zip(found, slots, addresses, strict=True):
            if where.handles[page]:
                raise DriverError(f"window: {address:#x} shows something")
            if not 0 <= slot < arena.slots or not arena.handles[slot]:
                raise DriverError(f"window: slot {slot} has no memory behind it")
        handles = [int(arena.handles[slot]) for slot in slots]
        mapped: list[int] = []
        try:
            for address, handle in zip(addresses, handles, strict=True):
                call("cuMemMap", address, size, 0, handle, 0)
                mapped.append(address)
                call("cuMemSetAccess", address, size, desc.ctypes.data, len(desc) // 3)
        except CudaError:
            for address in mapped:
                self.context.driver.attempt("cuMemUnmap", address, size)
            raise
        for (where, page), handle in zip(found, handles, strict=True):
            where.handles[page] = handle
            where.in_place[page] = in_place
        return Finished()

    def _hide_now(self, addresses: list[int]) -> Done:
        driver, size = self.context.driver, self.page_bytes
        found = [self._find(address) for address in addresses]
        for (where, page), address in zip(found, addresses, strict=True):
            if not where.handles[page]:
                raise DriverError(f"window: {address:#x} shows nothing")
        for n, address in enumerate(addresses):
            code = driver.attempt("cuMemUnmap", address, size)
            if code:
                for (where, page), hidden in zip(found[:n], addresses[:n], strict=True):
                    desc = self._in_place_desc if where.in_place[page] else self._desc
                    at, count = desc.ctypes.data, len(desc) // 3
                    driver.attempt("cuMemMap", hidden, size, 0, int(where.handles[page]), 0)
                    driver.attempt("cuMemSetAccess", hidden, size, at, count)
                raise driver.error("cuMemUnmap", code, f"page {n} of {len(addresses)}, all undone")
        for where, page in found:
            where.handles[page] = 0
            where.in_place[page] = False
        return Finished()

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
                self._settle(where, slice(None))
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
