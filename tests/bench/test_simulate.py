"""The simulator: exact integers, the compiled rules, recorded logs, tiers, and what it prints."""

import json
import math
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.policies.rules import RULES
from tiermem.bench import demo, fast, simulate
from tiermem.bench.demo_setup import configuration
from tiermem.bench.generate import generate
from tiermem.bench.optimum import ceiling, optimum
from tiermem.bench.replay import requests, stream
from tiermem.bench.tiers import Costs, first_token_s, tiered
from tiermem.bench.traces import Request, read
from tiermem.bench.workload import Workload, collect
from tiermem.errors import BadPolicy, BadTrace, ConfigError
from tiermem.policies import load, names
from tiermem.policies.base import Candidates, EvictionBase, Ids
from tiermem.space import Space
from tiermem.trace import EventLog

ONLINE = [name for name in names() if name != "belady"]


@pytest.fixture(scope="module")
def conversation(conversation_trace: Path) -> Workload:
    return collect(read(conversation_trace))


@pytest.fixture(scope="module")
def agents(agent_trace: Path) -> Workload:
    return collect(read(agent_trace))


def chats(seed: int, sessions: int = 60, count: int = 400) -> Workload:
    """Requests of growing sessions that share one first block."""
    random = np.random.default_rng(seed)
    length = random.integers(2, 6, sessions)
    rows = []
    for i in range(count):
        session = int(random.zipf(1.4) % sessions)
        length[session] += int(random.integers(0, 3))
        blocks = 1000 * (session + 1) + np.arange(length[session])
        rows.append(
            Request(int(1000 * i + random.integers(999)), 64 * len(blocks), 16,
                    np.append(0, blocks), session, reason="stop")
        )  # fmt: skip
    return collect(rows)


@pytest.mark.parametrize(
    ("name", "hits"),
    [
        ("lru", (15_138,)),
        ("fifo", (14_806,)),
        pytest.param("lru", (15_138, 56_483, 80_466), marks=pytest.mark.slow),
        pytest.param("fifo", (14_806, 50_591, 71_586), marks=pytest.mark.slow),
    ],
)
def test_request_mode_gives_the_published_prefix_hits_of_the_conversation_trace(
    name: str, hits: tuple[int, ...], conversation: Workload
) -> None:
    sizes = [conversation.capacity(percent) for percent in (1, 5, 10)[: len(hits)]]
    found = tuple(requests(conversation, load(name, c), c).prefix_hits for c in sizes)
    assert found == hits


def test_the_optimum_of_request_mode_gives_the_published_ratios(conversation: Workload) -> None:
    sizes = [conversation.capacity(percent) for percent in (1, 5)]
    ratios = [optimum(conversation, c).prefix_hits / conversation.accesses for c in sizes]
    assert [round(ratio, 4) for ratio in ratios] == [0.2464, 0.3664]
    assert round(ceiling(conversation), 4) == 0.3664


@pytest.mark.slow
def test_request_mode_gives_the_published_ratios_of_the_agent_trace(agents: Workload) -> None:
    for percent, lru, best in ((1, 0.5427, 0.7751), (5, 0.9465, 0.9610), (10, 0.9589, 0.9625)):
        c = agents.capacity(percent)
        score = requests(agents, load("lru", c), c)
        assert round(score.prefix_hits / score.accesses, 4) == lru
        assert round(optimum(agents, c).prefix_hits / score.accesses, 4) == best


def slow_optimum(workload: Workload, c: int) -> int:
    """The rule of the optimum, by sorting all that is at hand after each request."""
    held: set[int] = set()
    hits = 0
    chains = [workload.of(i).tolist() for i in range(workload.requests)]
    for now, chain in enumerate(chains):
        run = [block in held for block in chain]
        hits += run.index(False) if False in run else len(run)
        rank = {}
        for block in held | set(chain):
            later = [(i, chains[i].index(block)) for i in range(now + 1, len(chains))
                     if block in chains[i]]  # fmt: skip
            if later:
                rank[block] = later[0]
        held = set(sorted(rank, key=lambda block: rank[block])[:c])
    return hits


@pytest.mark.parametrize("seed", range(4))
def test_the_optimum_equals_its_rule_and_no_policy_beats_it(seed: int) -> None:
    workload = chats(seed, sessions=12, count=60)
    for c in (3, 17, 40):
        best = optimum(workload, c).prefix_hits
        assert best == slow_optimum(workload, c)
        for name in ONLINE:
            assert requests(workload, load(name, c), c).prefix_hits <= best


@settings(max_examples=100, deadline=None)
@given(
    st.sampled_from(sorted(RULES)),
    st.lists(st.integers(0, 40), min_size=1, max_size=300),
    st.integers(1, 30),
)
def test_a_compiled_rule_hits_where_its_rule_hits(name: str, accesses: list[int], c: int) -> None:
    hit = fast.hits(name, np.array(accesses, np.int32), 41, c)
    assert int(hit.sum()) == RULES[name](accesses, c)


@pytest.mark.parametrize("name", sorted(RULES))
def test_a_compiled_rule_equals_the_class_of_the_runtime_access_by_access(name: str) -> None:
    workload = chats(5, count=300)
    for c in (9, 60):
        blocks, start = workload.blocks, workload.start
        hit = fast.hits(name, blocks, workload.distinct, c)
        score = stream(workload, load(name, c, offline=True), c)
        assert int(hit.sum()) == score.hits
        prefix = [hit[a:b].tolist() for a, b in pairwise(start)]
        assert score.prefix_hits == sum((h.index(0) if 0 in h else len(h)) for h in prefix)


def record(path: Path, name: str, workload: Workload, capacity: int) -> int:
    """Run a policy and write the log that a space writes; how many answers it holds."""
    answers = 0
    with EventLog(path, {"gpu": {"policy": name, "capacity": capacity}}) as log:

        def write(event: str, units: Ids, now: int, **more: object) -> None:
            log.write({"e": event, "tier": "gpu", "units": units.tolist(), "now": now, **more})

        class Recorded(EvictionBase):
            leaf_first = load(name, capacity).leaf_first
            inner = load(name, capacity)

            def inserted(
                self, units: Ids, parents: Ids, depths: Ids, keys: object, now: int
            ) -> None:
                write("inserted", units, now, parents=parents.tolist(), depths=depths.tolist())
                self.inner.inserted(units, parents, depths, None, now)

            def accessed(self, units: Ids, now: int) -> None:
                write("accessed", units, now)
                self.inner.accessed(units, now)

            def removed(self, units: Ids, now: int) -> None:
                write("removed", units, now)
                self.inner.removed(units, now)

            def finished(self, units: Ids, facts: object, now: int) -> None:
                fields = ("session", "turn", "reason", "output_tokens")
                write("finished", units, now, **{f: getattr(facts, f) for f in fields})
                self.inner.finished(units, facts, now)  # type: ignore[arg-type]

            def victims(self, candidates: Candidates, n: int, now: int) -> Ids:
                nonlocal answers
                answers += 1
                asked = Asked(candidates)
                units = self.inner.victims(asked, n, now)
                write("victims", units, now, n=n, refused=asked.refused)
                return units

        requests(workload, Recorded(capacity), capacity)
    return answers


class Asked:
    """Candidates that remember whom they refused."""

    def __init__(self, inner: Candidates) -> None:
        self.inner = inner
        self.refused: list[int] = []

    def keep(self, units: Ids) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
        kept = self.inner.keep(units)
        self.refused.extend(units[~kept].tolist())
        return kept

    def all(self) -> Ids:
        return self.inner.all()


@pytest.mark.parametrize("name", ONLINE)
def test_a_recorded_log_names_the_same_victims_in_the_same_order(name: str, tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl.gz"
    answers = record(path, name, chats(7), 90)
    assert answers > 20
    (row,) = simulate.replay_log(path)
    assert (row.answers, row.same, row.first_difference) == (answers, answers, None)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in ("arc", "classq") else pytest.mark.slow)
        for name in ONLINE
    ],
)
def test_the_log_of_a_space_names_the_same_victims_in_the_same_order(
    name: str, tmp_path: Path
) -> None:
    path = tmp_path / "space.jsonl"
    options = {f"evict.{tier}": name for tier in ("gpu", "host", "nvme")}
    sizes = {"gpu.budget": "2%", "host.capacity": "6%", "nvme.capacity": "20%"}
    workload = collect(generate(requests=60))
    slab = tmp_path / "slab"
    config = configuration(None, {**options, **sizes, "trace.path": path}, workload, slab)
    with Space.open(config) as space:
        report = demo.run(space, workload, "test")
    assert report.pages_wrong == 0
    rows = simulate.replay_log(path)
    assert {row.tier for row in rows if row.answers} == {"gpu", "host", "nvme"}
    assert [row for row in rows if row.same != row.answers] == []


def test_a_log_of_another_policy_is_told_apart(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    record(path, "lru", chats(7), 90)
    path.write_text(path.read_text().replace('"policy":"lru"', '"policy":"fifo"'))
    (row,) = simulate.replay_log(path)
    assert row.same < row.answers
    assert row.first_difference is not None


def run_json(path: Path, **options: object) -> Mapping[str, object]:
    import msgspec

    result = simulate.run(path, ["lru", "belady"], ["5%", "30"], **options)  # type: ignore[arg-type]
    found: Mapping[str, object] = json.loads(msgspec.json.encode(result))
    return found


def trace_file(tmp_path: Path) -> Path:
    workload = chats(1)
    path = tmp_path / "t.jsonl"
    with path.open("w") as file:
        for i in range(workload.requests):
            row = {"timestamp": int(workload.time_ms[i]), "input_length": 9, "output_length": 2,
                   "hash_ids": workload.of(i).tolist()}  # fmt: skip
            file.write(json.dumps(row) + "\n")
    return path


@pytest.mark.parametrize("mode", ["stream", "request"])
def test_the_json_has_the_fields_that_it_promises(tmp_path: Path, mode: str) -> None:
    found = run_json(trace_file(tmp_path), mode=mode)
    assert found["schema"] == "tiermem.simulate.v1"
    assert {"machine", "trace", "requests", "accesses", "distinct_blocks"} <= found.keys()
    rows = found["rows"]
    assert isinstance(rows, list)
    assert [(r["policy"], r["capacity_percent"]) for r in rows][:2] == [
        ("lru", 5.0),
        ("lru", pytest.approx(100 * 30 / float(str(found["distinct_blocks"])), abs=1e-3)),
    ]
    for row in rows:
        assert row["mode"] == mode
        assert row["prefix_hits"] <= row["hits"] <= row["accesses"] == found["accesses"]
        assert row["hit_ratio"] == pytest.approx(row["hits"] / row["accesses"], abs=1e-6)


def test_capacities_names_and_tiers_that_cannot_be_meant_are_refused(tmp_path: Path) -> None:
    path = trace_file(tmp_path)
    for capacity in ("0%", "101%", "x", "-3", "0", "1.5"):
        with pytest.raises(ConfigError, match="capacity"):
            simulate.run(path, ["lru"], [capacity])
    with pytest.raises(BadPolicy, match="did you mean 'lru'"):
        simulate.run(path, ["lruu"], ["5%"])
    for tiers in ("1:4", "a:b:c", "0:1:2", "1:-1:2"):
        with pytest.raises(ConfigError, match="--tiers"):
            simulate.run(path, ["lru"], ["5%"], tiers=tiers)
    with pytest.raises(BadTrace, match="no request"):
        collect([])


def test_three_tiers_hit_like_one_of_their_size_and_cost_less_than_the_gpu_alone() -> None:
    workload = chats(2, count=600)
    whole = workload.distinct
    all_ = tiered(workload, "lru", (20, 40, whole), Costs(page_bytes=1 << 20))
    assert all_.gpu_hits + all_.host_hits + all_.nvme_hits == workload.accesses - whole
    # With endless NVMe that keeps its copies, no block is written twice.
    assert all_.nvme_written_blocks <= whole
    one = tiered(workload, "lru", (20, 0, 0), Costs())
    score = requests(workload, load("lru", 20), 20)
    assert (one.gpu_hits, one.host_hits, one.nvme_hits) == (score.prefix_hits, 0, 0)
    assert one.nvme_written_blocks == 0
    assert all_.ttft_mean_s < one.ttft_mean_s


def test_a_write_budget_and_admission_bound_what_is_written() -> None:
    workload = chats(3, count=600)
    sizes = (20, 20, 200)
    free = tiered(workload, "lru", sizes, Costs())
    second = tiered(workload, "lru", sizes, Costs(admission="second"))
    seconds = (workload.time_ms[-1] - workload.time_ms[0]) / 1000
    limit = Costs(page_bytes=1_000_000, write_mbps=0.05)
    bounded = tiered(workload, "lru", sizes, limit)
    assert second.nvme_written_blocks < free.nvme_written_blocks
    assert bounded.nvme_written_bytes <= 0.05e6 * (seconds + 10) + 1e6
    assert bounded.nvme_refused_blocks > 0


def test_loading_while_a_request_waits_hides_the_loads_of_a_busy_server() -> None:
    arrival = np.zeros(4)
    stall, compute = np.full(4, 1.0), np.full(4, 2.0)
    blocking = first_token_s(arrival, stall, compute, Costs(servers=1))
    ahead = first_token_s(arrival, stall, compute, Costs(servers=1, prefetch="queue"))
    assert blocking.tolist() == [3, 6, 9, 12]
    assert ahead.tolist() == [3, 5, 7, 9]
    assert first_token_s(arrival, stall, compute, Costs()).tolist() == [3, 3, 3, 3]


class TwiceNamed(EvictionBase):
    """A policy that breaks the rules."""

    name = "twice"

    def victims(self, candidates: Candidates, n: int, now: int) -> Ids:
        return np.repeat(candidates.all()[:1], n)


def test_a_policy_that_breaks_the_rules_is_refused_and_not_scored() -> None:
    with pytest.raises(BadPolicy, match="twice"):
        requests(chats(1), TwiceNamed(40), 40)


def test_a_capacity_in_percent_is_rounded_up() -> None:
    workload = collect([Request(0, 0, 0, np.arange(182_790))])
    expected = [math.ceil(182_790 * p / 100) for p in (1, 5, 10, 25)]
    assert [workload.capacity(p) for p in (1, 5, 10, 25)] == expected
    assert collect([Request(0, 0, 0, np.arange(100))]).capacity(7) == 7
