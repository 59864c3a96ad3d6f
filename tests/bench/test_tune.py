"""tune: what it chooses is never worse than what ran before, and its TOML says why."""

import tomllib
from pathlib import Path

import pytest

from tests.bench.test_simulate import chats, trace_file
from tiermem.bench import tune
from tiermem.bench.tiers import Costs
from tiermem.bench.workload import Workload
from tiermem.config import load
from tiermem.errors import ConfigError

QUICK = ("lru", "fifo")


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "CANDIDATES", QUICK)


def test_a_case_replaces_the_present_one_only_if_it_is_better_in_every_part() -> None:
    cases: list[tune.Case] = [("a", "all"), ("b", "all"), ("c", "all"), ("d", "all")]
    now, lucky, better, best = cases
    costs = {now: (1.0, 1.0), lucky: (0.1, 1.1), better: (0.9, 0.9)}
    assert tune.choose(costs, now) == better
    assert tune.choose(costs | {best: (0.8, 0.9)}, now) == best
    assert tune.choose({now: (1.0, 1.0), lucky: (0.1, 1.1)}, now) == now
    assert tune.choose({now: (1.0, 1.0), better: (0.999, 0.5)}, now) == now


@pytest.mark.usefixtures("few")
def test_the_choice_is_judged_on_the_second_half_and_written_as_toml_that_loads(
    tmp_path: Path,
) -> None:
    result = tune.run(trace_file(tmp_path), "5%", present="fifo", costs=Costs(page_bytes=1 << 16))
    assert result.chosen.cost_s <= result.default.cost_s
    assert result.gain >= 0
    assert result.default.policy == "fifo"
    path = tmp_path / "tiermem.toml"
    path.write_text(tune.toml(result))
    assert load(path).evict.gpu == result.chosen.policy
    assert path.read_text().startswith("# Written by tiermem tune from t.jsonl: 400 requests.")


@pytest.mark.usefixtures("few")
def test_a_write_budget_brings_admission_rules_into_the_search(tmp_path: Path) -> None:
    costs = Costs(page_bytes=1 << 16, write_mbps=0.5)
    result = tune.run(trace_file(tmp_path), "5%", costs=costs, present="lru")
    assert {choice.admission for choice in result.tried} == {"all", "reuse", "second"}
    assert "write_budget" in tomllib.loads(tune.toml(result))["nvme"]


@pytest.mark.usefixtures("few")
def test_arguments_of_a_policy_are_written_beside_its_name(tmp_path: Path) -> None:
    result = tune.run(
        trace_file(tmp_path), "5%", further=["s3fifo(small=0.3)"], present="s3fifo(small=0.3)"
    )
    assert "s3fifo(small=0.3)" in result.screened
    changed = {"chosen": replace_policy(result.default, "s3fifo(small=0.3)")}
    found = tomllib.loads(tune.toml(tune_with(result, changed)))["evict"]
    assert found["gpu"] == "s3fifo"
    assert found["gpu_params"] == {"small": 0.3}


def replace_policy(choice: tune.Choice, policy: str) -> tune.Choice:
    return tune.Choice(policy, choice.admission, choice.cost_s, choice.written_bytes)


def tune_with(result: tune.Tuning, changed: dict[str, tune.Choice]) -> tune.Tuning:
    fields = {name: getattr(result, name) for name in result.__struct_fields__}
    return tune.Tuning(**{**fields, **changed})


def test_a_trace_too_short_to_split_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="at least 4"):
        tune.run(trace_file(tmp_path), limit=3)


@pytest.mark.slow
@pytest.mark.parametrize("present", ["classq", "lru"])
def test_tuning_on_the_conversation_trace_is_never_worse_than_before(
    present: str, conversation_trace: Path
) -> None:
    result = tune.run(conversation_trace, "1%", present=present)
    assert result.chosen.cost_s <= result.default.cost_s


def test_parts_of_a_workload_keep_names_and_order() -> None:
    whole: Workload = chats(1)
    parts = [whole.part(0, 100), whole.part(100, whole.requests)]
    assert sum(part.accesses for part in parts) == whole.accesses
    assert parts[1].of(0).tolist() == whole.of(100).tolist()
    assert parts[0].distinct == whole.distinct
