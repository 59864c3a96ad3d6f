"""Directors whose host tiers are parts of one pool: chunks follow demand, and no byte is wrong."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.directed_soak import Steps
from tests.sharing_soak import PAGE, PAGES
from tests.test_pooling import home, members, memory
from tests.waiting import until
from tiermem.board import board_bytes
from tiermem.host import pinned
from tiermem.ledger import Ledger
from tiermem.pooling import Pooling
from tiermem.tier import Place

__all__ = ["home"]

POOL = 256  # pages; a chunk is four of them
CHUNK = 4


@contextmanager
def engine(name: str, idle_s: float = 0.5) -> Iterator[Steps]:
    steps = Steps(name, POOL, idle_s)
    try:
        yield steps
        steps.check()
    finally:
        steps.close()


def fill(steps: Steps, units: range) -> None:
    for first in range(units.start, units.stop, 20):
        assert steps.write(list(range(first, min(first + 20, units.stop))))


def verify(steps: Steps, units: range) -> None:
    for first in range(units.start, units.stop, 20):
        wanted = list(range(first, min(first + 20, units.stop)))
        assert steps.read(wanted) == len(wanted)


def test_the_host_tier_grows_with_what_goes_down_and_nothing_is_dropped(home: Path) -> None:
    with engine("chat") as chat:
        until(lambda: members(home)["chat"].held == CHUNK * PAGE)
        fill(chat, range(1, 280))
        assert chat.ranks.gone == []
        assert members(home)["chat"].held >= (280 - PAGES) * PAGE
        verify(chat, range(1, 280))
        table = board_bytes(POOL * PAGE)
        until(lambda: 0 <= memory(home) - members(home)["chat"].held <= table)
    assert Ledger.found(home) == []


def test_host_memory_moves_from_an_idle_engine_to_one_that_needs_it(home: Path) -> None:
    with engine("chat", idle_s=0.3) as chat, engine("code", idle_s=60.0) as code:
        fill(chat, range(1, 280))
        before = members(home)["chat"].held
        assert before >= (280 - PAGES) * PAGE
        until(lambda: members(home)["chat"].wanted <= CHUNK * PAGE)

        def has_some() -> bool:
            fill(code, range(1, 280))
            return members(home)["code"].held > POOL * PAGE - before

        until(has_some)
        held = members(home)
        assert held["chat"].held < before
        assert held["chat"].held + held["code"].held <= POOL * PAGE
        for steps in (chat, code):  # a full pool drops the coldest pages for others to come down
            newest = sorted(steps.ranks.model)[-40:]
            assert sum(steps.read(newest[i : i + 10]) for i in range(0, len(newest), 10)) > 0
        assert chat.ranks.director.events().get("host_host", 0) > 0, "pages move before the end"


def test_an_engine_that_waits_for_chunks_drops_nothing(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory comes slowly; pages that must leave wait for it, and so do those who need room."""
    populate, may_go_on = pinned._populate, threading.Event()

    def slow(address: int, nbytes: int) -> None:
        assert may_go_on.wait(20)
        populate(address, nbytes)

    monkeypatch.setattr("tiermem.membership.EXPECT_S", 0.0)
    with engine("chat") as chat:
        until(lambda: members(home)["chat"].held == CHUNK * PAGE)
        fill(chat, range(1, PAGES))
        monkeypatch.setattr(pinned, "_populate", slow)
        director = chat.ranks.director
        assert chat.until(
            lambda: not chat.has_room(40) and director.residence()[Place.HOST] == CHUNK
        )
        assert director.coming() > 0, "who needs room waits for it"
        chat.take()
        assert chat.ranks.gone == []
        may_go_on.set()
        fill(chat, range(PAGES, PAGES + 60))
        assert chat.ranks.gone == []
        verify(chat, range(1, PAGES + 60))


def test_a_step_that_needs_no_chunk_does_nothing_for_the_pool(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tiermem.pooling.TURN_EVERY_S", 1e9)
    turn, turns = Pooling.turn, list[bool]()

    def counted(self: Pooling, *given: Any) -> bool:
        turns.append(turn(self, *given))
        return turns[-1]

    monkeypatch.setattr(Pooling, "turn", counted)
    with engine("chat", idle_s=60.0) as chat:
        until(lambda: members(home)["chat"].held == CHUNK * PAGE)
        fill(chat, range(1, PAGES))
        until(lambda: not turns[-1])  # nothing is under way
        turns.clear()
        for _ in range(50):
            assert chat.read([1, 2, 3]) == 3
        assert turns == []
        fill(chat, range(PAGES, PAGES + 40))
        assert turns
        assert chat.ranks.gone == []
