"""The policy classes, driven access by access, hit exactly as often as their rules in plain Python
say; and the rules as often as the published figures and another simulator say."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.policies.rules import RULES
from tiermem.bench import replay
from tiermem.bench.traces import Request, read
from tiermem.bench.workload import Workload, collect
from tiermem.policies import load

PERCENTS = (1, 5, 10, 25, 50)
PUBLISHED = {
    "lru": (0.0523, 0.1954, 0.2784, 0.3535, 0.3631),
    "clock": (0.0527, 0.2022, 0.2829, 0.3531, 0.3627),
    "arc": (0.0646, 0.2101, 0.2842, 0.3355, 0.3627),
    "sieve": (0.0582, 0.1269, 0.1948, 0.3364, 0.3627),
    "s3fifo": (0.0749, 0.1866, 0.2453, 0.3460, 0.3620),
    "belady": (0.2464, 0.3664, 0.3664, 0.3664, 0.3664),
}
"""Hit ratios on the conversation trace; the first six of them equal libCacheSim 0.3.5."""


@pytest.fixture(scope="module")
def conversation(conversation_trace: Path) -> Workload:
    return collect(read(conversation_trace))


def as_workload(accesses: Sequence[int], length: int = 7) -> Workload:
    """Accesses cut into requests, all of one session."""
    blocks = np.array(accesses, np.int64)
    cuts = range(0, len(accesses), length)
    return collect(Request(i, 0, 0, blocks[i : i + length], session=1) for i in cuts)


@pytest.mark.parametrize("name", sorted(RULES))
@settings(max_examples=60, deadline=None)
@given(
    accesses=st.lists(st.integers(0, 12), min_size=1, max_size=150),
    capacity=st.integers(1, 10),
)
def test_a_policy_hits_as_often_as_its_rule_on_any_accesses(
    name: str, accesses: list[int], capacity: int
) -> None:
    score = replay.stream(as_workload(accesses), load(name, capacity, offline=True), capacity)
    assert score.hits == RULES[name](accesses, capacity)


@pytest.mark.parametrize("name", sorted(RULES))
def test_a_policy_hits_as_often_as_its_rule_on_skewed_accesses_beside_a_loop(name: str) -> None:
    # Loops and a change of load make ghosts matter: integer division in ARC's p shows here.
    random = np.random.default_rng(0)
    half = random.random(8000) < 0.5
    mixed = np.where(half, random.zipf(1.2, 8000) % 2000, 2000 + np.arange(8000) % 60)
    mixed[4000:] = random.zipf(1.15, 4000) % 2000
    mixed[6000:] = 2000 + np.arange(2000) % 60
    accesses = mixed.tolist()
    for capacity in (40, 130):
        score = replay.stream(as_workload(accesses), load(name, capacity, offline=True), capacity)
        assert score.hits == RULES[name](accesses, capacity)


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_a_rule_gives_the_published_ratios_on_the_conversation_trace(
    name: str, conversation: Workload
) -> None:
    accesses = conversation.blocks.tolist()
    found = [RULES[name](accesses, conversation.capacity(percent)) for percent in PERCENTS]
    assert tuple(round(hits / len(accesses), 4) for hits in found) == PUBLISHED[name]


@pytest.mark.slow
@pytest.mark.parametrize("percent", PERCENTS)
@pytest.mark.parametrize("name", sorted(RULES))
def test_a_policy_hits_as_often_as_its_rule_on_the_conversation_trace(
    name: str, percent: float, conversation: Workload
) -> None:
    capacity = conversation.capacity(percent)
    score = replay.stream(conversation, load(name, capacity, offline=True), capacity)
    assert score.hits == RULES[name](conversation.blocks.tolist(), capacity)


@pytest.mark.parametrize("percent", [1, 10])
@pytest.mark.parametrize(
    ("name", "theirs"),
    [
        ("fifo", "FIFO"),
        ("lru", "LRU"),
        ("clock", "Clock"),
        ("arc", "ARC"),
        ("sieve", "Sieve"),
        ("lfu", "LFU"),
        ("belady", "Belady"),
    ],
)
def test_rules_equal_libcachesim(
    name: str, theirs: str, percent: float, conversation: Workload
) -> None:
    libcachesim = pytest.importorskip("libcachesim")
    capacity = conversation.capacity(percent)
    accesses = conversation.blocks.tolist()
    following = replay.next_accesses(conversation.blocks).tolist()
    cache = getattr(libcachesim, theirs)(capacity)
    never = 2**62
    hits = 0
    for at, block in enumerate(accesses):
        later = following[at] if following[at] < len(accesses) else never
        hits += cache.get(
            libcachesim.Request(obj_size=1, obj_id=block, next_access_vtime=later, clock_time=at)
        )
    assert hits == RULES[name](accesses, capacity)
