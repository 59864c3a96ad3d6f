"""The ways between a GPU and its drive, side by side: through rings of host slots, and kvikio.

Beside them the two legs by themselves, because a ring can be no faster than the slower one, and the
checksums that the GPU computes. All are measured in turns, round by round, on one slab.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path

import msgspec
import numpy as np

from tiermem.errors import TierMemError
from tiermem.host.pinned import HostPool, Register
from tiermem.nvme.bounce import BouncedRoute
from tiermem.nvme.kept import Persist
from tiermem.nvme.kvikio import KvikioFile, KvikioRoute, check_digest, probe
from tiermem.nvme.posix import DiskThreads
from tiermem.nvme.slab import Slab
from tiermem.tier import PASSED, Device, Digest, Done, Memory, Place, Route, Slots

RINGS = (8, 16, 32, 64)
"""Slots. A small ring stays in the processor's cache between the legs; a large one hides waits."""
IN_FLIGHT = 2
"""Submissions at once, so that no leg runs out of work between them."""

Rate = Callable[[], float]


class Way(msgspec.Struct, frozen=True, kw_only=True):
    """One way in one direction: GB/s (1e9 bytes), the median of its rounds and all of them."""

    direction: str
    way: str
    gbps: float
    rounds_gbps: tuple[float, ...]
    of_slower_leg: float | None
    """The median of the rounds' own ratios to the slower leg alone; None for a leg."""


class GpuTable(msgspec.Struct, frozen=True, kw_only=True):
    """What was measured on one device; pages: of each submission."""

    device: str
    page_bytes: int
    pages: int
    ways: tuple[Way, ...]
    probe: str
    """What the child process found about kvikio, in words."""
    digest_gbps: float
    digest_agrees: bool
    """Whether the device computes the processor's checksums."""
    notes: tuple[str, ...]


def measure(
    device: Device,
    where: Path,
    *,
    pages: int = 128,
    seconds: float = 0.5,
    rounds: int = 3,
    told: Callable[[str], None] = lambda text: None,
) -> GpuTable:
    """In a directory of the drive that is the caller's to remove; the device has `pages` frames."""
    notes: list[str] = []
    found = probe(where) if find_spec("kvikio") else None
    with ExitStack() as opened:
        slab = Slab(where, device.page_bytes, pages, persist=Persist("gpu"))
        opened.callback(slab.close)
        slab.wait_ready(pages)
        threads = opened.enter_context(DiskThreads(slab))
        host = opened.enter_context(_pinned(device, pages))
        digest = device.digest()
        opened.callback(digest.close)
        agrees = check_digest(digest, int(host.addresses(_some(1))[0]), device.page_bytes)
        ends = [Leg("disk", *threads.routes(host)), Leg("link", *device.routes(host))]
        ways = [_ring(opened, device, threads, slots) for slots in RINGS if slots <= pages]
        if found is not None and found.path != "none" and agrees:
            try:
                ways.append(_direct(opened, device, slab, digest, found.path))
            except TierMemError as error:
                notes.append(f"kvikio was left out: {error}")
        told("filling")
        _fill(ends[0].store, pages)
        measured = _in_turns([*ends, *ways], pages, device.page_bytes, seconds, rounds, told)
        gbps = _digest_rate(digest, device, pages, seconds)
    return GpuTable(
        device=device.name,
        page_bytes=device.page_bytes,
        pages=pages,
        ways=tuple(measured),
        probe="kvikio is not installed" if found is None else str(found),
        digest_gbps=gbps,
        digest_agrees=agrees,
        notes=tuple(notes),
    )


class Leg:
    """A way with its two routes; `load` brings pages up."""

    def __init__(self, name: str, store: Route, load: Route) -> None:
        self.name, self.store, self.load = name, store, load


@contextmanager
def _pinned(device: Device, slots: int) -> Iterator[HostPool]:
    """Host slots that the device's copy engines reach."""
    pin = getattr(device, "register", None)
    unpin = getattr(device, "unregister", None)
    register = None if pin is None or unpin is None else Register(pin, unpin)
    pool = HostPool(device.page_bytes, slots, register=register)
    try:
        pool.wait_ready(slots, 60.0)
        yield pool
    finally:
        pool.close()


def _ring(opened: ExitStack, device: Device, threads: DiskThreads, slots: int) -> Leg:
    rings: list[Memory] = [opened.enter_context(_pinned(device, slots)) for _ in range(2)]
    down, up = device.routes(rings[0])[0], device.routes(rings[1])[1]
    store = BouncedRoute(down, threads.routes(rings[0])[0], rings[0])
    load = BouncedRoute(threads.routes(rings[1])[1], up, rings[1])
    for route in (down, up, store, load):
        opened.callback(route.close)
    return Leg(f"ring of {slots}", store, load)


def _direct(opened: ExitStack, device: Device, slab: Slab, digest: Digest, path: str) -> Leg:
    file = KvikioFile(slab)
    opened.callback(file.close)
    ends = (Place.GPU, Place.NVME)
    store = KvikioRoute(file, slab, device.frames, *ends, digest, device.streams)
    load = KvikioRoute(file, slab, device.frames, *ends[::-1], digest, device.streams)
    opened.callback(store.close)
    opened.callback(load.close)
    return Leg(f"kvikio ({path})", store, load)


def _in_turns(
    legs: list[Leg],
    pages: int,
    page_bytes: int,
    seconds: float,
    rounds: int,
    told: Callable[[str], None],
) -> list[Way]:
    """Every way once a round, in both directions; the first two are the legs of the others."""
    made: list[Way] = []
    for direction in ("GPU to NVMe", "NVMe to GPU"):
        stores = direction == "GPU to NVMe"
        rates: list[list[float]] = [[] for _ in legs]
        for i in range(rounds):
            for n, leg in enumerate(legs if i % 2 == 0 else legs[::-1]):
                told(f"{direction}: {leg.name}, round {i + 1} of {rounds}")
                which = n if i % 2 == 0 else len(legs) - 1 - n
                route = leg.store if stores else leg.load
                rates[which].append(_rate(route, pages, page_bytes, seconds))
        slower = np.minimum(rates[0], rates[1])
        for n, leg in enumerate(legs):
            ratio = None if n < 2 else float(np.median(np.array(rates[n]) / slower))
            made.append(
                Way(
                    direction=direction,
                    way=leg.name,
                    gbps=statistics.median(rates[n]),
                    rounds_gbps=tuple(rates[n]),
                    of_slower_leg=ratio,
                )
            )
    return made


def _rate(route: Route, pages: int, page_bytes: int, seconds: float) -> float:
    """GB/s of half of the pages at a time, each half behind the other."""
    order = np.random.default_rng(pages)
    halves = np.array_split(order.permutation(pages).astype(np.int32), IN_FLIGHT)
    running: list[tuple[Done, int]] = []
    moved, began = 0, time.perf_counter()

    def end() -> int:
        done, n = running.pop(0)
        done.wait()
        if done.error is not None:
            raise done.error
        return n

    while time.perf_counter() - began < seconds:
        half = halves[0]
        running.append((route.submit(half, half, PASSED), len(half)))
        halves.reverse()
        if len(running) == IN_FLIGHT:
            moved += end()
    while running:
        moved += end()
    return moved * page_bytes / (time.perf_counter() - began) / 1e9


def _fill(store: Route, pages: int) -> None:
    done = store.submit(_some(pages), _some(pages), PASSED)
    done.wait()
    if done.error is not None:
        raise done.error


def _digest_rate(digest: Digest, device: Device, pages: int, seconds: float) -> float:
    """GB/s of frames whose checksum the device computes, host's part and waiting included."""
    addresses = device.frames.addresses(_some(pages))
    digest(addresses)
    done, began = 0, time.perf_counter()
    while time.perf_counter() - began < seconds:
        digest(addresses)
        done += pages
    return done * device.page_bytes / (time.perf_counter() - began) / 1e9


def _some(n: int) -> Slots:
    return np.arange(n, dtype=np.int32)
