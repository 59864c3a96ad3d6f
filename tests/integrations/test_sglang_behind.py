"""A drive that writes slower than the engine computes: who waits for it, and what is dropped."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest

from tests.test_region import config
from tests.waiting import LONG_S, until
from tiermem.assemble import Parts, assemble
from tiermem.config import Evict
from tiermem.integrations import sglang_engine
from tiermem.integrations.sglang_engine import Engine, Identity, Usable
from tiermem.integrations.sglang_layout import PageMajor
from tiermem.integrations.sglang_pages import Pages
from tiermem.integrations.sglang_sizes import Sizes
from tiermem.testing import DelayedRoute
from tiermem.tier import Place

LAYOUT = PageMajor(parts=4, row_bytes=256, page_size=16, stride=4)
PAGE = LAYOUT.page_bytes
SIZES = Sizes(gpu=8, host=8, nvme=60)
BEHIND = 4
"""Pages on their way to the drive at most."""


def pages_of(*numbers: int) -> Pages:
    return np.array(numbers, np.int32)


class Drive:
    """Whose writes end when they are told to."""

    def __init__(self) -> None:
        self.writes: list[DelayedRoute] = []

    def slow(self, parts: Parts) -> Parts:
        for src in (Place.GPU, Place.HOST):
            parts.routes[src, Place.NVME] = route = DelayedRoute(parts.routes[src, Place.NVME])
            self.writes.append(route)
        return parts

    def catch_up(self) -> None:
        for route in self.writes:
            route.release()


@pytest.fixture
def drive(monkeypatch: pytest.MonkeyPatch) -> Drive:
    drive = Drive()
    monkeypatch.setattr("tiermem.space.assemble", lambda *given: drive.slow(assemble(*given)))
    monkeypatch.setattr(sglang_engine, "BACKLOG_BYTES", BEHIND * PAGE)
    return drive


@pytest.fixture
def engine(tmp_path: Path, drive: Drive) -> Iterator[Engine]:
    base = config(tmp_path, SIZES.gpu, SIZES.host, SIZES.nvme)
    given = msgspec.structs.replace(base, evict=Evict(gpu="lru", host="lru"))
    engine = Engine(given, LAYOUT, SIZES, Identity("rank0", {}), 60)
    engine.outpace()
    until(lambda: engine.space.statistics().tier(Place.HOST).capacity == SIZES.host)
    yield engine
    drive.catch_up()
    engine.residence.ensure({})
    engine.residence.release_others(())
    engine.region.unpin([0])
    while not engine.space.drain(0.01):
        drive.catch_up()
    engine.space.check()
    engine.space.close()


def compute(engine: Engine, request: str, pages: Pages) -> None:
    """A request that computes these pages, and goes on."""
    engine.residence.follow(request, pages.tolist())
    assert engine.residence.ensure({request: 0}) == []
    fill(engine, pages)


def fill(engine: Engine, pages: Pages) -> None:
    words = engine.region.view(np.int64)
    for page in pages.tolist():
        words[page] = 1000 + page


def holds(engine: Engine, pages: Pages) -> bool:
    words = engine.region.view(np.int64)
    return all((words[page] == 1000 + page).all() for page in pages.tolist())


def prompts(engine: Engine, first: int, count: int) -> None:
    """So many of five pages each, one after another."""
    for start in range(first, first + 5 * count, 5):
        compute(engine, f"r{start}", np.arange(start, start + 5, dtype=np.int32))
        engine.residence.release(f"r{start}")


def in_time(work: Callable[[], object]) -> bool:
    """Whether this ends by itself."""
    worker = threading.Thread(target=work, daemon=True)
    worker.start()
    worker.join(LONG_S)
    return not worker.is_alive()


def dropped(engine: Engine) -> int:
    return engine.space.statistics().counts.get("dropped", 0)


def test_no_prompt_waits_for_a_drive_that_is_behind(engine: Engine, drive: Drive) -> None:
    ended = in_time(lambda: prompts(engine, 1, 8))
    on_their_way = sum(route.held for route in drive.writes)
    drive.catch_up()
    assert ended
    assert on_their_way
    assert dropped(engine) > 0
    engine.space.drain()
    drops = dropped(engine)
    prompts(engine, 41, 1)
    drive.catch_up()
    engine.space.drain()
    assert engine.space.statistics().counts["outpaced"] >= drops


def test_what_a_request_was_matched_with_is_not_dropped_before_its_step(
    engine: Engine, drive: Drive
) -> None:
    prefix = pages_of(1, 2, 3)
    compute(engine, "a", prefix)
    engine.residence.release("a")
    prompts(engine, 11, 2)
    assert engine.residence.leading(prefix) == 3
    assert engine.usable(prefix) == Usable(3, 3)
    engine.residence.follow("b", [1, 2, 3, 31, 32, 33, 34])
    assert in_time(lambda: engine.residence.ensure({"b": 3 * 16}))
    assert engine.residence.ensure({"b": 3 * 16}) == []
    assert holds(engine, prefix)
    assert dropped(engine) > 0, "others made room"


def test_pages_of_a_request_that_makes_way_wait_for_the_drive(engine: Engine, drive: Drive) -> None:
    prompts(engine, 11, 5)
    waiting = pages_of(1, 2, 3, 4, 5, 6)
    compute(engine, "waits", waiting)
    spoiled: list[object] = []

    def work() -> None:
        compute(engine, "needs", np.arange(41, 48, dtype=np.int32))
        engine.residence.release("needs")
        prompts(engine, 51, 1)
        spoiled.extend(engine.residence.ensure({"waits": 96}))

    worker = threading.Thread(target=work, daemon=True)
    worker.start()
    while worker.is_alive():
        worker.join(0.01)
        drive.catch_up()
    assert engine.residence.let_go == 1
    assert not spoiled
    assert holds(engine, waiting)
    engine.residence.release("waits")
    assert in_time(lambda: prompts(engine, 11, 4)), "from now on nobody waits for it again"


def test_pages_that_do_not_fit_do_not_count_where_they_might_be_dropped(engine: Engine) -> None:
    prefix = pages_of(1, 2, 3)
    compute(engine, "a", prefix)
    engine.residence.release("a")
    compute(engine, "runs", pages_of(11, 12, 13, 14, 15, 16))
    assert engine.usable(prefix) == Usable(3, 1), "there is one frame for them"
    engine.residence.release("runs")
    assert engine.usable(prefix) == Usable(3, 3)
