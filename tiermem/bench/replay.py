"""Replays accesses against the policy classes of the runtime, as the pager would drive them.

Stream mode takes one access at a time and inserts every miss. Request mode looks all blocks of a
request up first and pins them while it makes room. A recorded log is replayed call by call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tiermem.bench.traces import Event
from tiermem.bench.workload import I32, I64, Workload
from tiermem.errors import BadPolicy
from tiermem.policies.base import Candidates, Eviction, EvictionBase, Ids, Mask
from tiermem.policies.belady import Belady

Progress = Callable[[int], None]
"""Told how many requests have been replayed."""

EVERY = 256
NO_ONE = np.array([-1], np.int32)


@dataclass(frozen=True, slots=True)
class Facts:
    """What is known of a request when it ends; None: the engine did not say."""

    session: int | None = None
    turn: int | None = None
    reason: str | None = None
    output_tokens: int | None = None


@dataclass(slots=True)
class Score:
    """What a policy earned. prefix_hits: over requests, the blocks before the first miss."""

    accesses: int = 0
    hits: int = 0
    prefix_hits: int = 0
    inserted: int = 0
    evicted: int = 0


class Resident:
    """The units in the simulated tier; those of the running request may not leave."""

    def __init__(self, units: int) -> None:
        self.held: Mask = np.zeros(units, np.bool_)
        self.pinned: Mask = np.zeros(units, np.bool_)
        self.size = 0

    def keep(self, units: Ids) -> Mask:
        return self.held[units] & ~self.pinned[units]

    def all(self) -> Ids:
        return np.flatnonzero(self.held & ~self.pinned).astype(np.int32)


def facts_of(workload: Workload, request: int, features: bool) -> Facts:
    """What an engine that passes all it knows, or nothing, says at the end of a request."""
    if not features:
        return Facts()
    return Facts(
        session=int(workload.session[request]),
        turn=int(workload.turn[request]),
        reason=workload.reasons[workload.reason[request]] or None,
        output_tokens=int(workload.output_tokens[request]),
    )


def stream(
    workload: Workload,
    policy: Eviction,
    capacity: int,
    features: bool = True,
    progress: Progress | None = None,
) -> Score:
    """Replay block by block, in the order of the trace; every miss inserts."""
    score = Score(accesses=workload.accesses)
    tier = Resident(workload.distinct)
    coming = getattr(policy, "coming", EvictionBase.coming.__get__(policy))
    next_use = next_accesses(workload.blocks) if isinstance(policy, Belady) else None
    for request in range(workload.requests):
        now, whole = int(workload.time_ms[request]), True
        first = int(workload.start[request])
        blocks = workload.of(request)
        for depth in range(len(blocks)):
            unit = blocks[depth : depth + 1]
            if tier.held[unit[0]]:
                score.hits += 1
                score.prefix_hits += whole
                policy.accessed(unit, now)
            else:
                whole = False
                keys = unit.astype(np.uint64)
                coming(unit, keys, now)
                if tier.size == capacity:
                    _evict(policy, tier, 1, now, score)
                parent = blocks[depth - 1 : depth] if depth else NO_ONE
                _insert(policy, tier, unit, parent, np.array([depth], np.int32), now, score)
            if next_use is not None and isinstance(policy, Belady):
                policy.expect(unit, next_use[first + depth : first + depth + 1])
        _end(workload, request, policy, tier, features, now)
        if progress and request % EVERY == 0:
            progress(request)
    return score


def requests(
    workload: Workload,
    policy: Eviction,
    capacity: int,
    features: bool = True,
    progress: Progress | None = None,
    first_scored: int = 0,
) -> Score:
    """Replay request by request. Requests before `first_scored` warm the tier and do not count."""
    score = Score()
    tier = Resident(workload.distinct)
    coming = getattr(policy, "coming", EvictionBase.coming.__get__(policy))
    for request in range(workload.requests):
        now = int(workload.time_ms[request])
        blocks = workload.of(request)
        hit = tier.held[blocks]
        if request >= first_scored:
            score.accesses += len(blocks)
            score.hits += int(np.count_nonzero(hit))
            score.prefix_hits += int(hit.argmin()) if not hit.all() else len(blocks)
        tier.pinned[blocks] = True
        if hit.any():
            policy.accessed(blocks[hit][::-1], now)
        if not hit.all():
            missing = _first_mentions(blocks, ~hit)[::-1]
            units = blocks[missing]
            coming(units, units.astype(np.uint64), now)
            short = len(units) - (capacity - tier.size)
            if short > 0:
                _evict(policy, tier, short, now, score)
            # Deepest first; what finds no room is not stored.
            missing = missing[: capacity - tier.size]
            parents = np.where(missing > 0, blocks[missing - 1], -1).astype(np.int32)
            depths = missing.astype(np.int32)
            _insert(policy, tier, blocks[missing], parents, depths, now, score)
            if policy.leaf_first:
                # The whole chain again, so that order by last use is order by depth.
                policy.accessed(blocks[tier.held[blocks]][::-1], now)
        _end(workload, request, policy, tier, features, now)
        tier.pinned[blocks] = False
        if progress and request % EVERY == 0:
            progress(request)
    return score


def _first_mentions(blocks: I32, wanted: Mask) -> npt.NDArray[np.intp]:
    """Positions of wanted blocks, each block once: a broken trace may name one twice."""
    at = np.flatnonzero(wanted)
    _, first = np.unique(blocks[at], return_index=True)
    return at if len(first) == len(at) else at[np.sort(first)]


def _evict(policy: Eviction, tier: Resident, n: int, now: int, score: Score) -> None:
    units = checked(policy.victims(tier, n, now), tier, n, policy)
    if len(units):
        policy.removed(units, now)
        tier.held[units] = False
        tier.size -= len(units)
        score.evicted += len(units)


def checked(units: Ids, candidates: Candidates, n: int, policy: Eviction) -> Ids:
    """The answer, if it keeps the rules; else BadPolicy: a simulator does not fall back."""
    if len(units) > n:
        raise BadPolicy(f"{policy.name}: {len(units)} victims named, {n} asked for")
    if not candidates.keep(units).all():
        bad = units[~candidates.keep(units)][:5].tolist()
        raise BadPolicy(f"{policy.name}: named units that may not leave: {bad}")
    if len(units) > 1 and len(np.unique(units)) < len(units):
        raise BadPolicy(f"{policy.name}: named a unit twice")
    return units


def _insert(
    policy: Eviction, tier: Resident, units: Ids, parents: Ids, depths: Ids, now: int, score: Score
) -> None:
    if len(units):
        policy.inserted(units, parents, depths, units.astype(np.uint64), now)
        tier.held[units] = True
        tier.size += len(units)
        score.inserted += len(units)


def _end(
    workload: Workload, request: int, policy: Eviction, tier: Resident, features: bool, now: int
) -> None:
    blocks = workload.of(request)
    policy.finished(blocks[tier.held[blocks]][::-1], facts_of(workload, request, features), now)


def next_accesses(blocks: I32) -> I64:
    """For each access, the index of the next one to the same block, or one past the end."""
    order = np.argsort(blocks, kind="stable")
    following = np.full(len(blocks), len(blocks), np.int64)
    same = blocks[order[1:]] == blocks[order[:-1]]
    following[order[:-1][same]] = order[1:][same]
    return following


class _Recorded:
    """Candidates as they were when the log was written."""

    def __init__(self, refused: list[int], held: dict[int, None]) -> None:
        self._refused = np.array(sorted(refused), np.int32)
        self._held = held

    def keep(self, units: Ids) -> Mask:
        return ~np.isin(units, self._refused)

    def all(self) -> Ids:
        units = np.fromiter(self._held, np.int32, len(self._held))
        return units[self.keep(units)]


def log_victims(
    events: Iterator[Event], tier: str, policy: Eviction
) -> Iterator[tuple[Event, list[int]]]:
    """Drive `policy` with what the log tells of one tier: each recorded answer beside its own."""
    held: dict[int, None] = {}
    for event in events:
        if event.tier != tier:
            continue
        units = np.array(event.units, np.int32)
        if event.e == "coming":
            keys = None if event.keys is None else np.array(event.keys, np.uint64)
            getattr(policy, "coming", EvictionBase.coming.__get__(policy))(units, keys, event.now)
        elif event.e == "inserted":
            held.update(dict.fromkeys(event.units))
            keys = None if event.keys is None else np.array(event.keys, np.uint64)
            parents = np.array(event.parents or [-1] * len(units), np.int32)
            depths = np.array(event.depths or [0] * len(units), np.int32)
            policy.inserted(units, parents, depths, keys, event.now)
        elif event.e == "accessed":
            policy.accessed(units, event.now)
        elif event.e == "removed":
            for unit in event.units:
                held.pop(unit, None)
            policy.removed(units, event.now)
        elif event.e == "finished":
            facts = Facts(event.session, event.turn, event.reason, event.output_tokens)
            policy.finished(units, facts, event.now)
        elif event.e == "victims":
            candidates = _Recorded(event.refused, held)
            yield event, policy.victims(candidates, event.n, event.now).tolist()
