"""Load or recompute for a waiting request: speeds that are measured, and where a chain is cut."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tiermem.integrations.vllm_choice import (
    ENOUGH,
    REMEASURE_S,
    TRIED,
    Choice,
    Prefill,
    takes_all,
)
from tiermem.policies.recompute import ModelSpeed, Places, RouteSpeed, split
from tiermem.tier import GPU, HOST, NVME

BLOCK = 1_000_000
TOKENS = 100


def chain(*places: int) -> Places:
    return np.array(places, np.uint8)


def measured(tokens_per_s: float, steps: int = ENOUGH) -> Prefill:
    prefill = Prefill()
    teach(prefill, tokens_per_s, steps)
    return prefill


def teach(prefill: Prefill, tokens_per_s: float, steps: int = ENOUGH) -> None:
    for step in range(steps):
        prefill.begin([1000, 1, 1], 10.0 * step, loads=False)
        prefill.end(10.0 * step + 1000 / tokens_per_s)


def cut(choice: Choice, places: Places, gbps: float, now_s: float = 0.0, queued: int = 0) -> int:
    routes = {NVME: RouteSpeed(gbps, queued_bytes=queued), HOST: RouteSpeed(50.0)}
    return choice.cut(places, BLOCK, TOKENS, routes, TOKENS, now_s)


# ---------------------------------------------------------------- prefill


def test_nothing_is_known_before_enough_steps_were_measured() -> None:
    assert measured(5000.0, ENOUGH - 1).speed() is None
    speed = measured(5000.0).speed()
    assert speed is not None
    assert speed.prefill_tokens_per_s == pytest.approx(5000.0)


def test_one_slow_step_changes_nothing() -> None:
    prefill = measured(5000.0, 6)
    teach(prefill, 10.0, 1)
    speed = prefill.speed()
    assert speed is not None
    assert speed.prefill_tokens_per_s == pytest.approx(5000.0)


def test_steps_that_decode_are_small_or_wait_for_copies_do_not_count() -> None:
    prefill = Prefill()
    for step in range(10):
        prefill.begin([1] * 300, step, loads=False)
        prefill.end(step + 0.5)
        prefill.begin([200], step, loads=False)
        prefill.end(step + 0.7)
        prefill.begin([2000], step, loads=True)
        prefill.end(step + 0.9)
    assert prefill.speed() is None


def test_of_steps_that_overlap_each_is_told_the_time_since_the_last() -> None:
    prefill = Prefill()
    prefill.begin([1000], 0.0, loads=False)
    for step in range(1, 8):
        prefill.begin([1000], step - 0.9, loads=False)  # given out while the last one runs
        prefill.end(float(step))
    speed = prefill.speed()
    assert speed is not None
    assert speed.prefill_tokens_per_s == pytest.approx(1000.0)


def test_an_end_without_a_beginning_is_nothing() -> None:
    prefill = Prefill()
    prefill.end(1.0)
    assert prefill.speed() is None


# ---------------------------------------------------------------- the cut


def test_all_is_loaded_while_prefill_has_not_been_measured() -> None:
    assert cut(Choice(), chain(NVME, NVME, NVME), gbps=1e-9) == 3


def test_a_chain_on_a_slow_drive_is_cut_where_computing_is_quicker() -> None:
    choice = Choice()
    teach(choice.prefill, 10_000.0)  # a block in 10 ms
    fast, slow = 1.0, 0.02  # a block in 1 ms, in 50 ms
    places = chain(GPU, HOST, *[NVME] * 20)
    assert cut(choice, places, fast) == 22
    assert cut(choice, places, slow) == 2, "what is on the GPU and in the host is still worth it"


def test_what_is_queued_on_a_route_counts() -> None:
    choice = Choice()
    teach(choice.prefill, 10_000.0)
    places = chain(*[NVME] * 4)
    assert cut(choice, places, gbps=1.0) == 4
    assert cut(choice, places, gbps=1.0, queued=100 * BLOCK) == 0, "100 ms of others come first"


def test_a_route_that_was_refused_for_long_is_tried_again_with_a_few_blocks() -> None:
    choice = Choice()
    teach(choice.prefill, 10_000.0)
    places = chain(*[NVME] * 50)
    assert cut(choice, places, gbps=0.02, now_s=100.0) == 0
    assert cut(choice, places, gbps=0.02, now_s=99.0 + REMEASURE_S) == 0
    assert cut(choice, places, gbps=0.02, now_s=100.0 + REMEASURE_S) == TRIED
    assert cut(choice, places, gbps=0.02, now_s=101.0 + REMEASURE_S) == 0, "tried just now"


def test_a_tier_that_has_failed_is_not_tried() -> None:
    choice = Choice()
    teach(choice.prefill, 10_000.0)
    routes = {HOST: RouteSpeed(50.0)}
    for now_s in (0.0, 2 * REMEASURE_S):
        assert choice.cut(chain(HOST, NVME), BLOCK, TOKENS, routes, TOKENS, now_s) == 1


@settings(max_examples=400)
@given(
    places=st.lists(st.sampled_from([GPU, HOST, NVME, 0]), min_size=1, max_size=12),
    coming=st.lists(st.booleans(), min_size=12, max_size=12),
    gbps=st.tuples(st.floats(0.001, 10.0), st.floats(0.001, 10.0)),
    queued=st.integers(0, 40),
    tokens_per_s=st.floats(100.0, 1e6),
    suffix=st.integers(0, 1000),
)
def test_what_is_surely_loaded_is_loaded_whole_by_the_long_way(
    places: list[int],
    coming: list[bool],
    gbps: tuple[float, float],
    queued: int,
    tokens_per_s: float,
    suffix: int,
) -> None:
    chained = chain(*places)
    nbytes = np.where(coming[: len(places)], 0, BLOCK).astype(np.int64)
    routes = {
        HOST: RouteSpeed(gbps[0], queued_bytes=queued * BLOCK),
        NVME: RouteSpeed(gbps[1], latency_s=0.001),
    }
    model = ModelSpeed(tokens_per_s)
    if takes_all(chained, nbytes, TOKENS, routes, model):
        found = split(chained, nbytes, TOKENS, routes, model, suffix_tokens=suffix)
        assert found.load == len(places)


def test_a_load_that_is_surely_worth_it_is_seen_at_once() -> None:
    routes = {HOST: RouteSpeed(50.0)}
    model = ModelSpeed(10_000.0)
    assert takes_all(chain(GPU, *[HOST] * 20), BLOCK, TOKENS, routes, model)
    assert not takes_all(chain(GPU, *[HOST] * 20, NVME), BLOCK, TOKENS, routes, model)
