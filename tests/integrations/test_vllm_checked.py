"""Blocks that vLLM finds in its prefix cache hold what was written into them, under pressure."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.integrations.children import python

pytestmark = pytest.mark.engine

ROOT = Path(__file__).parents[2]


def checked(tmp_path: Path, *more: str) -> dict[str, Any]:
    """What `bench/vllm_checked.py` found; it fails by itself if its check finds nothing."""
    out = tmp_path / "checked.json"
    env = {k: v for k, v in os.environ.items() if not k.startswith("TIERMEM")}
    command = [python("TIERMEM_VLLM_PYTHON", "test-engines"), str(ROOT / "bench/vllm_checked.py")]
    ended = subprocess.run(
        [*command, "--device", "cpu", "--steps", "400", "--out", str(out), *more],
        env={**env, "PYTHONPATH": str(ROOT)}, timeout=900, capture_output=True, text=True,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stdout[-2000:] + ended.stderr[-2000:]
    result: dict[str, Any] = json.loads(out.read_text())
    return result


@pytest.mark.parametrize("drive", [False, True])
def test_aborts_preemptions_and_ends_leave_no_wrong_block(tmp_path: Path, drive: bool) -> None:
    found = checked(tmp_path, *(["--drive", str(tmp_path / "drive")] if drive else []))
    assert found["wrong"] == 0
    assert found["wrong_after_one_was_spoiled"] > 0
    assert found["blocks"]["verified"] > 1000
    assert found["blocks"]["of_others"] == 0
    assert found["blocks"]["resumed"] > 0
    assert found["different"] > 0.9, "blocks that look alike cannot be told apart"
    assert found["requests"]["aborted"] > 0
    moved = found["tiermem"]
    assert min(moved["gpu_host"], moved["host_gpu"]) > 1000
    assert not drive or moved["nvme_gpu"] > 0
