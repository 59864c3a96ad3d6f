"""bench offload on the CPU device: a whole run, one that is interrupted, options refused."""

from __future__ import annotations

import ctypes
import io
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from xml.etree import ElementTree

import msgspec
import psutil
import pytest
from rich.console import Console

from tests.bench.fixtures.results import row
from tests.waiting import until
from tiermem.bench import (
    fio,
    offload,
    offload_ceilings,
    offload_direct,
    offload_numa,
    offload_verify,
    paging,
    report,
    result,
)
from tiermem.bench.compare import compare
from tiermem.bench.offload_routes import bare
from tiermem.bench.offload_run import Interrupted, Run, Section, Settings, drive_of
from tiermem.bench.offload_show import Watcher, ceilings_of, picture, show
from tiermem.bench.offload_verify import check_routes
from tiermem.bench.paging import Laps
from tiermem.bench.result import Figure, Result, Row, key
from tiermem.bench.rig import Lap, Rig
from tiermem.bench.survey import survey
from tiermem.errors import ConfigError, DriverError, TierFailed, TierFull
from tiermem.host.numa import node_of_memory, nodes
from tiermem.tier import NVME

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
        # A drive's evictions are taken beside both kinds of loads from it.
        assert one.gbps.n == (4 if (one.route, one.work) == ("gpu-nvme", "evict") else 2)
        assert 0 < one.gbps.median < 1000
        assert one.path, f"no path: {key(one)}"
        assert (one.cpu_s_per_gib is None) == bool(one.beside)
        if one.group == 1 and not one.work:
            assert one.page_us is not None
            assert one.page_us.p50 <= one.page_us.p99
            # One page at a time: rate and time of a page say the same, within a factor.
            seconds = one.page_bytes / (min(one.gbps.rounds) * 1e9)
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
    assert page.count("<tr>") == 3 + len(run.rows) + len(run.figures) + len(run.checks)
    ElementTree.fromstring(picture(run))
    other = measured(None)
    compared = compare(run, other)
    assert len(compared.pairs) == len(other.rows)
    told = io.StringIO()
    show(run, Console(file=told, width=150))
    assert "pager: steal" in told.getvalue()
    assert "Beside independent tools" in told.getvalue()


def test_its_figures_stand_beside_those_of_independent_tools(run: Result) -> None:
    copies = [check for check in run.checks if "numpy" in check.tool]
    assert len(copies) == 3  # down, up and both
    disk = [check for check in run.checks if check.tool.startswith("fio")]
    if fio.version() is None:
        assert disk == []
        assert any("fio is not installed" in note for note in run.notes)
    else:
        names = [f"disk {way}s 2MiB x 8, {more} checksums" for way in ("read", "write")
                 for more in ("without", "with")]  # fmt: skip
        assert [check.what for check in disk] == names
    for check in run.checks:
        assert check.n == 2
        pairs = zip(check.ours_rounds, check.theirs_rounds, strict=True)
        assert check.ratio == pytest.approx(sum(mine / other for mine, other in pairs) / 2)
        assert check.agrees == (0.95 <= check.ratio <= 1.05)


@pytest.mark.gpu
def test_on_a_gpu_torch_copies_beside_us_in_every_direction() -> None:
    pytest.importorskip("torch")
    run = Run(replace(settings(None), device="cuda:0"), survey(), Everything())
    offload_ceilings.ceilings(run)
    assert [check.what.partition(" ")[0] for check in run.checks] == ["stores", "loads", "loads"]
    assert all("CUDA events" in check.tool and check.n == 2 for check in run.checks)
    assert all(0.3 < check.ratio < 3 for check in run.checks)  # the same link, whatever the noise
    assert set(run.theirs) == {("gpu:0", "host"), ("host", "gpu:0")}


def test_a_torch_that_cannot_use_the_gpu_costs_the_check_and_not_the_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)

    def full(index: int) -> None:
        raise RuntimeError("CUDA out of memory.\nTried to allocate")

    monkeypatch.setattr(offload_verify, "TorchCopies", full)
    run = Run(replace(settings(None), device="cuda:0"), survey(Path("/nonexistent")), Nobody())
    assert offload_verify.copies(run) is None
    assert run.notes == ["the link was not checked: torch says CUDA out of memory."]


def test_without_verification_nothing_is_compared() -> None:
    found, _ = offload.measure(replace(settings(None), verify=False), Console(file=io.StringIO()))
    assert found.complete
    assert found.checks == ()


def test_the_best_route_each_way_stands_beside_the_copies_of_its_own_way() -> None:
    run = Run(settings(None), survey(Path("/nonexistent")), Nobody())
    run.rows = [
        row("gpu-host", "gpu:0", "host", [40.0], group=16),
        row("gpu-host", "gpu:0", "host", [54.0], group=64),
        row("gpu-host", "gpu:0", "host", [99.0], direction="both"),
        row("host-gpu", "host", "gpu:0", [50.0]),
        row("host-gpu", "host", "gpu:0", [90.0], beside="disk"),
    ]
    run.theirs = {
        ("gpu:0", "host"): ("torch", (55.0, 54.0, 56.0)),
        ("host", "gpu:0"): ("torch", (55.5,)),
        ("gpu:1", "host"): ("torch", (55.5,)),
    }
    check_routes(run)
    down, up = run.checks
    assert (down.ours_gbps, down.theirs_gbps, down.n, down.agrees) == (54.0, 55.0, 3, True)
    assert (up.ours_gbps, up.agrees) == (50.0, False)
    assert down.ratio == pytest.approx(54 / 55)  # of the medians: they did not take turns
    assert (down.low, down.high, down.theirs_rounds) == (None, None, (55.0, 54.0, 56.0))
    assert "x 64" in down.what


def test_rounds_go_on_while_they_lie_apart_and_end_once_they_agree() -> None:
    run = Run(replace(settings(None), rounds=6), survey(Path("/nonexistent")), Nobody())
    closed = []

    def laps(*gbps: float) -> Laps:
        try:
            for rate in gbps:
                yield Lap(int(rate * 1e9), 1.0, 0.0)
        finally:
            closed.append(True)

    def rates(found: list[Lap]) -> list[float]:
        return [lap.gbps for lap in found]

    assert rates(run.take(laps(1, 50, 50.5, 50.2, 50, 50))) == [50, 50.5, 50.2]
    assert rates(run.take(laps(1, 50, 52, 50, 50, 50, 50, 50))) == [50, 52, 50, 50, 50, 50]
    assert rates(run.take(laps(50, 48, 50, 50.1, 50.1, 50.1, 50.1, 9))) == [
        48, 50, 50.1, 50.1, 50.1, 50.1
    ]  # fmt: skip
    run.hurry_at = 0.0  # a run that is late
    assert rates(run.take(laps(1, 50, 52, 50, 50, 50))) == [50, 52, 50]
    assert closed == [True] * 4


def test_every_part_says_how_long_it_took(run: Result) -> None:
    assert {"ceilings", "routes 64KiB", "pager eager 64KiB", "opening"} <= set(run.sections)
    assert sum(run.sections.values()) <= run.took_s


def test_memory_of_a_node_is_measured_only_where_it_really_is(tmp_path: Path) -> None:
    """Two nodes by a made sysfs, of which this machine has the first."""
    base = tmp_path / "sys/devices/system/node"
    real = node_of_memory(ctypes.addressof(ctypes.c_int(1)))
    if real is None:
        pytest.skip("the kernel does not say where memory is")
    for node in (0, 1):
        (base / f"node{node}").mkdir(parents=True)
        cpus = ",".join(map(str, sorted(os.sched_getaffinity(0)))) if node == 0 else ""
        (base / f"node{node}/cpulist").write_text(cpus)
    (base / "has_memory").write_text("0-1\n")
    told = Everything()
    run = Run(settings(None), survey(Path("/nonexistent")), told)
    offload_numa.numa(run, PAGE, tmp_path)
    assert [(one.src, one.dst) for one in run.rows] == [
        ("gpu", "host:node0"),
        ("host:node0", "gpu"),
    ]
    assert all(one.gbps.median > 0 for one in run.rows)
    assert len(told.titles) == 2
    assert "memory of node 1 left out: the kernel gave memory of node 0" in run.notes[0]
    assert offload_numa.steps(tmp_path) == 4


def test_one_node_is_said_to_be_one(run: Result) -> None:
    if len(nodes()) == 1:
        assert "one NUMA node: there is no remote memory to measure" in run.notes


class Everything:
    """Is told, and keeps, what is measured."""

    def __init__(self) -> None:
        self.titles: list[str] = []

    def begin(self, title: str) -> None:
        self.titles.append(title)

    def measured(self, row: Row) -> None: ...


def test_the_way_by_kvikio_has_rows_of_its_own_beside_the_way_through_the_host(
    tmp_path: Path,
) -> None:
    """The CPU device's own route to the drive stands for kvikio's."""
    run = Run(settings(tmp_path), survey(Path("/nonexistent")), Everything())
    with bare(run.settings, PAGE) as b:
        ways = list(offload_direct.measured(run.settings, b))
    offload_direct.add(run, ways, PAGE, "kvikio made")
    drive = run.end_name(NVME)
    assert [(one.src, one.dst, one.group, one.work) for one in run.rows] == [
        ("gpu", drive, 8, "kvikio"), ("gpu", drive, 32, "kvikio"),
        (drive, "gpu", 8, "kvikio"), (drive, "gpu", 32, "kvikio"),
    ]  # fmt: skip
    assert all(one.path == "kvikio made" for one in run.rows)
    assert run.written > sum(lap.nbytes for way in ways if way.storing for lap in way.laps)


def test_a_child_of_kvikio_may_answer_crash_or_hang(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stands for Python: a script that is called in its place."""
    told = tmp_path / "told"
    told.write_text('#!/bin/sh\necho noise; echo "[[true, 8, [[1000000000, 0.5, 0.1]]]]"\n')
    crashed = tmp_path / "crashed"
    crashed.write_text("#!/bin/sh\necho why >&2; kill -SEGV $$\n")
    hangs, left = tmp_path / "hangs", tmp_path / "grandchild"
    hangs.write_text(f"#!/bin/sh\nsleep 1000 & echo $! > {left}; wait\n")
    for script in (told, crashed, hangs):
        script.chmod(0o700)
    [way] = offload_direct.ask(settings(tmp_path), PAGE, str(told))
    assert (way.storing, way.depth, way.laps) == (True, 8, [Lap(1_000_000_000, 0.5, 0.1)])
    with pytest.raises(TierFailed, match="ended with -11"):
        offload_direct.ask(settings(tmp_path), PAGE, str(crashed))
    monkeypatch.setattr(offload_direct, "CHILD_S", 5.0)
    with pytest.raises(TierFailed, match="no answer in 5 s"):
        offload_direct.ask(settings(tmp_path), PAGE, str(hangs))
    until(lambda: has_ended(int(left.read_text())))  # it is killed, and dies in its own time


def has_ended(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_without_kvikio_the_direct_way_is_left_out_and_said(tmp_path: Path) -> None:
    if find_spec("kvikio") and find_spec("cupy"):
        pytest.skip("kvikio is here")
    run = Run(settings(tmp_path), survey(Path("/nonexistent")), Everything())
    offload_direct.direct(run, PAGE)
    assert run.rows == []
    assert "kvikio" in run.notes[0]
    assert list(tmp_path.iterdir()) == []


def test_without_a_drive_the_rest_is_measured() -> None:
    found = measured(None)
    assert found.complete
    assert not [one for one in found.rows if "nvme" in one.route]
    assert "disk-written" not in found.figures


@pytest.mark.parametrize("before", ["host to gpu", "pager: steal,", "the drive beside fio"])
def test_ctrl_c_leaves_a_partial_result_and_no_files(tmp_path: Path, before: str) -> None:
    """The signal comes when the child announces a measurement of this name."""
    if "fio" in before and fio.version() is None:
        pytest.skip("no fio (Debian: apt-get install fio)")
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
    def full(r: Rig, n: int, stealing: bool) -> list[float]:
        raise TierFull("host: no room for this")

    monkeypatch.setattr(paging, "fault_us", full)
    found = measured(None)
    assert found.complete
    assert "fault-stealing 64KiB left out: host: no room for this" in found.notes
    assert "allocate-new.1" in found.figures


def test_what_fails_by_a_bug_keeps_the_rows_and_is_raised(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def broken(r: Rig, n: int, stealing: bool) -> list[float]:
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
