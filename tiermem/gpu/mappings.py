"""Memory mappings of this process, as the CPU device needs them: Linux mmap at fixed addresses.

Python's own `mmap` module cannot map at a given address. Errors are worded here, among them the
one that a window meets in practice: the kernel's limit on the number of mappings.
"""

from __future__ import annotations

import errno
import mmap
import os
from pathlib import Path

from tiermem.errors import DriverError
from tiermem.native import Calls, Failure, Kind, Program, function, group

PAGE = mmap.PAGESIZE
HUGE = 2 << 20
NO_ACCESS, READ, READ_WRITE = 0, mmap.PROT_READ, mmap.PROT_READ | mmap.PROT_WRITE
_FIXED, _NORESERVE = 0x10, 0x4000
_ABSENT_FLAGS = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NORESERVE
_PUNCH_HOLE_KEEP_SIZE = 0x03
_MADV_HUGEPAGE = 14

_MMAP, _MUNMAP = function("mmap"), function("munmap")
_MADVISE, _FALLOCATE = function("madvise"), function("fallocate")


def reserve(nbytes: int, align: int, protection: int = NO_ACCESS) -> int:
    """Address of `nbytes` with nothing behind them, at a multiple of `align`."""
    total = nbytes + align
    start = _made(group(_MMAP, Kind.POINTER, 0, total, protection, _ABSENT_FLAGS, -1, 0), "reserve")
    address = -(-start // align) * align
    unmap(start, address - start)
    unmap(address + nbytes, start + total - (address + nbytes))
    return address


def unmap(address: int, nbytes: int) -> None:
    """Give addresses back, whatever they show; nothing happens for 0 bytes."""
    if nbytes:
        _made(group(_MUNMAP, Kind.INT, address, nbytes), "munmap")


def alias(address: int, fd: int, nbytes: int, *, huge: bool) -> None:
    """Map a whole file at a reserved address; huge: ask for huge pages (refusal is no error)."""
    flags = mmap.MAP_SHARED | _FIXED | _NORESERVE
    _made(group(_MMAP, Kind.POINTER, address, nbytes, READ_WRITE, flags, fd, 0), "map frames")
    if huge:
        Program(group(_MADVISE, Kind.PLAIN, address, nbytes, _MADV_HUGEPAGE)).run()


def punch(fd: int, offset: int, nbytes: int) -> None:
    """Give the memory behind a part of a memory file back; it reads as zeros."""
    _made(group(_FALLOCATE, Kind.INT, fd, _PUNCH_HOLE_KEEP_SIZE, offset, nbytes), "fallocate")


def explain(failure: Failure, what: str = "map") -> DriverError:
    """A failed mapping call in words, with the way out where the kernel's limit may be why."""
    name = errno.errorcode.get(failure.code, str(failure.code))
    text = f"{what}: call {failure.index}: {name} ({os.strerror(failure.code)})"
    if failure.code == errno.ENOMEM:
        # Counting the mappings would itself need memory that there may be none of now.
        text += f"; out of memory, or of mappings: {way_out()}"
    return DriverError(text)


def way_out() -> str:
    """What to do when there are too many mappings."""
    return (
        f"vm.max_map_count is {limit()}: larger pages, a smaller gpu.budget, or "
        f"`sysctl -w vm.max_map_count={16 * limit()}`"
    )


def limit() -> int:
    """How many mappings the kernel allows a process; an isolated page takes two."""
    try:
        return int(Path("/proc/sys/vm/max_map_count").read_text())
    except OSError:
        return 65_530  # what kernels have had since 2.6


def _made(calls: Calls, what: str) -> int:
    """Make one call with the interpreter lock kept; what it returned."""
    program = Program(calls)
    if (failure := program.run_holding()) is not None:
        raise explain(failure, what)
    return int(program.calls["result"][0]) & (1 << 64) - 1
