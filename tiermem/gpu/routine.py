"""A few driver calls that the calling thread makes in one go, with the context current.

A call from Python costs 1 us besides what the driver does, and making the context current and
leaving it again is four of them: of the 75 us of one page faulted in, 33 calls took 30 (2-core, a
stand-in driver whose calls do nothing). A routine is one call: a native program made once, into
which each run writes its values. It keeps the interpreter lock.
"""

from __future__ import annotations

import ctypes
from typing import Final

import numpy as np

from tiermem.gpu.driver import RELAXED, Context, CudaError
from tiermem.native import CALL, Calls, Kind, Program, State, group
from tiermem.native.library import Outcome, library

_UNCHECKED: Final = ("cuThreadExchangeStreamCaptureMode", "cuCtxPopCurrent")
_WORDS: Final = CALL.itemsize // 8  # of one call: the function, then its arguments, then the rest


class Value(int):
    """An argument that each run is given: the position among what `Routine.run` takes."""


A, B, C, D = (Value(i) for i in range(4))

Step = tuple[str | int, ...]
"""A driver call by its name, and its arguments: numbers, or `A`, `B`, `C`, `D`."""

_Hole = tuple[memoryview, int, int]
"""Where one value of a run belongs: the words of the calls, which of them, which value."""


class Routine:
    """Driver calls in order, as in a `with context:` block; by one thread at a time.

    undo: for each step what takes it back, or None. When a step fails, those before it are taken
    back, the last first. What arguments point at is kept alive by whoever made the routine.
    """

    __slots__ = ("_context", "_holes", "_names", "_out", "_program", "_run", "_what")

    def __init__(
        self, context: Context, steps: tuple[Step, ...], undo: tuple[Step | None, ...] = ()
    ) -> None:
        mode, popped = np.array([RELAXED], np.uint64), np.zeros(1, np.uint64)
        # Twice exchanged, the mode is as it was, and the word says RELAXED again.
        exchange: Step = ("cuThreadExchangeStreamCaptureMode", mode.ctypes.data)
        push: Step = ("cuCtxPushCurrent", context.handle)
        pop: Step = ("cuCtxPopCurrent", popped.ctypes.data)
        forth = (push, exchange, *steps, exchange, pop)
        back = (pop, exchange, *(undo or (None,) * len(steps)), None, None)
        calls, undone = (np.concatenate([_row(context, step) for step in s]) for s in (forth, back))
        self._context = context
        self._names = [str(step[0]) for step in forth if step is not None]
        self._program = Program(calls, undone, keep=(mode, popped))
        self._holes = _holes(forth, calls) + _holes(back, undone)
        self._out = Outcome()
        out = ctypes.addressof(self._out)
        self._what = (self._program.call_at, len(forth), self._program.undo_at, 0, out)
        self._run = library().held.tm_run

    def run(self, *values: int) -> None:
        """Make the calls; values: for `A`, `B` and so on. Raises CudaError as `Driver.call`."""
        for words, at, which in self._holes:
            words[at] = values[which]
        self._context.driver.refuse_forked(self._names[2])
        self._run(*self._what)
        if self._out[0] != State.OK:
            raise self._error()

    def _error(self) -> CudaError:
        failure = self._program.failure(self._out)
        assert failure is not None, "a program that ended neither well nor in failure"
        return self._context.driver.error(self._names[failure.index], failure.code)


def _row(context: Context, step: Step | None) -> Calls:
    if step is None:
        return np.zeros(1, CALL)
    name, *arguments = step
    kind = Kind.PLAIN if name in _UNCHECKED else Kind.STATUS
    return group(context.driver.address(str(name)), kind, *(int(a) for a in arguments))


def _holes(steps: tuple[Step | None, ...], rows: Calls) -> list[_Hole]:
    words = rows.view(np.uint64).data
    return [
        (words, row * _WORDS + column, int(argument))
        for row, step in enumerate(steps)
        for column, argument in enumerate(step or ())
        if isinstance(argument, Value)
    ]
