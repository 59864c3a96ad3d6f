"""How long threads of an engine's process keep the interpreter lock."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest

from tests.directed_ranks import Ranks
from tests.integrations.vllm_machine import Machine
from tiermem.integrations.threads import SWITCH_S, switch_sooner


@pytest.fixture(autouse=True)
def usual() -> Iterator[float]:
    before = sys.getswitchinterval()
    yield before
    sys.setswitchinterval(before)


def test_the_lock_changes_hands_sooner_and_a_shorter_interval_of_the_users_stays() -> None:
    sys.setswitchinterval(0.005)
    switch_sooner()
    assert sys.getswitchinterval() == pytest.approx(SWITCH_S, rel=0.05)
    sys.setswitchinterval(SWITCH_S / 10)
    switch_sooner()
    assert sys.getswitchinterval() == pytest.approx(SWITCH_S / 10, rel=0.05)


def test_an_engine_sets_it_where_its_steps_are_made() -> None:
    sys.setswitchinterval(0.005)
    ranks = Ranks(units=40, budget=10, host=9)
    Machine(ranks, 0)
    ranks.close()
    assert sys.getswitchinterval() == pytest.approx(SWITCH_S, rel=0.05)
