"""The host tier: one memfd, mapped once, populated chunk by chunk behind the caller's back.

    reserve addresses for all ─▶ populate chunk (thread) ─▶ register chunk ─▶ ready grows

A pool serves as soon as its first chunk is there. Taking memory from the kernel costs 0.20 s/GiB
in four threads and registering it with CUDA another 0.04 (FACTS, H200, 2026-11), so neither ever
happens on a request's path. A chunk that cannot be had or registered leaves the pool at the size
that it has: `ready` stays below `capacity`, a warning says so once, and what is there serves on.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import mmap
import os
import threading
import time
import weakref
from collections.abc import Callable, Collection
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from tiermem.errors import Closed, ConfigError, DriverError
from tiermem.host.numa import stay_on
from tiermem.host.shared import SharedChunks
from tiermem.tier import Addresses, Place, Slots

log = logging.getLogger(__name__)

GRAIN = 4096
HUGE = 2 << 20
CHUNK_BYTES = 256 << 20
MADV_HUGEPAGE = 14
MADV_POPULATE_WRITE = 23
MADV_COLLAPSE = 25
MAP_FIXED = 0x10
MAP_NORESERVE = 0x4000
FALLOC_PUNCH = 0x02 | 0x01
"""FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE"""
_NOTHING = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int64,
]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]


@dataclass(frozen=True, slots=True)
class Register:
    """How CUDA pins a chunk: pin(address, nbytes) after it was populated, unpin(address) before
    it goes. Both raise on failure."""

    pin: Callable[[int, int], None]
    unpin: Callable[[int], None]


@dataclass(frozen=True, slots=True)
class HostStatistics:
    """Sizes of a pool. Bytes held are whole chunks, so they may exceed ready * slot_bytes."""

    capacity: int
    ready: int
    bytes_held: int
    chunks: int
    registered: int
    in_hand: int  # chunks that threads are at: they may have memory, and count as none of these
    failure: str | None


@dataclass(slots=True)
class _Chunk:
    """Slots [first, first + slots) at `address`, at `offset` of the memfd."""

    first: int
    slots: int
    address: int
    offset: int
    nbytes: int
    claimed: bool = False
    backed: bool = False
    registered: bool = False
    taken: int = -1  # of the shared file


@dataclass(slots=True)
class _Mapping:
    """What must go back to the kernel when the pool does."""

    fd: int
    ranges: list[tuple[int, int]] = field(default_factory=list)

    def release(self) -> None:
        ranges, self.ranges = self.ranges, []
        for address, nbytes in ranges:
            _libc.munmap(address, nbytes)
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


class HostPool:
    """Slots of `slot_bytes` in host memory; a `Memory` whose place is HOST."""

    place = Place.HOST

    def __init__(
        self,
        slot_bytes: int,
        capacity: int,
        *,
        chunk_bytes: int = CHUNK_BYTES,
        register: Register | None = None,
        threads: int = 2,
        huge_pages: bool = True,
        cpus: Collection[int] = (),
        shared: SharedChunks | None = None,
    ) -> None:
        """Reserve addresses for `capacity` slots and begin to populate them in the background.

        shared: take every chunk from there, of its size, when its turn comes to be populated, and
        give it back there; the caller closes it after the pool.

        slot_bytes: a multiple of 4 KiB. chunk_bytes: populated, registered and given back as one;
        rounded down to whole slots, at least one. cpus: where the populating threads run, so
        that memory comes from their node. Raises ConfigError on sizes that cannot be meant.
        """
        if slot_bytes <= 0 or slot_bytes % GRAIN:
            raise ConfigError(f"host: slot_bytes {slot_bytes} is not a positive multiple of 4096")
        if capacity < 0 or threads < 1:
            raise ConfigError(f"host: capacity {capacity} slots, {threads} threads")
        self.slot_bytes = slot_bytes
        self._shared = shared
        if shared is not None:
            chunk_bytes = shared.chunk_bytes
            if chunk_bytes < slot_bytes:
                raise ConfigError(f"host: shared chunks of {chunk_bytes}, slots of {slot_bytes}")
        self.slots_per_chunk = max(1, chunk_bytes // slot_bytes)
        self._register = register
        self._threads = threads
        self._huge = huge_pages
        self._cpus = tuple(cpus)
        self._changed = threading.Condition()
        self._capacity = 0
        self._chunks: list[_Chunk] = []
        self._first = np.zeros(0, dtype=np.int64)
        self._base = np.zeros(0, dtype=np.uint64)
        self._working = 0
        self._failure: str | None = None
        self._closed = False
        fd = -1 if shared else os.memfd_create("tiermem-host", os.MFD_CLOEXEC)
        self._mapping = _Mapping(fd)
        self._finalizer = weakref.finalize(self, self._mapping.release)
        self._finalizer.atexit = False  # threads may still be populating; the kernel unmaps it
        self.resize(capacity)

    @property
    def capacity(self) -> int:
        return self._capacity

    @property
    def ready(self) -> int:
        """Slots below this are populated and registered."""
        with self._changed:
            return self._ready()

    @property
    def growing(self) -> bool:
        with self._changed:
            more = self._ready() < self._capacity and self._failure is None
            return more and not self._closed

    def _ready(self) -> int:
        for chunk in self._chunks:
            if not chunk.backed:
                return min(chunk.first, self._capacity)
        return self._capacity

    def addresses(self, slots: Slots) -> Addresses:
        """uint64[n]: where each slot's bytes are; the same for the life of the pool."""
        if len(slots) == 1:
            slot: int = slots.item()
            at = int(self._first.searchsorted(slot, side="right")) - 1
            inside_at = (slot - self._first.item(at)) * self.slot_bytes
            return np.array([self._base.item(at) + inside_at], np.uint64)
        index = np.searchsorted(self._first, slots, side="right") - 1
        inside = (slots - self._first[index]).astype(np.uint64)
        found: Addresses = self._base[index] + inside * np.uint64(self.slot_bytes)
        return found

    def file_offsets(self, slots: Slots) -> npt.NDArray[np.uint64]:
        """uint64[n]: where in the shared file each slot's bytes are, while it has its chunk."""
        with self._changed:
            starts = np.array([chunk.offset for chunk in self._chunks], np.int64)
        index = np.searchsorted(self._first, slots, side="right") - 1
        return (starts[index] + (slots - self._first[index]) * self.slot_bytes).astype(np.uint64)

    def wait_ready(self, slots: int, timeout_s: float | None = None) -> bool:
        """Block until `slots` slots are ready; False on timeout, failure or close."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        with self._changed:
            while self._ready() < slots:
                left = None if deadline is None else deadline - time.monotonic()
                stuck = self._failure is not None and not self._working
                if self._closed or stuck or slots > self._capacity:
                    return False
                if left is not None and left <= 0:
                    return False
                self._changed.wait(left)
            return True

    def resize(self, capacity: int) -> None:
        """Grow at once (slots follow in the background), or give back whole chunks at the top.

        Slots at or above a smaller capacity are unused when this is called. Addresses of other
        slots stay. A growth after a failure tries the failed chunk again.
        """
        if capacity < 0:
            raise ConfigError(f"host: capacity {capacity} slots")
        with self._changed:
            if self._closed:
                raise Closed("host: resize after close")
            covered = self._chunks[-1].first + self._chunks[-1].slots if self._chunks else 0
            if capacity > covered:
                self._extend(covered, capacity)
            self._capacity = capacity
            self._changed.notify_all()
            # A chunk in the hands of a thread is neither backed nor free: it is given back there.
            for chunk in self._chunks:
                if chunk.first >= capacity and chunk.backed:
                    self._give_back(chunk)
            self._failure = None
            missing = sum(not (c.backed or c.claimed) for c in self._chunks if c.first < capacity)
            for _ in range(min(self._threads - self._working, missing)):
                self._working += 1
                name = "tiermem-populate"
                threading.Thread(target=self._populate_all, name=name, daemon=True).start()

    def statistics(self) -> HostStatistics:
        with self._changed:
            backed = [c for c in self._chunks if c.backed]
            return HostStatistics(
                capacity=self._capacity,
                ready=self._ready(),
                bytes_held=sum(c.nbytes for c in backed),
                chunks=len(backed),
                registered=sum(c.registered for c in backed),
                in_hand=sum(c.claimed for c in self._chunks),
                failure=self._failure,
            )

    def close(self) -> None:
        """Unregister, unmap and free everything; the caller has ended all use of the slots."""
        with self._changed:
            if self._closed:
                return
            self._closed = True
            self._changed.notify_all()
            while self._working:
                self._changed.wait()
            for chunk in self._chunks:
                if chunk.registered:
                    self._unregister(chunk)
                chunk.backed = False
                if self._shared is not None:
                    self._punch(chunk)
        self._finalizer()

    def __enter__(self) -> HostPool:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # -- growing ---------------------------------------------------------------------------

    def _extend(self, first: int, capacity: int) -> None:
        """Reserve addresses and file for slots [first, capacity) and cut them into chunks."""
        # Offsets are congruent to addresses modulo a huge page, also after a growth.
        nbytes = (capacity - first) * self.slot_bytes
        if self._shared is not None:
            offset, address = 0, self._reserve(nbytes)
        else:
            offset = -(-os.fstat(self._mapping.fd).st_size // HUGE) * HUGE
            address = self._map(offset, nbytes)
        made = []
        for start in range(first, capacity, self.slots_per_chunk):
            slots = min(self.slots_per_chunk, capacity - start)
            delta = (start - first) * self.slot_bytes
            size = slots * self.slot_bytes
            made.append(_Chunk(start, slots, address + delta, offset + delta, size))
        self._chunks += made
        self._first = np.array([c.first for c in self._chunks], dtype=np.int64)
        self._base = np.array([c.address for c in self._chunks], dtype=np.uint64)

    def _map(self, offset: int, nbytes: int) -> int:
        """Map nbytes of the memfd at an address that is congruent for huge pages; its start."""
        address = self._reserve(nbytes)
        os.ftruncate(self._mapping.fd, offset + nbytes)
        self._map_at(address, nbytes, self._mapping.fd, offset)
        return address

    def _reserve(self, nbytes: int) -> int:
        """Addresses of which nothing stands behind any, from a multiple of a huge page on."""
        raw = _libc.mmap(None, nbytes + HUGE, 0, _NOTHING, -1, 0)
        if raw in (None, ctypes.c_void_p(-1).value):
            raise _driver_error("mmap", nbytes)
        self._mapping.ranges.append((raw, nbytes + HUGE))
        return -(-int(raw) // HUGE) * HUGE

    def _map_at(self, address: int, nbytes: int, fd: int, offset: int) -> None:
        fixed = mmap.MAP_SHARED | MAP_FIXED | MAP_NORESERVE
        access = mmap.PROT_READ | mmap.PROT_WRITE
        if _libc.mmap(address, nbytes, access, fixed, fd, offset) != address:
            raise _driver_error("mmap", nbytes)
        if self._huge:
            # Whole huge pages only, or the last one would hold more than the capacity. Refused
            # where the kernel has none for shared memory; then pages of 4 KiB serve.
            _libc.madvise(address, nbytes // HUGE * HUGE, MADV_HUGEPAGE)

    def _take_shared(self, chunk: _Chunk) -> None:
        """Take a chunk of the shared file and map it where this one belongs."""
        if self._shared is not None:
            index = self._shared.take()
            chunk.offset = index * self._shared.chunk_bytes
            chunk.taken = index
            self._map_at(chunk.address, chunk.nbytes, self._shared.fd, chunk.offset)

    def _populate_all(self) -> None:
        """A thread's life: claim the lowest missing chunk, populate and register it."""
        if self._cpus:
            stay_on(self._cpus)
        while (chunk := self._claim()) is not None:
            try:
                self._take_shared(chunk)
                if self._huge:
                    _collapse(chunk.address, chunk.nbytes)
                _populate(chunk.address, chunk.nbytes)
                if self._register is not None:
                    self._register.pin(chunk.address, chunk.nbytes)
            except Exception as error:
                self._give_up(chunk, error)
            else:
                with self._changed:
                    chunk.claimed, chunk.backed = False, True
                    chunk.registered = self._register is not None
                    if chunk.first >= self._capacity:  # the pool has been made smaller meanwhile
                        self._give_back(chunk)
                    self._changed.notify_all()

    def _claim(self) -> _Chunk | None:
        """The next chunk to populate; None ends the calling thread, and is counted in one step."""
        with self._changed:
            if not self._closed and self._failure is None:
                for chunk in self._chunks:
                    if chunk.first < self._capacity and not (chunk.backed or chunk.claimed):
                        chunk.claimed = True
                        return chunk
            self._working -= 1
            self._changed.notify_all()
            return None

    def _give_up(self, chunk: _Chunk, error: Exception) -> None:
        with self._changed:
            self._punch(chunk)
            chunk.claimed = False
            if self._failure is None and chunk.first < self._capacity:
                self._failure = f"{type(error).__name__}: {error}"
                log.warning(
                    "host pool stays at slots=%d of capacity=%d reason=%s",
                    self._ready(), self._capacity, self._failure,
                )  # fmt: skip
            self._changed.notify_all()

    # -- shrinking -------------------------------------------------------------------------

    def _give_back(self, chunk: _Chunk) -> None:
        if chunk.registered:
            self._unregister(chunk)
        chunk.backed = False
        self._punch(chunk)

    def _unregister(self, chunk: _Chunk) -> None:
        assert self._register is not None
        chunk.registered = False
        try:
            self._register.unpin(chunk.address)
        except Exception as error:
            # A context that is already gone cannot unpin, and has unpinned.
            log.warning("host unpin failed address=%#x reason=%s", chunk.address, error)

    def _punch(self, chunk: _Chunk) -> None:
        if self._shared is not None:
            if chunk.taken >= 0:
                _libc.mmap(chunk.address, chunk.nbytes, 0, _NOTHING | MAP_FIXED, -1, 0)
                self._shared.give(chunk.taken)
                chunk.taken = -1
            return
        if _libc.fallocate(self._mapping.fd, FALLOC_PUNCH, chunk.offset, chunk.nbytes) != 0:
            raise _driver_error("fallocate(PUNCH_HOLE)", chunk.nbytes)


def _collapse(address: int, nbytes: int) -> None:
    """Put huge pages behind the whole ones of a range; what cannot be had is left to `_populate`.

    MADV_COLLAPSE (Linux 6.1) gives them also where the system's setting for shared memory is
    "never", the kernel's default, under which the advice is ignored. A disk reads three times as
    fast into huge pages (FACTS, "Disk").
    """
    start = -(-address // HUGE) * HUGE
    whole = (address + nbytes - start) // HUGE * HUGE
    if whole <= 0:
        return
    # It collapses what is there: one small page in each makes it so.
    touched = np.ctypeslib.as_array((ctypes.c_uint8 * whole).from_address(start))
    touched[::HUGE] = 0
    _libc.madvise(start, whole, MADV_COLLAPSE)


def _populate(address: int, nbytes: int) -> None:
    """Put memory behind a mapped range, in one call that runs without the interpreter lock."""
    while _libc.madvise(address, nbytes, MADV_POPULATE_WRITE) != 0:
        number = ctypes.get_errno()
        if number in (errno.EINTR, errno.EAGAIN):
            continue
        if number != errno.EINVAL:
            raise _driver_error("madvise(POPULATE_WRITE)", nbytes)
        # Kernels before 5.14 do not know the advice: touch each page.
        touched = np.ctypeslib.as_array((ctypes.c_uint8 * nbytes).from_address(address))
        touched[::GRAIN] = 0
        return


def _driver_error(call: str, nbytes: int) -> DriverError:
    number = ctypes.get_errno()
    name = errno.errorcode.get(number, str(number))
    return DriverError(f"host: {call} of {nbytes} bytes failed: {name} ({os.strerror(number)})")
