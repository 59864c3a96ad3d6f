"""Hooks over an engine of our own and stand-ins of SGLang's objects, of the shapes of 0.5.17."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from tests.integrations.test_sglang_engine import PAGES, TOKENS, compute, pages_of, push_out, reads
from tests.integrations.test_sglang_engine import open_engine as open_engine  # a fixture
from tiermem.assemble import Parts, assemble
from tiermem.errors import PageLost
from tiermem.integrations import sglang_compat as compat
from tiermem.integrations import sglang_hooks as hooks
from tiermem.integrations import sglang_state as state
from tiermem.integrations.sglang_engine import Engine
from tiermem.integrations.sglang_pages import FreePages, Pages
from tiermem.testing import LateRoute
from tiermem.tier import Memory, Place

torch = pytest.importorskip("torch")

RESIDENT = 7 * 16
"""Tokens that fit on the GPU beside page 0."""


@dataclass(eq=False)
class Request:
    """As SGLang's Req: lengths, a row of the table, what it was matched with."""

    origin_input_ids: list[int]
    req_pool_idx: int = 0
    kv: Any = None
    extra_key: str | None = None
    output_ids: list[int] = field(default_factory=list)
    prefix_indices: Any = None
    last_node: Any = None
    full_untruncated_fill_ids: list[int] = field(default_factory=list)
    extend_end: int = 0
    skip_radix_cache_insert: bool = False
    sampling_params: Any = None

    def _compute_max_prefix_len(self, length: int) -> int:
        return int(hooks.capped(length - 1, self, length))


class Tree:
    """One branch: the pages of TOKENS."""

    def __init__(self, engine: Engine, pages: Pages) -> None:
        firsts = torch.from_numpy(engine.first_indices(pages))
        self.indices = (firsts[:, None] + torch.arange(16)).reshape(-1)
        self.disable = False
        self.token_to_kv_pool_allocator = Allocator()

    def match(self, req: Request, tree: Tree, *args: object) -> None:
        """In the place of `init_next_round_input`."""
        most = req._compute_max_prefix_len(len(req.origin_input_ids)) // 16 * 16
        req.prefix_indices = self.indices[:most]


@pytest.fixture
def engine(open_engine: Any) -> Iterator[Engine]:
    engine: Engine = open_engine(persist=False)
    state.begin(engine)
    yield engine
    state.end()


@pytest.fixture
def host_engine(open_engine: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    """Whose pages leave for host memory, and come back when somebody waits for them."""

    def late(parts: Parts) -> Parts:
        host = cast(Memory, parts.tiers[Place.HOST])
        parts.routes[Place.HOST, Place.GPU] = LateRoute(host, parts.device.frames)
        return parts

    monkeypatch.setattr("tiermem.space.assemble", lambda *given: late(assemble(*given)))
    engine: Engine = open_engine(persist=False, host=40)
    state.begin(engine)
    yield engine
    state.end()


def test_an_engine_that_nobody_made_is_asked_for_loudly() -> None:
    with pytest.raises(state.NotLive, match="TIERMEM=0"):
        state.engine()


def test_a_second_pool_is_refused(engine: Engine) -> None:
    with pytest.raises(state.NotLive, match="one only"):
        state.begin(engine)


def test_a_prefix_that_is_there_is_matched_whole(engine: Engine) -> None:
    pages = pages_of(1, 2, 3)
    compute(engine, "a", pages, TOKENS)
    tree, req = Tree(engine, pages), Request(TOKENS)
    hooks.matched(tree.match, req, tree)
    assert len(req.prefix_indices) == 48
    assert engine.caps == {}


def test_a_prefix_is_matched_up_to_what_is_lost_and_the_tree_gives_up_the_rest(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut: list[int] = []
    monkeypatch.setattr(compat, "forget_lost", lambda e, t, r, good: cut.append(good))
    pages = pages_of(1, 2, 3)
    compute(engine, "a", pages, TOKENS)
    engine.residence.gone(pages_of(2), "dropped")
    tree, req = Tree(engine, pages), Request(TOKENS)
    hooks.matched(tree.match, req, tree)
    assert cut == [1]
    assert len(req.prefix_indices) == 16
    engine.region.free([2])


def test_a_prefix_on_the_drive_is_up_when_it_was_matched(engine: Engine) -> None:
    pages = pages_of(1, 2, 3)
    compute(engine, "a", pages, TOKENS)
    push_out(engine)
    tree, req = Tree(engine, pages), Request(TOKENS)
    hooks.matched(tree.match, req, tree)
    assert len(req.prefix_indices) == 48
    assert (engine.region.where(pages) == Place.GPU).all()


def test_what_is_computed_again_takes_the_place_of_what_the_tree_had(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    did: list[object] = []
    monkeypatch.setattr(compat, "uproot", lambda e, t, r, tokens, good: did.append(good))
    monkeypatch.setattr(compat, "keep_apart", lambda t, r, apart: did.append(apart))
    monkeypatch.setattr(Engine, "_worth", lambda self, pages: 1)
    pages = pages_of(1, 2, 3)
    compute(engine, "a", pages, TOKENS)
    tree, req = Tree(engine, pages), Request(TOKENS, kv=length(48))
    req.full_untruncated_fill_ids, req.extend_end = TOKENS, 48
    hooks.matched(tree.match, req, tree)
    hooks.shared(lambda *args: did.append("inserted"), req, tree)
    assert did == [True, 1, "inserted"]
    monkeypatch.undo()
    hooks.matched(tree.match, req, tree)
    assert len(req.prefix_indices) == 48
    assert req not in engine.bypassing
    assert req.skip_radix_cache_insert is False


def test_no_tree_and_a_tree_that_caches_nothing_are_left_alone(engine: Engine) -> None:
    req, asked = Request(TOKENS), []
    hooks.matched(lambda *args: asked.append(args), req, None)
    hooks.matched(lambda *args: asked.append(args), req, SimpleNamespace(disable=True))
    assert len(asked) == 2


# ---------------------------------------------------------------- gates


@pytest.mark.parametrize(
    ("own", "needed", "used", "fits"),
    [
        (True, 16, RESIDENT - 16, True),
        (True, 16, RESIDENT, False),
        (True, 16, RESIDENT + 64, False),
        (False, 16, 0, False),
    ],
)
def test_a_decode_step_fits_if_addresses_and_memory_do(
    engine: Engine, own: bool, needed: int, used: int, fits: bool
) -> None:
    tree = SimpleNamespace(evictable_size=lambda: 64)
    free = PAGES * 16 - 64 - used
    batch = SimpleNamespace(
        token_to_kv_pool_allocator=SimpleNamespace(available_size=lambda: free),
        tree_cache=tree,
        new_tokens_required_next_decode=lambda: needed,
    )
    assert hooks.fits_decode(lambda batch: own, batch) is fits


@pytest.mark.parametrize(
    ("total", "current"),
    [("rem_total_token_offset", "cur_rem_token_offset"), ("total_offset", "current_offset")],
)
def test_a_prefill_counts_on_memory_and_not_on_addresses(
    engine: Engine, total: str, current: str
) -> None:
    budget = SimpleNamespace(**{total: 5, current: 7})
    hooks.withhold(None, budget)
    withheld = PAGES * 16 - RESIDENT
    assert (getattr(budget, total), getattr(budget, current)) == (5 + withheld, 7 + withheld)


def test_an_answer_is_clipped_to_what_fits_at_all(engine: Engine) -> None:
    params = SimpleNamespace(max_new_tokens=1000, min_new_tokens=500)
    hooks.clip(None, None, Request(TOKENS[:40], sampling_params=params))
    assert params.max_new_tokens == RESIDENT - 16 - 1 - 40
    assert params.min_new_tokens == params.max_new_tokens


# ---------------------------------------------------------------- batches


class Allocator:
    """As `PageMajorAllocator`: what it handed out last."""

    def __init__(self, *taken: Pages) -> None:
        self.taken = list(taken)
        self.freed = 0


def batch_of(*reqs: Request, taken: list[Pages], prefixes: list[int], extend: bool = True) -> Any:
    return SimpleNamespace(
        reqs=list(reqs),
        prefix_lens=prefixes,
        token_to_kv_pool_allocator=Allocator(*taken),
        req_to_token_pool=SimpleNamespace(req_to_token=torch.zeros((4, 256), dtype=torch.int32)),
        forward_mode=SimpleNamespace(
            is_extend=lambda: extend, name="EXTEND" if extend else "DECODE"
        ),
        extend_num_tokens=16,
    )


def scheduler_of(*reqs: Request) -> Any:
    return SimpleNamespace(
        running_batch=SimpleNamespace(reqs=list(reqs)),
        last_batch=None,
        chunked_req=None,
        waiting_queue=["waits"],
    )


def length(tokens: int) -> Any:
    return SimpleNamespace(kv_allocated_len=tokens)


def test_what_a_batch_was_given_is_on_the_gpu_when_it_runs(engine: Engine) -> None:
    first, second = Request(TOKENS, kv=length(40)), Request(TOKENS, kv=length(16))
    batch = batch_of(first, second, taken=[pages_of(1, 2, 3), pages_of(4)], prefixes=[0, 0])
    hooks.extended(None, batch)
    hooks.step(scheduler_of(), batch)
    assert (engine.region.where([1, 2, 3, 4]) == Place.GPU).all()
    second.kv = length(17)
    again = batch_of(first, second, taken=[pages_of(), pages_of(5)], prefixes=[], extend=False)
    hooks.decoded(None, again)
    hooks.step(scheduler_of(first, second), again)
    assert engine.residence.pages(second) == [4, 5]
    assert engine.region.where([5])[0] == Place.GPU


class Kernels:
    """What SGLang's kernels find: each layer of some pages, once the pool has been asked for it."""

    def __init__(self, engine: Engine, pages: Pages) -> None:
        self._layers = engine.wait_by_layer(2)
        self._rows = engine.region.view(np.int64)
        self._pages = pages

    def run(self, *layers: int) -> list[set[int]]:
        half = self._rows.shape[1] // 2
        seen = []
        for layer in layers:
            self._layers.wait_until(layer)
            part = self._rows[self._pages, layer * half : (layer + 1) * half]
            seen.append(set(part.ravel().tolist()))
        return seen


def test_prefills_after_the_first_wait_for_each_layer_by_itself(
    host_engine: Engine,
) -> None:
    engine = host_engine
    pages, other = pages_of(1, 2, 3, 4, 5), pages_of(11, 12, 13, 14, 15)
    compute(engine, "a", pages, TOKENS)
    compute(engine, "b", other, TOKENS)
    kernels = Kernels(engine, pages)
    for turn in range(3):
        push_out(engine)
        assert (engine.region.where(pages) != Place.GPU).all()
        req = Request(TOKENS, kv=length(80))
        batch = batch_of(req, taken=[pages_of()], prefixes=[80])
        engine.residence.follow(req, pages.tolist())
        hooks.step(scheduler_of(), batch)
        assert kernels.run(0, 1) == [set(TOKENS[:80:16])] * 2
        hooks.launched(None, scheduler_of(), batch)
        assert len(engine.residence.arriving) == 0
        engine.release(req)
        assert engine.layers.trusted, turn
    assert engine.layers.overlapped == 2


def test_what_a_request_was_matched_with_is_there_when_it_runs(host_engine: Engine) -> None:
    engine, pages = host_engine, pages_of(1, 2, 3, 4, 5)
    compute(engine, "a", pages, TOKENS)
    push_out(engine)
    assert engine.residence.hold(pages, 2) == 5
    assert len(engine.residence.arriving)
    assert reads(engine, pages, TOKENS)


def test_requests_of_a_prefill_that_did_not_wait_end_with_an_error(
    host_engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, ended = host_engine, []
    monkeypatch.setattr(compat, "abort", lambda scheduler, req, why: ended.append(req))
    pages = pages_of(1, 2, 3, 4, 5)
    compute(engine, "a", pages, TOKENS)
    push_out(engine)
    engine.wait_by_layer(2).trusted = True
    req = Request(TOKENS, kv=length(80))
    batch = batch_of(req, taken=[pages_of()], prefixes=[80])
    engine.residence.follow(req, pages.tolist())
    hooks.step(scheduler_of(), batch)
    engine.layers.wait_until(0)
    hooks.launched(None, scheduler_of(), batch)
    assert ended == [req]
    assert not engine.layers.trusted


@pytest.mark.parametrize("ranks", [1, 2])
def test_requests_whose_tokens_are_gone_end_and_the_others_run(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, ranks: int
) -> None:
    ended: list[object] = []
    monkeypatch.setattr(compat, "abort", lambda scheduler, req, why: ended.append(req))
    compute(engine, "a", pages_of(1, 2), TOKENS)
    bad, good = Request(TOKENS, kv=length(48)), Request(TOKENS, kv=length(16))
    batch = batch_of(bad, good, taken=[pages_of(3), pages_of(4)], prefixes=[32, 0])
    engine.residence.follow(bad, [1, 2])
    hooks.extended(None, batch)
    engine.region.free([2])
    engine.residence.gone(pages_of(2), "dropped")
    if ranks == 1:
        hooks.step(scheduler_of(), batch)
        assert ended == [bad]
        assert (engine.region.where([1, 2, 3, 4]) == Place.GPU).all()
    else:
        engine.agree = lambda numbers: numbers
        with pytest.raises(PageLost, match="this rank alone"):
            hooks.step(scheduler_of(), batch)


def test_pages_that_nobody_told_of_are_read_from_the_engines_own_table(engine: Engine) -> None:
    req = Request(TOKENS, req_pool_idx=2, kv=length(40))
    batch = batch_of(req, taken=[], prefixes=[0])
    firsts = engine.first_indices(pages_of(7, 8, 9))
    row = (firsts[:, None] + np.arange(16)).reshape(-1)
    batch.req_to_token_pool.req_to_token[2, : len(row)] = torch.from_numpy(row)
    hooks.step(scheduler_of(), batch)
    assert engine.residence.pages(req) == [7, 8, 9]


def test_who_is_neither_in_the_batch_nor_running_holds_nothing(engine: Engine) -> None:
    gone, here = Request(TOKENS, kv=length(16)), Request(TOKENS, kv=length(16))
    hooks.extended(None, batch_of(gone, taken=[pages_of(1)], prefixes=[0]))
    hooks.step(scheduler_of(), batch_of(gone, taken=[], prefixes=[0]))
    hooks.extended(None, batch_of(here, taken=[pages_of(2)], prefixes=[0]))
    hooks.step(scheduler_of(here), batch_of(here, taken=[], prefixes=[0]))
    assert engine.residence.pages(gone) is None
    assert engine.residence.pages(here) == [2]


def test_the_policies_hear_how_a_request_ended() -> None:
    ended = SimpleNamespace(
        session_id="abc",
        finished_reason=SimpleNamespace(to_json=lambda: {"type": "stop"}),
        output_ids=[1, 2, 3],
    )
    told = compat.ended(ended)
    assert (told.reason, told.output_tokens, told.turn) == ("end_turn", 3, None)
    assert told.session == compat.ended(ended).session
    bare = compat.ended(SimpleNamespace(output_ids=[]))
    assert (bare.session, bare.reason) == (None, None)


def test_pages_that_a_tree_takes_over_are_named_in_what_the_policies_hear(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: list[list[int]] = []
    monkeypatch.setattr(
        type(engine.region), "finished", lambda self, pages, facts: heard.append(pages.tolist())
    )
    req = Request(TOKENS[:32], kv=length(32))
    hooks.extended(None, batch_of(req, taken=[pages_of(1, 2)], prefixes=[0]))
    hooks.step(scheduler_of(), batch_of(req, taken=[], prefixes=[0]))
    req.kv.kv_committed_len = 32
    hooks.released(lambda *args: None, req, SimpleNamespace(disable=False), True)
    assert not heard, "the answer is sent first"
    assert engine.residence.pages(req) == [1, 2]
    scheduler = scheduler_of()
    scheduler.token_to_kv_pool_allocator = SimpleNamespace(pages=FreePages(9, lambda pages: None))
    hooks.look(scheduler)
    assert heard == [[2, 1]]
    assert engine.residence.pages(req) is None


def test_a_request_that_ended_lets_go(engine: Engine) -> None:
    req = Request(TOKENS, kv=length(16))
    hooks.extended(None, batch_of(req, taken=[pages_of(1)], prefixes=[0]))
    hooks.step(scheduler_of(), batch_of(req, taken=[], prefixes=[0]))
    seen: list[object] = []
    hooks.released(lambda *args: seen.append(args), req, SimpleNamespace(disable=True), False)
    assert seen
    assert engine.residence.pages(req) is None


def test_the_pages_that_a_request_was_matched_with_are_not_read_again(engine: Engine) -> None:
    pages = pages_of(1, 2, 3)
    compute(engine, "a", pages, TOKENS)
    tree, req = Tree(engine, pages), Request(TOKENS)
    hooks.matched(tree.match, req, tree)
    batch = batch_of(req, taken=[pages_of(7)], prefixes=[48])  # its table says nothing
    hooks.extended(None, batch)
    assert engine.residence.pages(req) == [1, 2, 3, 7]


def test_what_is_matched_after_pages_were_freed_is_read_anew(engine: Engine) -> None:
    compute(engine, "a", pages_of(1, 2, 3, 4, 5, 6), TOKENS + TOKENS)
    tree, req = Tree(engine, pages_of(1, 2, 3)), Request(TOKENS)
    hooks.matched(tree.match, req, tree)
    tree.indices = Tree(engine, pages_of(4, 5, 6)).indices
    tree.token_to_kv_pool_allocator.freed += 1
    hooks.matched(tree.match, req, tree)
    hooks.extended(None, batch_of(req, taken=[pages_of(7)], prefixes=[48]))
    assert engine.residence.pages(req) == [4, 5, 6, 7]


def test_a_prefix_that_counts_in_part_is_known_as_far(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Engine, "_worth", lambda self, pages: 2)
    pages = pages_of(1, 2, 3)
    compute(engine, "a", pages, TOKENS)
    tree, req = Tree(engine, pages), Request(TOKENS)
    hooks.matched(tree.match, req, tree)
    hooks.extended(None, batch_of(req, taken=[pages_of(7)], prefixes=[32]))
    assert engine.residence.pages(req) == [1, 2, 7]


def test_an_engine_without_requests_makes_pages_ready(engine: Engine) -> None:
    scheduler = scheduler_of()
    free = engine.free_pages()
    scheduler.token_to_kv_pool_allocator = SimpleNamespace(pages=free)
    hooks.look(scheduler)
    assert (engine.region.where([1, 2]) == Place.NONE).all()
    scheduler.waiting_queue = []
    hooks.look(scheduler)
    assert (engine.region.where([1, 2]) == Place.GPU).all()
    engine.residence.unprepare()
