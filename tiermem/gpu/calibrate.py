"""A short calibration of one device, kept in the cache directory per device and driver.

It answers two questions that differ from machine to machine: below which piece size the gather
kernel beats the copy engines, and how large a page must be for the link, not the driver's map and
unmap calls, to set the pace. Takes about a second, once.
"""

from __future__ import annotations

import ctypes
import json
import logging
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Final

import numpy as np

from tiermem.gpu.copy import Lane
from tiermem.gpu.driver import Context
from tiermem.gpu.frames import Arena, Backing, reserve
from tiermem.gpu.streams import Words
from tiermem.tier import Addresses
from tiermem.toolchain import cache_directory

log = logging.getLogger(__name__)

_FORMAT: Final = 2
# 4 to 128 KiB: from 256 KiB on copy engines reach 53.9 of 55 GB/s (FACTS "Copies", H200).
_SIZES: Final = tuple(4096 << n for n in range(6))
_SHARE: Final = 0.7  # of a swapped pair's time on the link that show and hide may take
_LARGEST_PAGES: Final = 16  # times the device's granularity
_ROUNDS: Final = 5
_WORTH: Final = 0.9  # the kernel takes processors from the model: it must win by a tenth


@dataclass(frozen=True, slots=True)
class Calibration:
    """What was measured. Sizes in bytes, rates in GB/s, `show_us` and `hide_us` a page.

    Pieces smaller than `gather_below_*` go through the gather kernel in that direction.
    """

    page_bytes: int
    gather_below_down: int = 0
    gather_below_up: int = 0
    show_us: float = 0.0
    hide_us: float = 0.0
    down_gbps: float = 0.0
    up_gbps: float = 0.0
    both_gbps: float = 0.0
    device: str = ""
    driver: str = ""


def path(context: Context) -> Path:
    """The file that holds this device's calibration under this driver."""
    return cache_directory() / f"cuda-{context.uuid}-{context.driver.version}.json"


def load(context: Context, backing: Backing) -> Calibration:
    """The stored calibration of this device and driver; measured now if there is none."""
    file = path(context)
    try:
        stored = json.loads(file.read_text())
        if stored.pop("format") == _FORMAT:
            return Calibration(**stored)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        log.debug("calibration file=%s not used: %s", file, error)
    measured = measure(context, backing)
    store(file, measured)
    return measured


def store(file: Path, calibration: Calibration) -> None:
    """Write the file in one step; a cache that cannot be written is no error."""
    text = json.dumps({"format": _FORMAT, **asdict(calibration)}, indent=1)
    try:
        handle, name = tempfile.mkstemp(dir=file.parent, prefix=file.name)
        with os.fdopen(handle, "w") as out:
            out.write(text)
        os.replace(name, file)
    except OSError as error:
        log.warning("calibration not kept file=%s reason=%s", file, error)


def measure(context: Context, backing: Backing, nbytes: int = 64 << 20) -> Calibration:
    """Measure now, moving `nbytes` a round (a multiple of 2 MiB)."""
    with context:
        bench = _Bench(context, backing, nbytes)
        try:
            found = bench.run()
        finally:
            bench.close()
    log.info("calibrate %s", found)
    return found


def page_for(calibration: Calibration, grain: int) -> int:
    """The smallest page for which a swapped pair is paced by the link, not by the driver.

    Showing and hiding cost the same for every page size (FACTS); two pages cross the link in the
    time in which the driver must hide one and show one. Larger pages move bytes nobody asked for.
    """
    both = calibration.both_gbps or 1.0
    for times in range(_LARGEST_PAGES.bit_length()):
        page = grain << times
        if calibration.show_us + calibration.hide_us <= _SHARE * 2 * page / both / 1e3:
            return page
    return grain * _LARGEST_PAGES


def crossover(seconds: Iterable[tuple[int, float, float]]) -> int:
    """The smallest size at which the kernel does not beat the copy engines by a tenth.

    seconds: (size, by the engines, by the kernel), the smallest size first; no more of them are
    looked at than it takes, so that one that was disturbed decides nothing about larger ones.
    """
    below = 0
    for size, engines, kernel in seconds:
        if kernel >= _WORTH * engines:
            break
        below = 2 * size
    return below


class _Bench:
    """Buffers and lanes of one measurement. The context is current."""

    def __init__(self, context: Context, backing: Backing, nbytes: int) -> None:
        self.context = context
        self.grain = backing.granularity(context)
        self.nbytes = nbytes
        self.arena = Arena(context, backing, nbytes, 2)
        self.words = Words(context, 2)
        self.lanes: list[Lane] = []
        self.host = 0
        self.arena.back(np.arange(2, dtype=np.int32))
        pointer = ctypes.c_uint64()
        context.driver.call("cuMemHostAlloc", ctypes.byref(pointer), 2 * nbytes, 3)
        self.host = pointer.value
        self.lanes = [Lane(context, self.words), Lane(context, self.words)]

    def run(self) -> Calibration:
        show_us, hide_us = self._window()
        found = Calibration(
            page_bytes=self.grain,
            gather_below_down=crossover(self._compared(up=False)),
            gather_below_up=crossover(self._compared(up=True)),
            show_us=show_us,
            hide_us=hide_us,
            down_gbps=self._rate(lambda: self._copy(self.nbytes, up=False)),
            up_gbps=self._rate(lambda: self._copy(self.nbytes, up=True)),
            both_gbps=2 * self._rate(self._copy_both),
            device=self.context.name,
            driver=self.context.driver.version_text,
        )
        return replace(found, page_bytes=page_for(found, self.grain))

    def _window(self, pages: int = 32) -> tuple[float, float]:
        """Median microseconds to show and to hide a page of the smallest size."""
        small = Arena(self.context, self.arena.backing, self.grain, 1)
        start = reserve(self.context, pages * self.grain, self.grain)
        call, desc = self.context.driver.call, self.arena.backing.access
        shows, hides = [], []
        try:
            small.back(np.zeros(1, np.int32))
            handle = int(small.handles[0])
            for address in range(start, start + pages * self.grain, self.grain):
                began = time.perf_counter()
                call("cuMemMap", address, self.grain, 0, handle, 0)
                call("cuMemSetAccess", address, self.grain, desc.ctypes.data, len(desc) // 3)
                shown = time.perf_counter()
                call("cuMemUnmap", address, self.grain)
                shows.append(shown - began)
                hides.append(time.perf_counter() - shown)
        finally:
            self.context.driver.attempt("cuMemAddressFree", start, pages * self.grain)
            small.close()
        return statistics.median(shows) * 1e6, statistics.median(hides) * 1e6

    def _copy(self, size: int, *, up: bool, gather: bool = False) -> None:
        """Move nbytes in scattered pieces of `size`, and wait."""
        dst, src, sizes = self._pieces(size, up)
        lane = self.lanes[up]
        lane.gather_below = size + 1 if gather else 0
        with lane.lock:
            done = lane.copy(dst, src, sizes)
        done.wait()

    def _copy_both(self) -> None:
        ends = []
        for up in (False, True):
            lane = self.lanes[up]
            lane.gather_below = 0
            with lane.lock:
                ends.append(lane.copy(*self._pieces(self.nbytes, up)))
        for done in ends:
            done.wait()

    def _pieces(self, size: int, up: bool) -> tuple[Addresses, Addresses, Addresses]:
        n = min(self.nbytes // size, 2048)
        order = np.random.default_rng(n).permutation(n).astype(np.uint64)
        at = np.arange(n, dtype=np.uint64) * np.uint64(size)
        device = at + self.arena.addresses(np.array([int(up)], np.int32))
        host = order * np.uint64(size) + np.uint64(self.host + int(up) * self.nbytes)
        sizes = np.full(n, size, np.uint64)
        return (device, host, sizes) if up else (host, device, sizes)

    def _rate(self, copy: Callable[[], None]) -> float:
        return self.nbytes / self._seconds(copy) / 1e9

    def _seconds(self, copy: Callable[[], None]) -> float:
        copy()
        times = []
        for _ in range(_ROUNDS):
            began = time.perf_counter()
            copy()
            times.append(time.perf_counter() - began)
        return statistics.median(times)

    def _compared(self, *, up: bool) -> Iterator[tuple[int, float, float]]:
        for size in _SIZES:
            engines = self._seconds(lambda s=size: self._copy(s, up=up))  # type: ignore[misc]
            kernel = self._seconds(lambda s=size: self._copy(s, up=up, gather=True))  # type: ignore[misc]
            yield size, engines, kernel

    def close(self) -> None:
        for lane in self.lanes:
            lane.close()
        self.words.close()
        if self.host:
            self.context.driver.attempt("cuMemFreeHost", self.host)
        self.arena.close()
