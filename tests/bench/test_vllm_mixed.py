"""The load of the mixed bench follows from its trace; its modes are compared answer by answer."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from bench.vllm_engines import ON_CPU
from bench.vllm_mixed import load_of, merged, spread


def line(at_ms: int, tokens: int, out: int, blocks: list[int]) -> str:
    return json.dumps(
        {"timestamp": at_ms, "input_length": tokens, "output_length": out, "hash_ids": blocks}
    )


@pytest.fixture
def given(tmp_path: Path) -> argparse.Namespace:
    lines = [
        line(0, 1000, 100, [7, 8]),
        line(4000, 1536, 10, [7, 9, 10]),
        line(8000, 512 * 40, 64, list(range(40))),
    ]
    trace = tmp_path / "trace.jsonl"
    trace.write_text("\n".join(lines))
    return argparse.Namespace(trace=trace, requests=3, tokens=64, speed=2.0, longest=2048)


def test_requests_come_at_the_traces_times_and_shrink_in_proportion(
    given: argparse.Namespace,
) -> None:
    load = load_of(given, ON_CPU)
    assert [asked.at_s for asked in load] == [0.0, 2.0]
    assert [len(asked.prompt) for asked in load] == [125, 192]
    assert [asked.new for asked in load] == [12, 1]


def test_what_is_too_long_is_left_out(given: argparse.Namespace) -> None:
    given.longest = 4096
    assert len(load_of(given, ON_CPU)) == 3


def test_equal_blocks_are_equal_tokens_and_others_are_not(given: argparse.Namespace) -> None:
    first, second = load_of(given, ON_CPU)
    assert first.prompt[:64] == second.prompt[:64]
    assert first.prompt[64:125] != second.prompt[64:125]
    assert all(0 <= token < ON_CPU.vocabulary for token in second.prompt)


def test_modes_are_compared_with_stock_answer_by_answer(tmp_path: Path) -> None:
    for mode, answers in (("stock", ["a", "b", "c", "d"]), ("host", ["a", "b", "x", "d"])):
        (tmp_path / f"vllm-mixed-{mode}.json").write_text(
            json.dumps({"mode": mode, "answers": answers})
        )
    rows = merged(tmp_path)["rows"]
    assert (rows["stock"]["same"], rows["host"]["same"]) == (1.0, 0.75)
    assert "answers" not in rows["host"]


def test_a_spread_has_its_number_of_samples() -> None:
    assert spread([float(i) for i in range(101)]) == {
        "n": 101,
        "p50": 50.0,
        "p90": 90.0,
        "p99": 99.0,
    }
    assert spread([])["n"] == 0
