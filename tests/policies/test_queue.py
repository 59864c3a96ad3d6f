"""The log behind the policies, against a plain list."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from tiermem.policies.base import Ids, Mask
from tiermem.policies.queue import Lineage, Queues


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
