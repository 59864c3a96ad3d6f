"""Memory, streams and file calls for tests of the NVMe tier."""

from __future__ import annotations

import errno
import mmap
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from tiermem.nvme.files import Buffer, PosixIo
from tiermem.tier import PASSED, Addresses, Done, Fence, Place, Route, Slots

LONG_S = 30.0


def slots(*values: int) -> Slots:
    return np.array(values, dtype=np.int32)


class ArrayMemory:
    """A `Memory` over anonymous pages; `shift` makes its slots unaligned."""

    def __init__(self, slot_bytes: int, capacity: int, place: Place = Place.HOST, shift: int = 0):
        self.place = place
        self.slot_bytes = slot_bytes
        self._capacity = capacity
        self._map = mmap.mmap(-1, slot_bytes * capacity + 4096)
        raw = np.frombuffer(self._map, np.uint8)
        self.bytes = raw[shift : shift + slot_bytes * capacity].reshape(capacity, slot_bytes)

    @property
    def capacity(self) -> int:
        return self._capacity

    @property
    def ready(self) -> int:
        return self._capacity

    @property
    def growing(self) -> bool:
        return False

    def resize(self, capacity: int) -> None:
        raise NotImplementedError

    def close(self) -> None:
        pass

    def addresses(self, slots: Slots) -> Addresses:
        base = np.uint64(self.bytes.ctypes.data)
        return base + slots.astype(np.uint64) * np.uint64(self.slot_bytes)

    def fill(self, seed: int = 0) -> np.ndarray:
        """Random bytes in every slot; a copy of them."""
        rng = np.random.default_rng(seed)
        self.bytes[:] = rng.integers(0, 256, self.bytes.shape, dtype=np.uint8)
        return self.bytes.copy()


class GatedStreams:
    """Streams whose fences pass when the test says so."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.asked: list[Fence] = []

    def tick(self, stream: int | None) -> tuple[int, int] | None:
        return None

    def passed(self) -> np.ndarray:
        return np.zeros(0, np.uint64)

    def wait(self, fence: Fence, timeout_s: float | None = None) -> bool:
        self.asked.append(fence)
        return self.gate.wait(LONG_S)


class FaultyIo(PosixIo):
    """Real calls, except where a test put a fault: a callable that may raise or shorten."""

    def __init__(self) -> None:
        self.on_read: Callable[[int, int], int | None] = lambda n, offset: None
        self.on_write: Callable[[int, int], int | None] = lambda n, offset: None

    def pread(self, fd: int, buffer: Buffer, offset: int) -> int:
        n = self.on_read(len(buffer), offset)
        return super().pread(fd, buffer if n is None else buffer[:n], offset)

    def pwrite(self, fd: int, buffer: Buffer, offset: int) -> int:
        n = self.on_write(len(buffer), offset)
        return super().pwrite(fd, buffer if n is None else buffer[:n], offset)


def failing(number: int) -> Callable[[int, int], int | None]:
    def fault(n: int, offset: int) -> int | None:
        raise OSError(number, os.strerror(number))

    return fault


def interrupted_once() -> Callable[[int, int], int | None]:
    seen: list[int] = []

    def fault(n: int, offset: int) -> int | None:
        if not seen:
            seen.append(offset)
            raise InterruptedError(errno.EINTR, "interrupted")
        return None

    return fault


def shortened(to: int) -> Callable[[int, int], int | None]:
    return lambda n, offset: min(n, to)


@dataclass(frozen=True)
class Moved:
    """How a submission ended; `failed` lists the entries that did."""

    error: Exception | None
    failed: list[int]

    @property
    def errno(self) -> int | None:
        return self.error.errno if isinstance(self.error, OSError) else None


def move(route: Route, src: Slots, dst: Slots, after: Fence = PASSED) -> Moved:
    """Submit and wait for the end."""
    return ended(route.submit(src, dst, after))


def ended(done: Done) -> Moved:
    """Wait for the end of a submission."""
    assert done.wait(LONG_S)
    assert done.ready()
    failed = done.failed
    return Moved(done.error, [] if failed is None else np.flatnonzero(failed).tolist())


def noting(order: list[str], what: str) -> Callable[[int, int], int | None]:
    """A fault that is none, but writes down that the call was made."""

    def note(n: int, offset: int) -> int | None:
        order.append(what)
        return None

    return note
