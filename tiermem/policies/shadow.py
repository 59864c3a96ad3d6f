"""Shadow mode: other policies rank a sample of whole sessions, and nothing is moved.

Each candidate has an imagined tier of the sample's part of the capacity (SHARDS, Waldspurger et
al., FAST 2015, by session, so that chains stay whole). What it would have hit, stalled and passed
down says whether it would do better than the policy that runs, which is on trial beside them.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np

from tiermem.errors import BadPolicy
from tiermem.policies.base import Ids, Keys, Mask, RequestFacts, ShadowReport
from tiermem.policies.queue import grown
from tiermem.policies.registry import load
from tiermem.policies.trial import Trial

log = logging.getLogger(__name__)

BITS = 32
_MIX = 0x9E3779B97F4A7C15
"""Fibonacci hashing: spreads consecutive session numbers."""

_UNNAMED = 1 << 63
"""Content that came without a key gets a number from here on; keys are hashes."""

_SLACK = 4
_LEAST = 4096
"""Contents remembered: so many times what the imagined tiers hold, and so many at least."""


class Shadow:
    """Candidates on trial beside a running space. Calls come under its lock, as facts do."""

    def __init__(
        self, names: Sequence[str], capacity: int, sample: float = 1 / 16, running: str = "",
        seed: int = 0,
    ) -> None:  # fmt: skip
        """names: as the registry takes them; capacity: units, of which the sample has its part;
        sample: part of the sessions; running: the name of the policy in use. Raises BadPolicy."""
        if not 0 < sample <= 1:
            raise BadPolicy(f"shadow: sample {sample} is not in (0, 1]")
        part = max(1, round(capacity * sample))
        self._trials = {name: Trial(load(name, part, seed), part) for name in names}
        self._failed: dict[str, str] = {}
        self._running = running
        self._below = int(sample * 2**BITS)
        self._requests = 0
        self._name: Keys = np.zeros(0, np.uint64)
        self._given = _UNNAMED
        self._unit_of: dict[int, int] = {}
        self._spare: list[int] = []
        self._most = max(_LEAST, _SLACK * part * len(names))

    def named(self, units: Ids, keys: Keys | None) -> None:
        self._fit(units)
        self._name[units] = self._fresh(len(units)) if keys is None else keys

    def finished(self, units: Ids, facts: RequestFacts, now: int) -> None:
        self._fit(units)
        names = self._name[units[::-1]]
        if len(names):
            # A chain's first block tells sessions apart where the engine does not.
            session = int(names[0]) if facts.session is None else facts.session
            self.request(session, names, facts, now)

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
        for name, trial in self._trials.items():
            if name not in self._failed:
                self._try(name, trial, units, names, facts, now)

    def report(self, unit_bytes: int = 0, miss_s: float = 0.0) -> tuple[ShadowReport, ...]:
        """One entry a candidate, in the order given. miss_s: to load one unit that was missed."""
        return tuple(
            ShadowReport(
                policy=name,
                running=name == self._running,
                requests=self._requests,
                accesses=trial.score.accesses,
                hits=trial.score.hits,
                prefix_hits=trial.score.prefix_hits,
                written=trial.score.evicted,
                written_bytes=trial.score.evicted * unit_bytes,
                stall_s=(trial.score.accesses - trial.score.prefix_hits) * miss_s,
                failed=self._failed.get(name, ""),
            )
            for name, trial in self._trials.items()
        )

    @property
    def remembered(self) -> int:
        """Contents that have a number in the imagined tiers; bounded."""
        return len(self._unit_of)

    def _fit(self, units: Ids) -> None:
        rows = int(units.max(initial=-1)) + 1
        known = len(self._name)
        if rows > known:
            self._name = grown(self._name, max(rows, 2 * known))
            self._name[known:] = self._fresh(len(self._name) - known)

    def _fresh(self, n: int) -> Keys:
        """Names for content that came without a key."""
        names = np.arange(n, dtype=np.uint64) + np.uint64(self._given)
        self._given += n
        return names

    def _try(
        self, name: str, trial: Trial, units: Ids, names: Keys, facts: RequestFacts, now: int
    ) -> None:
        trial.tier.fit(self._numbers)
        try:
            trial.use(units, now, names=names)
            trial.finish(units, facts, now)
        except Exception as error:  # a candidate's bug must not cost its engine a request
            self._failed[name] = f"{type(error).__name__}: {error}"
            log.warning("shadow trial ended policy=%s reason=%s", name, self._failed[name])

    @property
    def _numbers(self) -> int:
        return len(self._unit_of) + len(self._spare)

    def _units(self, names: Keys) -> Ids:
        """Dense numbers for contents, shared by all trials."""
        if len(self._unit_of) + len(names) > self._most:
            self._forget()
        return np.array([self._unit(name) for name in names.tolist()], np.int32)

    def _unit(self, name: int) -> int:
        unit = self._unit_of.get(name)
        if unit is None:
            unit = self._spare.pop() if self._spare else len(self._unit_of)
            self._unit_of[name] = unit
        return unit

    def _forget(self) -> None:
        """Contents that no imagined tier holds give their numbers back."""
        held: Mask = np.zeros(self._numbers, np.bool_)
        for trial in self._trials.values():
            n = min(len(held), len(trial.tier.held))
            held[:n] |= trial.tier.held[:n]
        known, numbers = self._unit_of, self._numbers
        self._unit_of = {name: unit for name, unit in known.items() if held[unit]}
        taken = np.zeros(numbers, np.bool_)
        taken[list(self._unit_of.values())] = True
        self._spare = np.flatnonzero(~taken).tolist()
