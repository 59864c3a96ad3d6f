"""The hand-over benchmark runs between real processes on the CPU device and gives every figure."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "bench" / "handover.py"
MIB = 1 << 20


def test_every_part_of_a_hand_over_is_measured_and_no_page_is_wrong(tmp_path: Path) -> None:
    out = tmp_path / "handover.json"
    given = ["--device", "cpu", "--page", "64KiB", "--total", "8MiB", "--host", "8MiB"]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *given, "--json", str(out)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    assert result["schema"] == "tiermem.handover.v1"
    (row,) = result["pages"]
    given_away = row["handover"]
    assert given_away["pages_moved"] > 0
    assert 0 < given_away["first_page_s"] <= given_away["all_s"]
    assert given_away["donor_part_s"] + given_away["newcomer_part_s"] == given_away["all_s"]
    assert 0 < given_away["floor"]["piped_s"] < given_away["floor"]["serial_s"]
    assert row["limit"]["cap"] < row["limit"]["held"]
    pinned = row["pinned"]
    assert pinned["cap"] < pinned["pinned"] == pinned["held_after"] < pinned["held"]
    assert pinned["to_pinned_s"] is not None
    assert pinned["after_unpin_s"] is not None
    job = row["job"]
    assert job["held_beside"] <= 6 * MIB
    assert job["held_beside_more"] <= 5 * MIB
    assert job["held_after"] >= job["held_before"] - MIB // 16
    assert job["job_right"]
    for part in ("handover", "limit", "job", "pinned"):
        assert row[part]["wrong"] == 0
    assert given_away["verified"] > 64
