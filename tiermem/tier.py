"""What the core asks of tiers, routes, windows and devices: protocols, and the slots they count in.

Tier = where bytes sit. Route = how they move. Window = what an address shows. Nothing here moves
a byte or knows a policy; implementations live in `gpu/`, `host/`, `nvme/` and pass the contract
suites of `tiermem.testing`.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from tiermem.errors import TierFull

Slots = npt.NDArray[np.int32]
Addresses = npt.NDArray[np.uint64]
Mask = npt.NDArray[np.bool_]


class Place(IntEnum):
    """Where the newest bytes of a page are."""

    NONE = 0
    GPU = 1
    HOST = 2
    NVME = 3
    LOST = 4


GPU, HOST, NVME = Place.GPU, Place.HOST, Place.NVME
AT_NONE, AT_GPU, AT_HOST, AT_NVME, AT_LOST = (int(place) for place in Place)
"""For numpy: comparing a column with a member of an enum takes 2.2 us, with an int 0.5."""

TIERS = (GPU, HOST, NVME)

_NO_SLOTS: Slots = np.empty(0, np.int32)
_READ_AHEAD = 16  # entries of a log that may be stale


@dataclass(frozen=True, slots=True)
class Fence:
    """A point on one or several streams: (stream index, tick) pairs; empty means already passed."""

    ticks: tuple[tuple[int, int], ...] = ()


PASSED = Fence()


class Done(Protocol):
    """The end of one submitted piece of work. Every Done ends, in success or in failure."""

    @property
    def error(self) -> Exception | None:
        """Why it failed as a whole or in part; None while running or after success."""

    @property
    def failed(self) -> Mask | None:
        """bool[n]: which of the n submitted entries failed; None when none did."""

    def ready(self) -> bool:
        """True once the work has ended. Costs no system call and keeps the interpreter lock."""

    def wait(self, timeout_s: float | None = None) -> bool:
        """Block until ready or until the timeout; returns `ready()`."""


@runtime_checkable
class Orderable(Protocol):
    """A Done whose work a stream can wait for without blocking the host (loads, shown pages)."""

    def order(self, stream: int | None) -> None:
        """Make `stream` wait for this work; returns at once."""


class Finished:
    """A Done that ended when it was made."""

    __slots__ = ("error", "failed")

    def __init__(self, error: Exception | None = None, failed: Mask | None = None) -> None:
        self.error = error
        self.failed = failed

    def ready(self) -> bool:
        return True

    def wait(self, timeout_s: float | None = None) -> bool:
        return True


class Tier(Protocol):
    """A set of slots with a capacity. Passive: it holds bytes, it moves nothing.

    Which slot is whose is decided by the planner's `SlotPool`; a tier only says how many slots
    are backed by memory at present (`ready`, which may grow in the background) and at most.
    """

    place: Place
    slot_bytes: int

    @property
    def capacity(self) -> int:
        """Slots at most, once everything that was configured is backed."""

    @property
    def ready(self) -> int:
        """Slots [0, ready) may be used now; never shrinks except by `resize`."""

    @property
    def growing(self) -> bool:
        """True while `ready` may still rise by itself."""

    def resize(self, capacity: int) -> None:
        """Change the capacity. Slots at or above a smaller one are unused when this is called."""

    def close(self) -> None:
        """Give everything back; a second call does nothing."""


class Memory(Tier, Protocol):
    """A tier whose slots the processor or the copy engines can address."""

    def addresses(self, slots: Slots) -> Addresses:
        """uint64[n]: where each slot's bytes are (a GPU frame's alias; a host slot's pointer)."""


class Route(Protocol):
    """Moves whole slots from one tier to another, asynchronously."""

    src: Place
    dst: Place

    def submit(self, src: Slots, dst: Slots, after: Fence) -> Done:
        """Copy slot src[i] to dst[i] for all i, once `after` has passed.

        src, dst: int32[n], n > 0, equal length, each slot at most once. Returns at once (it may
        block while the route's bounded queue is full). The caller keeps both slot sets reserved
        until the Done is ready. A destination that failed holds undefined bytes; `failed` says
        which. Raises TierFailed if the tier has latched a failure, Closed after close.
        """

    def close(self) -> None:
        """Refuse new work, end what is queued; every Done handed out ends."""


class Window(Protocol):
    """Shows frames at page addresses. Calls take effect in the order in which they are made.

    The addresses of one call lie in one reservation.
    """

    def show(self, addresses: Addresses, frames: Slots) -> Done:
        """Map frame frames[i] at addresses[i], whole and read-write. All or nothing.

        The addresses show nothing at present (mapping over a mapping is refused).
        """

    def hide(self, addresses: Addresses) -> Done:
        """Unmap the pages at these addresses, which all show something now. All or nothing."""


class Showable(Memory, Protocol):
    """Host memory whose slots a device can show at page addresses, for reading."""

    def show(self, addresses: Addresses, slots: Slots) -> Done:
        """Map slot slots[i] at addresses[i]; else as `Window.show`, and hidden by its `hide`."""


class Streams(Protocol):
    """Ticks of the streams that engines run on. A tick is a point; ticks grow within a stream."""

    def tick(self, stream: int | None) -> tuple[int, int] | None:
        """Mark a point behind all that is queued on `stream` now; (stream index, tick).

        None when the stream argument is None and the device has no default stream: work by the
        calling thread has ended when it returns.
        """

    def passed(self) -> npt.NDArray[np.uint64]:
        """uint64[streams]: the last tick that has passed on each stream index seen so far."""

    def wait(self, fence: Fence, timeout_s: float | None = None) -> bool:
        """Block the calling thread until the fence has passed."""


class Digest(Protocol):
    """Computes checksums of pages where they are: XXH3-64 over the XXH3-64s of 4 KiB pieces."""

    def __call__(self, addresses: Addresses) -> npt.NDArray[np.uint64]:
        """uint64[n]: of the pages at these addresses, whose writers have ended; waits for it.

        Raises DriverError.
        """

    def close(self) -> None:
        """Nobody computes any more; a second call does nothing."""


class Device(Protocol):
    """One GPU, or its stand-in on a CPU: address ranges, frames, window and streams."""

    page_bytes: int

    @property
    def name(self) -> str: ...

    @property
    def torch_device(self) -> str:
        """What torch calls it: "cpu", "cuda:0"."""

    @property
    def frames(self) -> Memory: ...

    @property
    def window(self) -> Window: ...

    @property
    def streams(self) -> Streams: ...

    def reserve(self, nbytes: int) -> int:
        """Reserve addresses (nothing behind them); nbytes a multiple of page_bytes. Its start."""

    def release(self, address: int, nbytes: int) -> None:
        """Give a reservation back, in which nothing is shown."""

    def routes(self, host: Memory) -> tuple[Route, Route]:
        """(GPU to host, host to GPU) between this device's frames and that host tier."""

    def host_pages(self, slots: int) -> Showable:
        """A host tier that can be read in place; once a device, closed with it."""

    def zero(self, frames: Slots) -> Done:
        """Fill frames with zeros through their aliases."""

    def digest(self) -> Digest:
        """What computes the checksums of frames at their aliases, made for one caller."""

    def park(self, frames: Slots) -> None:
        """Give the physical memory of frames back that are neither shown nor in use."""

    def back(self, frames: Slots) -> None:
        """Put physical memory behind parked frames again; raises TierFull when there is none."""

    def close(self) -> None:
        """End all work, give all memory back; a second call does nothing."""


class SlotPool:
    """Which slots of one tier are used, kept or free, and whose. Counts only; holds no bytes.

    used   the newest bytes of `owner` are here, or a transfer is filling the slot
    kept   a valid copy of bytes whose newest place is elsewhere: a retired GPU frame, a spare in
           a lower tier. May be taken at no cost, oldest first; `owner` is the page it copies
    free   nobody's; `owner` is -1

    used + kept + free == capacity, always. `tenant` is whose bytes the slot last held.

    Kept slots stand in a log, oldest first, each with a stamp; a slot is kept while the stamp of
    its entry is still the slot's own. So slots come and go, from the middle too, by whole arrays.
    """

    def __init__(self, place: Place, capacity: int) -> None:
        self.place = place
        self.capacity = 0
        self.owner: Slots = np.empty(0, np.int32)
        self.tenant: npt.NDArray[np.uint16] = np.empty(0, np.uint16)
        self._kept = 0
        self._stamp: npt.NDArray[np.int64] = np.zeros(0, np.int64)
        self._log: Slots = np.empty(0, np.int32)
        self._log_stamps: npt.NDArray[np.int64] = np.empty(0, np.int64)
        self._head = self._tail = self._clock = 0
        self._free: Slots = np.empty(0, np.int32)
        self._top = 0
        self._end: int | None = None
        self.add(np.arange(capacity, dtype=np.int32))

    @property
    def free(self) -> int:
        return self._top

    @property
    def kept(self) -> int:
        return self._kept

    @property
    def used(self) -> int:
        return self.capacity - self._top - self._kept

    @property
    def end(self) -> int:
        """One more than the last slot that can be had: where `bound` has set it."""
        return len(self.owner) if self._end is None else self._end

    def bound(self, end: int) -> None:
        """Slots [0, end) are the pool's from now on; bytes stand behind all of them.

        Free slots beyond it leave at once, the others when they are released. A larger end takes
        back those that had left.
        """
        old, self._end = self.end, end
        if end >= old:
            back = np.arange(old, end, dtype=np.int32)
            known = back[: max(0, len(self.owner) - old)]
            self.add(np.concatenate([known[self.owner[known] < 0], back[len(known) :]]))
            return
        free = self._free[: self._top]
        stay = free[free < end]
        self.capacity -= len(free) - len(stay)
        self._top = len(stay)
        self._free[: self._top] = stay

    def add(self, slots: Slots) -> None:
        """Slots that bytes now stand behind: new ones, or ones that `remove` took away."""
        if not len(slots):
            return
        size = max(len(self.owner), int(slots.max()) + 1)
        if size > len(self.owner):
            more = size - len(self.owner)
            self.owner = np.concatenate([self.owner, np.full(more, -1, np.int32)])
            self.tenant = np.concatenate([self.tenant, np.zeros(more, np.uint16)])
            self._free = np.concatenate([self._free, np.empty(more, np.int32)])
            self._stamp = np.concatenate([self._stamp, np.zeros(more, np.int64)])
        self.capacity += len(slots)
        self._push(slots[::-1])

    def remove(self, n: int) -> Slots:
        """Take up to n free slots out of the pool, to give their bytes back."""
        slots = self.take_free(max(0, min(n, self._top)))
        self.capacity -= len(slots)
        return slots

    def take_free(self, n: int) -> Slots:
        """int32[n] free slots, now used; raises TierFull, taking none, if there are fewer."""
        if n > self._top:
            raise TierFull(
                f"{self.place.name.lower()}: need {n} slots, {self._top} free, "
                f"{self.kept} kept, {self.used} used of {self.capacity}"
            )
        self._top -= n
        return self._free[self._top : self._top + n][::-1].copy()

    def take_one(self) -> int:
        """A free slot, now used; there is one."""
        assert self._top, f"{self.place.name}: no slot is free"
        self._top -= 1
        slot: int = self._free.item(self._top)
        return slot

    def claim(self, slots: Slots) -> None:
        """These free slots become used: their bytes were there before the pool was."""
        free = self._free[: self._top]
        rest = free[~np.isin(free, slots)]
        assert len(rest) == self._top - len(slots), "a slot that is claimed is not free"
        self._top = len(rest)
        self._free[: self._top] = rest

    def oldest(self) -> int:
        """The oldest kept slot, or -1; nothing changes."""
        while self._head < self._tail:
            slot: int = self._log.item(self._head)
            if self._stamp.item(slot) == self._log_stamps.item(self._head):
                return slot
            self._head += 1
        return -1

    def oldest_kept(self, n: int | None = None) -> Slots:
        """int32[<= n]: kept slots, oldest first; nothing changes."""
        wanted = self._kept if n is None else min(n, self._kept)
        found: list[Slots] = []
        at = self._head
        while wanted > 0:
            end = min(at + wanted + _READ_AHEAD, self._tail)
            part = self._log[at:end]
            live = self._stamp[part] == self._log_stamps[at:end]
            if at == self._head:
                self._head = at + int(live.argmax()) if live.any() else end
            found.append(part[live][:wanted])
            wanted -= len(found[-1])
            at = end
        return found[0] if len(found) == 1 else np.concatenate([*found, _NO_SLOTS])

    def keep(self, slots: Slots) -> None:
        """Used slots become kept, the newest of them; each stands once among them."""
        n, tail = len(slots), self._tail
        if tail + n > len(self._log):
            self._compact(n)
            tail = self._tail
        if n == 1:
            slot = slots.item()
            self._log[tail] = slot
            self._log_stamps[tail] = self._stamp[slot] = self._clock + 1
        else:
            stamps = np.arange(self._clock + 1, self._clock + n + 1)
            self._log[tail : tail + n] = slots
            self._log_stamps[tail : tail + n] = stamps
            self._stamp[slots] = stamps
        self._clock += n
        self._tail += n
        self._kept += n

    def _compact(self, n: int) -> None:
        """Make room for n more entries; half of the log is free then, so this is seldom."""
        live = self.oldest_kept()
        stamps = self._stamp[live]
        room = max(2 * (self._kept + n), 64)
        self._log, self._log_stamps = np.empty(room, np.int32), np.empty(room, np.int64)
        self._head, self._tail = 0, len(live)
        self._log[: self._tail] = live
        self._log_stamps[: self._tail] = stamps

    def reuse(self, slots: Slots) -> None:
        """Kept slots become used."""
        if len(slots) == 1:
            self.reuse_one(slots.item())
            return
        assert self._stamp[slots].all(), f"{self.place.name}: a slot is reused that is not kept"
        self._stamp[slots] = 0
        self._kept -= len(slots)

    def reuse_one(self, slot: int) -> None:
        """A kept slot becomes used."""
        assert self._stamp.item(slot), f"{self.place.name}: slot {slot} is reused and not kept"
        self._stamp[slot] = 0
        self._kept -= 1

    def is_kept(self, slot: int) -> bool:
        return bool(self._stamp[slot])

    def release(self, slots: Slots) -> None:
        """Used or kept slots become free. The caller clears the owners' references to them."""
        if self._kept:
            self._kept -= int(np.count_nonzero(self._stamp[slots]))
            self._stamp[slots] = 0
        self._push(slots)

    def _push(self, slots: Slots) -> None:
        self.owner[slots] = -1
        if self._end is not None and len(slots):
            inside = slots < self._end
            if not inside.all():
                slots = slots[inside]
                self.capacity -= int((~inside).sum())
        n = len(slots)
        self._free[self._top : self._top + n] = slots
        self._top += n

    def check(self) -> None:
        """Assert that every slot is in exactly one state."""
        free = self._free[: self._top]
        kept = self.oldest_kept()
        assert len(np.unique(kept)) == self.kept == int(np.count_nonzero(self._stamp)), (
            f"{self.place.name}: kept slots are miscounted"
        )
        assert len(np.unique(free)) == len(free), f"{self.place.name}: a slot is free twice"
        assert not np.isin(kept, free).any(), f"{self.place.name}: a kept slot is free"
        assert (self.owner[free] == -1).all(), f"{self.place.name}: a free slot has an owner"
        assert (free < self.end).all(), f"{self.place.name}: a slot beyond the end can be had"
        assert self.used >= 0, f"{self.place.name}: more slots free or kept than there are"
