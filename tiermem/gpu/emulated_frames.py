"""Frames of the CPU device: pages of one memory file, with an alias for each."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Iterable

import numpy as np

from tiermem.errors import DriverError, TierFull
from tiermem.gpu import mappings
from tiermem.native import Ticket
from tiermem.tier import Addresses, Mask, Place, Slots

Items = Slots | Addresses


class InFlight:
    """What unfinished work uses: frames, or addresses."""

    def __init__(self) -> None:
        self._work: deque[tuple[Ticket, Items]] = deque()
        self._lock = threading.Lock()

    def add(self, ticket: Ticket, items: Items) -> None:
        """Work that uses these items until its ticket is ready."""
        with self._lock:
            while self._work and self._work[0][0].ready():
                self._work.popleft()
            self._work.append((ticket, items))

    def using(self, items: Items) -> Mask | None:
        """bool[n]: which of these items unfinished work uses; None if there is no such work."""
        if not self._work:
            return None
        with self._lock:
            self._work = deque((t, used) for t, used in self._work if not t.ready())
            taken = [used for _, used in self._work]
        return np.isin(items, np.concatenate(taken)) if taken else None


class EmulatedFrames:
    """Pages of a memory file; every frame has an alias in one mapping of the whole file.

    `capacity` of `most` frames have memory (given at the first touch); those parked have none.
    """

    place: Place = Place.GPU

    def __init__(self, slot_bytes: int, capacity: int, most: int) -> None:
        self.slot_bytes = slot_bytes
        self.most = most
        self.in_flight = InFlight()
        self._capacity = capacity
        self.parked: Mask = np.arange(most) >= capacity
        self.fd = os.memfd_create("tiermem-frames", os.MFD_CLOEXEC)
        os.ftruncate(self.fd, most * slot_bytes)
        huge = slot_bytes % mappings.HUGE == 0
        self._alias = mappings.reserve(most * slot_bytes, max(slot_bytes, mappings.PAGE))
        mappings.alias(self._alias, self.fd, most * slot_bytes, huge=huge)

    @property
    def capacity(self) -> int:
        return self._capacity

    @property
    def ready(self) -> int:
        return self._capacity

    @property
    def growing(self) -> bool:
        return False

    def addresses(self, slots: Slots) -> Addresses:
        return slots.astype(np.uint64) * np.uint64(self.slot_bytes) + np.uint64(self._alias)

    def resize(self, capacity: int) -> None:
        """Back frames up to a larger capacity; park those at or above a smaller one."""
        if not 0 < capacity <= self.most:
            raise DriverError(f"frames: capacity {capacity}; this device has 1 to {self.most}")
        numbers = np.arange(self.most, dtype=np.int32)
        inside = numbers < capacity
        self.back(numbers[inside & self.parked])
        self.park(numbers[~inside & ~self.parked])
        self._capacity = capacity

    def check(self, slots: Slots) -> None:
        """Raise DriverError unless all of these are frames with memory behind them."""
        # Seen as unsigned, a negative number is too large as well.
        if len(slots) and int(np.maximum.reduce(slots.view(np.uint32))) >= self.most:
            raise DriverError(
                f"frames: {slots.min()} to {slots.max()} asked for; this device has {self.most}"
            )
        if np.count_nonzero(self.parked[slots]):
            first = int(slots[self.parked[slots]][0])
            raise DriverError(f"frames: frame {first} is parked; put memory behind it with `back`")

    def park(self, slots: Slots) -> None:
        """Give the memory of frames back; refuses those that a copy uses."""
        self.check(slots)
        used = self.in_flight.using(slots)
        if used is not None and used.any():
            raise DriverError(f"park: frame {slots[used][0]} is used by a copy that has not ended")
        for first, n in _runs(slots):
            mappings.punch(self.fd, first * self.slot_bytes, n * self.slot_bytes)
        self.parked[slots] = True

    def back(self, slots: Slots) -> None:
        """Put memory behind parked frames; raises TierFull, changing nothing, if there is none."""
        if len(slots) and not (slots.min() >= 0 and slots.max() < self.most):
            raise DriverError(f"back: frame {slots.max()}; this device has {self.most}")
        if not self.parked[slots].all():
            raise DriverError(f"back: frame {slots[~self.parked[slots]][0]} is not parked")
        try:
            for first, n in _runs(slots):
                os.posix_fallocate(self.fd, first * self.slot_bytes, n * self.slot_bytes)
        except OSError as error:
            for first, n in _runs(slots):
                mappings.punch(self.fd, first * self.slot_bytes, n * self.slot_bytes)
            raise TierFull(
                f"gpu (cpu device): no memory for {len(slots)} frames of {self.slot_bytes} bytes: "
                f"{error.strerror}; a smaller gpu.budget, or free memory on this machine"
            ) from error
        self.parked[slots] = False
        self._capacity = max(self._capacity, int(slots.max(initial=-1)) + 1)

    def close(self) -> None:
        if self.fd >= 0:
            mappings.unmap(self._alias, self.most * self.slot_bytes)
            os.close(self.fd)
            self.fd = -1


def _runs(slots: Slots) -> Iterable[tuple[int, int]]:
    """(first, count) of each run of neighbours."""
    ordered = np.unique(slots)
    for run in np.split(ordered, np.flatnonzero(np.diff(ordered) != 1) + 1):
        if len(run):
            yield int(run[0]), len(run)
