"""The Prometheus endpoint: documented names, values of the statistics, closed with the space."""

from __future__ import annotations

import ast
import dataclasses
import json
import logging
import re
import socket
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest
from rich.console import Console

from tiermem import cli
from tiermem.bench import stat
from tiermem.config import Config, Gpu, Host, Metrics, Prefetch, Shadow
from tiermem.metrics import EVENTS, LOOPBACK, Endpoint, SpaceCollector
from tiermem.policies.base import PrefetchQuality
from tiermem.space import Space
from tiermem.stats import PrefetchStatistics, Statistics
from tiermem.tier import GPU, HOST

ROOT = Path(__file__).parents[1]
DOCS = (ROOT / "docs" / "metrics.md").read_text()
PAGE = 64 << 10
SMALL = Config(gpu=Gpu(device="cpu", budget=16 * PAGE, page=PAGE), host=Host(capacity=64 * PAGE))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def busy_space() -> Iterator[Space]:
    """A space whose pages have been to the host and back."""
    with Space.open(SMALL) as space, space.reserve(32 * PAGE) as region:
        pages = region.allocate(16)
        with region.use(pages, "write"):
            pass
        region.hint(pages, "cold")
        space.drain()
        more = region.allocate(8)
        with region.use(more, "write"), region.use(pages[:4], "read"):
            pass
        space.drain()
        yield space


def documented(column: str) -> set[str]:
    """The first column of the table whose heading starts so."""
    table = DOCS[DOCS.index(f"\n| {column} |") + 1 :].split("\n\n")[0]
    return set(re.findall(r"^\| `([a-z_]+)` \|", table.partition("\n")[2], re.MULTILINE))


def test_the_documented_names_are_those_that_are_sent(busy_space: Space) -> None:
    sent = {
        sample.name
        for family in SpaceCollector(busy_space.statistics).collect()
        for sample in family.samples
    }
    assert sent == documented("name")


def test_the_documented_events_are_those_that_the_planner_counts() -> None:
    """Every `counts["name"] += n` in the package has its line in EVENTS and in the document."""
    counted = set()
    for file in (ROOT / "tiermem").glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if (
                isinstance(node, ast.AugAssign)
                and isinstance(node.target, ast.Subscript)
                and ast.unparse(node.target.value) == "self.counts"
                and isinstance(node.target.slice, ast.Constant)
            ):
                counted.add(node.target.slice.value)
    assert "faulted" in counted
    assert counted - set(EVENTS) == set(), "name them in metrics.EVENTS and docs/metrics.md"
    assert documented("`event`") == set(EVENTS)


def test_types_and_labels_are_as_documented(busy_space: Space) -> None:
    rows = re.findall(r"^\| `(tiermem_\w+)` \| (\w+) \|([^|]*)\|", DOCS, re.MULTILINE)
    told = {name: (kind, set(re.findall(r"`(\w+)`", labels))) for name, kind, labels in rows}
    for family in SpaceCollector(busy_space.statistics).collect():
        for sample in family.samples:
            assert (family.type, set(sample.labels)) == told[sample.name]


def test_values_are_those_of_the_statistics(busy_space: Space) -> None:
    now = busy_space.statistics()
    endpoint = Endpoint(lambda: now, 0)
    try:
        look = stat.read(endpoint.url)
    finally:
        endpoint.close()
    gpu, host = now.tier(GPU), now.tier(HOST)
    slots = {s: look.value("tiermem_tier_slots", tier="gpu", state=s) for s in ("used", "kept")}
    assert slots == {"used": gpu.used, "kept": gpu.kept}
    used = look.value("tiermem_tier_bytes", tier="host", state="used")
    assert used == host.used * PAGE
    down = next(r for r in now.routes if (r.src, r.dst) == (GPU, HOST))
    assert down.pages >= 8  # 24 pages on 16 frames
    assert look.value("tiermem_route_pages_total", src="gpu", dst="host") == down.pages
    assert look.value("tiermem_route_bytes_total", src="gpu", dst="host") == down.pages * PAGE
    assert look.value("tiermem_route_busy_seconds_total", src="gpu", dst="host") > 0
    assert look.label("tiermem_route_path_info", "path", src="gpu", dst="host") == "memory copy"
    events = {s.labels["event"]: s.value for s in look.named("tiermem_events_total")}
    assert {name: n for name, n in events.items() if n} == {
        name: n for name, n in now.counts.items() if n and name in EVENTS
    }
    assert look.value("tiermem_faults_total") == now.fault.n


def test_the_quality_of_prefetch_is_sent_as_it_is_documented() -> None:
    with Space.open(msgspec.structs.replace(SMALL, prefetch=Prefetch(name="queue"))) as space:
        now = space.statistics()
    good = PrefetchQuality(
        needed=10, loaded=8, used=5, late=1, wasted=1, waiting=2, polluting=2, page_bytes=PAGE
    )
    prefetch = PrefetchStatistics("queue", 3, 9 * PAGE, 0, good)
    families = SpaceCollector(lambda: dataclasses.replace(now, prefetch=prefetch)).collect()
    ours = [s for f in families for s in f.samples if s.name.startswith("tiermem_prefetch")]
    assert {s.name for s in ours} == documented("prefetch")
    told = {(s.name, *s.labels.values()): s.value for s in ours}
    assert told["tiermem_prefetch_queued_requests",] == 3
    assert told["tiermem_prefetch_pages_total", "used"] == 5
    assert told["tiermem_prefetch_quality", "coverage"] == 0.5
    assert told["tiermem_prefetch_quality", "accuracy"] == pytest.approx(5 / 6)
    assert told["tiermem_prefetch_quality", "timeliness"] == 0.8
    assert told["tiermem_prefetch_quality", "pollution"] == 0.25
    assert told["tiermem_prefetch_bytes", "waiting"] == 2 * PAGE
    assert told["tiermem_prefetch_wasted_bytes_total",] == PAGE
    for sample in ours:
        assert all(f"`{value}`" in DOCS for value in sample.labels.values())


def test_policies_on_trial_are_sent_as_it_is_documented() -> None:
    trial = Shadow(policies=("lru",), sample=1.0)
    with Space.open(msgspec.structs.replace(SMALL, shadow=trial)) as space:
        families = list(SpaceCollector(space.statistics).collect())
    ours = [s for f in families for s in f.samples if s.name.startswith("tiermem_shadow")]
    assert {s.name for s in ours} == documented("shadow")
    assert {(s.labels["policy"], s.labels["running"]) for s in ours} == {
        ("classq", "true"),
        ("lru", "false"),
    }
    whats = {s.labels["what"] for s in ours if "what" in s.labels}
    assert all(f"`{what}`" in DOCS for what in whats)
    assert len(whats) == 4


def test_a_state_of_every_slot_adds_up_to_what_was_configured(busy_space: Space) -> None:
    now = busy_space.statistics()
    families = {f.name: f for f in SpaceCollector(lambda: now).collect()}
    for tier in now.tiers:
        name = tier.place.name.lower()
        samples = families["tiermem_tier_slots"].samples
        total = sum(s.value for s in samples if s.labels["tier"] == name)
        assert total == tier.configured


def test_an_event_that_is_new_appears_by_itself(busy_space: Space) -> None:
    now = busy_space.statistics()
    counts = {**now.counts, "a_new_one": 3}
    later = Statistics(now.page_bytes, now.pages, now.tiers, now.routes, counts, now.fault)
    families = {f.name: f for f in SpaceCollector(lambda: later).collect()}
    found = {s.labels["event"]: s.value for s in families["tiermem_events"].samples}
    assert found["a_new_one"] == 3
    assert "gpu_host" not in found


def test_a_space_with_a_port_serves_until_it_is_closed() -> None:
    port = free_port()
    config = Config(gpu=SMALL.gpu, host=SMALL.host, metrics=Metrics(port=port))
    url = f"http://{LOOPBACK}:{port}/metrics"
    with Space.open(config) as space:
        assert stat.read(url).value("tiermem_page_bytes") == PAGE
        with space.reserve(4 * PAGE) as region:
            region.allocate(4)
            look = stat.read(url)
        assert look.value("tiermem_tier_slots", tier="gpu", state="used") == 4
    with pytest.raises(stat.NoMetrics, match=r"metrics\.port"):
        stat.read(url)
    with Space.open(config):  # the port is free again
        assert stat.read(url).samples


def test_without_a_port_nothing_is_imported_for_it() -> None:
    import subprocess
    import sys

    code = (
        "import sys\nfrom tiermem.config import Config, Gpu, Host\n"
        "from tiermem.space import Space\n"
        "Space.open(Config(gpu=Gpu(device='cpu', budget='1MiB', page='64KiB'),"
        " host=Host(capacity=0))).close()\n"
        "print('prometheus_client' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout == "False\n"


def test_a_port_that_is_taken_costs_the_metrics_and_not_the_space(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with socket.socket() as other:
        other.bind((LOOPBACK, 0))
        other.listen()
        port = other.getsockname()[1]
        config = Config(gpu=SMALL.gpu, host=SMALL.host, metrics=Metrics(port=port))
        with caplog.at_level(logging.WARNING, "tiermem.metrics"), Space.open(config) as space:
            assert space.room() == 16
    assert f"metrics off port={port}" in caplog.text


def test_scrapes_beside_moves_and_a_close_are_answered_or_refused() -> None:
    """Nothing hangs and nothing raises in the space while it is looked at."""
    from concurrent.futures import ThreadPoolExecutor

    space = Space.open(SMALL)
    endpoint = Endpoint(space.statistics, 0)
    with ThreadPoolExecutor(2) as threads, space.reserve(32 * PAGE) as region:
        looks = [threads.submit(stat.read, endpoint.url) for _ in range(20)]
        pages = region.allocate(8)
        for _ in range(10):
            with region.use(pages, "write"):
                pass
            region.hint(pages, "cold")
            space.drain()
        assert all(look.result().samples for look in looks)
        region.free(np.asarray(pages))
    endpoint.close()
    endpoint.close()
    space.close()


def test_stat_prints_tables_and_json(
    busy_space: Space, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    endpoint = Endpoint(busy_space.statistics, 0)
    try:
        with pytest.raises(SystemExit) as left:
            cli.main(["stat", "--port", str(endpoint.port)])
        assert not left.value.code
        out = capsys.readouterr().out
        with pytest.raises(SystemExit):
            cli.main(["stat", "--url", endpoint.url, "--json", "-"])
        told = json.loads(capsys.readouterr().out)
    finally:
        endpoint.close()
    assert "gpu to host" in out
    assert "memory copy" in out
    assert "faulted" in out
    assert told["schema"] == "tiermem.stat.v1"
    assert {sample["name"] for sample in told["samples"]} == documented("name")


def test_stat_says_whom_it_cannot_reach(capsys: pytest.CaptureFixture[str]) -> None:
    port = free_port()
    for arguments, says in (
        (["stat", "--port", str(port)], "nothing answers"),
        (["stat"], "which port?"),
    ):
        with pytest.raises(SystemExit) as left:
            cli.main(arguments)
        assert left.value.code == 2
        assert says in capsys.readouterr().err


def test_stat_refuses_metrics_of_somebody_else() -> None:
    from prometheus_client import CollectorRegistry, Counter, start_http_server

    registry = CollectorRegistry()
    Counter("apples", "of another program", registry=registry).inc()
    server, thread = start_http_server(0, addr=LOOPBACK, registry=registry)
    try:
        with pytest.raises(stat.NoMetrics, match="not for tiermem"):
            stat.read(f"http://{LOOPBACK}:{server.server_port}/metrics")
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_a_tier_that_failed_is_called_so() -> None:
    look = stat.Look(
        url="made",
        samples=(
            stat.Sample("tiermem_page_bytes", {}, PAGE),
            stat.Sample("tiermem_tier_slots", {"tier": "nvme", "state": "used"}, 3),
            stat.Sample("tiermem_tier_failed", {"tier": "nvme"}, 1),
        ),
    )
    import io

    out = io.StringIO()
    stat.show(look, Console(file=out, width=120))
    assert "FAILED" in out.getvalue()
