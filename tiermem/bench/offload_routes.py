"""The routes themselves, without the pager: one way, both ways, beside other work, by page size.

Routes and tiers come from the same assembly that a space uses, so the path is the one really taken.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import numpy as np

from tiermem.assemble import Parts, assemble
from tiermem.bench.offload_run import Run, Settings
from tiermem.bench.offload_stream import DiskLoad, Lane, end, one_by_one, stream
from tiermem.bench.paging import BusyThread
from tiermem.bench.result import Beside, Direction, PageTime
from tiermem.bench.rig import Lap
from tiermem.config import Config, Gpu, Host, Nvme
from tiermem.errors import TierFull
from tiermem.tier import GPU, HOST, NVME, PASSED, Place

COPY_GROUPS = (1, 16, 64, 256)
DEPTHS = (1, 8, 32)
MAIN_GROUP = 64
MAIN_DEPTH = 8
IN_FLIGHT = 8  # batched calls; 64 pages of 2 MiB take 2.4 ms on PCIe 5, getting the lock back 5
SPARE = 64  # pages' worth of file for the slab's own records
READY_S = 120.0

Ends = tuple[Place, Place]
Mode = Literal["posix", "kvikio"]


class Bare:
    """Tiers and routes for one page size, filled once. n: slots of each tier that are used."""

    def __init__(
        self,
        settings: Settings,
        page: int,
        *,
        gpu: int | None = None,
        disk: bool = True,
        mode: Mode = "posix",
    ) -> None:
        """gpu: instead of the measured one. mode: the way between GPU and drive."""
        index = settings.index if gpu is None else gpu
        n = settings.count(page)
        on_disk = settings.nvme if disk else None
        self.page = page
        self.parts: Parts = assemble(
            Config(
                gpu=Gpu(
                    device=f"cuda:{index}" if settings.cuda else "cpu", budget=n * page, page=page
                ),
                host=Host(capacity=n * page * (2 if on_disk and settings.cuda else 1)),
                nvme=Nvme(path=on_disk, mode=mode, capacity=(n + SPARE) * page)
                if on_disk
                else Nvme(),
            )
        )
        try:
            self._wait_ready()
        except BaseException:
            self.parts.close()
            raise
        self.n = min(n, *(tier.ready for tier in self.parts.tiers.values()))

    def _wait_ready(self) -> None:
        until = time.monotonic() + READY_S
        for place, tier in self.parts.tiers.items():
            while tier.growing and tier.ready < self.parts.capacities[place]:
                if time.monotonic() > until:
                    break
                time.sleep(0.005)
            if not tier.ready:
                raise TierFull(f"{place.name.lower()}: nothing of it was ready in {READY_S:.0f} s")

    def lane(self, ends: Ends, part: slice = slice(None)) -> Lane:
        slots = np.arange(self.n, dtype=np.int32)[part]
        return Lane(self.parts.routes[ends], slots, slots)

    def close(self) -> None:
        self.parts.close()


@contextmanager
def bare(
    settings: Settings,
    page: int,
    *,
    gpu: int | None = None,
    disk: bool = True,
    mode: Mode = "posix",
) -> Iterator[Bare]:
    made = Bare(settings, page, gpu=gpu, disk=disk, mode=mode)
    try:
        yield made
    finally:
        made.close()


def copies(n: int) -> list[int]:
    """Sizes of batched calls that leave at least two of them in flight."""
    return [group for group in COPY_GROUPS if group <= n // 2]


def calls(depth: int) -> tuple[int, int]:
    """(pages of a call, calls in flight) for so many operations in flight on a drive: a few calls,
    so that one can end while the next is prepared."""
    size = max(1, depth // 4)
    return size, depth // size


def fill(lane: Lane) -> None:
    """Store every slot, so that reads find their checksums."""
    end([lane.route.submit(lane.src, lane.dst, PASSED)])


def steps(settings: Settings, page: int) -> int:
    """How many measurements `routes` announces."""
    links = 2 * (len(copies(settings.count(page))) + 1) + 1
    routes_to_disk = 0 if settings.nvme is None else 4 * len(DEPTHS) + 2 + 2
    return links + routes_to_disk


def routes(run: Run, page: int) -> None:
    """Every route of a space with these pages."""
    with bare(run.settings, page) as b:
        if b.parts.tiers.get(NVME) and not getattr(b.parts.tiers[NVME], "direct", True):
            run.note("no O_DIRECT in this directory: the drive's rows show the page cache")
        both = _Cells(run, b)
        for ends in ((GPU, HOST), (HOST, GPU)):
            for group in copies(b.n):
                both.one_way(ends, group)
        main = min(MAIN_GROUP, copies(b.n)[-1])
        both.both_ways((HOST, GPU), main)
        for ends in ((GPU, HOST), (HOST, GPU)):
            both.beside_python(ends, main)
        if (HOST, NVME) in b.parts.routes:
            _disk(both, b, main)


def _disk(cells: _Cells, b: Bare, main: int) -> None:
    for upper in (HOST, GPU):
        if (upper, NVME) not in b.parts.routes:
            continue
        for ends in ((upper, NVME), (NVME, upper)):
            for depth in DEPTHS:
                cells.one_way(ends, depth)
        cells.both_ways((NVME, upper), MAIN_DEPTH)
    for ends in ((GPU, HOST), (HOST, GPU)):
        cells.beside_disk(ends, main)


class _Cells:
    """Measures one cell of the table at a time: a round of warm-up, then the rounds that count."""

    def __init__(self, run: Run, b: Bare) -> None:
        self.run = run
        self.b = b
        self._filled = False

    def one_way(self, ends: Ends, group: int) -> None:
        self._begin(ends, group)
        lane = self.b.lane(ends)
        if NVME in ends:
            self._fill_disk()
        if group > 1:
            self._add(ends, group, self._laps([lane], group))
            return
        times: list[list[float]] = []

        def one(seconds: float) -> Lap:
            lap, took = one_by_one(lane, self.b.page, seconds)
            times.append(took)
            return lap

        laps = self.run.for_a_while(one)
        p50, p99 = np.percentile(np.concatenate(times[1:]), (50, 99))
        self._add(ends, 1, laps, page_us=PageTime(float(p50), float(p99)))

    def both_ways(self, ends: Ends, group: int) -> None:
        """`ends` names the row; the other direction moves the other half of the slots."""
        self._begin(ends, group, "both ways")
        if NVME in ends:
            self._fill_disk()
        half = self.b.n // 2
        there = self.b.lane(ends, slice(half))
        back = self.b.lane((ends[1], ends[0]), slice(half, None))
        self._add(ends, group, self._laps([there, back], group), direction="both")

    def beside_python(self, ends: Ends, group: int) -> None:
        self._begin(ends, group, "beside a Python thread")
        with BusyThread():
            laps = self._laps([self.b.lane(ends)], group)
        self._add(ends, group, laps, beside="python-thread")

    def beside_disk(self, ends: Ends, group: int) -> None:
        self._begin(ends, group, "beside the disk")
        self._fill_disk()
        half = self.b.n // 2
        upper = slice(half, half + half // 2), slice(half + half // 2, None)
        disk = [self.b.lane((HOST, NVME), upper[0]), self.b.lane((NVME, HOST), upper[1])]
        with DiskLoad(disk, self.b.page) as load:
            laps = self._laps([self.b.lane(ends, slice(half))], min(group, half // 2))
        self.run.written += load.nbytes // 2
        self._add(ends, group, laps, beside="disk")

    def _begin(self, ends: Ends, group: int, more: str = "") -> None:
        src, dst = (place.name.lower() for place in ends)
        self.run.told.begin(f"{src} to {dst}, {self.b.page >> 10} KiB x {group} {more}".rstrip())

    def _laps(self, lanes: Sequence[Lane], group: int) -> list[Lap]:
        on_disk = any(NVME in (lane.route.src, lane.route.dst) for lane in lanes)
        size, in_flight = calls(group) if on_disk else (group, IN_FLIGHT)
        stores = sum(lane.route.dst is NVME for lane in lanes)

        def lap(seconds: float) -> Lap:
            moved = stream(lanes, size, in_flight, self.b.page, seconds)
            self.run.written += moved.nbytes * stores // len(lanes)
            return moved

        return self.run.for_a_while(lap)

    def _add(
        self,
        ends: Ends,
        group: int,
        laps: Sequence[Lap],
        *,
        direction: Direction = "one-way",
        beside: Beside = "",
        page_us: PageTime | None = None,
    ) -> None:
        self.run.add(
            (self.run.end_name(ends[0]), self.run.end_name(ends[1])),
            self.b.page,
            group,
            laps,
            self.b.parts.paths.get(ends, ""),
            direction=direction,
            beside=beside,
            page_us=page_us,
        )

    def _fill_disk(self) -> None:
        """Whatever is read was written, so that reads find their checksums."""
        if self._filled:
            return
        fill(self.b.lane((HOST, NVME)))
        self.run.written += self.b.n * self.b.page
        self._filled = True
