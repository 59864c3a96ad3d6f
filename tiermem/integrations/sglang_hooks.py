"""What runs before, after and around functions of SGLang, in a scheduler's process.

A hook takes the function that it replaces where it runs around one, its result where it runs after
it, then that function's own arguments. SGLang is untyped: its objects are `Any` here and nowhere
else. What differs between its releases is in `sglang_compat`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from tiermem.errors import PageLost
from tiermem.integrations import sglang_compat as compat
from tiermem.integrations import sglang_state as state
from tiermem.integrations import sglang_tree
from tiermem.integrations.sglang_engine import Engine, Matched
from tiermem.integrations.sglang_pages import Pages
from tiermem.integrations.sglang_pool import Plan, page_size_for
from tiermem.integrations.sglang_releases import refuse_dead_hooks
from tiermem.integrations.threads import switch_sooner

log = logging.getLogger(__name__)

_plans: list[Plan] = []


# ---------------------------------------------------------------- memory


def default_page_size(result: dict[str, int], args: Any) -> dict[str, int] | None:
    """After `_page_size_default`: SGLang's own default, one token, is no page that can move."""
    if result.get("page_size") != 1:
        return None
    return {**result, "page_size": page_size_for(args)}


def profile(original: Callable[..., int], configurator: Any, *args: Any, **kwargs: Any) -> int:
    """Around `_profile_available_bytes`: the bytes of all pages that have an address."""
    stock = original(configurator, *args, **kwargs)
    plan = Plan.of(configurator, stock)
    _plans[:] = [plan]
    return plan.pool_bytes


def make_mha_buffers(original: Callable[..., None], pool: Any) -> None:
    """Around `MHATokenToKVPool._create_buffers_normal`."""
    engine = _begin(pool, (pool.head_num, pool.head_dim))
    if pool.kv_cache_layout != "nhd" or pool.v_head_dim != pool.head_dim:
        raise state.NotLive(
            f"tiermem: KV layout {pool.kv_cache_layout}, head sizes {pool.head_dim} and "
            f"{pool.v_head_dim}: the layout must be nhd, and keys as long as values"
        )
    shape = (pool.head_num, pool.head_dim)
    parts = [engine.buffer(i, pool.store_dtype, shape) for i in range(2 * pool.layer_num)]
    pool.k_buffer, pool.v_buffer = parts[0::2], parts[1::2]
    _made(pool, engine, parts[0])


def make_mla_buffers(original: Callable[..., None], pool: Any) -> None:
    """Around `MLATokenToKVPool._create_buffers`."""
    if pool.use_dsa:
        raise state.NotLive("tiermem: sparse attention (DSA) keeps an index beside its KV cache")
    shape = (1, pool.kv_cache_dim)
    engine = _begin(pool, shape)
    pool.kv_buffer = [engine.buffer(i, pool.store_dtype, shape) for i in range(pool.layer_num)]
    _made(pool, engine, pool.kv_buffer[0])


def describe_none(original: Callable[..., list[Any]], pool: Any) -> list[Any]:
    """Around `_build_kv_buffer_descs`: they are for transfers to other machines, which are refused.

    From 0.5.22 on it demands tensors with a row for each token of the pool; ours are longer.
    """
    return []


def _begin(pool: Any, row_shape: tuple[int, int]) -> Engine:
    plan = _plans.pop() if _plans else None
    if plan is None:
        raise state.NotLive(
            "tiermem: SGLang makes a KV pool whose size it did not ask for (a draft model, or a "
            "second pool); one pool in a process"
        )
    plan.refuse_unlike(pool, row_shape)
    engine = plan.open(pool.size // pool.page_size)
    state.begin(engine)
    return engine


def _made(pool: Any, engine: Engine, first: Any) -> None:
    """The pool's tensors are there. Its size is what its kernels hold token indices against: a
    store beyond `size + page_size` is trapped on a GPU."""
    engine.blank_padding(first)
    pool.size = len(first) - pool.page_size
    pool.register_layer_transfer_counter(engine.wait_by_layer(pool.layer_num))


def tell_size(result: Any, pool: Any) -> Any:
    """After `get_kv_size_bytes`: each of the pool's tensors reaches over all of it."""
    total = state.engine().region.nbytes
    return (total // 2, total - total // 2) if isinstance(result, tuple) else total


# ---------------------------------------------------------------- the scheduler


def ready(result: None, scheduler: Any, *args: Any, **kwargs: Any) -> None:
    """After `Scheduler.__init__`: everything is as it must be, or the engine stops here."""
    from tiermem.integrations.sglang_allocator import PageMajorAllocator

    engine = state.engine()
    refuse_dead_hooks()
    switch_sooner()
    if not isinstance(scheduler.token_to_kv_pool_allocator, PageMajorAllocator):
        kind = type(scheduler.token_to_kv_pool_allocator).__name__
        raise state.NotLive(
            f"tiermem: SGLang allocates with {kind}, which numbers no pages of ours"
        )
    engine.agree = compat.agreement(scheduler)
    engine.stream = compat.forward_stream(scheduler)
    if compat.can_forget(scheduler.tree_cache):
        engine.outpace()
    engine.look()
    longest = engine.gates.longest_request() - 1
    scheduler.max_req_len = min(scheduler.max_req_len, longest)
    scheduler.max_req_input_len = min(scheduler.max_req_input_len, longest - 5)
    log.info(
        "serving pages=%d page_bytes=%d resident=%d longest_request=%d",
        engine.gates.pages,
        engine.layout.page_bytes,
        engine.space.budget(),
        scheduler.max_req_len,
    )


def look(scheduler: Any, *args: Any, **kwargs: Any) -> None:
    """Before `get_next_batch_to_run`: what has changed by itself since the last round."""
    engine, free = state.engine(), scheduler.token_to_kv_pool_allocator.pages
    engine.release_ended()
    engine.look()
    free.settle()
    if compat.is_idle(scheduler):
        engine.prepare(free)


def step(scheduler: Any, batch: Any, *args: Any, **kwargs: Any) -> None:
    """Before `run_batch`: every page that the batch touches is on the GPU, or will be in time."""
    engine = state.engine()
    living = {*batch.reqs, *scheduler.running_batch.reqs}
    if scheduler.last_batch is not None:
        living.update(scheduler.last_batch.reqs)
    if scheduler.chunked_req is not None:
        living.add(scheduler.chunked_req)
    engine.residence.release_others(living)
    stale = [req for req in batch.reqs if not _is_followed(engine, req)]
    if stale:
        _read_rows(engine, batch, stale)
    prefills = compat.is_prefill(batch)
    by_layer = prefills and engine.layers.trusted
    spoiled = engine.residence.ensure(compat.computed_tokens(batch), by_layer)
    if spoiled:
        _give_up(engine, scheduler, spoiled)
    engine.layers.begin(prefills)
    if batch.forward_mode.is_extend():
        engine.speed.launched(int(batch.extend_num_tokens or 0))


def _give_up(engine: Engine, scheduler: Any, spoiled: list[Any]) -> None:
    """Requests whose tokens are gone end with an error; the tree learns nothing from them.

    Pages of a request leave while it runs only where the budget fell below what runs.
    """
    text = f"tiermem: KV of {len(spoiled)} running requests could not be read back as written"
    if not engine.is_alone:
        raise PageLost(f"{text}, on this rank alone: the ranks would not decide alike any more")
    log.error("%s: they end with an error", text)
    for req in spoiled:
        compat.abort(scheduler, req, f"{text}; send the request again")


def launched(result: Any, scheduler: Any, batch: Any, *args: Any, **kwargs: Any) -> None:
    """After `run_batch`: it has waited for all that it reads."""
    engine = state.engine()
    if not engine.layers.end():
        _give_up(engine, scheduler, list(batch.reqs))


def computed(result: Any, scheduler: Any, batch: Any, *args: Any, **kwargs: Any) -> None:
    """After `process_batch_result`: how long a prefill took."""
    if batch.forward_mode.is_extend():
        state.engine().speed.finished()


def clip(result: None, scheduler: Any, req: Any) -> None:
    """After `init_req_max_new_tokens`: a request that never fits is not let in."""
    engine = state.engine()
    room = engine.gates.longest_request() - 1 - len(req.origin_input_ids)
    params = req.sampling_params
    params.max_new_tokens = max(0, min(params.max_new_tokens, room))
    params.min_new_tokens = min(params.min_new_tokens, params.max_new_tokens)


def queued(result: None, scheduler: Any, req: Any, *args: Any, **kwargs: Any) -> None:
    """After `_add_request_to_queue`: what is cached of its prompt starts on its way up."""
    engine = state.engine()
    tree = scheduler.tree_cache
    if compat.caches_nothing(tree):
        return
    pages = compat.probe(engine, tree, req)
    whole = (len(req.full_untruncated_fill_ids) - 1) // engine.layout.page_size
    kept = engine.kept(req.full_untruncated_fill_ids, compat.extra_of(req), len(pages), whole)
    if kept:
        pages = np.concatenate([pages, _adopt(engine, scheduler, req, len(pages), kept)])
    if len(pages) and compat.runs_nothing(scheduler):
        engine.bring(pages, scheduler.token_to_kv_pool_allocator.pages)
    elif len(pages):
        engine.promote(pages)


def _adopt(engine: Engine, scheduler: Any, req: Any, matched: int, count: int) -> Pages:
    """The tree learns of pages that the drive has kept. Returns these pages."""
    allocator, tree = scheduler.token_to_kv_pool_allocator, scheduler.tree_cache
    compat.make_room(tree, req, count * engine.layout.page_size)
    [count] = engine.agree([min(count, len(allocator.pages))])
    pages = allocator.take_pages(count) if count else None
    if pages is None:
        return np.empty(0, np.int32)
    tokens = req.full_untruncated_fill_ids
    good = engine.adopt(tokens, compat.extra_of(req), matched, pages)
    if good < count:
        allocator.give_pages(pages[good:])
    if good:
        compat.insert(engine, tree, req, matched, pages[:good])
    taken: Pages = pages[:good]
    return taken


# ---------------------------------------------------------------- gates


def withhold(result: None, budget: Any, *args: Any, **kwargs: Any) -> None:
    """After the constructor of what counts a prefill's tokens: less than SGLang's own count."""
    compat.withhold(budget, state.engine().gates.withheld_tokens())


def fits_decode(original: Callable[..., bool], batch: Any, *args: Any, **kwargs: Any) -> bool:
    """Around `check_decode_mem`: the next step fits into the pool, and onto the GPU."""
    if not original(batch, *args, **kwargs):
        return False
    needed = batch.new_tokens_required_next_decode(*args, **kwargs)
    free = batch.token_to_kv_pool_allocator.available_size()
    spare = state.engine().gates.spare_tokens(free, batch.tree_cache.evictable_size())
    return bool(spare >= needed)


# ---------------------------------------------------------------- requests and their pages


def extended(result: Any, batch: Any, *args: Any, **kwargs: Any) -> None:
    """After `alloc_for_extend`: which pages each request has now."""
    engine = state.engine()
    size = engine.layout.page_size
    taken = batch.token_to_kv_pool_allocator.taken
    unknown = []
    for req, prefix, new in zip(batch.reqs, batch.prefix_lens, taken, strict=True):
        held = engine.residence.pages(req)
        whole = -(-prefix // size)
        known = engine.matched.get(req)
        if held is None and known is not None and len(known.pages) * size == prefix:
            held = known.pages.tolist()
        if not whole or (held is not None and len(held) == whole):
            engine.residence.follow(req, [*(held or ())[:whole], *new.tolist()])
        else:
            unknown.append(req)
    if unknown:
        _read_rows(engine, batch, unknown)


def decoded(result: Any, batch: Any, *args: Any, **kwargs: Any) -> None:
    """After `alloc_for_decode`: further pages of some requests."""
    engine = state.engine()
    for req, new in zip(batch.reqs, batch.token_to_kv_pool_allocator.taken, strict=True):
        if len(new) and engine.residence.pages(req) is not None:
            engine.residence.extend(req, new.tolist())


def shared(original: Callable[..., None], req: Any, tree: Any, *args: Any, **kwargs: Any) -> None:
    """Around what puts a running request into the tree: it may get the tree's pages for its own."""
    engine = state.engine()
    allocator = tree.token_to_kv_pool_allocator
    before = allocator.freed
    if not compat.caches_nothing(tree):
        _make_way(engine, req, tree, compat.written_tokens(req))
    with compat.growing(engine, tree, req):
        original(req, tree, *args, **kwargs)
    if compat.caches_nothing(tree):
        return
    compat.carry_on(tree, req)
    if allocator.freed != before:
        numbers = compat.row(engine, tree.req_to_token_pool, [req])[0]
        engine.residence.follow(req, numbers.tolist())
    engine.label(req, compat.written_tokens(req), compat.extra_of(req))


def released(original: Callable[..., None], req: Any, tree: Any, *args: Any, **kwargs: Any) -> None:
    """Around `release_kv_cache`: what the tree takes over gets its name, the rest is let go."""
    engine = state.engine()
    kept = compat.keeps(req, args, kwargs) and not compat.caches_nothing(tree)
    if kept:
        engine.label(req, compat.committed_tokens(req), compat.extra_of(req))
        _make_way(engine, req, tree, compat.committed_tokens(req))
    with compat.growing(engine, tree, req):
        original(req, tree, *args, **kwargs)
    if kept:
        engine.ended.append((req, compat.ended(req)))  # its answer is sent first
    else:
        engine.release(req)


def split(original: Callable[..., Any], tree: Any, key: Any, node: Any, length: int) -> Any:
    """Around the plain tree's `_split_node`: both parts know what the node knew of its pages."""
    pages = sglang_tree.remembered(node.value)
    front = original(tree, key, node, length)
    if pages is not None:
        size = state.engine().layout.page_size
        sglang_tree.learn([front.value, node.value], pages, size)
    return front


def _make_way(engine: Engine, req: Any, tree: Any, tokens: Sequence[int]) -> None:
    """The tree keeps the pages that it has. It must not where they are lost, or too far away to be
    worth a load: it would give them to the request, for those that this has just computed.
    """
    good = engine.bypassing.get(req)
    if good is not None:
        compat.uproot(engine, tree, req, tokens, good)


def matched(
    original: Callable[..., None], req: Any, tree: Any = None, *args: Any, **kwargs: Any
) -> None:
    """Around `init_next_round_input`: a prefix counts as far as its bytes are there, and worth it.

    What is lost leaves the tree. What would be slower to load than to compute stays in it until it
    was computed again; the request is matched with what is before it.
    """
    original(req, tree, *args, **kwargs)
    if tree is None or compat.caches_nothing(tree):
        return
    engine = state.engine()
    pages = compat.matched_pages(engine, tree, req)
    usable = engine.usable(pages)
    if usable.load == len(pages):
        if engine.bypassing.pop(req, None) is not None:
            compat.keep_apart(tree, req, False)
        return
    engine.bypassing[req] = usable.load
    compat.keep_apart(tree, req, True)
    if usable.there < len(pages):
        lost = len(pages) - usable.there
        log.info("prefix lost or dropped pages=%d of %d: computed again", lost, len(pages))
        compat.forget_lost(engine, tree, req, usable.there)
    engine.caps[req] = usable.load * engine.layout.page_size
    try:
        original(req, tree, *args, **kwargs)
    finally:
        del engine.caps[req]
    engine.matched[req] = Matched(pages[: usable.load], tree.token_to_kv_pool_allocator.freed)


def capped(result: int, req: Any, *args: Any, **kwargs: Any) -> int:
    """After `_compute_max_prefix_len`: no more than `matched` allows."""
    cap = state.engine().caps.get(req)
    return result if cap is None else min(result, cap)


def _is_followed(engine: Engine, req: Any) -> bool:
    held = engine.residence.pages(req)
    return held is not None and len(held) == compat.page_count(engine, req)


def _read_rows(engine: Engine, batch: Any, reqs: list[Any]) -> None:
    """Which pages these requests have, from SGLang's own table; waits for the GPU."""
    rows = compat.row(engine, batch.req_to_token_pool, reqs)
    for req, numbers in zip(reqs, rows, strict=True):
        engine.residence.follow(req, numbers.tolist())
