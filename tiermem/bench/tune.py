"""`tiermem tune`: which policies suit a recorded trace, as a TOML that says why.

The first half of the trace chooses. A candidate replaces the default only if it was better in
each of the two parts of that half that are scored, so that luck in one of them is not enough; the
second half, which no choice has seen, says what is gained.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import msgspec
import numpy as np
import numpy.typing as npt
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from tiermem.bench import output, traces
from tiermem.bench.machine import Machine, machine
from tiermem.bench.replay import requests
from tiermem.bench.simulate import listed, read_workload, size_of, tier_shares
from tiermem.bench.tiers import Costs, TierRow, timed
from tiermem.bench.workload import Workload
from tiermem.config import load as load_config
from tiermem.errors import ConfigError
from tiermem.policies.registry import load, parse
from tiermem.policies.trial import Score
from tiermem.settings import literal

SCHEMA = "tiermem.tune.v1"

DEFAULT = "classq"
CANDIDATES = (
    "classq",
    "classq(turns=1,gaps=6)",
    "classq(turns=4,gaps=8)",
    "classq(turns=3,gaps=5,decay=0.98)",
    "lru",
    "clock",
    "arc",
    "2q",
    "lfuda",
    "s3fifo",
    "s3fifo(small=0.3)",
    "wtinylfu(window=0.1)",
)
ADMISSIONS: tuple[Rule, ...] = ("all", "reuse", "second")

MARGIN = 0.005
"""Of the default's cost in each part: what must be gained before a default is left."""

FINALISTS = 3

Rule = Literal["all", "second", "reuse"]
Case = tuple[str, Rule]
T = TypeVar("T")


class Choice(msgspec.Struct, frozen=True):
    """A configuration and its mean time to the first token, in s; written: bytes to NVMe."""

    policy: str
    admission: str
    cost_s: float
    written_bytes: int


class Tuning(msgspec.Struct, frozen=True):
    """What `tiermem tune --json` writes."""

    schema: str
    machine: Machine
    trace: str
    requests: int
    capacity_blocks: tuple[int, int, int]
    write_budget_bytes_per_s: float
    tried: tuple[Choice, ...]
    """On the first half, best first; only finalists were tried on three tiers."""
    screened: dict[str, float]
    """Prefix-hit ratio of each candidate in GPU memory alone, on the first half."""
    default: Choice
    chosen: Choice
    """Both judged on the second half."""

    @property
    def gain(self) -> float:
        """The part of the default's time that is saved on the second half."""
        return 1 - self.chosen.cost_s / self.default.cost_s if self.default.cost_s else 0.0


def command(
    trace: Annotated[
        Path | None, typer.Option(help="Requests or an event log: plain, .gz, .xz; else generated.")
    ] = None,
    capacity: Annotated[
        str, typer.Option(help="GPU memory: a part of the distinct blocks, or blocks.")
    ] = "1%",
    tiers: Annotated[
        str, typer.Option(metavar="G:H:N", help="GPU, host, NVMe as multiples of it.")
    ] = "1:4:32",
    policy: Annotated[
        str | None, typer.Option(help="Further candidates: names or module:Class.")
    ] = None,
    present: Annotated[
        str | None, typer.Option(help="The policy that runs now; else the one configured.")
    ] = None,
    write_mbps: Annotated[float, typer.Option(help="NVMe write budget, MB/s; 0: none.")] = 0.0,
    page: Annotated[float, typer.Option(help="MiB of a block.")] = 64.0,
    host_gbps: Annotated[float, typer.Option(help="Host to GPU, GB/s.")] = 54.0,
    nvme_gbps: Annotated[float, typer.Option(help="NVMe to GPU, GB/s.")] = 3.0,
    prefill: Annotated[float, typer.Option(help="Tokens/s that the model computes.")] = 34_000.0,
    limit: Annotated[int | None, typer.Option(min=4, help="Use so many requests.")] = None,
    skip_bad: Annotated[bool, typer.Option(help="Skip lines that cannot be read.")] = False,
    write: Annotated[Path | None, typer.Option(help="Write the TOML here, else print it.")] = None,
    json: Annotated[str | None, typer.Option(help="Write JSON to this path, or to - .")] = None,
) -> None:
    """Choose policies for a recorded trace."""
    costs = Costs(
        page_bytes=int(page * 2**20), host_gbps=host_gbps, nvme_gbps=nvme_gbps,
        prefill_tokens_per_s=prefill, write_mbps=write_mbps,
    )  # fmt: skip
    result = run(
        trace, capacity, tiers, costs, listed(policy) if policy else (),
        present or load_config().evict.gpu, limit,
        "skip" if skip_bad else "refuse", None if json == "-" else Console(stderr=True),
    )  # fmt: skip
    if write is not None:
        output.save(write, toml(result))
    if not output.emit(result, json):
        show(result, Console(), write)


def run(
    trace: Path | None,
    capacity: str = "1%",
    tiers: str = "1:4:32",
    costs: Costs | None = None,
    further: Sequence[str] = (),
    present: str = DEFAULT,
    limit: int | None = None,
    on_bad: traces.OnBad = "refuse",
    console: Console | None = None,
) -> Tuning:
    """Search on the first half, judge on the second. Raises BadTrace, BadPolicy, ConfigError."""
    costs = costs or Costs()
    workload, title = read_workload(trace, on_bad, limit)
    if workload.requests < 4:
        raise ConfigError(f"{title}: {workload.requests} requests; at least 4 are needed to tune")
    size = size_of(capacity, workload)[1]
    blocks = tuple(max(1, round(size * share)) if share else 0 for share in tier_shares(tiers))
    candidates = list(dict.fromkeys((present, *CANDIDATES, *further)))
    half = workload.part(0, workload.requests // 2)
    screened = {
        name: _screen(half, name, blocks[0]).prefix_hits / half.accesses
        for name in _track(candidates, "one tier", console)
    }
    order = sorted(candidates, key=lambda name: -screened[name])
    finalists = list(dict.fromkeys((present, *order[:FINALISTS])))
    cases = [(name, rule) for name in finalists for rule in _admissions(costs, blocks)]
    tried = {
        case: _parts(half, case, blocks, costs)
        for case in _track(cases, "three tiers", console)
    }  # fmt: skip
    now: Case = (present, "all")
    best = choose({case: tuple(c.cost_s for c in parts) for case, parts in tried.items()}, now)
    judged = {case: _judge(workload, case, blocks, costs) for case in dict.fromkeys((now, best))}
    firsts = [_mean(parts) for parts in tried.values()]
    return Tuning(
        schema=SCHEMA, machine=machine(), trace=title, requests=workload.requests,
        capacity_blocks=(blocks[0], blocks[1], blocks[2]),
        write_budget_bytes_per_s=costs.write_mbps * 1e6,
        tried=tuple(sorted(firsts, key=lambda choice: choice.cost_s)),
        screened={name: round(ratio, 6) for name, ratio in screened.items()},
        default=judged[now], chosen=judged[best],
    )  # fmt: skip


def choose(costs: Mapping[Case, Sequence[float]], now: Case) -> Case:
    """The case with the least sum of costs among those that beat `now` in every part."""
    base = costs[now]
    better = [
        case
        for case, parts in costs.items()
        if all(part <= (1 - MARGIN) * own for part, own in zip(parts, base, strict=True))
    ]
    return min(better, key=lambda case: sum(costs[case]), default=now)


def _screen(half: Workload, name: str, capacity: int) -> Score:
    return requests(half, load(name, capacity), capacity)


def _admissions(costs: Costs, blocks: Sequence[int]) -> tuple[Rule, ...]:
    """Admission decides something only where writes are bounded."""
    return ADMISSIONS if costs.write_mbps and blocks[2] else ADMISSIONS[:1]


def _parts(half: Workload, case: Case, blocks: Sequence[int], costs: Costs) -> tuple[Choice, ...]:
    """The case in the second and the third third of the half; the first warms the tiers up."""
    cuts = [half.requests * i // 3 for i in range(1, 4)]
    row, ttft = _timed(half, case, blocks, costs)
    return tuple(
        Choice(*case, float(ttft[a:b].mean()), row.nvme_written_bytes) for a, b in pairwise(cuts)
    )


def _judge(workload: Workload, case: Case, blocks: Sequence[int], costs: Costs) -> Choice:
    """The case on the second half, after the first has warmed the tiers."""
    row, ttft = _timed(workload, case, blocks, costs)
    return Choice(*case, float(ttft[workload.requests // 2 :].mean()), row.nvme_written_bytes)


def _timed(
    workload: Workload, case: Case, blocks: Sequence[int], costs: Costs
) -> tuple[TierRow, npt.NDArray[np.float64]]:
    name, rule = case
    return timed(workload, name, blocks, replace(costs, admission=rule))


def _mean(parts: Sequence[Choice]) -> Choice:
    cost_s = sum(part.cost_s for part in parts) / len(parts)
    return msgspec.structs.replace(parts[0], cost_s=cost_s)


def toml(result: Tuning) -> str:
    """The chosen configuration, with reasons in comments."""
    name, params = parse(result.chosen.policy)
    lines = [
        f"# Written by tiermem tune from {result.trace}: {result.requests:,} requests.",
        f"# Tiers of {' / '.join(f'{n:,}' for n in result.capacity_blocks)} blocks.",
        f"# Mean time to the first token on the half that was not used to choose: "
        f"{result.chosen.cost_s:.4f} s,",
        f"# with {result.default.policy}: {result.default.cost_s:.4f} s "
        f"(gain {100 * result.gain:.2f} %).",
        "",
        "[evict]",
        f'gpu = "{name}"   # of {len(result.screened)} candidates; '
        f"prefix-hit ratio {result.screened[result.chosen.policy]:.4f} in GPU memory alone",
        f'host = "{name}"',
        f'nvme = "{Costs().nvme_policy}"   # keeps its copies; by last use',
    ]
    if params:
        table = ", ".join(f"{key} = {literal(value)}" for key, value in params.items())
        lines += [f"gpu_params = {{ {table} }}", f"host_params = {{ {table} }}"]
    if result.write_budget_bytes_per_s:
        rate = f"{result.write_budget_bytes_per_s / 2**20:.0f}MiB/s"
        lines += ["", "[nvme]", f'write_budget = "{rate}"']
        lines.append(f"# admission of NVMe writes: {result.chosen.admission}")
    return "\n".join(lines) + "\n"


def show(result: Tuning, console: Console, written: Path | None) -> None:
    """Print what was tried, what is gained, and the TOML if it went to no file."""
    table = Table("policy", "admission", title="first half", title_justify="left")
    for word in ("mean TTFT, s", "NVMe GB"):
        table.add_column(word, justify="right")
    for choice in result.tried:
        table.add_row(
            choice.policy, choice.admission, f"{choice.cost_s:.4f}",
            f"{choice.written_bytes / 1e9:,.1f}",
        )  # fmt: skip
    console.print(table)
    console.print(
        f"second half: {result.chosen.policy} {result.chosen.cost_s:.4f} s, "
        f"now {result.default.policy} {result.default.cost_s:.4f} s: "
        f"gain {100 * result.gain:.2f} %"
    )
    console.print(f"written: {written}" if written else toml(result), markup=False)


def _track(cases: Sequence[T], what: str, console: Console | None) -> Iterable[T]:
    return track(cases, what, console=console, disable=console is None, transient=True)
