"""The check that no parent leaves before its child, when rows have been given to other blocks."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import pytest

from tiermem.policies.base import Candidates, EvictionBase, Ids
from tiermem.ranking import Ranking
from tiermem.table import PageTable
from tiermem.tier import Place


class Fixed(EvictionBase):
    """Answers what it was given, in that order."""

    name: ClassVar[str] = "fixed"
    leaf_first: ClassVar[bool] = True

    def __init__(self, answer: list[int]) -> None:
        super().__init__(capacity=8)
        self._answer = np.array(answer, np.int32)

    def victims(self, candidates: Candidates, n: int, now: int) -> Ids:
        return self._answer[:n]


def ranked(answer: list[int], parents: list[int], depths: list[int]) -> Ranking:
    """A ranking over pages on the GPU with these links."""
    table = PageTable()
    table.extend(len(parents))
    table.at[:] = Place.GPU
    table.parent[:] = parents
    table.depth[:] = depths
    return Ranking(Place.GPU, Fixed(answer), table)


@pytest.mark.parametrize("depths", [[0, 1], [0, 0]], ids=["with depths", "without depths"])
def test_a_parent_before_its_child_is_refused(depths: list[int]) -> None:
    ranking = ranked([0, 1], parents=[-1, 0], depths=depths)
    ranking.victims(2, now=0)
    assert ranking.fallbacks == 1


def test_a_row_that_holds_a_deeper_block_by_now_is_nobodys_parent() -> None:
    ranking = ranked([0, 1], parents=[-1, 0], depths=[5, 3])
    assert ranking.victims(2, now=0).tolist() == [0, 1]
    assert ranking.fallbacks == 0
