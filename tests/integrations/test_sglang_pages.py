"""The free list on the CPU: order, numbers that arrive late, and what is told when."""

from __future__ import annotations

import random

import numpy as np
import pytest

from tiermem.integrations.sglang_pages import Arrived, FreePages, Pages


class Late:
    """Numbers that are ready when the test says so, or waited for."""

    def __init__(self, *pages: int) -> None:
        self.count = len(pages)
        self._pages = np.array(pages, np.int32)
        self.here = False
        self.waited = False

    def ready(self) -> bool:
        return self.here

    def pages(self) -> Pages:
        self.waited = not self.here
        return self._pages


def numbers(pages: Pages | None) -> list[int]:
    assert pages is not None
    return [int(page) for page in pages]


def test_page_0_is_never_handed_out_and_all_others_once() -> None:
    free = FreePages(5, lambda pages: None)
    assert numbers(free.take(5)) == [1, 2, 3, 4, 5]
    assert len(free) == 0
    assert free.take(1) is None
    assert numbers(free.take(0)) == []


def test_what_was_freed_first_is_taken_first_and_its_owner_hears_of_it_before() -> None:
    heard: list[int] = []
    free = FreePages(4, lambda pages: heard.extend(pages.tolist()))
    free.take(4)
    free.give(Arrived(np.array([3, 1], np.int32)))
    free.give(Arrived(np.array([2], np.int32)))
    assert len(free) == 3
    assert numbers(free.take(2)) == [3, 1]
    assert heard == [3, 1, 2]
    assert numbers(free.take(1)) == [2]


def test_numbers_that_are_on_their_way_count_and_are_waited_for_only_when_needed() -> None:
    free = FreePages(3, lambda pages: None)
    free.take(2)
    late = Late(1, 2)
    free.give(late)
    assert len(free) == 3
    assert numbers(free.take(1)) == [3]
    assert not late.waited
    assert numbers(free.take(2)) == [1, 2]
    assert late.waited


def test_a_late_number_holds_back_those_behind_it() -> None:
    free = FreePages(4, lambda pages: None)
    free.take(4)
    late, early = Late(1), Late(2, 3)
    early.here = True
    free.give(late)
    free.give(early)
    free.settle()
    assert numbers(free.take(3)) == [1, 2, 3]


@pytest.mark.parametrize("seed", range(5))
def test_ranks_hand_out_the_same_numbers_whenever_theirs_arrive(seed: int) -> None:
    def run(luck: float) -> list[int]:
        steps, arrivals = random.Random(seed), random.Random(luck)
        free = FreePages(20, lambda pages: None)
        late: list[Late] = []
        mine: list[int] = []
        seen: list[int] = []
        for _ in range(200):
            if steps.random() < 0.5:
                n = steps.randint(0, 3)
                if n <= len(free):
                    taken = numbers(free.take(n))
                    mine += taken
                    seen += taken
            elif mine:
                late.append(Late(*[mine.pop(0) for _ in range(steps.randint(1, len(mine)))]))
                free.give(late[-1])
            for some in late:
                some.here |= arrivals.random() < luck
        return seen

    assert run(0.01) == run(0.5) == run(0.99)


def test_a_page_that_is_freed_twice_is_our_own_bug() -> None:
    free = FreePages(2, lambda pages: None)
    free.give(Arrived(np.array([1], np.int32)))
    with pytest.raises(AssertionError, match="twice"):
        free.settle()


def test_what_is_taken_next_is_known_before() -> None:
    free = FreePages(4, lambda pages: None)
    assert free.next(2).tolist() == [1, 2]
    taken = free.take(3)
    assert taken is not None
    assert free.next(9).tolist() == [4]
    free.give(Arrived(taken))
    free.settle()
    assert free.next(3).tolist() == [4, 1, 2]
    assert len(free) == 4
