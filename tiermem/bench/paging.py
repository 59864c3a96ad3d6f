"""Work through the whole pager, as an engine would ask for it: evict, load, steal, swap, fault.

Each scenario opens a space of its own, so that one run's frames do not help the next. Pages hold
nothing in particular: what they hold is verified by the tests, here only time counts.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from tiermem.config import Config, Gpu, Host, Nvme
from tiermem.region import Pages, Region
from tiermem.space import Space
from tiermem.tier import Fence, Place

Hide = Literal["lazy", "eager"]
GROUP = 64
RING = 16  # pinned slots each way between a GPU and its drive, where the host tier is small
AHEAD = 4  # groups that a scenario asks for before it needs them, as a scheduler's queue would


@dataclass(frozen=True, slots=True)
class Shape:
    """What to measure on: page size, pages of the working set, pages asked for at once.

    nvme: a directory; pages then leave the GPU for a drive instead of host memory.
    """

    device: str
    page_bytes: int
    pages: int
    guard: bool = False
    group: int = GROUP
    nvme: Path | None = None

    @property
    def nbytes(self) -> int:
        return self.page_bytes * self.pages


@dataclass(frozen=True, slots=True)
class Lap:
    """One measured round: bytes moved, what that took of wall clock and of processors, and how
    the bytes really went."""

    nbytes: int
    took_s: float
    cpu_s: float
    path: str = ""

    @property
    def gbps(self) -> float:
        return self.nbytes / self.took_s / 1e9


class Watch:
    """Starts when it is made."""

    def __init__(self) -> None:
        self._cpu = time.process_time()
        self._wall = time.perf_counter()

    def lap(self, nbytes: int) -> Lap:
        took_s = time.perf_counter() - self._wall
        return Lap(nbytes, took_s, time.process_time() - self._cpu)

    def end(self, nbytes: int, ways: Callable[[], str]) -> Lap:
        """A lap with its path, asked for when the time has been taken."""
        return replace(self.lap(nbytes), path=ways())


class Rig:
    """A space with a stream, and two regions of the working set's size."""

    def __init__(self, shape: Shape, frames: int, hide: Hide) -> None:
        size, page = frames * shape.page_bytes, shape.page_bytes
        config = Config(
            gpu=Gpu(
                device=shape.device, budget=size, page=page, high=1.0, low=1.0,
                hide=hide, guard=shape.guard,
            ),
            host=_host(shape),
            nvme=_nvme(shape),
        )  # fmt: skip
        self.shape = shape
        self.space = Space.open(config)
        self.wait_ready()
        self.stream = _stream(self.space)
        self.a = self.space.reserve(shape.nbytes, name="a")
        self.b = self.space.reserve(shape.nbytes, name="b")

    def wait_ready(self) -> None:
        """Wait until host pool and slab are whole: their growth is measured elsewhere."""
        while any(t.capacity < t.configured for t in self.space.statistics().tiers):
            time.sleep(0.01)

    def sync(self) -> None:
        streams = self.space.device.streams
        tick = streams.tick(self.stream)
        if tick is not None:
            streams.wait(Fence((tick,)))

    def fill(self, region: Region) -> list[Pages]:
        """Allocate a region's pages in groups, resident and dirty."""
        groups = []
        for _ in range(self.shape.pages // self.shape.group):
            pages = region.allocate(self.shape.group)
            with region.use(pages, "write"):
                pass
            groups.append(pages)
        return groups

    def down(self, region: Region, groups: Sequence[Pages]) -> None:
        """Move groups to the tier below and wait for it."""
        for pages in groups:
            region.hint(pages, "cold")
        self.space.drain()

    def dirty(self, region: Region, groups: Sequence[Pages]) -> None:
        for pages in groups:
            with region.use(pages, "write"):
                pass

    def ways(self, *, up: bool = False, down: bool = False) -> str:
        """The paths that pages have taken to the GPU (up) and away from it (down)."""
        taken = {
            r.path: None
            for r in self.space.statistics().routes
            if r.pages and (up if r.dst is Place.GPU else down)
        }
        return " + ".join(taken)

    def close(self) -> None:
        self.sync()
        self.space.close()


@contextmanager
def rig(shape: Shape, frames: int, hide: Hide = "lazy") -> Iterator[Rig]:
    made = Rig(shape, frames, hide)
    try:
        yield made
    finally:
        made.close()


def evict(shape: Shape, rounds: int) -> list[Lap]:
    """A dirty working set going to the host, frames retired."""
    laps = []
    with rig(shape, shape.pages) as r:
        groups = r.fill(r.a)
        for _ in range(rounds + 1):
            watch = Watch()
            r.down(r.a, groups)
            laps.append(watch.end(shape.nbytes, lambda: r.ways(down=True)))
            r.dirty(r.a, groups)  # frames are taken back, spares dropped
    return laps[1:]


def load(shape: Shape, rounds: int, ahead: int = 0) -> list[Lap]:
    """Demand loads from the host into free frames (hidden at once on leaving).

    ahead: groups that are hinted before they are used.
    """
    laps = []
    with rig(shape, shape.pages, hide="eager") as r:
        groups = r.fill(r.a)
        for _ in range(rounds + 1):
            r.dirty(r.a, groups)
            r.down(r.a, groups)
            laps.append(_use_all(r, r.a, groups, ahead))
    return laps[1:]


def steal(shape: Shape, rounds: int, ahead: int = 0) -> list[Lap]:
    """Demand loads each of which steals retired frames of another region."""
    laps = []
    with rig(shape, shape.pages) as r:
        here = (r.a, r.fill(r.a))
        r.down(*here)
        there = (r.b, r.fill(r.b))
        for _ in range(2 * rounds + 1):
            r.down(*there)
            laps.append(_use_all(r, *here, ahead))
            here, there = there, here
    return laps[1:]


def swap(shape: Shape, rounds: int) -> list[Lap]:
    """One dirty region leaving while another comes; bytes of both ways."""
    laps = []
    with rig(shape, shape.pages + AHEAD * shape.group) as r:
        here = (r.a, r.fill(r.a))
        r.down(*here)
        there = (r.b, r.fill(r.b))
        for _ in range(rounds + 1):
            r.dirty(*there)
            watch = Watch()
            for i, pages in enumerate(here[1]):
                ahead = there[1][i : i + 1] if i else there[1][: AHEAD + 1]
                for leaving in ahead if not i else there[1][i + AHEAD : i + AHEAD + 1]:
                    there[0].hint(leaving, "cold")
                with here[0].use(pages, "read", r.stream):
                    pass
            r.sync()
            laps.append(watch.end(2 * shape.nbytes, lambda: r.ways(up=True, down=True)))
            r.space.drain()
            here, there = there, here
    return laps[1:]


def fault_us(shape: Shape, n: int, stealing: bool) -> list[float]:
    """us from use() of one page in the host tier until work on the stream may read it."""
    took = []
    with rig(shape, shape.pages, hide="lazy" if stealing else "eager") as r:
        groups = r.fill(r.a)
        r.down(r.a, groups)
        region = r.a
        if stealing:
            r.down(r.b, r.fill(r.b))
        for page in np.concatenate(groups)[:n].tolist():
            start = time.perf_counter()
            with region.use(page, "read", r.stream):
                r.sync()
                took.append((time.perf_counter() - start) * 1e6)
            r.space.drain()
    return took[min(10, n // 2) :]


def window_us(shape: Shape, rounds: int) -> tuple[list[float], list[float]]:
    """us a page of showing and of hiding groups of pages, several groups in flight."""
    shows, hides = [], []
    with rig(shape, shape.pages) as r:
        device, n = r.space.device, min(shape.pages, 8 * shape.group)
        start_address = device.reserve(n * shape.page_bytes)
        at = np.arange(n, dtype=np.uint64) * np.uint64(shape.page_bytes) + np.uint64(start_address)
        frames = np.arange(n, dtype=np.int32)
        size = shape.group
        groups = [(at[i : i + size], frames[i : i + size]) for i in range(0, n, size)]
        for _ in range(rounds + 1):
            start = time.perf_counter()
            _end([device.window.show(*group) for group in groups])
            shows.append((time.perf_counter() - start) / n * 1e6)
            start = time.perf_counter()
            _end([device.window.hide(where) for where, _ in groups])
            hides.append((time.perf_counter() - start) / n * 1e6)
        device.release(start_address, n * shape.page_bytes)
    return shows[1:], hides[1:]


def allocate_us(shape: Shape, n: int, rounds: int, hide: Hide) -> tuple[list[float], list[float]]:
    """us to allocate n pages and to free them: eager shows and hides, lazy finds them shown."""
    allocates, frees = [], []
    with rig(shape, shape.pages, hide=hide) as r:
        for _ in range(rounds + 1):
            start = time.perf_counter()
            pages = r.a.allocate(n)
            allocates.append((time.perf_counter() - start) * 1e6)
            start = time.perf_counter()
            r.a.free(pages)
            if hide == "eager":
                r.space.drain()
            frees.append((time.perf_counter() - start) * 1e6)
    return allocates[1:], frees[1:]


class BusyThread:
    """One thread that runs pure Python, and how much of it got done."""

    def __init__(self) -> None:
        self._stop = False
        self._count = 0
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        n = 0
        while not self._stop:
            for _ in range(1000):
                n += 1
            self._count = n

    def __enter__(self) -> BusyThread:
        self._start = time.perf_counter()
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop = True
        self._thread.join()
        self.per_s = self._count / (time.perf_counter() - self._start)


def beside_python(work: Callable[[], list[Lap]]) -> tuple[list[Lap], float]:
    """Laps of `work` beside a busy Python thread, and the percent that this thread lost."""
    with BusyThread() as alone:
        time.sleep(1.0)
    with BusyThread() as beside:
        laps = work()
    return laps, 100.0 * (1.0 - beside.per_s / alone.per_s)


def _use_all(r: Rig, region: Region, groups: Sequence[Pages], ahead: int) -> Lap:
    """From the first use until the stream may read the last page."""
    watch = Watch()
    for pages in groups[:ahead]:
        region.hint(pages, "soon")
    for i, pages in enumerate(groups):
        for later in groups[i + ahead : i + ahead + 1] if ahead else ():
            region.hint(later, "soon")
        with region.use(pages, "read", r.stream):
            pass
    r.sync()
    nbytes = len(groups) * r.shape.group * r.shape.page_bytes
    lap = watch.end(nbytes, lambda: r.ways(up=True))
    r.space.drain()
    return lap


def _end(dones: Sequence[object]) -> None:
    for done in dones:
        done.wait()  # type: ignore[attr-defined]
        assert done.error is None, done.error  # type: ignore[attr-defined]


def _host(shape: Shape) -> Host:
    """Room for two working sets; with a drive below, what the way there needs and no more."""
    if shape.nvme is None:
        size = 2 * shape.nbytes + 64 * shape.page_bytes
        return Host(capacity=size, high=1.0, low=1.0)
    if shape.device == "cpu":
        return Host(capacity=0)
    return Host(capacity=8 * RING * shape.page_bytes, high=0.05, low=0.02)


def _nvme(shape: Shape) -> Nvme:
    if shape.nvme is None:
        return Nvme()
    size = 2 * shape.nbytes + 64 * shape.page_bytes
    return Nvme(path=shape.nvme, capacity=size, high=1.0, low=1.0)


def _stream(space: Space) -> int:
    device = space.device
    if device.torch_device == "cpu":
        return device.new_stream()  # type: ignore[attr-defined, no-any-return]
    from tiermem.gpu.copy import open_stream

    return open_stream(device.context)  # type: ignore[attr-defined]
