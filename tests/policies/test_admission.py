"""What is written to NVMe: each rule, and the budget over it."""

import numpy as np
import pytest

from tiermem.errors import BadPolicy
from tiermem.policies.admission import All, Budgeted, PredictedReuse, admission
from tiermem.policies.base import Admission, Ids


def ids(*units: int) -> Ids:
    return np.array(units, np.int32)


def use(rule: Admission, *units: int, now: int = 0) -> None:
    rule.used(ids(*units), np.zeros(len(units), np.int32), now)


def test_second_touch_admits_what_was_used_twice_until_its_content_is_gone() -> None:
    rule = admission("second")
    use(rule, 1, 2)
    use(rule, 2)
    assert rule.admit(ids(1, 2, 9), 0).tolist() == [False, True, False]
    rule.gone(ids(2))
    use(rule, 2)
    assert rule.admit(ids(2), 0).tolist() == [False]


def test_predicted_reuse_learns_which_kinds_come_back() -> None:
    rule = PredictedReuse(threshold=0.3)
    deep, shallow = np.full(50, 1000, np.int32), np.zeros(50, np.int32)
    for turn in range(60):
        once = np.arange(100 + 50 * turn, 150 + 50 * turn, dtype=np.int32)
        again = np.arange(50, dtype=np.int32)
        rule.used(once, deep, turn)
        rule.used(again, shallow, turn)
        rule.admit(once, turn)
        kept = rule.admit(again, turn)
    assert kept.all()
    never = np.arange(9000, 9010, dtype=np.int32)
    rule.used(never, deep[:10], 99)
    assert not rule.admit(never, 99).any()


def test_what_was_refused_and_is_used_again_teaches_the_rule_to_write_it() -> None:
    rule = PredictedReuse(threshold=0.5)
    rule.used(np.arange(2000, dtype=np.int32), np.zeros(2000, np.int32), 0)
    rule.admit(np.arange(2000, dtype=np.int32), 0)
    assert not rule.admit(ids(5), 0)[0]
    for _ in range(40):
        units = np.arange(500, dtype=np.int32)
        rule.gone(units)
        rule.used(units, np.zeros(500, np.int32), 1)
        answer = rule.admit(units, 1)
    assert answer.all()


def test_the_budget_holds_over_any_time_and_the_last_to_leave_are_written_first() -> None:
    rule = Budgeted(All(), bytes_per_s=1000, unit_bytes=100, burst_s=2)
    assert rule.admit(np.arange(30, dtype=np.int32), 0).tolist() == [False] * 10 + [True] * 20
    assert not rule.admit(ids(1), 0)[0]
    assert rule.admit(ids(1, 2, 3), 200).tolist() == [False, True, True]
    assert rule.refused == 12
    written = sum(int(rule.admit(ids(*range(50)), now).sum()) for now in range(200, 10_201, 50))
    assert written == 100


def test_a_unit_larger_than_the_burst_is_written_when_enough_is_saved() -> None:
    rule = Budgeted(All(), bytes_per_s=10, unit_bytes=100, burst_s=1)
    assert rule.admit(ids(1), 0)[0]
    assert not rule.admit(ids(2), 9_000)[0]
    assert rule.admit(ids(2), 10_000)[0]


def test_rules_and_budgets_that_cannot_be_meant_are_refused() -> None:
    with pytest.raises(BadPolicy, match="all, second, reuse"):
        admission("some")
    with pytest.raises(BadPolicy, match="threshold"):
        PredictedReuse(1.5)
    with pytest.raises(BadPolicy, match="write budget"):
        Budgeted(All(), 0, 1)
