"""Replays accesses against the policy classes of the runtime, as the pager would drive them.

Stream mode takes one access at a time and inserts every miss. Request mode looks all blocks of a
request up first and pins them while it makes room. A recorded log is replayed call by call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from tiermem.bench.traces import Event
from tiermem.bench.workload import I32, I64, Workload
from tiermem.policies.base import Eviction, EvictionBase, Ids, Mask
from tiermem.policies.belady import Belady
from tiermem.policies.registry import load
from tiermem.policies.retention import Retained
from tiermem.policies.trial import Score, Trial

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
    trial = Trial(policy, capacity, workload.distinct)
    trial.score.accesses = workload.accesses
    following = next_accesses(workload.blocks) if isinstance(policy, Belady) else None
    for request in range(workload.requests):
        _stream_one(workload, request, trial, following)
        blocks, now = workload.of(request), int(workload.time_ms[request])
        trial.finish(blocks, facts_of(workload, request, features), now)
        if progress and request % EVERY == 0:
            progress(request)
    return trial.score


def _stream_one(workload: Workload, request: int, trial: Trial, following: I64 | None) -> None:
    policy, tier, score = trial.policy, trial.tier, trial.score
    now, whole = int(workload.time_ms[request]), True
    blocks = workload.of(request)
    coming = getattr(policy, "coming", EvictionBase.coming.__get__(policy))
    for depth in range(len(blocks)):
        unit = blocks[depth : depth + 1]
        if tier.held[unit[0]]:
            score.hits += 1
            score.prefix_hits += whole
            policy.accessed(unit, now)
        else:
            whole = False
            name = unit.astype(np.uint64)
            coming(unit, name, now)
            trial.evict(1 - (trial.capacity - tier.size), now)
            parent = blocks[depth - 1 : depth] if depth else NO_ONE
            trial.insert(unit, parent, np.array([depth], np.int32), name, now)
        if following is not None and isinstance(policy, Belady):
            at = int(workload.start[request]) + depth
            policy.expect(unit, following[at : at + 1])


def requests(
    workload: Workload,
    policy: Eviction,
    capacity: int,
    features: bool = True,
    progress: Progress | None = None,
    first_scored: int = 0,
) -> Score:
    """Replay request by request. Requests before `first_scored` warm the tier and do not count."""
    trial = Trial(policy, capacity, workload.distinct)
    for request in range(workload.requests):
        now = int(workload.time_ms[request])
        blocks = workload.of(request)
        trial.use(blocks, now, counted=request >= first_scored)
        trial.finish(blocks, facts_of(workload, request, features), now)
        if progress and request % EVERY == 0:
            progress(request)
    return trial.score


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
    """Drive `policy` with what the log tells of one tier: each recorded answer beside its own.

    Answers that the pager gave instead of the policy are left out: single ones that it refused,
    and all from the policy's retirement until another takes over.
    """
    held: dict[int, None] = {}
    now_runs: Eviction | None = policy
    refused = False
    failure: Exception | None = None
    for event in events:
        if event.tier != tier:
            continue
        if failure is not None and event.e != "retired":
            raise failure
        _follow(held, event)
        if event.e == "swap":
            fresh = load(event.policy, max(1, event.capacity), params=event.params)
            if isinstance(now_runs, Retained):
                now_runs.inner = fresh
            else:
                now_runs = fresh
        elif event.e == "retain" and now_runs is not None:
            if not isinstance(now_runs, Retained):
                now_runs = Retained(1, over=now_runs)
            now_runs.retain(np.array(event.units, np.int32), event.priority, event.until)
        elif event.e == "retired":
            now_runs, failure = None, None
        elif event.e == "fallback":
            # The pager refused the answer that comes next in the log; what stands there is its own.
            refused = True
        elif now_runs is not None:
            answer: list[int] | None = None
            try:
                answer = _replay(now_runs, event, held)
            except Exception as error:  # it failed in the space as well, or this is not its log
                failure = None if refused else error
            if event.e == "victims":
                if not refused and answer is not None:
                    yield event, answer
                refused = False
    if failure is not None:
        raise failure


def _follow(held: dict[int, None], event: Event) -> None:
    """Which units the tier holds."""
    if event.e == "inserted":
        held.update(dict.fromkeys(event.units))
    elif event.e == "removed":
        for unit in event.units:
            held.pop(unit, None)


def _replay(policy: Eviction, event: Event, held: dict[int, None]) -> list[int] | None:
    """Tell or ask a policy what the log says it was; its answer, if that was a question."""
    units = np.array(event.units, np.int32)
    keys = None if event.keys is None else np.array(event.keys, np.uint64)
    match event.e:
        case "coming":
            getattr(policy, "coming", EvictionBase.coming.__get__(policy))(units, keys, event.now)
        case "inserted":
            parents = np.array(event.parents or [-1] * len(units), np.int32)
            depths = np.array(event.depths or [0] * len(units), np.int32)
            policy.inserted(units, parents, depths, keys, event.now)
        case "accessed":
            policy.accessed(units, event.now)
        case "removed":
            policy.removed(units, event.now)
        case "finished":
            facts = Facts(event.session, event.turn, event.reason, event.output_tokens)
            policy.finished(units, facts, event.now)
        case "victims":
            answer: list[int] = policy.victims(
                _Recorded(event.refused, held), event.n, event.now
            ).tolist()
            return answer
    return None
