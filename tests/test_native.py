"""Programs, queues and clocks: order, failures, waiting, the end, and the compiler behind them.

Kernels and latches are C callbacks into Python; a program runs them on a native thread.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import gc
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from tiermem import toolchain
from tiermem.errors import Closed, DriverError
from tiermem.native import (
    ALL,
    ARGS,
    CALL,
    Calls,
    Clock,
    Failure,
    Kind,
    Program,
    Queue,
    State,
    Ticket,
    function,
    group,
    interleave,
    pointer,
)

LONG_S = 30.0
ROOT = Path(__file__).parents[1]
NUMBERS = (ctypes.c_uint64,) * ARGS
CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int64, *NUMBERS)
CLOSE, GETPID = function("close"), function("getpid")
NOTHING = Program(np.zeros(0, CALL))


class Recorder:
    """A C function that notes its arguments and answers what `answer` says."""

    def __init__(self, answer: Callable[[int], int] = lambda first: 0) -> None:
        self.seen: list[tuple[int, ...]] = []
        self.threads: set[int] = set()

        def body(*args: int) -> int:
            self.seen.append(args)
            self.threads.add(threading.get_native_id())
            return answer(args[0])

        self._callback = CALLBACK(body)
        self.at = pointer(self._callback)

    @property
    def firsts(self) -> list[int]:
        return [args[0] for args in self.seen]


class Latch:
    """A kernel that holds its thread until it is released."""

    def __init__(self) -> None:
        self.entered, self._released = threading.Event(), threading.Event()
        self._recorder = Recorder(self._hold)

    def _hold(self, _: int) -> int:
        self.entered.set()
        assert self._released.wait(LONG_S)
        return 0

    def program(self) -> Program:
        return Program(group(self._recorder.at, Kind.PLAIN), keep=(self,))

    def release(self) -> None:
        self._released.set()


def numbers(*values: int) -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
    return np.array(values, np.uint64)


def calls_of(recorder: Recorder, *values: int, kind: Kind = Kind.PLAIN) -> Calls:
    return group(recorder.at, kind, numbers(*values))


def finish(ticket: Ticket) -> Ticket:
    assert ticket.wait(LONG_S), "did not end"
    assert ticket.error is None, ticket.error
    return ticket


@pytest.fixture
def queue() -> Iterator[Queue]:
    queue = Queue("test")
    yield queue
    assert queue.close(cancel=True, timeout_s=LONG_S)


@pytest.fixture
def latch() -> Iterator[Latch]:
    latch = Latch()
    yield latch
    latch.release()


# -- programs -----------------------------------------------------------------------------------


@pytest.mark.parametrize("run", [Program.run, Program.run_holding])
def test_a_program_passes_nine_arguments_and_keeps_results(
    run: Callable[[Program], Failure | None],
) -> None:
    recorder = Recorder(lambda first: first * 10)
    calls = group(recorder.at, Kind.PLAIN, numbers(1, 2), 2**64 - 1, -1, 3, 4, 5, 6, 7, 8)
    assert run(Program(calls)) is None
    rest = (2**64 - 1, 2**64 - 1, 3, 4, 5, 6, 7, 8)
    assert recorder.seen == [(1, *rest), (2, *rest)]
    assert calls["result"].tolist() == [10, 20]


@pytest.mark.parametrize(
    ("kind", "answers", "code"),
    [
        (Kind.STATUS, [0, 0, 700], 700),
        (Kind.STATUS, [0, 2**32, -3], -3),
        (Kind.INT, [0, 5, 2**32 - 1], None),
        (Kind.POINTER, [0, 2**32 - 1, -1], None),
    ],
)
def test_a_program_stops_at_the_first_failure_and_says_where(
    kind: Kind, answers: list[int], code: int | None
) -> None:
    recorder = Recorder(answers.__getitem__)
    failure = Program(calls_of(recorder, 0, 1, 2, 0, kind=kind)).run()
    assert failure is not None
    assert failure == Failure(2, failure.code if code is None else code, kind)
    assert failure.code != 0
    assert recorder.firsts == [0, 1, 2]


def test_plain_calls_never_fail() -> None:
    assert Program(calls_of(Recorder(lambda _: -1), 0, 1)).run() is None


def test_errno_of_the_c_library_is_the_code() -> None:
    failure = Program(group(CLOSE, Kind.INT, numbers(2**20, 2**20))).run()
    assert failure == Failure(0, errno.EBADF, Kind.INT)
    assert "Bad file descriptor" in str(failure)


def test_undo_rows_run_backwards_from_the_failure_and_skip_empty_ones() -> None:
    done, undone = Recorder(lambda first: 1 if first == 3 else 0), Recorder(lambda _: 5)
    undo = calls_of(undone, 0, 1, 2, 3, 4, kind=Kind.STATUS)
    undo["fn"][1] = 0
    failure = Program(calls_of(done, 0, 1, 2, 3, 4, kind=Kind.STATUS), undo).run()
    assert failure == Failure(3, 1, Kind.STATUS)
    assert done.firsts == [0, 1, 2, 3]
    assert undone.firsts == [2, 0]


def test_which_entries_failed_follows_from_the_calls_not_made() -> None:
    recorder = Recorder(lambda first: 1 if first == 2 else 0)
    pairs = interleave(
        calls_of(recorder, 0, 0, 0, 0, kind=Kind.STATUS),
        calls_of(recorder, 1, 1, 2, 1, kind=Kind.STATUS),
    )
    program = Program(pairs)
    failure = program.run()
    assert failure is not None
    assert failure.index == 5
    assert program.failed(failure).tolist() == [False, False, True, True]
    whole = Program(group(recorder.at, Kind.STATUS, 2, entries=ALL), entries=3)
    failure = whole.run()
    assert failure is not None
    assert whole.failed(failure).tolist() == [True] * 3
    undone = Program(pairs, np.zeros_like(pairs))
    failure = undone.run()
    assert failure is not None
    assert undone.failed(failure).all()


def test_malformed_programs_are_refused() -> None:
    with pytest.raises(ValueError, match="10 arguments"):
        group(GETPID, Kind.PLAIN, *range(10))
    calls = group(GETPID, Kind.PLAIN, numbers(1, 2))
    with pytest.raises(ValueError, match="equally many"):
        Program(calls, calls[:1])
    with pytest.raises(ValueError, match="rows"):
        Program(np.zeros(2, np.uint64))


def test_a_wait_that_is_not_over_fails_where_blocking_is_not_allowed() -> None:
    clock = Clock()
    failure = Program(clock.after(1), keep=(clock,)).run_holding()
    assert failure == Failure(0, errno.EDEADLK, Kind.WAIT)
    clock.advance(1)
    assert Program(clock.after(1), keep=(clock,)).run_holding() is None


# -- order and tickets --------------------------------------------------------------------------


def test_one_thread_runs_thousands_of_programs_in_order_off_the_calling_thread(
    queue: Queue,
) -> None:
    recorder = Recorder()
    tickets = [queue.submit(Program(calls_of(recorder, n, n))) for n in range(5000)]
    finish(tickets[-1])
    assert recorder.firsts == [n for n in range(5000) for _ in range(2)]
    assert len(recorder.threads) == 1
    assert threading.get_native_id() not in recorder.threads
    assert [ticket.tick for ticket in tickets] == list(range(1, 5001))
    assert queue.tick == 5000
    assert all(ticket.ready() for ticket in tickets)


def test_programs_live_as_long_as_they_are_queued_and_no_longer(queue: Queue, latch: Latch) -> None:
    class Kept:
        """Something a program points at."""

    kept = Kept()
    alive = weakref.ref(kept)
    queue.submit(latch.program())
    queue.submit(Program(group(GETPID, Kind.PLAIN), keep=(kept,)))
    del kept
    gc.collect()
    assert alive() is not None
    latch.release()
    finish(queue.submit(NOTHING))
    finish(queue.submit(NOTHING))
    gc.collect()
    assert alive() is None


def test_a_failed_ticket_has_index_code_error_and_entries(queue: Queue) -> None:
    recorder = Recorder(lambda first: 7 if first == 2 else 0)
    bad = queue.submit(Program(calls_of(recorder, 1, 2, 3, kind=Kind.STATUS)))
    good = queue.submit(Program(calls_of(recorder, 4, kind=Kind.STATUS)))
    finish(good)
    assert bad.wait(LONG_S)
    assert bad.failure == Failure(1, 7, Kind.STATUS)
    assert bad.state is State.FAILED
    assert isinstance(bad.error, DriverError)
    assert "status 7" in str(bad.error)
    assert bad.failed is not None
    assert bad.failed.tolist() == [False, True, True]
    assert good.failed is None
    assert recorder.firsts == [1, 2, 4]


def test_errors_are_worded_by_who_submits_or_by_the_queue() -> None:
    queue = Queue("worded", explain=lambda failure: ArithmeticError(failure.code))
    failing = Program(group(CLOSE, Kind.INT, -1))
    by_queue = queue.submit(failing)
    by_submitter = queue.submit(failing, lambda failure: LookupError(failure.code))
    assert by_submitter.wait(LONG_S)
    assert isinstance(by_queue.error, ArithmeticError)
    assert isinstance(by_submitter.error, LookupError)
    assert by_submitter.error is by_submitter.error
    queue.close()


def test_a_ticket_is_not_ready_while_its_program_runs(queue: Queue, latch: Latch) -> None:
    ticket = queue.submit(latch.program())
    assert latch.entered.wait(LONG_S)
    assert not ticket.ready()
    assert not ticket.wait(0.01)
    assert not ticket.hold(0.001)
    assert ticket.error is None
    assert ticket.failure is None
    assert queue.tick == 0
    latch.release()
    finish(ticket)


def test_holding_the_lock_sees_the_end_of_work_that_needs_no_lock(queue: Queue) -> None:
    clock = Clock()
    ticket = queue.submit(Program(clock.after(1), keep=(clock,)))
    clock.advance(1)
    assert ticket.hold(LONG_S)


def test_a_full_queue_blocks_the_submitter_until_there_is_room(latch: Latch) -> None:
    queue = Queue("small", depth=2)
    queue.submit(latch.program())
    queue.submit(NOTHING)
    third: list[Ticket] = []
    thread = threading.Thread(target=lambda: third.append(queue.submit(NOTHING)))
    thread.start()
    thread.join(0.05)
    assert third == []
    latch.release()
    thread.join(LONG_S)
    finish(third[0])
    queue.close()


def test_submitters_in_many_threads_lose_nothing(queue: Queue) -> None:
    recorder = Recorder()
    tickets: list[Ticket] = []

    def submit(base: int) -> None:
        tickets.extend(queue.submit(Program(calls_of(recorder, base + n))) for n in range(500))

    threads = [threading.Thread(target=submit, args=(1000 * n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LONG_S)
    finish(queue.submit(NOTHING))
    assert sorted(recorder.firsts) == [1000 * t + n for t in range(4) for n in range(500)]
    for t in range(4):
        ours = [n for n in recorder.firsts if n // 1000 == t]
        assert ours == sorted(ours)
    assert sorted(ticket.tick for ticket in tickets) == list(range(1, 2001))


def test_a_pool_runs_programs_side_by_side_and_counts_those_ended_in_a_row() -> None:
    pool = Queue("pool", threads=2)
    latch = Latch()
    first = pool.submit(latch.program())
    assert latch.entered.wait(LONG_S)
    others = [pool.submit(NOTHING) for _ in range(100)]
    for ticket in others:
        finish(ticket)
    assert pool.tick == 0
    assert not first.ready()
    latch.release()
    finish(first)
    assert pool.tick == 101
    pool.close()


# -- in the calling thread ----------------------------------------------------------------------


def test_an_idle_queue_lends_itself_to_the_caller(queue: Queue) -> None:
    recorder = Recorder()
    ticket = queue.call(Program(calls_of(recorder, 1)))
    assert ticket.ready()
    assert recorder.threads == {threading.get_native_id()}
    assert (ticket.tick, queue.tick) == (1, 1)
    failing = queue.call(Program(group(CLOSE, Kind.INT, -1)))
    assert failing.ready()
    assert isinstance(failing.error, DriverError)


def test_a_call_keeps_its_place_behind_queued_work(queue: Queue, latch: Latch) -> None:
    recorder = Recorder()
    queue.submit(latch.program())
    queue.submit(Program(calls_of(recorder, 1)))
    ticket = queue.call(Program(calls_of(recorder, 2)))
    assert not ticket.ready()
    latch.release()
    finish(ticket)
    assert recorder.firsts == [1, 2]
    assert threading.get_native_id() not in recorder.threads


def test_work_submitted_during_a_call_runs_after_it_though_the_thread_is_awake() -> None:
    queue, order = Queue("lent"), []
    tickets: list[Ticket] = []

    def note(_: int) -> int:
        order.append("after")
        return 0

    after = Recorder(note)

    def submit_more(_: int) -> int:
        tickets.append(queue.submit(Program(calls_of(after, 1))))
        queue.close(timeout_s=0.0)  # wakes the thread
        tickets[0].wait(0.02)
        order.append("call")
        return 0

    outer = Recorder(submit_more)
    assert queue.call(Program(calls_of(outer, 1))).ready()
    finish(tickets[0])
    assert order == ["call", "after"]
    assert queue.close(timeout_s=LONG_S)


def test_a_call_with_a_wait_that_is_not_over_is_queued(queue: Queue) -> None:
    clock = Clock()
    ticket = queue.call(Program(clock.after(3), keep=(clock,)))
    assert not ticket.ready()
    clock.advance(3)
    finish(ticket)


# -- waiting for one another --------------------------------------------------------------------


def test_a_program_waits_natively_for_another_queue(queue: Queue, latch: Latch) -> None:
    other = Queue("other")
    recorder = Recorder()
    awaited = queue.submit(latch.program())
    rows = np.concatenate([queue.after(awaited.tick), calls_of(recorder, 1)])
    waiting = other.submit(Program(rows, keep=(queue,)))
    behind = other.submit(Program(calls_of(recorder, 2)))
    assert latch.entered.wait(LONG_S)
    assert not waiting.wait(0.02)
    assert recorder.seen == []
    latch.release()
    finish(behind)
    assert recorder.firsts == [1, 2]
    other.close()


@pytest.mark.parametrize("code", [0, 3])
def test_waiting_for_success_fails_behind_a_failure(queue: Queue, code: int) -> None:
    other, clock, recorder = Queue("other"), Clock(), Recorder(lambda _: code)
    rows = np.concatenate([clock.after(1), calls_of(recorder, 1, kind=Kind.STATUS)])
    awaited = queue.submit(Program(rows, keep=(clock,)))
    strict = other.submit(Program(awaited.after(), keep=(awaited,)))
    lenient = other.submit(Program(awaited.after(success=False), keep=(awaited,)))
    clock.advance(1)
    finish(lenient)
    assert strict.wait(LONG_S)
    assert strict.failure == (Failure(0, errno.ECANCELED, Kind.WAIT) if code else None)
    other.close()


def test_queues_can_pass_a_token_round_many_times() -> None:
    ring = [Queue(f"ring-{n}") for n in range(4)]
    recorder, last = Recorder(), None
    for n in range(400):
        rows = calls_of(recorder, n)
        if last is not None:
            rows = np.concatenate([last.after(), rows])
        last = ring[n % 4].submit(Program(rows, keep=(last,)))
    assert last is not None
    finish(last)
    assert recorder.firsts == list(range(400))
    for queue in ring:
        queue.close()


def test_a_clock_moves_forward_only_and_wakes_its_waiters() -> None:
    word = np.zeros(1, np.uint64)
    clock = Clock(word)
    assert clock.wait(0, 0.0)
    assert not clock.wait(5, 0.01)
    thread = threading.Thread(target=clock.wait, args=(5,))
    thread.start()
    clock.advance(5)
    thread.join(LONG_S)
    assert not thread.is_alive()
    clock.advance(2)
    assert (clock.tick, word[0]) == (5, 5)


def test_a_queue_counts_in_a_word_of_its_owner() -> None:
    words = np.zeros(3, np.uint64)
    queue = Queue("word", word=words[1:2])
    finish(queue.submit(NOTHING))
    finish(queue.submit(NOTHING))
    assert words.tolist() == [0, 2, 0]
    queue.close()


def test_looking_whether_a_ticket_is_ready_makes_no_system_call() -> None:
    """Under strict seccomp any call but read and write ends the thread that makes it.

    Another thread ends the process, when it is told to or after 10 s.
    """
    done = child("""
        import ctypes, gc, os
        import numpy as np
        from tiermem.native import *
        queue, clock = Queue("quiet"), Clock()
        over = queue.submit(Program(np.zeros(0, CALL)))
        over.wait(30)
        pending = queue.submit(Program(clock.after(1), keep=(clock,)))
        told, tell = os.pipe()
        poll = np.array([told | 1 << 32], np.uint64)  # struct pollfd, POLLIN
        end = np.concatenate([
            group(function("poll"), Kind.PLAIN, address(poll), 1, 10_000),
            group(function("_exit"), Kind.PLAIN, 0),
        ])
        ender = Queue("ender")
        ending = ender.submit(Program(end, keep=(poll,)))
        prctl = ctypes.PyDLL(None).prctl
        prctl.argtypes = [ctypes.c_int] + [ctypes.c_ulong] * 4
        gc.disable()
        pending.ready(), over.ready()
        if prctl(22, 1, 0, 0, 0) != 0:
            os.write(1, b"no seccomp")
            os._exit(0)
        for _ in range(1000):
            pending.ready(), over.ready()
        os.write(1, b"quiet")
        os.write(tell, b".")
        while True:
            pass
    """)
    if done.stdout == "no seccomp":
        pytest.skip("this system has no seccomp")
    assert done.stdout == "quiet", done.stderr


# -- failing and closing ------------------------------------------------------------------------


def test_a_sticky_queue_runs_nothing_after_a_failure() -> None:
    queue, recorder = Queue("sticky", sticky=True), Recorder()
    bad = queue.submit(Program(group(CLOSE, Kind.INT, -1)))
    later = [queue.submit(Program(calls_of(recorder, n))) for n in range(3)]
    later.append(queue.call(Program(calls_of(recorder, 4))))
    for ticket in later:
        assert ticket.wait(LONG_S)
        assert ticket.state is State.CANCELLED
        assert isinstance(ticket.error, Closed)
    assert isinstance(bad.error, DriverError)
    assert recorder.seen == []
    assert queue.tick == 5
    queue.close()


def test_closing_runs_what_is_queued(latch: Latch) -> None:
    queue, recorder = Queue("drain"), Recorder()
    queue.submit(latch.program())
    tickets = [queue.submit(Program(calls_of(recorder, n))) for n in range(10)]
    assert not queue.close(timeout_s=0.01)
    with pytest.raises(Closed, match="drain"):
        queue.submit(NOTHING)
    latch.release()
    assert queue.close(timeout_s=LONG_S)
    assert queue.close()
    for ticket in tickets:
        finish(ticket)
    assert recorder.firsts == list(range(10))


def test_cancelling_ends_what_has_not_begun_and_lets_the_running_program_end(
    latch: Latch,
) -> None:
    queue, recorder = Queue("cancel"), Recorder()
    running = queue.submit(latch.program())
    queued = [queue.submit(Program(calls_of(recorder, n, n))) for n in range(5)]
    assert latch.entered.wait(LONG_S)
    assert not queue.close(cancel=True, timeout_s=0.01)
    latch.release()
    assert queue.close(cancel=True, timeout_s=LONG_S)
    finish(running)
    for ticket in queued:
        assert ticket.ready()
        assert isinstance(ticket.error, Closed)
        assert ticket.failed is not None
        assert ticket.failed.all()
    assert recorder.seen == []
    assert queue.tick == 6


def test_cancelling_ends_a_wait_that_nothing_else_would_end() -> None:
    clock, queue = Clock(), Queue("stuck")
    waiting = queue.submit(Program(clock.after(1), keep=(clock,)))
    behind = queue.submit(NOTHING)
    assert not waiting.wait(0.01)
    assert queue.close(cancel=True, timeout_s=LONG_S)
    assert waiting.state is State.CANCELLED
    assert isinstance(waiting.error, Closed)
    assert behind.ready()


def test_a_submitter_blocked_on_a_full_queue_is_refused_when_it_closes(latch: Latch) -> None:
    queue = Queue("full", depth=1)
    queue.submit(latch.program())
    refused: list[BaseException] = []

    def submit() -> None:
        try:
            queue.submit(NOTHING)
        except Closed as error:
            refused.append(error)

    thread = threading.Thread(target=submit)
    thread.start()
    thread.join(0.02)
    queue.close(timeout_s=0.0)
    thread.join(LONG_S)
    assert len(refused) == 1
    latch.release()
    assert queue.close(timeout_s=LONG_S)


def test_a_queue_that_nobody_holds_ends_its_threads() -> None:
    queues = [Queue(f"lost-{n}", threads=2) for n in range(3)]
    tickets = [queue.submit(NOTHING) for queue in queues]
    for ticket in tickets:
        finish(ticket)
    assert _threads("lost-") == 6
    del queues, ticket, tickets
    gc.collect()
    assert _all_end("lost-")


def _threads(name: str) -> int:
    """How many threads of this process have a name that starts so."""
    names = []
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):  # ended since the folder was listed
            names.append((task / "comm").read_text())
    return sum(found.startswith(name) for found in names)


def _all_end(name: str) -> bool:
    """A joined thread may be listed for a moment more."""
    end = time.monotonic() + LONG_S
    while _threads(name) and time.monotonic() < end:
        os.sched_yield()
    return _threads(name) == 0


def test_closing_a_queue_from_its_own_thread_is_an_error_and_no_deadlock(queue: Queue) -> None:
    raised: list[DriverError] = []

    def close(_: int) -> int:
        try:
            queue.close(timeout_s=LONG_S)
        except DriverError as error:
            raised.append(error)
        return 0

    recorder = Recorder(close)
    finish(queue.submit(Program(calls_of(recorder, 0))))
    assert "cannot be closed by a call that runs on it" in str(raised[0])


def test_setup_runs_once_in_every_thread_before_any_program() -> None:
    recorder = Recorder()
    pool = Queue("setup", threads=3, setup=Program(calls_of(recorder, 1, 2)))
    assert sorted(recorder.firsts) == [1, 1, 1, 2, 2, 2]
    assert len(recorder.threads) == 3
    finish(pool.submit(NOTHING))
    pool.close()


def test_a_failing_setup_is_the_error_of_the_constructor() -> None:
    with pytest.raises(DriverError, match=r"queue doomed: call 1 .*Bad file"):
        Queue(
            "doomed",
            threads=2,
            setup=Program(np.concatenate([group(GETPID, Kind.PLAIN), group(CLOSE, Kind.INT, -1)])),
        )
    assert _all_end("doomed")


# -- the process around it ----------------------------------------------------------------------


def child(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        cwd=ROOT,
        env={**os.environ, **environment},
    )


def test_a_child_after_a_fork_is_told_so_and_can_have_queues_of_its_own() -> None:
    done = child("""
        import os, numpy as np
        from tiermem.native import *
        queue, clock = Queue("parent"), Clock()
        pending = queue.submit(Program(clock.after(1), keep=(clock,)))
        nothing = Program(np.zeros(0, CALL))
        pid = os.fork()
        if pid == 0:
            uses = [lambda: queue.submit(nothing), lambda: queue.call(nothing), pending.ready,
                    pending.wait, queue.close]
            for use in uses:
                try:
                    use()
                except Exception as error:
                    print(type(error).__name__, "fork" in str(error), flush=True)
            own = Queue("child")
            print(own.submit(nothing).wait(30), own.close(), flush=True)
            raise SystemExit(0)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
        clock.advance(1)
        print(pending.wait(30))
    """)
    assert done.stdout.splitlines() == ["DriverError True"] * 5 + ["True True", "0", "True"], done
    assert done.returncode == 0, done.stderr


def test_a_process_ends_with_work_still_queued() -> None:
    done = child("""
        import numpy as np
        from tiermem.native import *
        queue, clock = Queue("left"), Clock()
        for _ in range(100):
            queue.submit(Program(clock.after(1), keep=(clock,)))
        print("end")
    """)
    assert (done.stdout, done.returncode) == ("end\n", 0), done.stderr


def test_signals_reach_the_main_thread_while_it_waits(queue: Queue, latch: Latch) -> None:
    ticket = queue.submit(latch.program())
    assert latch.entered.wait(LONG_S)

    class Interrupted(Exception):
        """Raised by the handler."""

    def handler(number: int, frame: object) -> None:
        raise Interrupted

    before = signal.signal(signal.SIGUSR1, handler)
    try:
        timer = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGUSR1))
        timer.start()
        with pytest.raises(Interrupted):
            ticket.wait(LONG_S)
        timer.join()
    finally:
        signal.signal(signal.SIGUSR1, before)


# -- the compiler -------------------------------------------------------------------------------


def test_the_library_is_compiled_once_into_a_private_directory(tmp_path: Path) -> None:
    code = "from tiermem.native import Clock; Clock()"
    for _ in range(2):
        done = child(code, XDG_CACHE_HOME=str(tmp_path))
        assert done.returncode == 0, done.stderr
    files = list((tmp_path / "tiermem").glob("native-*.so"))
    assert len(files) == 1
    assert (tmp_path / "tiermem").stat().st_mode & 0o777 == 0o700
    assert files[0].stat().st_mode & 0o022 == 0
    again = files[0].stat().st_mtime_ns
    child(code, XDG_CACHE_HOME=str(tmp_path))
    assert files[0].stat().st_mtime_ns == again
    assert list((tmp_path / "tiermem").glob(".*")) == []


def test_processes_that_compile_at_once_all_succeed(tmp_path: Path) -> None:
    code = "from tiermem.native import Queue; print(Queue('x').close())"
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, env=environment, cwd=ROOT
        )
        for _ in range(3)
    ]
    assert [process.communicate(timeout=120)[0] for process in started] == [b"True\n"] * 3


@pytest.mark.parametrize("mode", [0o770, 0o777])
def test_a_cache_that_others_can_write_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: int
) -> None:
    open_to_others = tmp_path / "tiermem"
    open_to_others.mkdir()
    open_to_others.chmod(mode)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    found = toolchain.cache_directory()
    assert tmp_path not in found.parents
    assert found.stat().st_mode & 0o777 == 0o700
    found.rmdir()


def test_a_library_that_others_could_have_changed_is_compiled_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    source = tmp_path / "answer.c"
    source.write_text("int answer(void) { return 42; }\n")
    library = toolchain.build(source)
    library.write_bytes(b"not a library")
    library.chmod(0o777)
    assert toolchain.build(source) == library
    assert ctypes.CDLL(str(library)).answer() == 42


def test_a_changed_source_is_another_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    source = tmp_path / "answer.c"
    source.write_text("int answer(void) { return 1; }\n")
    first = toolchain.build(source)
    source.write_text("int answer(void) { return 2; }\n")
    second = toolchain.build(source)
    assert first != second
    assert ctypes.CDLL(str(second)).answer() == 2


def test_without_any_compiler_the_error_names_the_ways_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(DriverError, match=r"apt install gcc.*pip install ziglang"):
        toolchain.compiler()


def test_the_compilers_own_words_are_in_the_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    source = tmp_path / "broken.c"
    source.write_text("int answer(void) { return forty_two; }\n")
    with pytest.raises(DriverError, match="forty_two"):
        toolchain.build(source)
    assert list((tmp_path / "tiermem").iterdir()) == []
