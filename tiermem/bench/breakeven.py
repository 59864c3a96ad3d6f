"""`tiermem bench breakeven`: from how many prompt tokens on loading beats computing.

A prefill speed holds for prompts of 4,096 tokens; other lengths follow from the share of attention,
whose work grows with the square. Loading takes a fixed time and then the bytes at the measured rate
of the route, with nothing else on it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import msgspec
import typer
from rich.console import Console
from rich.table import Table

from tiermem.bench import chart, models, output, result, words
from tiermem.bench.models import Model
from tiermem.bench.result import Result, Row
from tiermem.errors import TierMemError
from tiermem.units import format_bytes

MEASURED_MODEL = "Llama-3.1-8B"
MEASURED_TPS = 45_400.0
"""Tokens a second: 4,096 tokens in 98.8 - 8.6 ms (time to first token recomputed less resident),
vLLM 0.33, FLASH_ATTN, CUDA graphs, one request at a time, H200, 2026-11. The same run took 469 ms
for 16,384 tokens; `compute_s` says 433."""
REFERENCE = 4096
"""Tokens of a prompt at which a prefill speed is meant."""

LONGEST = 1 << 20
"""Tokens; a break-even beyond this is called never."""


class NoRates(TierMemError):
    """Neither a measured nor a given rate to load with."""


class Source(msgspec.Struct, frozen=True):
    """Where pages would be loaded from."""

    name: str
    gbps: float
    fixed_s: float
    """Time until the first page is there, paid once a prompt."""
    measured: str
    """Which measurement, or "given"."""


class Answer(msgspec.Struct, frozen=True):
    """One model and one source."""

    model: str
    source: str
    prefill_tps: float
    estimated: bool
    """The prefill speed was scaled from another model's, not measured or given."""
    gbps: float
    token_bytes: int
    """Of one rank, in the layers that keep the whole prompt."""
    tokens: int | None
    """The break-even; None when loading never wins."""
    speedup_8k: float
    """Time to compute 8,192 tokens over the time to load them."""


class Answers(msgspec.Struct, frozen=True, kw_only=True):
    """JSON schema tiermem.breakeven.v1."""

    schema: Literal["tiermem.breakeven.v1"] = "tiermem.breakeven.v1"
    ranks: int
    value_bytes: int
    sources: tuple[Source, ...]
    answers: tuple[Answer, ...]


def compute_s(shape: Model, prefill_tps: float, tokens: int) -> float:
    """Seconds to compute a prompt's cache."""
    share = shape.attention_share
    return tokens / prefill_tps * (1 + share * tokens) / (1 + share * REFERENCE)


def load_s(
    shape: Model, source: Source, tokens: int, ranks: int = 1, value_bytes: int = 2
) -> float:
    """Seconds to load a prompt's cache, every rank over a link of its own."""
    return source.fixed_s + shape.rank_bytes(tokens, ranks, value_bytes) / (source.gbps * 1e9)


def break_even(
    shape: Model, source: Source, prefill_tps: float, ranks: int = 1, value_bytes: int = 2
) -> int | None:
    """The fewest tokens from which on loading is faster than computing; None: never.

    Computing grows ever faster and loading does not, so the two cross once at most.
    """

    def wins(tokens: int) -> bool:
        return load_s(shape, source, tokens, ranks, value_bytes) < compute_s(
            shape, prefill_tps, tokens
        )

    if not wins(LONGEST):
        return None
    low, high = 0, LONGEST
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if wins(middle) else (middle, high)
    return high


def prefill_speed(shape: Model) -> float:
    """The measured speed of the 8B model, scaled by parameters per token: an estimate."""
    return MEASURED_TPS * models.MODELS[MEASURED_MODEL].active_billions / shape.active_billions


def sources(found: Result) -> tuple[Source, ...]:
    """The fastest plain way from host memory and from NVMe to the GPU in a result.

    Without a row from NVMe to the GPU, reading into host memory stands for it: the copy that
    follows overlaps with the reads and is the faster of the two.
    """
    plain = [
        row
        for row in found.rows
        if row.direction == "one-way" and not row.beside and row.work != "ceiling"
    ]
    wanted = {"host": [("host", "gpu")], "NVMe": [("nvme", "gpu"), ("nvme", "host")]}
    best: list[Source] = []
    for name, ends in wanted.items():
        for src, dst in ends:
            rows = [
                row
                for row in plain
                if row.gpus == 1 and (words.kind(row.src), words.kind(row.dst)) == (src, dst)
            ]
            if rows:
                best.append(_source(name, max(rows, key=lambda row: row.gbps.median)))
                break
    return tuple(best)


def _source(name: str, row: Row) -> Source:
    fixed = row.page_us.p50 / 1e6 if row.page_us else 0.0
    return Source(name, row.gbps.median, fixed, f"{words.title(row)}, {row.path}")


def answer(
    names: list[str],
    given: tuple[Source, ...],
    prefill_tps: float | None = None,
    ranks: int = 1,
    value_bytes: int = 2,
) -> Answers:
    """Every model with every source. prefill_tps: of all ranks together, for every model named."""
    found: list[Answer] = []
    for shape in [models.model(name) for name in names]:
        speed = prefill_tps or prefill_speed(shape)
        for source in given:
            load = load_s(shape, source, 8192, ranks, value_bytes)
            found.append(
                Answer(
                    model=shape.name,
                    source=source.name,
                    prefill_tps=speed,
                    estimated=prefill_tps is None and shape.name != MEASURED_MODEL,
                    gbps=source.gbps,
                    token_bytes=shape.token_bytes(value_bytes)
                    // (
                        shape.rank_bytes(1, 1, value_bytes)
                        // shape.rank_bytes(1, ranks, value_bytes)
                    ),
                    tokens=break_even(shape, source, speed, ranks, value_bytes),
                    speedup_8k=compute_s(shape, speed, 8192) / load,
                )
            )
    return Answers(ranks=ranks, value_bytes=value_bytes, sources=given, answers=tuple(found))


def draw(answers: Answers, name: str) -> str:
    """Time over prompt length for one model: computing and each source, with the crossings."""
    shape = models.model(name)
    own = [found for found in answers.answers if found.model == shape.name]
    lengths = [2**power for power in range(4, 18)]
    speed = own[0].prefill_tps
    lines = [chart.Curve("compute", tuple((n, compute_s(shape, speed, n) * 1e3) for n in lengths))]
    marks = []
    for source, found in zip(answers.sources, own, strict=True):
        times = [
            load_s(shape, source, n, answers.ranks, answers.value_bytes) * 1e3 for n in lengths
        ]
        lines.append(
            chart.Curve(f"load from {source.name}", tuple(zip(lengths, times, strict=True)))
        )
        if found.tokens and lengths[0] <= found.tokens <= lengths[-1]:
            text = f"{source.name}: {found.tokens:,} tokens"
            marks.append(
                chart.Mark(found.tokens, compute_s(shape, speed, found.tokens) * 1e3, text)
            )
    about = "estimated " if own[0].estimated else ""
    title = f"{shape.name}, {about}prefill {speed:,.0f} tokens/s"
    return chart.curves(title, "prompt tokens", "milliseconds", lines, marks)


def show(answers: Answers, console: Console) -> None:
    for source in answers.sources:
        console.print(f"{source.name}: {source.gbps:.2f} GB/s ({source.measured})", highlight=False)
    table = Table(title="From how many tokens on loading beats computing", title_justify="left")
    for name in ("model", "KV a token", "prefill tokens/s", "from", "tokens", "at 8,192 tokens"):
        table.add_column(name, justify="left" if name in ("model", "from") else "right")
    for found in answers.answers:
        speed = f"{'about ' if found.estimated else ''}{found.prefill_tps:,.0f}"
        tokens = "never" if found.tokens is None else f"{found.tokens:,}"
        table.add_row(
            found.model,
            format_bytes(found.token_bytes),
            speed,
            found.source,
            tokens,
            f"{found.speedup_8k:.1f} x faster" if found.speedup_8k >= 1 else "slower",
        )
    console.print(table)
    if any(found.estimated for found in answers.answers):
        console.print(
            f"about: the measured {MEASURED_TPS:,.0f} tokens/s of {MEASURED_MODEL} on one H200, "
            "scaled by parameters per token; give yours with --prefill",
            highlight=False,
        )


def command(
    measured: Annotated[Path | None, typer.Argument(help="Result of bench offload.")] = None,
    model: Annotated[list[str] | None, typer.Option(help="Repeat for more; default all.")] = None,
    prefill: Annotated[float | None, typer.Option(min=1, help="Tokens a second at 4,096.")] = None,
    host_gbps: Annotated[float | None, typer.Option(min=0.001, help="Instead of measured.")] = None,
    nvme_gbps: Annotated[float | None, typer.Option(min=0.001, help="Instead of measured.")] = None,
    ranks: Annotated[int, typer.Option(min=1, help="Tensor-parallel GPUs.")] = 1,
    value_bytes: Annotated[int, typer.Option(min=1, max=4, help="2 = bf16, 1 = fp8.")] = 2,
    json: Annotated[str | None, typer.Option(help="Write JSON to this path, or to - .")] = None,
    svg: Annotated[Path | None, typer.Option(help="Draw the first model into this file.")] = None,
) -> None:
    """From how many tokens on loading from host memory or NVMe beats computing again."""
    read = result.read(measured) if measured else None
    found = {source.name: source for source in sources(read)} if read else {}
    for name, rate in (("host", host_gbps), ("NVMe", nvme_gbps)):
        if rate is not None:
            found[name] = Source(name, rate, 0.0, "given")
    if not found:
        raise NoRates("no rates: name a result of `tiermem bench offload`, or give --host-gbps")
    answers = answer(
        model or list(models.MODELS), tuple(found.values()), prefill, ranks, value_bytes
    )
    if svg is not None:
        output.save(svg, draw(answers, answers.answers[0].model))
    if not output.emit(answers, json):
        show(answers, Console())
    if read is not None and read.device == "cpu":
        Console(stderr=True).print(
            "note: these rates are of the CPU device, which moves bytes within host memory: they "
            "say nothing about a GPU",
            style="yellow",
        )
