"""Where SGLang's releases differ, or have no public word for what we ask. Runs inside SGLang."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import xxhash

from tiermem.integrations import sglang_tree
from tiermem.integrations.sglang_engine import Agree, Ended, Engine, Matched, alone
from tiermem.integrations.sglang_keys import weights_identity
from tiermem.integrations.sglang_pages import Pages

_NO_PAGES = np.empty(0, np.int32)


# ---------------------------------------------------------------- ranks and streams


def agreement(scheduler: Any) -> Agree:
    """The least of numbers over the tensor-parallel ranks of this scheduler."""
    from sglang.srt.distributed.parallel_state import get_tp_group

    return alone if scheduler.server_args.tp_size == 1 else least_over(get_tp_group().cpu_group)


def least_over(group: Any) -> Agree:
    """The least of numbers over a process group that works on the CPU."""
    import torch

    def agree(numbers: list[int]) -> list[int]:
        tensor = torch.tensor(numbers, dtype=torch.int64)
        torch.distributed.all_reduce(tensor, op=torch.distributed.ReduceOp.MIN, group=group)
        return [int(number) for number in tensor.tolist()]

    return agree


def tp_rank() -> int:
    """Of this process among the tensor-parallel ranks."""
    from sglang.srt.distributed.parallel_state import get_tp_group

    return int(get_tp_group().rank_in_group)


def forward_stream(scheduler: Any) -> int | None:
    """The CUDA stream that batches run on; None on a CPU."""
    if str(scheduler.device).startswith("cpu"):
        return None
    import torch

    if scheduler.enable_overlap:
        return int(scheduler.forward_stream.cuda_stream)
    return int(torch.cuda.current_stream().cuda_stream)


def is_idle(scheduler: Any) -> bool:
    """Whether no request waits or runs."""
    return not scheduler.waiting_queue and runs_nothing(scheduler)


def runs_nothing(scheduler: Any) -> bool:
    """Whether no request runs."""
    return not (
        scheduler.running_batch.reqs
        or scheduler.last_batch is not None
        or scheduler.chunked_req is not None
    )


def model_of(args: Any) -> Any:
    """The model's description, while SGLang's arguments are being resolved."""
    if hasattr(args, "get_model_config"):
        return args.get_model_config()
    from sglang.srt.arg_groups.model_override_base import model_config_of

    return model_config_of(args)


def model_facts(args: Any) -> dict[str, str]:
    """What a model's KV depends on beside tokens, dtypes and layout. args: SGLang's arguments."""
    return {
        "weights": weights_identity(
            args.model_path, args.revision, args.load_format, args.random_seed
        ),
        "quantization": f"{args.quantization} {args.quantization_param_path}",
        "attention": str(args.attention_backend),
        "overrides": str(args.json_model_override_args),
    }


# ---------------------------------------------------------------- requests


def _kv(req: Any) -> Any:
    """What holds a request's lengths; from 0.5.19 on a record of its own."""
    return req.kv if hasattr(req.kv, "kv_committed_len") else req


def page_count(engine: Engine, req: Any) -> int:
    """Pages that a request has in the pool."""
    return -(-int(req.kv.kv_allocated_len) // engine.layout.page_size)


def computed_tokens(batch: Any) -> dict[Any, int]:
    """Tokens of each request of a batch whose KV is there, or queued to be, before it runs."""
    if batch.forward_mode.is_extend():
        return dict(zip(batch.reqs, batch.prefix_lens, strict=True))
    return {req: int(req.kv.kv_allocated_len) - 1 for req in batch.reqs}


def is_prefill(batch: Any) -> bool:
    """Whether one `run_batch` queues all layers, in order: no graph of a step is replayed, and it
    is not one of several parts of a split prefill."""
    return batch.forward_mode.name in ("EXTEND", "MIXED")


def committed_tokens(req: Any) -> Sequence[int]:
    """The tokens of a finished request whose KV is written."""
    tokens: Sequence[int] = (req.origin_input_ids + req.output_ids)[: _kv(req).kv_committed_len]
    return tokens


def written_tokens(req: Any) -> Sequence[int]:
    """The tokens of a running request whose KV is written, or queued to be."""
    end = req.extend_range.end if hasattr(req, "extend_range") else req.extend_end
    tokens: Sequence[int] = req.full_untruncated_fill_ids[:end]
    return tokens


def extra_of(req: Any) -> str | None:
    """What tells apart equal tokens with other KV."""
    salt = getattr(req, "cache_salt", None)
    return req.extra_key if salt is None else f"{req.extra_key}\0{salt}"


def ended(req: Any) -> Ended:
    """How a request ended: its session, if it has one, and whether it came to its own end."""
    session = getattr(req, "session_id", None)
    how = getattr(req, "finished_reason", None)
    kind = None if how is None else how.to_json()["type"]
    return Ended(
        session=None if session is None else xxhash.xxh3_64_intdigest(str(session).encode()) >> 1,
        reason="end_turn" if kind == "stop" else kind,
        output_tokens=len(req.output_ids),
    )


def abort(scheduler: Any, req: Any, why: str) -> None:
    """A request that is in the batch ends after it, with an error, and nothing of it is cached."""
    from http import HTTPStatus

    from sglang.srt.managers.schedule_batch import FINISH_ABORT

    if req is scheduler.chunked_req:
        scheduler._pending_chunked_abort_req = req  # before its next chunk, as SGLang aborts one
        return
    req.skip_radix_cache_insert = True
    req.to_finish = FINISH_ABORT(why, HTTPStatus.INTERNAL_SERVER_ERROR, "InternalServerError")


def keeps(req: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether `release_kv_cache(req, tree, ...)` puts the request into the tree."""
    wanted = args[0] if args else kwargs.get("checkpoint", kwargs.get("is_insert", True))
    return bool(wanted) and not getattr(req, "skip_radix_cache_insert", False)


def _slot(req: Any) -> int:
    """The row of `req_to_token` that is a request's."""
    slot: int = req.req_pool_idx if hasattr(req, "req_pool_idx") else req.kv.req_pool_idx
    return slot


def row(engine: Engine, pool: Any, reqs: list[Any]) -> list[Pages]:
    """The pages of each request, from `req_to_token`. On a GPU this waits for its copy."""
    import torch

    size = engine.layout.page_size
    counts = [page_count(engine, req) for req in reqs]
    firsts = [
        pool.req_to_token[_slot(req), : count * size : size]
        for req, count in zip(reqs, counts, strict=True)
    ]
    numbers = engine.page_numbers(torch.cat(firsts).cpu().numpy())
    return np.split(numbers, np.cumsum(counts)[:-1])


# ---------------------------------------------------------------- the tree


def caches_nothing(tree: Any) -> bool:
    """Whether prefix caching is off."""
    return bool(getattr(tree, "disable", False)) or type(tree).__name__ == "ChunkCache"


def matched_pages(engine: Engine, tree: Any, req: Any) -> Pages:
    """The cached pages that a request was just matched with.

    Their numbers are read from the GPU, unless it was matched with as many before and no page was
    freed since (a tree that has gone on growing still has those), or the plain tree's nodes know
    theirs. After a read they do.
    """
    size, freed = engine.layout.page_size, tree.token_to_kv_pool_allocator.freed
    known = engine.matched.get(req)
    if hasattr(req, "prefix_indices"):
        indices = req.prefix_indices
    else:
        indices = tree.path_device_indices(req.last_node)[: req.prefix_len]
    if not len(indices):
        return _NO_PAGES
    if known is not None and known.freed == freed and len(known.pages) * size == len(indices):
        return known.pages
    values = sglang_tree.path(tree.root_node, req.last_node) if _is_plain(tree) else []
    pages = sglang_tree.pages_of(values)
    if pages is None or len(pages) * size != len(indices):
        pages = engine.page_numbers(indices[::size].cpu().numpy())
        sglang_tree.learn(values, pages, size)
    engine.matched[req] = Matched(pages, freed)
    return pages


def probe(engine: Engine, tree: Any, req: Any) -> Pages:
    """The pages that are cached of a request that has just been queued."""
    type(req).init_next_round_input.__wrapped__(req, tree)
    return matched_pages(engine, tree, req)


@contextmanager
def growing(engine: Engine, tree: Any, req: Any) -> Iterator[None]:
    """What the plain tree takes over from a request meanwhile knows its pages: the request's own.

    That is a leaf below the node that the request was matched with last, if there is one more. If
    another request was there before, the tree keeps the other's pages, and nothing is added there.
    """
    stem = req.last_node if _is_plain(tree) else None
    before = 0 if stem is None else len(stem.children)
    yield
    held = engine.residence.pages(req)
    if stem is None or held is None or len(stem.children) != before + 1:
        return
    size = engine.layout.page_size
    leaf = next(reversed(stem.children.values()))
    start = sum(map(len, sglang_tree.path(tree.root_node, stem))) // size
    own = held[start : start + len(leaf.value) // size]
    sglang_tree.remember(leaf.value, np.array(own, np.int32), size)


@contextmanager
def _locked(tree: Any, node: Any) -> Iterator[None]:
    """Nothing from the root to this node is evicted."""
    if hasattr(tree, "lock"):
        lock = tree.lock(node)
        try:
            yield
        finally:
            tree.unlock(lock)
    else:
        receipt = tree.inc_lock_ref(node).to_dec_params()
        try:
            yield
        finally:
            tree.dec_lock_ref(node, receipt)


def make_room(tree: Any, req: Any, tokens: int) -> None:
    """Evict so much from the tree, if it must be, without what the request was matched with."""
    from sglang.srt.mem_cache.common import evict_from_tree_cache

    with _locked(tree, req.last_node):
        evict_from_tree_cache(tree, tokens)


def _key(req: Any, tokens: Any) -> Any:
    from sglang.srt.mem_cache.radix_cache import RadixKey

    salt = {"cache_salt": req.cache_salt} if hasattr(req, "cache_salt") else {}
    return RadixKey(tokens, req.extra_key, **salt)


def insert(engine: Engine, tree: Any, req: Any, matched: int, pages: Pages) -> None:
    """These pages follow the `matched` ones that the request was matched with."""
    import torch
    from sglang.srt.mem_cache.base_prefix_cache import InsertParams

    size = engine.layout.page_size
    device = tree.token_to_kv_pool_allocator.device
    firsts = torch.from_numpy(engine.first_indices(pages)).to(device)
    fresh = (firsts[:, None] + torch.arange(size, device=device)).reshape(-1)
    if hasattr(req, "prefix_indices"):
        known = req.prefix_indices[: matched * size]
    else:
        known = tree.path_device_indices(req.last_node)[: matched * size]
    tokens = req.full_untruncated_fill_ids[: (matched + len(pages)) * size]
    value = torch.cat((known.to(torch.int64), fresh))
    tree.insert(InsertParams(key=_key(req, tokens), value=value))


def _is_plain(tree: Any) -> bool:
    """Whether this is the plain radix tree, of which a branch can be cut."""
    tells_others = getattr(tree, "enable_kv_cache_events", False)
    return type(tree).__name__ == "RadixCache" and not tells_others


def can_forget(tree: Any) -> bool:
    """Whether a page that is gone costs the tree no more than what is behind it."""
    return caches_nothing(tree) or _is_plain(tree)


def forget_lost(engine: Engine, tree: Any, req: Any, good: int) -> None:
    """The tree forgets what it has behind the first `good` pages of a queued request.

    The plain radix tree gives up just that branch; any other one everything that nobody uses.
    """
    from sglang.srt.mem_cache.base_prefix_cache import EvictParams

    if _is_plain(tree):
        uproot(engine, tree, req, req.full_untruncated_fill_ids, good)
    else:
        tree.evict(EvictParams(num_tokens=tree.evictable_size()))


def uproot(engine: Engine, tree: Any, req: Any, tokens: Sequence[int], good: int) -> None:
    """The plain tree forgets what it has of these tokens behind the first `good` pages, except
    what is in use. Another tree is left alone."""
    if not _is_plain(tree):
        return
    size = engine.layout.page_size
    node = _deepest(tree, req, tokens[: len(tokens) // size * size])
    top = _deepest(tree, req, tokens[: good * size])
    if node is top:
        return
    while node.parent is not top and not node.parent.lock_ref:
        node = node.parent
    _cut(tree, node)


def _deepest(tree: Any, req: Any, tokens: Sequence[int]) -> Any:
    """The node of the plain tree that ends where what it has of these tokens ends."""
    from sglang.srt.mem_cache.base_prefix_cache import MatchPrefixParams

    if not len(tokens):
        return tree.root_node
    return tree.match_prefix(MatchPrefixParams(key=_key(req, tokens))).last_device_node


def keep_apart(tree: Any, req: Any, apart: bool) -> None:
    """Whether a request keeps its own pages to its end, where the tree's cannot be cut for them."""
    if not _is_plain(tree):
        req.skip_radix_cache_insert = apart


def carry_on(tree: Any, req: Any) -> None:
    """A request that is kept apart goes on behind what it has computed.

    As where nothing is cached at all; from 0.5.22 on SGLang does that by itself.
    """
    import torch

    if getattr(req, "skip_radix_cache_insert", False) and hasattr(req, "prefix_indices"):
        row = tree.req_to_token_pool.req_to_token[_slot(req), : len(written_tokens(req))]
        req.prefix_indices = row.to(torch.int64, copy=True)


def _cut(tree: Any, node: Any) -> None:
    if node.lock_ref:
        return
    for child in list(node.children.values()):
        _cut(tree, child)
    if not node.children:
        tree.token_to_kv_pool_allocator.free(node.value)
        tree._delete_leaf(node)


# ---------------------------------------------------------------- gates


def withhold(budget: Any, tokens: int) -> None:
    """So many tokens are not to be had; `PrefillBudget` from 0.5.21 on, `PrefillAdder` before."""
    if hasattr(budget, "total_offset"):
        budget.total_offset += tokens
        budget.current_offset += tokens
    else:
        budget.rem_total_token_offset += tokens
        budget.cur_rem_token_offset += tokens
