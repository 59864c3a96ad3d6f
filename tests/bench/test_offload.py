"""bench offload on the CPU device: a whole run, one that is interrupted, options refused."""

from __future__ import annotations

import io
import re
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from xml.etree import ElementTree

import msgspec
import pytest
from rich.console import Console

from tests.bench.fixtures.results import row
from tiermem.bench import offload, paging, report, result
from tiermem.bench.compare import compare
from tiermem.bench.offload_run import Interrupted, Run, Section, Settings, drive_of
from tiermem.bench.offload_show import Watcher, ceilings_of, picture, show
from tiermem.bench.paging import Lap
from tiermem.bench.result import Figure, Result, Row, key
from tiermem.bench.survey import survey
from tiermem.errors import ConfigError, DriverError, TierFull

PAGE = 64 << 10
DOCS = Path(__file__).parents[2] / "docs" / "benchmarks.md"


def settings(nvme: Path | None) -> Settings:
    return Settings(
        device="cpu",
        pages=(PAGE,),
        rounds=2,
        seconds=0.005,
        work_bytes=128 * PAGE,
        nvme=nvme,
        quick=True,
    )


def measured(nvme: Path | None) -> Result:
    found, failure = offload.measure(settings(nvme), Console(file=io.StringIO()))
    if failure is not None:
        raise failure
    return found


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Result:
    return measured(tmp_path_factory.mktemp("drive"))


def test_a_run_has_every_route_alone_and_through_the_pager(run: Result) -> None:
    assert run.complete
    assert run.device == "cpu"
    assert [note for note in run.notes if "left out" in note] == []
    routes = {"gpu-host", "host-gpu", "host-nvme", "nvme-host", "gpu-nvme", "nvme-gpu"}
    assert {row.route for row in run.rows if not row.work} == routes
    works = {"ceiling", "evict", "load", "load-ahead", "steal", "steal-ahead", "swap"}
    assert {row.work for row in run.rows} - {""} == works
    assert {row.route for row in run.rows if row.direction == "both"} >= {"host-gpu", "nvme-host"}
    assert {row.beside for row in run.rows} == {"", "python-thread", "disk"}
    assert {row.route for row in run.rows if row.work == "load"} == {"host-gpu", "nvme-gpu"}


def test_its_rows_have_names_of_their_own_and_figures_that_can_be(run: Result) -> None:
    assert len({key(row) for row in run.rows}) == len(run.rows)
    for one in run.rows:
        assert one.gbps.n == (4 if one.work.startswith("steal") else 2)  # both regions in turn
        assert 0 < one.gbps.median < 1000
        assert one.path, f"no path: {key(one)}"
        assert (one.cpu_s_per_gib is None) == bool(one.beside)
        if one.group == 1 and not one.work:
            assert one.page_us is not None
            assert one.page_us.p50 <= one.page_us.p99
            # One page at a time: rate and time of a page say the same, within a factor.
            seconds = one.page_bytes / (one.gbps.median * 1e9)
            assert one.page_us.p50 / 1e6 < 3 * seconds
        if "gpu" in (one.src, one.dst):
            assert one.percent_of_link is None
    written = sum(one.dst.startswith("nvme") for one in run.rows)
    assert written > 0
    assert run.figures["disk-written"].median > 0


def test_every_figure_and_field_of_a_row_is_documented(run: Result) -> None:
    text = DOCS.read_text()
    for name in run.figures:
        stem = re.sub(r"\.[0-9][0-9A-Za-z]*$", "", name)
        assert f"`{stem}" in text, f"docs/benchmarks.md does not explain {name}"
    for field in Row.__struct_fields__:
        assert f"`{field}`" in text
    for field in Result.__struct_fields__:
        assert f"`{field}`" in text


def test_its_file_is_read_by_report_picture_and_compare(run: Result, tmp_path: Path) -> None:
    result.write(run, tmp_path / "a.json")
    again = result.read(tmp_path / "a.json")
    assert again == run
    page = report.html(again)
    assert page.count("<tr>") == 2 + len(run.rows) + len(run.figures)
    ElementTree.fromstring(picture(run))
    other = measured(None)
    compared = compare(run, other)
    assert len(compared.pairs) == len(other.rows)
    told = io.StringIO()
    show(run, Console(file=told, width=150))
    assert "pager: steal" in told.getvalue()


def test_without_a_drive_the_rest_is_measured() -> None:
    found = measured(None)
    assert found.complete
    assert not [one for one in found.rows if "nvme" in one.route]
    assert "disk-written" not in found.figures


@pytest.mark.parametrize("before", ["host to gpu", "pager: steal,"])
def test_ctrl_c_leaves_a_partial_result_and_no_files(tmp_path: Path, before: str) -> None:
    """The signal comes when the child announces a measurement of this name."""
    (tmp_path / "drive").mkdir()
    file = tmp_path / "r.json"
    command = [sys.executable, "-m", "tiermem", "bench", "offload", "--device", "cpu", "--quick"]
    command += ["--nvme-path", str(tmp_path / "drive"), "--rounds", "1", "--json", str(file)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL) as child:
        assert child.stderr is not None
        for line in child.stderr:
            if before in line.decode() and "left" in line.decode():
                child.send_signal(signal.SIGINT)
                break
        rest = child.stderr.read().decode()
        code = child.wait(60)
    assert code == offload.INTERRUPTED, rest
    found = result.read(file)
    assert not found.complete
    assert found.rows
    assert any("interrupted" in note for note in found.notes)
    assert list((tmp_path / "drive").iterdir()) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["drive", "r.json"]


def test_what_fails_for_a_known_reason_is_left_out_and_said(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(shape: paging.Shape, n: int, stealing: bool) -> list[float]:
        raise TierFull("host: no room for this")

    monkeypatch.setattr(paging, "fault_us", full)
    found = measured(None)
    assert found.complete
    assert "faults 64KiB left out: host: no room for this" in found.notes
    assert "allocate-new.1" in found.figures


def test_what_fails_by_a_bug_keeps_the_rows_and_is_raised(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def broken(shape: paging.Shape, n: int, stealing: bool) -> list[float]:
        raise AssertionError("a bug")

    monkeypatch.setattr(paging, "fault_us", broken)
    found, failure = offload.measure(settings(None), Console(file=io.StringIO()))
    assert isinstance(failure, AssertionError)
    assert not found.complete
    assert found.rows
    assert "ended early by AssertionError: a bug" in found.notes


@pytest.mark.parametrize(
    ("given", "error", "says"),
    [
        ({"device": "tpu"}, ConfigError, "cpu, cuda:0 or auto"),
        ({"device": "cuda:many"}, ConfigError, "cpu, cuda:0 or auto"),
        ({"device": "cuda:99"}, DriverError, "GPUs are visible"),
        ({"device": "cpu", "page": ["5000"]}, ConfigError, "multiples of 4KiB"),
        ({"device": "cpu", "page": ["0"]}, ConfigError, "multiples of 4KiB"),
        ({"device": "cpu", "page": ["half"]}, ConfigError, "not a size"),
    ],
)
def test_options_that_cannot_be_meant_are_refused(
    given: dict[str, object], error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        offload.command(**given)  # type: ignore[arg-type]


def test_a_directory_that_cannot_be_used_costs_the_disk_rows_only(tmp_path: Path) -> None:
    notes: list[str] = []
    with offload.our_directory(str(tmp_path / "absent"), notes) as ours:
        assert ours is None
    assert "name --nvme-path" in notes[0]
    with offload.our_directory(str(tmp_path), notes) as ours:
        assert ours is not None
        (ours / "slab").write_bytes(b"x")
    assert list(tmp_path.iterdir()) == []


class Nobody:
    def begin(self, title: str) -> None:
        raise Interrupted

    def measured(self, row: Row) -> None: ...


def test_a_rate_of_both_ways_is_compared_with_both_directions_of_the_link() -> None:
    run = Run(settings(None), survey(Path("/nonexistent")), Nobody())
    lap = partial(Lap, took_s=1.0, cpu_s=0.5)
    run.add(("gpu", "host"), PAGE, 64, [lap(2 << 30), lap(4 << 30)], "memory copy")
    (made,) = run.rows
    assert made.cpu_s_per_gib == pytest.approx(1 / 6)
    assert made.gbps.rounds == (2.147483648, 4.294967296)
    assert made.relation == "unknown"


def test_the_time_left_follows_how_long_the_run_really_takes() -> None:
    sections = [Section("a", 2, 10.0, lambda run: None)]
    sections.append(Section("b", 1, 30.0, lambda run: None))
    with Watcher(sections, Console(file=io.StringIO())) as watcher:
        watcher.enter(sections[0])
        watcher.begin("first")
        assert watcher.left_s() == 40.0
        watcher.begin("second")
        assert watcher.left_s() == pytest.approx(35 * 0.3)  # far faster: not all of it is believed
        watcher.stop = True
        with pytest.raises(Interrupted):
            watcher.begin("third")


def test_a_share_of_the_ceiling_is_taken_of_the_same_way() -> None:
    rows = [
        row("gpu-host", "gpu:0", "host", [50.0]),
        row("host-gpu", "host", "gpu:0", [90.0], direction="both"),
    ]
    made = [msgspec.structs.replace(one, work="ceiling") for one in rows]
    assert ceilings_of(made) == {
        ("gpu:0", "host", "one-way"): 50.0,
        ("host", "gpu:0", "both"): 90.0,
        ("gpu:0", "host", "both"): 90.0,
    }
    assert ceilings_of(rows) == {}


def test_the_drive_behind_a_folder_is_named_by_its_disk(tmp_path: Path) -> None:
    (tmp_path / "proc/self").mkdir(parents=True)
    line = "36 1 259:3 / /data rw,noatime - ext4 /dev/nvme0n1p2 rw\n"
    (tmp_path / "proc/self/mountinfo").write_text(line)
    part = tmp_path / "sys/devices/nvme0n1/nvme0n1p2"
    part.mkdir(parents=True)
    (part.parent / "queue").mkdir()
    (tmp_path / "sys/dev/block").mkdir(parents=True)
    (tmp_path / "sys/dev/block/259:3").symlink_to(part)
    assert drive_of(Path("/data"), tmp_path) == "nvme0n1"
    assert drive_of(Path("/elsewhere"), tmp_path) is None


def test_a_figure_sums_up_its_samples() -> None:
    figure = Figure.of("us", [3.0, 1.0, 2.0])
    assert (figure.n, figure.median) == (3, 2.0)
