"""Kill -9 in the middle of the work: the slab reopens, and all that it finds verifies."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tests.nvme.killed import judge, kill_once, time_reopening

KILLS = 30


def test_after_thirty_kills_everything_that_is_found_verifies(where: Path) -> None:
    rng = np.random.default_rng(7)
    found = 0
    for i in range(KILLS):
        kill_once(where, i, float(rng.uniform(0.0, 0.1)))
        n, not_verified, wrong = judge(where)
        assert (not_verified, wrong) == (0, 0), f"after kill {i}"
        found += n
    assert found > KILLS


def test_an_index_of_many_records_is_whole_after_a_kill(where: Path) -> None:
    _, found = time_reopening(where, 20_000, killed=True)
    assert found == 20_000
