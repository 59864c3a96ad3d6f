"""A policy on trial: it ranks an imagined tier, request by request, without bytes.

The simulator's request mode and the shadow mode of a running space are both this. A request's
blocks are looked up and pinned first; then room is made for the missing ones, deepest first.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tiermem.errors import BadPolicy
from tiermem.policies.base import Candidates, Eviction, EvictionBase, Ids, Keys, Mask, RequestFacts
from tiermem.policies.queue import grown


@dataclass(slots=True)
class Score:
    """What a policy earned. prefix_hits: over requests, the blocks before the first miss."""

    accesses: int = 0
    hits: int = 0
    prefix_hits: int = 0
    inserted: int = 0
    evicted: int = 0


class Resident:
    """The units in the imagined tier; those of a running request may not leave."""

    def __init__(self, units: int = 0) -> None:
        self.held: Mask = np.zeros(units, np.bool_)
        self.pinned: Mask = np.zeros(units, np.bool_)
        self.size = 0

    def keep(self, units: Ids) -> Mask:
        return self.held[units] & ~self.pinned[units]

    def all(self) -> Ids:
        return np.flatnonzero(self.held & ~self.pinned).astype(np.int32)

    def fit(self, rows: int) -> None:
        if rows > len(self.held):
            rows = max(rows, 2 * len(self.held))
            self.held, self.pinned = grown(self.held, rows), grown(self.pinned, rows)


class Trial:
    """One policy with a tier of `capacity` units."""

    def __init__(self, policy: Eviction, capacity: int, units: int = 0) -> None:
        self.policy = policy
        self.capacity = capacity
        self.score = Score()
        self.tier = Resident(units)
        self._coming = getattr(policy, "coming", EvictionBase.coming.__get__(policy))

    def use(self, blocks: Ids, now: int, counted: bool = True, names: Keys | None = None) -> Mask:
        """A request looks these up, first block first, and stores what fits; bool[n]: the hits.

        names: of their contents, where numbers are used again for others. They stay pinned until
        `finish`. Raises BadPolicy if the policy breaks the rules.
        """
        tier, policy = self.tier, self.policy
        hit = tier.held[blocks]
        names = blocks.astype(np.uint64) if names is None else names
        if counted:
            self.score.accesses += len(blocks)
            self.score.hits += int(np.count_nonzero(hit))
            self.score.prefix_hits += len(blocks) if hit.all() else int(hit.argmin())
        tier.pinned[blocks] = True
        if hit.any():
            policy.accessed(blocks[hit][::-1], now)
        if not hit.all():
            missing = _first_mentions(blocks, ~hit)[::-1]
            units = blocks[missing]
            self._coming(units, names[missing], now)
            self.evict(len(units) - (self.capacity - tier.size), now)
            # Deepest first; what finds no room is not stored.
            missing = missing[: max(0, self.capacity - tier.size)]
            parents = np.where(missing > 0, blocks[missing - 1], -1).astype(np.int32)
            depths = missing.astype(np.int32)
            self.insert(blocks[missing], parents, depths, names[missing], now)
            if policy.leaf_first:
                # The whole chain again, so that order by last use is order by depth.
                policy.accessed(blocks[tier.held[blocks]][::-1], now)
        return hit

    def finish(self, blocks: Ids, facts: RequestFacts, now: int) -> None:
        """The request that used these blocks ended."""
        self.policy.finished(blocks[self.tier.held[blocks]][::-1], facts, now)
        self.tier.pinned[blocks] = False

    def evict(self, n: int, now: int) -> None:
        """Take n units out, or all that may leave."""
        if n <= 0:
            return
        units = checked(self.policy.victims(self.tier, n, now), self.tier, n, self.policy)
        if len(units):
            self.policy.removed(units, now)
            self.tier.held[units] = False
            self.tier.size -= len(units)
            self.score.evicted += len(units)

    def insert(self, units: Ids, parents: Ids, depths: Ids, names: Keys, now: int) -> None:
        """Units enter; there is room."""
        if len(units):
            self.policy.inserted(units, parents, depths, names, now)
            self.tier.held[units] = True
            self.tier.size += len(units)
            self.score.inserted += len(units)


def checked(units: Ids, candidates: Candidates, n: int, policy: Eviction) -> Ids:
    """The answer, if it keeps the rules; else BadPolicy: nobody falls back in a trial."""
    if len(units) > n:
        raise BadPolicy(f"{policy.name}: {len(units)} victims named, {n} asked for")
    if not candidates.keep(units).all():
        bad = units[~candidates.keep(units)][:5].tolist()
        raise BadPolicy(f"{policy.name}: named units that may not leave: {bad}")
    if len(units) > 1 and len(np.unique(units)) < len(units):
        raise BadPolicy(f"{policy.name}: named a unit twice")
    return units


def _first_mentions(blocks: Ids, wanted: Mask) -> npt.NDArray[np.intp]:
    """Positions of wanted blocks, each block once: a broken trace may name one twice."""
    at = np.flatnonzero(wanted)
    _, first = np.unique(blocks[at], return_index=True)
    return at if len(first) == len(at) else at[np.sort(first)]
