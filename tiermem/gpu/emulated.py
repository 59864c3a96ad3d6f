"""The CPU device: the same window as on a GPU, made of mmap, and as strict as CUDA.

| on CUDA | here |
| --- | --- |
| address reservation | anonymous PROT_NONE mapping |
| physical handles (frames) | pages of one memory file; the arena is one mapping of all of it |
| map + set access, unmap | mmap at a fixed address, of the file or of nothing |
| streams, events | native threads with queues, which wait natively for one another's ticks |
| host pages read in place | pages of a second memory file, mapped to be read |
| copy engines | one thread each way, memcpy through the aliases |
| a kernel | a Python callable, run on its stream's thread by `launch` |

Refused with DriverError (or NotOurs, PageInUse), before anything is done: addresses off a page's
start or outside one reservation, mapping over a mapping, hiding what is not shown or what launched
work still uses, a parked frame, releasing a reservation that shows something. What only the books
can tell is in the group's ticket, the rest is raised. A stray access ends the process with SIGSEGV.

Beside one thread of pure Python, 2 MiB pages of scattered frames in groups of 64, 16 groups in
flight (2 CPUs of the H200 machine, medians of 7, 2026-11): 96 % of the quiet 485 groups/s, and that
thread loses nothing measurable (0.7 % faster; 0.5 % slower on 16 CPUs). With 4 in flight the
submitter wakes for each group, and the thread loses 7 %. Groups of 64 KiB pages take 120 us, so
Python's share shows: 98 % of 8,761 groups/s with 100 in flight, the thread 8 % slower.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import numpy as np

from tiermem.errors import Closed, DriverError
from tiermem.gpu import mappings
from tiermem.gpu.digest import ProcessorDigest
from tiermem.gpu.emulated_frames import EmulatedFrames
from tiermem.gpu.emulated_streams import EmulatedRoute, EmulatedStreams, Zeroing
from tiermem.gpu.emulated_window import EmulatedWindow
from tiermem.native import Ticket
from tiermem.tier import Addresses, Done, Memory, Place, Route, Slots, Streams, Window


class EmulatedHostPages(EmulatedFrames):
    """A host tier that can be read in place: pages of a memory file of its own."""

    place = Place.HOST

    def __init__(self, window: EmulatedWindow, slot_bytes: int, slots: int) -> None:
        super().__init__(slot_bytes, slots, slots)
        self._window = window
        window.attach(self.fd, slots)

    def show(self, addresses: Addresses, slots: Slots) -> Done:
        return self._window.show_in_place(addresses, slots)


class EmulatedDevice:
    """A `Device` without a GPU; see `tier.Device`.

    page_bytes: a multiple of the system's page size. frames: how many have memory at first, of
    max_frames that `back` can add up to. guard: absent addresses read as zeros.
    """

    torch_device = "cpu"

    def __init__(
        self,
        page_bytes: int,
        frames: int,
        max_frames: int | None = None,
        *,
        guard: bool = False,
        name: str = "cpu",
    ) -> None:
        most = frames if max_frames is None else max_frames
        if page_bytes <= 0 or page_bytes % mappings.PAGE:
            raise DriverError(
                f"page of {page_bytes} bytes; the CPU device maps multiples of {mappings.PAGE}"
            )
        if not 0 < frames <= most:
            raise DriverError(f"{frames} frames of at most {most}; at least 1, at most max_frames")
        self.name = name
        self.page_bytes = page_bytes
        self._frames = EmulatedFrames(page_bytes, frames, most)
        self._streams = EmulatedStreams()
        self._window = EmulatedWindow(self._frames, self._streams, guard=guard)
        self._zeroing = Zeroing(self._frames)
        self.frames: Memory = self._frames
        self.window: Window = self._window
        self.streams: Streams = self._streams
        self._routes: list[EmulatedRoute] = []
        self._host: EmulatedHostPages | None = None
        self._lock = threading.Lock()
        self._closed = False

    def reserve(self, nbytes: int) -> int:
        self._refuse_closed()
        return self._window.reserve(nbytes)

    def release(self, address: int, nbytes: int) -> None:
        self._refuse_closed()
        self._window.release(address, nbytes)

    def new_stream(self) -> int:
        """A stream for an engine, as `Streams.tick` takes it."""
        return self._streams.new()

    def launch(
        self,
        stream: int,
        fn: Callable[[], None],
        addresses: Addresses | Sequence[int] = (),
    ) -> Ticket:
        """Run `fn` on a stream behind all that is queued there: our stand-in for a kernel.

        addresses: the shown pages that it uses, which cannot be hidden until it has ended. An
        exception of `fn` is the ticket's error, and ends all later work of the stream, unrun.
        """
        self._refuse_closed()
        pages = np.asarray(addresses, np.uint64)
        return self._window.occupy(pages, lambda: self._streams.launch(stream, fn))

    def routes(self, host: Memory) -> tuple[Route, Route]:
        self._refuse_closed()
        down, up = (
            EmulatedRoute(self._frames, host, self._streams, down=direction)
            for direction in (True, False)
        )
        with self._lock:
            self._routes += [down, up]
        return down, up

    def host_pages(self, slots: int) -> EmulatedHostPages:
        self._refuse_closed()
        if self._host is not None:
            raise DriverError(f"device {self.name}: its host pages are made already")
        self._host = EmulatedHostPages(self._window, self.page_bytes, slots)
        return self._host

    def zero(self, frames: Slots) -> Done:
        return self._zeroing.submit(frames)

    def digest(self) -> ProcessorDigest:
        return ProcessorDigest(self.page_bytes)

    def park(self, frames: Slots) -> None:
        self._refuse_closed()
        with self._window.quiet():
            shown = self._window.shown(frames)
            if shown.any():
                raise DriverError(f"park: frame {frames[shown][0]} is shown; hide it first")
            self._frames.park(frames)

    def back(self, frames: Slots) -> None:
        self._refuse_closed()
        with self._window.quiet():
            self._frames.back(frames)

    def _refuse_closed(self) -> None:
        if self._closed:
            raise Closed(f"device {self.name}: closed")

    def close(self) -> None:
        """Let all queued work end, then give addresses and memory back; twice is fine.

        Work waits for work submitted before it, so this ends as soon as the launched callables do.
        """
        with self._lock:
            if self._closed:
                return
            self._closed = True
        self._streams.close()
        for route in self._routes:
            route.join()
        self._zeroing.close()
        self._window.close()
        self._frames.close()
        if self._host is not None:
            self._host.close()

    def __enter__(self) -> EmulatedDevice:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
