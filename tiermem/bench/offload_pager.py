"""Rows and figures of work through the whole pager: `paging` does the work, this names it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

from tiermem.bench import paging
from tiermem.bench.offload_run import Run, Settings
from tiermem.bench.paging import AHEAD, Hide, Lap, Shape
from tiermem.bench.result import Work
from tiermem.config import Config, Gpu, Host
from tiermem.host import limits
from tiermem.space import Space
from tiermem.tier import GPU, HOST, NVME, Place
from tiermem.units import format_exactly

GROUP = 64
FAULTS = 200
POOL_BYTES = 8 << 30
POOL_S = 20.0
ALLOCATIONS: tuple[tuple[str, Hide, tuple[int, ...]], ...] = (
    ("new", "eager", (1, 64, 512)),
    ("shown", "lazy", (1, 512, 4096)),
)

Scenario = Callable[[Shape, int], list[Lap]]
HOST_WORK: dict[Work, Scenario] = {
    "evict": paging.evict,
    "load": paging.load,
    "load-ahead": lambda shape, rounds: paging.load(shape, rounds, AHEAD),
    "steal": paging.steal,
    "steal-ahead": lambda shape, rounds: paging.steal(shape, rounds, AHEAD),
    "swap": paging.swap,
}
DISK_WORK: tuple[Work, ...] = ("evict", "load", "load-ahead")
BUSY_WORK: tuple[Work, ...] = ("evict", "load", "steal", "swap")


def shape_of(settings: Settings, page: int) -> Shape:
    """The working set in whole groups, small enough for two of them in host memory."""
    pages = settings.count(page)
    group = min(GROUP, pages // 8)
    return Shape(settings.device, page, pages // group * group, group=group)


def host_rows(run: Run, page: int) -> None:
    """Evict, load, steal and swap between GPU and host."""
    shape = shape_of(run.settings, page)
    for work, scenario in HOST_WORK.items():
        run.told.begin(f"pager: {work}, {format_exactly(page)} pages")
        _add(run, shape, work, scenario(shape, run.settings.rounds))


def busy_rows(run: Run, page: int) -> None:
    """The same beside one thread that runs pure Python, and what that thread lost."""
    shape = shape_of(run.settings, page)
    for work in BUSY_WORK:
        run.told.begin(f"pager: {work}, {format_exactly(page)} pages, beside a Python thread")
        scenario = HOST_WORK[work]
        laps, lost = paging.beside_python(
            lambda scenario=scenario: scenario(shape, run.settings.rounds)  # type: ignore[misc]
        )
        _add(run, shape, work, laps, beside=True)
        run.figure(f"busy-thread-loss.{work}.{format_exactly(page)}", "percent", [lost])


def disk_rows(run: Run, page: int) -> None:
    """Evict and load with a drive below the GPU."""
    shape = replace(shape_of(run.settings, page), nvme=run.settings.nvme)
    for work in DISK_WORK:
        run.told.begin(f"pager: {work} with the drive, {format_exactly(page)} pages")
        laps = HOST_WORK[work](shape, run.settings.rounds)
        run.written += shape.nbytes * (run.settings.rounds + 1)
        _add(run, shape, work, laps, below=NVME)


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


def fault_figures(run: Run, page: int) -> None:
    """One page faulted in, and the window's show and hide."""
    shape, name = shape_of(run.settings, page), format_exactly(page)
    n = min(FAULTS // 4 if run.settings.quick else FAULTS, shape.pages)
    for kind, stealing in (("fault", False), ("fault-stealing", True)):
        run.told.begin(f"pager: {kind} of one page of {name}")
        run.figure(f"{kind}.{name}", "us", paging.fault_us(shape, n, stealing))
    run.told.begin(f"window: show and hide pages of {name}")
    shows, hides = paging.window_us(shape, 4 * run.settings.rounds)
    run.figure(f"show.{name}", "us/page", shows)
    run.figure(f"hide.{name}", "us/page", hides)


def allocate_figures(run: Run, page: int) -> None:
    """Allocating and freeing n pages: new ones (shown and hidden), and already shown ones."""
    shape = shape_of(run.settings, page)
    for kind, hide, sizes in ALLOCATIONS:
        for n in (n for n in sizes if n <= shape.pages):
            run.told.begin(f"pager: allocate and free {n} {kind} pages")
            rounds = 20 if n > 512 or run.settings.quick else 50
            took, gave = paging.allocate_us(shape, n, rounds, hide)
            run.figure(f"allocate-{kind}.{n}", "us", took)
            run.figure(f"free-{kind}.{n}", "us", gave)


def allocations(settings: Settings, page: int) -> int:
    """How many measurements `allocate_figures` announces."""
    pages = shape_of(settings, page).pages
    return sum(n <= pages for _, _, sizes in ALLOCATIONS for n in sizes)


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
