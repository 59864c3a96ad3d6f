"""What the plain radix tree's nodes know of their pages, over a stand-in of that tree.

SGLang's own tree is tried in `sglang_parts_child.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.integrations.test_sglang_engine import TOKENS, pages_of
from tests.integrations.test_sglang_engine import open_engine as open_engine  # a fixture
from tests.integrations.test_sglang_hooks import Allocator, Request
from tests.integrations.test_sglang_hooks import engine as engine  # a fixture
from tiermem.integrations import sglang_compat as compat
from tiermem.integrations import sglang_hooks as hooks
from tiermem.integrations import sglang_tree
from tiermem.integrations.sglang_engine import Engine
from tiermem.integrations.sglang_pages import Pages

torch = pytest.importorskip("torch")
FunctionMode: Any = pytest.importorskip("torch.overrides").TorchFunctionMode

SIZE = 16
Split = Callable[..., Any]


class Reads(FunctionMode):  # type: ignore[misc]  # torch may be absent
    """Counts reads from the device while it is entered: each waits for what is queued there."""

    count = 0

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.count += function is torch.Tensor.cpu
        return function(*args, **(kwargs or {}))


class Node:
    def __init__(self, key: list[int], value: Any, parent: Any) -> None:
        self.key, self.value, self.parent = key, value, parent
        self.children: dict[tuple[int, ...], Node] = {}


class RadixCache:
    """Named and shaped as SGLang's: whole pages, copies of indices, a split makes a new parent."""

    disable = False

    def __init__(self, engine: Engine, split: Split = hooks.split) -> None:
        self.root_node = Node([], [], None)
        self.token_to_kv_pool_allocator = Allocator()
        self._engine = engine
        self._split = split

    def indices(self, pages: Pages) -> Any:
        firsts = torch.from_numpy(self._engine.first_indices(pages))
        return (firsts[:, None] + torch.arange(SIZE)).reshape(-1)

    def insert(self, tokens: list[int], pages: Pages) -> int:
        """How many of these pages it had already."""
        node, at = self._walk(tokens)
        if at < len(tokens):
            leaf = Node(tokens[at:], self.indices(pages)[at:].clone(), node)
            node.children[tuple(tokens[at : at + SIZE])] = leaf
        return at // SIZE

    def match(self, req: Request, most: int | None = None) -> None:
        """As `init_next_round_input` with this tree."""
        req.last_node, _ = self._walk(req.origin_input_ids[:most])
        values = sglang_tree.path(self.root_node, req.last_node)
        req.prefix_indices = torch.cat(values) if values else torch.empty(0, dtype=torch.int64)

    def evict(self, node: Node) -> Pages:
        del node.parent.children[tuple(node.key[:SIZE])]
        self.token_to_kv_pool_allocator.freed += len(node.key)
        return self._engine.page_numbers(node.value[::SIZE].numpy())

    def leaves(self) -> list[Node]:
        found, left = [], list(self.root_node.children.values())
        while left:
            node = left.pop()
            left += node.children.values()
            found += [] if node.children else [node]
        return found

    def _walk(self, tokens: list[int]) -> tuple[Node, int]:
        node, at = self.root_node, 0
        while (child := node.children.get(tuple(tokens[at : at + SIZE]))) is not None:
            same = SIZE
            while (
                same < len(child.key)
                and child.key[same : same + SIZE] == (tokens[at + same : at + same + SIZE])
            ):
                same += SIZE
            if same < len(child.key):
                child = self._split(RadixCache._cut_in_two, self, child.key, child, same)
            node, at = child, at + same
        return node, at

    def _cut_in_two(self, key: list[int], node: Node, length: int) -> Node:
        front = Node(key[:length], node.value[:length].clone(), node.parent)
        front.children = {tuple(key[length : length + SIZE]): node}
        node.parent.children[tuple(key[:SIZE])] = front
        node.key, node.value, node.parent = key[length:], node.value[length:].clone(), front
        return front


def unhooked(original: Split, *args: Any) -> Any:
    return original(*args)


def look(engine: Engine, tree: RadixCache, tokens: list[int]) -> tuple[list[int], int]:
    """The pages that a request is matched with, and how often the device was read for them."""
    req = Request(tokens)
    tree.match(req)
    with Reads() as reads:
        pages = compat.matched_pages(engine, tree, req)
    return pages.tolist(), reads.count


def run(engine: Engine, tree: RadixCache, tokens: list[int], pages: Pages) -> Pages:
    """A request computes all behind what it is matched with, into `pages`, and the tree takes it.
    The pages that it did not need."""
    req = Request(tokens)
    tree.match(req)
    had = compat.matched_pages(engine, tree, req)
    own = np.concatenate([had, pages[: len(tokens) // SIZE - len(had)]])
    engine.residence.follow(req, own.tolist())
    with compat.growing(engine, tree, req):
        tree.insert(tokens, own)
    engine.release(req)
    return pages[len(own) - len(had) :]


@pytest.fixture
def tree(engine: Engine) -> RadixCache:
    return RadixCache(engine)


def test_what_the_tree_took_over_from_a_request_is_not_read(
    engine: Engine, tree: RadixCache
) -> None:
    run(engine, tree, TOKENS[:48], pages_of(5, 2, 9))
    assert look(engine, tree, TOKENS[:48]) == ([5, 2, 9], 0)
    run(engine, tree, TOKENS[:80], pages_of(7, 1))
    assert look(engine, tree, TOKENS[:80]) == ([5, 2, 9, 7, 1], 0)


@pytest.mark.parametrize("finished", [False, True])
def test_the_hooks_tell_the_tree_what_it_takes_over(
    engine: Engine, tree: RadixCache, monkeypatch: pytest.MonkeyPatch, finished: bool
) -> None:
    monkeypatch.setattr(compat, "written_tokens", lambda req: req.origin_input_ids)
    monkeypatch.setattr(compat, "committed_tokens", lambda req: req.origin_input_ids)
    req = Request(TOKENS[:48])
    tree.match(req)
    engine.residence.follow(req, [5, 2, 9])
    hook = hooks.released if finished else hooks.shared
    hook(lambda req, tree, *args: tree.insert(TOKENS[:48], pages_of(5, 2, 9)), req, tree)
    assert look(engine, tree, TOKENS[:48]) == ([5, 2, 9], 0)


def test_what_nobody_told_is_read_once(engine: Engine, tree: RadixCache) -> None:
    tree.insert(TOKENS[:48], pages_of(5, 2, 9))
    assert look(engine, tree, TOKENS[:48]) == ([5, 2, 9], 1)
    assert look(engine, tree, TOKENS[:48]) == ([5, 2, 9], 0)


def test_both_parts_of_a_node_know_theirs(engine: Engine, tree: RadixCache) -> None:
    run(engine, tree, TOKENS[:64], pages_of(5, 2, 9, 7))
    assert look(engine, tree, TOKENS[:32]) == ([5, 2], 0)
    assert look(engine, tree, TOKENS[:64]) == ([5, 2, 9, 7], 0)


def test_a_node_that_was_split_unseen_is_read_anew(engine: Engine) -> None:
    tree = RadixCache(engine, unhooked)
    run(engine, tree, TOKENS[:64], pages_of(5, 2, 9, 7))
    assert look(engine, tree, TOKENS[:32]) == ([5, 2], 1)
    assert look(engine, tree, TOKENS[:64]) == ([5, 2, 9, 7], 1)


def test_a_value_that_was_replaced_is_read_anew(engine: Engine, tree: RadixCache) -> None:
    run(engine, tree, TOKENS[:48], pages_of(5, 2, 9))
    [leaf] = tree.leaves()
    leaf.value = tree.indices(pages_of(6, 3, 4))
    assert look(engine, tree, TOKENS[:48]) == ([6, 3, 4], 1)


def test_pages_that_are_used_again_are_those_of_their_new_node(
    engine: Engine, tree: RadixCache
) -> None:
    run(engine, tree, TOKENS[:48], pages_of(5, 2, 9))
    tree.evict(tree.leaves()[0])
    run(engine, tree, TOKENS[64:112], pages_of(5, 2, 9))
    run(engine, tree, TOKENS[:48], pages_of(9, 8, 5))
    assert look(engine, tree, TOKENS[64:112]) == ([5, 2, 9], 0)
    assert look(engine, tree, TOKENS[:48]) == ([9, 8, 5], 0)


@pytest.mark.parametrize("second", [48, 32, 64])
def test_where_another_request_was_first_its_pages_count(
    engine: Engine, tree: RadixCache, second: int
) -> None:
    """Both were matched with nothing; the second's tokens are the first's, fewer, or more."""
    tokens, own = TOKENS[:second], pages_of(1, 3, 4, 6)[: second // SIZE]
    late = Request(tokens)
    tree.match(late)
    run(engine, tree, TOKENS[:48], pages_of(5, 2, 9))
    engine.residence.follow(late, own.tolist())
    with compat.growing(engine, tree, late):
        tree.insert(tokens, own)
    expected = [5, 2, 9, 6][: second // SIZE]
    assert look(engine, tree, tokens)[0] == expected
    assert look(engine, tree, tokens) == (expected, 0)


def test_pages_that_do_not_fit_the_indices_are_not_kept(engine: Engine, tree: RadixCache) -> None:
    req = Request(TOKENS[:48])
    tree.match(req)
    engine.residence.follow(req, [5, 2])  # it has lost one
    with compat.growing(engine, tree, req):
        tree.insert(TOKENS[:48], pages_of(5, 2, 9))
    assert look(engine, tree, TOKENS[:48]) == ([5, 2, 9], 1)
    first, second = tree.indices(pages_of(1, 2)), tree.indices(pages_of(3))
    sglang_tree.learn([first, second], pages_of(1, 2), SIZE)
    sglang_tree.remember(second, pages_of(3, 4), SIZE)
    assert [sglang_tree.remembered(value) for value in (first, second)] == [None, None]
    sglang_tree.remember(second, pages_of(3), SIZE)
    assert sglang_tree.pages_of([first, second]) is None


def test_another_tree_is_read_each_time(engine: Engine) -> None:
    other = type("OtherTree", (RadixCache,), {})(engine)
    run(engine, other, TOKENS[:48], pages_of(5, 2, 9))
    assert look(engine, other, TOKENS[:48]) == ([5, 2, 9], 1)
    assert look(engine, other, TOKENS[:48]) == ([5, 2, 9], 1)


Turns = st.lists(
    st.tuples(
        st.sampled_from(["run", "insert", "look", "evict", "rewrite"]),
        st.lists(st.integers(0, 2), min_size=1, max_size=5),
        st.integers(0, 9),
    ),
    max_size=30,
)


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(turns=Turns, tells=st.booleans())
def test_what_is_known_is_what_would_be_read(
    engine: Engine, turns: list[tuple[str, list[int], int]], tells: bool
) -> None:
    """Random prompts of a few shared pages; a page that is free is the next to be taken."""
    tree = RadixCache(engine, hooks.split if tells else unhooked)
    free = list(range(1, 200))
    for turn, choices, pick in turns:
        tokens = [
            1000 * depth + 100 * choice + i
            for depth, choice in enumerate(choices)
            for i in range(SIZE)
        ]
        leaves = tree.leaves()
        if turn == "run":
            unused = run(engine, tree, tokens, pages_of(*free[: len(choices)]))
            free[: len(choices)] = unused.tolist()
        elif turn == "insert":
            had = tree.insert(tokens, pages_of(*free[: len(choices)]))
            free = [*free[:had], *free[len(choices) :]]
        elif turn == "evict" and leaves:
            free[:0] = tree.evict(leaves[pick % len(leaves)]).tolist()
        elif turn == "rewrite" and leaves:  # as no release does
            leaf = leaves[pick % len(leaves)]
            count = len(leaf.value) // SIZE
            leaf.value, free = tree.indices(pages_of(*free[:count])), free[count:]
        req = Request(tokens)
        tree.match(req)
        read = engine.page_numbers(req.prefix_indices[::SIZE].numpy())
        assert compat.matched_pages(engine, tree, req).tolist() == read.tolist()
