"""A director and its ranks: bytes on the CPU device, over steps as an engine makes them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from random import Random

import numpy as np
import pytest

from tests.directed_ranks import PAGE, Ranks, ids, spoil
from tests.waiting import LONG_S
from tiermem.directed.director import Director
from tiermem.directed.orders import Report
from tiermem.errors import ConfigError, TierFull
from tiermem.plan import Outcome
from tiermem.tier import AT_NVME, NVME, Place


@pytest.fixture
def ranks() -> Iterator[Ranks]:
    made = Ranks()
    yield made
    made.close()


def test_units_go_down_and_come_back_with_their_bytes_on_every_rank(ranks: Ranks) -> None:
    ranks.write(1, 2, 3, 4, 5)
    ranks.leave(1, 2, 3, 4, 5)
    assert ranks.director.room() == 0
    ranks.director.make_room(3)
    ranks.settle()
    assert ranks.director.room() == 3
    ranks.write(10, 11, 12)
    look = ranks.director.look(ids(1, 2, 3, 4, 5))
    assert look.below.sum() == 3
    ranks.leave(10, 11, 12)
    ranks.director.make_room(3)
    ranks.settle()
    ranks.read(*[u for u in (1, 2, 3, 4, 5) if ranks.director.look(ids(u)).below[0]])
    ranks.director.check()


def test_a_load_from_the_host_is_ordered_before_the_step_that_needs_it(ranks: Ranks) -> None:
    ranks.write(1, 2)
    ranks.leave(1, 2)
    ranks.director.make_room(6)
    ranks.settle()
    ranks.write(3, 4, 5, 6, 7)  # steals the frames of 1 and 2
    ranks.leave(3, 4, 5, 6, 7)
    ranks.director.make_room(2)
    ranks.settle()
    ranks.director.enter(ids(1, 2))
    orders = ranks.step(read=ids(1, 2))
    assert set(orders.needs) <= {plan.id for plan in orders.plans}
    assert orders.needs, "the step waits for the load"


def test_a_unit_is_read_while_the_step_that_writes_it_is_under_way(ranks: Ranks) -> None:
    """Its writer is gone before anybody has heard that its frame is shown: aborted, say."""
    ranks.assign(10, 11)
    ranks.director.enter(ids(10, 11), "fresh")
    ranks.step(write=ids(10, 11))  # and nobody hears of it
    ranks.leave(10, 11)
    ranks.director.enter(ids(10, 11))
    ranks.step(read=ids(10, 11))
    ranks.hear()
    ranks.leave(10, 11)
    ranks.settle()
    ranks.read(10, 11)
    ranks.director.check()


def test_an_outcome_counts_when_all_ranks_have_reported_it(ranks: Ranks) -> None:
    ranks.write(1, 2, 3, 4, 5)
    ranks.leave(1, 2, 3, 4, 5)
    ranks.director.make_room(2)
    ranks.step()
    for rank in ranks.ranks:
        rank.wait(5)
    ranks.hear(ranks.ranks[:1])
    assert ranks.director.room() == 0
    ranks.hear(ranks.ranks[1:])
    assert ranks.director.room() == 2


def test_what_has_frames_already_costs_no_plan(ranks: Ranks) -> None:
    ranks.director.enter(ids(1, 2, 3), "fresh")
    orders = ranks.director.orders()
    assert (orders.plans, orders.needs) == ((), ())
    for rank in ranks.ranks:
        rank.carry(orders, None)


def test_units_beyond_the_room_are_refused_with_numbers(ranks: Ranks) -> None:
    ranks.write(1, 2, 3, 4, 5)
    ranks.leave(1, 2, 3, 4, 5)
    with pytest.raises(TierFull, match="1 pages are needed by the next step, and 0"):
        ranks.director.enter(ids(9), "fresh")


def test_worthless_units_give_their_frames_back_at_once(ranks: Ranks) -> None:
    ranks.write(1, 2, 3, 4, 5)
    ranks.leave(1, 2, 3, 4, 5, worthless=ids(4, 5))
    ranks.step()
    ranks.hear()
    ranks.step()
    assert ranks.director.room() == 2
    assert ranks.director.look(ids(4, 5)).gone.all()
    ranks.write(4)  # used again before and after
    ranks.director.check()


def test_a_unit_in_use_twice_stays_until_it_is_left_twice(ranks: Ranks) -> None:
    ranks.write(1)
    ranks.read(1)
    ranks.leave(1)
    ranks.director.make_room(6)
    ranks.settle()
    assert ranks.director.look(ids(1)).here[0]
    assert ranks.director.room() == 4, "six frames, but unit 0 and unit 1"
    ranks.leave(1)
    ranks.director.make_room(6)
    ranks.settle()
    assert ranks.director.room() == 5


def test_what_was_used_once_is_not_written_where_the_rule_wants_two_uses(tmp_path: Path) -> None:
    ranks = Ranks(budget=4, host=2, nvme=16, path=tmp_path, admit="second")
    ranks.settle()
    for unit in range(1, 9):
        ranks.ensure(1)
        ranks.write(unit)
        ranks.leave(unit)
    ranks.settle()
    assert ranks.director.residence()[NVME] == 0
    again = list(ranks.model)[-3:]  # the GPU holds them all
    ranks.bring(*again)
    ranks.step(read=ids(*again))
    ranks.leave(*again)
    for unit in range(9, 17):
        ranks.ensure(1)
        ranks.write(unit)
        ranks.leave(unit)
    ranks.settle()
    places, _ = ranks.director.chain(ids(*again))
    assert (places == NVME).all(), "used twice, and pushed out by what was used once"
    ranks.close()


def test_unit_0_never_leaves(ranks: Ranks) -> None:
    ranks.director.make_room(6)
    ranks.settle()
    assert ranks.director.look(ids(0)).here[0]
    assert ranks.director.in_use(ids(0))[0]


def test_when_everything_below_is_full_content_is_dropped_and_the_owner_told() -> None:
    ranks = Ranks(budget=4, host=2)
    for unit in range(1, 12):
        ranks.ensure(1)
        ranks.write(unit)
        ranks.leave(unit)
    assert ranks.gone, "4 + 2 places, 11 contents"
    assert {reason for _, reason in ranks.gone} == {"evicted"}
    for unit, _ in ranks.gone:
        assert ranks.director.look(ids(unit)).gone[0]
    for unit in list(ranks.model):
        ranks.bring(unit)
        if unit in ranks.model:  # else it made way for another
            ranks.read(unit)
            ranks.leave(unit)
            ranks.leave(unit)
    assert len(ranks.model) >= 4
    ranks.close()


def test_the_limit_moves_and_holds_on_every_rank() -> None:
    ranks = Ranks(budget=8, host=16)
    ranks.write(1, 2, 3, 4, 5, 6)
    ranks.leave(1, 2, 3, 4, 5, 6)
    ranks.director.limit(4 * ranks.layout.unit_bytes)
    ranks.settle()
    assert ranks.director.budget == 4
    assert ranks.director.statistics()["gpu_used"] <= 4
    ranks.director.limit(8 * ranks.layout.unit_bytes)
    ranks.settle()
    ranks.ensure(7)
    assert ranks.director.room() == 7
    with pytest.raises(ConfigError, match="1 to 8 can be"):
        ranks.director.limit(9 * ranks.layout.unit_bytes)
    ranks.close()


def test_a_step_without_work_passes_after_the_work_before_it() -> None:
    ranks = Ranks(ranks=1, queued=True)
    try:
        ranks.write(1, 2, 3)
        orders = ranks.director.orders()
        ranks.ranks[0].carry(orders, None)
        ranks.ranks[0].skip(orders.step)
        ranks.hear()
        assert ranks.director.passed == 0
        ranks.leave(1, 2, 3)  # behind the step that has no work
        ranks.director.make_room(6)
        ranks.step()
        ranks.ranks[0].wait(0.1)  # a copy that did not wait for the work would have ended
        ranks.hear()
        assert ranks.director.look(ids(1, 2, 3)).here.all()
        ranks.run()
        ranks.settle()
        assert ranks.director.passed >= orders.step
        ranks.bring(1, 2, 3)
        ranks.read(1, 2, 3)
    finally:
        ranks.close()


def test_nothing_is_dropped_while_the_host_tier_has_no_memory_yet() -> None:
    ranks = Ranks()
    try:
        hellos = [replace(h, ready={**h.ready, Place.HOST: 0}) for h in ranks.hellos]
        gone: list[int] = []
        director = Director(
            hellos, 24, 1, ranks.config, on_gone=lambda units, _: gone.extend(units.tolist())
        )
        director.enter(ids(1, 2, 3, 4, 5), "fresh")
        orders = director.orders()
        done = tuple(Outcome(p.id, tuple(None for _ in p.steps)) for p in orders.plans)
        for rank in range(2):
            growing = frozenset({Place.HOST})
            director.settle(Report(rank, 1, done, hellos[rank].ready, {}, growing=growing))
        director.leave(ids(1, 2, 3, 4, 5))
        director.make_room(6)
        assert gone == []
        for rank in range(2):
            ready = {**hellos[rank].ready, Place.HOST: 8}
            director.settle(Report(rank, 1, (), ready, {}))
        director.make_room(6)
        assert director.coming() == 5
        assert gone == []
    finally:
        ranks.close()


def test_headroom_is_kept_ahead_of_need() -> None:
    ranks = Ranks(budget=8, host=16, headroom=3)
    ranks.write(1, 2, 3, 4, 5, 6, 7)
    ranks.leave(1, 2, 3, 4, 5, 6, 7)
    ranks.settle()
    assert ranks.director.room() >= 3
    look = ranks.director.look(ids(1, 2, 3, 4, 5, 6, 7))
    assert (look.here | look.shown).all(), (
        "what left is still shown, and costs nothing to take back"
    )
    ranks.close()


@pytest.mark.parametrize("pieces", [1, 3], ids=["one-piece", "three-pieces"])
@pytest.mark.parametrize("count", [1, 2], ids=["one-rank", "two-ranks"])
@pytest.mark.parametrize("drive", [False, True], ids=["host", "host-nvme"])
@pytest.mark.parametrize("queued", [False, True], ids=["at-once", "queued"])
def test_random_steps_serve_no_wrong_bytes(
    pieces: int, count: int, drive: bool, queued: bool, tmp_path: Path
) -> None:
    """What an engine does, at random: new content, hits, fetches, ends, limits, reuse of blocks."""
    moved = 0
    for seed in range(3):
        random = Random(seed)
        ranks = Ranks(
            ranks=count, pieces=pieces, units=40, budget=10, host=9, seed=seed,
            nvme=20 if drive else 0, path=tmp_path / str(seed) if drive else None, queued=queued,
        )  # fmt: skip
        director, running, fetched = ranks.director, [], list[int]()
        for _ in range(120):
            for _ in range(random.randint(0, 2)):  # requests begin
                new = [u for u in random.sample(range(1, 40), 2) if not director.in_use(ids(u))[0]]
                new = [u for u in new if not director.look(ids(u)).coming[0]]
                cached = [u for u in ranks.model if u not in new]
                hits = random.sample(cached, min(len(cached), random.randint(0, 2)))
                look = director.look(ids(*hits))
                if look.coming.any():
                    continue
                if look.deep.any():
                    director.make_room(len(hits))
                    if len(set(hits)) < 6 - len(fetched) and director.fetch(ids(*hits)):
                        fetched += hits
                    continue
                idle = ids(*hits)[~director.in_use(ids(*hits))]
                look = director.look(idle)
                need = len(new) + int((look.below | look.shown).sum())
                if need > director.room():
                    director.make_room(need)
                    continue
                director.enter(ids(*hits))
                if need and director.room() < len(new):
                    director.leave(ids(*hits))
                    continue
                for unit in new:
                    ranks.model[unit] = ranks.next_value
                    ranks.next_value += 1
                director.enter(ids(*new), "fresh")
                running.append((new, hits))
            writes = ids(*{u for new, _ in running for u in new})
            reads = ids(*({u for _, hits in running for u in hits} - set(writes.tolist())))
            ranks.step(write=writes, read=reads)
            ranks.run(random.random())
            ranks.hear(random.sample(ranks.ranks, random.randint(0, count)))
            director.check()
            come = [u for u in fetched if not director.look(ids(u)).coming[0]]
            for unit in come:  # waited for by nobody any more
                fetched.remove(unit)
                director.leave(ids(unit))
            while running and random.random() < 0.6:  # requests end
                new, hits = running.pop(random.randrange(len(running)))
                worthless = ids(*[u for u in new if random.random() < 0.3])
                director.leave(ids(*new, *hits), worthless=worthless)
                for unit in worthless.tolist():
                    if not director.in_use(ids(unit))[0]:
                        ranks.model.pop(unit, None)
            if random.random() < 0.05:
                director.limit(random.randint(7, 10) * ranks.layout.unit_bytes)
        for new, hits in running:
            director.leave(ids(*new, *hits))
        for unit in fetched:
            director.leave(ids(unit))
        director.limit(10 * ranks.layout.unit_bytes)
        ranks.settle()
        for unit in list(ranks.model):
            ranks.bring(unit)
            if unit in ranks.model:
                ranks.read(unit)
                ranks.leave(unit)
                ranks.leave(unit)
            ranks.run()
        moved += director.statistics()["gpu_host"] + director.statistics().get("host_nvme", 0)
        ranks.close()
    assert moved > 60, "the tiers were hardly used"


def told_back(ranks: Ranks, name: str) -> list[int]:
    """Steps until every rank has told a request back; rows that failed on the first rank."""
    waiting, failed = {rank.rank for rank in ranks.ranks}, list[int]()
    deadline = time.monotonic() + LONG_S
    while time.monotonic() < deadline:
        ranks.step()
        ranks.run()
        for rank in ranks.ranks:
            rank.wait(0.05)
        ranks.hear()
        for rank in ranks.ranks:
            done, rows = rank.received()
            if name in done:
                waiting.remove(rank.rank)
            if rank is ranks.ranks[0]:
                failed += rows.tolist()
        if not waiting:
            return failed
    raise AssertionError(f"{name} is not told back by {waiting}")


def test_content_is_adopted_by_the_next_engine(tmp_path: Path) -> None:
    keys = np.arange(1, 13, dtype=np.uint64).reshape(6, 2)
    first = Ranks(budget=10, host=8, nvme=12, path=tmp_path, persist=True)
    first.write(1, 2, 3, 4, 5, 6)
    first.director.label(ids(1, 2, 3, 4, 5, 6), keys)
    first.leave(1, 2, 3, 4, 5, 6)
    first.settle()
    first.step()  # the last records
    values = {u: first.model[u] for u in range(1, 7)}
    first.close()
    second = Ranks(budget=10, host=8, nvme=12, path=tmp_path, persist=True)
    assert second.director.find(keys).tolist() == [AT_NVME] * 6
    taken = second.director.adopt(
        ids(11, 12, 13, 14, 15, 16), keys, "request",
        parents=ids(*[-1] * 6), depths=ids(*range(6)),
    )  # fmt: skip
    assert taken.all()
    assert told_back(second, "request") == []
    second.model = {10 + u: value for u, value in values.items()}
    second.step(read=ids(11, 12, 13, 14, 15, 16))
    second.director.check()
    second.close()


def test_forgotten_content_is_not_found_again(tmp_path: Path) -> None:
    keys = np.arange(1, 5, dtype=np.uint64).reshape(2, 2)
    for generation in range(3):
        ranks = Ranks(budget=10, host=8, nvme=12, path=tmp_path, persist=True)
        assert len(ranks.director.find(keys)) == (2 if generation == 1 else 0)
        ranks.write(1, 2)
        ranks.director.label(ids(1, 2), keys)
        ranks.leave(1, 2)
        ranks.settle()
        if generation == 1:
            ranks.director.forget_content()
            assert len(ranks.director.find(keys)) == 0
        ranks.step()
        ranks.close()


def test_a_rank_that_has_other_frames_is_refused() -> None:
    a, b = Ranks(ranks=1), Ranks(ranks=1, budget=5)
    with pytest.raises(ConfigError, match="ranks differ"):
        Director([*a.hellos, *b.hellos], 24, 1, a.config)
    a.close()
    b.close()


def test_places_are_counted(ranks: Ranks) -> None:
    ranks.write(1, 2)
    found = ranks.director.statistics()
    assert (found["gpu_used"], found["host_used"], found["in_use"]) == (3, 0, 3)


def test_content_that_turns_out_spoiled_keeps_its_frames_though_the_limit_has_fallen(
    tmp_path: Path,
) -> None:
    keys = np.arange(1, 7, dtype=np.uint64).reshape(3, 2)
    first = Ranks(budget=6, host=8, nvme=12, path=tmp_path, persist=True)
    first.write(1, 2, 3)
    first.director.label(ids(1, 2, 3), keys)
    first.leave(1, 2, 3)
    first.settle()
    first.step()
    first.close()
    spoil(tmp_path, 1.0, Random(0))
    second = Ranks(budget=6, host=8, nvme=12, path=tmp_path, persist=True)
    second.write(1, 2)
    wanted = ids(11, 12, 13)
    found = second.director.adopt(
        wanted, keys, "request", parents=ids(-1, 11, 12), depths=ids(0, 1, 2)
    )
    assert found.all()
    second.director.limit(3 * PAGE)  # what others use, and unit 0
    assert told_back(second, "request") == wanted.tolist()
    assert second.director.room() == 0
    assert second.director.mend(wanted).all()
    second.director.check()
    assert not second.director.mend(wanted).any(), "said once"
    second.assign(*wanted.tolist())
    second.step(write=wanted, read=ids(1, 2))
    second.step(read=wanted)
    second.leave(11, 12, 13)
    second.settle()
    second.settle()  # the step before has passed
    assert second.director.statistics()["gpu_used"] <= 3
    second.close()


def test_content_that_turns_out_spoiled_is_nothing_once_nobody_wants_it(tmp_path: Path) -> None:
    keys = np.arange(1, 3, dtype=np.uint64).reshape(1, 2)
    first = Ranks(budget=6, host=8, nvme=12, path=tmp_path, persist=True)
    first.write(1)
    first.director.label(ids(1), keys)
    first.leave(1)
    first.settle()
    first.step()
    first.close()
    spoil(tmp_path, 1.0, Random(0))
    second = Ranks(budget=6, host=8, nvme=12, path=tmp_path, persist=True)
    assert second.director.adopt(ids(11), keys, "r", parents=ids(-1), depths=ids(0)).all()
    assert told_back(second, "r") == [11]
    second.leave(11)  # aborted
    second.settle()
    second.settle()  # the step before has passed
    assert second.director.look(ids(11)).gone.all()
    second.close()


def test_content_that_cannot_be_had_is_told_back_and_computed_anew(tmp_path: Path) -> None:
    keys = np.arange(1, 5, dtype=np.uint64).reshape(2, 2)
    first = Ranks(budget=10, host=8, nvme=12, path=tmp_path, persist=True)
    first.write(1, 2)
    first.director.label(ids(1, 2), keys)
    first.leave(1, 2)
    first.settle()
    first.step()
    value = first.model[1]
    first.close()
    second = Ranks(budget=10, host=8, nvme=12, path=tmp_path, persist=True)
    second.write(11)
    second.leave(11, worthless=ids(11))  # as a tail without a hash that is given out again at once
    wanted = np.concatenate([keys[:1], keys[1:] + np.uint64(90)])  # the second was never stored
    found = second.director.adopt(
        ids(11, 12), wanted, "request", parents=ids(-1, 11), depths=ids(0, 1)
    )
    assert found.tolist() == [True, False]
    assert second.director.in_use(ids(11, 12)).all()
    assert told_back(second, "request") == [12]
    second.model = {11: value, 12: 77}
    second.step(write=ids(12), read=ids(11))
    second.step(read=ids(11, 12))
    second.director.check()
    second.leave(11, 12)
    for _ in range(3):
        second.settle()
    assert not second.director.look(ids(11, 12)).gone.any()
    second.close()
