"""Who holds which pages: over a real space whose budget is smaller than what is asked for."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.test_region import PAGE, config
from tests.waiting import until
from tiermem.errors import TierFull
from tiermem.integrations.sglang_residence import Residence
from tiermem.region import Region
from tiermem.space import Space
from tiermem.tier import Place

FRAMES = 6
PAGES = 24
TOKENS = 16
"""In a page."""


@pytest.fixture
def space(tmp_path: Path) -> Iterator[Space]:
    with Space.open(config(tmp_path, gpu=FRAMES, host=PAGES, nvme=0)) as space:
        until(lambda: space.statistics().tier(Place.HOST).capacity == PAGES)
        yield space
        space.check()


@pytest.fixture
def region(space: Space) -> Region:
    return space.reserve(PAGES * PAGE, numbered=True)


@pytest.fixture
def residence(region: Region) -> Iterator[Residence]:
    residence = Residence(region, lambda: None, TOKENS)
    yield residence
    residence.reset()
    region.unpin([0])


def fill(region: Region, pages: list[int]) -> None:
    words = region.view(np.int64)
    for page in pages:
        words[page] = 1000 + page


def holds(region: Region, pages: list[int]) -> bool:
    words = region.view(np.int64)
    return all((words[page] == 1000 + page).all() for page in pages)


def on_gpu(region: Region, pages: list[int]) -> bool:
    return bool((region.where(pages) == Place.GPU).all())


def run(residence: Residence, region: Region, request: str, pages: list[int]) -> None:
    """A request that is new, computes all its pages and ends."""
    residence.follow(request, pages)
    assert residence.ensure({request: 0}) == []
    fill(region, pages)
    residence.release(request)


def test_page_0_is_on_the_gpu_whatever_happens(region: Region, residence: Residence) -> None:
    for i in range(4):
        run(residence, region, f"r{i}", list(range(1 + 5 * i, 6 + 5 * i)))
        assert on_gpu(region, [0])


def test_a_prefix_comes_back_with_its_bytes_at_its_address(
    region: Region, residence: Residence
) -> None:
    run(residence, region, "a", [1, 2, 3])
    run(residence, region, "b", [4, 5, 6, 7, 8])
    assert not on_gpu(region, [1, 2, 3])
    residence.follow("c", [1, 2, 3, 9])
    residence.ensure({"c": 3 * TOKENS})
    assert holds(region, [1, 2, 3])
    assert on_gpu(region, [9])


def test_pages_that_a_request_holds_stay_until_the_last_one_lets_go(
    region: Region, residence: Residence
) -> None:
    run(residence, region, "a", [1, 2])
    residence.follow("b", [1, 2, 3])
    residence.follow("c", [1, 2, 4])
    residence.ensure({"b": 2 * TOKENS, "c": 2 * TOKENS})
    fill(region, [3, 4])
    residence.release("b")
    residence.follow("d", [5])
    residence.ensure({"d": 0})
    residence.extend("d", [6])
    residence.ensure({"d": TOKENS})  # takes the frame of page 3, which nobody holds
    assert on_gpu(region, [1, 2, 4, 5, 6])
    assert not on_gpu(region, [3])


def test_a_batch_of_exactly_the_budget_runs_and_one_page_more_is_refused(
    region: Region, residence: Residence
) -> None:
    residence.follow("a", [1, 2, 3, 4, 5])
    residence.ensure({"a": 0})
    residence.extend("a", [6])
    with pytest.raises(TierFull):
        residence.ensure({"a": 5 * TOKENS})
    residence.release("a")
    residence.follow("b", [7])
    residence.ensure({"b": 0})
    assert on_gpu(region, [7])


def test_requests_that_are_not_in_the_batch_make_way_and_keep_what_they_wrote(
    region: Region, residence: Residence
) -> None:
    residence.follow("waits", [1, 2, 3])
    residence.ensure({"waits": 0})
    fill(region, [1, 2, 3])
    residence.follow("runs", [4, 5, 6, 7])
    residence.ensure({"runs": 0})
    assert residence.let_go == 1
    assert on_gpu(region, [4, 5, 6, 7])
    residence.release("runs")
    residence.extend("waits", [8])
    residence.ensure({"waits": 3 * TOKENS - 1})
    assert holds(region, [1, 2, 3])
    region.view(np.int64)[3] = 77  # its unfinished page is written again
    run(residence, region, "other", [9])
    residence.release("waits")
    run(residence, region, "more", [10, 11, 12, 13, 14])
    residence.follow("again", [1, 2, 3])
    residence.ensure({"again": 3 * TOKENS})
    assert (region.view(np.int64)[3] == 77).all()


def test_what_is_written_again_after_it_was_let_go_has_no_copy_below(
    space: Space, region: Region, residence: Residence
) -> None:
    run(residence, region, "first", [1, 2])
    residence.follow("b", [3, 4, 5])  # the same tokens, and a page that is not full yet
    residence.ensure({"b": 0})
    fill(region, [3, 4, 5])
    residence.follow("b", [1, 2, 5])  # the tree has given it its own pages for the first two
    region.hint([5], "cold")
    space.drain()
    assert not on_gpu(region, [5])
    residence.ensure({"b": 3 * TOKENS - 8})
    region.view(np.int64)[5] = 77
    residence.release("b")
    run(residence, region, "c", [10, 11, 12, 13, 14])
    assert not on_gpu(region, [5])
    residence.follow("again", [1, 2, 5])
    residence.ensure({"again": 3 * TOKENS})
    assert (region.view(np.int64)[5] == 77).all()


def test_tokens_that_the_tiers_dropped_before_a_step_spoil_who_reads_them(
    region: Region, residence: Residence
) -> None:
    run(residence, region, "a", [1, 2, 3])
    region.free([2])
    residence.gone(np.array([2], np.int32), "dropped")
    residence.follow("reader", [1, 2, 3, 4])
    residence.follow("other", [1, 5])
    assert residence.ensure({"reader": 3 * TOKENS, "other": TOKENS}) == ["reader"]
    assert on_gpu(region, [1, 2, 3, 4, 5])
    assert residence.valid(np.array([1, 2, 3], np.int32)).tolist() == [True, False, True]
    residence.follow("late", [1, 2, 6])  # the page is there, its bytes are not
    residence.release("reader")
    assert residence.ensure({"late": 2 * TOKENS}) == ["late"]
    for request in ("late", "other"):
        residence.release(request)
    residence.forget(np.array([2, 3, 4], np.int32))
    run(residence, region, "new", [2])
    assert residence.valid(np.array([1, 2], np.int32)).all()


def test_a_request_whose_pages_were_exchanged_lets_go_of_the_old_ones(
    region: Region, residence: Residence
) -> None:
    run(residence, region, "a", [1, 2])
    residence.follow("b", [3, 4, 5])
    residence.ensure({"b": 0})
    residence.follow("b", [1, 2, 5])
    residence.forget(np.array([3, 4], np.int32))
    residence.ensure({"b": 3 * TOKENS - 1})
    assert on_gpu(region, [1, 2, 5])
    assert (region.where([3, 4]) == Place.NONE).all()


def test_pages_that_are_freed_while_somebody_is_said_to_hold_them_are_let_go(
    region: Region, residence: Residence
) -> None:
    residence.follow("a", [1, 2, 3])
    residence.ensure({"a": 0})
    residence.forget(np.array([2], np.int32))
    assert residence.pages("a") == [1]
    assert region.where([1, 2]).tolist() == [Place.GPU, Place.NONE]


def test_pages_that_were_handed_out_and_never_used_need_no_memory(
    region: Region, residence: Residence
) -> None:
    residence.follow("a", [1, 2])
    residence.release("a")
    residence.forget(np.array([1, 2], np.int32))
    assert (region.where([1, 2]) == Place.NONE).all()


def test_only_what_is_living_goes_on_holding(region: Region, residence: Residence) -> None:
    for request, pages in (("a", [1, 2]), ("b", [3, 4])):
        residence.follow(request, pages)
        residence.ensure({request: 0})
    residence.release_others({"b"})
    assert residence.pages("a") is None
    run(residence, region, "c", [5, 6, 7])
    assert on_gpu(region, [3, 4])


def test_a_page_that_the_tiers_dropped_is_not_valid(region: Region, residence: Residence) -> None:
    run(residence, region, "a", [1, 2, 3])
    residence.gone(np.array([2], np.int32), "dropped")
    assert residence.valid(np.array([1, 2, 3], np.int32)).tolist() == [True, False, True]
    region.free([2])


def test_pages_that_are_being_dropped_are_neither_valid_nor_freed_twice(
    tmp_path: Path,
) -> None:
    made: list[Residence] = []
    with Space.open(config(tmp_path, gpu=FRAMES, host=0, nvme=0)) as space:
        region = space.reserve(
            PAGES * PAGE, numbered=True, on_gone=lambda pages, why: made[0].gone(pages, why)
        )
        made.append(Residence(region, lambda: None, TOKENS))
        run(made[0], region, "a", [1, 2, 3, 4, 5])
        run(made[0], region, "b", [6, 7, 8, 9])  # nothing is below: some of the others go
        valid = made[0].valid(np.array([1, 2, 3, 4, 5], np.int32))
        assert int(valid.sum()) <= 1
        made[0].forget(np.arange(1, 10, dtype=np.int32))
        run(made[0], region, "c", [1, 2, 3, 4, 5])
        assert holds(region, [1, 2, 3, 4, 5])
        made[0].reset()
        region.unpin([0])


def test_what_waits_is_brought_up_as_far_as_there_is_room(
    space: Space, region: Region, residence: Residence
) -> None:
    run(residence, region, "a", [1, 2, 3])
    run(residence, region, "b", [4, 5, 6, 7, 8])
    residence.forget(np.array([4, 5, 6], np.int32))
    residence.promote(np.array([1, 2, 3], np.int32))
    space.drain()
    assert on_gpu(region, [1, 2])


def test_a_flush_leaves_only_the_padding(region: Region, residence: Residence) -> None:
    run(residence, region, "a", [1, 2, 3])
    residence.follow("b", [4, 5])
    residence.ensure({"b": 0})
    residence.reset()
    assert np.flatnonzero(region.where()).tolist() == [0]


def test_pages_that_were_prepared_are_there_and_taken_over(
    region: Region, residence: Residence
) -> None:
    free = np.array([1, 2], np.int32)
    assert residence.bare(free).tolist() == free.tolist()
    residence.prepare(free)
    residence.prepare(free)
    assert not len(residence.bare(free))
    run(residence, region, "other", [3, 4, 5])
    assert on_gpu(region, [1, 2]), "they stay while others come and go"
    run(residence, region, "a", [1, 2])
    run(residence, region, "b", [6, 7, 8, 9, 10])
    assert not on_gpu(region, [1, 2]), "and are like any other page once somebody had them"
    residence.follow("c", [1, 2])
    residence.ensure({"c": 2 * TOKENS})
    assert holds(region, [1, 2])


def test_prepared_pages_make_way_for_a_batch_of_the_whole_budget(
    region: Region, residence: Residence
) -> None:
    residence.prepare(np.array([1, 2, 3], np.int32))
    residence.follow("a", [3, 4, 5, 6, 7])
    assert residence.ensure({"a": 0}) == []
    fill(region, [3, 4, 5, 6, 7])
    assert holds(region, [3, 4, 5, 6, 7])
    assert (region.where([1, 2]) == Place.NONE).all()
    assert residence.bare(np.array([1, 2], np.int32)).tolist() == [1, 2]


def test_prepared_pages_make_way_for_a_prefix_that_is_matched(
    region: Region, residence: Residence
) -> None:
    prefix = np.array([4, 5, 6, 7], np.int32)
    run(residence, region, "a", prefix.tolist())
    residence.prepare(np.array([1, 2], np.int32))
    assert residence.hold(prefix, 1) == 4
    residence.ensure({})


def test_prepared_pages_that_are_never_used_are_vacant_again(
    space: Space, region: Region, residence: Residence
) -> None:
    residence.prepare(np.array([1, 2, 3], np.int32))
    residence.follow("a", [3])
    residence.release("a")
    residence.forget(np.array([3], np.int32))  # was handed out, and its request came to nothing
    assert (region.where([3]) == Place.NONE).all()
    residence.unprepare(np.array([2], np.int32))
    assert (region.where([2]) == Place.NONE).all()
    residence.reset()
    space.drain()
    assert (region.where([1, 2, 3]) == Place.NONE).all()


def test_what_is_freed_leaves_others_that_were_matched_where_they_are(
    region: Region, residence: Residence
) -> None:
    run(residence, region, "a", [1, 2, 3])
    assert residence.hold(np.array([1, 2, 3], np.int32), 4) == 3
    residence.forget(np.array([3], np.int32))
    residence.prepare(np.array([4, 5, 6], np.int32))
    assert on_gpu(region, [1, 2])
    with pytest.raises(TierFull):
        residence.prepare(np.array([7], np.int32))
    residence.ensure({})
    residence.unprepare()
