"""Two rates measured turn about: how they compare, and how sure that is.

Each round has both, one right after the other, so what the machine or the drive does for longer
than a round cancels in the round's own ratio. The interval is that of the sign test: it takes
nothing for granted about how the ratios are spread, only that rounds do not hang together.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec
import numpy as np

LEVEL = 0.95
LEAST = 6
"""Rounds below which the sign test has no interval of that level."""


class Ratio(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The median of the rounds' own ratios, and where it lies with 95 % confidence.

    low, high: None with fewer than six rounds.
    """

    n: int
    median: float
    low: float | None = None
    high: float | None = None


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> Ratio:
    """Ours over theirs; round i of both was measured together. At least one round, all positive.

    Raises ValueError for unequal numbers of rounds.
    """
    found = sorted(mine / other for mine, other in zip(ours, theirs, strict=True))
    n = len(found)
    median = float(np.median(found))
    if n < LEAST:
        return Ratio(n, median)
    left_out = _left_out(n)
    return Ratio(n, median, found[left_out], found[n - 1 - left_out])


def _left_out(n: int) -> int:
    """How many of n sorted samples may be left out at either end for an interval of LEVEL."""
    tail, most = 0.0, (1 - LEVEL) / 2
    for i in range(n):
        tail += math.comb(n, i) / 2**n
        if tail > most:
            return i - 1
    raise AssertionError("the tails of a distribution add up to one")
