"""The profile of a load on the CPU device: every part that a page passes through is in it."""

from __future__ import annotations

from bench.gpu_profile import profile
from tiermem.bench.rig import Shape
from tiermem.executor import Executor
from tiermem.pager import Pager


def test_every_load_is_timed_part_by_part_and_classes_are_left_as_they_were() -> None:
    before = Pager.use, Executor.start
    found = profile({"4KiB": Shape("cpu", 4096, 32, group=8)}, 2)
    assert (Pager.use, Executor.start) == before
    for scene, n in {"load": 4 * 2, "steal": 4 * 2, "fault": 32}.items():
        for part in ("Pager.use", "Planner.fault", "Executor.start", "EmulatedRoute.submit"):
            took = found[f"{scene}_4KiB_{part}_us"]
            assert isinstance(took, list)
            assert len(took) >= n
            assert min(took) > 0.0
