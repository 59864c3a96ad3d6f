"""The log behind the policies, against a plain list."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tiermem.policies.base import Ids, Mask
from tiermem.policies.queue import Lineage, Queues, joined
from tiermem.policies.sessions import Sessions


class Allowed:
    """Candidates: every unit but some."""

    def __init__(self, refused: set[int] | None = None) -> None:
        self.refused = refused or set()

    def keep(self, units: Ids) -> Mask:
        return np.array([unit not in self.refused for unit in units.tolist()], np.bool_)

    def all(self) -> Ids:
        raise NotImplementedError


def ids(*units: int) -> Ids:
    return np.array(units, np.int32)


UNITS = st.lists(st.integers(0, 40), min_size=1, max_size=12)
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("append"), st.integers(0, 2), UNITS),
        st.tuples(st.just("remove"), st.just(0), UNITS),
        st.tuples(st.just("oldest"), st.integers(0, 2), UNITS),
    ),
    max_size=200,
)


@settings(max_examples=150, deadline=None)
@given(STEPS)
def test_queues_agree_with_lists_whatever_is_done_to_them(
    steps: list[tuple[str, int, list[int]]],
) -> None:
    queues, model = Queues(3), [list[int]() for _ in range(3)]
    for verb, queue, units in steps:
        if verb == "oldest":
            n = len(units)
            kept = [u for u in model[queue] if u not in units]
            assert queues.oldest(queue, Allowed(set(units)), n).tolist() == kept[:n]
            continue
        for unit in units:
            for line in model:
                if unit in line:
                    line.remove(unit)
            if verb == "append":
                model[queue].append(unit)
        queues.fit(ids(*units))
        if verb == "append":
            queues.append(queue, ids(*units))
        else:
            queues.remove(ids(*units))
        assert [queues.size(i) for i in range(3)] == [len(line) for line in model]


def test_a_log_of_mostly_stale_entries_stays_short_and_in_order() -> None:
    queues = Queues()
    units = np.arange(500, dtype=np.int32)
    queues.fit(units)
    order = np.random.default_rng(1)
    last = units
    for _ in range(200):
        last = order.permutation(units)
        queues.append(0, last)
    assert queues.oldest(0, Allowed(), 500).tolist() == last.tolist()


def test_reading_goes_on_behind_what_was_appended_meanwhile() -> None:
    queues = Queues()
    queues.fit(ids(9))
    queues.append(0, ids(1, 2, 3))
    units, _, after = queues.read(0, 0, 2)
    assert units.tolist() == [1, 2]
    queues.append(0, ids(1))
    units, _, after = queues.read(0, after, 10)
    assert units.tolist() == [3, 1]
    assert not len(queues.read(0, after, 10)[0])


def test_lineage_orders_by_depth_only_if_a_parent_stands_before_its_child() -> None:
    lineage = Lineage()
    lineage.note(ids(1, 2, 3, 7), ids(-1, 1, 2, -1), ids(0, 1, 2, 0), 1024)
    assert lineage.children_first(ids(3, 2, 7, 1)).tolist() == [3, 2, 7, 1]
    assert lineage.children_first(ids(7, 3, 1)).tolist() == [7, 3, 1]
    assert lineage.children_first(ids(7, 2, 3)).tolist() == [3, 2, 7]


def some_units(rng: np.random.Generator) -> Ids:
    """A few of 40 units, in half the cases one after the other, up or down."""
    units = rng.choice(40, rng.integers(1, 6), replace=False).astype(np.int32)
    if rng.random() < 0.5:
        return units
    row = np.arange(len(units), dtype=np.int32) + rng.integers(0, 35, dtype=np.int32)
    return row if rng.random() < 0.5 else row[::-1].copy()


@pytest.mark.parametrize("seed", range(5))
def test_units_one_by_one_go_the_same_way_as_together(seed: int) -> None:
    """One unit takes a shorter way through each verb."""
    rng = np.random.default_rng(seed)
    one, all_ = Queues(3), Queues(3)
    for _ in range(200):
        units = some_units(rng)
        queue, verb = int(rng.integers(3)), rng.integers(4)
        singles = [units[i : i + 1] for i in range(len(units))]
        if verb == 0:
            all_.remove(units)
            for unit in singles:
                one.remove(unit)
        elif verb == 1:
            parts = [one.known(unit) for unit in singles]
            assert joined(parts).tolist() == all_.known(units).tolist()
        else:
            all_.append(queue, units)
            for unit in singles:
                one.append(queue, unit)
        assert one.of.tolist() == all_.of.tolist()
        for q in range(3):
            assert one.size(q) == all_.size(q)
            assert one.read(q, 0, 99)[0].tolist() == all_.read(q, 0, 99)[0].tolist()


@pytest.mark.parametrize("keyed", [False, True])
def test_sessions_know_units_that_came_one_by_one_as_those_that_came_together(keyed: bool) -> None:
    rng = np.random.default_rng(1)
    one, all_ = Sessions(), Sessions()
    for turn in range(100):
        units = some_units(rng)
        parents = rng.integers(-1, 3, len(units)).astype(np.int32)
        depths = rng.integers(0, 3, len(units)).astype(np.int32)
        keys = rng.integers(0, 3, len(units)).astype(np.uint64) if keyed else None
        fresh = all_.enter(units, parents, depths, keys, 40)
        for i in range(len(units)):
            s = slice(i, i + 1)
            key = None if keys is None else keys[s]
            assert one.enter(units[s], parents[s], depths[s], key, 40).tolist() == [bool(fresh[i])]
        if not turn % 5:
            assert one.end(units, turn, turn) == all_.end(units, turn, turn)
        for column in ("owner", "users", "turn"):
            assert getattr(one, column).tolist() == getattr(all_, column).tolist()
