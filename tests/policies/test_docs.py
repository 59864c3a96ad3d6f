"""The policy in docs/policies.md works as it stands there, without touching the package."""

import json
import re
import sys
from pathlib import Path

import pytest

from tests.bench.test_simulate import trace_file
from tiermem import cli
from tiermem.bench import simulate, tune
from tiermem.policies import load

DOCS = Path(__file__).parents[2] / "docs" / "policies.md"


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The first Python block of the page, saved as a module on the path; its class."""
    found = re.search(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL)
    assert found is not None
    (tmp_path / "mine.py").write_text(found.group(1))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    return "mine:PromptKeeper"


def test_a_readers_own_policy_has_about_thirty_lines() -> None:
    found = re.search(r"class PromptKeeper.*?```", DOCS.read_text(), re.DOTALL)
    assert found is not None
    assert len([line for line in found.group().splitlines() if line.strip()]) <= 31


def test_a_readers_own_policy_runs_in_simulate_and_tune(mine: str, tmp_path: Path) -> None:
    path = trace_file(tmp_path)
    names = simulate.listed(f"lru,{mine},{mine}(first=16)")
    result = simulate.run(path, names, ["5%", "20%"])
    assert [row.policy for row in result.rows][::2] == names
    assert all(row.prefix_hits > 0 for row in result.rows if row.capacity_percent == 20)
    tuned = tune.run(path, "5%", further=[mine], present="lru")
    assert mine in tuned.screened


def test_a_readers_own_policy_runs_in_the_demo_with_real_bytes(mine: str, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    with pytest.raises(SystemExit) as left:
        cli.main([
            "demo", "--policy", mine, "--limit", "40", "--page", "4KiB", "--json", str(out),
            "--nvme-path", str(tmp_path / "nvme"),
        ])  # fmt: skip
    report = json.loads(out.read_text())
    assert left.value.code in (0, None)
    assert set(report["policy"].values()) == {"prompt-keeper"}
    assert report["pages_wrong"] == 0 < report["pages_verified"]


def test_a_readers_own_policy_takes_arguments(mine: str) -> None:
    assert load(f"{mine}(first=2)", 10).name == "prompt-keeper"
    assert load(mine, 10, params={"first": 2}).name == "prompt-keeper"
