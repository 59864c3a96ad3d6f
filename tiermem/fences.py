"""Points on several streams, interned as small integers that a page-table column can hold.

Id 0 has always passed. A page that was used on stream 1 up to tick 7 and on stream 2 up to tick 3
holds one id for both. Ids are shared by all pages with the same last users, so there are few.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from tiermem.tier import PASSED, Fence, Mask

FenceIds = npt.NDArray[np.uint32]


class Fences:
    """Fence ids and what has passed. No stream is touched here: `observe` is told."""

    def __init__(self, rows: int = 256) -> None:
        self._ticks = np.zeros((rows, 1), np.uint64)  # [fence id, stream] = last tick of use
        self._passed = np.zeros(1, np.uint64)  # [stream] = last tick seen to have passed
        self._open = np.zeros(rows, np.bool_)  # fence ids not known to have passed
        self._any_open = False
        self._count = 1

    def observe(self, passed: npt.NDArray[np.uint64]) -> None:
        """uint64[streams]: the last tick that has passed on each stream. Never goes back."""
        self._widen(len(passed))
        self._passed[: len(passed)] = np.maximum(self._passed[: len(passed)], passed)
        if not self._any_open:
            return
        ids = np.flatnonzero(self._open[: self._count])
        still = (self._ticks[ids] > self._passed).any(axis=1)
        self._open[ids] = still
        self._any_open = bool(still.any())

    def is_passed(self, ids: FenceIds) -> Mask:
        """bool[n]: which of these fences have passed, as far as observed."""
        return ~self._open[ids]

    def has_passed(self, fence: int) -> bool:
        """`is_passed` of one."""
        return not self._open.item(fence)

    def join(self, ids: FenceIds, stream: int, tick: int) -> FenceIds:
        """uint32[n]: each fence, and the point `tick` on `stream` besides."""
        self._widen(stream + 1)
        n, first = len(ids), int(ids[0]) if len(ids) else 0
        if np.count_nonzero(ids == first) == n:
            fence = first if self._open.item(first) else 0
            if tick > self._passed.item(stream):
                fence = self._joined(fence, stream, tick)
            return np.full(n, fence, np.uint32)
        old = ids.copy()
        old[~self._open[ids]] = 0
        if tick <= self._passed[stream]:
            return old
        if (old == old[0]).all():
            return np.full(len(old), self._joined(int(old[0]), stream, tick), np.uint32)
        distinct, where = np.unique(old, return_inverse=True)
        joined = [self._joined(int(f), stream, tick) for f in distinct]
        return np.array(joined, np.uint32)[where]

    def point(self, ids: FenceIds) -> Fence:
        """The point after all of these fences, to hand to a route or a stream."""
        ids = ids[self._open[ids]]
        if not len(ids):
            return PASSED
        latest = self._ticks[np.unique(ids)].max(axis=0)
        ahead = np.flatnonzero(latest > self._passed)
        return Fence(tuple((int(s), int(latest[s])) for s in ahead))

    def sweep(self, column: FenceIds) -> None:
        """Set fences in `column` that have passed to 0, and use their ids again.

        The caller passes the only column that holds ids; cost is one pass over it, so this is
        called when ids run out (`crowded`), not at every use.
        """
        column[~self._open[column]] = 0
        live = np.flatnonzero(self._open[: self._count])
        renamed = np.zeros(len(self._open), np.uint32)
        renamed[live] = np.arange(1, len(live) + 1)
        column[:] = renamed[column]
        self._ticks[1 : len(live) + 1] = self._ticks[live]
        self._open[:] = False
        self._open[1 : len(live) + 1] = True
        self._count = len(live) + 1

    @property
    def all_passed(self) -> bool:
        """True if no fence is known to be open."""
        return not self._any_open

    @property
    def crowded(self) -> bool:
        """True when it is time to sweep."""
        return self._count > len(self._open) - 8

    def _joined(self, fence: int, stream: int, tick: int) -> int:
        row = self._ticks[fence].copy() if fence else np.zeros_like(self._ticks[0])
        if row[stream] >= tick:
            return fence
        row[stream] = tick
        last = self._count - 1
        if last and self._open[last] and (self._ticks[last] == row).all():
            return last
        if self._count == len(self._open):
            self._ticks = np.concatenate([self._ticks, np.zeros_like(self._ticks)])
            self._open = np.concatenate([self._open, np.zeros_like(self._open)])
        self._ticks[self._count] = row
        self._open[self._count] = self._any_open = True
        self._count += 1
        return self._count - 1

    def _widen(self, streams: int) -> None:
        more = streams - len(self._passed)
        if more > 0:
            self._passed = np.concatenate([self._passed, np.zeros(more, np.uint64)])
            self._ticks = np.pad(self._ticks, ((0, 0), (0, more)))
