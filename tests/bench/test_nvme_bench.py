"""bench nvme measures, compares with fio where it is, and says so where it is not."""

from __future__ import annotations

import io
import re
import time
from pathlib import Path

import msgspec
import pytest
from rich.console import Console

from tests.nvme.test_kvikio import PlainFile
from tiermem.bench import fio, nvme, nvme_gpu
from tiermem.bench.paired import ratio
from tiermem.errors import ConfigError
from tiermem.gpu.emulated import EmulatedDevice
from tiermem.nvme.kvikio import Probe
from tiermem.nvme.mover import native_calls

pytestmark = pytest.mark.skipif(native_calls() is None, reason="no C compiler")


REPORT = """fio: a warning before the report
{"jobs": [{"job_runtime": 800, "usr_cpu": 10.0, "sys_cpu": 15.0, "read": {"io_bytes": 0},
"write": {"io_bytes": 800000000, "total_ios": 400, "runtime": 250, "bw_bytes": 3200000000}}]}"""


def small(where: Path) -> nvme.Result:
    return nvme.run(
        where, page=64 << 10, nbytes=2 << 20, depths=(1, 3), seconds=0.02, rounds=2
    )  # fmt: skip


def test_without_fio_the_routes_are_measured_and_the_absence_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fio, "version", lambda: None)
    found = small(tmp_path)
    assert [(row.direction, row.depth) for row in found.rows] == [
        ("read", 1), ("read", 3), ("write", 1), ("write", 3),
    ]  # fmt: skip
    assert all(row.bare_gbps > 0 and row.route_gbps > 0 for row in found.rows)
    assert all(row.fio_gbps is None and row.route_of_fio is None for row in found.rows)
    assert any("fio is not installed" in note for note in found.notes)
    out = io.StringIO()
    nvme.show(found, Console(file=out, width=200))
    assert "fio is not installed" in out.getvalue()
    assert "Medians of 2 rounds" in out.getvalue()
    assert re.search(r"took\s+up\s+to\s+\d+\.\d\s+of\s+\d+\s+processors", out.getvalue())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(fio.version() is None, reason="fio is not installed")
def test_with_fio_every_row_has_a_ratio(tmp_path: Path) -> None:
    found = small(tmp_path)
    assert found.fio is not None
    assert all(
        {way: len(rates) for way, rates in row.rounds_gbps.items()}
        == {"fio": 2, "bare": 2, "route": 2}
        for row in found.rows
    )
    for row in found.rows:
        assert row.fio_gbps is not None
        assert row.route_of_fio is not None
        ours, theirs = (row.rounds_gbps[way] for way in ("bare", "fio"))
        assert row.bare_of_fio == ratio(ours, theirs)
        assert row.bare_of_fio.n == 2
    again = msgspec.json.decode(msgspec.json.encode(found), type=nvme.Result)
    assert again == found


@pytest.mark.skipif(fio.version() is None, reason="fio is not installed")
@pytest.mark.parametrize("engines", [("psync",), ("libaio",)])
def test_fio_counts_what_its_jobs_moved_in_the_time_that_they_were_counted_for(
    tmp_path: Path, engines: tuple[str, ...]
) -> None:
    file, block, depth = tmp_path / "file", 64 << 10, 3
    file.write_bytes(bytes(16 * block))
    began = time.perf_counter()
    found = fio.measure(file, 0, 16 * block, block, depth, write=True, seconds=0.2, engines=engines)
    took_s = time.perf_counter() - began
    assert found.engine == engines[0]
    # A page is written in more than a microsecond and the whole run moved more than one.
    assert block / took_s < found.bytes_per_s < block / 1e-6
    assert file.stat().st_size == 16 * block


def test_threads_are_counted_for_their_own_time_and_not_for_the_longest() -> None:
    found = fio.read_report(REPORT, "psync", write=True, jobs=4)
    assert found.bytes_per_s == pytest.approx(800e6 / 0.2)  # 0.2 s each, the longest 0.25
    assert found.cpu_us == pytest.approx(0.25 * 0.8e6 / 400)


@pytest.mark.skipif(fio.version() is None, reason="fio is not installed")
def test_what_fio_says_when_it_cannot_run_is_passed_on(tmp_path: Path) -> None:
    with pytest.raises(fio.FioFailed, match="did not run"):
        fio.measure(tmp_path / "absent", 0, 1 << 20, 1 << 16, 1, write=False, seconds=0.1)


@pytest.mark.parametrize(
    "options", [{"size": "much"}, {"page": "50%"}, {"depths": "1,none"}, {"depths": "0"}]
)
def test_options_that_cannot_be_meant_are_refused(tmp_path: Path, options: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="--"):
        nvme.command(tmp_path, **options)  # type: ignore[arg-type]


def test_the_ways_between_a_device_and_the_drive_are_measured_beside_their_legs(
    tmp_path: Path,
) -> None:
    device = EmulatedDevice(64 << 10, 32)
    try:
        found = nvme_gpu.measure(device, tmp_path / "slab", pages=32, seconds=0.02, rounds=2)
    finally:
        device.close()
    names = ["disk", "link", "ring of 8", "ring of 16", "ring of 32"]
    assert [(w.direction, w.way) for w in found.ways] == [
        (direction, name) for direction in ("GPU to NVMe", "NVMe to GPU") for name in names
    ]
    assert all(way.gbps > 0 and len(way.rounds_gbps) == 2 for way in found.ways)
    compared = [way.way for way in found.ways if way.of_slower_leg is not None]
    assert compared == names[2:] * 2
    assert found.digest_agrees
    assert found.digest_gbps > 0
    whole = nvme.run(
        tmp_path / "all", page=64 << 10, nbytes=1 << 20, depths=(1,), seconds=0.01, rounds=1,
        gpu="cpu",
    )  # fmt: skip
    assert whole.gpu is not None
    assert msgspec.json.decode(msgspec.json.encode(whole), type=nvme.Result) == whole
    out = io.StringIO()
    nvme.show(whole, Console(file=out, width=200))
    assert "ring of 64" in out.getvalue()
    assert "as the processor's" in out.getvalue()


def test_kvikio_is_measured_where_its_probe_finds_a_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nvme_gpu, "find_spec", lambda name: object())
    monkeypatch.setattr(nvme_gpu, "probe", lambda where: Probe("gds", 3.0, 3.0))
    monkeypatch.setattr(nvme_gpu, "KvikioFile", PlainFile)
    device = EmulatedDevice(64 << 10, 8)
    try:
        found = nvme_gpu.measure(device, tmp_path / "slab", pages=8, seconds=0.02, rounds=1)
    finally:
        device.close()
    assert [way.way for way in found.ways if way.of_slower_leg] == ["ring of 8", "kvikio (gds)"] * 2
    assert "kvikio gds" in found.probe
