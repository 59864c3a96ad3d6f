"""Load or recompute: the cut is the cheapest of all."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tiermem.policies.recompute import Speeds, split
from tiermem.tier import Place

FAST = Speeds(host_gbps=50, nvme_gbps=3, prefill_tokens_per_s=30_000)
MIB = 1 << 20
PLACES = st.lists(st.sampled_from([Place.NONE, Place.GPU, Place.HOST, Place.NVME, Place.LOST]))


def places(*each: Place) -> "np.ndarray[tuple[int], np.dtype[np.uint8]]":
    return np.array(each, np.uint8)


def seconds(chain: list[Place], cut: int, speeds: Speeds, overlap: bool) -> float:
    """What one cut costs, counted block by block."""
    load = [0.0, 0.0]
    for place in chain[:cut]:
        if place == Place.HOST:
            load[0] += 4 * MIB / (speeds.host_gbps * 1e9)
        elif place == Place.NVME:
            load[1] += 4 * MIB / (speeds.nvme_gbps * 1e9)
    waits = [
        seconds + (latency if seconds else 0.0)
        for seconds, latency in zip(
            load, (speeds.host_latency_s, speeds.nvme_latency_s), strict=True
        )
    ]
    tokens = range(64 * cut, 64 * len(chain))
    compute = len(tokens) / speeds.prefill_tokens_per_s
    compute += speeds.attention_s_per_token2 * ((64 * len(chain)) ** 2 - (64 * cut) ** 2) / 2
    return max(max(waits), compute) if overlap else max(waits) + compute


@given(PLACES, st.booleans(), st.sampled_from([0.0, 1e-9]), st.sampled_from([200, 30_000, 10**7]))
def test_no_other_cut_is_cheaper(
    chain: list[Place], overlap: bool, attention: float, prefill: int
) -> None:
    speeds = Speeds(50, 3, prefill, attention, host_latency_s=1e-4, nvme_latency_s=1e-3)
    found = split(places(*chain), 4 * MIB, 64, speeds, overlap)
    gone = [i for i, place in enumerate(chain) if place in (Place.NONE, Place.LOST)]
    reach = gone[0] if gone else len(chain)
    costs = [seconds(chain, cut, speeds, overlap) for cut in range(reach + 1)]
    assert 0 <= found.load <= reach
    assert costs[found.load] == pytest.approx(min(costs), abs=1e-12)


def test_a_fast_host_is_loaded_and_a_slow_disk_is_not() -> None:
    slow = Speeds(host_gbps=50, nvme_gbps=0.1, prefill_tokens_per_s=30_000)
    assert split(places(*[Place.HOST] * 8), 64 * MIB, 512, slow).load == 8
    mixed = split(places(*[Place.HOST] * 3, *[Place.NVME] * 5), 64 * MIB, 512, slow)
    assert mixed.load == 3
    assert mixed.compute_s == pytest.approx(5 * 512 / 30_000)
    assert mixed.load_s + mixed.compute_s < mixed.compute_all_s


def test_what_is_on_the_gpu_costs_nothing_and_what_is_lost_ends_the_prefix() -> None:
    found = split(places(Place.GPU, Place.GPU, Place.LOST, Place.HOST), 64 * MIB, 512, FAST)
    assert (found.load, found.load_s) == (2, 0.0)
    assert split(places(), 64 * MIB, 512, FAST).load == 0
