"""Programs of C calls that run without the Python interpreter, and queues that run them.

Coming back from one call that releases the interpreter lock takes 5.3 ms beside one busy Python
thread (a 34 us call, median, 2-core machine, 2026-11), so a group of driver calls must be one
call. A *program* is an array of calls: function pointers with integer arguments. It runs

- inline without the lock (`Program.run`), for groups that the caller waits for anyway;
- inline with the lock held (`Program.run_holding`), for the few microseconds in which giving the
  lock away would cost more than keeping it;
- on a *queue*'s own native threads (`Queue.submit`): the submitter keeps the lock, pays
  microseconds, and reads from a `Ticket` whether the program has ended, without a system call.

A program stops at its first failing call; its undo rows then run backwards from there. One thread
is a stream: programs run in order. Several are a worker pool. A program may wait for a `Clock`
(another queue's ticks, or one that is moved by hand) natively. Linux only.
"""

from tiermem.native.library import State
from tiermem.native.program import (
    ALL,
    ARGS,
    CALL,
    Argument,
    Calls,
    Failure,
    Kind,
    Program,
    address,
    function,
    group,
    interleave,
    pointer,
)
from tiermem.native.queue import Clock, Explain, Queue, Ticket

__all__ = [
    "ALL",
    "ARGS",
    "CALL",
    "Argument",
    "Calls",
    "Clock",
    "Explain",
    "Failure",
    "Kind",
    "Program",
    "Queue",
    "State",
    "Ticket",
    "address",
    "function",
    "group",
    "interleave",
    "pointer",
]
