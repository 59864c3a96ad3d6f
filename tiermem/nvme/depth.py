"""How many reads, or writes, to keep at the drive: a hill climb on the rate that is measured.

    measure ──▶ try one step ──▶ measure ──▶ better: stay there, another step the same way
                     ▲                  └──▶ not:    back, try the other way once, then rest
                     └────────────────────── after REST windows: measure again

More in flight than the drive can use makes each of them wait longer for nothing, so a step up must
pay for itself and a step down need only cost nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable

WINDOW_S = 0.2
"""Time with work waiting that one measurement takes; idle time in between does not count."""
WINDOW_ROUNDS = 4
"""A measurement is of at least so many slots for each one in flight."""
REST = 20
"""Windows between two searches."""
WORTH = 1.05
"""A step up must bring this factor; rates of equal windows on a virtual disk differ by 3 %."""
FREE = 0.99
"""A step down may cost this factor."""


class DepthClimb:
    """Finds a depth between two bounds. Not thread-safe: told of everything under one lock."""

    def __init__(
        self, start: int, lowest: int, highest: int, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        if not 1 <= lowest <= start <= highest:
            raise ValueError(f"depth {start} is not between {lowest} and {highest}, from 1 on")
        self.depth = start
        """What to use now: the best known, or the one on trial."""
        self._lowest, self._highest = lowest, highest
        self._clock = clock
        self._best = start
        self._rate: float | None = None  # of the best; None: to be measured
        self._up = True
        self._refused = 0  # steps in a row that did not help
        self._resting = 0
        self._slots, self._took_s, self._skip = 0, 0.0, start
        self._last: float | None = None

    def note(self, slots: int, busy: bool) -> bool:
        """So many slots have ended; busy: more were waiting. True if `depth` changed.

        Only time between two busy calls counts: what an idle drive does says nothing.
        """
        now = self._clock()
        if busy and self._last is not None:
            self._count(slots, now - self._last)
        self._last = now if busy else None
        if self._took_s < WINDOW_S or self._slots < WINDOW_ROUNDS * self.depth:
            return False
        before, rate = self.depth, self._slots / self._took_s
        self._judge(rate)
        self._begin(self.depth if self.depth != before else 0)
        return self.depth != before

    def _begin(self, skip: int) -> None:
        """Start a window; what was in flight under another depth is left out of it."""
        self._slots, self._took_s = 0, 0.0
        self._skip = skip
        self._last = None

    def _count(self, slots: int, took_s: float) -> None:
        if self._skip > 0:
            self._skip -= slots
            return
        self._slots += slots
        self._took_s += took_s

    def _judge(self, rate: float) -> None:
        if self._resting:
            self._resting -= 1
        elif self._rate is None:
            self._rate, self._refused = rate, 0
            self._step()
        elif rate >= self._rate * (WORTH if self.depth > self._best else FREE):
            self._best, self._rate, self._refused = self.depth, rate, 0
            self._step()
        else:
            self._refuse()

    def _step(self) -> None:
        """Put the next depth on trial."""
        best = self._best
        grain = max(1, best // 3)
        wanted = min(best + grain, self._highest) if self._up else max(best - grain, self._lowest)
        if wanted == best:
            self._refuse()
        else:
            self.depth = wanted

    def _refuse(self) -> None:
        """Go back, and try the other way, or rest if neither helps."""
        self.depth = self._best
        self._up = not self._up
        self._refused += 1
        if self._refused < 2:
            self._step()
        else:
            self._resting, self._rate = REST, None
