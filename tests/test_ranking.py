"""The guard around a policy: facts in order, every kind of wrong answer, late ones, swaps."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from itertools import repeat

import numpy as np
import pytest

from tiermem.policies.base import Candidates, EvictionBase, Ids, Keys
from tiermem.policies.registry import load
from tiermem.ranking import LATE_IN_A_ROW, LATE_S, Ranking
from tiermem.table import PageTable, Rows
from tiermem.tier import Place

PAGES = 8
GONE, BUSY = 6, 7  # a page elsewhere, and one that may not leave


def ids(*units: int) -> Rows:
    return np.array(units, np.int32)


def table() -> PageTable:
    """Eight pages on the GPU, stamped so that page 5 is the oldest and page 0 the newest."""
    made = PageTable()
    made.extend(PAGES)
    made.at[:] = Place.GPU
    made.stamp[:] = np.arange(PAGES, 0, -1)
    made.at[GONE] = Place.HOST
    made.pins[BUSY] = 1
    return made


class Answering(EvictionBase):
    """Answers with what it is given, and notes the facts that it hears."""

    name = "answering"
    leaf_first = True

    def __init__(self, answer: Callable[[int], object] = lambda n: ids()) -> None:
        super().__init__(PAGES)
        self.answer = answer
        self.heard: list[tuple[str, list[int], int]] = []

    def inserted(self, units: Ids, parents: Ids, depths: Ids, keys: Keys | None, now: int) -> None:
        self.heard.append(("inserted", units.tolist(), now))

    def accessed(self, units: Ids, now: int) -> None:
        self.heard.append(("accessed", units.tolist(), now))

    def removed(self, units: Ids, now: int) -> None:
        self.heard.append(("removed", units.tolist(), now))

    def victims(self, candidates: Candidates, n: int, now: int) -> Ids:
        return self.answer(n)  # type: ignore[return-value]  # that is what is tested


def _raise(n: int) -> Ids:
    raise ZeroDivisionError("a bug of the policy")


WRONG: dict[str, tuple[Callable[[int], object], str]] = {
    "a unit twice": (lambda n: ids(1, 1), "a unit twice"),
    "a pinned unit": (lambda n: ids(BUSY), "a unit that may not leave"),
    "a unit of another tier": (lambda n: ids(GONE), "a unit that may not leave"),
    "a parent before its child": (lambda n: ids(2, 3), "a parent before its child"),
    "more than asked for": (lambda n: np.arange(n + 1, dtype=np.int32), "asked for"),
    "no unit of the table": (lambda n: ids(PAGES), "rows"),
    "a negative unit": (lambda n: ids(-1), "rows"),
    "two dimensions": (lambda n: np.zeros((1, 1), np.int32), "2 dimensions"),
    "nothing": (lambda n: ids(), "no victim"),
    "None": (lambda n: None, "raised TypeError"),
    "words": (lambda n: ["first"], "raised ValueError"),
    "an exception": (_raise, "raised ZeroDivisionError"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_answer_is_replaced_by_the_oldest_and_counted(
    kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    answer, reason = WRONG[kind]
    pages = table()
    pages.parent[3] = 2
    pages.depth[3] = 1
    ranking = Ranking(Place.GPU, Answering(answer), pages)
    with caplog.at_level(logging.WARNING):
        assert ranking.victims(2, 0).tolist() == [5, 4]
        assert ranking.victims(2, 0).tolist() == [5, 4]
    assert ranking.fallbacks == 2
    assert len(caplog.records) == 1, "said once"
    assert reason in caplog.text
    assert ranking.name == "answering", "it is asked again next time"


def test_a_right_answer_is_taken_as_it_is() -> None:
    pages = table()
    pages.parent[3] = 2
    ranking = Ranking(Place.GPU, Answering(lambda n: ids(3, 2, 0)), pages)
    assert ranking.victims(3, 0).tolist() == [3, 2, 0]
    assert ranking.fallbacks == 0


def test_a_policy_that_does_not_promise_leaves_first_may_name_parents() -> None:
    class Careless(Answering):
        leaf_first = False

    pages = table()
    pages.parent[3] = 2
    ranking = Ranking(Place.GPU, Careless(lambda n: ids(2, 3)), pages)
    assert ranking.victims(2, 0).tolist() == [2, 3]
    assert ranking.fallbacks == 0


def test_no_victim_is_right_when_no_unit_may_leave() -> None:
    pages = table()
    pages.pins[:] = 1
    ranking = Ranking(Place.GPU, Answering(), pages)
    assert not len(ranking.victims(2, 0))
    assert ranking.fallbacks == 0


def test_a_policy_that_fails_on_a_fact_answers_no_more(caplog: pytest.LogCaptureFixture) -> None:
    class Broken(Answering):
        def removed(self, units: Ids, now: int) -> None:
            raise KeyError(3)

    ranking = Ranking(Place.GPU, Broken(lambda n: ids(0)), table())
    ranking.removed(ids(3), 1)
    assert ranking.name == "lru (fallback)"
    assert ranking.fallbacks == 1
    assert "failed on removed" in caplog.text
    assert ranking.victims(1, 2).tolist() == [5]


class Clock:
    """Each answer takes what the test says."""

    def __init__(self, takes_s: Iterator[float]) -> None:
        self._takes_s = takes_s
        self._now_s = 0.0
        self._second = False

    def __call__(self) -> float:
        if self._second:
            self._now_s += next(self._takes_s)
        self._second = not self._second
        return self._now_s


def test_a_policy_that_is_late_eight_times_in_a_row_is_replaced() -> None:
    late = 2 * LATE_S
    clock = Clock(iter([late] * 7 + [0.0] + [late] * 8 + [late]))
    ranking = Ranking(Place.GPU, Answering(lambda n: ids(0)), table(), clock=clock)
    for _ in range(7):
        assert ranking.victims(1, 0).tolist() == [0], "a late answer is used"
    ranking.victims(1, 0)  # in time: the count starts again
    for turn in range(LATE_IN_A_ROW):
        assert ranking.name == "answering", turn
        ranking.victims(1, 0)
    assert ranking.name == "lru (fallback)"
    assert ranking.late == 15
    assert ranking.victims(1, 0).tolist() == [5]


def test_who_is_asked_for_many_may_take_longer() -> None:
    ranking = Ranking(
        Place.GPU, Answering(lambda n: ids(0)), table(), clock=Clock(repeat(2 * LATE_S))
    )
    for _ in range(LATE_IN_A_ROW):
        ranking.victims(400, 0)
    assert (ranking.name, ranking.late) == ("answering", 0)
    for _ in range(LATE_IN_A_ROW):
        ranking.victims(40, 0)
    assert ranking.name == "lru (fallback)"


def test_facts_arrive_in_order_and_accesses_are_gathered() -> None:
    policy = Answering()
    ranking = Ranking(Place.GPU, policy, table())
    ranking.inserted(ids(1), None, 1)
    ranking.accessed(ids(1), 2)
    ranking.accessed(ids(3, 2), 2)
    ranking.accessed(ids(0), 3)
    ranking.removed(ids(1), 4)
    assert policy.heard == [
        ("inserted", [1], 1), ("accessed", [1, 3, 2], 2), ("accessed", [0], 3), ("removed", [1], 4),
    ]  # fmt: skip


def test_accesses_are_told_before_a_question() -> None:
    policy = Answering(lambda n: ids(0))
    ranking = Ranking(Place.GPU, policy, table())
    ranking.accessed(ids(4), 1)
    ranking.victims(1, 2)
    assert policy.heard == [("accessed", [4], 1)]


def test_another_policy_takes_over_what_is_in_the_tier_oldest_first() -> None:
    ranking = Ranking(Place.GPU, Answering(), table())
    policy = Answering()
    ranking.swap(policy, 9)
    assert policy.heard == [("inserted", [BUSY, 5, 4, 3, 2, 1, 0], 9)]
    assert ranking.name == "answering"


def test_a_swap_brings_a_replaced_policy_back() -> None:
    class Broken(Answering):
        def removed(self, units: Ids, now: int) -> None:
            raise KeyError(3)

    ranking = Ranking(Place.GPU, Broken(), table())
    ranking.removed(ids(3), 1)
    ranking.swap(load("lru", PAGES), 2)
    assert ranking.name == "lru"
    assert ranking.victims(2, 3).tolist() == [5, 4]
    assert ranking.fallbacks == 1


def test_everything_that_crosses_the_boundary_is_recorded() -> None:
    written: list[dict[str, object]] = []
    pages = table()
    ranking = Ranking(Place.GPU, load("lru", PAGES), pages, lambda e: written.append(dict(e)))
    ranking.inserted(ids(BUSY, 1, 0), None, 1)
    ranking.accessed(ids(0), 2)
    assert ranking.victims(1, 3).tolist() == [1]
    ranking.removed(ids(1), 4)
    assert [(e["e"], e["units"], e["now"]) for e in written] == [
        ("inserted", [BUSY, 1, 0], 1),
        ("accessed", [0], 2),
        ("victims", [1], 3),
        ("removed", [1], 4),
    ]
    assert written[2]["n"] == 1
    assert BUSY in written[2]["refused"]  # type: ignore[operator]
    assert {e["tier"] for e in written} == {"gpu"}


def test_a_wrong_answer_is_recorded_with_its_reason() -> None:
    written: list[dict[str, object]] = []
    ranking = Ranking(
        Place.GPU, Answering(lambda n: ids(1, 1)), table(), lambda e: written.append(dict(e))
    )
    ranking.victims(2, 0)
    assert [e["e"] for e in written] == ["fallback", "victims"]
    assert written[0]["reason"] == "a unit twice"
