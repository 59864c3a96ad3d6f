"""From how many touches on loading a page costs less than reading it in place, measured here."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Final

import numpy as np

from tiermem.books import Crossover
from tiermem.tier import PASSED, Device, Done, Route, Showable

_PAGES: Final = 8
_ROUNDS: Final = 5


def measure(device: Device, host: Showable, up: Route) -> Crossover:
    """Time what either way asks of the device; before anything else uses it (about 20 ms, H200).

    A kernel reads host pages at nearly the speed at which a copy brings them (90 % of it, bench
    offload, H200), so a touch in place counts as much as a copy. Loading besides costs showing the
    frame and hiding it again; where no frame is free another page leaves, and comes back later.
    """
    n = min(_PAGES, device.frames.ready, host.ready)
    page = device.page_bytes
    start = device.reserve(n * page)
    at = np.arange(n, dtype=np.uint64) * np.uint64(page) + np.uint64(start)
    slots = np.arange(n, dtype=np.int32)
    window = device.window
    load, place, copy = [], [], []
    for _ in range(_ROUNDS):
        copy.append(_seconds(lambda: up.submit(slots, slots, PASSED)) / n)
        shown = _seconds(lambda: window.show(at, slots)) + _seconds(lambda: window.hide(at))
        load.append(copy[-1] + shown / n)
        shown = _seconds(lambda: host.show(at, slots)) + _seconds(lambda: window.hide(at))
        place.append(shown / n)
    device.release(start, n * page)
    return crossover(median(load), median(place), median(copy))


def crossover(load_s: float, place_s: float, touch_s: float) -> Crossover:
    """load_s: to bring a page and take it away. place_s: to show and hide one in place."""
    return Crossover(*(max(0, int((n * load_s - place_s) / touch_s)) for n in (1, 2)))


def _seconds(work: Callable[[], Done]) -> float:
    start = time.perf_counter()
    done = work()
    done.wait()
    if done.error is not None:
        raise done.error
    return time.perf_counter() - start
