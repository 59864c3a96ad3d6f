"""Moments of the slab's soak, with and without a budget; `python -m tests.nvme.soak` is longer."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.nvme.soak import Soak


@pytest.mark.parametrize("budget", [None, 16 << 20])
def test_the_byte_cap_holds_while_everything_is_in_motion(where: Path, budget: int | None) -> None:
    snapshots = 2 if budget is None else 1
    report = Soak(
        where,
        1.5,
        budget,
        lambda soak: soak.resizes > 3 and len(soak.snapshots) >= snapshots and soak.verified > 100,
    ).run()
    assert report.most_bytes <= report.byte_cap
    assert report.wrong == 0
    assert report.pages_verified > 100
    assert report.resizes > 3
    assert report.samples > 20
    assert report.snapshots >= snapshots
    if budget is not None:
        # How exactly the rate holds takes longer to see; that it does not run away does not.
        assert report.rate_of_budget is not None
        assert report.rate_of_budget < 1.2
