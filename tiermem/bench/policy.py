"""Speeds of the eviction policies on one core: touches, victims, one large question, the stream.

`python -m tiermem.bench.policy`. Touches and victims run as the pager makes them: a request's 256
units a call. Victims are amortised over removal and insertion of what replaces them.
"""

from __future__ import annotations

import importlib
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import msgspec
import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from tiermem.bench import fast, output, traces
from tiermem.bench.machine import Machine, machine
from tiermem.bench.replay import Facts
from tiermem.bench.workload import I32, Workload, collect
from tiermem.policies import load, names
from tiermem.policies.base import Eviction, Ids, Mask

SCHEMA = "tiermem.policy.v1"
UNITS = 1_000_000
BATCH = 256
ROUNDS = 2_000
OTHERS = ("belady", "retained")
"""Offline, and a layer that is as fast as what it lies over."""

THEIRS = {"lru": "LRU", "s3fifo": "S3FIFO", "fifo": "FIFO", "sieve": "Sieve"}


class PolicySpeed(msgspec.Struct, frozen=True):
    """One policy with `units` units in its tier."""

    policy: str
    units: int
    touches_per_s: float
    victims_per_s: float
    """victims, removed and inserted together: one cycle of a full tier."""
    answer_ms_median: float
    answer_ms_p99: float
    answer_ms_max: float
    """One `victims` call for 256 among all units, after touches."""


class StreamSpeed(msgspec.Struct, frozen=True):
    """Accesses per second over a trace at 5 % of its distinct blocks."""

    policy: str
    ours_per_s: float
    libcachesim_per_s: float | None
    """None: the package libcachesim is not installed."""
    hits: int
    libcachesim_hits: int | None


class Speeds(msgspec.Struct, frozen=True):
    """What `--json` writes."""

    schema: str
    machine: Machine
    policies: tuple[PolicySpeed, ...]
    stream: tuple[StreamSpeed, ...] = ()


class _Any:
    """Candidates: all of them."""

    def __init__(self, units: int) -> None:
        self._units = units

    def keep(self, units: Ids) -> Mask:
        return np.ones(len(units), np.bool_)

    def all(self) -> Ids:
        return np.arange(self._units, dtype=np.int32)


def command(
    units: Annotated[int, typer.Option(min=1024, help="Units in the tier.")] = UNITS,
    policy: Annotated[str | None, typer.Option(help="Names, comma between them.")] = None,
    trace: Annotated[
        Path | None, typer.Option(help="Also replay this trace as a flat stream.")
    ] = None,
    json: Annotated[str | None, typer.Option(help="Write JSON to this path, or to - .")] = None,
) -> None:
    """Measure the eviction policies on one core."""
    chosen = policy.split(",") if policy else [name for name in names() if name not in OTHERS]
    speeds = tuple(measure(name, units) for name in chosen)
    streams = stream_speeds(collect(traces.read(trace))) if trace else ()
    result = Speeds(SCHEMA, machine(), speeds, tuple(streams))
    if not output.emit(result, json):
        show(result, Console())


def measure(name: str, units: int = UNITS, rounds: int = ROUNDS) -> PolicySpeed:
    """Fill a tier with chains of 256 units, then touch, ask and replace."""
    policy = load(name, units)
    random = np.random.default_rng(0)
    chains = _chains(units)
    now = _fill(policy, chains)
    touches = _touch(policy, chains, random, rounds, now)
    now += rounds
    answers = _answers(policy, chains, random, rounds // 4, now)
    now += rounds
    victims = _cycle(policy, units, rounds, now)
    median, p99 = (float(x) for x in np.percentile(answers, (50, 99)))
    return PolicySpeed(name, units, touches, victims, median, p99, max(answers))


def _chains(units: int) -> Sequence[I32]:
    """Deepest first."""
    every = np.arange(units, dtype=np.int32)
    return [every[i : i + BATCH][::-1].copy() for i in range(0, units, BATCH)]


def _fill(policy: Eviction, chains: Sequence[I32]) -> int:
    for now, chain in enumerate(chains):
        policy.inserted(chain, _parents(chain), _depths(chain), chain.astype(np.uint64), now)
        policy.finished(chain, Facts(now, 1, None, 100), now)
    return len(chains)


def _parents(chain: I32) -> I32:
    return np.append(chain[1:], np.int32(-1))


def _depths(chain: I32) -> I32:
    return np.arange(len(chain) - 1, -1, -1, dtype=np.int32)


def _touch(
    policy: Eviction, chains: Sequence[I32], random: np.random.Generator, rounds: int, now: int
) -> float:
    """Touches per second, whole chains at random."""
    order = [chains[i] for i in random.integers(0, len(chains), rounds)]
    start_s = time.perf_counter()
    for i, chain in enumerate(order):
        policy.accessed(chain, now + i)
    return sum(map(len, order)) / (time.perf_counter() - start_s)


def _answers(
    policy: Eviction, chains: Sequence[I32], random: np.random.Generator, rounds: int, now: int
) -> list[float]:
    """ms of each answer, a touched chain between two."""
    candidates = _Any(sum(map(len, chains)))
    found = []
    for i, at in enumerate(random.integers(0, len(chains), rounds)):
        policy.accessed(chains[at], now + i)
        start_s = time.perf_counter()
        policy.victims(candidates, BATCH, now + i)
        found.append(1e3 * (time.perf_counter() - start_s))
    return found


def _cycle(policy: Eviction, units: int, rounds: int, now: int) -> float:
    """Units per second through victims, removed and inserted."""
    candidates = _Any(units)
    through = 0
    start_s = time.perf_counter()
    for i in range(rounds):
        leaving = policy.victims(candidates, BATCH, now + i)
        policy.removed(leaving, now + i)
        keys = leaving.astype(np.uint64) + np.uint64(units * (i + 1))
        policy.inserted(leaving, _parents(leaving), _depths(leaving), keys, now + i)
        through += len(leaving)
    return through / (time.perf_counter() - start_s)


def stream_speeds(workload: Workload, percent: float = 5) -> list[StreamSpeed]:
    """The flat stream, compiled, beside libcachesim on the same accesses."""
    capacity = workload.capacity(percent)
    found = []
    for name, theirs in THEIRS.items():
        fast.warm(name)
        start_s = time.perf_counter()
        hit = fast.hits(name, workload.blocks, workload.distinct, capacity)
        ours = workload.accesses / (time.perf_counter() - start_s)
        other = _libcachesim(theirs, workload, capacity)
        found.append(StreamSpeed(name, ours, other[0], int(hit.sum()), other[1]))
    return found


def _libcachesim(
    name: str, workload: Workload, capacity: int
) -> tuple[float, int] | tuple[None, None]:
    """Accesses per second and hits of the package, over a binary trace that it reads itself."""
    try:
        libcachesim = importlib.import_module("libcachesim")
    except ImportError:
        return None, None
    row = np.dtype([("time", "<u4"), ("id", "<u8"), ("size", "<u4"), ("next", "<i8")])
    table = np.zeros(workload.accesses, row)
    table["id"], table["size"], table["next"] = workload.blocks, 1, -1
    with tempfile.NamedTemporaryFile(suffix=".oracleGeneral") as file:
        table.tofile(file.name)
        reader = libcachesim.TraceReader(
            trace=file.name,
            trace_type=libcachesim.TraceType.ORACLE_GENERAL_TRACE,
            reader_init_params=libcachesim.ReaderInitParam(ignore_obj_size=True),
        )
        cache = getattr(libcachesim, name)(capacity)
        start_s = time.perf_counter()
        miss_ratio, _ = cache.process_trace(reader)
        rate = workload.accesses / (time.perf_counter() - start_s)
    return rate, round(workload.accesses * (1 - miss_ratio))


def show(result: Speeds, console: Console) -> None:
    """Print the tables."""
    console.print(f"{result.machine.cpu}, {result.machine.cores} cores")
    table = Table("policy")
    for word in ("M touches/s", "M victims/s", "answer ms", "p99", "max"):
        table.add_column(word, justify="right")
    for speed in result.policies:
        table.add_row(
            speed.policy, f"{speed.touches_per_s / 1e6:.1f}", f"{speed.victims_per_s / 1e6:.2f}",
            f"{speed.answer_ms_median:.3f}", f"{speed.answer_ms_p99:.3f}",
            f"{speed.answer_ms_max:.3f}",
        )  # fmt: skip
    console.print(table)
    for row in result.stream:
        theirs = (
            "not installed"
            if row.libcachesim_per_s is None
            else f"{row.libcachesim_per_s / 1e6:.1f} M/s, {row.libcachesim_hits:,} hits"
        )
        console.print(
            f"stream {row.policy}: {row.ours_per_s / 1e6:.1f} M/s, {row.hits:,} hits; "
            f"libcachesim {theirs}"
        )


if __name__ == "__main__":
    typer.run(command)
