"""What a configuration says of policies reaches a running space, and its log."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import msgspec
import numpy as np
import pytest

from tiermem import Config, Evict, Gpu, Host, Space
from tiermem.bench import simulate, traces
from tiermem.bench.replay import Facts
from tiermem.config import Shadow, Trace
from tiermem.errors import BadPolicy, ConfigError, NotOurs
from tiermem.policies.base import Candidates, EvictionBase, Ids
from tiermem.policies.lru import LRU
from tiermem.policies.recompute import ModelSpeed
from tiermem.ranking import LATE_IN_A_ROW, LATE_S, Ranking
from tiermem.region import Region
from tiermem.table import PageTable
from tiermem.tier import Place
from tiermem.trace import EventLog

PAGE = 64 << 10


class Answers(EvictionBase):
    """Told to answer the first candidates or the last ones."""

    name = "answers"

    def __init__(self, capacity: int, seed: int = 0, last: bool = False) -> None:
        super().__init__(capacity, seed)
        self._last = last

    def victims(self, candidates: Candidates, n: int, now: int) -> Ids:
        units = np.sort(candidates.all())
        return units[::-1][:n] if self._last else units[:n]


class Forgetful(LRU):
    """Fails on the first unit that leaves."""

    def removed(self, units: Ids, now: int) -> None:
        raise RuntimeError("lost count")


ANSWERS, FORGETFUL = f"{__name__}:Answers", f"{__name__}:Forgetful"


def configured(evict: Evict, trace: Path | None = None) -> Config:
    return Config(
        gpu=Gpu(device="cpu", page=PAGE, budget=8 * PAGE, high=1.0, low=1.0),
        host=Host(capacity=16 * PAGE, high=1.0, low=1.0),
        evict=evict,
        trace=Trace(path=trace),
    )


def filled(space: Space, pages: int = 8) -> Region:
    """Regions of a full GPU; page i was allocated i-th."""
    region = space.reserve(24 * PAGE)
    for _ in range(pages):
        region.allocate(1)
    return region


def touch(region: Region, pages: list[int]) -> None:
    for page in pages:
        with region.use(page):
            pass


@pytest.mark.parametrize(("last", "gone"), [(False, 0), (True, 7)])
def test_arguments_of_a_policy_reach_it(last: bool, gone: int) -> None:
    evict = Evict(gpu=ANSWERS, gpu_params={"last": last})
    with Space.open(configured(evict)) as space:
        region = filled(space, 9)
        space.drain()
        assert region.where([gone]).tolist() == [Place.HOST]


def test_changed_arguments_alone_swap_the_policy() -> None:
    before = configured(Evict(gpu=ANSWERS))
    with Space.open(before) as space:
        region = filled(space)
        after = configured(Evict(gpu=ANSWERS, gpu_params={"last": True}))
        assert space.apply(after) == ("evict.gpu_params",)
        region.allocate(1)
        space.drain()
        assert region.where([7]).tolist() == [Place.HOST]


def test_the_log_names_policies_and_their_arguments(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    with Space.open(configured(Evict(gpu=ANSWERS, gpu_params={"last": True}), path)):
        pass
    header, _ = traces.read_log(path)
    assert header.tiers["gpu"].policy == ANSWERS
    assert header.tiers["gpu"].params == {"last": True}
    assert header.tiers["host"].policy == "classq"


def test_a_log_with_a_swap_names_the_same_victims(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    with Space.open(configured(Evict(gpu="lru"), path)) as space:
        region = filled(space, 10)
        touch(region, [5, 3, 0, 1])
        space.apply(configured(Evict(gpu=ANSWERS, gpu_params={"last": True}), path))
        touch(region, [2, 8, 5, 6, 0, 1, 9, 4, 3])
        space.drain()
    (gpu,) = [row for row in simulate.replay_log(path) if row.tier == "gpu"]
    assert gpu.answers >= 6
    assert gpu.same == gpu.answers


def test_a_policy_that_fails_on_a_fact_is_out_of_the_replay_from_there(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    with Space.open(configured(Evict(gpu=FORGETFUL), path)) as space:
        region = filled(space, 10)
        touch(region, [5, 3, 0, 1, 7])
        space.drain()
        assert space.statistics().tier(Place.GPU).policy == "lru (fallback)"
    assert '"e":"retired"' in path.read_text()
    (gpu,) = [row for row in simulate.replay_log(path) if row.tier == "gpu"]
    # How often the mover asked before the fact that the policy fails on is the machine's affair;
    # what it answered after that is not in the replay.
    victims = path.read_text().split('"e":"retired"')[0].count('"e":"victims","tier":"gpu"')
    assert gpu.same == gpu.answers == victims >= 1


def test_a_policy_that_was_late_too_often_is_out_of_the_replay_from_there(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    table = PageTable()
    table.extend(4)
    table.at[:] = Place.GPU
    clock = iter(np.arange(0.0, 1e3, 2 * LATE_S))
    header = {"gpu": {"policy": ANSWERS, "capacity": 4}}
    with EventLog(path, header) as log:
        ranking = Ranking(Place.GPU, Answers(4), table, log.write, lambda: float(next(clock)))
        ranking.inserted(np.arange(4, dtype=np.int32), None, 1)
        table.stamp[:] = [4, 3, 2, 1]
        named = [ranking.victims(1, now=2).tolist() for _ in range(LATE_IN_A_ROW + 3)]
    assert named == [[0]] * LATE_IN_A_ROW + [[3]] * 3
    (row,) = simulate.replay_log(path)
    assert (row.answers, row.same) == (LATE_IN_A_ROW, LATE_IN_A_ROW)


def test_retained_pages_leave_last_and_for_their_time_only(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    with Space.open(configured(Evict(gpu="lru"), path)) as space:
        region = filled(space)
        region.retain([0], seconds=3600)
        region.retain([1, 2], priority=5)
        region.retain([3], priority=1)
        for gone in (4, 5, 6, 7):
            region.allocate(1)
            space.drain()
            assert region.where([gone]).tolist() == [Place.HOST]
        space.apply(configured(Evict(gpu="fifo"), path))  # marks outlive the policy
        assert space.statistics().tier(Place.GPU).policy == "fifo"
        region.allocate(4)
        space.drain()
        assert region.where([0, 1, 2, 3]).tolist() == [Place.GPU] * 4
        with region.use([12, 13, 14, 15]):
            region.allocate(1)  # nothing else may leave than what is marked
        space.drain()
        assert region.where([1, 2, 3]).tolist().count(Place.HOST) == 1
        assert region.where([3]).tolist() == [Place.HOST]
        space.check()
    (gpu,) = [row for row in simulate.replay_log(path) if row.tier == "gpu"]
    assert gpu.answers == gpu.same > 5


@pytest.mark.parametrize(("priority", "seconds"), [(-1, 0.0), (101, 0.0), (0, -1.0)])
def test_a_mark_that_cannot_be_meant_is_refused(priority: int, seconds: float) -> None:
    with Space.open(configured(Evict())) as space:
        region = filled(space)
        with pytest.raises(ConfigError, match="priority"):
            region.retain([0], priority=priority, seconds=seconds)


SLOW, FAST = ModelSpeed(1.0), ModelSpeed(1e12)
"""Prefill of one token a second, and of more than any route could load."""


def test_a_chain_is_loaded_where_computing_is_slow_and_computed_where_it_is_fast() -> None:
    with Space.open(configured(Evict(gpu="lru"))) as space:
        region = filled(space, 14)
        space.drain()
        away = [page for page in range(14) if region.where([page])[0] == Place.HOST]
        assert len(away) == 6
        touch(region, away[:2])  # both routes have moved something, so their speed is known
        space.drain()
        chain = [page for page in range(14) if region.where([page])[0] == Place.GPU][:3]
        chain += [page for page in away if region.where([page])[0] == Place.HOST][:3]
        assert 0 < space.route_speeds()[Place.HOST].gbps < np.inf
        slow, fast = (region.split(chain, 16, model) for model in (SLOW, FAST))
        assert (slow.load, fast.load) == (6, 3)
        assert slow.load_s > 0 == slow.compute_s == fast.load_s
        assert (region.where(chain) == [Place.GPU] * 3 + [Place.HOST] * 3).all()
        region.free([chain[4]])
        space.drain()
        assert region.split(chain, 16, SLOW).load == 4
        with pytest.raises(NotOurs):
            region.split([99], 16, SLOW)


def test_a_page_whose_frame_still_shows_it_costs_no_load() -> None:
    with Space.open(configured(Evict(gpu="lru"))) as space:
        region = filled(space, 9)  # one more than fit, so that the host tier is there
        region.hint([7, 8], "cold")
        space.drain()
        assert region.where([7, 8]).tolist() == [Place.HOST] * 2
        assert region.split([7, 8], 16, FAST).load == 2


def on_trial(policies: tuple[str, ...], tier: Literal["gpu", "host"] = "gpu") -> Config:
    given = configured(Evict(gpu="s3fifo", gpu_params={"small": 0.2}))
    return msgspec.structs.replace(given, shadow=Shadow(policies=policies, sample=1.0, tier=tier))


def serve(region: Region, rounds: int, first: int = 0) -> None:
    """Three sessions of four pages each take turns, then end; contents are named by keys."""
    pages: dict[int, np.ndarray] = {}
    for i in range(3 * rounds):
        session = i % 3
        if session not in pages:
            keys = np.arange(4, 0, -1, dtype=np.uint64) + np.uint64(100 * (first + session + 1))
            pages[session] = region.allocate(4, depths=[3, 2, 1, 0], keys=keys)
        with region.use(pages[session]):
            pass
        region.finished(pages[session], Facts(session, i // 3))
    region.free(np.concatenate([pages[session] for session in (2, 0, 1)]))


def test_policies_on_trial_report_beside_the_one_that_runs() -> None:
    with Space.open(on_trial(("lru", "fifo"))) as space, space.reserve(32 * PAGE) as region:
        serve(region, rounds=5)
        rows = space.statistics().shadow
        assert [row.policy for row in rows] == ["s3fifo(small=0.2)", "lru", "fifo"]
        assert [row.running for row in rows] == [True, False, False]
        assert {(row.requests, row.accesses) for row in rows} == {(15, 60)}
        lru = rows[1]
        assert (lru.hits, lru.written) == (0, 52), "12 pages in turn over 8: LRU holds none in time"
        assert lru.written_bytes == 52 * PAGE
        assert lru.stall_s > 0, "what is missed is loaded from the host"
        # With the host's 16 more everything stays.
        assert "shadow.tier" in space.apply(on_trial(("lru",), tier="host"))
        serve(region, rounds=2)
        lru = space.statistics().shadow[1]
        assert (lru.accesses, lru.hits, lru.stall_s) == (24, 12, 0.0)
        serve(region, rounds=1)  # the same contents in other pages
        lru = space.statistics().shadow[1]
        assert (lru.accesses, lru.hits) == (36, 24)
        serve(region, rounds=1, first=3)  # other contents in the same pages
        lru = space.statistics().shadow[1]
        assert (lru.accesses, lru.hits) == (48, 24)
        with pytest.raises(BadPolicy, match="lru"):
            space.apply(on_trial(("lruu",)))
        assert len(space.statistics().shadow) == 2
        space.apply(msgspec.structs.replace(on_trial(()), shadow=Shadow()))
        assert space.statistics().shadow == ()
        space.check()


def test_an_imagined_tier_counts_in_units() -> None:
    with Space.open(on_trial(("lru",))) as space:
        region = space.reserve(32 * PAGE, unit_pages=4)
        for unit in range(3):
            pages = region.allocate(4)
            region.finished(pages, Facts(unit, 1))
        lru = space.statistics().shadow[1]
        assert (lru.accesses, lru.written, lru.written_bytes) == (3, 1, 4 * PAGE)
