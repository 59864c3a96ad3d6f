"""Points on several streams, kept as small numbers."""

from __future__ import annotations

import numpy as np
import pytest

from tiermem.fences import FenceIds, Fences
from tiermem.tier import PASSED, Fence


def ids(*values: int) -> FenceIds:
    return np.array(values, np.uint32)


def passed(*ticks: int) -> np.ndarray:
    return np.array(ticks, np.uint64)


def test_nothing_is_behind_a_fence_at_first() -> None:
    fences = Fences()
    assert fences.all_passed
    assert fences.is_passed(ids(0)).all()
    assert fences.point(ids(0)) == PASSED


def test_a_fence_passes_when_its_stream_gets_there() -> None:
    fences = Fences()
    fence = fences.join(ids(0), 0, 3)
    assert not fences.is_passed(fence).any()
    fences.observe(passed(2))
    assert not fences.is_passed(fence).any()
    fences.observe(passed(3))
    assert fences.is_passed(fence).all()
    assert fences.all_passed


def test_a_page_used_on_two_streams_waits_for_both() -> None:
    fences = Fences()
    fence = fences.join(fences.join(ids(0), 0, 3), 1, 7)
    assert set(fences.point(fence).ticks) == {(0, 3), (1, 7)}
    fences.observe(passed(3, 6))
    assert not fences.is_passed(fence).any()
    assert fences.point(fence) == Fence(((1, 7),)), "only what is still to come"
    fences.observe(passed(3, 7))
    assert fences.is_passed(fence).all()


def test_the_point_of_many_fences_is_the_latest_on_each_stream() -> None:
    fences = Fences()
    first = fences.join(ids(0), 0, 5)
    second = fences.join(ids(0), 0, 2)
    third = fences.join(ids(0), 2, 9)
    assert set(fences.point(np.concatenate([first, second, third])).ticks) == {(0, 5), (2, 9)}


def test_pages_with_the_same_last_users_share_one_number() -> None:
    fences = Fences()
    assert len(np.unique(fences.join(ids(*[0] * 1000), 1, 4))) == 1
    assert fences.join(ids(0), 1, 4) == fences.join(ids(0), 1, 4)


def test_pages_with_different_users_are_joined_each_with_its_own() -> None:
    fences = Fences()
    mixed = np.concatenate([fences.join(ids(0), 0, 1), fences.join(ids(0), 1, 1), ids(0)])
    joined = fences.join(mixed, 2, 5)
    assert [set(fences.point(joined[i : i + 1]).ticks) for i in range(3)] == [
        {(0, 1), (2, 5)}, {(1, 1), (2, 5)}, {(2, 5)},
    ]  # fmt: skip


def test_joining_an_earlier_point_of_the_same_stream_changes_nothing() -> None:
    fences = Fences()
    late = fences.join(ids(0), 0, 9)
    assert fences.join(late, 0, 4) == late


def test_a_point_that_has_passed_already_is_no_fence() -> None:
    fences = Fences()
    fences.observe(passed(5))
    assert fences.join(ids(0), 0, 5).tolist() == [0]


def test_what_has_passed_does_not_come_back() -> None:
    fences = Fences()
    fences.observe(passed(5))
    fences.observe(passed(2))
    assert fences.join(ids(0), 0, 4).tolist() == [0]


@pytest.mark.parametrize("seed", range(20))
def test_fences_agree_with_a_plain_model_through_sweeps(seed: int) -> None:
    rng = np.random.default_rng(seed)
    fences = Fences(rows=16)
    pages, streams = 12, 3
    column = np.zeros(pages, np.uint32)
    model: list[dict[int, int]] = [{} for _ in range(pages)]
    now, last = np.zeros(streams, np.uint64), [0] * streams
    sweeps = 0
    for _ in range(200):
        stream = int(rng.integers(streams))
        if rng.random() < 0.6:
            if fences.crowded:
                fences.sweep(column)
                sweeps += 1
            last[stream] += 1
            rows = rng.choice(pages, int(rng.integers(1, pages)), replace=False)
            column[rows] = fences.join(column[rows], stream, last[stream])
            for row in rows:
                model[row][stream] = last[stream]
        else:
            now[stream] = rng.integers(now[stream], last[stream] + 1)
            fences.observe(now)
        for row in range(pages):
            ahead = {(s, t) for s, t in model[row].items() if t > now[s]}
            assert bool(fences.is_passed(column[[row]])[0]) == (not ahead)
            assert set(fences.point(column[[row]]).ticks) == ahead
    assert sweeps
