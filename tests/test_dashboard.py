"""The Grafana dashboard asks for metrics and labels that a sharing space really sends."""

from __future__ import annotations

import json
import re
import tempfile
from pathlib import Path

import pytest
from prometheus_client.metrics_core import Metric
from prometheus_client.samples import Sample

from tiermem.config import Config, Gpu, Host, Share
from tiermem.metrics import SpaceCollector
from tiermem.space import Space

ROOT = Path(__file__).parents[1]
DASHBOARD = json.loads((ROOT / "dashboards" / "tiermem.json").read_text())
PAGE = 64 << 10
FROM_PROMETHEUS = {"instance"}

SELECTOR = re.compile(r"\b(tiermem_[a-z_]+)(?:\{([^}]*)\})?")
MATCHER = re.compile(r'([a-z_]+)(=~|=)"([^"]*)"')


@pytest.fixture(scope="module")
def sent() -> list[Sample]:
    """All samples of a space that shares its device."""
    config = Config(
        gpu=Gpu(device="cpu", budget=16 * PAGE, page=PAGE),
        host=Host(capacity=16 * PAGE),
        share=Share(group="dashboard", total=16 * PAGE, floor=4 * PAGE),
    )
    with tempfile.TemporaryDirectory(prefix="tm-") as name, pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_RUNTIME_DIR", name)
        with Space.open(config) as space:
            families: list[Metric] = list(SpaceCollector(space.statistics).collect())
    return [sample for family in families for sample in family.samples]


def expressions() -> list[tuple[str, str]]:
    return [(p["title"], t["expr"]) for p in DASHBOARD["panels"] for t in p["targets"]]


def unknown(expression: str, sent: list[Sample]) -> list[str]:
    """What an expression selects and nobody sends."""
    missing = []
    for name, matchers in SELECTOR.findall(expression):
        samples = [sample for sample in sent if sample.name == name]
        if not samples:
            missing.append(name)
        for label, how, wanted in MATCHER.findall(matchers):
            values = {sample.labels.get(label) for sample in samples}
            for value in wanted.split("|") if how == "=~" else [wanted]:
                if label not in FROM_PROMETHEUS and value not in values:
                    missing.append(f'{name}{{{label}="{value}"}}')
    return missing


@pytest.mark.parametrize(("title", "expression"), expressions())
def test_a_panel_asks_for_what_is_sent(title: str, expression: str, sent: list[Sample]) -> None:
    assert "tiermem_" in expression, title
    assert unknown(expression, sent) == []


def test_what_is_not_sent_is_found(sent: list[Sample]) -> None:
    assert unknown('rate(tiermem_route_byte_total{src="gpu"}[1m])', sent)[0].startswith(
        "tiermem_route_byte_total"
    )
    assert unknown('tiermem_lease_bytes{state=~"held|hold"}', sent) == [
        'tiermem_lease_bytes{state="hold"}'
    ]


def test_a_name_in_a_legend_is_a_label_of_what_is_shown(sent: list[Sample]) -> None:
    for panel in DASHBOARD["panels"]:
        for target in panel["targets"]:
            names = {name for name, _ in SELECTOR.findall(target["expr"])}
            known = {key for s in sent if s.name in names for key in s.labels} | FROM_PROMETHEUS
            assert set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])) <= known


def test_every_metric_of_the_lease_is_documented(sent: list[Sample]) -> None:
    text = (ROOT / "docs" / "metrics.md").read_text()
    ours = {s.name for s in sent if s.name.startswith(("tiermem_lease", "tiermem_ledger"))}
    assert len(ours) == 3
    for name in ours:
        assert f"| `{name}` |" in text
    for sample in sent:
        if sample.name in ours and "state" in sample.labels:
            assert f"`{sample.labels['state']}`" in text


def test_panels_have_numbers_of_their_own_and_do_not_overlap() -> None:
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells = [
        (x, y)
        for panel in panels
        for x in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
    ]
    assert len(set(cells)) == len(cells)
    assert max(x for x, _ in cells) < 24
