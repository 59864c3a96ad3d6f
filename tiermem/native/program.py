"""Calls in arrays, and programs of them that run in the calling thread."""

from __future__ import annotations

import ctypes
import os
from _ctypes import CFuncPtr
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import cast

import numpy as np
import numpy.typing as npt

from tiermem.native.library import Outcome, OutcomeArray, State, library
from tiermem.tier import Mask

ARGS = 9
CALL = np.dtype(
    [("fn", "u8"), ("args", "u8", (ARGS,)), ("result", "i8"), ("kind", "u4"), ("entry", "u4")]
)
"""One call: pointer, arguments, what it returned, its `Kind`, and which entry of the caller's
arrays it serves (`ALL` if every one). Must equal `call` in native.c."""

ALL = 0xFFFF_FFFF

_U64 = 0xFFFF_FFFF_FFFF_FFFF

Calls = npt.NDArray[np.void]
Word = npt.NDArray[np.uint64]
Argument = int | npt.NDArray[np.uint64] | npt.NDArray[np.int64]


class Kind(IntEnum):
    """How a call's failure looks."""

    STATUS = 0
    """returns int; not 0 is the error code (CUresult)"""
    INT = 1
    """returns int; -1 means errno"""
    POINTER = 2
    """returns a pointer or long; -1 means errno (mmap)"""
    PLAIN = 3
    """cannot fail; `result` keeps what it returned"""
    WAIT = 4
    """not a call: wait for a clock (`Clock.after`, `Ticket.after`)"""


@dataclass(frozen=True, slots=True)
class Failure:
    """Where and how a program ended early: calls before `index` took effect (unless undone)."""

    index: int
    code: int
    kind: Kind
    cancelled: bool = False

    def __str__(self) -> str:
        if self.cancelled:
            return "not run: its queue was closed, or an earlier program of it failed"
        name = f"status {self.code}" if self.kind is Kind.STATUS else os.strerror(self.code)
        return f"call {self.index} failed: {name}"


def group(fn: int, kind: Kind, *args: Argument, entries: Argument | None = None) -> Calls:
    """Calls of one function, columnwise: each argument is one integer, or one a call.

    n = the length of the longest argument (1 if all are integers). entries: which entry each call
    serves; call i serves entry i unless told.
    """
    if len(args) > ARGS:
        raise ValueError(f"{len(args)} arguments; a call takes up to {ARGS}")
    n = max((len(a) for a in args if isinstance(a, np.ndarray)), default=1)
    calls = np.zeros(n, CALL)
    calls["fn"] = fn
    calls["kind"] = kind
    calls["entry"] = np.arange(n, dtype=np.uint32) if entries is None else entries
    columns = calls["args"]
    for i, argument in enumerate(args):
        columns[:, i] = argument & _U64 if isinstance(argument, int) else argument
    return calls


def interleave(*groups: Calls) -> Calls:
    """Call 0 of each group, then call 1 of each, and so on; groups of equal length."""
    return np.stack(groups, axis=1).reshape(-1)


class Program:
    """An array of calls, ready to run; the array must not change until it has ended.

    undo: as many rows; if call i fails, rows i-1 ... 0 run (those whose fn is not 0).
    entries: length of the `failed` mask; by default one more than the largest entry.
    keep: whatever the calls point at, kept alive with the program.
    """

    __slots__ = ("call_at", "calls", "entries", "keep", "undo", "undo_at")

    def __init__(
        self,
        calls: Calls,
        undo: Calls | None = None,
        *,
        entries: int | None = None,
        keep: Sequence[object] = (),
    ) -> None:
        self.calls = np.ascontiguousarray(calls)
        self.undo = None if undo is None else np.ascontiguousarray(undo)
        for rows in (self.calls, self.undo):
            if rows is not None and (rows.dtype != CALL or len(rows) != len(calls)):
                raise ValueError(f"calls and undo: {CALL.itemsize}-byte rows, equally many")
        self.entries = entries
        self.keep = keep
        self.call_at = address(self.calls)
        self.undo_at = 0 if self.undo is None else address(self.undo)

    def run(self) -> Failure | None:
        """Run in the calling thread with the interpreter lock released."""
        return self._run(library().free.tm_run, True)

    def run_holding(self) -> Failure | None:
        """Run in the calling thread and keep the interpreter lock: for a few microseconds' work.

        A wait in it that is not over fails with EDEADLK: nobody could end it.
        """
        return self._run(library().held.tm_run, False)

    def _run(self, run: Callable[..., None], may_block: bool) -> Failure | None:
        out = Outcome()
        run(self.call_at, len(self.calls), self.undo_at, may_block, ctypes.addressof(out))
        return self.failure(out)

    def failure(self, out: OutcomeArray) -> Failure | None:
        """What an outcome says about this program; None if it succeeded or is pending."""
        state, index, code = out
        if state < State.FAILED:
            return None
        kind = Kind(int(self.calls["kind"][index])) if len(self.calls) else Kind.PLAIN
        signed = code - (1 << 64) if code >> 63 else code
        return Failure(index, signed, kind, state == State.CANCELLED)

    def failed(self, failure: Failure) -> Mask:
        """bool[entries]: entries served by the failing call or by any after it."""
        served = self.calls["entry"].astype(np.int64)
        named = served[served != ALL]
        n = self.entries if self.entries is not None else int(named.max(initial=-1)) + 1
        mask = np.zeros(n, np.bool_)
        rest = served[failure.index :] if not failure.cancelled else served
        if self.undo is not None or (rest == ALL).any():
            mask[:] = True
        mask[rest[rest < n]] = True
        return mask


_libc = ctypes.CDLL(None)


def function(name: str) -> int:
    """Address of a C library function, for `group`."""
    return pointer(_libc[name])


def pointer(fn: CFuncPtr) -> int:
    """Address of a ctypes function or callback; keep the callback alive while it may be called."""
    return ctypes.cast(fn, ctypes.c_void_p).value or 0


def address(array: npt.NDArray[np.generic]) -> int:
    """Where a writable contiguous array's bytes are; 0 if it is empty.

    A tenth of the cost of `array.__array_interface__` for structured rows (4.3 us, 2-core).
    """
    if not len(array):
        return 0
    # An array is a buffer; its annotations say so from Python 3.12 on only.
    return ctypes.addressof(ctypes.c_char.from_buffer(cast("memoryview", array)))
