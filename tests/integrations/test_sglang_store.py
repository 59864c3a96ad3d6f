"""Pages by name: they come back as they were put in, or not at all."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from tests.test_region import config
from tiermem.integrations.sglang_store import STAGED, PageStore, Spans
from tiermem.region import Region
from tiermem.space import Space

Open = Callable[..., PageStore]
PIECE = 3000


@pytest.fixture
def open_store(tmp_path: Path) -> Iterator[Open]:
    made: list[PageStore] = []

    def one(*, host: int = 0, nvme: int = 200, weights: str = "a") -> PageStore:
        base = config(tmp_path, 2 * STAGED, host, nvme)
        persist = msgspec.structs.replace(base.nvme, persist=bool(nvme))
        given = msgspec.structs.replace(base, nvme=persist)
        made.append(PageStore(given, 2 * PIECE, f"rank-{weights}", {"weights": weights}))
        return made[-1]

    yield one
    for store in made:
        store.close()


class Pool:
    """As HiCache's host pool: each page is two pieces, apart from one another."""

    def __init__(self, pages: int) -> None:
        self.bytes = np.zeros((2, pages, PIECE), np.uint8)

    def fill(self) -> None:
        numbers = np.arange(self.bytes.shape[1], dtype=np.uint8)
        self.bytes[0], self.bytes[1] = numbers[:, None] + 1, numbers[:, None] + 101

    def spans(self, *pages: int) -> list[Spans]:
        return [[(self.bytes[k, p].ctypes.data, PIECE) for k in range(2)] for p in pages]


def names(*numbers: int) -> list[str]:
    return [f"hash-{number}" for number in numbers]


def test_pages_come_back_as_they_were_put_in_from_whatever_tier(open_store: Open) -> None:
    store = open_store(host=20, nvme=200)
    count = 100
    pool = Pool(count)
    pool.fill()
    everything = list(range(count))
    assert store.put(names(*everything), pool.spans(*everything)) == [True] * count
    store.drain()
    assert store.leading(names(*everything)) == count
    back = Pool(count)
    assert store.get(names(*everything), back.spans(*everything)) == [True] * count
    assert (back.bytes == pool.bytes).all()


def test_what_is_not_here_ends_the_leading_run_and_is_a_miss(open_store: Open) -> None:
    store = open_store()
    pool = Pool(4)
    pool.fill()
    store.put(names(0, 1, 3), pool.spans(0, 1, 3))
    assert store.leading(names(0, 1, 2, 3)) == 2
    assert store.leading(names(2)) == 0
    assert store.get(names(0, 2, 3), Pool(4).spans(0, 2, 3)) == [True, False, True]


def test_a_name_that_is_put_twice_is_kept_once(open_store: Open) -> None:
    store = open_store()
    pool = Pool(2)
    pool.fill()
    assert store.put(names(0), pool.spans(0)) == [True]
    assert store.put(names(0, 1), pool.spans(1, 1)) == [True, True]
    back = Pool(1)
    store.get(names(0), back.spans(0))
    assert (back.bytes[:, 0] == pool.bytes[:, 0]).all()


def test_a_full_store_gives_up_what_was_used_longest_ago(open_store: Open) -> None:
    store = open_store(nvme=40)
    pool = Pool(200)
    pool.fill()
    for i in range(200):
        assert store.put(names(i), pool.spans(i)) == [True]
    store.drain()
    assert store.leading(names(0)) == 0
    assert store.leading(names(*range(190, 200))) == 10


class Fleeting:
    """A region whose pages are dropped as soon as nobody uses them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.on = False
        reserve, use = Space.reserve, Region.use

        def reserved(space: Space, nbytes: int, *, on_gone: Any, **given: Any) -> Region:
            self._on_gone = on_gone
            return reserve(space, nbytes, on_gone=on_gone, **given)

        @contextmanager
        def used(region: Region, pages: Any, *args: Any) -> Iterator[None]:
            with use(region, pages, *args):
                yield
            if self.on:
                region.free(pages)
                self._on_gone(pages, "dropped")

        monkeypatch.setattr(Space, "reserve", reserved)
        monkeypatch.setattr(Region, "use", used)


def test_a_page_that_is_dropped_at_once_takes_its_name_with_it(
    open_store: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    fleeting = Fleeting(monkeypatch)
    store = open_store(nvme=0)
    pool, back = Pool(4), Pool(4)
    pool.fill()
    fleeting.on = True
    store.put(names(0, 1), pool.spans(0, 1))
    fleeting.on = False
    assert store.leading(names(0)) == 0
    assert store.put(names(2, 3), pool.spans(2, 3)) == [True, True]  # over the same pages
    assert store.get(names(0, 1, 2, 3), back.spans(0, 1, 2, 3)) == [False, False, True, True]
    assert (back.bytes[:, 2:] == pool.bytes[:, 2:]).all()


def test_the_next_process_finds_what_is_on_the_drive(open_store: Open) -> None:
    store = open_store()
    pool = Pool(100)
    pool.fill()
    everything = list(range(100))
    store.put(names(*everything), pool.spans(*everything))
    store.drain()
    store.close()
    again = open_store()
    kept = [i for i in everything if again.leading(names(i))]
    assert len(kept) >= 100 - 2 * STAGED
    back = Pool(100)
    assert all(again.get(names(*kept), back.spans(*kept)))
    assert (back.bytes[:, kept] == pool.bytes[:, kept]).all()


def test_other_weights_never_find_it(open_store: Open) -> None:
    store = open_store()
    pool = Pool(1)
    pool.fill()
    store.put(names(0), pool.spans(0))
    assert open_store(weights="b").leading(names(0)) == 0


def test_bytes_that_are_not_as_written_are_a_miss_and_stay_one(
    open_store: Open, tmp_path: Path
) -> None:
    store = open_store()
    pool = Pool(100)
    pool.fill()
    everything = list(range(100))
    store.put(names(*everything), pool.spans(*everything))
    store.drain()
    slab = next((tmp_path / "slab").glob("*.slab"))
    raw = slab.read_bytes()
    at = raw.index(pool.bytes[0, 5].tobytes())
    with slab.open("r+b") as file:
        file.seek(at)
        file.write(b"\xff" * 16)
    assert store.get(names(5), Pool(1).spans(0)) == [False]
    assert store.leading(names(5)) == 0
    assert store.put(names(5), pool.spans(5)) == [True]
    back = Pool(1)
    assert store.get(names(5), back.spans(0)) == [True]
    assert (back.bytes[:, 0] == pool.bytes[:, 5]).all()
