"""The compiled `native.c`, loaded twice: to release the interpreter lock in a call, or keep it."""

from __future__ import annotations

import ctypes
import functools
import os
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

from tiermem import toolchain

_SOURCE = Path(__file__).parents[1] / "native.c"
_U64, _I64, _INT = ctypes.c_uint64, ctypes.c_int64, ctypes.c_int

Outcome = ctypes.c_uint64 * 3
"""State, index of the failing call, its code: `outcome` in native.c."""

OutcomeArray = ctypes.Array[ctypes.c_uint64]


class State(IntEnum):
    """The life of a ticket."""

    PENDING = 0
    OK = 1
    FAILED = 2
    CANCELLED = 3


_PROTOTYPES: dict[str, tuple[type | None, tuple[type, ...]]] = {
    "tm_wait": (_INT, (_U64, _U64, _U64, _I64)),
    "tm_clock_new": (_U64, (_U64,)),
    "tm_clock_advance": (None, (_U64, _U64)),
    "tm_clock_free": (None, (_U64,)),
    "tm_hash_pieces": (_U64, (_U64, _U64, _U64)),
    "tm_fence": (None, ()),
    "tm_run": (None, (_U64, _U64, _U64, _INT, _U64)),
    "tm_queue_new": (
        _U64,
        (ctypes.c_char_p, ctypes.c_uint32, _U64, _INT, _U64, _U64, _U64, _U64),
    ),
    "tm_queue_submit": (_I64, (_U64, _U64, _U64, _U64, _U64, _INT)),
    "tm_queue_room": (_INT, (_U64, _I64)),
    "tm_queue_stop": (None, (_U64, _INT)),
    "tm_queue_join": (_INT, (_U64, _I64)),
    "tm_queue_free": (None, (_U64,)),
}


@dataclass(frozen=True, slots=True)
class Library:
    free: ctypes.CDLL
    """releases the interpreter lock during a call"""
    held: ctypes.PyDLL
    """keeps it"""


@functools.cache
def library() -> Library:
    path = str(toolchain.build(_SOURCE))
    library = Library(ctypes.CDLL(path, use_errno=True), ctypes.PyDLL(path))
    for dll in (library.free, library.held):
        for name, (result, arguments) in _PROTOTYPES.items():
            function = getattr(dll, name)
            function.restype, function.argtypes = result, arguments
    return library


class Generation:
    """How many forks lie between the first process and this one."""

    def __init__(self) -> None:
        self.value = 0
        os.register_at_fork(after_in_child=self.step)

    def step(self) -> None:
        self.value += 1


generation = Generation()
