"""Prefetch: order, budget, deadlines, and the measure of its quality."""

import numpy as np
import pytest

from tiermem.errors import BadPolicy
from tiermem.policies.base import Ids
from tiermem.policies.prefetch import (
    Budget,
    HintPrefetch,
    NoPrefetch,
    Quality,
    QueuePrefetch,
    prefetch,
)


def ids(*units: int) -> Ids:
    return np.array(units, np.int32)


def budget(nbytes: int, unit_bytes: int = 1, bytes_per_ms: float = 1.0) -> Budget:
    """Units arrive one after another at this rate."""
    return Budget(
        nbytes, unit_bytes, lambda units: np.arange(1, len(units) + 1) * unit_bytes / bytes_per_ms
    )


WIDE = budget(1000)


def test_none_names_nothing_whatever_waits() -> None:
    policy = prefetch("none")
    policy.queued(1, ids(1, 2), 0)
    policy.hinted(1, ids(3), 0, 1.0)
    assert not len(policy.prefetch(WIDE, 0))


def test_the_queue_is_served_in_order_without_repeats_and_within_the_budget() -> None:
    policy = QueuePrefetch()
    policy.queued(7, ids(1, 2, 3), 0)
    policy.queued(8, ids(1, 2, 9), 0)
    policy.queued(9, ids(5), 0)
    policy.left(9)
    assert policy.prefetch(budget(20, 10), 0).tolist() == [1, 2]
    assert policy.prefetch(budget(1000, 10), 0).tolist() == [3, 9]
    assert not len(policy.prefetch(budget(1000, 10), 0))


def test_what_cannot_arrive_by_its_deadline_is_left_out() -> None:
    policy = QueuePrefetch()
    policy.queued(1, ids(1, 2, 3, 4), now=0, deadline=3)
    assert policy.prefetch(WIDE, 0).tolist() == [1, 2, 3]
    assert not len(policy.prefetch(WIDE, 1))
    policy.queued(2, ids(5), now=0, deadline=10)
    assert not len(policy.prefetch(WIDE, 10))


def test_hinted_sessions_come_after_the_queue_the_soonest_first_shortly_before_they_are_due() -> (
    None
):
    policy = HintPrefetch(ahead_ms=2000, likely=0.5)
    policy.hinted(1, ids(1), at=5_000, probability=0.9)
    policy.hinted(2, ids(2), at=4_000, probability=0.9)
    policy.hinted(3, ids(3), at=4_000, probability=0.2)
    policy.hinted(4, ids(4), at=None, probability=0.9)
    policy.hinted(5, ids(5), at=4_500, probability=0.9)
    policy.closed(5)
    assert not len(policy.prefetch(WIDE, 1_000))
    policy.queued(9, ids(8), 2_000)
    assert policy.prefetch(WIDE, 2_500).tolist() == [8, 2]
    assert policy.prefetch(WIDE, 3_500).tolist() == [1]
    assert not len(policy.prefetch(WIDE, 9_000))


def test_units_from_a_slow_tier_are_not_promised_in_time() -> None:
    def arrivals_ms(units: Ids) -> np.ndarray:
        return np.cumsum(np.where(units < 10, 1.0, 50.0))

    policy = QueuePrefetch()
    policy.queued(1, ids(1, 2, 20, 3), now=0, deadline=40)
    assert policy.prefetch(Budget(1000, 1, arrivals_ms), 0).tolist() == [1, 2]
    policy.queued(2, ids(1, 2, 20, 3), now=0, deadline=None)
    assert policy.prefetch(Budget(1000, 1, arrivals_ms), 0).tolist() == [1, 2, 20, 3]


def test_quality_counts_what_was_used_in_time_late_never_and_at_whose_cost() -> None:
    quality = Quality(page_bytes=100)
    quality.loaded(ids(1, 2, 3, 4, 5))
    quality.pushed_out(ids(7, 9))
    quality.arrived(ids(1, 2, 3))
    assert quality.waiting == 5
    quality.needed(ids(1, 4, 7, 8), absent=ids(7, 8))
    quality.dropped(ids(3))
    quality.excuse(ids(2))
    found = quality.statistics()
    assert (found.needed, found.loaded, found.used, found.late) == (4, 5, 2, 1)
    assert (found.coverage, found.accuracy) == (0.5, 2 / 3)
    assert (found.timeliness, found.pollution, found.wasted_bytes) == (0.5, 0.2, 100)
    assert (found.waiting, quality.waiting) == (2, 1), "an excused page may still be used"
    quality.needed(ids(2, 9), absent=ids())
    quality.needed(ids(2, 7, 9), absent=ids(2, 7, 9))  # neither was pushed out since
    found = quality.statistics()
    assert (found.used, found.polluting, found.waiting, quality.waiting) == (3, 1, 1, 1)


def test_a_page_that_is_given_other_content_carries_nothing_over() -> None:
    quality = Quality(page_bytes=1)
    quality.loaded(ids(1))
    quality.pushed_out(ids(2))
    quality.gone(ids(1, 2))
    quality.needed(ids(1, 2), absent=ids(1, 2))
    found = quality.statistics()
    assert (found.used, found.wasted, found.polluting, quality.waiting) == (0, 1, 0, 0)


def test_an_unknown_policy_is_refused_with_the_known_ones() -> None:
    with pytest.raises(BadPolicy, match="none, queue, hint"):
        prefetch("some")


class Slack(NoPrefetch):
    """Of somebody else's package."""

    name = "slack"

    def __init__(self, by: int = 1) -> None:
        self.by = by


def test_a_policy_of_another_package_is_named_by_module_and_class() -> None:
    found = prefetch(f"{__name__}:Slack", {"by": 3})
    assert isinstance(found, Slack)
    assert found.by == 3
    for name, params, says in (
        (f"{__name__}:Slack", {"buy": 3}, "buy"),
        ("no_such_module:Slack", {}, "cannot import"),
        ("queue", {"ahead_ms": 3}, "queue"),
    ):
        with pytest.raises(BadPolicy, match=says):
            prefetch(name, params)
