"""Slots: used, kept or free, and whose."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest

from tiermem.errors import TierFull
from tiermem.testing import FakeMemory, FakeRoute, World
from tiermem.tier import PASSED, Finished, Orderable, Place, SlotPool, Slots


def ids(*slots: int) -> Slots:
    return np.array(slots, np.int32)


def test_a_reserve_is_all_or_nothing_and_says_the_numbers() -> None:
    pool = SlotPool(Place.HOST, 4)
    pool.keep(pool.take_free(1))
    pool.take_free(1)
    with pytest.raises(TierFull, match="host: need 3 slots, 2 free, 1 kept, 1 used of 4"):
        pool.take_free(3)
    assert (pool.free, pool.kept, pool.used) == (2, 1, 1)
    pool.check()


def test_kept_slots_are_taken_oldest_first_and_can_be_taken_back() -> None:
    pool = SlotPool(Place.HOST, 4)
    slots = pool.take_free(3)
    for i in (1, 0, 2):
        pool.keep(slots[i : i + 1])
    assert pool.oldest_kept().tolist() == slots[[1, 0, 2]].tolist()
    assert pool.oldest_kept(2).tolist() == slots[[1, 0]].tolist()
    pool.reuse(slots[:1])
    assert pool.oldest_kept().tolist() == slots[[1, 2]].tolist()
    pool.keep(slots[:1])
    assert pool.oldest_kept().tolist() == slots[[1, 2, 0]].tolist(), "the newest now"


def test_released_slots_belong_to_nobody() -> None:
    pool = SlotPool(Place.GPU, 2)
    slots = pool.take_free(2)
    pool.owner[slots] = [7, 8]
    pool.keep(slots[1:])
    pool.release(slots)
    assert pool.owner.tolist() == [-1, -1]
    assert (pool.free, pool.kept) == (2, 0)
    pool.check()


def test_slots_can_be_taken_away_while_free_and_come_back() -> None:
    pool = SlotPool(Place.GPU, 3)
    pool.take_free(1)
    gone = pool.remove(5)
    assert len(gone) == 2
    assert (pool.capacity, pool.free, pool.used) == (1, 0, 1)
    pool.add(gone)
    assert (pool.capacity, pool.free) == (3, 2)
    pool.add(ids(3, 4))
    assert sorted(pool.take_free(4).tolist()) == sorted([*gone.tolist(), 3, 4])
    pool.check()


def test_check_notices_a_slot_that_is_free_twice() -> None:
    pool = SlotPool(Place.GPU, 4)
    slots = pool.take_free(2)
    pool.release(slots[:1])
    pool.release(slots[:1])
    with pytest.raises(AssertionError, match="free twice"):
        pool.check()


@pytest.mark.parametrize("seed", range(10))
def test_used_kept_and_free_always_add_up(seed: int) -> None:
    random, pool = Random(seed), SlotPool(Place.NVME, 16)
    used: list[int] = []
    kept: list[int] = []
    away: list[int] = []
    for _ in range(300):
        verb = random.randrange(6)
        if verb == 0 and pool.free:
            used += pool.take_free(random.randint(1, pool.free)).tolist()
        elif verb == 1 and used:
            some = random.sample(used, random.randint(1, min(2, len(used))))
            used = [s for s in used if s not in some]
            pool.keep(ids(*some))
            kept += some
        elif verb == 2 and kept:
            some = random.sample(kept, random.randint(1, min(2, len(kept))))
            kept = [s for s in kept if s not in some]
            pool.reuse(ids(*some))
            used += some
        elif verb == 3 and used + kept:
            slot = random.choice(used + kept)
            (used if slot in used else kept).remove(slot)
            pool.release(ids(slot))
        elif verb == 4:
            away += pool.remove(random.randint(0, 2)).tolist()
        elif verb == 5 and away:
            pool.add(ids(*away))
            away = []
        pool.check()
        assert (pool.used, pool.kept) == (len(used), len(kept))
        assert pool.capacity == 16 - len(away)
        assert pool.oldest() == (kept[0] if kept else -1)
        assert pool.oldest_kept().tolist() == kept
        assert all(pool.is_kept(s) for s in kept)
        assert not any(pool.is_kept(s) for s in used)


def test_a_finished_done_has_ended() -> None:
    error = ValueError("why")
    done = Finished(error, np.array([True]))
    assert done.ready()
    assert done.wait(0.0)
    assert done.error is error
    assert done.failed is not None
    assert not isinstance(done, Orderable)


def test_a_load_that_streams_can_wait_for_says_so() -> None:
    world = World()
    host, gpu = FakeMemory(Place.HOST, 2), FakeMemory(Place.GPU, 2)
    done = FakeRoute(world, host, gpu).submit(ids(0), ids(1), PASSED)
    assert isinstance(done, Orderable)
