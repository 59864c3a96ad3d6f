"""The window: which frame each reserved address shows, changed by groups of driver calls.

A group is one native program with an undo row for every call, so it happens whole or not at all.
Groups run in order on one thread of the window's own, without the interpreter lock; a page or two
are shown by the calling thread when nothing is queued, because a hand-over would cost more than
the 22 us a page that the driver asks (bench gpu_floor, H200, 2026-11).

Handles are in Python lists on purpose, and looked up with `map`: NumPy gives the interpreter lock
away in sorts and fancy indexing even of 64 elements, and beside a busy thread it comes back 5 ms
later. Arithmetic on so few keeps it.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

import numpy as np

from tiermem.errors import Closed, DriverError, NotOurs, PageInUse
from tiermem.gpu.changes import Change, Face, Templates
from tiermem.gpu.driver import RELAXED, Context, CudaError
from tiermem.gpu.frames import Arena, access, reserve
from tiermem.gpu.routine import A, B, C, D, Routine
from tiermem.gpu.streams import Gate, Signal
from tiermem.native import Kind, Program, Queue, group
from tiermem.tier import Addresses, Done, Finished, Slots

log = logging.getLogger(__name__)

_INLINE: Final = 2  # pages at most that the calling thread shows itself: 72 us with the lock held
_GUARDS: Final = 4096  # guard pages shown by one program
_READ: Final = 1
_IN_PLACE: Final = 1  # a kind of memory, besides frames: 0


class _Range:
    """One reservation; for each page: the handle it shows (0 is nothing, guards do not count),
    whether that is a host page in place, and the last queued group that changes the page."""

    __slots__ = ("address", "handles", "in_place", "nbytes", "ticks")

    def __init__(self, address: int, nbytes: int, page_bytes: int) -> None:
        n = nbytes // page_bytes
        self.address = address
        self.nbytes = nbytes
        self.handles = [0] * n
        self.in_place = bytearray(n)
        self.ticks = [0] * n


@dataclass(frozen=True, slots=True)
class _Pending:
    """A queued group and what its pages showed before, should it fail."""

    change: Change
    where: _Range
    pages: list[int]
    handles: list[int]
    in_place: list[int]


class CudaWindow:
    """Shows frames at reserved addresses; see `tier.Window`.

    Refuses, before any driver call: addresses outside our reservations or not at a page's start,
    a page that already shows something (show) or shows nothing (hide), a frame without memory.
    guard: addresses that show nothing map one shared page, so that a stray read is not fatal; it
    doubles the cost of a steal, and `reserve` takes 25 us a page (FACTS, H200).
    """

    def __init__(
        self, context: Context, frames: Arena, gate: Gate, ended: Signal, *, guard: bool = False
    ) -> None:
        """ended: is to count the groups that have ended; its word outlives the window."""
        self.context = context
        self.page_bytes = frames.slot_bytes
        self._size = np.uint64(frames.slot_bytes)
        self._frames = frames
        self._ranges: list[_Range] = []
        self._lock = threading.Lock()
        self._closed = False
        self._pending: deque[_Pending] = deque()
        self._last = 0
        self._gate = gate
        # Behind a failed group kernels would read the guard page, and nobody would know in time.
        self._ended = None if guard else ended
        self._templates = Templates(context.driver, self.page_bytes, gate)
        driver = context.driver
        mode = np.array([RELAXED], np.uint32)
        current = group(driver.address("cuCtxSetCurrent"), Kind.STATUS, context.handle)
        relax = driver.address("cuThreadExchangeStreamCaptureMode")
        relaxed = group(relax, Kind.STATUS, mode.ctypes.data)
        setup = Program(np.concatenate([current, relaxed]), keep=(mode,))
        self._queue = Queue("tiermem-window", setup=setup, word=ended.word)
        self._descs = (frames.backing.access, access(context.device, flags=_READ))
        # Of a frame, and of a page in place: where its descriptors are, and how many.
        self._access = [(desc.ctypes.data, len(desc) // 3) for desc in self._descs]
        size = self.page_bytes
        unmap, access_it = ("cuMemUnmap", A, size), ("cuMemSetAccess", A, size, C, D)
        shown = (("cuMemMap", A, size, 0, B, 0), access_it)
        self._map_one = Routine(context, shown, (unmap, None))
        self._unmap_one = Routine(context, (unmap,))
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
        where = _Range(address, nbytes, self.page_bytes)
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
            self._settle(where, range(len(where.handles)))
            if shown := sum(1 for handle in where.handles if handle):
                raise PageInUse(f"release: {shown} pages of {address:#x} are still shown")
            self._ranges = [r for r in self._ranges if r is not where]
        self._swap_guards(where, show=False)
        self._free(where)

    def _free(self, where: _Range) -> None:
        with self.context:
            self.context.driver.call("cuMemAddressFree", where.address, where.nbytes)

    def _swap_guards(self, where: _Range, *, show: bool) -> None:
        """Show or hide the guard page at every address of a reservation without frames."""
        for first in range(0, len(where.handles) if self._guard else 0, _GUARDS):
            part = np.arange(first, min(first + _GUARDS, len(where.handles)), dtype=np.uint64)
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
        with self._lock:
            if self._inline(len(addresses)):
                with self._gate:
                    return self._show_now(addresses.tolist(), slots.tolist(), arena, in_place)
            where, pages = self._locate(addresses)
            before = list(map(where.handles.__getitem__, pages))
            if any(before):
                self._refuse(before, addresses, "show something")
            numbers = slots.tolist()
            if min(numbers) < 0 or max(numbers) >= arena.slots:
                raise DriverError(f"window: slots {min(numbers)}..{max(numbers)} of {arena.slots}")
            handles = list(map(arena.handles.__getitem__, numbers))
            if not all(handles):
                bad = [not handle for handle in handles]
                self._refuse(bad, slots, "have no memory behind them")
            return self._change(where, pages, addresses, before, handles, in_place)

    def hide(self, addresses: Addresses) -> Done:
        """Unmap the pages at these addresses, which all show something. All or nothing."""
        with self._lock:
            if self._inline(len(addresses)):
                return self._hide_now(addresses.tolist())
            where, pages = self._locate(addresses)
            before = list(map(where.handles.__getitem__, pages))
            if not all(before):
                self._refuse([not handle for handle in before], addresses, "show nothing")
            return self._change(where, pages, addresses, before, None, False)

    def _face(self, handles: list[int], in_place: list[int]) -> Face | None:
        """Handles with the access that each kind of memory gets; None where they show nothing."""
        n, kind = len(handles), in_place[0]
        if not handles[0]:
            return self._guards(n)
        at, count = self._access[kind]
        if in_place.count(kind) == n:
            descs = np.full(n, at, np.uint64), np.full(n, count, np.uint64)
        else:
            rows = np.array([self._access[kind] for kind in in_place], np.uint64)
            descs = rows[:, 0], rows[:, 1]
        return Face(np.array(handles, np.uint64), *descs)

    def _guards(self, n: int) -> Face | None:
        if self._guard is None:
            return None
        at, count = self._access[_IN_PLACE]
        handles = np.full(n, self._guard.handles[0], np.uint64)
        return Face(handles, np.full(n, at, np.uint64), np.full(n, count, np.uint64))

    def _refuse(self, bad: list[int] | list[bool], items: Addresses | Slots, why: str) -> None:
        first = next(n for n, is_bad in enumerate(bad) if is_bad)
        many = sum(1 for is_bad in bad if is_bad)
        raise DriverError(
            f"window: {many} of {len(items)} {why}, the first is {int(items[first]):#x}"
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

    def _locate(self, addresses: Addresses) -> tuple[_Range, list[int]]:
        """The reservation that holds all of a group, and the page numbers in it; settled.

        An address that stands twice in a group is left to the driver, which refuses it.
        """
        low, high = int(addresses.min()), int(addresses.max())
        where, _ = self._find(low)
        if high >= where.address + where.nbytes:
            raise NotOurs(f"window: {high:#x} is not in the reservation of {where.address:#x}")
        numbers, beyond = np.divmod(addresses - np.uint64(where.address), self._size)
        if beyond.any():
            self._refuse(beyond.tolist(), addresses, "are not at a page's start")
        pages: list[int] = numbers.tolist()
        self._settle(where, pages)
        return where, pages

    def _settle(self, where: _Range, pages: Sequence[int]) -> None:
        """Wait for queued groups that change these pages; take back what failed groups did not."""
        if self._pending:
            self._queue.wait(max(map(where.ticks.__getitem__, pages)))
            self._reap()

    def _reap(self) -> None:
        while self._pending and self._pending[0].change.tick <= self._queue.tick:
            ended = self._pending.popleft()
            ended.change.wait()
            if ended.change.error is not None:
                for page, handle, kind in zip(
                    ended.pages, ended.handles, ended.in_place, strict=True
                ):
                    ended.where.handles[page] = handle
                    ended.where.in_place[page] = kind

    def _change(
        self,
        where: _Range,
        pages: list[int],
        addresses: Addresses,
        before: list[int],
        handles: list[int] | None,
        in_place: bool,
    ) -> Change:
        """Queue the replacement of what pages show by `handles` (None: nothing); lock held."""
        after = handles or [0] * len(pages)
        were = list(map(where.in_place.__getitem__, pages))
        kinds = [int(in_place)] * len(pages)
        change = self._submit(addresses, self._face(before, were), self._face(after, kinds))
        self._pending.append(_Pending(change, where, pages, before, were))
        shown, kinds_of, ticks, tick = where.handles, where.in_place, where.ticks, change.tick
        for page, handle in zip(pages, after, strict=True):
            shown[page] = handle
            kinds_of[page] = in_place
            ticks[page] = tick
        return change

    def _submit(self, addresses: Addresses, old: Face | None, new: Face | None) -> Change:
        template = self._templates.get(old=old is not None, new=new is not None)
        ticket = self._queue.submit(template.program(addresses, old, new))
        self._last = ticket.tick
        return Change(self.context, ticket, template, self._ended)

    # -- a page or two, in the calling thread ----------------------------------------------------

    def _inline(self, n: int) -> bool:
        """True if a group of n may run here: it is small and everything queued has ended."""
        self._refuse_closed()
        if not n:
            return True
        if n > _INLINE or self._guard is not None or self._queue.tick < self._last:
            return False
        self._reap()
        return True

    def _show_now(
        self, addresses: list[int], slots: list[int], arena: Arena, in_place: bool
    ) -> Done:
        found = [self._find(address) for address in addresses]
        for (where, page), slot, address in zip(found, slots, addresses, strict=True):
            if where.handles[page]:
                raise DriverError(f"window: {address:#x} shows something")
            if not 0 <= slot < arena.slots or not arena.handles[slot]:
                raise DriverError(f"window: slot {slot} has no memory behind it")
        for n, (address, slot) in enumerate(zip(addresses, slots, strict=True)):
            try:
                self._map_one.run(address, arena.handles[slot], *self._access[in_place])
            except CudaError:
                for shown in addresses[:n]:
                    self._undo(self._unmap_one, shown)
                raise
        for (where, page), slot in zip(found, slots, strict=True):
            where.handles[page] = arena.handles[slot]
            where.in_place[page] = in_place
        return Finished()

    def _hide_now(self, addresses: list[int]) -> Done:
        found = [self._find(address) for address in addresses]
        for (where, page), address in zip(found, addresses, strict=True):
            if not where.handles[page]:
                raise DriverError(f"window: {address:#x} shows nothing")
        for n, address in enumerate(addresses):
            try:
                self._unmap_one.run(address)
            except CudaError:
                for (where, page), hidden in zip(found[:n], addresses[:n], strict=True):
                    desc = self._access[where.in_place[page]]
                    self._undo(self._map_one, hidden, where.handles[page], *desc)
                raise
        for where, page in found:
            where.handles[page] = 0
            where.in_place[page] = False
        return Finished()

    @staticmethod
    def _undo(routine: Routine, *values: int) -> None:
        """Take back what can be taken back; the caller raises why."""
        with suppress(CudaError):
            routine.run(*values)

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
                self._reap()
                for page, handle in enumerate(where.handles):
                    if handle or self._guard is not None:
                        address = where.address + page * self.page_bytes
                        attempt("cuMemUnmap", address, self.page_bytes)
                attempt("cuMemAddressFree", where.address, where.nbytes)
        self._ranges = []
        if self._guard is not None:
            self._guard.close()
