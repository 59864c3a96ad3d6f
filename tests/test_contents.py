"""Names of contents, step by step over fakes: labels, what ends them, and who may adopt."""

from __future__ import annotations

import numpy as np
import pytest

from tests.harness import Harness
from tiermem.contents import page_keys
from tiermem.errors import NotOurs, PageLost
from tiermem.keyindex import Keys
from tiermem.table import Rows
from tiermem.tier import AT_GPU, AT_HOST, AT_NONE, AT_NVME, NVME, Place


def keys_of(*numbers: int) -> Keys:
    return np.array([(n, 1) for n in numbers], np.uint64)


def rows_of(*rows: int) -> Rows:
    return np.array(rows, np.int32)


def written(harness: Harness, *heads: int) -> None:
    for head in heads:
        assert harness.allocate([head])
        assert harness.use([head], "write")


def to_drive(harness: Harness, *heads: int) -> None:
    """Move pages down to the drive; the host tier is off."""
    harness.carry(harness.planner.demote(harness.rows(list(heads)), harness.now))
    harness.drain()


def on_drive(**shape: object) -> Harness:
    """Two tiers: the GPU and the drive."""
    return Harness(gpu=4, host=0, nvme=6, attic=True, **shape)  # type: ignore[arg-type]


def close(harness: Harness, *heads: int) -> None:
    rows = harness.rows(list(heads))
    harness.carry(harness.planner.forget(rows, harness.now))
    harness.alive -= set(rows.tolist())
    harness.drain()


def adopt(harness: Harness, head: int, key: int, tenant: int = 0) -> bool:
    unit = len(harness.rows([head]))
    shelved = harness.planner.in_attic(keys_of(key), tenant, unit)
    if shelved[0, 0] < 0:
        return False
    plans = harness.planner.adopt(
        rows_of(head), shelved, harness.now, parents=rows_of(-1), depths=None
    )
    harness.carry(plans)
    harness.drain()
    return True


# ---------------------------------------------------------------- labels


def test_a_labelled_page_is_found_where_it_is() -> None:
    h = Harness()
    written(h, 0, 1)
    h.planner.label(rows_of(0, 1), keys_of(7, 8))
    assert h.planner.places(keys_of(7, 8, 9), 0).tolist() == [AT_GPU, AT_GPU, AT_NONE]
    h.carry(h.planner.demote(rows_of(0), h.now))
    h.drain()
    assert h.planner.places(keys_of(7, 8), 0).tolist() == [AT_HOST, AT_GPU]
    h.check()


def test_another_tenant_does_not_learn_what_is_held() -> None:
    h = Harness()
    written(h, 0)
    h.planner.label(rows_of(0), keys_of(7))
    assert h.planner.places(keys_of(7), 1).tolist() == [AT_NONE]


@pytest.mark.parametrize("access", ["write", "fresh"])
def test_a_write_ends_the_label(access: str) -> None:
    h = Harness()
    written(h, 0)
    h.planner.label(rows_of(0), keys_of(7))
    assert h.use([0], access)  # type: ignore[arg-type]
    assert h.planner.places(keys_of(7), 0).tolist() == [AT_NONE]
    h.check()


def test_the_short_way_to_write_a_page_is_closed_while_it_has_a_label() -> None:
    h = Harness()
    written(h, 0)
    h.planner.label(rows_of(0), keys_of(7))
    assert not h.pin_one(0, "write")
    assert h.use([0], "write")
    assert h.pin_one(0, "write")


def test_a_read_keeps_the_label() -> None:
    h = Harness()
    written(h, 0)
    h.planner.label(rows_of(0), keys_of(7))
    assert h.use([0], "read")
    assert h.planner.places(keys_of(7), 0).tolist() == [AT_GPU]


def test_freeing_a_page_ends_its_label() -> None:
    h = Harness()
    written(h, 0)
    h.planner.label(rows_of(0), keys_of(7))
    h.free(rows_of(0))
    h.drain()
    assert h.planner.places(keys_of(7), 0).tolist() == [AT_NONE]
    h.check()


def test_a_page_that_cannot_be_read_back_loses_its_label() -> None:
    h = on_drive(eager=True)
    written(h, 0)
    h.planner.label(rows_of(0), keys_of(7))
    to_drive(h, 0)
    h.routes[NVME, Place.GPU].fail(1)
    assert not h.use([0], "read")
    assert h.planner.places(keys_of(7), 0).tolist() == [AT_NONE]
    with pytest.raises(PageLost):
        h.planner.label(rows_of(0), keys_of(7))
    h.check()


def test_a_vacant_page_takes_no_label() -> None:
    with pytest.raises(NotOurs):
        Harness().planner.label(rows_of(3), keys_of(7))


def test_a_new_label_takes_the_place_of_the_old_one() -> None:
    h = Harness()
    written(h, 0)
    h.planner.label(rows_of(0), keys_of(7))
    h.planner.label(rows_of(0), keys_of(8))
    assert h.planner.places(keys_of(7, 8), 0).tolist() == [AT_NONE, AT_GPU]


def test_the_same_content_in_two_pages_is_found_while_one_of_them_lives() -> None:
    h = Harness()
    written(h, 0, 1)
    h.planner.label(rows_of(0, 1), keys_of(7, 7))
    h.free(rows_of(0))
    h.drain()
    assert h.planner.places(keys_of(7), 0).tolist() == [AT_GPU]


def test_each_page_of_a_unit_gets_a_key_of_its_own() -> None:
    keys = page_keys(keys_of(7, 8), 3)
    assert len(np.unique(keys, axis=0)) == 6
    assert (keys[[0, 3]] == keys_of(7, 8)).all()


# ---------------------------------------------------------------- what the drive is told


def test_a_labelled_page_is_to_be_recorded_once_it_is_on_the_drive() -> None:
    h = on_drive()
    written(h, 0, 1)
    h.planner.label(rows_of(0), keys_of(7))
    assert not len(h.planner.take_unrecorded().slots)
    to_drive(h, 0, 1)
    held = h.planner.take_unrecorded()
    assert held.slots.tolist() == h.table.slot(NVME)[[0]].tolist()
    assert (held.keys == keys_of(7)).all()
    assert not len(h.planner.take_unrecorded().slots)


def test_a_page_that_gets_its_label_on_the_drive_is_to_be_recorded() -> None:
    h = on_drive()
    written(h, 0)
    to_drive(h, 0)
    h.planner.label(rows_of(0), keys_of(7))
    assert len(h.planner.take_unrecorded().slots) == 1


def test_a_page_written_before_its_record_is_not_recorded() -> None:
    h = on_drive()
    written(h, 0)
    h.planner.label(rows_of(0), keys_of(7))
    to_drive(h, 0)
    assert h.use([0], "write")
    assert not len(h.planner.take_unrecorded().slots)


def test_a_page_put_away_and_adopted_before_its_record_is_still_recorded() -> None:
    h = on_drive()
    written(h, 0)
    h.planner.label(rows_of(0), keys_of(7))
    to_drive(h, 0)
    close(h, 0)
    assert adopt(h, 1, 7)
    held = h.planner.take_unrecorded()
    assert held.slots.tolist() == h.table.slot(NVME)[[1]].tolist()


# ---------------------------------------------------------------- the attic


def test_a_closed_page_is_adopted_with_its_bytes() -> None:
    h = on_drive()
    written(h, 0)
    value = h.model[0]
    h.planner.label(rows_of(0), keys_of(7))
    to_drive(h, 0)
    close(h, 0)
    assert h.planner.places(keys_of(7), 0).tolist() == [AT_NVME]
    assert adopt(h, 5, 7)
    h.alive.add(5)
    h.vacant.remove(5)
    h.model[5] = value
    assert h.use([5], "read")
    h.drain()
    h.check_idle()


def test_a_page_is_put_away_while_a_valid_copy_of_it_is_on_the_gpu() -> None:
    h = on_drive()
    written(h, 0)
    h.planner.label(rows_of(0), keys_of(7))
    to_drive(h, 0)
    assert h.use([0], "read")
    assert h.table.at[0] == AT_GPU
    close(h, 0)
    assert h.planner.places(keys_of(7), 0).tolist() == [AT_NVME]
    h.check_idle()


def test_pages_without_a_label_or_without_a_copy_on_the_drive_are_freed() -> None:
    h = on_drive()
    written(h, 0, 1)
    h.planner.label(rows_of(1), keys_of(7))
    to_drive(h, 0)
    close(h, 0, 1)
    assert h.pools[NVME].used == 0
    h.check_idle()


def test_without_an_attic_closing_leaves_nothing() -> None:
    h = Harness(gpu=4, host=0, nvme=6)
    written(h, 0)
    h.planner.label(rows_of(0), keys_of(7))
    to_drive(h, 0)
    close(h, 0)
    assert h.planner.places(keys_of(7), 0).tolist() == [AT_NONE]
    assert h.pools[NVME].used == 0


def test_another_tenants_page_is_not_adopted() -> None:
    h = on_drive(regions=((4, 1, 0), (4, 1, 1)))
    written(h, 0)
    h.planner.label(rows_of(0), keys_of(7))
    to_drive(h, 0)
    close(h, 0)
    assert not adopt(h, 5, 7, tenant=1)
    assert adopt(h, 1, 7, tenant=0)


def test_a_tenants_page_is_found_behind_anothers_with_the_same_key() -> None:
    h = on_drive(regions=((4, 1, 0), (4, 1, 1)))
    written(h, 0, 4)
    h.planner.label(rows_of(0, 4), keys_of(7, 7))
    to_drive(h, 0, 4)
    close(h, 0, 4)
    assert adopt(h, 1, 7, tenant=0)
    assert adopt(h, 5, 7, tenant=1)


def test_a_content_asked_for_twice_is_given_once() -> None:
    h = on_drive()
    written(h, 0)
    h.planner.label(rows_of(0), keys_of(7))
    to_drive(h, 0)
    close(h, 0)
    found = h.planner.in_attic(keys_of(7, 7, 8), 0, 1)
    assert (found >= 0).ravel().tolist() == [True, False, False]


def test_a_unit_is_adopted_whole_or_not_at_all() -> None:
    h = Harness(gpu=4, host=0, nvme=6, regions=((8, 2, 0),), attic=True)
    written(h, 0)
    h.planner.label(h.rows([0]), keys_of(7))
    to_drive(h, 0)
    values = [h.model[0], h.model[1]]
    close(h, 0)
    assert (h.planner.in_attic(keys_of(7), 0, 3) == -1).all()
    assert adopt(h, 2, 7)
    h.model.update(zip((2, 3), values, strict=True))
    h.alive |= {2, 3}
    h.vacant = [row for row in h.vacant if row not in (2, 3)]
    assert h.use([2], "read")
    h.check()


def test_the_attic_makes_room_by_the_drives_policy() -> None:
    h = on_drive(regions=((12, 1, 0),))
    written(h, 0, 1)
    h.planner.label(rows_of(0, 1), keys_of(7, 8))
    to_drive(h, 0, 1)
    close(h, 0, 1)
    for head in range(2, 11):  # eleven pages for four frames and six slots
        written(h, head)
    h.drain()
    assert h.planner.places(keys_of(7, 8), 0).tolist() == [AT_NONE, AT_NVME]
    assert not [row for row, _ in h.gone], "content that nobody holds was missed"
    h.check_idle()


def test_a_frame_that_a_vacant_page_still_shows_is_not_taken_for_the_adopted_bytes() -> None:
    h = on_drive()
    written(h, 0, 1)
    value = h.model[0]
    h.planner.label(rows_of(0), keys_of(7))
    to_drive(h, 0)
    close(h, 0)
    h.free(rows_of(1))  # idle: vacant at once, its frame is still shown
    h.settle_ready()
    assert adopt(h, 1, 7)
    h.vacant.remove(1)
    h.alive.add(1)
    h.model[1] = value
    assert h.use([1], "read")
    h.check()
