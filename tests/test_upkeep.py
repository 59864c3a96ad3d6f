"""What goes on beside an engine that makes no steps."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.directed_ranks import Ranks, ids
from tiermem import directed
from tiermem.directed.orders import Report
from tiermem.directed.turns import Turns
from tiermem.directed.upkeep import Upkeep


def eventually(condition: Callable[[], bool], what: str) -> None:
    until = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < until, what
        time.sleep(0.002)


def locked(ranks: Ranks, look: Callable[[], int]) -> int:
    with ranks.ranks[0].turns.lock:
        return look()


def test_content_is_saved_while_no_steps_are_made(tmp_path: Path) -> None:
    ranks = Ranks(ranks=1, nvme=24, path=tmp_path, persist=True)
    upkeep = Upkeep(ranks.ranks[0])
    try:
        ranks.write(1, 2, 3)
        ranks.leave(1, 2, 3)
        ranks.director.label(ids(1, 2, 3), np.arange(6, dtype=np.uint64).reshape(3, 2))
        assert ranks.director.unsaved() == 3
        upkeep.start(ranks.director)
        eventually(lambda: locked(ranks, ranks.director.unsaved) == 0, "it is not saved")
        assert upkeep.error is None
    finally:
        upkeep.close()
        ranks.close()


def test_headroom_is_made_while_no_steps_are_made() -> None:
    ranks = Ranks(ranks=1, budget=10, headroom=3)
    upkeep = Upkeep(ranks.ranks[0])
    try:
        ranks.write(*range(1, 10))
        ranks.leave(*range(1, 10))
        assert ranks.director.room() == 0
        upkeep.start(ranks.director)
        eventually(lambda: locked(ranks, ranks.director.room) >= 3, "no room is made")
        with ranks.ranks[0].turns.lock:
            ranks.director.check()
    finally:
        upkeep.close()
        ranks.close()


def test_nothing_is_ordered_while_a_step_is_under_way() -> None:
    ranks = Ranks(ranks=1)
    upkeep = Upkeep(ranks.ranks[0])
    turns = ranks.ranks[0].turns
    try:
        upkeep.start(ranks.director)
        eventually(lambda: ranks.director.step > 0, "no steps are made")
        turns.begin()
        step = ranks.director.step
        upkeep.wake()
        time.sleep(0.25)  # more than two looks of a thread that has nothing to do
        assert ranks.director.step == step
        turns.end()
        eventually(lambda: ranks.director.step > step, "it does not go on")
    finally:
        upkeep.close()
        ranks.close()


def test_nothing_is_ordered_again_until_something_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or others wake it, or the engine makes a step, or a while has passed."""
    monkeypatch.setattr(directed.upkeep, "REST_S", 1000.0)
    ranks = Ranks(ranks=1)
    rank, director, turns = ranks.ranks[0], ranks.director, ranks.ranks[0].turns
    upkeep = Upkeep(rank)
    report, reports = rank.report, [0]

    def counted() -> Report:
        reports[0] += 1
        return report()

    def look() -> None:
        seen = reports[0]
        eventually(lambda: reports[0] > seen + 5, "it does not look")

    def rests() -> int:
        """The last step, once it has looked several times since."""
        while True:
            step = director.step
            look()
            if director.step == step:
                return step

    monkeypatch.setattr(rank, "report", counted)
    monkeypatch.setattr(director, "is_idle", lambda: False)
    try:
        upkeep.start(director)
        step = rests()
        upkeep.wake()
        eventually(lambda: director.step > step, "it was not woken")
        step = rests()
        turns.begin()
        turns.end()
        eventually(lambda: director.step > step, "nothing is ordered after a step of the engine")
        step = rests()
        with turns.lock:
            ranks.write(1)
            ranks.leave(1)
            director.make_room(director.budget)
            ranks.step()
            ended = director.step
        eventually(lambda: director.step > ended, "the end of a copy is no news")
    finally:
        upkeep.close()
        ranks.close()


def test_what_upkeep_stops_at_is_kept_for_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = Ranks(ranks=1)
    upkeep = Upkeep(ranks.ranks[0])
    try:
        monkeypatch.setattr(ranks.director, "settle", broken)
        upkeep.start(ranks.director)
        eventually(lambda: upkeep.error is not None, "no error is kept")
        assert str(upkeep.error) == "broken"
    finally:
        upkeep.close()
        ranks.close()


def broken(*_: object) -> None:
    raise RuntimeError("broken")


def test_upkeep_ends_with_its_rank() -> None:
    ranks = Ranks(ranks=1)
    upkeep = Upkeep(ranks.ranks[0])
    upkeep.start(ranks.director)
    ranks.close()
    name = "tiermem-upkeep"
    eventually(lambda: all(t.name != name for t in threading.enumerate()), "it runs on")
    assert upkeep.error is None
    upkeep.close()


def test_a_step_begins_after_a_turn_of_upkeep_has_ended() -> None:
    turns = Turns()
    begun = threading.Event()

    def begin() -> None:
        turns.begin()
        begun.set()

    with turns.lock:
        thread = threading.Thread(target=begin)
        thread.start()
        assert not begun.wait(0.05)
        assert not turns.under_way
    thread.join()
    assert turns.under_way
