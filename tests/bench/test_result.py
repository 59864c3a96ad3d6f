from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import tiermem
from tests.bench.fixtures.results import result, row
from tiermem.bench.result import BadResult, Spread, machine, read, write


def test_a_result_comes_back_from_its_file_as_it_was_written(tmp_path: Path) -> None:
    made = result([row("host-gpu", "host", "gpu:0", [50.0, 52.0, 51.0])])
    write(made, tmp_path / "a.json")
    assert read(tmp_path / "a.json") == made
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_spread_is_taken_over_the_rounds() -> None:
    spread = Spread.of([1.0, 2.0, 3.0, 4.0, 100.0])
    assert (spread.n, spread.median) == (5, 3.0)
    assert spread.p5 == pytest.approx(1.2)
    assert spread.p95 == pytest.approx(80.8)


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        ({"schema": "tiermem.offload.v2"}, "v2"),
        ({"surprise": 1}, "surprise"),
        ({"device": "tpu"}, "tpu"),
        ({"took_s": "long"}, "took_s"),
    ],
)
def test_a_file_of_another_schema_is_refused_with_its_reason(
    tmp_path: Path, edit: dict[str, object], reason: str
) -> None:
    path = tmp_path / "a.json"
    write(result([row("host-gpu", "host", "gpu:0", [50.0])]), path)
    path.write_text(json.dumps(json.loads(path.read_text()) | edit))
    with pytest.raises(BadResult, match=reason):
        read(path)


def test_a_spread_that_does_not_match_its_rounds_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write(result([row("host-gpu", "host", "gpu:0", [50.0, 51.0])]), path)
    text = json.loads(path.read_text())
    text["rows"][0]["gbps"]["n"] = 7
    path.write_text(json.dumps(text))
    with pytest.raises(BadResult, match="2 entries"):
        read(path)


def test_two_rows_of_one_name_are_refused_when_written_and_when_read(tmp_path: Path) -> None:
    twice = result([row("host-gpu", "host", "gpu:0", [50.0])] * 2)
    with pytest.raises(BadResult, match="two rows"):
        write(twice, tmp_path / "a.json")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", ["", "[]", "{}", "not json", '{"schema": 3}'])
def test_something_else_is_refused_with_the_name_of_the_file(tmp_path: Path, content: str) -> None:
    path = tmp_path / "other.json"
    path.write_text(content)
    with pytest.raises(BadResult, match=r"other\.json"):
        read(path)


def test_a_missing_file_is_refused_with_the_systems_reason(tmp_path: Path) -> None:
    with pytest.raises(BadResult, match="No such file"):
        read(tmp_path / "none.json")


def test_the_machine_record_describes_this_machine_without_naming_it() -> None:
    import platform

    found = machine()
    assert found.cores >= 1
    assert found.memory_bytes > 0
    assert found.versions["python"] == platform.python_version()
    assert "numpy" in found.versions
    fields = [found.cpu, found.kernel, *found.gpus, *found.versions.values()]
    assert platform.node() not in fields


def test_versions_name_what_is_not_installed_as_a_package_too(tmp_path: Path) -> None:
    """As in a run from a source tree, with kvikio beside it on PYTHONPATH."""
    (tmp_path / "kvikio").mkdir()
    (tmp_path / "kvikio" / "__init__.py").write_text("raise RuntimeError('imported')")
    wheel = tmp_path / "cupy_cuda13x-14.0.1.dist-info"
    wheel.mkdir()
    (wheel / "METADATA").write_text("Metadata-Version: 2.1\nName: cupy-cuda13x\nVersion: 14.0.1\n")
    ask = "from tiermem.bench.machine import versions; print(versions())"
    paths = [str(tmp_path), str(Path(tiermem.__file__).parents[1]), *filter(None, sys.path)]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    told = subprocess.run(
        [sys.executable, "-c", ask], capture_output=True, text=True, env=env, check=True
    )
    found = ast.literal_eval(told.stdout)
    assert found["tiermem"] == tiermem.__version__
    assert (found["kvikio"], found["cupy"]) == ("unknown", "14.0.1")
