"""One rank's engine without SGLang: buffers, prefixes, what is kept, and what is lost."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from tests.test_region import config
from tests.waiting import until
from tiermem.config import Config, Evict
from tiermem.errors import ConfigError
from tiermem.integrations import sglang_engine
from tiermem.integrations.sglang_engine import Engine, Identity, Usable
from tiermem.integrations.sglang_layout import PageMajor
from tiermem.integrations.sglang_pages import Arrived, Pages
from tiermem.integrations.sglang_sizes import Sizes, opened, plan, rank_config
from tiermem.integrations.sglang_speed import PrefillSpeed
from tiermem.nvme.cap import bytes_for
from tiermem.tier import Place

LAYOUT = PageMajor(parts=4, row_bytes=256, page_size=16, stride=4)
PAGE = LAYOUT.page_bytes
SIZES = Sizes(gpu=8, host=0, nvme=60)
PAGES = 40
TOKENS = list(range(1000, 1160))
"""Ten pages."""

Open = Callable[..., Engine]


def pages_of(*numbers: int) -> Pages:
    return np.array(numbers, np.int32)


@pytest.fixture
def open_engine(tmp_path: Path) -> Iterator[Open]:
    made: list[Engine] = []

    def one(
        *,
        persist: bool = True,
        fingerprint: str = "a",
        step_tokens: int = 0,
        host: int = 0,
        drive: int = SIZES.nvme,
    ) -> Engine:
        base = config(tmp_path, SIZES.gpu, host, drive)
        nvme = msgspec.structs.replace(base.nvme, persist=persist) if drive else base.nvme
        given = msgspec.structs.replace(base, nvme=nvme, evict=Evict(gpu="lru", host="lru"))
        identity = Identity("rank0", {"weights": fingerprint})
        sizes = Sizes(SIZES.gpu, host, drive)
        engine = Engine(given, LAYOUT, sizes, identity, PAGES, step_tokens)
        made.append(engine)
        until(lambda: engine.space.statistics().tier(Place.HOST).capacity == host)
        return engine

    yield one
    for engine in made:
        close(engine)


def close(engine: Engine) -> None:
    """As no engine does: a process that serves just ends."""
    if engine.space.statistics().pages and not getattr(engine, "closed", False):
        engine.residence.ensure({})  # a step, which ends what was matched for it
        engine.residence.release_others(())
        if engine.region.where([0])[0] == Place.GPU:
            engine.region.unpin([0])
        engine.space.check()
        engine.space.close()


def compute(engine: Engine, request: str, pages: Pages, tokens: list[int]) -> None:
    """A request that computes these pages, is named, and ends."""
    engine.residence.follow(request, pages.tolist())
    engine.residence.ensure({request: 0})
    words = engine.region.view(np.int64)
    for i, page in enumerate(pages.tolist()):
        words[page] = tokens[i * 16]
    engine.label(request, tokens[: len(pages) * 16], None)
    engine.release(request)


def reads(engine: Engine, pages: Pages, tokens: list[int]) -> bool:
    engine.residence.follow("reader", pages.tolist())
    assert engine.residence.ensure({"reader": len(pages) * 16}) == []
    words = engine.region.view(np.int64)
    right = all((words[p] == tokens[i * 16]).all() for i, p in enumerate(pages.tolist()))
    engine.release("reader")
    return right


def push_out(engine: Engine, first: int = 20) -> None:
    """Fill the GPU with other pages, so that what was there is on the drive."""
    for start in range(first, first + 18, 6):
        run = list(range(start, start + 6))
        engine.residence.follow("other", run)
        engine.residence.ensure({"other": 0})
        engine.residence.release("other")
    engine.space.drain()


def test_every_part_of_a_layer_is_a_tensor_that_writes_into_its_own_block(
    open_engine: Open,
) -> None:
    torch = pytest.importorskip("torch")
    engine = open_engine()
    parts = [engine.buffer(i, torch.float32, (2, 32)) for i in range(4)]
    engine.residence.follow("a", [3])
    engine.residence.ensure({"a": 0})
    index = int(engine.first_indices(pages_of(3))[0])
    for i, part in enumerate(parts):
        assert part.is_contiguous()
        part[index : index + 16] = i + 1
    row = engine.region.view(np.float32)[3].reshape(4, -1)
    assert [set(block.tolist()) for block in row] == [{1.0}, {2.0}, {3.0}, {4.0}]
    engine.region.view()[0] = 255
    engine.blank_padding(parts[0])
    assert not engine.region.view()[0].any()
    assert engine.page_numbers(np.array([index, index + 15])).tolist() == [3, 3]


def test_a_prefix_on_the_drive_is_read_before_it_counts(open_engine: Open) -> None:
    engine = open_engine(persist=False)
    pages = pages_of(1, 2, 3)
    compute(engine, "a", pages, TOKENS)
    push_out(engine)
    assert (engine.region.where(pages) == Place.NVME).all()
    assert engine.usable(pages) == Usable(3, 3)
    assert (engine.region.where(pages) != Place.NVME).all()
    assert reads(engine, pages, TOKENS)


def test_a_prefix_counts_up_to_the_first_page_that_is_lost_on_any_rank(open_engine: Open) -> None:
    engine = open_engine(persist=False)
    pages = pages_of(1, 2, 3, 4)
    compute(engine, "a", pages, TOKENS)
    engine.agree = lambda numbers: [min(n, 3) for n in numbers]  # another rank has lost page 4
    assert engine.usable(pages) == Usable(3, 3)
    engine.residence.ensure({})  # a step, until which they stay
    engine.residence.gone(pages_of(2), "dropped")
    assert engine.usable(pages) == Usable(1, 1)
    assert engine.usable(pages_of()) == Usable(0, 0)
    engine.region.free([2])


def test_what_is_sooner_computed_than_read_from_the_drive_stays_there(open_engine: Open) -> None:
    engine = open_engine(persist=False)
    pages = pages_of(1, 2, 3)
    compute(engine, "a", pages, TOKENS)
    push_out(engine)
    engine.usable(pages[:1])  # measures the route
    clock = [0.0]
    engine.speed = PrefillSpeed(lambda: clock[0])
    engine.speed.launched(1 << 40)
    clock[0] = 1e-3
    engine.speed.finished()
    assert engine.usable(pages) == Usable(3, 1)
    assert (engine.region.where(pages[1:]) == Place.NVME).all()
    engine.speed = PrefillSpeed(lambda: clock[0])
    engine.speed.launched(1 << 10)
    clock[0] += 1e6
    engine.speed.finished()
    assert engine.usable(pages) == Usable(3, 3)


def test_a_page_whose_bytes_on_the_drive_are_not_as_written_is_lost(
    open_engine: Open, tmp_path: Path
) -> None:
    engine = open_engine()
    pages = pages_of(1, 2, 3)
    compute(engine, "a", pages, TOKENS)
    push_out(engine)
    slab = next((tmp_path / "slab").glob("*.slab"))
    raw = bytearray(slab.read_bytes())
    wanted = np.full(8, TOKENS[16], np.int64).tobytes()  # page 2
    at = raw.index(wanted)
    with slab.open("r+b") as file:
        file.seek(at)
        file.write(b"\xff" * 8)
    assert engine.usable(pages) == Usable(1, 1)
    assert reads(engine, pages[:1], TOKENS)
    engine.residence.forget(pages[1:])  # the tree gives it up, and the numbers are used again
    compute(engine, "b", pages[1:], TOKENS[16:])
    assert reads(engine, pages, TOKENS)


def test_what_was_named_is_taken_over_by_the_next_process(open_engine: Open) -> None:
    engine = open_engine()
    compute(engine, "a", pages_of(1, 2, 3), TOKENS)
    push_out(engine)
    close(engine)
    engine.closed = True  # type: ignore[attr-defined]
    again = open_engine()
    assert again.kept(TOKENS, None, 0, 9) == 3
    assert again.kept(TOKENS, "lora", 0, 9) == 0
    assert again.kept([7, *TOKENS[1:]], None, 0, 9) == 0
    pages = pages_of(11, 12, 13)
    assert again.adopt(TOKENS, None, 0, pages) == 3
    assert again.usable(pages) == Usable(3, 3)
    assert reads(again, pages, TOKENS)


def test_a_slab_of_other_weights_is_refused(open_engine: Open) -> None:
    engine = open_engine()
    close(engine)
    engine.closed = True  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match="weights"):
        open_engine(fingerprint="b")


def test_what_the_tree_gives_up_comes_back_by_its_name(open_engine: Open) -> None:
    engine = open_engine()
    free = engine.free_pages()
    pages = free.take(3)
    assert pages is not None
    compute(engine, "a", pages, TOKENS)
    push_out(engine)
    free.give(Arrived(pages))
    free.settle()
    assert (engine.region.where(pages) == Place.NONE).all()


def test_after_a_flush_nothing_that_was_kept_is_found(open_engine: Open) -> None:
    engine = open_engine()
    engine.free_pages()
    compute(engine, "a", pages_of(1, 2, 3), TOKENS)
    push_out(engine)
    engine.residence.forget(pages_of(1, 2, 3))
    engine.space.drain()
    assert engine.kept(TOKENS, None, 0, 9) == 3
    engine.free_pages()  # weights may be others now
    assert engine.kept(TOKENS, None, 0, 9) == 0
    compute(engine, "b", pages_of(4, 5), TOKENS)
    assert engine.kept(TOKENS, None, 0, 9) == 2


def test_a_budget_that_changed_is_taken_over_in_the_same_round_by_all(open_engine: Open) -> None:
    engine = open_engine()
    assert engine.gates.resident_tokens() == 7 * 16
    engine.space.limit(5 * PAGE)
    engine.look()
    assert engine.gates.resident_tokens() == 4 * 16
    asked: list[int] = []

    def agree(numbers: list[int]) -> list[int]:
        asked.extend(numbers)
        return [4]

    engine.agree = agree
    for _ in range(32):
        engine.look()
    assert asked == [5, 5]
    assert engine.gates.resident_tokens() == 3 * 16


def test_frames_for_two_steps_are_free_or_behind_free_pages(open_engine: Open) -> None:
    engine = open_engine(step_tokens=32)
    free = engine.free_pages()
    pages = free.take(7)
    assert pages is not None
    compute(engine, "long", pages, TOKENS)

    def frames(used: int) -> bool:  # the mover's turn
        return engine.space.statistics().tier(Place.GPU).used == used

    until(lambda: frames(6))
    engine.prepare(free)
    assert (engine.region.where(free.next(2)) == Place.GPU).all()
    until(lambda: frames(6))
    assert reads(engine, pages, TOKENS)


@pytest.mark.parametrize("count", [2, 6], ids=["few", "many"])
def test_what_the_next_batch_reads_comes_in_one_group_with_the_frames_of_free_pages(
    open_engine: Open, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    monkeypatch.setattr(sglang_engine, "PREPARED", 1)
    engine = open_engine(step_tokens=32, persist=False, host=40, drive=0)
    free = engine.free_pages()
    pages = free.take(7)
    assert pages is not None
    compute(engine, "long", pages, TOKENS)
    push_out(engine)
    ahead = free.next(2)
    while (engine.region.where(ahead) != Place.GPU).any():
        until(lambda: engine.space.ready() >= 1)  # the mover's turn
        engine.prepare(free)
    until(lambda: engine.space.ready() >= 2)
    groups: list[list[int]] = []
    pin = engine.region.pin

    def noted(some: Pages, *args: Any, **kwargs: Any) -> None:
        groups.append(some.tolist())
        pin(some, *args, **kwargs)

    monkeypatch.setattr(engine.region, "pin", noted)
    engine.bring(pages[:count], free)
    engine.space.drain()
    assert groups == [pages[:count].tolist()]
    assert (engine.region.where(pages[:count]) == Place.GPU).all()
    kept = engine.region.where(ahead) == Place.GPU
    assert kept.tolist() == [True, count == 2]
    assert reads(engine, pages, TOKENS)


def test_what_is_brought_for_a_batch_in_which_it_is_not_may_leave_after_it(
    open_engine: Open,
) -> None:
    engine = open_engine(persist=False, host=40, drive=0)
    free = engine.free_pages()
    pages = free.take(5)
    assert pages is not None
    compute(engine, "a", pages, TOKENS)
    push_out(engine)
    engine.bring(pages, free)
    engine.residence.ensure({})
    push_out(engine)
    assert (engine.region.where(pages) != Place.GPU).any()
    assert reads(engine, pages, TOKENS)


def test_what_is_on_a_drive_is_only_hinted_at(
    open_engine: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = open_engine(persist=False)
    free = engine.free_pages()
    pages = free.take(5)
    assert pages is not None
    compute(engine, "a", pages, TOKENS)
    push_out(engine)
    held: list[int] = []
    monkeypatch.setattr(engine.residence, "hold", lambda *given: held.append(1))
    engine.bring(pages, free)
    engine.space.drain()
    assert not held


def test_an_idle_engine_has_memory_for_the_pages_that_are_taken_next(open_engine: Open) -> None:
    engine = open_engine(persist=False)
    free = engine.free_pages()
    engine.prepare(free)
    assert (engine.region.where([1, 2]) == Place.GPU).all()
    assert (engine.region.where([3, 4]) == Place.NONE).all(), "a quarter of the budget at most"
    pages = free.take(3)
    assert pages is not None
    compute(engine, "a", pages, TOKENS)
    engine.prepare(free)
    assert (engine.region.where([4, 5]) == Place.GPU).all()
    engine.space.limit(7 * PAGE)
    engine.look()
    assert (engine.region.where([4, 5]) == Place.NONE).all(), "they are not in the way of a limit"
    assert reads(engine, pages, TOKENS)


def test_pages_that_have_memory_already_take_over_what_the_drive_has_kept(
    open_engine: Open,
) -> None:
    engine = open_engine()
    compute(engine, "a", pages_of(11, 12, 13), TOKENS)
    push_out(engine)
    engine.residence.forget(pages_of(11, 12, 13))
    engine.space.drain()
    engine.residence.prepare(pages_of(1, 2))
    assert engine.adopt(TOKENS, None, 0, pages_of(1, 2, 3)) == 3
    assert reads(engine, pages_of(1, 2, 3), TOKENS)


# ---------------------------------------------------------------- sizes


def test_every_page_has_a_place_below_the_gpu_if_there_is_one() -> None:
    assert Sizes(gpu=48, host=162, nvme=0).virtual == 162
    assert Sizes(gpu=48, host=60, nvme=200).virtual == 260
    assert Sizes(gpu=48, host=60, nvme=200, rings=14).virtual == 246
    assert Sizes(gpu=48, host=10, nvme=0).virtual == 47
    assert Sizes(gpu=48, host=0, nvme=0).virtual == 47


def test_sizes_are_the_least_of_all_ranks_and_of_what_the_engine_found(tmp_path: Path) -> None:
    given = rank_config(config(tmp_path, gpu=40, host=50, nvme=60), PAGE, "cpu", 1)

    def agree(numbers: list[int]) -> list[int]:
        return [numbers[0], min(numbers[1], 31), numbers[2]]

    sizes = plan(given, PAGE, 30 * PAGE, agree)
    assert (sizes.gpu, sizes.host) == (30, 31)
    ready = opened(given, sizes, PAGE)
    assert (ready.gpu.budget, ready.gpu.page, ready.host.capacity) == (30 * PAGE, PAGE, 31 * PAGE)
    assert ready.nvme.capacity == bytes_for(sizes.nvme, PAGE)
    with pytest.raises(ConfigError, match="at least 3"):
        plan(given, PAGE, 2 * PAGE, lambda numbers: numbers)


def test_ranks_share_host_memory_and_drive_and_count_ports() -> None:
    from tiermem.config import Host, Metrics, Nvme

    given = Config(
        host=Host(capacity="1GiB"),
        nvme=Nvme(path="/mnt/x", capacity=0.5),
        metrics=Metrics(port=9000),
    )
    mine = rank_config(given, 1 << 21, "cuda:3", 4, 2)
    assert (mine.host.capacity, mine.nvme.capacity) == (1 << 28, 0.125)
    assert (mine.metrics.port, mine.gpu.device) == (9002, "cuda:3")
