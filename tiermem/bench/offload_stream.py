"""Moves pages over bare routes and takes the time: groups in flight, or one page at a time."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tiermem.bench.rig import Lap, Watch
from tiermem.tier import PASSED, Done, Route, Slots


@dataclass(frozen=True, slots=True)
class Lane:
    """One route with the slots that it moves between: src[i] to dst[i]."""

    route: Route
    src: Slots
    dst: Slots

    def cut(self, size: int) -> list[tuple[Slots, Slots]]:
        """The slots in a fixed random order, in groups of `size`."""
        order = np.random.default_rng(size).permutation(len(self.src))
        starts = range(0, len(order) - size + 1, size)
        return [(self.src[order[i : i + size]], self.dst[order[i : i + size]]) for i in starts]


def stream(lanes: Sequence[Lane], size: int, in_flight: int, page: int, seconds: float) -> Lap:
    """Move pages for about `seconds`: calls of `size` pages, several in flight on each lane.

    All lanes move the same number of pages, so the rate of both ways is twice the slower one's.
    """
    groups = [lane.cut(size) for lane in lanes]
    flying: deque[list[Done]] = deque()
    limit = max(1, min(in_flight, len(groups[0])))
    watch, until, calls = Watch(), time.perf_counter() + seconds, 0
    while not calls or time.perf_counter() < until:
        if len(flying) == limit:
            end(flying.popleft())
        parts = [cuts[calls % len(cuts)] for cuts in groups]
        flying.append(
            [lane.route.submit(*part, PASSED) for lane, part in zip(lanes, parts, strict=True)]
        )
        calls += 1
    while flying:
        end(flying.popleft())
    return watch.lap(calls * size * len(lanes) * page)


def one_by_one(lane: Lane, page: int, seconds: float) -> tuple[Lap, list[float]]:
    """One page at a time, each waited for: (the lap, us of each page)."""
    pages = lane.cut(1)
    times: list[float] = []
    watch, until = Watch(), time.perf_counter() + seconds
    while not times or time.perf_counter() < until:
        src, dst = pages[len(times) % len(pages)]
        began = time.perf_counter()
        end([lane.route.submit(src, dst, PASSED)])
        times.append((time.perf_counter() - began) * 1e6)
    return watch.lap(len(times) * page), times


def end(dones: Sequence[Done]) -> None:
    for done in dones:
        done.wait()
        if done.error is not None:
            raise done.error


class DiskLoad:
    """A thread that reads from the drive and writes to it until it is left."""

    def __init__(self, lanes: Sequence[Lane], page: int) -> None:
        self._lanes = lanes
        self._page = page
        self._stop = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="bench-disk", daemon=True)
        self.nbytes = 0

    def _run(self) -> None:
        try:
            while not self._stop:
                self.nbytes += stream(self._lanes, 2, 4, self._page, 0.02).nbytes
        except BaseException as error:
            self._error = error

    def __enter__(self) -> DiskLoad:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop = True
        self._thread.join()
        if self._error is not None and exc[0] is None:
            raise self._error
