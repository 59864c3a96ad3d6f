"""The page table: rows, units, memory, and that `check` notices every broken invariant."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.harness import Harness
from tiermem.table import DIRTY, DOOMED, ORDERED, STALE, PageTable, Shown, span
from tiermem.tier import Place


def test_rows_of_regions_stand_one_after_the_other() -> None:
    table = PageTable()
    first, second = table.extend(4, tenant=1), table.extend(6, unit_pages=3, tenant=2)
    assert (first.first, second.first, table.rows) == (0, 4, 10)
    assert table.region.tolist() == [0] * 4 + [1] * 6
    assert table.tenant.tolist() == [1] * 4 + [2] * 6
    assert table.unit.tolist() == [0, 1, 2, 3, 4, 4, 4, 7, 7, 7]
    assert (table.at == Place.NONE).all()
    for place in (Place.GPU, Place.HOST, Place.NVME):
        assert (table.slot(place) == -1).all()


def test_units_and_their_pages_map_to_each_other() -> None:
    table = PageTable()
    table.extend(2)
    table.extend(6, unit_pages=3)
    rows = np.array([6, 5, 1, 7], np.int32)
    heads = table.heads(rows)
    assert heads.tolist() == [5, 1]
    assert table.pages(np.array([5, 0, 2], np.int32)).tolist() == [5, 6, 7, 0, 2, 3, 4]
    assert not len(table.pages(np.empty(0, np.int32)))


@settings(deadline=None)
@given(data=st.data(), sizes=st.sampled_from([(1,), (3,), (3, 3), (1, 3), (3, 2)]))
def test_units_of_rows_are_found_whole_or_in_part_and_in_any_order(
    data: st.DataObject, sizes: tuple[int, ...]
) -> None:
    table = PageTable()
    for size in sizes:
        table.extend(6, unit_pages=size)
    units = data.draw(st.permutations(np.unique(table.unit).tolist()))[:4]
    whole = [row for unit in units for row in np.flatnonzero(table.unit == unit).tolist()]
    assert table.pages(np.array(units, np.int32)).tolist() == whole
    assert table.heads(np.array(whole, np.int32)).tolist() == units
    rows = data.draw(st.permutations(whole))
    rows = rows[: data.draw(st.integers(0, len(rows)))]
    expected = list(dict.fromkeys(table.unit[rows].tolist())) if rows else []
    assert table.heads(np.array(rows, np.int32)).tolist() == expected


def test_a_page_costs_at_most_64_bytes() -> None:
    assert PageTable().bytes_per_page() <= 64


def test_only_units_at_rest_that_nobody_uses_may_move() -> None:
    table = PageTable()
    table.extend(8)
    table.at[:] = Place.GPU
    table.at[0] = Place.HOST
    table.to[1] = Place.HOST
    table.busy[2] = 1
    table.pins[3] = 1
    table.waiters[4] = 1
    table.flags[5] = DOOMED
    table.flags[6] = DIRTY
    rows = np.arange(8, dtype=np.int32)
    assert table.movable(rows, Place.GPU).tolist() == [False] * 6 + [True] * 2


def _resting() -> Harness:
    """Pages 0 and 1 on the GPU, 2 in the host tier, 3 clean on the GPU with a spare below."""
    h = Harness(gpu=6, host=4, nvme=4, eager=True)
    for row in range(4):
        assert h.allocate([row])
        assert h.use([row], "write")
    h.carry(h.planner.demote(h.rows([2, 3]), h.now))
    h.drain()
    assert h.use([3], "read")
    h.drain()
    h.check()
    return h


def _set(column: str, row: int, value: int) -> Callable[[Harness], None]:
    def damage(h: Harness) -> None:
        getattr(h.table, column)[row] = value

    return damage


def _slot(place: Place, row: int, value: int) -> Callable[[Harness], None]:
    def damage(h: Harness) -> None:
        h.table.slot(place)[row] = value

    return damage


def _same_slot(h: Harness) -> None:
    h.table.slot(Place.GPU)[1] = h.table.slot(Place.GPU)[0]


DAMAGE: dict[str, tuple[Callable[[Harness], None], str]] = {
    "negative pins": (_set("pins", 0, -1), "negative pins"),
    "negative waiters": (_set("waiters", 0, -1), "negative waiters"),
    "negative busy": (_set("busy", 0, -1), "negative busy"),
    "a pinned page away": (_set("pins", 2, 1), "3: a pinned page"),
    "waiters without a load": (_set("waiters", 0, 1), "waiters without a load"),
    "ordered without a load": (_set("flags", 3, int(ORDERED)), "3: ordered without a load"),
    "a move without a transfer": (_set("to", 0, Place.HOST), "a move without transfer"),
    "an unknown place": (_set("at", 0, 9), "unknown place"),
    "no slot where the page is": (_slot(Place.GPU, 0, -1), "4: at GPU without a slot"),
    "bytes of a page without bytes": (_set("at", 2, Place.LOST), "5: a page without bytes"),
    "dirty away from the GPU": (_set("flags", 2, int(DIRTY)), "6: dirty away"),
    "a dirty page with a spare": (_set("flags", 3, int(DIRTY)), "6: a dirty page keeps a spare"),
    "stale copies of an idle page": (
        _set("flags", 3, int(STALE | DIRTY)), "6: stale copies of an idle page",
    ),
    "two pages in one slot": (_same_slot, "2: a GPU slot has two pages"),
    "another owner in the pool": (_slot(Place.HOST, 2, 3), "2: "),
    "on the GPU and not shown": (_set("shown", 0, int(Shown.NOTHING)), "not shown"),
    "doomed and forgotten": (_set("flags", 0, int(DOOMED | DIRTY)), "a doomed page is forgotten"),
    "busy without a transfer": (_set("busy", 0, 1), "busy differs"),
}  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGE)
def test_check_notices(kind: str) -> None:
    damage, message = DAMAGE[kind]
    h = _resting()
    damage(h)
    with pytest.raises(AssertionError) as caught:
        h.planner.check()
    assert message in str(caught.value)


def test_check_notices_a_slot_that_leaked() -> None:
    h = _resting()
    h.pools[Place.NVME].take_free(1)
    with pytest.raises(AssertionError, match="NVME: 1 used, 0 owned and 0 in flight"):
        h.planner.check()


def test_check_notices_pages_of_a_unit_that_differ() -> None:
    h = Harness(gpu=4, regions=((4, 2, 0),))
    assert h.allocate([0])
    h.table.pins[1] = 1
    with pytest.raises(AssertionError, match="a unit's pages differ in pins"):
        h.planner.check()


@pytest.mark.parametrize(
    ("rows", "whole"),
    [
        ([3, 4, 5], True),
        ([5, 4, 3], True),
        ([2, 1, 0], True),
        ([1, 0], True),
        ([3, 5, 4], False),
        ([3, 3, 5], False),
        ([5, 3, 3], False),
        ([3, 4, 6], False),
        ([7], True),
        ([], False),
    ],
)
def test_rows_that_follow_one_another_are_a_slice(rows: list[int], whole: bool) -> None:
    column, where = np.arange(9), span(np.array(rows, np.int32))
    assert isinstance(where, slice) is whole
    assert column[where].tolist() == rows
