"""Hit density learnt online: how many hits a class of blocks earns for the time it occupies.

After LHD (Beckmann et al., NSDI 2018): for each class a decayed histogram of the ages at which its
blocks were used again. The density at an age is the best, over all horizons, of the probability of
a hit by then over the expected time until a hit or the horizon.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]

BUCKETS = 80
"""Four to an octave of seconds: the last begins after ten days."""

STARTS_S: F64 = 2.0 ** (np.arange(BUCKETS + 1) / 4) - 1
WIDTHS_S: F64 = np.diff(STARTS_S)
_LATER = np.triu(np.ones((BUCKETS, BUCKETS), np.bool_))


def bucket_of(age_ms: I64) -> I64:
    """The age bucket: min(79, floor(4 log2(1 + s)))."""
    buckets: I64 = np.minimum(4 * np.log2(1 + age_ms / 1000), BUCKETS - 1).astype(np.int64)
    return buckets


class Densities:
    """Histograms of classes 1..classes-1, and the densities that follow from them."""

    def __init__(
        self, classes: int, every: int = 4096, decay: float = 0.98, floor: float = 0.015,
        prior: float = 0.0,
    ) -> None:  # fmt: skip
        """every: block accesses between two decays by `decay`; floor: the least survival.

        prior: samples of the mean over all classes that are added to each class's own.
        """
        self.table: F64 = np.zeros((classes, BUCKETS))
        """Hits per second of residence, by class and age bucket; class 0: all classes together."""
        self.samples: F64 = np.zeros(classes)
        self._hits: F64 = np.zeros(classes * BUCKETS)
        self._every, self._decay, self._floor, self._prior = every, decay, floor, prior
        self._accesses = 0
        self.refreshes = 0

    def begin(self, classes: I64) -> None:
        """A sample begins for each of these blocks' classes."""
        self.samples += np.bincount(classes, minlength=len(self.samples))

    def hit(self, classes: I64, ages_ms: I64) -> None:
        """Blocks of these classes were used again at these ages."""
        np.add.at(self._hits, classes * BUCKETS + bucket_of(ages_ms), 1.0)

    def count(self, accesses: int) -> None:
        """So many block accesses have passed; recompute and decay when it is time."""
        self._accesses += accesses
        while self._accesses >= self._every:
            self._accesses -= self._every
            self._refresh()
            self._hits *= self._decay
            self.samples *= self._decay

    def _refresh(self) -> None:
        active = np.flatnonzero(self.samples >= 0.5)
        if not len(active):
            return
        hits = self._hits.reshape(-1, BUCKETS)
        mean = hits.sum(axis=0) / self.samples.sum()
        samples = self.samples[active, None]
        share = (hits[active] + self._prior * mean) / (samples + self._prior)
        share, active = np.vstack([mean, share]), np.append(0, active)
        by_then = _from_zero(share)
        survival = np.maximum(1 - by_then[:, :-1], self._floor)
        residence = _from_zero(survival * WIDTHS_S)
        gained = by_then[:, None, 1:] - by_then[:, :-1, None]
        spent = residence[:, None, 1:] - residence[:, :-1, None]
        # [class, from bucket k, to horizon m]: only m >= k means anything.
        ratio = np.divide(gained, spent, out=np.zeros_like(gained), where=_LATER)
        self.table[active] = ratio.max(axis=2)
        self.refreshes += 1


def _from_zero(columns: F64) -> F64:
    """Running sums along the rows, with a zero before them."""
    sums = np.zeros((len(columns), BUCKETS + 1))
    np.cumsum(columns, axis=1, out=sums[:, 1:])
    return sums
