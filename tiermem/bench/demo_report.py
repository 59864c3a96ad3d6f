"""What the demo reports: JSON of schema `tiermem.demo.v1`, tables, and pictures of residence."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Literal

import msgspec
from rich.console import Console
from rich.table import Table

from tiermem.bench.machine import Machine
from tiermem.bench.output import NotWritten
from tiermem.errors import ConfigError
from tiermem.stats import Statistics
from tiermem.tier import TIERS, Place
from tiermem.units import format_bytes

NAMES = {place: place.name.lower() for place in TIERS}
COLORS = {"gpu": "green", "host": "yellow", "nvme": "blue"}
PLOTTED = {"gpu": "tab:green", "host": "tab:orange", "nvme": "tab:blue"}
COLUMNS = 56
LEVELS = " ▁▂▃▄▅▆▇█"
ASCII_LEVELS = " .:-=+*#@"


class Route(msgspec.Struct, frozen=True):
    """One direction between two tiers. gbps: 10^9 bytes a second while a copy was under way."""

    src: str
    dst: str
    pages: int
    bytes: int
    gbps: float
    path: str
    """The way that the bytes really took, in words."""
    why_none: str | None = None
    """Why nothing was moved; None where something was."""


class Fault(msgspec.Struct, frozen=True):
    """Waits of requests for pages that were not on the GPU; percentiles in microseconds."""

    n: int
    p50_us: float
    p99_us: float


class Sample(msgspec.Struct, frozen=True):
    """One moment: what each tier holds, in pages, and the prefix hits up to here by tier."""

    requests: int
    seconds: float
    accesses: int
    held: dict[str, int]
    prefix_hits: dict[str, int]


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """One run of the demo; docs/benchmarks.md explains the fields."""

    schema: Literal["tiermem.demo.v1"] = "tiermem.demo.v1"
    complete: bool
    """False when the run was interrupted; the figures then cover what was replayed."""
    machine: Machine
    device: str
    trace: str
    page_bytes: int
    policy: dict[str, str]
    hints: bool
    capacity: dict[str, int]
    """Bytes that each tier may hold; 0 = off."""
    requests: int
    requests_given: int
    accesses: int
    distinct: int
    hits: int
    prefix_hits: dict[str, int]
    pages_stored: int
    pages_verified: int
    pages_wrong: int
    first_wrong: tuple[str, ...]
    pages_lost: int
    blocks_not_stored: int
    """Blocks that found no room; they are misses when they are asked for again."""
    pages_dropped: int
    routes: tuple[Route, ...]
    fault: Fault
    held: dict[str, int]
    """Bytes in each tier at the end."""
    residence: tuple[Sample, ...]
    seconds: float
    counts: dict[str, int]
    """How often each arc of the page table's state drawing was taken."""
    notes: tuple[str, ...] = ()


def routes_of(statistics: Statistics, hints: bool) -> tuple[Route, ...]:
    """All six directions, with a reason for each that took no bytes."""
    known = {(r.src, r.dst): r for r in statistics.routes}
    found = []
    for src in TIERS:
        for dst in TIERS:
            if src == dst:
                continue
            route = known.get((src, dst))
            pages, nbytes = (route.pages, route.nbytes) if route else (0, 0)
            found.append(
                Route(
                    NAMES[src],
                    NAMES[dst],
                    pages,
                    nbytes,
                    route.gbps if route else 0.0,
                    route.path if route else "",
                    None if pages else _why_none(src, dst, statistics, route is not None, hints),
                )
            )
    return tuple(found)


def _why_none(src: Place, dst: Place, statistics: Statistics, exists: bool, hints: bool) -> str:
    for place in (src, dst):
        if not statistics.tier(place).configured:
            return f"the {NAMES[place]} tier is off"
    if not exists:
        return "this device has no direct route; bytes go through host memory"
    match src, dst:
        case Place.GPU, Place.HOST:
            return "the GPU tier never needed room"
        case Place.GPU, Place.NVME:
            return "the host tier had room for every page that left the GPU"
        case Place.HOST, Place.NVME:
            return "the host tier never needed room"
        case Place.NVME, Place.HOST if not hints:
            return "pages are staged in host memory on a hint only, and hints are off"
        case Place.NVME, Place.HOST:
            return "no hinted page was on NVMe while the GPU was full and the host had room"
        case _:
            return f"no block was asked for while it was in the {NAMES[src]} tier"


def show(report: Report, console: Console) -> None:
    """The tables and the picture."""
    _show_summary(report, console)
    _show_routes(report, console)
    _show_picture(report, console)
    for note in (*report.first_wrong, *report.notes):
        console.print(f"note: {note}", style="yellow", highlight=False, markup=False)


def _show_summary(report: Report, console: Console) -> None:
    table = Table(title=_title(report), title_justify="left", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    prefix = sum(report.prefix_hits.values())
    table.add_row("requests", _of(report.requests, report.requests_given))
    table.add_row("block accesses, distinct blocks", f"{report.accesses:,}, {report.distinct:,}")
    table.add_row("prefix hits", f"{prefix:,} ({_percent(prefix, report.accesses)})")
    for name, hits in report.prefix_hits.items():
        if report.capacity[name]:
            table.add_row(f"  found in {name}", f"{hits:,} ({_percent(hits, report.accesses)})")
    fault = report.fault
    waits = f"{fault.n:,}: {fault.p50_us:,.0f} / {fault.p99_us:,.0f} us" if fault.n else "none"
    table.add_row("waits for pages, p50 / p99", waits)
    for name, capacity in report.capacity.items():
        if capacity:
            held = f"{format_bytes(report.held[name])} of {format_bytes(capacity)}"
            table.add_row(f"held by {name} ({report.policy[name]})", held)
    table.add_row("blocks without room", f"{report.blocks_not_stored:,}")
    table.add_row("time", f"{report.seconds:.1f} s")
    table.add_row("pages verified", f"{report.pages_verified:,}")
    style = "bold red" if report.pages_wrong else "bold green"
    table.add_row("pages wrong", f"{report.pages_wrong:,}", style=style)
    console.print(table, highlight=False)


def _show_routes(report: Report, console: Console) -> None:
    table = Table(title="Bytes between the tiers", title_justify="left")
    for name in ("from", "to", "pages", "bytes", "GB/s", "by"):
        table.add_column(name, justify="right" if name in ("pages", "bytes", "GB/s") else "left")
    for route in report.routes:
        if route.pages:
            table.add_row(
                route.src,
                route.dst,
                f"{route.pages:,}",
                format_bytes(route.bytes),
                f"{route.gbps:.2f}",
                route.path,
            )
        else:
            table.add_row(route.src, route.dst, "0", "", "", route.why_none, style="dim")
    console.print(table, highlight=False)


def _show_picture(report: Report, console: Console) -> None:
    """Each tier's bytes over time, and the share of accesses that it served meanwhile."""
    samples = report.residence
    if len(samples) < 2:
        return
    levels = LEVELS if console.encoding.lower().startswith("utf") else ASCII_LEVELS
    columns = _columns(samples)
    console.print(f"Residence over {samples[-1].requests:,} requests", style="italic")
    for name, capacity in report.capacity.items():
        if capacity:
            most = capacity // report.page_bytes
            line = _spark([s.held[name] / most for s in columns], levels)
            console.print(
                f"{name:>5} {line} of {format_bytes(capacity)}", style=COLORS[name], highlight=False
            )
    console.print(
        "Prefix hits by the tier they came from, in parts of all accesses", style="italic"
    )
    for name, capacity in report.capacity.items():
        if capacity:
            shares = _shares(columns, name)
            top = max(*shares, 1e-9)
            line = _spark([share / top for share in shares], levels)
            console.print(f"{name:>5} {line} up to {top:.0%}", style=COLORS[name], highlight=False)


def _columns(samples: Sequence[Sample]) -> list[Sample]:
    """At most COLUMNS samples, evenly chosen, always with the first and the last."""
    n = min(len(samples), COLUMNS)
    return [samples[round(i * (len(samples) - 1) / (n - 1))] for i in range(n)]


def _shares(samples: Sequence[Sample], name: str) -> list[float]:
    """Between each two samples: the part of the accesses that this tier's prefix hits served."""
    shares = [0.0]
    for before, after in pairwise(samples):
        hits = after.prefix_hits[name] - before.prefix_hits[name]
        shares.append(hits / max(1, after.accesses - before.accesses))
    return shares


def _spark(parts: Sequence[float], levels: str) -> str:
    top = len(levels) - 1
    return "".join(levels[min(top, max(0, round(part * top)))] for part in parts)


def require_plot(wanted: Path | None) -> None:
    """Refuse a wish for a picture before the work is done, not after."""
    if wanted is None:
        return
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ConfigError("--plot needs matplotlib: pip install 'tiermem[plot]'") from None


def plot(report: Report, path: Path) -> None:
    """Bytes by tier and hits by tier over time, in the format that the name's ending says."""
    from matplotlib.figure import Figure

    samples = report.residence
    seconds = [sample.seconds for sample in samples]
    names = [name for name, capacity in report.capacity.items() if capacity]
    colors = [PLOTTED[name] for name in names]
    figure = Figure(figsize=(9, 7), layout="constrained")
    held, hits = figure.subplots(2, 1, sharex=True)
    gib = report.page_bytes / 2**30
    held.stackplot(
        seconds, [[s.held[name] * gib for s in samples] for name in names], labels=names,
        colors=colors,
    )  # fmt: skip
    held.set_ylabel("GiB held")
    held.legend(loc="upper left")
    held.set_title(_title(report))
    hits.stackplot(seconds, [_shares(samples, name) for name in names], colors=colors)
    hits.set_ylabel("prefix hits / accesses")
    hits.set_ylim(0, 1)
    hits.set_xlabel("seconds")
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:
        raise NotWritten(f"{path} cannot be written: {error}") from None


def _title(report: Report) -> str:
    page = format_bytes(report.page_bytes)
    return f"{report.trace} on {report.device}, pages of {page}"


def _of(n: int, given: int) -> str:
    return f"{n:,}" if n == given else f"{n:,} of {given:,} (interrupted)"


def _percent(n: int, of: int) -> str:
    return f"{100 * n / max(of, 1):.1f} %"
