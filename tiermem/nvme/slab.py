"""The NVMe tier: one preallocated file of equal slots, and what is known of each slot.

    [ header | slot 0 | slot 1 | ... ]      slots of exactly `slot_bytes`, aligned to 4 KiB

The slab moves nothing: routes read and write its file and report here. Two columns say what a
slot should hold: the checksum of its bytes and a slab-wide sequence number, 0 while a store is
under way and before the first. A load is only believed if both are as they were recorded.
"""

from __future__ import annotations

import logging
import mmap
import os
import threading
import weakref
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tiermem.errors import Closed, ConfigError, TierFailed, TierFull
from tiermem.nvme.files import (
    FileIo,
    PosixIo,
    open_nameless,
    private_directory,
    take_room,
    write_whole,
)
from tiermem.tier import Place, Slots

log = logging.getLogger(__name__)

GRAIN = 4096
HEADER_BYTES = 64 << 10
PREWRITE_BYTES = 8 << 20
GIB = 1 << 30

Words = npt.NDArray[np.uint64]


@dataclass(frozen=True, slots=True)
class SlabStatistics:
    """Sizes of a slab. bytes_held is what the file system charges for it (st_blocks)."""

    capacity: int
    ready: int
    stored: int
    bytes_held: int
    byte_cap: int
    direct: bool
    failure: str | None


class Slab:
    """Slots of `slot_bytes` in a file under `path`; a `Tier` whose place is NVME."""

    place = Place.NVME

    def __init__(
        self,
        path: str | os.PathLike[str],
        slot_bytes: int,
        capacity: int,
        *,
        byte_cap: int | None = None,
        floor_bytes: int = 0,
        prewrite: bool = True,
        io: FileIo | None = None,
    ) -> None:
        """Allocate a nameless file for `capacity` slots in the directory `path`.

        byte_cap: bytes that may be on disk at most, metadata included; by default what `capacity`
        slots need. floor_bytes: space that must stay free for others. prewrite: write every slot
        once in the background and count it ready only then, because a first write into space
        that was only allocated is about 10 times slower than a later one (FACTS, ext4). io: the
        data calls. Raises ConfigError (path, sizes, cap), TierFull (disk).
        """
        if slot_bytes <= 0 or slot_bytes % GRAIN:
            raise ConfigError(f"nvme: slot_bytes {slot_bytes} is not a positive multiple of 4096")
        if capacity < 0:
            raise ConfigError(f"nvme: capacity {capacity} slots")
        self.slot_bytes = slot_bytes
        self.io: FileIo = io if io is not None else PosixIo()
        self._path = private_directory(path)
        self._floor = floor_bytes
        self._byte_cap = byte_cap if byte_cap is not None else bytes_for(capacity, slot_bytes)
        self._prewrite = prewrite
        self._lock = threading.Condition()
        self._capacity = self._ready = 0
        self._writing = 0
        self._next = 1
        self._closed = False
        self._failure: OSError | None = None
        self._checksum: Words = np.zeros(0, np.uint64)
        self._sequence: Words = np.zeros(0, np.uint64)
        self.fd, self.direct = open_nameless(self._path)
        self._finalizer = weakref.finalize(self, os.close, self.fd)
        self._thread: threading.Thread | None = None
        try:
            self.resize(capacity)
        except BaseException:
            self.close()
            raise

    # -- the tier --------------------------------------------------------------------------

    @property
    def capacity(self) -> int:
        return self._capacity

    @property
    def ready(self) -> int:
        return self._ready

    def resize(self, capacity: int) -> None:
        """Grow (TierFull, ConfigError over the byte cap: nothing changed) or cut the file's end.

        Slots at or above a smaller capacity are unused when this is called.
        """
        with self._lock:
            if self._closed:
                raise Closed("nvme: resize after close")
            self._check_cap(capacity)
            if capacity > self._capacity:
                self._grow(capacity)
            elif capacity < self._capacity:
                self._shrink(capacity)
            if self._prewrite and self._ready < self._capacity and self._thread is None:
                self._thread = threading.Thread(
                    target=self._prewrite_all, name="tiermem-prewrite", daemon=True
                )
                self._thread.start()
            self._lock.notify_all()

    def wait_ready(self, slots: int, timeout_s: float | None = None) -> bool:
        """Block until `slots` slots are ready; False on timeout, failure or close."""
        with self._lock:
            self._lock.wait_for(lambda: self._ready >= slots or self._stuck(slots), timeout_s)
            return self._ready >= slots

    def statistics(self) -> SlabStatistics:
        with self._lock:
            held = 0 if self._closed else os.fstat(self.fd).st_blocks * 512
            return SlabStatistics(
                capacity=self._capacity,
                ready=self._ready,
                stored=int(np.count_nonzero(self._sequence)),
                bytes_held=held,
                byte_cap=self._byte_cap,
                direct=self.direct,
                failure=None if self._failure is None else str(self._failure),
            )

    def close(self) -> None:
        """End pre-writing and close the file; routes over this slab are closed before."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._lock.notify_all()
            thread = self._thread
        if thread is not None:
            thread.join()
        self._finalizer()

    def __enter__(self) -> Slab:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # -- what routes ask and report --------------------------------------------------------

    @property
    def failure(self) -> OSError | None:
        """The write error that ended stores, if there was one; loads are still tried."""
        return self._failure

    def offset(self, slot: int) -> int:
        """Where a slot begins in the file."""
        return HEADER_BYTES + slot * self.slot_bytes

    def begin_store(self, slots: Slots) -> int:
        """Forget what these slots held and draw sequence numbers; the first of len(slots).

        Raises TierFailed if stores have failed, Closed after close, TierFull beyond `ready`.
        """
        with self._lock:
            if self._closed:
                raise Closed("nvme: store after close")
            if self._failure is not None:
                raise TierFailed(
                    f"nvme: no more stores in {self._path} after: {self._failure}; reopen the tier"
                )
            if len(slots) and int(slots.max()) >= self._ready:
                raise TierFull(
                    f"nvme: slot {int(slots.max())} is not ready: {self._ready} of "
                    f"{self._capacity} slots are; wait_ready()"
                )
            self._sequence[slots] = 0
            first = self._next
            self._next += len(slots)
            return first

    def end_store(self, slots: Slots, sequences: Words, checksums: Words) -> None:
        """Record what was written whole. The Done of the store is not ready before this."""
        with self._lock:
            self._checksum[slots] = checksums
            self._sequence[slots] = sequences

    def expected(self, slots: Slots) -> tuple[Words, Words]:
        """(sequences, checksums) that these slots should hold; sequence 0: nothing to be read."""
        with self._lock:
            return self._sequence[slots], self._checksum[slots]

    def forget(self, slots: Slots) -> None:
        """These slots hold nothing any more."""
        with self._lock:
            self._sequence[slots] = 0

    def fail(self, error: OSError) -> None:
        """A write failed: latch the tier for stores. What was stored before can still be read."""
        with self._lock:
            if self._failure is not None:
                return
            self._failure = error
            self._lock.notify_all()
        log.warning("nvme stores=off path=%s reason=%s", self._path, error)

    # -- the file --------------------------------------------------------------------------

    def _check_cap(self, capacity: int) -> None:
        need = bytes_for(capacity, self.slot_bytes)
        if need > self._byte_cap:
            fits = slots_for(self._byte_cap, self.slot_bytes)
            raise ConfigError(
                f"nvme.capacity: {capacity} slots of {self.slot_bytes} bytes need {need} bytes "
                f"with metadata, the cap is {self._byte_cap}: {fits} slots fit"
            )

    def _grow(self, capacity: int) -> None:
        start, end = self.offset(self._capacity), self.offset(capacity)
        size = os.fstat(self.fd).st_size
        take_room(self.fd, min(start, size), end - min(start, size), self._floor, self._path)
        more = np.zeros(capacity - self._capacity, np.uint64)
        self._checksum = np.concatenate([self._checksum, more])
        self._sequence = np.concatenate([self._sequence, more])
        self._capacity = capacity
        if not self._prewrite:
            self._ready = capacity

    def _shrink(self, capacity: int) -> None:
        self._capacity = capacity
        # A pre-write past the new end would make the file grow again: let it land first.
        self._lock.wait_for(lambda: self._writing <= capacity)
        self._ready = min(self._ready, capacity)
        self._checksum = self._checksum[:capacity].copy()
        self._sequence = self._sequence[:capacity].copy()
        os.ftruncate(self.fd, self.offset(capacity))

    def _stuck(self, slots: int) -> bool:
        return self._closed or self._failure is not None or slots > self._capacity

    def _prewrite_all(self) -> None:
        """Write zeros to slots [ready, capacity), a few at a time, for as long as the slab lives.

        Nobody stores at or above `ready`, so this never overwrites anything.
        """
        step = max(1, PREWRITE_BYTES // self.slot_bytes)
        zeros = memoryview(mmap.mmap(-1, step * self.slot_bytes))
        while (claim := self._claim_prewrite(step)) is not None:
            first, n = claim
            try:
                part = zeros[: n * self.slot_bytes]
                write_whole(self.io, self.fd, part, self.offset(first))
            except OSError as error:
                self.fail(error)
            with self._lock:
                self._writing = 0
                if self._failure is None:
                    self._ready = min(first + n, self._capacity)
                self._lock.notify_all()

    def _claim_prewrite(self, step: int) -> tuple[int, int] | None:
        """(first slot, count) to write next; blocks while all is ready; None at the end."""
        with self._lock:
            self._lock.wait_for(
                lambda: self._closed or self._failure is not None or self._ready < self._capacity
            )
            if self._closed or self._failure is not None:
                return None
            n = min(step, self._capacity - self._ready)
            self._writing = self._ready + n
            return self._ready, n


def bytes_for(capacity: int, slot_bytes: int) -> int:
    """Bytes on disk that a slab of `capacity` slots may come to, with its metadata."""
    return HEADER_BYTES + capacity * (slot_bytes + metadata_bytes(slot_bytes))


def slots_for(byte_cap: int, slot_bytes: int) -> int:
    """Slots that fit under a cap."""
    return max(0, (byte_cap - HEADER_BYTES) // (slot_bytes + metadata_bytes(slot_bytes)))


def metadata_bytes(slot_bytes: int) -> int:
    """Bytes of metadata set aside a slot: 1 %."""
    return max(slot_bytes // 100, 64)
