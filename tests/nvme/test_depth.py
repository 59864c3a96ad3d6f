"""The climb to a good depth, on model drives and a clock that the test moves."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from tiermem.nvme.depth import DepthClimb

Drive = Callable[[int], float]
"""Slots per second at a depth."""


class Clock:
    def __init__(self) -> None:
        self.now = 5.0

    def __call__(self) -> float:
        return self.now


def climb(drive: Drive, start: int = 8, noise: float = 0.0, seconds: float = 60.0) -> list[int]:
    """The depth after every slot, with work always waiting."""
    clock, random = Clock(), np.random.default_rng(1)
    found = DepthClimb(start, 2, 32, clock)
    depths = []
    while clock.now < seconds:
        clock.now += 2 / drive(found.depth) * (1 + noise * random.standard_normal())
        found.note(2, busy=True)
        depths.append(found.depth)
    return depths


def saturating(at: int) -> Drive:
    return lambda depth: 500.0 * min(depth, at)


def usual(depths: list[int]) -> float:
    return float(np.median(depths[len(depths) // 2 :]))


@pytest.mark.parametrize("start", [2, 8, 32])
@pytest.mark.parametrize("at", [2, 4, 12, 20])
def test_it_finds_where_more_in_flight_brings_nothing(at: int, start: int) -> None:
    found = usual(climb(saturating(at), start))
    assert at * 0.95 <= found <= at * 1.4 + 1


@pytest.mark.parametrize("at", [4, 16])
def test_noise_does_not_lead_it_away(at: int) -> None:
    depths = climb(saturating(at), noise=0.3)
    assert at * 0.7 <= usual(depths) <= at * 1.5 + 1
    assert all(2 <= depth <= 32 for depth in depths)


def test_a_drive_that_gets_slower_when_crowded_is_not_crowded() -> None:
    assert 5 <= usual(climb(lambda depth: 500.0 * min(depth, 8) / max(1.0, depth / 8))) <= 10


def test_a_drive_that_always_gains_is_used_to_the_bound() -> None:
    assert usual(climb(lambda depth: 500.0 * depth)) == 32


def test_most_of_the_time_goes_to_the_best_depth_not_to_trials() -> None:
    depths = climb(saturating(8))
    settled = depths[len(depths) // 4 :]
    assert settled.count(max(set(settled), key=settled.count)) > 0.85 * len(settled)


def test_it_follows_a_drive_that_changes() -> None:
    clock, at = Clock(), 4
    found = DepthClimb(8, 2, 32, clock)
    seen = {}
    for i in range(200_000):
        at = 4 if i < 100_000 else 24
        clock.now += 2 / saturating(at)(found.depth)
        found.note(2, busy=True)
        seen[at] = found.depth
    assert seen[4] <= 6
    assert seen[24] >= 22


def test_idle_time_says_nothing() -> None:
    clock = Clock()
    found = DepthClimb(8, 2, 32, clock)
    for _ in range(10_000):
        clock.now += 0.01
        found.note(2, busy=False)
    assert found.depth == 8


@pytest.mark.parametrize(("start", "lowest", "highest"), [(0, 0, 4), (5, 1, 4), (1, 2, 4)])
def test_bounds_that_cannot_hold_are_refused(start: int, lowest: int, highest: int) -> None:
    with pytest.raises(ValueError, match="not between"):
        DepthClimb(start, lowest, highest)
