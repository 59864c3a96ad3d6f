"""Groups of page changes as native programs: the calls a page takes, and their undo rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from tiermem.gpu.driver import Context, Driver
from tiermem.gpu.streams import Gate
from tiermem.native import ALL, CALL, Calls, Kind, Program, Ticket, function, group
from tiermem.tier import Addresses, Mask

_PART: Final = 128  # rows filled at a time: NumPy keeps the interpreter lock below 500 elements

Column = npt.NDArray[np.uint64]


@dataclass(frozen=True, slots=True)
class Face:
    """What n addresses show or shall show: handles, and where their access descriptors are."""

    handles: Column
    desc: Column
    descs: Column


@dataclass(frozen=True, slots=True)
class Template:
    """The calls that one page takes, and their undo rows: unmap the old, map the new.

    Filling a copy a page costs a quarter of building the rows anew (120 to 30 us for 64 pages).
    """

    names: tuple[str, ...]
    rows: bytes
    undo: bytes
    before: bytes  # once a group, one call: shut the gate; undone by opening it
    after: bytes

    def program(self, addresses: Addresses, old: Face | None, new: Face | None) -> Program:
        n, k = len(addresses), len(self.rows) // CALL.itemsize
        # Bytes, because NumPy compares the fields of records that it joins, for 10 us each time.
        calls = np.frombuffer(bytearray(self.before + self.rows * n + self.after), CALL)
        nothing = bytes(len(self.after))
        backwards = np.frombuffer(bytearray(self.after + self.undo * n + nothing), CALL)
        middle = slice(
            len(self.before) // CALL.itemsize, len(calls) - len(self.after) // CALL.itemsize
        )
        rows, undo = calls[middle].reshape(n, k), backwards[middle].reshape(n, k)
        for first in range(0, n, _PART):
            part = slice(first, first + _PART)
            rows["entry"][part] = np.arange(first, min(first + _PART, n))[:, None]
            todo, back = rows["args"][part], undo["args"][part]
            todo[:, :, 0] = back[:, :, 0] = addresses[part, None]
            if old is not None:
                back[:, 0, 2], back[:, 0, 3] = old.desc[part], old.descs[part]
                back[:, 1, 3] = old.handles[part]
            if new is not None:
                todo[:, k - 2, 3] = new.handles[part]
                todo[:, k - 1, 2], todo[:, k - 1, 3] = new.desc[part], new.descs[part]
        return Program(calls, backwards)


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
        return Template(
            names,
            np.concatenate(rows).tobytes(),
            np.concatenate(undo).tobytes(),
            before.tobytes(),
            after.tobytes(),
        )

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

    __slots__ = ("_before", "_context", "_names", "_ticket", "tick")

    def __init__(self, context: Context, ticket: Ticket, template: Template) -> None:
        self._context = context
        self._ticket = ticket
        self._names = template.names
        self._before = len(template.before) // CALL.itemsize
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
