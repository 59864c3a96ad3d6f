"""Large groups are copied in slices: the first bytes of every slot, then the next of every slot.

Who reads pages from front to back, as a model reads layer after layer, begins when the first slice
is there and not when the last one is. An `Arriving` says to a stream how far to wait.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np

from tiermem.tier import Done, Mask, Orderable

MOST = 8
"""Slices of a group: the first is there after an eighth of the time."""


class OrderableDone(Done, Orderable, Protocol):
    """A Done that a stream can wait for."""


Slice = tuple[int, Orderable]
"""From which byte of each slot on, and what it takes for the bytes from there to the next slice."""


def cuts(n: int, slot_bytes: int, least_bytes: int, group_bytes: int) -> Iterator[tuple[int, int]]:
    """(first byte, end) of each slice in which n slots are copied; one if they are small.

    least_bytes: of one slice of a slot. group_bytes: of all slots together, to be worth it.
    """
    slices = 1
    if n * slot_bytes >= group_bytes:
        slices = max(1, min(MOST, slot_bytes // least_bytes))
    step = -(-slot_bytes // slices)
    for first in range(0, slot_bytes, step):
        yield first, min(first + step, slot_bytes)


class Sliced:
    """The Done of a group that was copied slice by slice, in order, on one stream or queue."""

    __slots__ = ("_dones", "slices")

    def __init__(self, firsts: Sequence[int], dones: Sequence[OrderableDone]) -> None:
        self._dones = dones
        self.slices: tuple[Slice, ...] = tuple(zip(firsts, dones, strict=True))

    @property
    def error(self) -> Exception | None:
        return next((done.error for done in self._dones if done.error is not None), None)

    @property
    def failed(self) -> Mask | None:
        bad = [done.failed for done in self._dones if done.failed is not None]
        return np.logical_or.reduce(bad) if bad else None

    def ready(self) -> bool:
        return self._dones[-1].ready()

    def wait(self, timeout_s: float | None = None) -> bool:
        return self._dones[-1].wait(timeout_s)

    def order(self, stream: int | None) -> None:
        """Make `stream` wait for all of it."""
        self._dones[-1].order(stream)


class Arriving:
    """Loads that work on a stream will read from front to back, slice by slice. For one thread."""

    def __init__(self) -> None:
        self._slices: list[Slice] = []
        self._next = 0

    def __len__(self) -> int:
        """Slices that no stream waits for yet."""
        return len(self._slices)

    def add(self, work: Orderable) -> None:
        """A load that is under way, or has ended."""
        self._slices += getattr(work, "slices", ((0, work),))
        self._next = 0

    def order(self, stream: int | None, nbytes: int | None = None) -> None:
        """Make `stream` wait until the first `nbytes` of each page are there (None: all of it).

        A stream of None is that of `Orderable.order`. What was waited for once is forgotten, so
        all calls between two `add`s name one stream.
        """
        if not self._slices or (nbytes is not None and nbytes <= self._next):
            return
        later = [] if nbytes is None else [one for one in self._slices if one[0] >= nbytes]
        for first, work in self._slices:
            if nbytes is None or first < nbytes:
                work.order(stream)
        self._slices = later
        self._next = min((first for first, _ in later), default=0)
