"""Which pages the nodes of SGLang's plain radix tree have, known on the CPU.

A node has them as a tensor of token indices on the GPU, and who reads that waits for all that is
queued there. So their numbers are kept beside it, as an attribute of that very tensor. They cannot
be those of other indices: a node that is split gets two new tensors, a page that is freed and used
again is in a new one, and nothing writes into one. (`mem_cache/radix_cache.py` of 0.5.17, 0.5.21
and 0.5.23 assigns `value` in `_insert_helper` and `_split_node` alone, a clone each time; what it
hands out is concatenated, so copied; the allocator divides slices of it.)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from tiermem.integrations.sglang_pages import Pages

_PAGES = "tiermem_pages"


class Indices(Protocol):
    """A tensor of token indices; that of a node is of whole pages."""

    def __len__(self) -> int: ...


class Node(Protocol):
    """What this module uses of a `TreeNode`."""

    @property
    def value(self) -> Indices: ...
    @property
    def parent(self) -> Node: ...


def remember(value: Indices, pages: Pages, page_size: int) -> None:
    """These indices are those of these pages; nothing is kept if there are more or fewer."""
    if len(pages) * page_size == len(value):
        setattr(value, _PAGES, pages.copy())


def remembered(value: Indices) -> Pages | None:
    """int32[n]: the pages of these indices; None where nobody has told."""
    pages: Pages | None = getattr(value, _PAGES, None)
    return pages


def path(root: Node, node: Node) -> list[Indices]:
    """The indices of each node from below the root to this one."""
    values = []
    while node is not root:
        values.append(node.value)
        node = node.parent
    return values[::-1]


def pages_of(values: Sequence[Indices]) -> Pages | None:
    """int32[n]: the pages of all of these, in order; None unless all are known."""
    parts = [pages for pages in map(remembered, values) if pages is not None]
    return np.concatenate(parts) if parts and len(parts) == len(values) else None


def learn(values: Sequence[Indices], pages: Pages, page_size: int) -> None:
    """All of these together have these pages; nothing is kept if they have more or fewer."""
    counts = [len(value) // page_size for value in values]
    if sum(counts) == len(pages):
        for value, part in zip(values, np.split(pages, np.cumsum(counts[:-1])), strict=True):
            remember(value, part, page_size)
