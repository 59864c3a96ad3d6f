"""The file that `tiermem bench offload` writes: schema `tiermem.offload.v1`, strict both ways.

docs/benchmarks.md explains every field. Rates are in GB/s (1e9 bytes), sizes in bytes.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np

from tiermem.bench.machine import Machine, machine
from tiermem.bench.paired import Ratio, ratio
from tiermem.errors import TierMemError

__all__ = [
    "AGREE",
    "SCHEMA",
    "BadResult",
    "Check",
    "Figure",
    "Machine",
    "PageTime",
    "Result",
    "Row",
    "Spread",
    "machine",
    "read",
    "write",
]

SCHEMA = "tiermem.offload.v1"

AGREE = 0.05
"""How far from an independent tool a figure may lie and still agree with it."""

Direction = Literal["one-way", "both"]
Beside = Literal["", "python-thread", "disk"]
Work = Literal[
    "", "ceiling", "kvikio", "evict", "load", "load-ahead", "steal", "steal-ahead", "swap"
]


class BadResult(TierMemError):
    """A result file that cannot be read; the message has the file and the reason."""


class Spread(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Rates of the measured rounds, warm-up excluded, in GB/s."""

    n: int
    median: float
    p5: float
    p95: float
    rounds: tuple[float, ...]

    def __post_init__(self) -> None:
        if self.n != len(self.rounds) or self.n < 1:
            raise ValueError(f"gbps.n is {self.n} but gbps.rounds has {len(self.rounds)} entries")
        if not self.p5 <= self.median <= self.p95:
            raise ValueError(f"gbps: p5 {self.p5} <= median {self.median} <= p95 {self.p95} fails")

    @classmethod
    def of(cls, rounds: Sequence[float]) -> Spread:
        """Summarise the rounds, in the order in which they were measured; at least one."""
        p5, median, p95 = (float(x) for x in np.percentile(rounds, (5, 50, 95)))
        return cls(len(rounds), median, p5, p95, tuple(float(x) for x in rounds))


class PageTime(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Time from the submission of a page to its arrival, in microseconds."""

    p50: float
    p99: float


class Figure(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A measured figure that is no rate of a route: what a call, a fault or an allocation takes."""

    unit: str
    """us, us/page, percent, GiB, GiB/s."""
    n: int
    median: float
    p99: float

    @classmethod
    def of(cls, unit: str, samples: Sequence[float]) -> Figure:
        """Summarise samples; at least one."""
        median, p99 = (float(x) for x in np.percentile(samples, (50, 99)))
        return cls(unit, len(samples), median, p99)


class Row(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One measured combination. `route` to `work` name it; no two rows of a file share a name."""

    route: str
    """Tiers in the order of travel (host-gpu, gpu-host, nvme-host, ..., gpu-gpu), or in-place."""
    src: str
    """Kind, and which one when it matters: gpu:0, host:node1, nvme:nvme0n1."""
    dst: str
    page_bytes: int
    group: int
    """Pages in one batched call (copies; several calls are in flight), operations in flight
    (disk), pages that are asked for at once (through the pager). 1: one page, waited for."""
    direction: Direction = "one-way"
    """both: the other way runs at the same time, and the rate is the sum of the two."""
    gpus: int = 1
    """GPUs that work at once; the rate is the sum over all of them."""
    beside: Beside = ""
    """What else runs meanwhile: a busy Python thread, or the disk."""
    work: Work = ""
    """Nothing: the route alone. ceiling: one large copy. kvikio: by kvikio, where the others go
    through host memory. Else work through the whole pager."""
    gbps: Spread
    page_us: PageTime | None = None
    cpu_s_per_gib: float | None = None
    percent_of_link: float | None = None
    """100 x median / usable rate of the negotiated link (of both its directions where direction
    is both, of all links where gpus > 1); None where the link is not known."""
    relation: str = "unknown"
    """PIX, PXB, PHB, NODE, SYS or NVLink between the two ends (`tiermem topo`)."""
    path: str = ""
    """What really carried the bytes: copy-engine, gather-kernel, gds, posix O_DIRECT, ..."""


class Check(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One of our figures beside that of a tool that shares no code with us, of the same run."""

    what: str
    tool: str
    n: int
    """Rounds of the tool."""
    ours_gbps: float
    theirs_gbps: float
    """Medians."""
    ratio: float
    """Ours over theirs: the median of the rounds' own ratios where the two took turns."""
    agrees: bool
    """Whether the ratio lies within AGREE of 1."""
    low: float | None = None
    high: float | None = None
    """Where the ratio lies with 95 % confidence; None without turns, or with fewer than six."""
    ours_rounds: tuple[float, ...] = ()
    theirs_rounds: tuple[float, ...] = ()
    """GB/s of every round, in the order in which they ran."""

    @classmethod
    def of(
        cls,
        what: str,
        tool: str,
        ours_gbps: Sequence[float],
        theirs_gbps: Sequence[float],
        *,
        turns: bool = True,
    ) -> Check:
        """Compare rounds, at least one each; turns: round i of both was measured together."""
        ours, theirs = (float(np.median(rates)) for rates in (ours_gbps, theirs_gbps))
        n = len(theirs_gbps)
        found = ratio(ours_gbps, theirs_gbps) if turns else Ratio(n, ours / theirs)
        return cls(
            what=what,
            tool=tool,
            n=n,
            ours_gbps=ours,
            theirs_gbps=theirs,
            ratio=found.median,
            agrees=abs(found.median - 1) <= AGREE,
            low=found.low,
            high=found.high,
            ours_rounds=tuple(ours_gbps),
            theirs_rounds=tuple(theirs_gbps),
        )

    @property
    def interval(self) -> str:
        """0.95-1.01, or nothing."""
        return "" if self.low is None else f"{self.low:.3f}-{self.high:.3f}"

    @property
    def verdict(self) -> Literal["agree", "differ", "unsure"]:
        """unsure: outside of AGREE by the median, and the interval reaches into it."""
        if self.agrees:
            return "agree"
        if self.low is None or self.high is None:
            return "differ"
        apart = self.low > 1 + AGREE or self.high < 1 - AGREE
        return "differ" if apart else "unsure"


class Result(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One run of the benchmark."""

    schema: Literal["tiermem.offload.v1"] = "tiermem.offload.v1"
    started: str
    """UTC, ISO 8601 to the second: 2026-11-21T05:30:00Z."""
    took_s: float
    complete: bool
    """False when the run was interrupted; the rows are good, others are missing."""
    device: Literal["cuda", "cpu"]
    """cpu: the emulated device; its figures say nothing about a GPU."""
    machine: Machine
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()
    figures: dict[str, Figure] = {}
    """By name, what is no row; docs/benchmarks.md lists the names."""
    checks: tuple[Check, ...] = ()
    sections: dict[str, float] = {}
    """Seconds that each part of the run took, set-up included."""


def read(path: Path) -> Result:
    """Decode and check a result file; BadResult says what is wrong and where."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise BadResult(f"{path}: cannot be read ({error.strerror})") from error
    try:
        schema = msgspec.json.decode(data, type=_Named).schema
        if schema != SCHEMA:
            raise BadResult(f"{path}: schema is {schema!r}, this version reads {SCHEMA!r} only")
        result = msgspec.json.decode(data, type=Result)
    except msgspec.DecodeError as error:
        raise BadResult(f"{path}: not a {SCHEMA} file ({error})") from error
    _refuse_duplicates(result.rows, str(path))
    return result


def write(result: Result, path: Path) -> None:
    """Write the file whole or not at all: a crash leaves the old one."""
    _refuse_duplicates(result.rows, str(path))
    data = msgspec.json.format(msgspec.json.encode(result), indent=2)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_bytes(data + b"\n")
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


Key = tuple[str, str, str, int, int, str, int, str, str]


def key(row: Row) -> Key:
    """What names a row within one file."""
    return (
        row.route,
        row.src,
        row.dst,
        row.page_bytes,
        row.group,
        row.direction,
        row.gpus,
        row.beside,
        row.work,
    )


def _refuse_duplicates(rows: Sequence[Row], where: str) -> None:
    seen: set[Key] = set()
    for row in rows:
        if key(row) in seen:
            raise BadResult(f"{where}: two rows for {key(row)}; a row is named by these fields")
        seen.add(key(row))


class _Named(msgspec.Struct):
    schema: str
