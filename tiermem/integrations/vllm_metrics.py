"""What vLLM's own metrics page says of tiermem: a snapshot of totals, and the names that it gets.

The scheduler's side takes a snapshot now and then; it crosses to the front-end as plain numbers by
name and labels ("blocks place=gpu"). docs/metrics.md explains every name, and a test compares.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tiermem.directed.director import Director
from tiermem.integrations.layout import Layout
from tiermem.tier import TIERS

PREFIX = "vllm:tiermem_"
"""vLLM takes what begins so off its registry when it makes another engine."""
EVERY_S = 0.25
"""A snapshot costs tens of microseconds."""


@dataclass(frozen=True, slots=True)
class Metric:
    """One family. labels: of a sample, beside those that vLLM gives all its metrics."""

    name: str
    what: str
    labels: tuple[str, ...] = ()
    counts: bool = False


METRICS = (
    Metric("blocks", "blocks by where their newest bytes are", ("place",)),
    Metric("blocks_in_use", "blocks that requests hold, which are on the GPU"),
    Metric("budget_blocks", "blocks that may be on the GPU at a time"),
    Metric("route_pages", "pages that arrived, of all ranks", ("src", "dst"), True),
    Metric("route_bytes", "bytes that arrived, of all ranks", ("src", "dst"), True),
    Metric("route_busy_seconds", "time with a copy under way, of all ranks", ("src", "dst"), True),
    Metric("requests", "what was done for requests", ("event",), True),
    Metric("events", "pages, by what happened to them", ("event",), True),
)


@dataclass
class Told:
    """When the page was told last. is_due: there is something that it should hear at once."""

    is_due: bool = True
    last_s: float = 0.0

    def is_time(self, now_s: float) -> bool:
        """Whether to tell it now; if so, that counts as done."""
        if not self.is_due and now_s - self.last_s < EVERY_S:
            return False
        self.is_due, self.last_s = False, now_s
        return True


def snapshot(director: Director, layout: Layout, counts: Mapping[str, int]) -> dict[str, float]:
    """All samples, by name and labels. counts: of the scheduler's side."""
    blocks = layout.blocks_per_unit
    residence = director.residence()
    found: dict[str, float] = {
        f"blocks place={place.name.lower()}": residence[place] * blocks for place in TIERS
    }
    found["blocks_in_use"] = director.units_in_use() * blocks
    found["budget_blocks"] = director.budget * blocks
    for (src, dst), moved in director.moved().items():
        route = f"src={src.name.lower()} dst={dst.name.lower()}"
        found[f"route_pages {route}"] = moved.pages
        found[f"route_bytes {route}"] = moved.pages * director.page_bytes
        found[f"route_busy_seconds {route}"] = moved.busy_s
    found |= {f"requests event={name}": n for name, n in counts.items()}
    found |= {f"events event={name}": n for name, n in director.events().items()}
    return found


class Page:
    """Puts snapshots on a page: gauges are set, counters raised by what is new."""

    def __init__(
        self,
        gauge: Any,
        counter: Any,
        labels: Sequence[str],
        engines: Mapping[int, Sequence[object]],
    ) -> None:
        """gauge, counter: prometheus_client's classes, or such as stand for them. labels: that
        every metric has; engines: their values by engine."""
        self._engines = engines
        self._labels = tuple(labels)
        self._metrics = {m.name: m for m in METRICS}
        self._made = {
            m.name: (counter if m.counts else gauge)(
                name=PREFIX + m.name,
                documentation=f"tiermem: {m.what}",
                labelnames=[*labels, *m.labels],
            )
            for m in METRICS
        }
        self._last: dict[tuple[int, str], float] = {}

    def show(self, samples: Mapping[str, float], engine: int) -> None:
        for sample, value in samples.items():
            name, *given = sample.split(" ")
            values = [one.partition("=")[2] for one in given]
            made = self._made[name].labels(*self._engines[engine], *values)
            if self._metrics[name].counts:
                last = self._last.get((engine, sample), 0.0)
                made.inc(max(0.0, value - last))
                self._last[engine, sample] = value
            else:
                made.set(value)
