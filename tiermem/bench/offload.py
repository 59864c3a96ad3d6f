"""`tiermem bench offload`: every route between the tiers, alone and through the whole pager.

In one run: ceilings (one large copy), the driver's own calls, the bare routes by page size and
group, the same work through the pager, and what a fault, an allocation or a first page takes.
Ctrl-C ends the run after the measurement under way and keeps what there is; a second one at once.
"""

from __future__ import annotations

import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer
from rich.console import Console

from tiermem import units
from tiermem.bench import offload_ceilings as ceilings
from tiermem.bench import offload_cuda as cuda
from tiermem.bench import offload_direct as direct
from tiermem.bench import offload_numa as nodes
from tiermem.bench import offload_pager as pager
from tiermem.bench import offload_routes as routes
from tiermem.bench import offload_verify as others
from tiermem.bench import output, report
from tiermem.bench.offload_run import Interrupted, Run, Section, Settings, gpus
from tiermem.bench.offload_show import Watcher, picture, show
from tiermem.bench.result import Result
from tiermem.bench.survey import survey
from tiermem.errors import ConfigError, DriverError

INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells have it."""

WIDTH = 150
"""Columns of the table where there is no terminal."""

CUDA_PAGES = (2 << 20, 8 << 20)
CPU_PAGES = (64 << 10, 2 << 20)
DRIVE_BPS = 3e9  # for the estimate, until the run has shown what is true here
IN_PLACE_PAGES = (2 << 20, 8 << 20, 32 << 20)


def plan(settings: Settings) -> list[Section]:
    """The sections of a run, what tells most first; the seconds are guesses for the bar."""
    cell = settings.cell_s
    found = [Section("ceilings", 3, 3 * cell + 0.5, ceilings.ceilings)]
    if settings.cuda:
        floors = partial(ceilings.driver_floors, page=CUDA_PAGES[0])
        found.append(Section("driver floors", 1, 0.2, floors))
    for page in settings.pages:
        found += _of_page(settings, page, cell)
    memory = partial(nodes.numa, page=settings.pages[0])
    n = nodes.steps()
    found.append(Section("NUMA nodes", n, n * cell + 0.5 * n, memory))
    opening = partial(pager.opening_figures, page=settings.pages[0])
    found.append(Section("opening", 1, 3.0, opening))
    if settings.cuda:
        found += _of_cuda(settings, cell)
    if settings.verify:
        found += _of_others(settings)
    return found


def _of_page(settings: Settings, page: int, cell: float) -> Iterator[Section]:
    name = units.format_exactly(page)
    n = routes.steps(settings, page)
    yield Section(f"routes {name}", n, n * cell + 1.0, partial(routes.routes, page=page))
    spaces = (
        ("lazy", pager.lazy, pager.lazy_steps(settings, page)),
        ("eager", pager.eager, pager.eager_steps(settings, page)),
        ("spare", pager.spare, pager.spare_steps(settings)),
    )
    for kind, work, n in spaces:
        yield Section(f"pager {kind} {name}", n, 1.0 + 0.5 * n, partial(work, page=page))
    if settings.nvme is not None:
        each = 2.5 * settings.count(page) * page / DRIVE_BPS
        on_disk = partial(pager.disk, page=page)
        yield Section(f"pager with NVMe {name}", 2, 2 + 8 * each, on_disk)


def _of_cuda(settings: Settings, cell: float) -> Iterator[Section]:
    for page in settings.pages if settings.quick else IN_PLACE_PAGES:
        name = f"in place {units.format_exactly(page)}"
        yield Section(name, 1, cell + 0.5, partial(cuda.in_place, page=page))
    if settings.nvme is not None:
        by_kvikio = partial(direct.direct, page=settings.pages[0])
        each = 2 * len(direct.DEPTHS) * cell
        yield Section("GPU to NVMe by kvikio", direct.STEPS, 12.0 + each, by_kvikio)
    count = gpus()
    if count > 1:
        several = partial(cuda.together, page=settings.pages[0], count=count)
        yield Section("several GPUs", 2, 2 * cell + count, several)
        yield Section("gpu to gpu", 2, 2 * cell + 5, cuda.peers)


def _of_others(settings: Settings) -> Iterator[Section]:
    yield Section("routes beside other tools", 0, 0.0, others.check_routes)
    if settings.nvme is not None:
        n = others.disk_steps(settings)
        yield Section("drive beside fio", n, 2.0 + 1.2 * n, others.disk)


def measure(
    settings: Settings, console: Console, notes: tuple[str, ...] = ()
) -> tuple[Result, Exception | None]:
    """Run the whole plan; what ended it early, if not the user, is the second.

    Interrupted or ended early, the result has what was measured until then, not `complete`.
    """
    started, began_s = datetime.now(UTC), time.perf_counter()
    sections = plan(settings)
    complete, failure = False, None
    with Watcher(sections, console) as watcher, cuda.context_kept(settings):
        run = Run(settings, survey(), watcher, notes=list(notes))
        try:
            with _interruptible(watcher, console):
                for section in sections:
                    watcher.enter(section)
                    with run.section(section.name):
                        section.work(run)
                    watcher.leave()
            complete = True
        except (Interrupted, KeyboardInterrupt):
            run.note("interrupted: what is missing was not measured")
        except Exception as error:  # what there is is kept; the command raises it at its end
            run.note(f"ended early by {type(error).__name__}: {error}")
            failure = error
    return run.result(started, began_s, complete=complete), failure


@contextmanager
def _interruptible(watcher: Watcher, console: Console) -> Iterator[None]:
    """The first Ctrl-C ends the run between two measurements, the next one at once."""

    def stop(number: int, frame: FrameType | None) -> None:
        if watcher.stop:
            raise KeyboardInterrupt
        watcher.stop = True
        console.print("stopping after this measurement; Ctrl-C again stops at once")

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def our_directory(where: str, notes: list[str]) -> Iterator[Path | None]:
    """A directory of our own on the drive, removed again; None when there is to be none."""
    if where == "off":
        yield None
        return
    try:
        ours = Path(tempfile.mkdtemp(prefix="tiermem-bench-", dir=where)).resolve()
    except OSError as error:
        notes.append(f"no NVMe rows: {where} cannot be used ({error.strerror}); name --nvme-path")
        yield None
        return
    try:
        yield ours
    finally:
        shutil.rmtree(ours, ignore_errors=True)


def _device(named: str) -> str:
    if named == "auto":
        return "cuda:0" if gpus() else "cpu"
    if named == "cpu":
        return named
    kind, _, number = named.partition(":")
    if kind != "cuda" or not (number or "0").isdecimal():
        raise ConfigError(f"--device {named}: write cpu, cuda:0 or auto")
    count = gpus()
    if int(number or 0) >= count:
        raise DriverError(f"--device {named}: {count} GPUs are visible; --device cpu needs none")
    return f"cuda:{number or 0}"


def _pages(texts: list[str], device: str, quick: bool) -> tuple[int, ...]:
    if not texts:
        pages: tuple[int, ...] = CPU_PAGES if device == "cpu" else CUDA_PAGES
        return pages[:1] if quick else pages
    pages = tuple(dict.fromkeys(_page(text) for text in texts))
    grain = 4096 if device == "cpu" else 2 << 20
    for page in pages:
        if page <= 0 or page % grain:
            least = units.format_exactly(grain)
            raise ConfigError(
                f"--page {units.format_exactly(page)}: pages on {device} are multiples of {least}"
            )
    return pages


def _page(text: str) -> int:
    try:
        return units.parse_bytes(text)
    except ValueError as error:
        raise ConfigError(f"--page {text}: {error}") from None


def _settings(
    device: str,
    pages: tuple[int, ...],
    rounds: int | None,
    quick: bool,
    nvme: Path | None,
    verify: bool,
) -> Settings:
    work = (16 << 20 if quick else 128 << 20) if device == "cpu" else (1 << 30)
    return Settings(
        device=device,
        pages=pages,
        rounds=rounds or (3 if quick else 5),  # at most; LEAST where they agree
        seconds=0.03 if quick else 0.15,
        work_bytes=work // 4 if quick and device != "cpu" else work,
        nvme=nvme,
        quick=quick,
        verify=verify,
    )


def command(
    device: Annotated[str, typer.Option(help="cpu, cuda:0, or auto.")] = "auto",
    page: Annotated[
        list[str] | None, typer.Option(help="Bytes of a page; repeat for more.")
    ] = None,
    quick: Annotated[bool, typer.Option(help="One page size, short rounds.")] = False,
    nvme_path: Annotated[
        str, typer.Option(help="Directory on the drive to measure, or off.")
    ] = ".",
    rounds: Annotated[
        int | None, typer.Option(min=1, help="Most rounds; fewer where they agree.")
    ] = None,
    verify: Annotated[
        bool, typer.Option(help="Compare with independent copies, and with fio where it is.")
    ] = True,
    json: Annotated[str | None, typer.Option(help="Write JSON to this path, or to - .")] = None,
    html: Annotated[Path | None, typer.Option(help="Write an HTML report to this path.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Write the charts as SVG.")] = None,
) -> None:
    """Measure every route between the tiers, alone and through the pager."""
    device = _device(device)
    pages = _pages(page or [], device, quick)
    notes: list[str] = []
    if quick and device == "cpu":
        notes.append("quick: working sets of 16 MiB, which a processor's cache may hold")
    with our_directory(nvme_path, notes) as ours:
        settings = _settings(device, pages, rounds, quick, ours, verify)
        found, failure = measure(settings, Console(stderr=True), tuple(notes))
    if html is not None:
        output.save(html, report.html(found))
    if plot is not None:
        output.save(plot, picture(found))
    if not output.emit(found, json):
        console = Console()
        show(found, console if console.is_terminal else Console(width=WIDTH))
    if failure is not None:
        raise failure
    if not found.complete:
        raise typer.Exit(INTERRUPTED)
