"""Which content is in which page: 128-bit keys beside the page table, and an index over them.

A label says that a page holds the content of its key. The flag LABELLED in the table is what
counts: everything that changes or gives up a page's bytes clears it, and the key that stays behind
in the column means nothing without it.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from tiermem.keyindex import Accept, KeyIndex, Keys
from tiermem.table import LABELLED, PageTable, Rows
from tiermem.tier import Mask

_STEP = np.uint64(0x9E3779B97F4A7C15)


class Contents:
    """Keys uint64[rows, 2] of labelled pages; takes no memory before the first label."""

    def __init__(self, table: PageTable) -> None:
        self._table = table
        self._keys: Keys = np.zeros((0, 2), np.uint64)
        self._index = KeyIndex(self._keys)

    def label(self, rows: Rows, keys: Keys) -> None:
        """These pages hold the content of these keys; the flag is the caller's to set."""
        if len(self._keys) < self._table.rows:
            more = self._table.rows - len(self._keys)
            self._keys = np.concatenate([self._keys, np.zeros((more, 2), np.uint64)])
            self._index.rebuild(self._keys)
        self._keys[rows] = keys
        self._index.add(rows)

    def keys(self, rows: Rows) -> Keys:
        """uint64[n, 2]: the keys of labelled pages."""
        found: Keys = self._keys[rows]
        return found

    def find(self, keys: Keys, accept: Accept) -> Rows:
        """int32[n]: a labelled page with the content keys[i] that is accepted, or -1."""

        def counts(rows: Rows, which: npt.NDArray[np.intp]) -> Mask:
            labelled: Mask = (self._table.flags[rows] & LABELLED) != 0
            return labelled & accept(rows, which)

        return self._index.find(keys, counts)


def page_keys(keys: Keys, pages: int) -> Keys:
    """uint64[n * pages, 2]: a key for each page of units with these keys, unit by unit.

    The first page has the unit's own key, so units of one page need no other.
    """
    if pages == 1:
        return keys
    made = np.repeat(keys, pages, axis=0)
    made[:, 1] ^= np.tile(np.arange(pages, dtype=np.uint64), len(keys)) * _STEP
    return made
