"""The free pages of SGLang's pool, by number, kept on the CPU.

SGLang keeps them in a tensor on the GPU, so that nobody can tell which page was handed out without
waiting for the GPU. Here a page that is taken is known at once. What is freed comes back as a
tensor, whose numbers arrive a little later; they count from the start, and are waited for when
nothing else is left. First freed, first taken: all ranks of an engine hand out the same numbers,
whenever theirs arrive, and a page rests for as long as possible after its last use.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Protocol

import numpy as np
import numpy.typing as npt

Pages = npt.NDArray[np.int32]


class Arrival(Protocol):
    """Numbers of pages on their way from the GPU."""

    @property
    def count(self) -> int:
        """How many; known before they are."""

    def ready(self) -> bool: ...

    def pages(self) -> Pages:
        """int32[count]; waits for them."""


class Arrived:
    """Numbers that are here."""

    def __init__(self, pages: Pages) -> None:
        self._pages = pages
        self.count = len(pages)

    def ready(self) -> bool:
        return True

    def pages(self) -> Pages:
        return self._pages


class FreePages:
    """Pages 1 to `pages`; page 0 takes what the engine pads batches with and is never handed out.

    freed(pages): called with numbers that arrived, before any of them can be taken.
    """

    def __init__(self, pages: int, freed: Callable[[Pages], None]) -> None:
        self._ring = np.zeros(max(1, pages), np.int32)
        self._first = 0
        self._known = 0
        self._coming: deque[Arrival] = deque()
        self._expected = 0
        self._freed = freed
        self._push(np.arange(1, pages + 1, dtype=np.int32))

    def __len__(self) -> int:
        return self._known + self._expected

    def take(self, n: int) -> Pages | None:
        """int32[n] pages, no longer free; None if there are fewer."""
        self.settle()
        if n > len(self):
            return None
        while self._known < n:
            self._arrive()
        at = (self._first + np.arange(n)) % len(self._ring)
        self._first = (self._first + n) % len(self._ring)
        self._known -= n
        taken: Pages = self._ring[at]
        return taken

    def next(self, n: int) -> Pages:
        """int32[up to n]: those that will be taken next; they stay free."""
        at = (self._first + np.arange(min(n, self._known))) % len(self._ring)
        following: Pages = self._ring[at]
        return following

    def give(self, arrival: Arrival) -> None:
        """Pages are free again."""
        self._coming.append(arrival)
        self._expected += arrival.count

    def settle(self) -> None:
        """Take in what has arrived, without waiting."""
        while self._coming and self._coming[0].ready():
            self._arrive()

    def _arrive(self) -> None:
        pages = self._coming.popleft().pages()
        self._expected -= len(pages)
        self._freed(pages)
        self._push(pages)

    def _push(self, pages: Pages) -> None:
        end = self._first + self._known
        assert self._known + len(pages) <= len(self._ring), "a page is freed twice"
        self._ring[(end + np.arange(len(pages))) % len(self._ring)] = pages
        self._known += len(pages)
