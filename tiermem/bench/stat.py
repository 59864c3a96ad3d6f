"""`tiermem stat`: one look at the metrics of a running space."""

from __future__ import annotations

import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Annotated, Literal

import msgspec
import typer
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console
from rich.table import Table

from tiermem.bench import output
from tiermem.config import load
from tiermem.errors import TierMemError
from tiermem.units import format_bytes

TIMEOUT_S = 5.0
TIERS = ("gpu", "host", "nvme")


class NoMetrics(TierMemError):
    """Nobody answers at the address, or not with metrics of tiermem."""


class Sample(msgspec.Struct, frozen=True):
    name: str
    labels: dict[str, str]
    value: float


class Look(msgspec.Struct, frozen=True, kw_only=True):
    """JSON schema tiermem.stat.v1; docs/metrics.md explains the names."""

    schema: Literal["tiermem.stat.v1"] = "tiermem.stat.v1"
    url: str
    samples: tuple[Sample, ...]

    def value(self, name: str, **labels: str) -> float:
        """Of the sample with this name and at least these labels; 0 where there is none."""
        return next((s.value for s in self.named(name) if labels.items() <= s.labels.items()), 0.0)

    def named(self, name: str) -> Iterator[Sample]:
        return (sample for sample in self.samples if sample.name == name)

    def label(self, name: str, wanted: str, **labels: str) -> str:
        """The label `wanted` of the first such sample."""
        found = (s.labels[wanted] for s in self.named(name) if labels.items() <= s.labels.items())
        return next(found, "")


def read(url: str) -> Look:
    """Scrape once; NoMetrics says who did not answer and what to do."""
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT_S) as answer:
            text = answer.read().decode()
        families = list(text_string_to_metric_families(text))
    except urllib.error.URLError as error:
        raise NoMetrics(
            f"nothing answers at {url} ({error.reason}); set metrics.port in the configuration of "
            "the engine, and give the same one here"
        ) from None
    except (OSError, ValueError) as error:
        raise NoMetrics(f"{url} does not answer with metrics: {error}") from None
    samples = tuple(
        Sample(sample.name, dict(sample.labels), float(sample.value))
        for family in families
        for sample in family.samples
        if sample.name.startswith("tiermem_")
    )
    if not samples:
        raise NoMetrics(f"{url} answers, but not for tiermem")
    return Look(url=url, samples=samples)


def show(look: Look, console: Console) -> None:
    """Tiers, routes, and what happened to pages."""
    for table in (_tiers(look), _routes(look), _events(look)):
        console.print(table, highlight=False)
    faults = look.value("tiermem_faults_total")
    p50, p99 = (look.value("tiermem_fault_wait_seconds", quantile=q) for q in ("0.5", "0.99"))
    console.print(
        f"{faults:,.0f} waits for pages, p50 {p50 * 1e6:,.0f} us, p99 {p99 * 1e6:,.0f} us",
        highlight=False,
    )


def _tiers(look: Look) -> Table:
    size = format_bytes(look.value("tiermem_page_bytes"))
    table = _table(
        f"Tiers, pages of {size}", "tier", "used", "kept", "free", "missing", "bytes used"
    )
    table.add_column("policy")
    table.add_column("")
    for tier in TIERS:
        slots = {
            state: look.value("tiermem_tier_slots", tier=tier, state=state)
            for state in ("used", "kept", "free", "missing")
        }
        if not sum(slots.values()):
            continue
        table.add_row(
            tier,
            *(f"{n:,.0f}" for n in slots.values()),
            format_bytes(look.value("tiermem_tier_bytes", tier=tier, state="used")),
            look.label("tiermem_tier_policy_info", "policy", tier=tier),
            "[red]FAILED[/]" if look.value("tiermem_tier_failed", tier=tier) else "",
        )
    return table


def _routes(look: Look) -> Table:
    table = _table("Routes", "from", "pages", "bytes", "GB/s while busy", "failed")
    table.add_column("path")
    for sample in look.named("tiermem_route_pages_total"):
        nbytes = look.value("tiermem_route_bytes_total", **sample.labels)
        busy = look.value("tiermem_route_busy_seconds_total", **sample.labels)
        table.add_row(
            f"{sample.labels['src']} to {sample.labels['dst']}",
            f"{sample.value:,.0f}",
            format_bytes(nbytes),
            f"{nbytes / busy / 1e9:.2f}" if busy else "-",
            f"{look.value('tiermem_route_failed_pages_total', **sample.labels):,.0f}",
            look.label("tiermem_route_path_info", "path", **sample.labels),
        )
    return table


def _events(look: Look) -> Table | str:
    """A sentence where there is nothing to list."""
    happened = [sample for sample in look.named("tiermem_events_total") if sample.value]
    if not happened:
        return "Nothing that is counted has happened to a page yet."
    table = _table("What happened to pages", "event", "pages")
    for sample in happened:
        table.add_row(sample.labels["event"], f"{sample.value:,.0f}")
    return table


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for i, name in enumerate(columns):
        table.add_column(name, justify="right" if i else "left")
    return table


def command(
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="Else metrics.port of the configuration.")
    ] = None,
    url: Annotated[str | None, typer.Option(help="Instead of a port on this machine.")] = None,
    json: Annotated[str | None, typer.Option(help="Write JSON to this path, or to - .")] = None,
) -> None:
    """Show a running space's figures once."""
    chosen = port or load().metrics.port
    if url is None and chosen is None:
        raise NoMetrics("which port? give --port, or set metrics.port (here and for the engine)")
    look = read(url or f"http://127.0.0.1:{chosen}/metrics")
    if not output.emit(look, json):
        show(look, Console())
