"""The control-plane benchmark runs, on small tables, and writes what its docstring says."""

from __future__ import annotations

import importlib.util
import json
import sys
from contextlib import closing
from pathlib import Path
from types import ModuleType

import pytest

from bench.driverless import DriverlessRig, group_us
from tiermem.bench import paging
from tiermem.bench.rig import Hide

SCRIPT = Path(__file__).parents[2] / "bench" / "control.py"


@pytest.fixture(scope="module")
def control() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bench_control", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["bench_control"] = module
    spec.loader.exec_module(module)
    return module


def test_every_section_gives_rows_with_sound_figures(control: ModuleType) -> None:
    record = control.measure(["memory", "planner", "use", "allocate"], 8192)
    assert record["schema"] == "tiermem.control.v1"
    assert record["machine"]["versions"]["numpy"]
    rows = {r["name"]: r for r in record["rows"]}
    assert len(rows) == len(record["rows"]), "a figure twice"
    for r in rows.values():
        assert set(r) == {"name", "unit", "n", "median", "p99", "bar", "holds"}
        assert r["n"] > 0
        assert r["median"] > 0
        assert (r["bar"] is None) == (r["holds"] is None)
    assert rows["table_1M_pages"]["median"] >= 34, "fewer bytes than the columns have"
    json.dumps(record)


def test_the_window_is_measured_alone_and_beside_a_busy_thread(control: ModuleType) -> None:
    rows = {r.name: r for r in control.window(0, 0.02, 2, ((8192, 2), (65536, 2)))}
    for size in ("8KiB", "64KiB"):
        assert rows[f"show_hide_{size}_quiet"].median > 0
        assert rows[f"show_hide_{size}_beside"].median > 0
        assert rows[f"show_hide_{size}_rate_kept"].bar == 90.0
        assert rows[f"python_slower_{size}"].bar == 3.0


def test_loads_are_measured_over_a_driver_that_does_nothing() -> None:
    rigs: tuple[tuple[Hide, bool], ...] = (("eager", False), ("lazy", True))
    for hide, stealing in rigs:
        with closing(DriverlessRig(128, hide)) as r:
            assert all(us > 0 for us in group_us(r, 3, stealing))
            assert all(us > 0 for us in paging.fault_us(r, 20, stealing))
            statistics = r.space.statistics()
            assert statistics.counts.get("stolen", 0) >= (64 + 20 if stealing else 0)
            r.space.check()


def test_a_missed_bar_is_said_to_be_missed(control: ModuleType) -> None:
    assert control.row("slow", "us", [3.0, 4.0], 2.0).holds is False
    assert control.row("fast", "us", [1.0, 2.0], 2.0).holds is True
    assert control.rate_row("low", "%", [80.0], 90.0).holds is False
    assert control.rate_row("high", "%", [95.0], 90.0).holds is True


def test_the_command_writes_its_json(
    control: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "control.json"
    monkeypatch.setattr(sys, "argv", ["control", "--only", "use", "--out", str(out)])
    assert control.main() == 0
    assert {r["name"] for r in json.loads(out.read_text())["rows"]} == {
        "use_1", "use_1_write", "use_512",
    }  # fmt: skip
