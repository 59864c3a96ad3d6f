"""Five seconds of the soak, with each way of hiding; `python -m tests.soak` runs it for longer."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.soak import Soak


@pytest.mark.parametrize("eager", [False, True], ids=["lazy", "eager"])
def test_eight_threads_on_full_tiers_find_every_page_as_it_was_written(
    tmp_path: Path, eager: bool
) -> None:
    soak = Soak(tmp_path / "slab", seconds=2.5, eager=eager)
    summary = soak.run()
    assert not summary["wrong"]
    assert soak.totals.counts["pages_verified"] > 100
    assert soak.totals.counts["kernels"] > 50
    routes = soak.space.statistics().routes
    assert {(r.src.name, r.dst.name) for r in routes if r.pages} >= {
        ("GPU", "HOST"), ("HOST", "NVME"), ("NVME", "GPU"),
    }  # fmt: skip
