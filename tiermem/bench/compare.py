"""`tiermem compare`: two results pair by pair, with confidence intervals and a verdict in words."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Annotated, Literal

import msgspec
import numpy as np
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tiermem.bench import chart, output, result, words
from tiermem.bench.judge import LEVEL, Compared, Pair, judge, resample, sentence
from tiermem.bench.result import Result, Row
from tiermem.errors import TierMemError
from tiermem.units import format_exactly

WIDTH = 120
"""Columns of the table where there is no terminal."""


class BadComparison(TierMemError):
    """Two results that cannot be compared; the message has the reason."""


class Comparison(msgspec.Struct, frozen=True, kw_only=True):
    """JSON schema tiermem.compare.v1."""

    schema: Literal["tiermem.compare.v1"] = "tiermem.compare.v1"
    a: str
    b: str
    seed: int
    pairs: tuple[Compared, ...]
    kinds: tuple[Compared, ...]
    """The pairs summed up by what they do: loads from host, disk writes, ..."""
    notes: tuple[str, ...]


def compare(a: Result, b: Result, names: tuple[str, str] = ("A", "B"), seed: int = 0) -> Comparison:
    """Pair the rows and judge each pair; BadComparison when the two have nothing to compare."""
    _refuse(a, b, names)
    matched, lonely = match(a.rows, b.rows)
    if not matched:
        raise BadComparison(
            f"no row of {names[0]} has a partner in {names[1]}: "
            f"{_routes(a.rows)} against {_routes(b.rows)}"
        )
    rng = np.random.default_rng(seed)
    pairs = [Pair(x, y, resample(x, y, rng)) for x, y in matched]
    kinds: dict[str, list[Pair]] = defaultdict(list)
    for pair in pairs:
        more = words.conditions(pair.a)
        kinds[words.verb(pair.a) + (f", {more}" if more else "")].append(pair)
    return Comparison(
        a=names[0],
        b=names[1],
        seed=seed,
        pairs=tuple(judge([pair], _title(pair)) for pair in pairs),
        kinds=tuple(judge(group, what) for what, group in kinds.items()),
        notes=tuple(_notes(a, b, names, lonely)),
    )


def _refuse(a: Result, b: Result, names: tuple[str, str]) -> None:
    if a == b:
        raise BadComparison(f"{names[0]} and {names[1]} are the same run")
    if a.device != b.device:
        raise BadComparison(
            f"{names[0]} ran on device {a.device}, {names[1]} on {b.device}: the emulated device "
            "moves bytes within host memory and says nothing about a GPU"
        )
    for found, name in ((a, names[0]), (b, names[1])):
        if not found.rows:
            raise BadComparison(f"{name} has no rows")


def _routes(rows: Sequence[Row]) -> str:
    return "/".join(sorted({row.route for row in rows}))


# Pairs ---------------------------------------------------------------------------------------


def match(a: Sequence[Row], b: Sequence[Row]) -> tuple[list[tuple[Row, Row]], int]:
    """Rows of equal names; then those left whose ends differ only in which one (another drive,
    another GPU); and if there are none at all, those that differ in page size and group only.

    Returns the pairs in A's order and how many rows of both found no partner.
    """
    pairs, a_left, b_left = _join(a, b, result.key)
    more, a_left, b_left = _join(a_left, b_left, _kinds)
    pairs += more
    if not pairs:
        pairs, a_left, b_left = _join(a, b, _sizes_apart)
    order = {result.key(row): i for i, row in enumerate(a)}
    pairs.sort(key=lambda pair: order[result.key(pair[0])])
    return pairs, len(a_left) + len(b_left)


def _kinds(row: Row) -> Hashable:
    route, src, dst, *rest = result.key(row)
    return (route, words.kind(src), words.kind(dst), *rest)


def _sizes_apart(row: Row) -> Hashable:
    ends = (words.kind(row.src), words.kind(row.dst))
    return (row.route, *ends, row.direction, row.gpus, row.beside, row.work)


def _join(
    a: Sequence[Row], b: Sequence[Row], name: Callable[[Row], Hashable]
) -> tuple[list[tuple[Row, Row]], list[Row], list[Row]]:
    """Pairs of rows whose name is unique on both sides; the rest of A and of B."""
    sides: tuple[dict[Hashable, list[Row]], ...] = (defaultdict(list), defaultdict(list))
    for side, rows in zip(sides, (a, b), strict=True):
        for row in rows:
            side[name(row)].append(row)
    both = [key for key in sides[0] if len(sides[0][key]) == 1 == len(sides[1].get(key, ()))]
    taken = set(both)
    left = [[row for row in rows if name(row) not in taken] for rows in (a, b)]
    return [(sides[0][key][0], sides[1][key][0]) for key in both], left[0], left[1]


def _title(pair: Pair) -> str:
    if pair.a.page_bytes == pair.b.page_bytes:
        return words.title(pair.a)
    return f"{words.title(pair.a)} / {format_exactly(pair.b.page_bytes)} x {pair.b.group}"


def _notes(a: Result, b: Result, names: tuple[str, str], lonely: int) -> list[str]:
    notes = []
    for found, name in ((a, names[0]), (b, names[1])):
        if not found.complete:
            notes.append(f"{name} was interrupted: some rows are missing")
    if lonely:
        notes.append(f"{lonely} rows have no partner and were left out")
    x, y = msgspec.structs.asdict(a.machine), msgspec.structs.asdict(b.machine)
    differ = [f"{field} {x[field]} / {y[field]}" for field in x if x[field] != y[field]]
    if differ:
        notes.append("machines differ: " + "; ".join(differ))
    return notes


# Command -------------------------------------------------------------------------------------


def draw(comparison: Comparison, a: Result, b: Result, most: int = 14) -> str:
    """Bars of A and B with p5 to p95, the largest differences first when there are many."""
    matched, _ = match(a.rows, b.rows)
    rows = list(zip(comparison.pairs, matched, strict=True))
    if len(rows) > most:
        rows = sorted(rows, key=lambda row: -abs(np.log(row[0].ratio)))[:most]
    groups = [
        chart.Group(compared.what, tuple(_bar(row) for row in pair)) for compared, pair in rows
    ]
    few = f", the {most} largest differences" if len(comparison.pairs) > most else ""
    title = f"{comparison.a} and {comparison.b}{few}"
    return chart.bars(title, "GB/s, median, p5 to p95", (comparison.a, comparison.b), groups)


def _bar(row: Row) -> chart.Bar:
    hint = f"{row.src} to {row.dst}: {row.gbps.median:.2f} GB/s, n={row.gbps.n}, {row.path}"
    return chart.Bar(row.gbps.median, row.gbps.p5, row.gbps.p95, hint)


def show(comparison: Comparison, console: Console) -> None:
    title = escape(f"A = {comparison.a}, B = {comparison.b}")
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    table.add_column("what", overflow="fold")
    for name in ("A GB/s", "B GB/s", "B/A", f"{LEVEL} %", "p99", "verdict"):
        table.add_column(name, justify="right" if name != "verdict" else "left", no_wrap=True)
    styles = {"faster": "green", "slower": "red", "not certain": "yellow"}
    for c in comparison.pairs:
        interval = "-" if c.verdict == "too few rounds" else f"{c.low:.2f} - {c.high:.2f}"
        p99 = "-" if c.p99_ratio is None else f"x {c.p99_ratio:.2f}"
        rates = (f"{c.a_gbps:.2f}", f"{c.b_gbps:.2f}", f"{c.ratio:.2f}")
        style = styles.get(c.verdict, "none")
        table.add_row(c.what, *rates, interval, p99, f"[{style}]{c.verdict}[/]")
    console.print(table)
    for kind in comparison.kinds:
        console.print(f"B: {sentence(kind)}", highlight=False, markup=False)
    for note in comparison.notes:
        console.print(f"note: {note}", style="yellow", highlight=False, markup=False)


def command(
    a: Annotated[Path, typer.Argument(help="Result of bench offload.")],
    b: Annotated[Path, typer.Argument(help="Another one, compared with the first.")],
    json: Annotated[str | None, typer.Option(help="Write JSON to this path, or to - .")] = None,
    svg: Annotated[Path | None, typer.Option(help="Draw a bar chart into this file.")] = None,
    seed: Annotated[int, typer.Option(help="Of the bootstrap.")] = 0,
) -> None:
    """Compare two machines, slots or settings, pair by pair, with a verdict in words."""
    first, second = result.read(a), result.read(b)
    names = (a.stem, b.stem) if a.stem != b.stem else (str(a), str(b))
    comparison = compare(first, second, names, seed)
    if svg is not None:
        output.save(svg, draw(comparison, first, second))
    if not output.emit(comparison, json):
        console = Console()
        show(comparison, console if console.is_terminal else Console(width=WIDTH))
