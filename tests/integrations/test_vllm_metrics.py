"""vLLM's metrics page: documented names, gauges and counters from snapshots of totals."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge

from tests.directed_ranks import Ranks
from tiermem.integrations.vllm_metrics import EVERY_S, METRICS, PREFIX, Page, Told, snapshot

DOCS = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text()
COUNTS = {"waited": 3, "recomputed": 1, "given_up": 0, "adopted": 0, "stalled": 2}


@pytest.fixture
def samples() -> Iterator[dict[str, float]]:
    """Of two ranks, after units have been to the host and back."""
    ranks = Ranks(budget=4, host=6)
    for unit in range(1, 6):
        ranks.ensure(1)
        ranks.write(unit)
        ranks.leave(unit)
    ranks.settle()
    ranks.bring(1)
    yield snapshot(ranks.director, ranks.layout, COUNTS)
    ranks.close()


def page(registry: CollectorRegistry) -> Page:
    gauge, counter = partial(Gauge, registry=registry), partial(Counter, registry=registry)
    return Page(gauge, counter, ["model", "engine"], {0: ["m", "0"], 1: ["m", "1"]})


def value(registry: CollectorRegistry, name: str, engine: str = "0", **labels: str) -> float | None:
    return registry.get_sample_value(PREFIX + name, {"model": "m", "engine": engine, **labels})


def test_a_page_shows_where_blocks_are_and_what_has_moved(samples: dict[str, float]) -> None:
    registry = CollectorRegistry()
    page(registry).show(samples, 0)
    gpu, host = (value(registry, "blocks", place=p) for p in ("gpu", "host"))
    assert gpu is not None
    assert host is not None
    assert gpu + host == 6, "five, and block 0"
    assert value(registry, "blocks_in_use") == 2
    assert value(registry, "budget_blocks") == 4
    down = value(registry, "route_pages_total", src="gpu", dst="host")
    assert down
    assert value(registry, "route_bytes_total", src="gpu", dst="host") == down * 4096
    assert value(registry, "route_pages_total", src="host", dst="gpu") == 2, "one page, two ranks"
    assert value(registry, "requests_total", event="waited") == 3


def test_counters_grow_by_what_is_new_and_engines_are_apart() -> None:
    registry = CollectorRegistry()
    shown = page(registry)
    for total in (5, 5, 9):
        shown.show({"requests event=waited": total, "blocks_in_use": total}, 0)
    shown.show({"requests event=waited": 1}, 1)
    assert value(registry, "requests_total", event="waited") == 9
    assert value(registry, "requests_total", "1", event="waited") == 1
    assert value(registry, "blocks_in_use") == 9


def test_an_engine_that_begins_anew_takes_nothing_back() -> None:
    registry = CollectorRegistry()
    shown = page(registry)
    for total in (5, 2, 3):
        shown.show({"requests event=waited": total}, 0)
    assert value(registry, "requests_total", event="waited") == 6


def test_the_documented_names_are_those_that_are_sent(samples: dict[str, float]) -> None:
    registry = CollectorRegistry()
    page(registry).show(samples, 0)
    sent = {
        sample.name
        for family in registry.collect()
        for sample in family.samples
        if not sample.name.endswith("_created")
    }
    table = DOCS[DOCS.index("\n| vLLM |") :].split("\n\n")[0]
    assert sent == set(re.findall(r"^\| `([a-z_:]+)` \|", table, re.MULTILINE))
    assert len(sent) == len(METRICS)


def test_the_documented_events_of_requests_are_those_that_are_counted() -> None:
    table = DOCS[DOCS.index("\n| vLLM `event` |") :].split("\n\n")[0]
    assert set(re.findall(r"^\| `([a-z_]+)` \|", table, re.MULTILINE)) == set(COUNTS)


def test_the_page_is_told_now_and_then_and_at_once_when_a_request_has_ended() -> None:
    told = Told()
    assert told.is_time(10.0)
    assert not told.is_time(10.0 + EVERY_S / 2)
    told.is_due = True
    assert told.is_time(10.0 + EVERY_S / 2)
    assert not told.is_time(10.0 + EVERY_S)
    assert told.is_time(10.0 + 2 * EVERY_S)
