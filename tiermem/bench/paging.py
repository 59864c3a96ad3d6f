"""Work through the whole pager, as an engine would ask for it: evict, load, steal, swap, fault.

A scene is an endless row of rounds on a rig that others may have used before it; its regions are
its own and are closed with it. Whoever measures leaves the first round out and takes as many as
it wants. Pages hold nothing in particular: what they hold is verified by the tests, here only time
counts.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from itertools import islice

import numpy as np

from tiermem.bench.rig import AHEAD, Lap, Rig, Watch
from tiermem.region import Pages, Region
from tiermem.tier import Done

Laps = Generator[Lap]
Scene = Callable[[Rig], Laps]


def take(laps: Laps, rounds: int) -> list[Lap]:
    """So many rounds of a scene, the warm-up left out."""
    with closing(laps):
        return list(islice(laps, 1, rounds + 1))


def evict(r: Rig) -> Laps:
    """A dirty working set going to the tier below; its frames are retired."""
    with r.region("a") as a:
        groups = r.fill(a)
        while True:
            watch = Watch()
            r.down(a, groups)
            yield watch.end(r.shape.nbytes, lambda: r.ways(down=True))
            r.dirty(a, groups)  # frames are taken back, spares dropped


def load(r: Rig, ahead: int = 0) -> Laps:
    """Demand loads into free frames; the rig hides at once what leaves.

    ahead: groups that are hinted before they are used.
    """
    with r.region("a") as a:
        groups = r.fill(a)
        while True:
            r.down(a, groups)
            yield _use_all(r, a, groups, ahead)
            r.dirty(a, groups)


def load_ahead(r: Rig) -> Laps:
    return load(r, AHEAD)


def steal(r: Rig, ahead: int = 0) -> Laps:
    """Demand loads each of which steals retired frames of another region."""
    with r.region("a") as a, r.region("b") as b:
        here = (a, r.fill(a))
        r.down(*here)
        there = (b, r.fill(b))
        while True:
            r.down(*there)
            yield _use_all(r, *here, ahead)
            here, there = there, here


def steal_ahead(r: Rig) -> Laps:
    return steal(r, AHEAD)


def swap(r: Rig) -> Laps:
    """One dirty region leaving while another comes; bytes of both ways.

    The rig has AHEAD groups of frames to spare.
    """
    with r.region("a") as a, r.region("b") as b:
        here = (a, r.fill(a))
        r.down(*here)
        there = (b, r.fill(b))
        while True:
            r.dirty(*there)
            watch = Watch()
            for i, pages in enumerate(here[1]):
                ahead = there[1][: AHEAD + 1] if not i else there[1][i + AHEAD : i + AHEAD + 1]
                for leaving in ahead:
                    there[0].hint(leaving, "cold")
                with here[0].use(pages, "read", r.stream, kernels_only=True):
                    pass
            r.sync()
            yield watch.end(2 * r.shape.nbytes, lambda: r.ways(up=True, down=True))
            r.space.drain()
            here, there = there, here


def down_and_up(r: Rig, ahead: int = 0) -> Generator[tuple[Lap, Lap]]:
    """One working set to the tier below and back: (its eviction, its loads) of each round."""
    with r.region("a") as a:
        groups = r.fill(a)
        while True:
            watch = Watch()
            r.down(a, groups)
            left = watch.end(r.shape.nbytes, lambda: r.ways(down=True))
            yield left, _use_all(r, a, groups, ahead)
            r.dirty(a, groups)


def fault_us(r: Rig, n: int, stealing: bool) -> list[float]:
    """us from use() of one page in the host tier until work on the stream may read it."""
    took = []
    with r.region("a") as a, r.region("b") as b:
        groups = r.fill(a)
        r.down(a, groups)
        if stealing:
            r.down(b, r.fill(b))
        for page in np.concatenate(groups)[:n].tolist():
            start = time.perf_counter()
            with a.use(page, "read", r.stream):
                r.sync()
                took.append((time.perf_counter() - start) * 1e6)
            r.space.drain()
    return took[min(10, n // 2) :]


def window_us(r: Rig, rounds: int) -> tuple[list[float], list[float]]:
    """us a page of showing and of hiding groups of pages, several groups in flight.

    Shows frames past the planner: on a rig without regions.
    """
    shows, hides = [], []
    shape, device = r.shape, r.space.device
    n, size = min(shape.pages, 8 * shape.group), shape.group
    start_address = device.reserve(n * shape.page_bytes)
    at = np.arange(n, dtype=np.uint64) * np.uint64(shape.page_bytes) + np.uint64(start_address)
    frames = np.arange(n, dtype=np.int32)
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


def allocate_us(r: Rig, n: int, rounds: int) -> tuple[list[float], list[float]]:
    """us to allocate n pages and to free them: an eager rig shows and hides, a lazy one finds them
    shown."""
    allocates, frees = [], []
    with r.region("a") as a:
        for _ in range(rounds + 1):
            start = time.perf_counter()
            pages = a.allocate(n)
            allocates.append((time.perf_counter() - start) * 1e6)
            start = time.perf_counter()
            a.free(pages)
            if r.hide == "eager":
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


def alone_per_s(seconds: float = 0.5) -> float:
    """What one thread of pure Python gets done in a second while nothing else runs."""
    with BusyThread() as alone:
        time.sleep(seconds)
    return alone.per_s


def _use_all(r: Rig, region: Region, groups: Sequence[Pages], ahead: int) -> Lap:
    """From the first use until the stream may read the last page."""
    watch = Watch()
    for pages in groups[:ahead]:
        region.hint(pages, "soon")
    for i, pages in enumerate(groups):
        for later in groups[i + ahead : i + ahead + 1] if ahead else ():
            region.hint(later, "soon")
        with region.use(pages, "read", r.stream, kernels_only=True):
            pass
    r.sync()
    nbytes = len(groups) * r.shape.group * r.shape.page_bytes
    lap = watch.end(nbytes, lambda: r.ways(up=True))
    r.space.drain()
    return lap


def _end(dones: Sequence[Done]) -> None:
    for done in dones:
        done.wait()
        assert done.error is None, done.error
