"""Priority and retention over other policies."""

import numpy as np
import pytest

from tests.policies.test_queue import Allowed, ids
from tiermem.errors import BadPolicy
from tiermem.policies.retention import Retained


def filled(over: str = "lru") -> Retained:
    policy = Retained(10, over=over)
    for unit in range(6):
        policy.inserted(ids(unit), ids(-1), ids(0), None, now=unit)
    return policy


def test_without_marks_the_inner_policy_answers() -> None:
    assert filled().victims(Allowed(), 3, 10).tolist() == [0, 1, 2]


def test_marked_units_leave_by_priority_and_retained_ones_last() -> None:
    policy = filled()
    policy.retain(ids(0), priority=5)
    policy.retain(ids(1), priority=2)
    policy.retain(ids(2), until=100)
    assert policy.victims(Allowed(), 6, 10).tolist() == [3, 4, 5, 1, 0, 2]
    assert policy.victims(Allowed({3}), 3, 10).tolist() == [4, 5, 1]


def test_a_retention_time_that_has_passed_holds_nothing_back() -> None:
    policy = filled()
    policy.retain(ids(0), until=100)
    assert policy.victims(Allowed(), 1, 99).tolist() == [1]
    assert policy.victims(Allowed(), 1, 100).tolist() == [0]


def test_a_mark_ends_when_the_unit_leaves() -> None:
    policy = filled()
    policy.retain(ids(0), priority=9, until=1000)
    policy.removed(ids(0), 20)
    policy.inserted(ids(0), ids(-1), ids(0), None, 21)
    assert policy.victims(Allowed(), 6, 30).tolist() == [1, 2, 3, 4, 5, 0]


def test_any_policy_may_be_inside_and_a_priority_out_of_range_is_refused() -> None:
    for over in ("fifo", "s3fifo", "classq", "arc"):
        policy = filled(over)
        policy.retain(ids(0, 1), priority=1)
        assert set(policy.victims(Allowed(), 4, 9).tolist()) == {2, 3, 4, 5}
    with pytest.raises(BadPolicy, match="priority 101"):
        filled().retain(np.arange(1, dtype=np.int32), priority=101)
