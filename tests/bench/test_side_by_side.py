"""Benches that start together: nobody measures before all are ready, and then turn about."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from bench.side_by_side import run

ROOT = Path(__file__).parents[2]
MEASURING = """
import sys, time
from pathlib import Path
from bench.side_by_side import turn

name, log, starting_s = sys.argv[1], Path(sys.argv[2]), float(sys.argv[3])

def say(what):
    with log.open("a") as lines:
        lines.write(f"{what} {name}" + chr(10))

time.sleep(starting_s)
say("ready")
for _ in range(3):
    with turn():
        say("in")
        time.sleep(0.2)
        say("out")
"""


def child(code: str, *given: str) -> list[str]:
    found = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
    return [sys.executable, "-c", found + code, *given]


def measuring(log: Path, name: str, starting_s: float) -> list[str]:
    return child(MEASURING, name, str(log), str(starting_s))


def test_benches_that_start_together_measure_in_turn_once_all_are_ready(tmp_path: Path) -> None:
    log = tmp_path / "said"
    codes = run([measuring(log, "a", 0.0), measuring(log, "b", 2.0)], tmp_path / "logs")
    said = [line.split() for line in log.read_text().splitlines()]
    assert codes == [0, 0]
    assert said[:2] == [["ready", "a"], ["ready", "b"]]
    begun, ended = said[2::2], said[3::2]
    assert [what for what, _ in begun] == ["in"] * 6
    assert [what for what, _ in ended] == ["out"] * 6
    assert [name for _, name in begun] == [name for _, name in ended] == ["a", "b"] * 3


def test_the_others_go_on_when_one_dies_before_or_in_its_turn(tmp_path: Path) -> None:
    log = tmp_path / "said"
    commands = [
        child("raise SystemExit(3)"),
        child("from bench.side_by_side import turn\nwith turn():\n    import os\n    os._exit(4)"),
        measuring(log, "c", 0.0),
    ]
    assert run(commands, tmp_path / "logs") == [3, 4, 0]
    assert log.read_text().count("out c") == 3


def test_by_itself_a_bench_measures_at_once(tmp_path: Path) -> None:
    log = tmp_path / "said"
    subprocess.run(measuring(log, "a", 0.0), check=True, timeout=60)
    assert log.read_text().count("out a") == 3
