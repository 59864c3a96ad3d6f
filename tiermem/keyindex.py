"""Which slot holds a key: an open-addressing table of slot numbers, probed for many keys at once.

The keys themselves live in a column of its owner, one a slot (of a slab) or one a page (of the
page table); a cell holds only a slot. A slot that changed its key leaves a stale cell, which
matches nothing and is swept out when the table is built anew.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

Slots = npt.NDArray[np.int32]
Keys = npt.NDArray[np.uint64]
Accept = Callable[[Slots, npt.NDArray[np.intp]], npt.NDArray[np.bool_]]
"""(slots, positions of the keys asked for) to bool[n]: whether a slot with that key counts."""

EMPTY = -1
FILL = 0.85
"""The table is rebuilt when this part of its cells is used, stale ones included."""
CELLS_A_SLOT = 1.5


class KeyIndex:
    """Slots by 128-bit key; `keys` is the column uint64[capacity, 2], zero where none."""

    def __init__(self, keys: Keys) -> None:
        self.rebuild(keys)

    def rebuild(self, keys: Keys) -> None:
        """Take a (grown, cut, loaded) column and index every slot that has a key."""
        self._keys = keys
        self._cells = np.full(max(64, int(len(keys) * CELLS_A_SLOT)), EMPTY, np.int32)
        self._used = 0
        self._place(np.flatnonzero(keys.any(axis=1)).astype(np.int32))

    def add(self, slots: Slots) -> None:
        """These slots have got keys in the column. A key may be that of several slots."""
        if self._used + len(slots) > FILL * len(self._cells):
            self.rebuild(self._keys)
        else:
            self._place(slots)

    def find(self, keys: Keys, accept: Accept | None = None) -> Slots:
        """int32[n]: a slot whose key is keys[i] (uint64[n, 2]), or -1. The zero key is in none.

        accept: which slots count; the search goes on past one that does not.
        """
        found = np.full(len(keys), EMPTY, np.int32)
        open_ = np.flatnonzero(keys.any(axis=1)) if len(self._keys) else found[:0]
        at = self._start(keys[open_])
        while len(open_):
            slots = self._cells[at]
            here = (slots != EMPTY) & (self._keys[slots] == keys[open_]).all(axis=1)
            if accept is not None and here.any():
                here[here] = accept(slots[here], open_[here])
            found[open_[here]] = slots[here]
            go_on = (slots != EMPTY) & ~here
            open_, at = open_[go_on], (at[go_on] + 1) % len(self._cells)
        return found

    def _start(self, keys: Keys) -> npt.NDArray[np.int64]:
        mixed = keys[:, 0] ^ (keys[:, 1] * np.uint64(0x9E3779B97F4A7C15))
        mixed ^= mixed >> np.uint64(32)
        return (mixed % np.uint64(len(self._cells))).astype(np.int64)

    def _place(self, slots: Slots) -> None:
        """Linear probing, all slots at once: of several that want a cell, one gets it a round."""
        at = self._start(self._keys[slots])
        self._used += len(slots)
        while len(slots):
            free = self._cells[at] == EMPTY
            self._cells[at[free]] = slots[free]
            rest = self._cells[at] != slots
            slots, at = slots[rest], (at[rest] + 1) % len(self._cells)
