"""Rows and figures of work through the whole pager: `paging` does the work, this names it.

For each page size three spaces are opened, one after another, and every scene that fits one runs
on it: one that hides lazily, one that hides at once, one with frames to spare. Opening a space
pins its pool and costs more than most scenes.
"""

from __future__ import annotations

import time
from contextlib import closing
from dataclasses import replace

from tiermem.bench import paging
from tiermem.bench.offload_run import Run, Settings
from tiermem.bench.paging import Laps, Scene
from tiermem.bench.result import Work
from tiermem.bench.rig import AHEAD, Hide, Lap, Rig, Shape, rig
from tiermem.config import Config, Gpu, Host
from tiermem.host import limits
from tiermem.space import Space
from tiermem.tier import GPU, HOST, NVME, Place
from tiermem.units import format_exactly

GROUP = 64
FAULTS = 200
POOL_BYTES = 8 << 30
POOL_S = 20.0
ALLOCATIONS: dict[Hide, tuple[str, tuple[int, ...]]] = {
    "eager": ("new", (1, 64, 512)),
    "lazy": ("shown", (1, 512, 4096)),
}
LAZY: dict[Work, Scene] = {
    "evict": paging.evict,
    "steal": paging.steal,
    "steal-ahead": paging.steal_ahead,
}
EAGER: dict[Work, Scene] = {"load": paging.load, "load-ahead": paging.load_ahead}
SPARE: dict[Work, Scene] = {"swap": paging.swap}
DISK_WORK: dict[Work, int] = {"load": 0, "load-ahead": AHEAD}
BUSY_WORK: tuple[Work, ...] = ("evict", "load", "steal", "swap")


def shape_of(settings: Settings, page: int) -> Shape:
    """The working set in whole groups, small enough for two of them in host memory."""
    pages = settings.count(page)
    group = min(GROUP, pages // 8)
    return Shape(settings.device, page, pages // group * group, group=group)


def lazy(run: Run, page: int) -> None:
    """Evict and steal, a fault that steals, the window; frames that have left stay shown."""
    with rig(shape_of(run.settings, page), "lazy") as r:
        with run.leaving_out(f"window {format_exactly(page)}"):
            _window(run, r)
        _scenes(run, r, LAZY)
        _faults(run, r, stealing=True)
        _allocations(run, r)


def eager(run: Run, page: int) -> None:
    """Loads and a fault into free frames; what leaves is hidden at once."""
    with rig(shape_of(run.settings, page), "eager") as r:
        _scenes(run, r, EAGER)
        _faults(run, r, stealing=False)
        _allocations(run, r)


def spare(run: Run, page: int) -> None:
    """Both ways at once, with frames to spare."""
    with rig(shape_of(run.settings, page), "lazy", AHEAD) as r:
        _scenes(run, r, SPARE)


def lazy_steps(settings: Settings, page: int) -> int:
    """How many measurements `lazy` announces."""
    return _scene_steps(settings, LAZY) + 2 + _allocation_steps(settings, page, "lazy")


def eager_steps(settings: Settings, page: int) -> int:
    return _scene_steps(settings, EAGER) + 1 + _allocation_steps(settings, page, "eager")


def spare_steps(settings: Settings) -> int:
    return _scene_steps(settings, SPARE)


def _scene_steps(settings: Settings, scenes: dict[Work, Scene]) -> int:
    return len(scenes) + sum(not settings.quick and work in BUSY_WORK for work in scenes)


def _scenes(run: Run, r: Rig, scenes: dict[Work, Scene]) -> None:
    """Alone, and some beside one thread that runs pure Python: what that thread lost too."""
    name = format_exactly(r.shape.page_bytes)
    for work, scene in scenes.items():
        run.told.begin(f"pager: {work}, {name} pages")
        with run.leaving_out(f"{work} {name}"):
            _add(run, r.shape, work, run.take(scene(r), run.settings.rounds))
    for work in BUSY_WORK if not run.settings.quick else ():
        if work not in scenes:
            continue
        run.told.begin(f"pager: {work}, {name} pages, beside a Python thread")
        alone = run.alone_per_s
        with run.leaving_out(f"{work} {name} beside Python"):
            with paging.BusyThread() as thread:
                laps = run.take(scenes[work](r))
            _add(run, r.shape, work, laps, beside=True)
            lost = 100.0 * (1.0 - thread.per_s / alone)
            run.figure(f"busy-thread-loss.{work}.{name}", "percent", [lost])


def disk(run: Run, page: int) -> None:
    """Evict and load with a drive below the GPU: each round down and up again."""
    shape = replace(shape_of(run.settings, page), nvme=run.settings.nvme)
    name = format_exactly(page)
    with rig(shape, "eager") as r:
        left: list[Lap] = []
        for work, ahead in DISK_WORK.items():
            run.told.begin(f"pager: evict and {work} with the drive, {name} pages")
            downs: list[Lap] = []
            laps = run.take(_ups(run, r, ahead, downs))
            left += downs[1:]
            _add(run, shape, work, laps, below=NVME)
        _add(run, shape, "evict", left, below=NVME)


def _ups(run: Run, r: Rig, ahead: int, downs: list[Lap]) -> Laps:
    """The loads of each round; `downs` is given the evictions before them."""
    with closing(paging.down_and_up(r, ahead)) as rounds:
        for down, up in rounds:
            downs.append(down)
            run.written += down.nbytes
            yield up


def _add(
    run: Run,
    shape: Shape,
    work: Work,
    laps: list[Lap],
    *,
    beside: bool = False,
    below: Place = HOST,
) -> None:
    ends = (GPU, below) if work == "evict" else (below, GPU)
    run.add(
        (run.end_name(ends[0]), run.end_name(ends[1])),
        shape.page_bytes,
        shape.group,
        laps,
        laps[-1].path,
        direction="both" if work == "swap" else "one-way",
        beside="python-thread" if beside else "",
        work=work,
    )


def _faults(run: Run, r: Rig, *, stealing: bool) -> None:
    """One page faulted in."""
    name = format_exactly(r.shape.page_bytes)
    n = min(FAULTS // 4 if run.settings.quick else FAULTS, r.shape.pages)
    kind = "fault-stealing" if stealing else "fault"
    run.told.begin(f"pager: {kind} of one page of {name}")
    with run.leaving_out(f"{kind} {name}"):
        run.figure(f"{kind}.{name}", "us", paging.fault_us(r, n, stealing))


def _window(run: Run, r: Rig) -> None:
    name = format_exactly(r.shape.page_bytes)
    run.told.begin(f"window: show and hide pages of {name}")
    shows, hides = paging.window_us(r, 4 * run.settings.rounds)
    run.figure(f"show.{name}", "us/page", shows)
    run.figure(f"hide.{name}", "us/page", hides)


def _allocations(run: Run, r: Rig) -> None:
    """Allocating and freeing n pages, of the first page size only: it counts pages, not bytes."""
    if r.shape.page_bytes != run.settings.pages[0]:
        return
    kind, sizes = ALLOCATIONS[r.hide]
    for n in (n for n in sizes if n <= r.shape.pages):
        run.told.begin(f"pager: allocate and free {n} {kind} pages")
        rounds = 20 if n > 512 or run.settings.quick else 50
        with run.leaving_out(f"allocate {n} {kind}"):
            took, gave = paging.allocate_us(r, n, rounds)
            run.figure(f"allocate-{kind}.{n}", "us", took)
            run.figure(f"free-{kind}.{n}", "us", gave)


def _allocation_steps(settings: Settings, page: int, hide: Hide) -> int:
    pages = shape_of(settings, page).pages
    return sum(n <= pages for n in ALLOCATIONS[hide][1]) if page == settings.pages[0] else 0


def opening_figures(run: Run, page: int) -> None:
    """From `Space.open` to the first usable page, while a large host pool grows behind it."""
    run.told.begin("space: first page usable, growth of the host pool")
    nbytes = min(POOL_BYTES, limits.available_bytes() // 4)
    if run.settings.quick or not run.settings.cuda:
        nbytes = min(nbytes, 512 << 20)
    config = Config(
        gpu=Gpu(device=run.settings.device, budget=64 * page, page=page),
        host=Host(capacity=nbytes),
    )
    start = time.perf_counter()
    with Space.open(config) as space, space.reserve(64 * page) as region:
        with region.use(region.allocate(1), "write"):
            first = time.perf_counter() - start
        while time.perf_counter() - start < POOL_S:
            host = space.statistics().tier(HOST)
            if host.capacity == host.configured:
                break
            time.sleep(0.01)
        took = time.perf_counter() - start
    run.figure("first-page", "s", [first])
    run.figure("pool-growth", "GiB/s", [host.capacity * page / 2**30 / took])
