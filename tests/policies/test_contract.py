"""What every policy promises the pager, whatever happens to the units of its tier."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.policies.test_queue import Allowed, ids
from tiermem.bench.replay import Facts
from tiermem.policies import load, names
from tiermem.policies.base import Eviction, Ids

ONLINE = [name for name in names() if name != "belady"]
CAPACITY = 24

STEPS = st.lists(
    st.tuples(
        st.sampled_from(["request", "request", "victims", "remove", "reuse"]),
        st.integers(0, 9),
        st.integers(1, 6),
        st.booleans(),
    ),
    min_size=1,
    max_size=60,
)


class Tier:
    """A tree of chains: session s owns units 8s..8s+7, in depth order, all under unit 0's chain."""

    def __init__(self, policy: Eviction) -> None:
        self.policy = policy
        self.held: dict[int, int] = {}
        self.now = 0

    def request(self, session: int, length: int, ends: bool) -> None:
        chain = [8 * session + depth for depth in range(length)]
        self.now += 700
        here = [unit for unit in reversed(chain) if unit in self.held]
        if here:
            self.policy.accessed(ids(*here), self.now)
        missing = [unit for unit in reversed(chain) if unit not in self.held]
        parents = [unit - 1 if unit % 8 else -1 for unit in missing]
        if missing:
            depths = ids(*[unit % 8 for unit in missing])
            self.policy.inserted(ids(*missing), ids(*parents), depths, None, self.now)
        self.held.update(zip(missing, parents, strict=True))
        self.policy.accessed(ids(*reversed(chain)), self.now)
        if ends:
            facts = Facts(session, None, "stop", 10)
            self.policy.finished(ids(*reversed(chain)), facts, self.now)

    def remove(self, units: Sequence[int]) -> None:
        gone = [unit for unit in units if unit in self.held]
        if gone:
            self.policy.removed(ids(*gone), self.now)
            for unit in gone:
                del self.held[unit]

    def victims(self, n: int, refused: set[int]) -> list[int]:
        allowed = Allowed(refused | (set(range(200)) - set(self.held)))
        answer: list[int] = self.policy.victims(allowed, n, self.now).tolist()
        free = set(self.held) - refused
        assert set(answer) <= free
        assert len(set(answer)) == len(answer)
        assert len(answer) == min(n, len(free))
        if self.policy.leaf_first:
            at = {unit: i for i, unit in enumerate(answer)}
            assert all(at.get(self.held[unit], i) >= i for unit, i in at.items())
        return answer


@pytest.mark.parametrize("name", ONLINE)
@settings(max_examples=60, deadline=None)
@given(STEPS)
def test_answers_hold_only_candidates_once_each_and_as_many_as_there_are(
    name: str, steps: list[tuple[str, int, int, bool]]
) -> None:
    tier = Tier(load(name, CAPACITY))
    for verb, session, n, flag in steps:
        if verb == "request":
            tier.request(session, n, flag)
        elif verb == "victims":
            refused = {u for u in tier.held if u // 8 == session} if flag else set()
            answer = tier.victims(3 * n, refused)
            if not flag:
                tier.remove(answer)
        elif verb == "remove":
            tier.remove([8 * session + depth for depth in range(n)])
        else:
            # Named, then used after all: it stays.
            answer = tier.victims(n, set())
            if answer:
                tier.policy.accessed(ids(*answer), tier.now)
    tier.victims(200, set())


@pytest.mark.parametrize("name", ONLINE)
def test_the_same_facts_give_the_same_answers(name: str) -> None:
    answers: list[list[list[int]]] = []
    for _ in range(2):
        tier = Tier(load(name, CAPACITY, seed=7))
        random = np.random.default_rng(1)
        found = []
        for _ in range(120):
            tier.request(int(random.integers(10)), int(random.integers(1, 7)), True)
            while len(tier.held) > CAPACITY:
                found.append(tier.victims(5, set()))
                tier.remove(found[-1])
        answers.append(found)
    assert answers[0] == answers[1]
    assert len(answers[0]) > 10


@pytest.mark.parametrize("name", ONLINE)
def test_units_beyond_any_seen_so_far_are_taken_in(name: str) -> None:
    policy = load(name, CAPACITY)
    far = ids(3_000_000, 2_999_999)
    policy.inserted(far, ids(2_999_999, -1), ids(1, 0), None, 1)
    policy.accessed(far, 2)
    assert set(policy.victims(Allowed(), 5, 3).tolist()) == set(far.tolist())
    policy.removed(far, 4)
    policy.removed(ids(4_000_000), 5)
    assert not len(policy.victims(Allowed(), 5, 6))


class Counting(Allowed):
    """How often a policy asks which of some units may leave."""

    asked = 0

    def keep(self, units: Ids) -> npt.NDArray[np.bool_]:
        self.asked += 1
        return super().keep(units)


@pytest.mark.parametrize("name", ONLINE)
def test_a_long_row_of_units_that_may_not_leave_is_passed_in_few_looks(name: str) -> None:
    n = 4096
    policy = load(name, n)
    for at in range(0, n, 16):
        units = ids(*range(at + 15, at - 1, -1))
        parents = np.where(units % 16, units - 1, -1).astype(np.int32)
        policy.inserted(units, parents, units % 16, None, at)
        policy.finished(units, Facts(at, None, "stop", 1), at)
        policy.accessed(units, at + 1)  # so that much is known of how soon units are used again
        policy.finished(units, Facts(at, None, "stop", 1), at + 1)
    candidates = Counting(set(range(n - 64)))
    answer = policy.victims(candidates, 2, n)
    assert len(answer) == 2
    assert answer.min() >= n - 64
    assert candidates.asked <= 40
