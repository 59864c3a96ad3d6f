"""How many tokens SGLang may count on: as many as fit on the GPU, whatever has an address."""

import pytest

from tiermem.integrations.sglang_gates import Gates


@pytest.mark.parametrize("evictable", [0, 160, 800])
@pytest.mark.parametrize("used", [0, 32, 464])
def test_what_is_spare_depends_on_what_requests_use_and_not_on_the_tree(
    used: int, evictable: int
) -> None:
    gates = Gates(pages=100, page_size=16, budget=lambda: 31)
    free = 1600 - used - evictable
    assert gates.spare_tokens(free, evictable) == 30 * 16 - used
    assert free + evictable - gates.withheld_tokens() == 30 * 16 - used


def test_a_budget_that_falls_is_seen_at_once_and_what_is_spare_turns_negative() -> None:
    budget = [31]
    gates = Gates(pages=100, page_size=16, budget=lambda: budget[0])
    budget[0] = 11
    assert gates.resident_tokens() == 160
    assert gates.spare_tokens(free=1600 - 480, evictable=0) == -320


def test_more_memory_than_addresses_gives_no_more_tokens() -> None:
    gates = Gates(pages=10, page_size=16, budget=lambda: 100)
    assert gates.withheld_tokens() == 0
    assert gates.longest_request() == 9 * 16


def test_the_longest_request_is_never_negative() -> None:
    assert Gates(pages=10, page_size=16, budget=lambda: 1).longest_request() == 0
