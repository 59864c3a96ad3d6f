"""Two vLLM engines on a CPU share one budget and one host pool; both have bursts larger than a half
of the budget."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.engine

ROOT = Path(__file__).parents[2]
PYTHON = "TIERMEM_VLLM_PYTHON"
_NAMED = os.environ.get(PYTHON, "")  # read before the session's fixture removes our variables


@pytest.fixture(scope="module")
def home() -> Iterator[Path]:
    """A runtime directory of our own."""
    with tempfile.TemporaryDirectory(prefix="tm-") as name:
        yield Path(name)


def measured(part: str, out: Path, home: Path) -> dict[str, Any]:
    """One part of `bench/vllm_share.py`, both engines in processes of their own."""
    if not _NAMED or not Path(_NAMED).exists():
        pytest.skip(f"${PYTHON} names no environment with vLLM: make test-engines")
    env = {k: v for k, v in os.environ.items() if not k.startswith("TIERMEM")}
    env |= {"XDG_RUNTIME_DIR": str(home), "PYTHONPATH": str(ROOT)}
    command = [_NAMED, str(ROOT / "bench/vllm_share.py"), part, "--out", str(out)]
    ended = subprocess.run(
        [*command, "--device", "cpu", "--size", "tiny", "--pool", "64MiB"],
        env=env, timeout=900, capture_output=True, text=True,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr[-3000:]
    result: dict[str, Any] = json.loads((out / f"vllm-share-cpu-tiny-{part}.json").read_text())
    return result


def test_two_engines_share_a_budget_and_answer_as_vllm_does(tmp_path: Path, home: Path) -> None:
    shared = measured("tiermem", tmp_path, home)
    alone = measured("ideal", tmp_path, home)
    assert shared["burst_bytes"] > shared["budget"] / 2
    assert shared["samples"] > 100
    assert shared["over_budget"] == 0
    assert alone["cached"] > 0.95
    assert shared["cached"] > 0.95
    for name in "ab":
        most = max(burst["most_held"] for burst in shared["bursts"] if burst["engine"] == name)
        assert most > shared["budget"] / 2, "the budget does not go where the load is"
        assert shared["fixed"][name]["tokens"] == alone["fixed"][name]["tokens"]
        counts = shared["fixed"][name]["counts"]
        assert counts["cleaned"] > 0, "idle pages are copied down before the other one asks"
        assert counts["stepped_down"] > 0
        assert counts["host_used"] > 0
        assert counts.get("dropped", 0) == 0, "the one host pool is large enough for both"
    theirs, own = shared["others"]["b"], shared["others"]["a"]
    assert theirs["counts"]["peers_taken"] > 0
    assert theirs["cached"] > 0, "what the other has in host memory is computed"
    assert theirs["tokens"] == own["tokens"]
