"""The pager machine sees: each planted fault is caught within a quarter of its ordinary runs."""

from __future__ import annotations

import pytest

from tests.planted_faults import FAULTS, Fault, hunt

RUNS = 100


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name.replace(" ", "-"))
def test_the_machine_catches(fault: Fault) -> None:
    verdict = hunt(fault, RUNS)
    assert verdict.caught, f"{RUNS} runs did not notice: {fault.name}"


def test_the_machine_finds_nothing_where_nothing_is_planted() -> None:
    harmless = Fault("nothing", FAULTS[0].owner, FAULTS[0].method, lambda right: right)
    assert not hunt(harmless, 10).caught
