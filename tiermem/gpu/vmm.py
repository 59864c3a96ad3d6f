"""A CUDA device: frames, a window onto reserved addresses, copies, streams. See `tier.Device`."""

from __future__ import annotations

import logging
from typing import Final

from tiermem.errors import Closed, DriverError
from tiermem.gpu import calibrate
from tiermem.gpu.copy import CudaRoute, Lane
from tiermem.gpu.digest import FrameDigest
from tiermem.gpu.driver import Context, Driver, load
from tiermem.gpu.frames import DEVICE, HOST_NUMA, Arena, Backing, CudaFrames
from tiermem.gpu.streams import CudaStreams, Gate, Signal, Words
from tiermem.gpu.window import CudaWindow
from tiermem.tier import Addresses, Done, Memory, Place, Slots
from tiermem.units import format_bytes

log = logging.getLogger(__name__)

_HAS_VMM: Final = 102  # CUdevice_attribute
_HAS_WRITES: Final = 122
_HAS_HOST_VMM: Final = 141
_REGISTER: Final = 1 | 2  # portable, mapped
_LANES: Final = 512  # one page of words


class HostPages(CudaFrames):
    """Host memory made through the driver's VMM calls, on the device's NUMA node: a `Showable`.

    Copied from and to as any host tier's; processor and device use the same alias. Making a page
    takes 0.7 ms (FACTS "CUDA virtual memory", H200), so most are made in the background.
    """

    place = Place.HOST

    def __init__(self, context: Context, window: CudaWindow, slot_bytes: int, slots: int) -> None:
        if not context.attribute(_HAS_HOST_VMM):
            raise DriverError(
                f"{context.name}: the driver ({context.driver.version_text}) makes no host pages; "
                "reading in place needs driver 550 or newer; set host.read_in_place = false"
            )
        node = context.numa_node or 0
        self._window = window
        arena = Arena(context, Backing(context, HOST_NUMA, node), slot_bytes, slots)
        try:
            super().__init__(arena, slots)
        except BaseException:
            arena.close()
            raise

    def show(self, addresses: Addresses, slots: Slots) -> Done:
        return self._window.show_in_place(addresses, slots, self.arena)


class CudaDevice:
    """One GPU: `frames` of page_bytes each (at most max_frames), shown at reserved addresses.

    page_bytes: a multiple of the device's granularity (2 MiB), or "auto": measured once on this
    device and kept in the cache directory. Frames are backed in the background; `frames.ready`
    says how many are. Raises DriverError without CUDA or VMM support, TierFull if not even the
    first frames can be had.
    """

    def __init__(
        self,
        index: int = 0,
        page_bytes: int | str = "auto",
        frames: int = 0,
        max_frames: int | None = None,
        *,
        guard: bool = False,
        driver: Driver | None = None,
        calibration: calibrate.Calibration | None = None,
    ) -> None:
        most = frames if max_frames is None else max_frames
        if not 0 <= frames <= most or most == 0:
            raise DriverError(
                f"{frames} frames of at most {most}: need 0 <= frames <= max, max > 0"
            )
        self.context = Context(driver or load(), index)
        self._closed = False
        self._lanes: list[Lane] = []
        self._host_pages: list[HostPages] = []
        self._digests: list[FrameDigest] = []
        try:
            self._open(page_bytes, frames, most, guard, calibration)
        except BaseException:
            self.context.close()
            raise

    def _open(
        self,
        page_bytes: int | str,
        frames: int,
        most: int,
        guard: bool,
        calibration: calibrate.Calibration | None,
    ) -> None:
        context = self.context
        self.name = f"cuda:{context.index} {context.name}"
        for number, what in (
            (_HAS_VMM, "virtual memory management"),
            (_HAS_WRITES, "stream writes"),
        ):
            if not context.attribute(number):
                raise DriverError(f"{self.name} has no {what}; use the CPU device")
        backing = Backing(context, DEVICE, context.device)
        grain = backing.granularity(context)
        self.calibration = calibration or calibrate.load(context, backing)
        self.page_bytes = self.calibration.page_bytes if page_bytes == "auto" else int(page_bytes)
        if self.page_bytes <= 0 or self.page_bytes % grain:
            raise DriverError(
                f"gpu.page: {self.page_bytes} is not a multiple of {format_bytes(grain)}, the "
                f"smallest page of {self.name}"
            )
        self.frames = CudaFrames(Arena(context, backing, self.page_bytes, most), frames)
        try:
            self._words = Words(context, _LANES)
            self._gate = Gate(self._words)
            self.streams = CudaStreams(context)
            self._fill = self._lane()
            ended = Signal(self._words)
            self.window = CudaWindow(context, self.frames.arena, self._gate, ended, guard=guard)
        except BaseException:
            self.frames.close()
            raise

    @property
    def torch_device(self) -> str:
        return f"cuda:{self.context.index}"

    def _lane(self, gather_below: int = 0, gbps: float = 0.0, gate: Gate | None = None) -> Lane:
        lane = Lane(self.context, self._words, gather_below, gbps, gate)
        self._lanes.append(lane)
        return lane

    def _refuse_closed(self) -> None:
        if self._closed:
            raise Closed(f"{self.name} is closed")

    def reserve(self, nbytes: int) -> int:
        self._refuse_closed()
        return self.window.reserve(nbytes)

    def release(self, address: int, nbytes: int) -> None:
        self._refuse_closed()
        self.window.release(address, nbytes)

    def routes(self, host: Memory) -> tuple[CudaRoute, CudaRoute]:
        """(GPU to host, host to GPU), each on a stream of its own.

        `host` is pinned: registered through `register`, or `HostPages`.
        """
        self._refuse_closed()
        measured = self.calibration
        down = self._lane(measured.gather_below_down, measured.down_gbps, self._gate)
        up = self._lane(measured.gather_below_up, measured.up_gbps)
        return (
            CudaRoute(down, self.streams, self.frames, host),
            CudaRoute(up, self.streams, host, self.frames),
        )

    def host_pages(self, slots: int) -> HostPages:
        """Host memory whose slots can be shown in place; closed with the device."""
        self._refuse_closed()
        pages = HostPages(self.context, self.window, self.page_bytes, slots)
        self._host_pages.append(pages)
        return pages

    def zero(self, frames: Slots) -> Done:
        with self._fill.lock, self.context:
            return self._fill.zero(self.frames.addresses(frames), self.page_bytes)

    def digest(self) -> FrameDigest:
        self._refuse_closed()
        made = FrameDigest(self.context, self._lane().line, self.page_bytes)
        self._digests.append(made)
        return made

    def park(self, frames: Slots) -> None:
        self._refuse_closed()
        self.frames.arena.park(frames)

    def back(self, frames: Slots) -> None:
        self._refuse_closed()
        self.frames.arena.back(frames)

    @property
    def numa_node(self) -> int | None:
        """The node of host memory that is nearest; None where none is known."""
        return self.context.numa_node

    def register(self, address: int, nbytes: int) -> None:
        """Pin host memory for this device (and every other); without the interpreter lock."""
        with self.context:
            self.context.driver.call("cuMemHostRegister", address, nbytes, _REGISTER)

    def unregister(self, address: int) -> None:
        """Undo `register` of the memory that starts at `address`; after close it is undone."""
        if self._closed:
            return
        with self.context:
            self.context.driver.call("cuMemHostUnregister", address)

    def close(self) -> None:
        """End all work, give all memory back; a second call does nothing.

        Waits for the engine's streams up to their last tick: nothing is unmapped under work that
        may still touch it.
        """
        if self._closed:
            return
        self._closed = True
        for digest in self._digests:
            digest.close()
        for lane in self._lanes:
            lane.close()
        self.streams.close()
        self.window.close()
        for pages in self._host_pages:
            pages.close()
        self.frames.close()
        self._words.close()
        self.context.close()


def automatic_page(context: Context) -> int:
    """The page size that was measured best on this device, measured now if it never was."""
    return calibrate.load(context, Backing(context, DEVICE, context.device)).page_bytes
