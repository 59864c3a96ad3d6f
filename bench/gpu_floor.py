"""What the driver and the link give on this GPU, and what our device layer makes of them.

    python bench/gpu_floor.py [--out floor.json] [--only SECTION ...]

Prints JSON: medians of at least five rounds, per section; a section that is in the output file
already is not measured again, so a run that was cut short can be continued. Sections:

ceilings  one 256 MiB copy down, up, both at once (GB/s)
floors    cuMemCreate, cuMemMap, cuMemSetAccess, cuMemUnmap, cuMemRelease of 2 MiB, one native
          program of 64 calls each (us a call)
floors_beside   map, access and unmap while copies run
stall     the same one by one, beside copies of other sizes and by the kernel (p50, p90, max)
window    show and hide through CudaWindow, groups of 64, waited for one by one and with eight in
          flight, and of 1 in the calling thread (us a page), 2 and 8 MiB
routes    submit to end, groups of 64 and 256, several in flight, each way and both (GB/s)
load      copy by alias and show together, groups of 64, into free and into stolen frames (GB/s)
swap      the same into stolen frames while as much goes down (GB/s, both ways together)
lonely    show and hide one page where nothing else is shown nearby, and beside pages that are (us)
fault     one page: submit, show, wait (us, p50 and p99), in either order, and with pauses between
busy      the same beside one thread of pure Python, and that thread's loss
interpreter   how long the lock takes to come back beside that thread, by what gave it away
gemm      a bf16 matrix product alone and beside swapping (ms, median; needs torch)
pieces    batched copies against the gather kernel by piece size, through `calibrate`
in_place  host pages: create, show, hide (us), the kernel's read rate (GB/s); read-only access
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import json
import mmap
import os
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np

from tiermem.gpu import calibrate
from tiermem.gpu.calibrate import Calibration
from tiermem.gpu.copy import CudaRoute, Lane
from tiermem.gpu.driver import Context, load
from tiermem.gpu.frames import DEVICE, Backing, access, reserve
from tiermem.gpu.vmm import CudaDevice
from tiermem.native import Kind, Program, group
from tiermem.tier import PASSED, Place

MIB = 1 << 20
PAGE = 2 * MIB
POOL = 1 << 30
IN_FLIGHT = 8  # groups; 64 pages of 2 MiB take 2.4 ms, the interpreter lock 5 to 10 to come back
Figures = dict[str, object]


class Pinned:
    """Host slots in anonymous memory, pinned through the device."""

    place = Place.HOST
    growing = False

    def __init__(self, device: CudaDevice, slot_bytes: int) -> None:
        self.slot_bytes = slot_bytes
        self.capacity = self.ready = POOL // slot_bytes
        self.memory = np.frombuffer(mmap.mmap(-1, POOL), np.uint8)
        self.memory[::4096] = 1
        self.address = int(self.memory.ctypes.data)
        self._device = device
        device.register(self.address, POOL)

    def addresses(self, slots: np.ndarray) -> np.ndarray:
        return slots.astype(np.uint64) * np.uint64(self.slot_bytes) + np.uint64(self.address)

    def resize(self, capacity: int) -> None:
        raise NotImplementedError

    def close(self) -> None:
        self._device.unregister(self.address)


class Rig:
    """One device with a gigabyte of frames, of host slots and of addresses, for a page size."""

    def __init__(self, page: int) -> None:
        self.page = page
        self.n = POOL // page
        self.device = CudaDevice(0, page, self.n)
        self.device.frames.wait_ready()
        self.host = Pinned(self.device, page)
        self.down, self.up = self.device.routes(self.host)
        self.up_stream = self.up.stream
        self.start = self.device.reserve(2 * POOL)
        self.frames = np.arange(self.n, dtype=np.int32)

    def at(self, first: int, count: int) -> np.ndarray:
        numbers = np.arange(first, first + count, dtype=np.uint64)
        return numbers * np.uint64(self.page) + np.uint64(self.start)

    def groups(self, size: int) -> list[np.ndarray]:
        order = np.random.default_rng(size).permutation(self.n).astype(np.int32)
        return [order[i : i + size] for i in range(0, self.n, size)]

    def close(self) -> None:
        self.host.close()
        self.device.close()


@contextmanager
def rig(page: int) -> Iterator[Rig]:
    made = Rig(page)
    try:
        yield made
    finally:
        made.close()


def median(run: Callable[[], float], rounds: int = 5) -> float:
    run()
    return round(statistics.median(run() for _ in range(rounds)), 3)


def seconds(work: Callable[[], None]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def end(*dones: object) -> None:
    for done in dones:
        assert done.wait(60), "did not end"
        if done.error is not None:
            raise done.error


def ceilings() -> Figures:
    size = 256 * MIB
    with rig(size) as r:
        a, b = np.array([0], np.int32), np.array([1], np.int32)

        def one(route: object) -> float:
            return size / seconds(lambda: end(route.submit(a, a, PASSED))) / 1e9

        def both() -> float:
            return (
                2
                * size
                / seconds(lambda: end(r.down.submit(a, a, PASSED), r.up.submit(b, b, PASSED)))
                / 1e9
            )

        return {
            "down_gbps": median(lambda: one(r.down)),
            "up_gbps": median(lambda: one(r.up)),
            "both_gbps": median(both),
        }


def floors() -> Figures:
    context = Context(load(), 0)
    driver, n = context.driver, 64
    backing = Backing(context, DEVICE, context.device)
    with context:
        start = reserve(context, n * PAGE, PAGE)
        at = np.arange(n, dtype=np.uint64) * np.uint64(PAGE) + np.uint64(start)
        handles = np.zeros(n, np.uint64)
        into = np.arange(n, dtype=np.uint64) * np.uint64(8) + np.uint64(handles.ctypes.data)
        desc = backing.access
        times: dict[str, list[float]] = {}

        def call(name: str, *columns: object) -> None:
            program = Program(group(driver.address(name), Kind.STATUS, *columns))
            began = time.perf_counter()
            failure = program.run()
            times.setdefault(name, []).append((time.perf_counter() - began) / n * 1e6)
            assert failure is None, f"{name}: {failure}"

        for _ in range(7):
            call("cuMemCreate", into, PAGE, backing.prop.ctypes.data, 0)
            call("cuMemMap", at, PAGE, 0, handles, 0)
            call("cuMemSetAccess", at, PAGE, desc.ctypes.data, len(desc) // 3)
            call("cuMemUnmap", at, PAGE)
            call("cuMemRelease", handles)
        driver.call("cuMemAddressFree", start, n * PAGE)
    context.close()
    found: Figures = {f"{name}_us": round(statistics.median(t[1:]), 2) for name, t in times.items()}
    found["show_us"] = round(
        sum(float(found[f"{c}_us"]) for c in ("cuMemMap", "cuMemSetAccess")), 2
    )
    found["hide_us"] = found["cuMemUnmap_us"]
    return found


def floors_beside() -> Figures:
    """Map, access and unmap while copies run: a call a page, and one call for 64 in a row."""
    found: Figures = {}
    with rig(PAGE) as r:
        context, driver, n = r.device.context, r.device.context.driver, 64
        handles = np.array(r.device.frames.arena.handles[:n], np.uint64)
        desc, at = r.device.frames.arena.backing.access, r.at(0, n)
        where, descs = desc.ctypes.data, len(desc) // 3

        def program(name: str, *columns: object) -> Program:
            return Program(group(driver.address(name), Kind.STATUS, *columns))

        first = at[:1].copy()
        programs = {
            "map": program("cuMemMap", at, PAGE, 0, handles, 0),
            "access": program("cuMemSetAccess", at, PAGE, where, descs),
            "unmap": program("cuMemUnmap", at, PAGE),
            "map ": program("cuMemMap", at, PAGE, 0, handles, 0),
            "access_64": program("cuMemSetAccess", first, n * PAGE, where, descs),
            "unmap_64": program("cuMemUnmap", first, n * PAGE),
        }
        groups = r.groups(64)
        loads_ = {"quiet": (), "down": (r.down,), "up": (r.up,), "both": (r.down, r.up)}
        for name, routes_ in loads_.items():
            times: dict[str, list[float]] = {}
            submits: list[float] = []
            copies: list[object] = []
            with context:
                for turn in range(12):
                    for route in routes_:
                        g = groups[turn % len(groups)]
                        began = time.perf_counter()
                        copies.append(route.submit(g, g, PASSED))
                        submits.append((time.perf_counter() - began) * 1e6)
                    for call, rows in programs.items():
                        began = time.perf_counter()
                        failure = rows.run()
                        took = (time.perf_counter() - began) / n * 1e6
                        assert failure is None, f"{call}: {failure}"
                        times.setdefault(call.strip(), []).append(took)
            ran = not copies or not copies[-1].ready()
            end(*copies)
            found[name] = {f"{k}_us": round(statistics.median(v), 2) for k, v in times.items()}
            found[name] |= {"copies_ran_throughout": ran}
            if submits:
                found[name]["submit_64_us"] = [round(min(submits)), round(max(submits))]
    return found


def stall() -> Figures:
    """One map, access, unmap at a time while copies of several forms are in flight (us)."""
    found: Figures = {}
    with rig(PAGE) as r:
        kernels = Lane(r.device.context, r.device._words, 1 << 30)  # everything by the kernel
        by_kernel = {
            "down": CudaRoute(kernels, r.device.streams, r.device.frames, r.host),
            "up": CudaRoute(kernels, r.device.streams, r.host, r.device.frames),
        }
        forms: dict[str, tuple[int, list[CudaRoute]]] = {"quiet": (PAGE, [])}
        for way, route in (("down", r.down), ("up", r.up)):
            forms |= {f"{way}_{k}KiB": (k * 1024, [route]) for k in (2048, 512, 128)}
            forms[f"{way}_kernel"] = (PAGE, [by_kernel[way]])
        forms["both_2048KiB"] = (PAGE, [r.down, r.up])
        forms["both_512KiB"] = (512 * 1024, [r.down, r.up])
        for name, (piece, routes_) in forms.items():
            found[name] = stall_of(r, piece, routes_)
        kernels.close()
    return found


def stall_of(r: Rig, piece: int, routes_: list[CudaRoute]) -> Figures:
    driver, desc = r.device.context.driver, r.device.frames.arena.backing.access
    handle, calls = r.device.frames.arena.handles[0], {"map": [], "access": [], "unmap": []}
    at = np.arange(POOL // piece, dtype=np.uint64) * np.uint64(piece)
    frame, host = r.device.frames.addresses(r.frames[:1])[0], r.host.addresses(r.frames[:1])[0]
    sizes = np.full(len(at), piece, np.uint64)
    dones: list[object] = []
    began = time.perf_counter()
    for first in range(0, len(at), 1024):
        part = slice(first, first + 1024)
        for route in routes_:
            ends = at[part] + frame, at[part] + host
            src, dst = ends if route.src == Place.GPU else ends[::-1]
            dones.append(route.submit_pieces(src, dst, sizes[part], PASSED))
    submitted = time.perf_counter()
    n = 0
    while n < 300 and (not dones or not all(done.ready() for done in dones)):
        address = r.start + (n % 256) * PAGE
        t0 = time.perf_counter()
        driver.call("cuMemMap", address, PAGE, 0, handle, 0)
        t1 = time.perf_counter()
        driver.call("cuMemSetAccess", address, PAGE, desc.ctypes.data, len(desc) // 3)
        t2 = time.perf_counter()
        driver.call("cuMemUnmap", address, PAGE)
        t3 = time.perf_counter()
        n += 1
        for times, took in zip(calls.values(), (t1 - t0, t2 - t1, t3 - t2), strict=True):
            times.append(took * 1e6)
    end(*dones)
    ended = time.perf_counter()
    found: Figures = {"pages": n, "submit_ms": round((submitted - began) * 1e3, 2)}
    for name, times in calls.items():
        found[name] = [round(float(x), 1) for x in np.percentile(times, [50, 90, 100])] if n else []
    if dones:
        found["gbps"] = round(len(routes_) * POOL / (ended - began) / 1e9, 1)
    return found


def window_of(r: Rig, size: int, rounds: int = 5) -> tuple[float, float]:
    window, shows, hides = r.device.window, [], []
    for _ in range(rounds + 1):
        for first in range(0, min(r.n, 4 * max(size, 16)), size):
            at, frames = r.at(first, size), r.frames[first : first + size]
            shows.append(seconds(lambda a=at, f=frames: end(window.show(a, f))) / size * 1e6)
            hides.append(seconds(lambda a=at: end(window.hide(a))) / size * 1e6)
    return round(statistics.median(shows), 2), round(statistics.median(hides), 2)


def window_stream(r: Rig, size: int = 64) -> Figures:
    """All groups submitted at once, the last waited for: the pace of the window's own thread."""
    window, shows, hides = r.device.window, [], []
    starts = range(0, min(r.n, IN_FLIGHT * size), size)
    for _ in range(6):
        for times, change in ((shows, window.show), (hides, window.hide)):

            def work(change: Callable[..., object] = change) -> None:
                dones = [
                    change(r.at(n, size), r.frames[n : n + size])
                    if change == window.show
                    else change(r.at(n, size))
                    for n in starts
                ]
                end(*dones[::-1])

            times.append(seconds(work) / (len(starts) * size) * 1e6)
    return {
        "show_us": round(statistics.median(shows[1:]), 2),
        "hide_us": round(statistics.median(hides[1:]), 2),
    }


def window() -> Figures:
    found: Figures = {}
    for page in (PAGE, 4 * PAGE):
        with rig(page) as r:
            for size in (1, 64):
                show, hide = window_of(r, size)
                found[f"{page // MIB}MiB_x{size}"] = {"show_us": show, "hide_us": hide}
            found[f"{page // MIB}MiB_x64_in_flight"] = window_stream(r)
    return found


def stream(r: Rig, submit: Callable[[np.ndarray], list[object]], size: int) -> float:
    """GB/s one way of a gigabyte in groups, several in flight."""
    return median(lambda: _gbps(r, submit, size, laps=2))


def routes_of(r: Rig, sizes: tuple[int, ...] = (64, 256)) -> Figures:
    found: Figures = {}
    for size in sizes:
        if size > r.n:
            continue
        key = f"{r.page // MIB}MiB_x{size}"
        found[key] = {
            "down_gbps": stream(r, lambda g: [r.down.submit(g, g, PASSED)], size),
            "up_gbps": stream(r, lambda g: [r.up.submit(g, g, PASSED)], size),
            "both_gbps": round(
                2
                * stream(
                    r,
                    lambda g: [
                        r.down.submit(g, g, PASSED),
                        r.up.submit(r.n - 1 - g, r.n - 1 - g, PASSED),
                    ],
                    size,
                ),
                2,
            ),
        }
    return found


def routes() -> Figures:
    found: Figures = {}
    for page in (PAGE, 4 * PAGE):
        with rig(page) as r:
            found |= routes_of(r)
    return found


def load_of(r: Rig, size: int = 64) -> Figures:
    """Into free frames: copy and show. Into stolen ones: hide, copy, show."""
    window = r.device.window
    low, high = r.at(0, r.n), r.at(r.n, r.n)

    def free(group_: np.ndarray) -> list[object]:
        return [r.up.submit(group_, group_, PASSED), window.show(low[group_], group_)]

    def clear(at: np.ndarray) -> None:
        end(window.hide(at))

    fills, steals = [], []
    for _ in range(6):
        fills.append(_gbps(r, free, size))
        gone, here = low, high
        for _ in range(2):

            def steal(g: np.ndarray, gone: np.ndarray = gone, here: np.ndarray = here) -> list:
                hidden = window.hide(gone[g])
                copy = r.up.submit(g, g, PASSED)
                return [hidden, copy, window.show(here[g], g)]

            steals.append(_gbps(r, steal, size))
            gone, here = here, gone
        clear(low)
    key = f"{r.page // MIB}MiB_x{size}"
    return {
        key: {
            "free_gbps": round(statistics.median(fills[1:]), 2),
            "stolen_gbps": round(statistics.median(steals[1:]), 2),
        }
    }


def _gbps(r: Rig, submit: Callable[[np.ndarray], list[object]], size: int, laps: int = 1) -> float:
    waiting: list[list[object]] = []
    groups = r.groups(size) * laps

    def work() -> None:
        for group_ in groups:
            waiting.append(submit(group_))
            if len(waiting) == IN_FLIGHT:
                end(*waiting.pop(0))
        while waiting:
            end(*waiting.pop(0))

    return laps * POOL / seconds(work) / 1e9


def loads() -> Figures:
    found: Figures = {}
    for page in (PAGE, 4 * PAGE):
        with rig(page) as r:
            found |= load_of(r)
    return found


def swap_of(r: Rig, size: int = 32) -> Figures:
    """Each page that leaves a frame goes down first; the page that takes the frame comes up.

    Hidden and copied down together (both only read the frame), loaded behind the copy on the
    device, shown when hidden. The limit is two pages in the time of one copy down and one show:
    the driver cannot do the two together (see `streams.Gate`).
    """
    window, half = r.device.window, r.n // 2
    there, back = r.at(0, r.n), r.at(r.n, r.n)
    end(window.show(there, r.frames))

    turns = np.zeros(r.n, np.int64)  # how often each frame has changed sides

    def swap(g: np.ndarray) -> list[object]:
        turned = turns[g[0]] % 2 == 1
        turns[g] += 1
        gone, here = (back, there) if turned else (there, back)
        down = r.down.submit(g, (g + half) % r.n, PASSED)
        down.order(r.up_stream)
        hidden = window.hide(gone[g])
        up = r.up.submit(g, g, PASSED)
        return [down, hidden, up, window.show(here[g], g)]

    rates = []
    for _ in range(6):
        rates.append(2 * _gbps(r, swap, size, laps=4))
    turned = turns % 2 == 1
    end(window.hide(np.where(turned, back, there)))
    return {f"{r.page // MIB}MiB_x{size}": {"both_gbps": round(statistics.median(rates[1:]), 2)}}


def swap() -> Figures:
    found: Figures = {}
    for page in (PAGE, 4 * PAGE):
        with rig(page) as r:
            found |= swap_of(r, 32 if page == PAGE else 8)
    return found


def fault_of(
    r: Rig, *, beside_down: bool = False, show_first: bool = False, pause_s: float = 0.0
) -> Figures:
    """One page loaded and shown, kernel-ready, and what its three parts take (us, medians).

    beside_down: while copies down keep the link busy. The copy goes through the frame's alias, so
    either may be first. pause_s: between two faults, in which processor and driver go to sleep.
    """
    times: list[tuple[float, ...]] = []
    n = min(400, r.n * 3 // 4)
    rest = r.frames[n:]
    for i in range(n):
        if beside_down and i % 50 == 0:
            stores = [r.down.submit(rest, rest, PASSED) for _ in range(8)]
        if pause_s:
            time.sleep(pause_s)
        one, at = r.frames[i : i + 1], r.at(i, 1)
        parts = [
            lambda one=one: r.up.submit(one, one, PASSED),
            lambda at=at, one=one: r.device.window.show(at, one),
        ]
        marks = [time.perf_counter()]
        dones = []
        for part in reversed(parts) if show_first else parts:
            dones.append(part())
            marks.append(time.perf_counter())
        end(*dones)
        marks.append(time.perf_counter())
        times.append((*np.diff(marks), marks[-1] - marks[0]))
        if beside_down and i % 50 == 49:
            end(*stores)
    end(r.device.window.hide(r.at(0, n)))
    us = np.array(times[20:]) * 1e6
    p50, p99 = np.percentile(us[:, 3], [50, 99])
    names = ("show", "copy", "wait") if show_first else ("copy", "show", "wait")
    parts_us = dict(zip(names, np.median(us[:, :3], axis=0).round(1).tolist(), strict=True))
    return {"p50_us": round(p50, 1), "p99_us": round(p99, 1), "n": len(us), "parts_us": parts_us}


def lonely() -> Figures:
    """One page by the calling thread: in an empty range, and at some distance from a page.

    A table of the driver's for pages of 2 MiB covers 512 MiB.
    """
    found: Figures = {}
    one = np.zeros(1, np.int32)
    for name, keeper in (("nothing", -1), ("next", 1), ("256MiB", 128), ("1GiB", 511)):
        with rig(PAGE) as r:
            show, hide = r.device.window.show, r.device.window.hide
            if keeper >= 0:
                end(show(r.at(keeper, 1), one + keeper))
            shows: list[float] = []
            hides: list[float] = []
            for _ in range(100):
                shows.append(seconds(lambda show=show, r=r: end(show(r.at(0, 1), one))) * 1e6)
                hides.append(seconds(lambda hide=hide, r=r: end(hide(r.at(0, 1)))) * 1e6)
            if keeper >= 0:
                end(hide(r.at(keeper, 1)))
        found[name] = {
            "show_us": round(statistics.median(shows), 1),
            "hide_us": round(statistics.median(hides), 1),
            "n": len(shows),
        }
    return found


def fault() -> Figures:
    found: Figures = {}
    for page in (PAGE, 4 * PAGE):
        name = f"{page >> 20}MiB"
        with rig(page) as r:
            for first in (False, True):
                order = "_show_first" if first else ""
                found[name + order] = fault_of(r, show_first=first)
                found[f"{name}{order}_paused"] = fault_of(r, show_first=first, pause_s=0.002)
            found[f"{name}_beside_down"] = fault_of(r, beside_down=True)
    return found


class Busy:
    """A thread that counts in pure Python; `rate` is counts a second of wall time."""

    def __enter__(self) -> Busy:
        self.count, self.stop = 0, False
        self.began = time.perf_counter()
        self.thread = threading.Thread(target=self._run)
        self.thread.start()
        return self

    def _run(self) -> None:
        while not self.stop:
            for _ in range(10_000):
                self.count += 1

    def __exit__(self, *_: object) -> None:
        self.stop = True
        self.thread.join()
        self.rate = self.count / (time.perf_counter() - self.began)


def busy() -> Figures:
    with Busy() as alone:
        time.sleep(1)
    found: Figures = {"alone_counts_per_s": round(alone.rate)}
    with rig(PAGE) as r:
        for name, work in (
            (
                "window_x64",
                lambda: dict(zip(("show_us", "hide_us"), window_of(r, 64), strict=True)),
            ),
            ("window_x1", lambda: dict(zip(("show_us", "hide_us"), window_of(r, 1), strict=True))),
            ("routes", lambda: routes_of(r, (64,))),
            ("load", lambda: load_of(r)),
            ("swap", lambda: swap_of(r)),
            ("fault", lambda: fault_of(r)),
        ):
            with Busy() as beside:
                figures = work()
            figures["thread_slower_pct"] = round(100 * (1 - beside.rate / alone.rate), 1)
            found[name] = figures
    return found


def interpreter() -> Figures:
    """Beside one busy thread: how often a short call loses the lock (over 1 ms), by array size."""
    found: Figures = {}
    call = ctypes.CDLL(None).getppid
    with Busy():
        found["regain_ms"] = {
            "time.sleep(0)": round(
                statistics.median(seconds(lambda: time.sleep(0)) for _ in range(40)) * 1e3, 2
            ),
            "ctypes getppid": round(statistics.median(seconds(call) for _ in range(40)) * 1e3, 2),
        }
        for n in (16, 64, 256, 1024):
            lost = {}
            for name, work in numpy_calls(n).items():
                slow = sum(seconds(work) > 1e-3 for _ in range(25))
                if slow > 1:
                    lost[name] = f"{slow}/25"
            found[f"lost_at_{n}"] = lost
    return found


def numpy_calls(n: int) -> dict[str, Callable[[], object]]:
    a = np.random.default_rng(0).permutation(n).astype(np.uint64)
    i, big, mask = a.astype(np.int32), np.zeros(1 << 16, np.uint64), a > n // 2
    rows = np.zeros((n, 4), np.uint64)
    return {
        "sort": lambda: np.sort(a),
        "unique": lambda: np.unique(a),
        "searchsorted": lambda: np.searchsorted(big, a),
        "isin": lambda: np.isin(a, a),
        "get by index": lambda: big[i],
        "set by index": lambda: big.__setitem__(i, a),
        "get by mask": lambda: a[mask],
        "set by mask": lambda: a.__setitem__(mask, 1),
        "take": lambda: big.take(i),
        "put": lambda: big.put(i, a),
        "flatnonzero": lambda: np.flatnonzero(mask),
        "count_nonzero": lambda: np.count_nonzero(mask),
        "a + a": lambda: a + a,
        "a > 3": lambda: a > 3,
        "mask & mask": lambda: mask & mask,
        "a.max()": lambda: a.max(),
        "mask.any()": lambda: mask.any(),
        "copy": lambda: a.copy(),
        "astype": lambda: a.astype(np.int32),
        "concatenate": lambda: np.concatenate([a, a]),
        "where": lambda: np.where(mask, a, a),
        "column = a": lambda: rows.__setitem__((slice(None), 1), a),
        "tolist": lambda: a.tolist(),
        "array(list)": lambda: np.array([1, 2, 3] * (n // 3), np.uint64),
        "argpartition": lambda: np.argpartition(a, 3),
        "bincount": lambda: np.bincount(i),
        "add.at": lambda: np.add.at(big, i, 1),
        "arange": lambda: np.arange(n),
        "cumsum": lambda: a.cumsum(),
    }


def gemm() -> Figures:
    import torch

    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)

    def products(n: int = 60) -> list[float]:
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(n + 1)]
        marks[0].record()
        for mark in marks[1:]:
            torch.mm(a, a)
            mark.record()
        torch.cuda.synchronize()
        return [x.elapsed_time(y) for x, y in itertools.pairwise(marks)]

    products()
    alone = [products() for _ in range(5)]
    with rig(PAGE) as r:
        stop = threading.Event()
        rates: list[Figures] = []

        def page_on() -> None:
            while not stop.is_set():
                rates.append(swap_of(r))

        thread = threading.Thread(target=page_on)
        thread.start()
        time.sleep(0.3)
        beside = [products() for _ in range(5)]
        stop.set()
        thread.join()
    quiet, loud = (statistics.median(x for run in runs for x in run) for runs in (alone, beside))
    return {
        "alone_ms": round(quiet, 3),
        "beside_ms": round(loud, 3),
        "slower_pct": round(100 * (loud / quiet - 1), 2),
        "swap_meanwhile": rates[0] if rates else None,
    }


def pieces() -> Figures:
    context = Context(load(), 0)
    backing = Backing(context, DEVICE, context.device)
    began = time.perf_counter()
    found = calibrate.measure(context, backing)
    took = time.perf_counter() - began
    bench = None
    table = {}
    with context:
        bench = calibrate._Bench(context, backing, 64 * MIB)
        for size in (4096, 16384, 65536, 262144, 1 << 20):
            for up in (False, True):
                moved = min(64 * MIB // size, 2048) * size
                for gather in (False, True):
                    took_s = bench._seconds(
                        lambda s=size, u=up, g=gather: bench._copy(s, up=u, gather=g)
                    )
                    key = f"{size // 1024}KiB_{'up' if up else 'down'}"
                    way = "gather_gbps" if gather else "batch_gbps"
                    table.setdefault(key, {})[way] = round(moved / took_s / 1e9, 1)
        bench.close()
    context.close()
    return {"calibration": asdict(found), "took_s": round(took, 2), "table": table}


def in_place() -> Figures:
    return {f"{page // MIB}MiB": in_place_of(page) for page in (PAGE, 4 * PAGE, 16 * PAGE)}


def in_place_of(page: int) -> Figures:
    n = 128 * MIB // page
    settings = Calibration(page_bytes=page, gather_below_down=1 << 30, gather_below_up=1 << 30)
    device = CudaDevice(0, page, 2 * n, calibration=settings)
    window = device.window
    began = time.perf_counter()
    host = device.host_pages(n)
    made_us = (time.perf_counter() - began) / n * 1e6
    start = device.reserve(n * page)
    at = np.arange(n, dtype=np.uint64) * np.uint64(page) + np.uint64(start)
    slots = np.arange(n, dtype=np.int32)
    there, sizes = device.frames.addresses(slots), np.full(n, page, np.uint64)
    up = device.routes(host)[1]
    show, hide, read = [], [], []
    for _ in range(6):
        show.append(seconds(lambda: end(window.show_in_place(at, slots, host.arena))) / n * 1e6)
        took = seconds(lambda: end(up.submit_pieces(at, there, sizes, PASSED)))
        read.append(n * page / took / 1e9)
        hide.append(seconds(lambda: end(window.hide(at))) / n * 1e6)
    found: Figures = {
        "create_us": round(made_us, 1),
        "show_us": round(statistics.median(show), 1),
        "hide_us": round(statistics.median(hide), 1),
        "read_gbps": round(statistics.median(read), 1),
    }
    for kind, arena in (("host", host.arena), ("device", device.frames.arena)):
        found[f"read_only_{kind}_page_code"] = read_only(device, int(at[0]), int(arena.handles[0]))
    device.close()
    return found


def read_only(device: CudaDevice, address: int, handle: int) -> int:
    """The CUresult of asking for read-only access for the device."""
    driver, size = device.context.driver, device.page_bytes
    desc = access(device.context.device, flags=1)
    with device.context:
        driver.call("cuMemMap", address, size, 0, handle, 0)
        code = driver.attempt("cuMemSetAccess", address, size, desc.ctypes.data, 1)
        driver.call("cuMemUnmap", address, size)
    return code


SECTIONS: dict[str, Callable[[], Figures]] = {
    "ceilings": ceilings,
    "floors": floors,
    "floors_beside": floors_beside,
    "stall": stall,
    "window": window,
    "routes": routes,
    "load": loads,
    "swap": swap,
    "lonely": lonely,
    "fault": fault,
    "busy": busy,
    "interpreter": interpreter,
    "gemm": gemm,
    "pieces": pieces,
    "in_place": in_place,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--switch-interval", type=float, help="sys.setswitchinterval, seconds")
    parser.add_argument("--only", nargs="*", choices=list(SECTIONS), default=list(SECTIONS))
    options = parser.parse_args()
    if options.switch_interval:
        sys.setswitchinterval(options.switch_interval)
    result: dict[str, Figures] = {}
    if options.out and options.out.exists():
        result = json.loads(options.out.read_text())
    context = Context(load(), 0)
    result["machine"] = {
        "device": context.name,
        "driver": context.driver.version_text,
        "cores": os.cpu_count(),
        "python": sys.version.split()[0],
        "numpy": np.__version__,
        "switch_interval_s": sys.getswitchinterval(),
    }
    context.close()
    for name in options.only:
        if name in result and "error" not in result[name]:
            continue
        began = time.perf_counter()
        try:
            figures = SECTIONS[name]()
        except Exception as error:
            figures = {"error": f"{type(error).__name__}: {error}"}
        figures["section_s"] = round(time.perf_counter() - began, 1)
        result[name] = figures
        print(name, json.dumps(figures), flush=True)
        if options.out:
            options.out.write_text(json.dumps(result, indent=1))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
