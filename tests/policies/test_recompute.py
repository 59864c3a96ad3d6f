"""Load or recompute: the cut is the cheapest of all."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tiermem.errors import ConfigError
from tiermem.policies.recompute import ModelSpeed, RouteSpeed, split
from tiermem.tier import Place

MIB = 1 << 20
HOST, NVME = RouteSpeed(50.0), RouteSpeed(3.0)
BOTH = {Place.HOST: HOST, Place.NVME: NVME}
MODEL = ModelSpeed(30_000)
Block = tuple[Place, int, int]
BLOCKS = st.lists(
    st.tuples(
        st.sampled_from([Place.NONE, Place.GPU, Place.HOST, Place.NVME, Place.LOST]),
        st.sampled_from([0, MIB, 4 * MIB]),
        st.sampled_from([16, 64, 512]),
    )
)


def places(*each: Place) -> "np.ndarray[tuple[int], np.dtype[np.uint8]]":
    return np.array(each, np.uint8)


def seconds(
    chain: list[Block],
    cut: int,
    routes: dict[Place, RouteSpeed],
    model: ModelSpeed,
    suffix: int,
    wait_s: float,
    overlap: bool,
) -> float:
    """What one cut costs, counted block by block and token by token."""
    load = 0.0
    for place, route in routes.items():
        mine = [size for where, size, _ in chain[:cut] if where == place]
        if mine:
            took = (route.queued_bytes + sum(mine)) / (route.gbps * 1e9) + route.latency_s
            load = max(load, took)
    start = sum(tokens for *_, tokens in chain[:cut])
    end = sum(tokens for *_, tokens in chain) + suffix
    compute = (end - start) / model.prefill_tokens_per_s
    compute += model.attention_s_per_token2 * (end**2 - start**2) / 2
    return max(load, wait_s + compute) if overlap else max(load, wait_s) + compute


@given(
    BLOCKS,
    st.booleans(),
    st.sampled_from([0.0, 1e-9]),
    st.sampled_from([200, 30_000, 10**7]),
    st.sampled_from([0, 40 * MIB]),
    st.sampled_from([0, 100]),
    st.sampled_from([0.0, 0.01]),
    st.booleans(),
)
def test_no_other_cut_is_cheaper(
    chain: list[Block],
    overlap: bool,
    attention: float,
    prefill: int,
    queued: int,
    suffix: int,
    wait_s: float,
    drive: bool,
) -> None:
    model = ModelSpeed(prefill, attention)
    routes = {Place.HOST: RouteSpeed(50.0, 1e-4, queued)}
    if drive:
        routes[Place.NVME] = RouteSpeed(3.0, 1e-3, queued // 2)
    found = split(
        places(*[place for place, *_ in chain]),
        np.array([size for _, size, _ in chain], np.int64),
        np.array([tokens for *_, tokens in chain], np.int64),
        routes,
        model,
        suffix_tokens=suffix,
        wait_s=wait_s,
        overlap=overlap,
    )
    held = {Place.GPU, *routes}
    gone = [i for i, (place, *_) in enumerate(chain) if place not in held]
    reach = gone[0] if gone else len(chain)
    costs = [
        seconds(chain, cut, routes, model, suffix, wait_s, overlap) for cut in range(reach + 1)
    ]
    assert 0 <= found.load <= reach
    assert costs[found.load] == pytest.approx(min(costs), abs=1e-12)
    assert found.total_s == pytest.approx(min(costs), abs=1e-12)
    assert found.total_s <= found.compute_all_s + 1e-12
    assert found.compute_all_s == pytest.approx(costs[0], abs=1e-12)


def test_a_fast_host_is_loaded_and_a_slow_disk_is_not() -> None:
    slow = {Place.HOST: HOST, Place.NVME: RouteSpeed(0.1)}
    assert split(places(*[Place.HOST] * 8), 64 * MIB, 512, slow, MODEL).load == 8
    mixed = split(places(*[Place.HOST] * 3, *[Place.NVME] * 5), 64 * MIB, 512, slow, MODEL)
    assert mixed.load == 3
    assert mixed.compute_s == pytest.approx(5 * 512 / 30_000)
    assert mixed.total_s < mixed.compute_all_s


def test_what_is_on_the_gpu_costs_nothing_and_what_is_lost_ends_the_prefix() -> None:
    chain = places(Place.GPU, Place.GPU, Place.LOST, Place.HOST)
    found = split(chain, 64 * MIB, 512, BOTH, MODEL)
    assert (found.load, found.load_s) == (2, 0.0)
    assert split(places(), 64 * MIB, 512, BOTH, MODEL).load == 0


def test_what_no_route_reaches_is_computed() -> None:
    chain = places(Place.HOST, Place.NVME, Place.HOST)
    assert split(chain, MIB, 512, {Place.HOST: HOST}, MODEL).load == 1


def test_a_route_that_others_keep_busy_is_not_waited_for() -> None:
    chain = places(*[Place.HOST] * 4)
    assert split(chain, 64 * MIB, 512, BOTH, MODEL).load == 4
    busy = {Place.HOST: replace(HOST, queued_bytes=50 * 10**9)}
    assert split(chain, 64 * MIB, 512, busy, MODEL).load == 0
    # A request that has to wait for the processors for as long may load meanwhile.
    assert split(chain, 64 * MIB, 512, busy, MODEL, wait_s=2.0).load == 4


def test_a_route_that_was_not_measured_is_used() -> None:
    found = split(places(*[Place.NVME] * 4), 64 * MIB, 512, {Place.NVME: RouteSpeed()}, MODEL)
    assert (found.load, found.load_s) == (4, 0.0)


@pytest.mark.parametrize(
    ("routes", "model"),
    [({Place.HOST: RouteSpeed(0.0)}, MODEL), ({Place.HOST: HOST}, ModelSpeed(0.0))],
)
def test_a_speed_of_nothing_is_refused(routes: dict[Place, RouteSpeed], model: ModelSpeed) -> None:
    with pytest.raises(ConfigError, match="load or recompute"):
        split(places(Place.HOST), MIB, 512, routes, model)
