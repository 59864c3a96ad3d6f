"""`tiermem simulate`: which policy would have kept what, on a trace, at several capacities.

Runs the policy classes of the runtime. In stream mode a policy of the package runs as compiled
rule instead if numba is installed (extra `sim`); tests prove both equal, hit for hit.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Literal

import msgspec
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from tiermem.bench import fast, output, traces
from tiermem.bench.machine import Machine, machine
from tiermem.bench.optimum import ceiling, optimum, scored
from tiermem.bench.replay import log_victims, requests, stream
from tiermem.bench.simulate_svg import curves
from tiermem.bench.tiers import Costs, TierRow, tiered
from tiermem.bench.workload import Workload, collect
from tiermem.errors import ConfigError
from tiermem.policies import load
from tiermem.policies.registry import find
from tiermem.policies.trial import Score

SCHEMA = "tiermem.simulate.v1"
POLICIES = "lru,s3fifo,classq,belady"
CAPACITIES = "1%,5%,10%,25%"

Mode = Literal["stream", "request"]


class Row(msgspec.Struct, frozen=True):
    """One policy at one capacity. prefix_hits: blocks before the first miss of each request."""

    policy: str
    mode: Mode
    capacity_percent: float
    capacity_blocks: int
    accesses: int
    hits: int
    prefix_hits: int
    hit_ratio: float
    prefix_hit_ratio: float
    seconds: float
    compiled: bool


class LogRow(msgspec.Struct, frozen=True):
    """One tier of a recorded log, replayed: how many answers are the same, order included."""

    tier: str
    policy: str
    answers: int
    same: int
    first_difference: int | None


class Simulation(msgspec.Struct, frozen=True):
    """What `tiermem simulate --json` writes; docs/policies.md explains the fields."""

    schema: str
    machine: Machine
    trace: str
    requests: int
    accesses: int
    distinct_blocks: int
    reuse_ceiling: float
    rows: tuple[Row, ...] = ()
    tiers: tuple[TierRow, ...] = ()
    log: tuple[LogRow, ...] = ()


def command(
    trace: Annotated[
        Path | None, typer.Option(help="Requests or an event log: plain, .gz, .xz; else generated.")
    ] = None,
    policy: Annotated[
        str, typer.Option(help="Names or module:Class, comma between them.")
    ] = POLICIES,
    capacity: Annotated[
        str, typer.Option(help="Parts of the distinct blocks (1%), or numbers of blocks.")
    ] = CAPACITIES,
    mode: Annotated[
        Literal["stream", "request"], typer.Option(help="Block by block, or request by request.")
    ] = "request",
    tiers: Annotated[
        str | None,
        typer.Option(metavar="G:H:N", help="Three tiers, as multiples of the capacity: 1:4:32."),
    ] = None,
    features: Annotated[
        bool, typer.Option(help="Tell policies what an engine may pass: session, turn, reason.")
    ] = True,
    page: Annotated[float, typer.Option(help="MiB of a block (--tiers).")] = 64.0,
    host_gbps: Annotated[float, typer.Option(help="Host to GPU, GB/s (--tiers).")] = 54.0,
    nvme_gbps: Annotated[float, typer.Option(help="NVMe to GPU, GB/s (--tiers).")] = 3.0,
    prefill: Annotated[float, typer.Option(help="Tokens/s that the model computes.")] = 34_000.0,
    servers: Annotated[int, typer.Option(help="Replicas with one queue; 0: nobody waits.")] = 0,
    prefetch: Annotated[
        Literal["none", "queue"], typer.Option(help="Load while a request waits, or not.")
    ] = "none",
    admission: Annotated[
        Literal["all", "second", "reuse"], typer.Option(help="What is written to NVMe.")
    ] = "all",
    write_mbps: Annotated[float, typer.Option(help="NVMe write budget, MB/s; 0: none.")] = 0.0,
    limit: Annotated[int | None, typer.Option(min=1, help="Replay so many requests.")] = None,
    skip_bad: Annotated[bool, typer.Option(help="Skip lines that cannot be read.")] = False,
    json: Annotated[str | None, typer.Option(help="Write JSON to this path, or to - .")] = None,
    svg: Annotated[Path | None, typer.Option(help="Draw curves over capacity.")] = None,
) -> None:
    """Replay a trace against eviction policies."""
    costs = Costs(
        page_bytes=int(page * 2**20), host_gbps=host_gbps, nvme_gbps=nvme_gbps,
        prefill_tokens_per_s=prefill, servers=servers, prefetch=prefetch,
        admission=admission, write_mbps=write_mbps,
    )  # fmt: skip
    result = run(
        trace, listed(policy), capacity.split(","), mode, tiers=tiers, costs=costs,
        features=features, limit=limit, on_bad="skip" if skip_bad else "refuse",
        console=None if json == "-" else Console(stderr=True),
    )  # fmt: skip
    if svg is not None:
        if not result.rows:
            raise ConfigError("--svg draws the rows of policies over capacity; this run has none")
        output.save(svg, curves(result.trace, result.rows, result.reuse_ceiling))
    if not output.emit(result, json):
        show(result, Console())


def run(
    trace: Path | None,
    policies: Sequence[str],
    capacities: Sequence[str],
    mode: Mode = "request",
    tiers: str | None = None,
    costs: Costs | None = None,
    features: bool = True,
    limit: int | None = None,
    on_bad: traces.OnBad = "refuse",
    console: Console | None = None,
) -> Simulation:
    """Simulate; raises BadTrace, BadPolicy or ConfigError. console: where progress is shown."""
    names = [name.strip() for name in policies]
    for name in names:
        find(name)
    if trace is not None and traces.kind(trace) == "log":
        logged = tuple(replay_log(trace, on_bad))
    else:
        logged = ()
    workload, title = read_workload(trace, on_bad, limit)
    sizes = [size_of(text, workload) for text in capacities]
    with _progress(console) as bar:
        cases = [(name, percent, size) for name in names for percent, size in sizes]
        if tiers is None:
            rows = [
                simulate(
                    workload, name, size, mode, features, _task(bar, name, size, workload), percent
                )
                for name, percent, size in cases
            ]
            tier_rows = []
        else:
            rows = []
            shares = tier_shares(tiers)
            tier_rows = [
                tiered(
                    workload, name, [max(1, round(size * share)) for share in shares],
                    costs or Costs(), features, _task(bar, name, size, workload),
                )
                for name, _, size in cases
            ]  # fmt: skip
    return Simulation(
        schema=SCHEMA, machine=machine(), trace=title, requests=workload.requests,
        accesses=workload.accesses, distinct_blocks=workload.distinct,
        reuse_ceiling=ceiling(workload), rows=tuple(rows), tiers=tuple(tier_rows), log=logged,
    )  # fmt: skip


def read_workload(
    trace: Path | None, on_bad: traces.OnBad = "refuse", limit: int | None = None
) -> tuple[Workload, str]:
    """The trace, or generated requests, and what to call it."""
    if trace is None:
        from tiermem.bench.generate import generate

        workload, title = collect(generate()), "generated chats and agents"
    else:
        workload, title = collect(traces.read(trace, on_bad)), trace.name
    return (workload if limit is None else workload.part(0, limit)), title


def listed(text: str) -> list[str]:
    """Names with commas between them; a comma within parentheses belongs to its name."""
    return [name.strip() for name in re.split(r",(?![^()]*\))", text)]


def size_of(text: str, workload: Workload) -> tuple[float, int]:
    """A capacity in percent of the distinct blocks and in blocks, from "5%" or "2000".

    Raises ConfigError.
    """
    text = text.strip()
    try:
        if text.endswith("%"):
            percent = float(text[:-1])
            if not 0 < percent <= 100:
                raise ValueError
            return percent, workload.capacity(percent)
        if int(text) < 1:
            raise ValueError
        return round(100 * int(text) / workload.distinct, 4), int(text)
    except ValueError:
        raise ConfigError(
            f"capacity {text!r}: neither a part of the distinct blocks in (0%, 100%], "
            "such as 5%, nor a number of blocks, such as 2000"
        ) from None


def tier_shares(text: str) -> list[float]:
    """Multiples of the capacity for GPU, host and NVMe, from "1:4:32"."""
    try:
        shares = [float(part) for part in text.split(":")]
        if len(shares) != 3 or shares[0] <= 0 or min(shares) < 0:
            raise ValueError
    except ValueError:
        raise ConfigError(
            f"--tiers {text!r}: three multiples of the capacity, such as 1:4:32; 0 = tier off"
        ) from None
    return shares


def simulate(
    workload: Workload,
    name: str,
    capacity: int,
    mode: Mode = "request",
    features: bool = True,
    progress: Callable[[int], None] | None = None,
    percent: float | None = None,
) -> Row:
    """One policy at one capacity. percent: what the capacity was asked for as."""
    compiled = fast.compiled() and mode == "stream" and name in fast.KERNELS
    if compiled:
        fast.warm(name)
    start_s = time.perf_counter()
    score: Score
    if compiled:
        hit = fast.hits(name, workload.blocks, workload.distinct, capacity)
        score = scored(workload, hit)
    elif mode == "request" and name == "belady":
        score = optimum(workload, capacity)
    elif mode == "request":
        score = requests(workload, load(name, capacity), capacity, features, progress)
    else:
        policy = load(name, capacity, offline=True)
        score = stream(workload, policy, capacity, features, progress)
    return Row(
        policy=name,
        mode=mode,
        capacity_percent=percent or round(100 * capacity / workload.distinct, 4),
        capacity_blocks=capacity,
        accesses=score.accesses,
        hits=score.hits,
        prefix_hits=score.prefix_hits,
        hit_ratio=round(score.hits / score.accesses, 6),
        prefix_hit_ratio=round(score.prefix_hits / score.accesses, 6),
        seconds=round(time.perf_counter() - start_s, 4),
        compiled=compiled,
    )


def replay_log(path: Path, on_bad: traces.OnBad = "refuse") -> list[LogRow]:
    """Each tier of a recorded log against the policy that it says it ran."""
    header, _ = traces.read_log(path, on_bad)
    rows = []
    for tier, head in header.tiers.items():
        policy = load(head.policy, max(1, head.capacity), head.seed, head.params)
        answers = same = 0
        different: int | None = None
        for event, named in log_victims(traces.read_log(path, on_bad)[1], tier, policy):
            answers += 1
            same += named == event.units
            if different is None and named != event.units:
                different = answers
        rows.append(LogRow(tier, head.policy, answers, same, different))
    return rows


def show(result: Simulation, console: Console) -> None:
    """Print the tables."""
    console.print(
        f"[bold]{result.trace}[/]: {result.requests:,} requests, {result.accesses:,} block "
        f"accesses, {result.distinct_blocks:,} distinct; reuse ceiling {result.reuse_ceiling:.4f}"
    )
    if result.rows:
        table = Table("policy", title=f"{result.rows[0].mode} mode", title_justify="left")
        for word in ("capacity", "blocks", "hits", "ratio", "prefix", "M accesses/s"):
            table.add_column(word, justify="right")
        for row in result.rows:
            rate = f"{row.accesses / max(row.seconds, 1e-9) / 1e6:.2f}"
            table.add_row(
                row.policy, f"{row.capacity_percent:g} %", f"{row.capacity_blocks:,}",
                f"{row.hits:,}", f"{row.hit_ratio:.4f}", f"{row.prefix_hit_ratio:.4f}",
                rate + (" *" if row.compiled else ""),
            )  # fmt: skip
        console.print(table)
        if any(row.compiled for row in result.rows):
            console.print("* the policy's rule, compiled; equal to its class hit for hit")
    for tier in result.tiers:
        console.print(tier.table())
    for entry in result.log:
        verdict = "all" if entry.same == entry.answers else f"{entry.same:,}"
        console.print(
            f"log, tier {entry.tier} ({entry.policy}): {verdict} of {entry.answers:,} answers "
            "name the same victims in the same order"
            + (f"; first difference: {entry.first_difference}" if entry.first_difference else "")
        )


def _progress(console: Console | None) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TimeElapsedColumn(),
        console=console or Console(quiet=True),
        transient=True,
        disable=console is None,
    )


def _task(bar: Progress, name: str, size: int, workload: Workload) -> Callable[[int], None]:
    task = bar.add_task(f"{name} {size:,}", total=workload.requests)
    return lambda done: bar.update(task, completed=done)
