"""Class queues: LRU until they know better, and better than LRU on real traces."""

from pathlib import Path

import numpy as np
import pytest

from tests.bench.test_simulate import chats
from tiermem.bench.replay import requests
from tiermem.bench.traces import Request, read
from tiermem.bench.workload import Workload, collect
from tiermem.policies import load
from tiermem.policies.base import Eviction, Ids, RequestFacts
from tiermem.policies.classq import ClassQueues
from tiermem.policies.density import STARTS_S, Densities, bucket_of

CLOSE = 0.003
"""How far below leaf-first LRU it may be, of the prefix-hit ratio."""


class NeverTold(ClassQueues):
    """For an engine that does not say that requests end."""

    def finished(self, units: Ids, facts: RequestFacts, now: int) -> None:
        pass


def ratio(workload: Workload, policy: Eviction, c: int, features: bool = True) -> float:
    score = requests(workload, policy, c, features)
    return score.prefix_hits / score.accesses


def lru(workload: Workload, c: int) -> float:
    score = requests(workload, load("lru", c), c)
    return score.prefix_hits / score.accesses


def test_without_ends_of_requests_it_is_leaf_first_lru_exactly() -> None:
    workload = chats(3)
    for c in (20, 90, 300):
        assert ratio(workload, NeverTold(c), c) == lru(workload, c)


def test_with_too_few_samples_it_is_leaf_first_lru_exactly() -> None:
    workload = chats(3, count=60)
    assert ratio(workload, ClassQueues(60, learn=10**9), 60) == lru(workload, 60)


def test_it_learns_that_one_kind_of_request_never_comes_back() -> None:
    rows = []
    for i in range(3000):
        # Even requests are of 40 sessions that return, odd ones of sessions that never do.
        session = i // 2 % 40 if i % 2 == 0 else 1000 + i
        reason = "tool_use" if i % 2 == 0 else "end_turn"
        blocks = 100 * session + np.arange(8)
        rows.append(Request(1000 * i, 64, 9, blocks, session, 1, reason))
    workload = collect(rows)
    # Recency cannot hold 40 sessions of 8 blocks among as many strangers; knowing them can.
    c = 400
    assert lru(workload, c) == 0
    assert ratio(workload, ClassQueues(c), c) > 0.3


def test_age_buckets_are_four_to_an_octave_of_seconds() -> None:
    ages = np.array([0, 180, 190, 1000, 3000, 10**12], np.int64)
    assert bucket_of(ages).tolist() == [0, 0, 1, 4, 8, 79]
    starts_ms = np.ceil(1000 * STARTS_S[:-1]).astype(np.int64)
    assert (np.diff(bucket_of(starts_ms)) >= 0).all()


def test_density_is_the_best_ratio_of_hits_to_time_over_all_horizons() -> None:
    densities = Densities(3, every=100, floor=0.015)
    densities.begin(np.full(100, 1))
    densities.begin(np.full(100, 2))
    densities.hit(np.full(90, 1), np.full(90, 1500))
    densities.hit(np.full(10, 2), np.full(10, 60_000))
    densities.count(100)
    soon, late = densities.table[1], densities.table[2]
    start, after = bucket_of(np.array([0, 5_000]))
    assert soon[start] > 10 * late[start]
    assert soon[after] == 0
    assert late[after] > late[start]
    hits_by = STARTS_S[int(bucket_of(np.array([1500]))[0]) + 1]
    assert soon[start] == pytest.approx(0.9 / hits_by, rel=0.01)


@pytest.mark.parametrize("features", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_one_percent_of_the_conversation_trace_hits_as_promised(
    conversation_trace: Path, features: bool
) -> None:
    workload = collect(read(conversation_trace))
    c = workload.capacity(1)
    assert ratio(workload, ClassQueues(c), c, features) >= 0.078


@pytest.mark.slow
@pytest.mark.parametrize("features", [True, False])
@pytest.mark.parametrize("percent", [0.1, 0.3, 1, 2, 5, 10, 25, 30, 50])
def test_it_is_never_far_below_lru_on_the_conversation_trace(
    conversation_trace: Path, percent: float, features: bool
) -> None:
    workload = collect(read(conversation_trace))
    c = workload.capacity(percent)
    assert ratio(workload, ClassQueues(c), c, features) >= lru(workload, c) - CLOSE


@pytest.fixture(scope="module")
def agents(agent_trace: Path) -> Workload:
    return collect(read(agent_trace))


@pytest.mark.slow
@pytest.mark.parametrize("features", [True, False])
@pytest.mark.parametrize("percent", [0.2, 1, 2, 5, 7, 10, 15, 25])
def test_it_is_never_far_below_lru_on_the_agent_trace(
    agents: Workload, percent: float, features: bool
) -> None:
    c = agents.capacity(percent)
    found = ratio(agents, ClassQueues(c), c, features)
    assert found >= lru(agents, c) - CLOSE
    if percent == 1 and features:
        assert found >= 0.61
