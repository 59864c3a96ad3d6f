"""What snapshots are made of: how fast a route is of late."""

import math

import pytest

from tiermem.stats import Pace

GB = 10**9


def test_a_route_that_has_moved_nothing_has_no_speed_yet() -> None:
    pace = Pace()
    pace.observe(0, 0.0)
    assert pace.gbps == math.inf


def test_a_steady_route_has_the_speed_that_it_has() -> None:
    pace = Pace(half_s=2.0)
    for seconds in range(1, 20):
        pace.observe(3 * GB * seconds, float(seconds))
        assert pace.gbps == pytest.approx(3.0)


def test_what_a_route_did_long_ago_hardly_counts_and_rest_changes_nothing() -> None:
    pace = Pace(half_s=1.0)
    pace.observe(500 * GB, 10.0)
    for tenth in range(1, 101):
        pace.observe(500 * GB + tenth * GB // 10, 10.0 + tenth / 10)
    found = pace.gbps
    assert 1.0 < found < 1.5
    pace.observe(510 * GB, 20.0)
    assert pace.gbps == found
