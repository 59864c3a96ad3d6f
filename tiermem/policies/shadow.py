"""Shadow mode: other policies rank a sample of whole sessions, and nothing is moved.

Each candidate has an imagined tier of the sample's part of the capacity (SHARDS, Waldspurger et
al., FAST 2015, by session, so that chains stay whole). What it would have hit, stalled and passed
down says whether it would do better than the policy that runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tiermem.errors import BadPolicy
from tiermem.policies.base import Ids, Keys, RequestFacts
from tiermem.policies.registry import load
from tiermem.policies.trial import Trial

BITS = 32
_MIX = 0x9E3779B97F4A7C15
"""Fibonacci hashing: spreads consecutive session numbers."""


@dataclass(frozen=True, slots=True)
class ShadowReport:
    """Of one candidate, over the sampled requests.

    stall_s: to load or compute what it missed, at `miss_s` a block; written: units it passed down.
    """

    policy: str
    requests: int
    accesses: int
    hits: int
    prefix_hits: int
    stall_s: float
    written: int


class Shadow:
    """Candidates on trial beside a running tier. Calls come under the space's lock, as facts do."""

    def __init__(
        self, names: Sequence[str], capacity: int, sample: float = 1 / 16, miss_s: float = 0.0,
        seed: int = 0,
    ) -> None:  # fmt: skip
        """names: as the registry takes them; sample: part of the sessions; miss_s: cost of a block
        that was not there. Raises BadPolicy."""
        if not 0 < sample <= 1:
            raise BadPolicy(f"shadow: sample {sample} is not in (0, 1]")
        part = max(1, round(capacity * sample))
        self._trials = {name: Trial(load(name, part, seed), part) for name in names}
        self._below = int(sample * 2**BITS)
        self._miss_s = miss_s
        self._unit_of: dict[int, int] = {}
        self._requests = 0

    def sampled(self, session: int) -> bool:
        """Whether this session is in the sample: always the same answer."""
        mixed: int = ((session * _MIX) >> (64 - BITS)) % 2**BITS
        return mixed < self._below

    def request(self, session: int, names: Keys, facts: RequestFacts, now: int) -> None:
        """A request of a session ended; names: uint64[n], its blocks' contents, first first."""
        if not len(names) or not self.sampled(session):
            return
        self._requests += 1
        units = self._units(names)
        for trial in self._trials.values():
            trial.tier.fit(len(self._unit_of))
            trial.use(units, now)
            trial.finish(units, facts, now)

    def report(self) -> list[ShadowReport]:
        """One entry a candidate, in the order given."""
        return [
            ShadowReport(
                policy=name,
                requests=self._requests,
                accesses=trial.score.accesses,
                hits=trial.score.hits,
                prefix_hits=trial.score.prefix_hits,
                stall_s=(trial.score.accesses - trial.score.prefix_hits) * self._miss_s,
                written=trial.score.evicted,
            )
            for name, trial in self._trials.items()
        ]

    def _units(self, names: Keys) -> Ids:
        """Dense numbers for contents, shared by all trials."""
        unit_of = self._unit_of
        return np.array(
            [unit_of.setdefault(name, len(unit_of)) for name in names.tolist()], np.int32
        )
