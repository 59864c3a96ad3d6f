"""Admission: which units that leave host memory are worth a write to NVMe.

An admission rule is told which units requests use and answers which of the leaving ones may be
written. It owns no clock: `now` is logical time in milliseconds, never decreasing.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from tiermem.errors import BadPolicy
from tiermem.policies.base import Admission, Ids, Mask
from tiermem.policies.queue import grown

F64 = npt.NDArray[np.float64]


class Unbounded:
    """A rule that counts no bytes."""

    def ahead(self, now: int, *, last: bool) -> int | None:
        return None


class All(Unbounded):
    """Everything is written."""

    def used(self, units: Ids, depths: Ids, now: int) -> None:
        pass

    def gone(self, units: Ids) -> None:
        pass

    def admit(self, units: Ids, now: int) -> Mask:
        return np.ones(len(units), np.bool_)


class SecondTouch(Unbounded):
    """Written once it was used twice: loses what returns for the first time (27 % of chat hits)."""

    def __init__(self) -> None:
        self._uses: npt.NDArray[np.uint8] = np.zeros(0, np.uint8)

    def used(self, units: Ids, depths: Ids, now: int) -> None:
        self._uses = grown(self._uses, int(units.max(initial=-1)) + 1)
        self._uses[units] = np.minimum(self._uses[units], 254) + 1

    def gone(self, units: Ids) -> None:
        self._uses[units[units < len(self._uses)]] = 0

    def admit(self, units: Ids, now: int) -> Mask:
        self._uses = grown(self._uses, int(units.max(initial=-1)) + 1)
        return self._uses[units] >= 2


class PredictedReuse(Unbounded):
    """Written if units like it were used again often enough.

    Alike: as many uses so far (1, 2, 3 or more) and as deep (by powers of two). Learnt online from
    every unit that asked, written or not; counts decay, so that a change of load is followed.
    """

    USES, DEPTHS = 3, 16
    DECAY_EVERY, DECAY = 4096, 0.9
    PRIOR = 16.0
    """Samples of certain reuse that each kind starts with: write until it is known better."""

    def __init__(self, threshold: float = 0.05) -> None:
        """threshold: least probability of another use."""
        if not 0 <= threshold <= 1:
            raise BadPolicy(f"admission by reuse: threshold {threshold} is not in 0..1")
        self.threshold = threshold
        kinds = self.USES * self.DEPTHS
        self._asked: F64 = np.full(kinds, self.PRIOR)
        self._again: F64 = np.full(kinds, self.PRIOR)
        self._uses: npt.NDArray[np.uint8] = np.zeros(0, np.uint8)
        self._depth: npt.NDArray[np.uint8] = np.zeros(0, np.uint8)
        self._kind: npt.NDArray[np.int16] = np.zeros(0, np.int16)
        """The kind that a unit had when it asked last, or -1."""
        self._answers = 0

    def used(self, units: Ids, depths: Ids, now: int) -> None:
        self._fit(units)
        kinds = self._kind[units]
        np.add.at(self._again, kinds[kinds >= 0], 1.0)
        self._kind[units] = -1
        self._uses[units] = np.minimum(self._uses[units], 254) + 1
        self._depth[units] = np.minimum(np.log2(1 + depths), self.DEPTHS - 1).astype(np.uint8)

    def gone(self, units: Ids) -> None:
        # The kind stays: content that was refused and comes back counts as used again.
        self._fit(units)
        self._uses[units] = 0

    def admit(self, units: Ids, now: int) -> Mask:
        self._fit(units)
        uses = np.clip(self._uses[units], 1, self.USES) - 1
        kinds = uses.astype(np.int64) * self.DEPTHS + self._depth[units]
        likely: Mask = self._again[kinds] / self._asked[kinds] >= self.threshold
        np.add.at(self._asked, kinds, 1.0)
        self._kind[units] = kinds
        self._answers += len(units)
        if self._answers >= self.DECAY_EVERY:
            self._answers = 0
            self._asked *= self.DECAY
            self._again *= self.DECAY
        return likely

    def _fit(self, units: Ids) -> None:
        rows = int(units.max(initial=-1)) + 1
        if rows > len(self._uses):
            rows = max(rows, 2 * len(self._uses))
            self._uses, self._depth = grown(self._uses, rows), grown(self._depth, rows)
            self._kind = grown(self._kind, rows, -1)


class Budgeted:
    """Another rule under a write budget: a token bucket in bytes per second of logical time."""

    def __init__(
        self, inner: Admission, bytes_per_s: float, unit_bytes: int, burst_s: float = 10.0
    ) -> None:
        """burst_s: seconds of the budget that may be saved up."""
        if bytes_per_s <= 0 or unit_bytes <= 0:
            raise BadPolicy(f"write budget {bytes_per_s} bytes/s for units of {unit_bytes} bytes")
        self._inner = inner
        self._rate = bytes_per_s / 1000
        self._most = max(bytes_per_s * burst_s, float(unit_bytes))
        self._unit_bytes = unit_bytes
        self._saved = self._most
        self._at: int | None = None
        self.refused = 0
        """Units that the rule admitted and the budget did not."""

    def weigh(self, unit_bytes: int) -> None:
        """Units have become larger: each counts as this many bytes from now on."""
        self._unit_bytes = unit_bytes
        self._most = max(self._most, float(unit_bytes))

    def used(self, units: Ids, depths: Ids, now: int) -> None:
        self._inner.used(units, depths, now)

    def gone(self, units: Ids) -> None:
        self._inner.gone(units)

    def admit(self, units: Ids, now: int) -> Mask:
        self._refill(now)
        wanted = self._inner.admit(units, now)
        may = int(self._saved // self._unit_bytes)
        over = np.flatnonzero(wanted)
        # What leaves last is worth most.
        over = over[: max(0, len(over) - may)]
        wanted[over] = False
        self.refused += len(over)
        self._saved -= self._unit_bytes * int(np.count_nonzero(wanted))
        return wanted

    def ahead(self, now: int, *, last: bool) -> int | None:
        """A second's worth at most, and until the last none of half of what may be saved up."""
        self._refill(now)
        reserve = 0.0 if last else min(self._most / 2, self._most - self._unit_bytes)
        may = int((self._saved - reserve) // self._unit_bytes)
        return max(0, min(may, max(1, int(self._rate * 1000) // self._unit_bytes)))

    def _refill(self, now: int) -> None:
        passed_ms = 0 if self._at is None else now - self._at
        self._at = now
        self._saved = min(self._most, self._saved + passed_ms * self._rate)


RULES: dict[str, Callable[[], Admission]] = {
    "all": All,
    "second": SecondTouch,
    "reuse": PredictedReuse,
}


def admission(name: str, bytes_per_s: float = 0.0, unit_bytes: int = 1) -> Admission:
    """The rule called all, second or reuse, under a write budget unless that is 0."""
    if name not in RULES:
        raise BadPolicy(f"no admission {name!r}; known: {', '.join(RULES)}")
    rule = RULES[name]()
    return Budgeted(rule, bytes_per_s, unit_bytes) if bytes_per_s else rule
