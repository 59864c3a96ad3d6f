"""The slots of a slab's file: how many there are, and how many have been written once.

A first write into space that was only allocated is about 10 times slower than a later one (FACTS,
ext4), so a thread writes zeros to [ready, capacity) in the background, in order. Nobody stores at
or above `ready`, so that never overwrites anything.
"""

from __future__ import annotations

import mmap
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tiermem.nvme.files import FileIo, take_room, write_whole

PREWRITE_BYTES = 8 << 20
"""Of one write of zeros."""


@dataclass(frozen=True, slots=True)
class SlabFile:
    """An open file and where its slots are. offset: where a slot begins."""

    fd: int
    io: FileIo
    directory: Path
    slot_bytes: int
    offset: Callable[[int], int]
    floor_bytes: int
    """Space that must stay free for others."""


class Extent:
    """Every method is called under the slab's lock, which is what is waited on too."""

    def __init__(
        self,
        file: SlabFile,
        lock: threading.Condition,
        failed: Callable[[OSError], None],
        *,
        prewrite: bool,
    ) -> None:
        """No slots yet. failed: told, without the lock, of the write error that ended pre-writing.
        prewrite: without it every slot counts as ready.
        """
        self.capacity = self.ready = 0
        self.prewritten = 0
        """Bytes of zeros written."""
        self._file, self._lock, self._failed, self._prewrite = file, lock, failed, prewrite
        self._writing = 0  # slots below this one are being written
        self._stopped = False
        self._thread: threading.Thread | None = None

    @property
    def growing(self) -> bool:
        return self.ready < self.capacity and not self._stopped

    def take_over(self, capacity: int, ready: int) -> None:
        """A file that has so many slots; ready: those known to have been written."""
        self.capacity = capacity
        self.ready = min(capacity, ready if self._prewrite else capacity)

    def grow(self, capacity: int) -> None:
        """Allocate up to `capacity` slots. Raises TierFull: nothing changed."""
        file = self._file
        start, end = file.offset(self.capacity), file.offset(capacity)
        start = min(start, os.fstat(file.fd).st_size)
        take_room(file.fd, start, end - start, file.floor_bytes, file.directory)
        self.capacity = capacity
        if not self._prewrite:
            self.ready = capacity

    def withdraw(self, capacity: int) -> None:
        """End at a smaller capacity; the file is as long as it was until `cut`."""
        self.capacity = capacity
        # A pre-write past the new end would make the file grow again: let it land first.
        self._lock.wait_for(lambda: self._writing <= capacity)
        self.ready = min(self.ready, capacity)

    def cut(self) -> None:
        """Give the space behind the last slot back."""
        os.ftruncate(self._file.fd, self._file.offset(self.capacity))

    def start(self) -> None:
        """Write what is not ready, now and whenever there is more of it."""
        if self._prewrite and self.ready < self.capacity and self._thread is None:
            self._thread = threading.Thread(target=self._run, name="tiermem-prewrite", daemon=True)
            self._thread.start()

    def wait_ready(self, slots: int, timeout_s: float | None) -> bool:
        """Block until so many are ready; False on timeout, or if they never will be."""
        self._lock.wait_for(
            lambda: self.ready >= slots or self._stopped or slots > self.capacity, timeout_s
        )
        return self.ready >= slots

    def stop(self) -> None:
        """Begin no further write; `join` waits for the one under way."""
        self._stopped = True
        self._lock.notify_all()

    def join(self) -> None:
        """Wait for the thread, without the lock and after `stop`."""
        if self._thread is not None:
            self._thread.join()

    # -- the thread ------------------------------------------------------------------------

    def _run(self) -> None:
        file = self._file
        step = max(1, PREWRITE_BYTES // file.slot_bytes)
        zeros = memoryview(mmap.mmap(-1, step * file.slot_bytes))
        while (claim := self._claim(step)) is not None:
            first, n = claim
            written = True
            try:
                write_whole(file.io, file.fd, zeros[: n * file.slot_bytes], file.offset(first))
            except OSError as error:
                written = False
                self._failed(error)
            with self._lock:
                self._writing = 0
                if written:
                    self.prewritten += n * file.slot_bytes
                    self.ready = min(first + n, self.capacity)
                self._lock.notify_all()

    def _claim(self, step: int) -> tuple[int, int] | None:
        """(first slot, count) to write next; blocks while all is ready; None at the end."""
        with self._lock:
            self._lock.wait_for(lambda: self._stopped or self.ready < self.capacity)
            if self._stopped:
                return None
            n = min(step, self.capacity - self.ready)
            self._writing = self.ready + n
            return self.ready, n
