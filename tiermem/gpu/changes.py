"""Groups of page changes as native programs: the calls a page takes, and their undo rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from tiermem.gpu.driver import Context, Driver
from tiermem.gpu.streams import Gate, Signal
from tiermem.native import ALL, CALL, Calls, Kind, Program, Ticket, function, group
from tiermem.tier import Addresses, Mask

_WORDS: Final = CALL.itemsize // 8  # of one call: the function, then its arguments, then the rest
_ARG_0: Final = 1
_PART: Final = 128  # rows filled at a time: NumPy keeps the interpreter lock below 500 elements

Column = npt.NDArray[np.uint64]


@dataclass(frozen=True, slots=True)
class Face:
    """What n addresses show or shall show: handles, and where their access descriptors are."""

    handles: Column
    desc: Column
    descs: Column


class Template:
    """The calls that one page takes, and their undo rows: unmap the old, map the new.

    Filling a copy is a quarter of building the rows anew (120 to 30 us for 64 pages), and a third
    of that where the last group was as large: its rows are kept.
    """

    def __init__(
        self, names: tuple[str, ...], rows: Calls, undo: Calls, before: Calls, after: Calls
    ) -> None:
        """names: of the calls a page. before, after: once a group, a call each or none: shut the
        gate, undone by opening it."""
        self.names = names
        self.before = len(before)
        self._rows, self._undo = rows, undo
        self._around = before, after
        self._n = 0
        self._made = (b"", b"")

    def program(self, addresses: Addresses, old: Face | None, new: Face | None) -> Program:
        n, k = len(addresses), len(self.names)
        if n != self._n:
            self._n, self._made = n, self._make(n)
        calls, backwards = (np.frombuffer(bytearray(made), np.uint64) for made in self._made)
        middle = slice(self.before * _WORDS, (self.before + n * k) * _WORDS)
        todo, undo = calls[middle].reshape(n, k, _WORDS), backwards[middle].reshape(n, k, _WORDS)
        for first in range(0, n, _PART):
            part = slice(first, first + _PART)
            now, back = todo[part], undo[part]
            now[:, :, _ARG_0] = back[:, :, _ARG_0] = addresses[part, None]
            if old is not None:
                back[:, 0, _ARG_0 + 2], back[:, 0, _ARG_0 + 3] = old.desc[part], old.descs[part]
                back[:, 1, _ARG_0 + 3] = old.handles[part]
            if new is not None:
                now[:, k - 2, _ARG_0 + 3] = new.handles[part]
                now[:, k - 1, _ARG_0 + 2] = new.desc[part]
                now[:, k - 1, _ARG_0 + 3] = new.descs[part]
        return Program(calls.view(CALL), backwards.view(CALL))

    def _make(self, n: int) -> tuple[bytes, bytes]:
        """The calls of a group of n and their undo rows, all but what the pages show."""
        (before, after), k = self._around, len(self.names)
        rows = np.tile(self._rows, n)
        rows["entry"] = np.repeat(np.arange(n), k)
        calls = np.concatenate([before, rows, after])
        undo = np.concatenate([after, np.tile(self._undo, n), np.zeros_like(after)])
        return calls.tobytes(), undo.tobytes()


class Templates:
    """The templates of a page size, made when they are first needed."""

    def __init__(self, driver: Driver, page_bytes: int, gate: Gate) -> None:
        self._page_bytes = page_bytes
        self._gate = gate
        self._nothing = function("abs")  # a call that does nothing, to carry an undo row
        self._map = driver.address("cuMemMap")
        self._let = driver.address("cuMemSetAccess")
        self._unmap = driver.address("cuMemUnmap")
        self._made: dict[tuple[bool, bool], Template] = {}

    def get(self, *, old: bool, new: bool) -> Template:
        """The calls that hide a page (old), show one (new), or put one in another's place."""
        found = self._made.get((old, new))
        if found is None:
            found = self._made[old, new] = self._make(old, new)
        return found

    def _make(self, old: bool, new: bool) -> Template:
        size = self._page_bytes
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
        before, after = self._gates() if new else (np.zeros(0, CALL), np.zeros(0, CALL))
        return Template(names, np.concatenate(rows), np.concatenate(undo), before, after)

    def _gates(self) -> tuple[Calls, Calls]:
        """One call that shuts the gate and one that opens it."""
        gate, copy = self._gate, function("memcpy")
        shut, open_ = gate.shut_value.ctypes.data, gate.open_value.ctypes.data
        return (
            group(copy, Kind.PLAIN, gate.address, shut, 8, entries=ALL),
            group(copy, Kind.PLAIN, gate.address, open_, 8, entries=ALL),
        )


class Change:
    """A group on its way: a `Done` whose error names the call and the page."""

    __slots__ = ("_before", "_context", "_ended", "_names", "_ticket", "tick")

    def __init__(
        self, context: Context, ticket: Ticket, template: Template, ended: Signal | None
    ) -> None:
        """ended: counts the groups that have ended; None where no stream may go by that."""
        self._context = context
        self._ended = ended
        self._ticket = ticket
        self._names = template.names
        self._before = template.before
        self.tick = ticket.tick

    @property
    def error(self) -> Exception | None:
        failure = self._ticket.failure
        if failure is None or failure.cancelled:
            return self._ticket.error
        page, row = divmod(failure.index - self._before, len(self._names))
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

    def order(self, stream: int | None) -> None:
        """Make `stream` wait until the group has ended; without a count the caller waits.

        If it fails, kernels behind it find no page there and the device is lost.
        """
        if self._ended is None:
            self.wait()
        elif not self.ready():
            self._ended.order(stream, self.tick)
