"""When a large group of pages can be read: shown, and slice by slice (`tiermem.slices`)."""

from __future__ import annotations

import time

import numpy as np

from tiermem.bench.rig import Rig, Shape, rig
from tiermem.region import Pages, Region
from tiermem.slices import Arriving

EIGHTHS = 8


def slices(shapes: dict[str, Shape], rounds: int) -> dict[str, object]:
    """ms from `pin` until it returns, until a stream finds every page shown, and until it finds the
    first, fourth and last eighth of each; into frames that show nothing, and into stolen ones."""
    found: dict[str, object] = {}
    for name, shape in shapes.items():
        for hide, into in (("eager", "free"), ("lazy", "stolen")):
            with rig(shape, hide) as r:  # type: ignore[arg-type]
                laps = _laps(r, rounds)
            for i, what in enumerate(("call", "shown", "1/8", "4/8", "8/8")):
                key = f"{into} {name} x {shape.pages} {what} ms"
                found[key] = [1e3 * lap[i] for lap in laps]
    return found


def _laps(r: Rig, rounds: int) -> list[tuple[float, ...]]:
    """Two sets take turns on frames for one of them; the first lap is left out."""
    sets = [r.region("a"), r.region("b")]
    pages = [_filled(r, region) for region in sets]
    laps = []
    for turn in range(2 * rounds + 2):
        laps.append(_lap(r, sets[turn % 2], pages[turn % 2]))
        sets[turn % 2].hint(pages[turn % 2], "cold")
        r.space.drain()
    for region in sets:
        region.close()
    return laps[2:]


def _filled(r: Rig, region: Region) -> Pages:
    """All pages of a region, which have left the GPU."""
    pages = np.concatenate(r.fill(region))
    region.hint(pages, "cold")
    r.space.drain()
    return pages


def _lap(r: Rig, region: Region, pages: Pages) -> tuple[float, ...]:
    arriving, page_bytes = Arriving(), r.shape.page_bytes
    times = [time.perf_counter()]

    def passed() -> None:
        r.sync()
        times.append(time.perf_counter())

    region.pin(pages, "read", r.stream, kernels_only=True, arriving=arriving)
    times.append(time.perf_counter())
    passed()
    for eighth in range(1, EIGHTHS + 1):
        arriving.order(r.stream, page_bytes * eighth // EIGHTHS)
        passed()
    region.unpin(pages, r.stream)
    start, call, shown, *parts = times
    return tuple(t - start for t in (call, shown, parts[0], parts[3], parts[7]))
