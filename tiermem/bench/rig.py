"""A space to measure on: its shape, a stream, regions in groups of pages; and what a round took."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from tiermem.config import Config, Gpu, Host, Nvme
from tiermem.region import Pages, Region
from tiermem.space import Space
from tiermem.tier import Fence, Place

Hide = Literal["lazy", "eager"]
GROUP = 64
RING = 16  # pinned slots each way between a GPU and its drive, where the host tier is small
AHEAD = 4  # groups that a scene asks for before it needs them, as a scheduler's queue would


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
    """A space with a stream, for one scene after another: each reserves and closes its regions.

    Frames: the working set, and `spare_groups` groups more.
    """

    def __init__(self, shape: Shape, hide: Hide, spare_groups: int = 0) -> None:
        page = shape.page_bytes
        size = shape.nbytes + spare_groups * shape.group * page
        config = Config(
            gpu=Gpu(
                device=shape.device, budget=size, page=page, high=1.0, low=1.0,
                hide=hide, guard=shape.guard,
            ),
            host=_host(shape),
            nvme=_nvme(shape),
        )  # fmt: skip
        self.shape = shape
        self.hide = hide
        self.space = self._open(config)
        self.wait_ready()
        self.stream = _stream(self.space)

    def _open(self, config: Config) -> Space:
        return Space.open(config)

    def region(self, name: str) -> Region:
        """A region of the working set's size."""
        return self.space.reserve(self.shape.nbytes, name=name)

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
def rig(shape: Shape, hide: Hide = "lazy", spare_groups: int = 0) -> Iterator[Rig]:
    made = Rig(shape, hide, spare_groups)
    try:
        yield made
    finally:
        made.close()


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
    size = shape.nbytes + 64 * shape.page_bytes
    return Nvme(path=shape.nvme, mode="posix", capacity=size, high=1.0, low=1.0)


def _stream(space: Space) -> int:
    device = space.device
    if device.torch_device == "cpu":
        return device.new_stream()  # type: ignore[attr-defined, no-any-return]
    from tiermem.gpu.copy import open_stream

    return open_stream(device.context)  # type: ignore[attr-defined]
