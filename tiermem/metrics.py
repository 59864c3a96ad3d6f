"""Prometheus metrics of one space over HTTP: off unless `metrics.port` is set, loopback only.

docs/metrics.md explains every name; a test compares it with what is sent. Nothing is counted here:
a scrape takes one `Space.statistics()` and names what it holds.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from wsgiref.simple_server import WSGIServer

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from tiermem.policies.base import ShadowReport
from tiermem.stats import (
    LeaseStatistics,
    PrefetchStatistics,
    RouteStatistics,
    Statistics,
    TierStatistics,
)

log = logging.getLogger(__name__)

LOOPBACK = "127.0.0.1"

Snapshot = Callable[[], Statistics]

EVENTS = {
    "faulted": "pages asked for that were not on the GPU, nor on their way to it",
    "shared_faults": "pages asked for while a load that others began was under way",
    "rescued": "pages asked for while they were leaving: the move was given up",
    "taken_back": "pages asked for after they had left, whose frame still held them: no load",
    "prefetched": "pages loaded on a hint or by the prefetch policy",
    "stolen": "frames taken from pages that had left but were still shown",
    "shown_in_place": "pages shown in host memory, to be read there",
    "read_in_place": "uses of pages that were read in host memory: no load",
    "failed_in_place": "pages that could not be shown in host memory, and were loaded instead",
    "stepped_down": "clean pages that left without a copy, for a lower tier had one",
    "late_spares": "pages wanted again while they left: what had been copied stays as a spare",
    "backed_up": "labelled pages copied to the drive ahead of need; they stayed where they were",
    "cleaned": "idle pages copied to host memory ahead of need; they stayed on the GPU",
    "host_host": "pages moved within host memory, which became smaller",
    "failed_copies": "pages whose copy failed; their bytes stayed where they were",
    "failed_reads": "pages that did not come back as written, or not at all",
    "lost": "pages whose only copy could not be read back; to be computed again",
    "outpaced": "times that a page was kept from the drive, for it was behind",
    "not_admitted": "times that a page was kept from the drive, for nvme.admit said no",
    "dropped": "pages forgotten, for their last tier was full",
    "shelved": "pages left on the drive under their keys when their region closed",
    "adopted": "pages whose bytes were found by their key instead of computed",
    "restored": "pages found on the drive when the space was opened",
    "peers_shown": "pages in host memory shown to the other engines of the pool by their keys",
    "peers_taken": "pages taken from another engine's host memory instead of computed",
    "peers_missed": "pages found there, and gone or other bytes when they were read: computed",
}
"""What `tiermem_events_total` counts, by its label; names that are new appear by themselves."""


class SpaceCollector(Collector):
    """Turns a snapshot into metric families whenever somebody scrapes."""

    def __init__(self, statistics: Snapshot) -> None:
        self._statistics = statistics

    def describe(self) -> list[Metric]:
        """Nothing is asked of the space before the first scrape."""
        return []

    def collect(self) -> Iterator[Metric]:
        now = self._statistics()
        yield GaugeMetricFamily("tiermem_page_bytes", "bytes of a page", now.page_bytes)
        yield GaugeMetricFamily("tiermem_region_pages", "pages in all regions", now.pages)
        yield from _tiers(now.tiers, now.page_bytes)
        yield from _routes(now.routes)
        yield _events(now)
        if now.lease is not None:
            yield from _lease(now.lease)
        if now.prefetch is not None:
            yield from _prefetch(now.prefetch)
        if now.shadow:
            yield from _shadow(now.shadow)
        yield CounterMetricFamily(
            "tiermem_faults", "calls of use() that had to wait for a page", now.fault.n
        )
        wait = GaugeMetricFamily(
            "tiermem_fault_wait_seconds", "wait of the last such calls", labels=["quantile"]
        )
        wait.add_metric(["0.5"], now.fault.p50_s)
        wait.add_metric(["0.99"], now.fault.p99_s)
        yield wait


def _tiers(tiers: tuple[TierStatistics, ...], page: int) -> Iterator[Metric]:
    labels = ["tier", "state"]
    slots = GaugeMetricFamily("tiermem_tier_slots", "slots by what they hold", labels=labels)
    nbytes = GaugeMetricFamily("tiermem_tier_bytes", "the same in bytes", labels=labels)
    failed = GaugeMetricFamily("tiermem_tier_failed", "1 = out of use", labels=["tier"])
    policy = GaugeMetricFamily(
        "tiermem_tier_policy_info", "which policy ranks the tier", labels=["tier", "policy"]
    )
    fallbacks = CounterMetricFamily(
        "tiermem_policy_fallbacks", "answers of the policy that could not be used", labels=["tier"]
    )
    late = CounterMetricFamily(
        "tiermem_policy_late", "answers of the policy that took too long", labels=["tier"]
    )
    for tier in tiers:
        name = tier.place.name.lower()
        states = {
            "used": tier.used,
            "kept": tier.kept,
            "free": tier.free,
            "missing": tier.configured - tier.capacity,
        }
        for state, n in states.items():
            slots.add_metric([name, state], n)
            nbytes.add_metric([name, state], n * page)
        failed.add_metric([name], float(tier.failed))
        policy.add_metric([name, tier.policy], 1)
        fallbacks.add_metric([name], tier.fallbacks)
        late.add_metric([name], tier.late)
    yield from (slots, nbytes, failed, policy, fallbacks, late)


def _routes(routes: tuple[RouteStatistics, ...]) -> Iterator[Metric]:
    labels = ["src", "dst"]
    pages = CounterMetricFamily("tiermem_route_pages", "pages that arrived", labels=labels)
    nbytes = CounterMetricFamily("tiermem_route_bytes", "the same in bytes", labels=labels)
    failed = CounterMetricFamily(
        "tiermem_route_failed_pages", "pages whose copy failed", labels=labels
    )
    busy = CounterMetricFamily(
        "tiermem_route_busy_seconds", "time with a copy under way", labels=labels
    )
    path = GaugeMetricFamily(
        "tiermem_route_path_info", "the way that is really taken", labels=[*labels, "path"]
    )
    for route in routes:
        ends = [route.src.name.lower(), route.dst.name.lower()]
        pages.add_metric(ends, route.pages)
        nbytes.add_metric(ends, route.nbytes)
        failed.add_metric(ends, route.failed)
        busy.add_metric(ends, route.busy_s)
        path.add_metric([*ends, route.path], 1)
    yield from (pages, nbytes, failed, busy, path)


def _lease(lease: LeaseStatistics) -> Iterator[Metric]:
    own = GaugeMetricFamily("tiermem_lease_bytes", "GPU bytes by lease", labels=["state"])
    for state in ("held", "reserved", "wanted", "share", "owed", "floor", "cap"):
        own.add_metric([state], getattr(lease, state))
    whole = GaugeMetricFamily("tiermem_ledger_bytes", "the same of all members", labels=["state"])
    for state, n in (("budget", lease.budget), ("held", lease.all_held), ("free", lease.free)):
        whole.add_metric([state], n)
    yield from (own, whole)
    yield GaugeMetricFamily("tiermem_ledger_members", "processes that share", lease.members)


def _prefetch(now: PrefetchStatistics) -> Iterator[Metric]:
    quality = now.quality
    yield GaugeMetricFamily("tiermem_prefetch_queued_requests", "requests that wait", now.queued)
    pages = CounterMetricFamily(
        "tiermem_prefetch_pages", "pages loaded ahead, by what became of them", labels=["fate"]
    )
    for fate in ("loaded", "used", "late", "wasted", "polluting"):
        pages.add_metric([fate], getattr(quality, fate))
    parts = GaugeMetricFamily(
        "tiermem_prefetch_quality", "how good prefetch was so far", labels=["measure"]
    )
    for measure in ("coverage", "accuracy", "timeliness", "pollution"):
        parts.add_metric([measure], getattr(quality, measure))
    nbytes = GaugeMetricFamily(
        "tiermem_prefetch_bytes", "loaded ahead: not used so far, and what may be", labels=["state"]
    )
    nbytes.add_metric(["waiting"], quality.waiting * quality.page_bytes)
    nbytes.add_metric(["budget"], now.budget)
    yield from (pages, parts, nbytes)
    yield CounterMetricFamily(
        "tiermem_prefetch_wasted_bytes", "loaded ahead and never used", quality.wasted_bytes
    )


def _shadow(reports: tuple[ShadowReport, ...]) -> Iterator[Metric]:
    labels = ["policy", "running"]
    units = CounterMetricFamily(
        "tiermem_shadow_units", "what policies on trial would have done", labels=[*labels, "what"]
    )
    written = CounterMetricFamily(
        "tiermem_shadow_written_bytes", "what they would have passed down", labels=labels
    )
    stall = GaugeMetricFamily(
        "tiermem_shadow_stall_seconds", "time to load what they would have missed", labels=labels
    )
    failed = GaugeMetricFamily("tiermem_shadow_failed", "1 = the trial ended", labels=labels)
    for report in reports:
        who = [report.policy, str(report.running).lower()]
        for what in ("accesses", "hits", "prefix_hits", "written"):
            units.add_metric([*who, what], getattr(report, what))
        written.add_metric(who, report.written_bytes)
        stall.add_metric(who, report.stall_s)
        failed.add_metric(who, float(bool(report.failed)))
    yield from (units, written, stall, failed)


def _events(now: Statistics) -> Metric:
    events = CounterMetricFamily(
        "tiermem_events", "what happened to pages; docs/metrics.md", labels=["event"]
    )
    arrivals = {f"{r.src.name}_{r.dst.name}".lower() for r in now.routes}
    for name in dict.fromkeys([*EVENTS, *sorted(now.counts)]):
        if name not in arrivals:  # those are tiermem_route_pages_total
            events.add_metric([name], now.counts.get(name, 0))
    return events


class Endpoint:
    """Serves a space's metrics at http://127.0.0.1:port/metrics until it is closed."""

    def __init__(self, statistics: Snapshot, port: int) -> None:
        """port: 0 takes a free one. Raises OSError when the port is taken."""
        registry = CollectorRegistry()
        registry.register(SpaceCollector(statistics))
        self._server: WSGIServer
        self._thread: threading.Thread
        self._server, self._thread = start_http_server(port, addr=LOOPBACK, registry=registry)
        self.port: int = self._server.server_port
        self._closed = False

    @property
    def url(self) -> str:
        return f"http://{LOOPBACK}:{self.port}/metrics"

    def close(self) -> None:
        """Answer what is being asked, then stop listening; twice is fine."""
        if self._closed:
            return
        self._closed = True
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


def serve(statistics: Snapshot, port: int) -> Endpoint | None:
    """An endpoint; None, with a warning, when the port is taken: serving goes before watching.

    Ranks of one engine share a configuration, and only the first of them gets its port.
    """
    try:
        endpoint = Endpoint(statistics, port)
    except OSError as error:
        log.warning(
            "metrics off port=%d reason=%s; give each process a metrics.port of its own",
            port,
            error.strerror,
        )
        return None
    log.info("metrics at %s", endpoint.url)
    return endpoint
