"""`tiermem demo`: requests replayed over three tiers with real bytes, every page verified.

The GPU tier is far too small for the trace, so pages go down to host memory and NVMe and come back
while requests are served; whatever comes back must hold exactly the bytes of its block.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from tiermem.bench import demo_report, output
from tiermem.bench.demo_replay import Replay, Score, Wrong
from tiermem.bench.demo_report import NAMES, Fault, Report, Sample
from tiermem.bench.demo_setup import (
    configuration,
    requests,
    slab_directory,
    tier_marks,
    tier_policies,
)
from tiermem.bench.machine import machine
from tiermem.bench.workload import Workload
from tiermem.config import Config
from tiermem.space import Space
from tiermem.stats import Statistics

SAMPLES = 128
WRONG = 1
INTERRUPTED = 130
DRAIN_S = 60.0


def command(
    trace: Annotated[
        Path | None, typer.Option(help="Requests: plain, .gz or .xz; else generated ones.")
    ] = None,
    on_bad: Annotated[
        Literal["refuse", "skip"], typer.Option(help="What to do with lines that cannot be read.")
    ] = "refuse",
    limit: Annotated[int | None, typer.Option(min=1, help="Replay so many requests.")] = None,
    config: Annotated[Path | None, typer.Option(help="TOML file; options go before it.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu (default), cuda:0 or auto.")] = None,
    gpu: Annotated[
        str | None, typer.Option(help="Size of the tier: 64MiB, or 1% of the distinct blocks.")
    ] = None,
    host: Annotated[str | None, typer.Option(help="The same; 0 = off.")] = None,
    nvme: Annotated[str | None, typer.Option(help="The same; 0 = off.")] = None,
    nvme_path: Annotated[
        Path | None, typer.Option(help="Directory of the slab; else a temporary one on disk.")
    ] = None,
    page: Annotated[str | None, typer.Option(help="Size of a page, which holds one block.")] = None,
    policy: Annotated[str | None, typer.Option(help="Eviction policy of all tiers.")] = None,
    marks: Annotated[
        str | None, typer.Option(metavar="HIGH,LOW", help="Of all tiers, such as 0.95,0.9 .")
    ] = None,
    hints: Annotated[
        bool | None,
        typer.Option(help="Name the next request's pages ahead; on where a lower tier is."),
    ] = None,
    json: Annotated[str | None, typer.Option(help="Write JSON to this path, or to - .")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw into this file: .png, .svg.")] = None,
) -> None:
    """Replay requests over three tiers and verify every page; exit code 1 if one is wrong."""
    demo_report.require_plot(plot)
    name, workload = requests(trace, on_bad, limit)
    options = {
        "gpu.device": device,
        "gpu.page": page,
        "gpu.budget": gpu,
        "host.capacity": host,
        "nvme.capacity": nvme,
        "nvme.path": nvme_path,
        **tier_policies(policy),
        **tier_marks(marks),
    }
    given = {key: value for key, value in options.items() if value is not None}
    with slab_directory(nvme_path) as slab:
        chosen = configuration(config, given, workload, slab)
        with Space.open(chosen) as space:
            report = run(space, workload, name, hints)
    if plot is not None:
        demo_report.plot(report, plot)
    if not output.emit(report, json):
        demo_report.show(report, Console())
    raise typer.Exit(WRONG if report.pages_wrong else 0 if report.complete else INTERRUPTED)


def run(space: Space, workload: Workload, name: str, hints: bool | None = None) -> Report:
    """Replay the workload on a space and report; a first Ctrl-C ends it after its request.

    hints: None = where there is a tier below the GPU.
    """
    if hints is None:
        hints = below(space.config)
    replay = Replay(space, workload, hints=hints)
    samples = [_sample(space, replay.score, 0.0)]
    every = max(1, workload.requests // SAMPLES)
    start_s = time.perf_counter()
    with _progress() as bar, _interrupt() as interrupted:
        task = bar.add_task("replaying", total=workload.requests, hits="", wrong="")
        for index in range(workload.requests):
            if interrupted.is_set():
                break
            replay.request(index)
            if (index + 1) % every == 0 or index + 1 == workload.requests:
                samples.append(_sample(space, replay.score, time.perf_counter() - start_s))
                hits, wrong = _words(replay.score)
                bar.update(task, completed=index + 1, hits=hits, wrong=wrong)
    seconds = time.perf_counter() - start_s
    space.drain(DRAIN_S)
    space.check()
    return _report(space, workload, name, hints, replay.score, samples, seconds)


def below(config: Config) -> bool:
    """Whether there is a tier below the GPU."""
    return config.host.enabled or config.nvme.enabled


def _report(
    space: Space,
    workload: Workload,
    name: str,
    hints: bool,
    score: Score,
    samples: list[Sample],
    seconds: float,
) -> Report:
    found = space.statistics()
    fault = found.fault
    return Report(
        complete=score.requests == workload.requests,
        machine=machine(),
        device=space.device.name,
        trace=name,
        page_bytes=found.page_bytes,
        policy={NAMES[tier.place]: tier.policy for tier in found.tiers},
        hints=hints,
        capacity={NAMES[t.place]: t.configured * found.page_bytes for t in found.tiers},
        requests=score.requests,
        requests_given=workload.requests,
        accesses=score.accesses,
        distinct=workload.distinct,
        hits=score.hits,
        prefix_hits=_by_name(score),
        pages_stored=score.stored,
        pages_verified=score.verified,
        pages_wrong=score.wrong,
        first_wrong=tuple(_wrong(wrong) for wrong in score.first_wrong),
        pages_lost=score.lost,
        blocks_not_stored=score.not_stored,
        pages_dropped=found.counts.get("dropped", 0),
        routes=demo_report.routes_of(found, hints),
        fault=Fault(fault.n, fault.p50_s * 1e6, fault.p99_s * 1e6),
        held={NAMES[tier.place]: tier.bytes_used for tier in found.tiers},
        residence=tuple(samples),
        seconds=seconds,
        counts=dict(found.counts),
        notes=tuple(_notes(found, score)),
    )


def _notes(found: Statistics, score: Score) -> Iterator[str]:
    """What a reader must know of a run that did not go as configured."""
    for tier in found.tiers:
        name = NAMES[tier.place]
        if tier.failed:
            yield f"the {name} tier failed and took no more pages"
        if tier.capacity < tier.configured:
            yield f"the {name} tier has {tier.capacity} of {tier.configured} pages ready so far"
        if tier.fallbacks:
            yield f"{tier.fallbacks} answers of the policy of {name} were refused"
    for route in found.routes:
        if route.failed:
            src, dst = NAMES[route.src], NAMES[route.dst]
            yield f"{route.failed} copies from {src} to {dst} failed; none of them was served"
    if score.lost:
        yield f"{score.lost} pages were lost; their blocks were misses"


def _wrong(wrong: Wrong) -> str:
    return (
        f"request {wrong.request}: page {wrong.page}, found in {NAMES[wrong.place]}, does not hold "
        f"the bytes of block {wrong.block}"
    )


def _sample(space: Space, score: Score, seconds: float) -> Sample:
    held = {NAMES[tier.place]: tier.used for tier in space.statistics().tiers}
    return Sample(score.requests, seconds, score.accesses, held, _by_name(score))


def _by_name(score: Score) -> dict[str, int]:
    return {NAMES[place]: hits for place, hits in score.prefix_hits.items()}


def _words(score: Score) -> tuple[str, str]:
    """What the bar says beside its length."""
    hits = sum(score.prefix_hits.values())
    part = f"{100 * hits / max(score.accesses, 1):.1f} % prefix hits"
    return part, f"[red]{score.wrong} wrong" if score.wrong else "0 wrong"


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[hits]}"),
        TextColumn("{task.fields[wrong]}"),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        transient=True,
    )


@contextmanager
def _interrupt() -> Iterator[threading.Event]:
    """An event that a first Ctrl-C sets; a second one interrupts as usual."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    usual = signal.getsignal(signal.SIGINT)

    def ask(number: int, frame: FrameType | None) -> None:
        asked.set()
        signal.signal(signal.SIGINT, usual)

    signal.signal(signal.SIGINT, ask)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, usual)
