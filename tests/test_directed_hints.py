"""What a director tells of its routes and units, and what it is told: marks and expectations."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from tests.directed_ranks import Ranks, ids
from tiermem.config import Prefetch
from tiermem.directed.orders import Moved, Report
from tiermem.directed.paces import Paces
from tiermem.facts import Expected
from tiermem.tier import GPU, HOST, NVME, Place

PAGE = 4096
UP = (NVME, GPU)


def report(rank: int, pages: int, busy_s: float) -> Report:
    moved = Moved(pages, busy_s + 0.1, busy_s)
    return Report(rank, 0, (), {}, {UP: moved, (HOST, GPU): Moved(0, 0.0)})


def test_a_route_is_as_fast_as_its_slowest_rank_of_late() -> None:
    paces = Paces([UP, (HOST, GPU), (GPU, HOST)], 1_000_000)
    assert paces.gbps() == {HOST: math.inf, NVME: math.inf}
    paces.observe(report(0, 100, 0.1))
    paces.observe(report(1, 100, 0.4))
    assert paces.gbps() == {HOST: math.inf, NVME: pytest.approx(0.25)}
    paces.observe(report(1, 100, 0.4))
    assert paces.gbps()[NVME] == pytest.approx(0.25), "nothing has moved since"
    total = paces.totals()[UP]
    assert total.pages == 200
    assert total.busy_s == pytest.approx(0.7)
    paces.observe(report(0, 200, 0.1))
    assert paces.gbps()[NVME] == pytest.approx(0.25), "what ended between two looks is not slow"
    paces.observe(report(1, 10_100, 10.4))
    assert paces.gbps()[NVME] == pytest.approx(1.0, rel=0.05), "the latest counts most"


def test_where_a_chain_is_and_how_fast_it_would_come(tmp_path: Path) -> None:
    ranks = Ranks(budget=4, host=2, nvme=16, path=tmp_path)
    director = ranks.director
    assert director.speeds()[NVME].gbps == math.inf
    for unit in range(1, 9):
        ranks.ensure(1)
        ranks.write(unit)
        ranks.leave(unit)
    ranks.settle()
    before = director.residence()
    assert before[NVME] > 0
    every = ids(*ranks.model)  # the drive may have had no memory yet for the first of them
    assert sum(before[p] for p in (GPU, HOST, NVME)) == len(every) + 1, "with unit 0"
    look = director.look(every)
    places, nbytes = director.chain(every)
    assert (places == NVME).tolist() == look.deep.tolist()
    assert set(nbytes.tolist()) == {PAGE}
    deep = int(every[look.deep][0])
    ranks.bring(deep)
    assert director.moved()[UP].pages == 2, "one page, two ranks"
    assert director.moved()[UP].busy_s > 0
    assert director.speeds()[NVME].queued_bytes == 0
    ranks.close()


def test_what_is_retained_leaves_after_what_is_not() -> None:
    ranks = Ranks(budget=6, host=8)
    ranks.write(1, 2, 3, 4, 5)
    ranks.leave(1, 2, 3, 4, 5)
    ranks.director.retain(ids(1, 2), 50, 0.0)
    ranks.director.retain(ids(3), 0, 1000.0)
    ranks.director.make_room(2)
    ranks.settle()
    look = ranks.director.look(ids(1, 2, 3, 4, 5))
    assert look.here.tolist() == [True, True, True, False, False]
    ranks.director.make_room(5)
    ranks.settle()
    assert not ranks.director.look(ids(1, 2, 3)).here.any(), "nothing else may leave"
    ranks.close()


def test_without_marks_the_oldest_leave_first() -> None:
    """What the test above would see if `retain` did nothing."""
    ranks = Ranks(budget=6, host=8)
    ranks.write(1, 2, 3, 4, 5)
    ranks.leave(1, 2, 3, 4, 5)
    ranks.director.make_room(2)
    ranks.settle()
    assert not ranks.director.look(ids(1, 2)).here.any()
    ranks.close()


@pytest.mark.parametrize(("name", "come"), [("hint", True), ("off", False)])
def test_units_of_a_session_that_is_due_come_up_within_the_budget(name: str, come: bool) -> None:
    ranks = Ranks(budget=6, host=16, prefetch=Prefetch(name=name, budget=2 * PAGE))
    ranks.write(1, 2, 3, 4, 5)
    ranks.leave(1, 2, 3, 4, 5)
    ranks.ensure(5)
    ranks.write(10, 11)  # frames of others, so that the session's are not shown any more
    ranks.write(12, 13, 14)
    ranks.leave(10, 11, 12, 13, 14)
    ranks.ensure(5)
    chain = ids(1, 2, 3)
    assert ranks.director.look(chain).below.all()
    ranks.director.foresee(Expected(1, chain, 1.0, 0.9), chain)
    ranks.settle()
    assert ranks.director.look(chain).here.tolist() == [come, come, False]
    ranks.director.check()
    ranks.read(*(u for u in (1, 2) if come))
    ranks.close()


def test_events_are_counted_by_name() -> None:
    ranks = Ranks(budget=4, host=2)
    for unit in range(1, 12):
        ranks.ensure(1)
        ranks.write(unit)
        ranks.leave(unit)
    assert ranks.director.events()["dropped"] > 0
    assert ranks.director.residence()[Place.HOST] <= 2
    ranks.close()


def test_units_that_are_given_up_hold_nothing_unless_they_are_in_use(tmp_path: Path) -> None:
    ranks = Ranks(budget=4, host=2, nvme=16, path=tmp_path)
    ranks.settle()
    ranks.write(1, 2, 3)
    ranks.leave(1, 2, 3)
    ranks.director.make_room(2)
    ranks.settle()
    ranks.director.enter(ids(2))
    ranks.director.give_up(ids(1, 2, 3))
    assert ranks.director.look(ids(1, 2, 3)).gone.tolist() == [True, False, True]
    assert ranks.gone == [], "its owner said so"
    ranks.director.check()
    ranks.step(read=ids(2))
    ranks.leave(2)
    ranks.close()
