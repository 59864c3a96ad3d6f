"""The write budget, against a clock that the test moves."""

from __future__ import annotations

import pytest

from tiermem.nvme.budget import WriteBudget

MIB = 1 << 20


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize("page", [4096, 2 * MIB, 64 * MIB])
def test_over_thirty_seconds_the_rate_holds_within_two_percent(page: int) -> None:
    clock = Clock()
    budget = WriteBudget(100 * MIB, clock)
    while clock.now < 130.0:
        clock.now += budget.take(page)
    rate = budget.spent / 30.0
    assert rate <= 1.02 * 100 * MIB + page / 30.0
    assert rate >= 0.98 * 100 * MIB


def test_a_rest_does_not_save_up_more_than_a_quarter_of_a_second() -> None:
    clock = Clock()
    budget = WriteBudget(100 * MIB, clock)
    clock.now += 1000.0
    assert budget.available() == 25 * MIB


def test_without_a_budget_nothing_waits_and_everything_is_counted() -> None:
    budget = WriteBudget(None)
    assert budget.take(5 * MIB) == 0.0
    assert budget.available() is None
    assert budget.spent == 5 * MIB


def test_an_empty_bucket_says_how_long_to_wait() -> None:
    clock = Clock()
    budget = WriteBudget(100, clock)
    assert budget.take(125) == 0.0
    assert budget.available() == 0
    wait = budget.take(1)
    assert wait == pytest.approx(1.01)
    clock.now += wait
    assert budget.take(1) == 0.0


def test_a_budget_that_would_never_write_is_refused() -> None:
    with pytest.raises(ValueError, match="never write"):
        WriteBudget(0)


def test_another_rate_holds_from_the_moment_it_is_set() -> None:
    clock = Clock()
    budget = WriteBudget(100 * MIB, clock)
    budget.limit(10 * MIB)
    began = clock.now
    while clock.now < began + 30.0:
        clock.now += budget.take(MIB)
    assert budget.spent / 30.0 == pytest.approx(10 * MIB, rel=0.02)
    budget.limit(None)
    assert budget.take(1000 * MIB) == 0.0
    with pytest.raises(ValueError, match="would never write"):
        budget.limit(0)
