"""GPU frames: one physical handle each, created ahead, with a permanent alias in a frame arena.

The alias is a second mapping of the handle, made once: copies and file I/O go through it, so they
do not care whether, or where, the frame is shown.
"""

from __future__ import annotations

import ctypes
import logging
import threading
from collections.abc import Iterable
from typing import Final

import numpy as np
import numpy.typing as npt

from tiermem.errors import Closed, DriverError, TierFull, TierMemError
from tiermem.gpu.driver import OUT_OF_MEMORY, Context
from tiermem.native import Failure, Kind, Program, group, interleave
from tiermem.tier import Addresses, Place, Slots
from tiermem.units import format_bytes

log = logging.getLogger(__name__)

_POSIX_FD: Final = 1
_READ_WRITE: Final = 3
DEVICE: Final = 1  # CUmemLocationType
HOST_NUMA: Final = 3
_HAS_POSIX_FD: Final = 103  # CUdevice_attribute
_HAS_RDMA: Final = 116
_HAS_RDMA_OF_VMM: Final = 110
_CHUNK: Final = 256  # frames backed at a time in the background (about 15 ms, H200, FACTS)

Handles = npt.NDArray[np.uint64]


class Backing:
    """How physical pages of one kind are made: a CUmemAllocationProp and the access they get."""

    def __init__(self, context: Context, location: int, index: int) -> None:
        self.location = location
        fd = _POSIX_FD if context.attribute(_HAS_POSIX_FD) else 0
        rdma = (
            location == DEVICE
            and context.attribute(_HAS_RDMA)
            and context.attribute(_HAS_RDMA_OF_VMM)
        )
        # type pinned, handle types, location, no Windows data (8 bytes), then the flag bytes
        # compression, gpuDirectRDMACapable, usage (2), reserved (4).
        words = [1, fd, location, index, 0, 0, (1 << 8) if rdma else 0, 0]
        self.prop = np.array(words, np.uint32)
        self.access = access(context.device)
        if location == HOST_NUMA:
            self.access = np.concatenate([self.access, access(index, HOST_NUMA)])
        self.exportable = bool(fd)

    def granularity(self, context: Context) -> int:
        """Page sizes are multiples of this many bytes."""
        size = ctypes.c_uint64()
        with context:
            context.driver.call(
                "cuMemGetAllocationGranularity", ctypes.byref(size), self.prop.ctypes.data, 0
            )
        return size.value


def access(index: int, location: int = DEVICE, flags: int = _READ_WRITE) -> npt.NDArray[np.uint32]:
    """uint32[3]: one CUmemAccessDesc."""
    return np.array([location, index, flags], np.uint32)


def reserve(context: Context, nbytes: int, page_bytes: int) -> int:
    """Reserve addresses, aligned to the largest power of two that divides page_bytes."""
    address = ctypes.c_uint64()
    alignment = page_bytes & -page_bytes
    with context:
        context.driver.call("cuMemAddressReserve", ctypes.byref(address), nbytes, alignment, 0, 0)
    return address.value


class Arena:
    """Slots of one handle each at fixed aliases. `handles[i]` is 0 where slot i is not backed."""

    def __init__(self, context: Context, backing: Backing, slot_bytes: int, slots: int) -> None:
        self.context = context
        self.backing = backing
        self.slot_bytes = slot_bytes
        self.slots = slots
        self.handles = [0] * slots
        self.address = reserve(context, slots * slot_bytes, slot_bytes)
        self._lock = threading.Lock()

    def addresses(self, slots: Slots) -> Addresses:
        if len(slots) == 1:
            return np.array([slots.item() * self.slot_bytes + self.address], np.uint64)
        return slots.astype(np.uint64) * np.uint64(self.slot_bytes) + np.uint64(self.address)

    def back(self, slots: Slots) -> None:
        """Create and map the handles of unbacked slots; all or nothing. Raises TierFull."""
        if len(slots) and not 0 <= slots.min() <= slots.max() < self.slots:
            raise DriverError(f"slots up to {slots.max()} asked for, the arena holds {self.slots}")
        with self._lock, self.context:
            if not self.address:
                raise Closed("the device is closed")
            missing = np.array([s for s in slots.tolist() if not self.handles[s]], np.int32)
            if not len(missing):
                return
            made = np.zeros(len(missing), np.uint64)
            try:
                self._create(made)
                self._map(self.addresses(missing), made)
            except TierMemError:
                self._release(made[made != 0])
                raise
            for slot, handle in zip(missing.tolist(), made.tolist(), strict=True):
                self.handles[slot] = handle

    def _create(self, made: Handles) -> None:
        driver = self.context.driver
        where = np.arange(len(made), dtype=np.uint64) * np.uint64(8) + np.uint64(made.ctypes.data)
        prop = self.backing.prop
        calls = group(
            driver.address("cuMemCreate"), Kind.STATUS, where, self.slot_bytes, prop.ctypes.data, 0
        )
        failure = Program(calls, keep=(made, prop)).run()
        if failure is None:
            return
        if failure.code != OUT_OF_MEMORY:
            raise driver.error("cuMemCreate", failure.code)
        size = format_bytes(self.slot_bytes)
        if self.backing.location == HOST_NUMA:
            raise TierFull(
                f"host: need {len(made)} pages of {size}, the driver gave {failure.index}; lower "
                "host.capacity, or free memory on this machine"
            )
        free, total = self.context.free_bytes()
        raise TierFull(
            f"gpu: need {len(made)} pages of {size}, the device gave {failure.index}; "
            f"{format_bytes(free)} free of {format_bytes(total)}; lower gpu.budget, or end other "
            "processes on the device"
        )

    def _map(self, addresses: Addresses, handles: Handles) -> None:
        """Map all, then let the device at them, one call for all that lie in a row.

        Beside copies to the host, also of another process, each such call waits for the copy
        engine (see `streams.Gate`), so there are to be few.
        """
        driver, size, desc = self.context.driver, self.slot_bytes, self.backing.access
        show = group(driver.address("cuMemMap"), Kind.STATUS, addresses, size, 0, handles, 0)
        starts = np.flatnonzero(np.diff(addresses, prepend=addresses[:1]) != size)
        lengths = np.diff(starts, append=len(addresses)).astype(np.uint64)
        let = group(
            driver.address("cuMemSetAccess"),
            Kind.STATUS,
            addresses[starts],
            lengths * np.uint64(size),
            desc.ctypes.data,
            len(desc) // 3,
        )
        hide = group(driver.address("cuMemUnmap"), Kind.STATUS, addresses, size)
        undo = np.concatenate([hide, np.zeros_like(let)])
        program = Program(np.concatenate([show, let]), undo, keep=(desc,))
        if (failure := program.run()) is not None:
            name = "cuMemMap" if failure.index < len(show) else "cuMemSetAccess"
            raise driver.error(name, failure.code, "while mapping a frame's alias")

    def _release(self, handles: Handles) -> Failure | None:
        if not len(handles):
            return None
        address = self.context.driver.address("cuMemRelease")
        return Program(group(address, Kind.STATUS, handles)).run()

    def export(self, slot: int) -> int:
        """A file descriptor of one slot's memory, for another process to import; the caller's."""
        fd = ctypes.c_int()
        with self._lock, self.context:
            self.context.driver.call(
                "cuMemExportToShareableHandle",
                ctypes.byref(fd),
                self.handles[slot],
                _POSIX_FD,
                0,
            )
        return fd.value

    def park(self, slots: Slots) -> None:
        """Unmap the aliases of slots and give their memory back; unbacked ones are skipped."""
        with self._lock, self.context:
            backed, handles = self._backed(slots.tolist())
            if not len(backed):
                return
            driver = self.context.driver
            calls = interleave(
                group(
                    driver.address("cuMemUnmap"),
                    Kind.STATUS,
                    self.addresses(backed),
                    self.slot_bytes,
                ),
                group(driver.address("cuMemRelease"), Kind.STATUS, handles),
            )
            failure = Program(calls).run()
            ended = backed if failure is None else backed[: failure.index // 2]
            for slot in ended.tolist():
                self.handles[slot] = 0
            if failure is not None:
                name = ("cuMemUnmap", "cuMemRelease")[failure.index % 2]
                raise driver.error(name, failure.code, "while giving a frame back")

    def _backed(self, slots: Iterable[int]) -> tuple[Slots, Handles]:
        """Those of these slots that have memory, and their handles."""
        backed = [slot for slot in slots if self.handles[slot]]
        handles = [self.handles[slot] for slot in backed]
        return np.array(backed, np.int32), np.array(handles, np.uint64)

    def close(self) -> None:
        """Give all memory and the addresses back, whatever fails; a second call does nothing."""
        with self._lock, self.context:
            if not self.address:
                return
            driver = self.context.driver
            backed, handles = self._backed(range(self.slots))
            if len(backed):
                at, size = self.addresses(backed), self.slot_bytes
                unmap = group(driver.address("cuMemUnmap"), Kind.PLAIN, at, size)
                give = group(driver.address("cuMemRelease"), Kind.PLAIN, handles)
                Program(interleave(unmap, give)).run()
            self.handles = [0] * self.slots
            driver.attempt("cuMemAddressFree", self.address, self.slots * self.slot_bytes)
            self.address = 0


class CudaFrames:
    """The GPU tier, and as `HostPages` the host tier: slots [0, ready) are backed, the rest of
    `capacity` follows in the background.

    A background failure (the device is full) leaves `ready` where it is; `shortage` says why.
    """

    place: Place = Place.GPU

    def __init__(self, arena: Arena, capacity: int) -> None:
        self.arena = arena
        self.slot_bytes = arena.slot_bytes
        self.shortage: TierFull | DriverError | None = None
        self._capacity = capacity
        self._ready = 0
        self._stop = threading.Event()
        self._back_next()
        self._thread = threading.Thread(target=self._fill, name="tiermem-frames", daemon=True)
        self._thread.start()

    @property
    def capacity(self) -> int:
        return self._capacity

    @property
    def ready(self) -> int:
        return self._ready

    @property
    def growing(self) -> bool:
        return self._thread.is_alive()

    def _back_next(self) -> None:
        upto = min(self._ready + _CHUNK, self._capacity)
        self.arena.back(np.arange(self._ready, upto, dtype=np.int32))
        self._ready = upto

    def _fill(self) -> None:
        while self._ready < self._capacity and not self._stop.is_set():
            try:
                self._back_next()
            except (TierFull, DriverError, Closed) as error:
                if not self._stop.is_set():
                    self.shortage = error if not isinstance(error, Closed) else None
                    tier = self.place.name.lower()
                    log.warning(
                        "%s frames backed=%d of=%d reason=%s",
                        tier, self._ready, self._capacity, error,
                    )  # fmt: skip
                return

    def wait_ready(self, timeout_s: float | None = None) -> bool:
        """Block until the background has ended; True if all of `capacity` is backed."""
        self._thread.join(timeout_s)
        return self._ready == self._capacity

    def addresses(self, slots: Slots) -> Addresses:
        """uint64[n]: the frames' aliases."""
        return self.arena.addresses(slots)

    def resize(self, capacity: int) -> None:
        """Back frames up to a larger capacity now, or give those above a smaller one back."""
        if capacity > self.arena.slots:
            tier = self.place.name.lower()
            raise TierFull(f"{tier}: {capacity} frames asked for, {self.arena.slots} at most")
        self._stop.set()
        self._thread.join()
        if capacity < self._ready:
            self.arena.park(np.arange(capacity, self.arena.slots, dtype=np.int32))
        else:
            self.arena.back(np.arange(self._ready, capacity, dtype=np.int32))
        self._capacity = self._ready = capacity

    def close(self) -> None:
        """Give everything back; a second call does nothing."""
        self._stop.set()
        self._thread.join()
        self.arena.close()
