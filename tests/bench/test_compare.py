from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import msgspec
import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from tests.bench.fixtures.results import MADE, result, row
from tiermem.bench.compare import BadComparison, Comparison, command, compare, draw, match
from tiermem.bench.judge import sentence
from tiermem.bench.result import BadResult, Result, Row, write
from tiermem.bench.words import times

MIB = 1 << 20
STEADY = [0.99, 1.0, 1.01, 1.0, 0.995]


def rounds(rate: float) -> list[float]:
    return [rate * factor for factor in STEADY]


def drive(which: str, rate: float, relation: str, p99: float = 800.0) -> Row:
    return row("nvme-gpu", which, "gpu:0", rounds(rate), relation=relation, page_us=(p99 / 2, p99))


def runner() -> typer.Typer:
    app = typer.Typer()
    app.command()(command)
    return app


def test_a_drive_behind_the_other_socket_is_named_with_its_loss_and_its_p99() -> None:
    a = result([drive("nvme:nvme0n1", 10.0, "PIX")])
    b = result([drive("nvme:nvme1n1", 5.9, "SYS", p99=1600.0)])
    [kind] = compare(a, b).kinds
    assert kind.verdict == "slower"
    assert kind.ratio == pytest.approx(0.59)
    assert kind.low < 0.59 < kind.high
    said = sentence(kind)
    assert said.startswith("nvme:nvme1n1 sits behind the other socket, in A below the same switch")
    assert "loads from nvme 41 % slower" in said
    assert said.endswith("p99 doubled")


def test_an_interval_is_the_same_for_the_same_seed_and_another_for_another() -> None:
    a = result([row("host-gpu", "host", "gpu:0", [50.0, 52.0, 51.0, 49.0, 55.0, 47.0])])
    b = result([row("host-gpu", "host", "gpu:0", [48.0, 53.0, 50.5, 44.0, 51.0, 46.0])])
    first, again, other = (compare(a, b, seed=seed).pairs[0] for seed in (1, 1, 2))
    assert (first.low, first.high) == (again.low, again.high)
    assert (first.low, first.high) != (other.low, other.high)


def test_two_runs_of_one_machine_are_seldom_called_different() -> None:
    rng = np.random.default_rng(7)

    def run(started: str) -> Result:
        rows = [
            row("host-gpu", "host", "gpu:0", list(rng.normal(50, 1, 7)), group=group)
            for group in range(1, 101)
        ]
        return result(rows, started=started)

    comparison = compare(run("2026-11-21T05:00:00Z"), run("2026-11-21T06:00:00Z"))
    wrong = [c for c in comparison.pairs if c.verdict in ("faster", "slower")]
    assert len(comparison.pairs) == 100
    assert len(wrong) <= 3
    assert comparison.kinds[0].verdict == "no difference"


def test_noise_that_hides_a_loss_is_called_not_certain() -> None:
    a = result([row("host-gpu", "host", "gpu:0", [30.0, 50.0, 70.0, 40.0, 60.0])])
    b = result([row("host-gpu", "host", "gpu:0", [25.0, 45.0, 65.0, 35.0, 55.0])])
    [pair] = compare(a, b).pairs
    assert pair.verdict == "not certain"
    assert "not certain" in sentence(pair)


def test_a_sure_difference_below_three_percent_is_no_difference() -> None:
    a = result([row("host-gpu", "host", "gpu:0", [50.0, 50.01, 50.02, 50.0])])
    b = result([row("host-gpu", "host", "gpu:0", [51.0, 51.01, 51.02, 51.0])])
    assert compare(a, b).pairs[0].verdict == "no difference"


def test_two_rounds_are_too_few_for_a_verdict_however_far_apart() -> None:
    a = result([row("host-gpu", "host", "gpu:0", [50.0, 50.1])])
    b = result([row("host-gpu", "host", "gpu:0", [10.0, 10.1])])
    [pair] = compare(a, b).pairs
    assert pair.verdict == "too few rounds"
    assert "too few rounds" in sentence(pair)


def test_rows_of_equal_names_pair_first_and_then_those_that_differ_in_which_drive() -> None:
    a = result([row("host-gpu", "host", "gpu:0", rounds(50)), drive("nvme:a", 3, "unknown")])
    b = result([drive("nvme:b", 3, "unknown"), row("host-gpu", "host", "gpu:0", rounds(50))])
    pairs, lonely = match(a.rows, b.rows)
    assert [(x.src, y.src) for x, y in pairs] == [("host", "host"), ("nvme:a", "nvme:b")]
    assert lonely == 0


def test_local_and_remote_memory_are_not_mixed_up_when_only_one_has_a_partner() -> None:
    near = row("host-gpu", "host:node0", "gpu:0", rounds(50))
    far = row("host-gpu", "host:node1", "gpu:0", rounds(30))
    pairs, lonely = match([near, far], [near])
    assert pairs == [(near, near)]
    assert lonely == 1


def test_rows_that_could_pair_in_two_ways_are_left_out() -> None:
    two = [drive("nvme:a", 3, "unknown"), drive("nvme:b", 5, "unknown")]
    assert match(two, [drive("nvme:c", 4, "unknown")]) == ([], 3)


def test_two_page_sizes_are_compared_when_nothing_else_differs() -> None:
    a = result([row("host-gpu", "host", "gpu:0", rounds(50), 2 * MIB)])
    b = result([row("host-gpu", "host", "gpu:0", rounds(55), 8 * MIB, 16)])
    [pair] = compare(a, b).pairs
    assert pair.verdict == "faster"
    assert pair.because == "pages of 8MiB instead of 2MiB"
    assert pair.what == "loads from host 2MiB x 64 / 8MiB x 16"


def test_what_was_left_out_or_differs_is_noted() -> None:
    shared = row("host-gpu", "host", "gpu:0", rounds(50))
    a = result([shared, row("in-place", "host", "gpu:0", rounds(50))], complete=False)
    b = result([shared], machine=msgspec.structs.replace(MADE, kernel="6.1"))
    notes = " ".join(compare(a, b, ("old", "new")).notes)
    assert "old was interrupted" in notes
    assert "1 rows have no partner" in notes
    assert "kernel 6.8.0-made / 6.1" in notes


GPU_ROW = row("host-gpu", "host", "gpu:0", rounds(50))
DISK_ROW = row("nvme-host", "nvme", "host", rounds(3))


@pytest.mark.parametrize(
    ("a", "b", "reason"),
    [
        (result([GPU_ROW]), result([DISK_ROW]), "no row of A has a partner in B: host-gpu against"),
        (result([GPU_ROW]), result([GPU_ROW], device="cpu"), "emulated device"),
        (result([GPU_ROW]), result([GPU_ROW]), "the same run"),
        (result([GPU_ROW]), result([]), "B has no rows"),
        (
            result([row("host-gpu", "host", "gpu:0", rounds(50), beside="disk")]),
            result([GPU_ROW]),
            "no row",
        ),
    ],
)
def test_nonsense_is_refused_with_its_reason(a: Result, b: Result, reason: str) -> None:
    with pytest.raises(BadComparison, match=reason):
        compare(a, b)


def test_the_command_writes_table_verdict_json_and_picture(tmp_path: Path) -> None:
    a = result([GPU_ROW, drive("nvme:nvme0n1", 10.0, "PIX")])
    b = result([GPU_ROW, drive("nvme:nvme1n1", 5.9, "SYS")])
    write(a, tmp_path / "slot1.json")
    write(b, tmp_path / "slot2.json")
    files = [str(tmp_path / name) for name in ("slot1.json", "slot2.json")]
    picture, record = tmp_path / "c.svg", tmp_path / "c.json"
    ran = CliRunner().invoke(runner(), [*files, "--svg", str(picture), "--json", str(record)])
    assert ran.exit_code == 0, ran.output
    assert "behind the other socket" in " ".join(ran.output.split())
    comparison = msgspec.json.decode(record.read_bytes(), type=Comparison)
    assert (comparison.a, comparison.b) == ("slot1", "slot2")
    said = " ".join(ElementTree.fromstring(picture.read_text()).itertext())
    assert "slot1" in said
    assert "loads from nvme 2MiB x 64" in said


def test_the_command_refuses_another_schema_with_its_reason(tmp_path: Path) -> None:
    write(result([GPU_ROW]), tmp_path / "a.json")
    (tmp_path / "b.json").write_text(json.dumps({"schema": "fio"}))
    ran = CliRunner().invoke(runner(), [str(tmp_path / "a.json"), str(tmp_path / "b.json")])
    assert isinstance(ran.exception, BadResult)
    assert "'fio'" in str(ran.exception)


def test_a_chart_of_many_pairs_keeps_the_largest_differences() -> None:
    a = result([row("host-gpu", "host", "gpu:0", rounds(50), group=g) for g in range(1, 31)])
    b = result(
        [
            row("host-gpu", "host", "gpu:0", rounds(25 if g == 30 else 50.1), group=g)
            for g in range(1, 31)
        ]
    )
    said = draw(compare(a, b), a, b)
    assert "loads from host 2MiB x 30" in said
    assert "the 14 largest differences" in said


@pytest.mark.parametrize(
    ("ratio", "word"),
    [
        (2.0, "doubled"),
        (3.1, "tripled"),
        (0.5, "halved"),
        (1.01, ""),
        (1.35, "+35 %"),
        (7, "x 7.0"),
    ],
)
def test_ratios_of_times_are_put_into_words(ratio: float, word: str) -> None:
    assert times(ratio) == word
