"""Parts of SGLang with ours, without an engine: not under pytest, in an environment with SGLang.

usage: sglang_parts_child.py        (an assertion that fails is the exit status)
"""

from __future__ import annotations

from array import array
from types import SimpleNamespace
from typing import Any

import torch

PAGE_SIZE = 16
TOKENS = array("q", range(1000, 1000 + 6 * PAGE_SIZE))


def open_engine() -> Any:
    from tiermem.config import Config, Gpu, Host
    from tiermem.integrations import sglang_state
    from tiermem.integrations.sglang_engine import Engine, Identity
    from tiermem.integrations.sglang_layout import PageMajor
    from tiermem.integrations.sglang_sizes import Sizes

    layout = PageMajor(parts=4, row_bytes=256, page_size=PAGE_SIZE, stride=4)
    config = Config(
        gpu=Gpu(device="cpu", page=layout.page_bytes, budget=8 * layout.page_bytes),
        host=Host(capacity=40 * layout.page_bytes),
    )
    engine = Engine(config, layout, Sizes(gpu=8, host=40, nvme=0), Identity("r", {}), 32)
    sglang_state.begin(engine)
    return engine


def a_group_tells_what_is_freed(engine: Any) -> None:
    """SGLang holds frees back while it handles results, from 0.5.21 on also those of a prefill."""
    allocator = make_allocator()
    indices = allocator.alloc(4 * PAGE_SIZE)
    free, before = len(allocator.pages), allocator.freed
    allocator.free_group_begin()
    allocator.free_segment(indices[: 2 * PAGE_SIZE], start_pos=0)
    allocator.free(indices[2 * PAGE_SIZE :])
    assert allocator.freed - before == 4 * PAGE_SIZE
    assert len(allocator.pages) == free
    allocator.free_group_end()
    assert len(allocator.pages) == free + 4


def a_branch_is_cut_where_it_is_not_in_use(engine: Any) -> None:
    from sglang.srt.mem_cache.base_prefix_cache import InsertParams, MatchPrefixParams
    from sglang.srt.mem_cache.radix_cache import RadixCache, RadixKey

    from tiermem.integrations import sglang_compat as compat

    allocator = make_allocator()
    tree = RadixCache.create_simulated(mock_allocator=allocator, page_size=PAGE_SIZE)
    req = SimpleNamespace(extra_key=None)

    def known(pages: int) -> tuple[int, Any]:
        found = tree.match_prefix(MatchPrefixParams(key=RadixKey(TOKENS[: pages * PAGE_SIZE])))
        has_length = hasattr(found, "device_prefix_len")
        length = found.device_prefix_len if has_length else len(found.device_indices)
        return length // PAGE_SIZE, found.last_device_node

    def insert() -> None:
        value = allocator.alloc(len(TOKENS))
        tree.insert(InsertParams(key=RadixKey(TOKENS), value=value))

    free = len(allocator.pages)
    insert()
    used = known(3)[1]
    tree.inc_lock_ref(used)
    compat.uproot(engine, tree, req, TOKENS[:-1], 1)  # five whole pages of these tokens
    assert known(6)[0] == 3
    assert len(allocator.pages) == free - 3
    compat.uproot(engine, tree, req, TOKENS, 1)
    assert known(6)[0] == 3
    tree.dec_lock_ref(used)
    compat.uproot(engine, tree, req, TOKENS, 2)
    assert known(6)[0] == 2
    compat.uproot(engine, tree, req, TOKENS[:5], 0)  # not a page
    assert known(6)[0] == 2
    compat.uproot(engine, tree, req, TOKENS, 0)
    assert known(6)[0] == 0
    assert len(allocator.pages) == free
    assert tree.evictable_size() == 0


def a_tree_knows_the_pages_of_its_nodes(engine: Any) -> None:
    from sglang.srt.mem_cache.base_prefix_cache import InsertParams, MatchPrefixParams
    from sglang.srt.mem_cache.radix_cache import RadixCache, RadixKey

    from tiermem.integrations import sglang_compat as compat
    from tiermem.integrations import sglang_hooks, sglang_tree

    tree = RadixCache.create_simulated(mock_allocator=make_allocator(), page_size=PAGE_SIZE)
    stock = RadixCache._split_node
    tree._split_node = lambda *args: sglang_hooks.split(stock, tree, *args)

    def node_of(pages: int) -> Any:
        key = RadixKey(TOKENS[: pages * PAGE_SIZE])
        return tree.match_prefix(MatchPrefixParams(key=key)).last_device_node

    def take_over(stem: Any, pages: int) -> Any:
        req, value = Request(), tree.token_to_kv_pool_allocator.alloc(pages * PAGE_SIZE)
        req.last_node = stem
        engine.residence.follow(req, engine.page_numbers(value[::PAGE_SIZE].numpy()).tolist())
        with compat.growing(engine, tree, req):
            tree.insert(InsertParams(key=RadixKey(TOKENS[: pages * PAGE_SIZE]), value=value))
        return known(pages)

    def known(pages: int) -> Any:
        values: list[Any] = [*sglang_tree.path(tree.root_node, node_of(pages))]
        found = sglang_tree.pages_of(values)
        if found is not None:
            read = engine.page_numbers(torch.cat(values)[::PAGE_SIZE].numpy())
            assert found.tolist() == read.tolist()
        return found

    assert len(take_over(tree.root_node, 4)) == 4
    assert len(known(3)) == 3  # in two parts from here on
    assert len(known(4)) == 4
    assert len(take_over(node_of(4), 6)) == 6
    assert len(take_over(tree.root_node, 5)) == 5, "the tree's own pages, not this request's"
    assert len(known(6)) == 6


class Request:
    extra_key = None
    last_node: Any = None


def make_allocator() -> Any:
    from tiermem.integrations.sglang_allocator import PageMajorAllocator

    return PageMajorAllocator(32 * PAGE_SIZE, PAGE_SIZE, torch.bfloat16, "cpu", None, False)


if __name__ == "__main__":
    opened = open_engine()
    a_group_tells_what_is_freed(opened)
    a_branch_is_cut_where_it_is_not_in_use(opened)
    a_tree_knows_the_pages_of_its_nodes(opened)
