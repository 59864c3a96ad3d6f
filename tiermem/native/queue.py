"""Clocks, and queues of native threads that run programs and count them on a clock."""

from __future__ import annotations

import ctypes
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable

from tiermem.errors import Closed, DriverError
from tiermem.native.library import Outcome, OutcomeArray, State, generation, library
from tiermem.native.program import (
    ALL,
    Calls,
    Failure,
    Kind,
    Program,
    Word,
    address,
    group,
)
from tiermem.tier import Mask

_SLICE_S = 0.2
"""Longest native wait in one piece, so that the main thread still sees Ctrl-C."""
_EDEADLK = 35
_EXIT_S = 5.0
"""How long the end of the process waits for a queue whose running call does not return."""


_FORKED = (
    "this queue or ticket belongs to the parent process: its threads do not exist after a fork; "
    "open a space of your own in the child, or start children with the spawn method"
)

Explain = Callable[[Failure], Exception]
_Running = deque[tuple[OutcomeArray, Program]]
"""What threads may still read: outcome and program of each submission, oldest first."""


class Ticket:
    """One submitted program: a `Done`."""

    __slots__ = (
        "_clock",
        "_error",
        "_explain",
        "_fenced",
        "_out",
        "patience_s",
        "program",
        "tick",
    )

    def __init__(self, clock: Clock, program: Program, explain: Explain) -> None:
        self.program = program
        self.tick = 0
        self.patience_s = 0.0
        self._clock = clock
        self._explain = explain
        self._out = Outcome()
        self._error: Exception | None = None
        self._fenced = False

    def ready(self) -> bool:
        """True once the program has ended in success, failure or cancellation. Reads one word."""
        if self._out[0] == State.PENDING:
            if self._clock.foreign:
                raise DriverError(_FORKED)
            return False
        if not self._fenced:
            # What the thread did before it stored the state is now seen here on any processor.
            library().held.tm_fence()
            self._fenced = True
        return True

    def wait(self, timeout_s: float | None = None) -> bool:
        """Block until ready or the timeout; returns `ready()`.

        Keeps the interpreter lock for `patience_s` at first, then releases it.
        """
        patience_s = self.patience_s if timeout_s is None else min(self.patience_s, timeout_s)
        return self.hold(patience_s) or self._clock.block(
            self.tick, timeout_s, self._out, self.ready
        )

    def hold(self, limit_s: float) -> bool:
        """Like `wait`, but keep the interpreter lock: for work that ends within microseconds.

        Beside a busy Python thread it costs nothing to come back. The limit bounds the harm when
        the program itself needs the lock.
        """
        if self.ready() or limit_s <= 0.0:
            return self.ready()
        out = ctypes.addressof(self._out)
        library().held.tm_wait(self._clock.handle, self.tick, out, int(limit_s * 1e9))
        return self.ready()

    def after(self, *, success: bool = True) -> Calls:
        """One row that waits for this program; with `success` it fails unless this succeeded.

        The program that contains the row must keep this ticket (`keep=`).
        """
        out = ctypes.addressof(self._out) if success else 0
        return group(0, Kind.WAIT, self._clock.handle, self.tick, out, entries=ALL)

    @property
    def state(self) -> State:
        return State(self._out[0])

    @property
    def failure(self) -> Failure | None:
        """Which call failed and how; None while running or after success."""
        return self.program.failure(self._out)

    @property
    def error(self) -> Exception | None:
        """The failure as the queue's `explain` words it; Closed if it was cancelled."""
        if self._error is None and (failure := self.failure) is not None:
            self._error = Closed(str(failure)) if failure.cancelled else self._explain(failure)
        return self._error

    @property
    def failed(self) -> Mask | None:
        failure = self.failure
        return None if failure is None else self.program.failed(failure)


class Clock:
    """A count that grows and can be waited for by programs and by threads.

    word: uint64[1] that shall hold the count (shared memory of the creator), else a private one.
    A clock made by itself is moved with `advance`; a queue moves its own.
    """

    def __init__(self, word: Word | None = None) -> None:
        handle = library().held.tm_clock_new(0 if word is None else address(word))
        if not handle:
            raise MemoryError("no memory for a clock")
        self._adopt(handle, word)
        weakref.finalize(self, _free_clock, handle, generation.value, word).atexit = False

    def _adopt(self, handle: int, word: Word | None) -> None:
        self.handle = handle
        self._word = word
        self._generation = generation.value
        at = ctypes.c_uint64.from_address(handle).value
        self._count = ctypes.c_uint64.from_address(at)

    @property
    def foreign(self) -> bool:
        """True in a child process: the threads behind this clock stayed with the parent."""
        return self._generation != generation.value

    @property
    def tick(self) -> int:
        return int(self._count.value)

    def advance(self, tick: int) -> None:
        """Move to `tick` unless already past it; wakes who waits for it."""
        library().held.tm_clock_advance(self.handle, tick)

    def after(self, tick: int) -> Calls:
        """One row that waits until this clock has reached `tick`; keep the clock with it."""
        return group(0, Kind.WAIT, self.handle, tick, entries=ALL)

    def wait(self, tick: int, timeout_s: float | None = None) -> bool:
        """Block the calling thread, without the interpreter lock, until `tick` is reached."""
        return self.tick >= tick or self.block(tick, timeout_s, None, lambda: self.tick >= tick)

    def block(
        self,
        tick: int,
        timeout_s: float | None,
        out: OutcomeArray | None,
        over: Callable[[], bool],
    ) -> bool:
        """The slow half of waiting for a tick or an outcome: in slices, so that signals arrive."""
        if self.foreign:
            raise DriverError(_FORKED)
        end = None if timeout_s is None else time.monotonic() + timeout_s
        at = 0 if out is None else ctypes.addressof(out)
        while not over():
            left = _SLICE_S if end is None else min(_SLICE_S, end - time.monotonic())
            if left <= 0:
                return False
            library().free.tm_wait(self.handle, tick, at, int(left * 1e9))
        return True


class Queue(Clock):
    """Native threads that run submitted programs; also the clock that counts the ended ones.

    threads: 1 keeps programs in order; n is a pool, whose tick counts programs ended in a row.
    depth: programs queued and running at most; `submit` blocks while it is reached.
    setup: runs once in each thread before any program (cuCtxSetCurrent).
    explain: words a failure as an exception. sticky: after a failure nothing more runs (all later
    tickets end cancelled, with the code of the first failure), as on a CUDA stream.
    patience_s: how long `Ticket.wait` keeps the interpreter lock before it releases it, since
    coming back costs 5 ms beside a busy thread; 0 for programs that call Python. It holds for
    short programs (`submit(short=True)`) that had nothing queued before them.
    Raises DriverError if a thread cannot start or its setup fails.
    """

    def __init__(
        self,
        name: str,
        *,
        threads: int = 1,
        depth: int = 1024,
        setup: Program | None = None,
        explain: Explain | None = None,
        sticky: bool = False,
        patience_s: float = 0.0,
        word: Word | None = None,
    ) -> None:
        self.name = name
        self._explain = explain or self._plain_error
        self._patience_s = patience_s
        self._running: _Running = deque()
        self._closing = threading.Lock()
        self._closed = False
        self._setup = setup
        problem = Outcome()
        handle = library().free.tm_queue_new(
            name.encode()[:15],
            threads,
            depth,
            sticky,
            setup.call_at if setup else 0,
            len(setup.calls) if setup else 0,
            0 if word is None else address(word),
            ctypes.addressof(problem),
        )
        if not handle:
            reason = os.strerror(ctypes.get_errno())
            raise DriverError(f"queue {name}: {threads} threads of depth {depth}: {reason}")
        self._adopt(handle, word)
        # Runs at collection and at exit, when threads must not come back into Python any more.
        self._end = weakref.finalize(
            self, _end_queue, handle, generation.value, self._running, (word, setup)
        )
        if setup is not None and (failure := setup.failure(problem)) is not None:
            self.close(cancel=True)
            raise self._explain(failure)

    def submit(
        self, program: Program, explain: Explain | None = None, *, short: bool = True
    ) -> Ticket:
        """Queue a program; returns at once, or blocks while the queue is full. Raises Closed.

        explain: words this program's failure, instead of the queue's. short: it is likely to end
        within the queue's `patience_s`.
        """
        return self._submit(program, False, explain, short)

    def call(self, program: Program, explain: Explain | None = None) -> Ticket:
        """Run a program behind all that was submitted: here and now if that is nothing.

        If the queue is idle the calling thread runs it with the interpreter lock kept and the
        ticket returned is ready: no thread hand-over. Else as `submit`. Order is the same.
        """
        return self._submit(program, True, explain, True)

    def _submit(self, program: Program, here: bool, explain: Explain | None, short: bool) -> Ticket:
        if self.foreign:
            raise DriverError(_FORKED)
        ticket = Ticket(self, program, explain or self._explain)
        out = ctypes.addressof(ticket._out)
        # First kept, then submitted: an exception in between must not free what a thread reads.
        self._forget_ended()
        self._running.append((ticket._out, program))
        native = library()
        submit = native.held.tm_queue_submit
        n, undo = len(program.calls), program.undo_at
        tick = -1
        try:
            while (tick := submit(self.handle, program.call_at, n, undo, out, here)) == 0:
                native.free.tm_queue_room(self.handle, int(_SLICE_S * 1e9))
        finally:
            if tick <= 0:
                ticket._out[0] = State.CANCELLED
        if tick < 0:
            raise Closed(f"queue {self.name} is closed; it takes no more work")
        ticket.tick = tick
        if short and self.tick >= tick - 1:
            ticket.patience_s = self._patience_s
        return ticket

    def _forget_ended(self) -> None:
        running = self._running
        while running:
            try:
                first = running.popleft()
            except IndexError:
                return
            if first[0][0] == State.PENDING:
                # Held here all the while, so it cannot be freed between the two steps.
                running.appendleft(first)
                return

    def _plain_error(self, failure: Failure) -> Exception:
        return DriverError(f"queue {self.name}: {failure}")

    def close(self, *, cancel: bool = False, timeout_s: float | None = None) -> bool:
        """Take no more work and end: after all that is queued, or (cancel) after what runs now.

        Every ticket ends; a wait under way ends cancelled too. True once the threads are gone;
        False if the timeout came first (call again). A second close does nothing.
        """
        if self.foreign:
            raise DriverError(_FORKED)
        native = library()
        native.held.tm_queue_stop(self.handle, cancel)
        end = None if timeout_s is None else time.monotonic() + timeout_s
        while not self._closed:
            left = _SLICE_S if end is None else min(_SLICE_S, max(0.0, end - time.monotonic()))
            with self._closing:
                answer = native.free.tm_queue_join(self.handle, int(left * 1e9))
            if answer == 0:
                self._closed = True
            elif answer == _EDEADLK:
                raise DriverError(f"queue {self.name} cannot be closed by a call that runs on it")
            elif end is not None and time.monotonic() >= end:
                return False
        self._running.clear()
        return True


def _free_clock(handle: int, born: int, keep: object) -> None:
    if born == generation.value:
        library().held.tm_clock_free(handle)


def _end_queue(handle: int, born: int, running: _Running, keep: object) -> None:
    """Stop a queue that nobody holds any more, or at exit; whatever cannot end is left alone."""
    if born != generation.value:
        return
    native = library()
    native.held.tm_queue_stop(handle, 1)
    if native.free.tm_queue_join(handle, int(_EXIT_S * 1e9)) == 0:
        native.held.tm_queue_free(handle)
    else:
        _abandoned.append((running, keep))


_abandoned: list[object] = []
"""What threads that did not end may still read."""
