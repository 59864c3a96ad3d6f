"""A real vLLM engine on a CPU: hints, a slow drive, the metrics page, KV events."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.engine

PYTHON = "TIERMEM_VLLM_PYTHON"
_NAMED = os.environ.get(PYTHON, "")  # read before the session's fixture removes our variables
CHILD = Path(__file__).with_name("vllm_hints_child.py")
LONG_S = 600
BLOCK = 65536
"""Bytes of a block of the child's model: 32 tokens, 4 layers, K and V of 2 heads of 64 bf16."""

Ask = Mapping[str, object]


def ask(*parts: tuple[int, int], **hints: object) -> Ask:
    """A prompt of these parts (seed, tokens)."""
    return {"parts": parts, "hints": hints}


def run(
    folder: Path,
    toml: str,
    rounds: Sequence[Sequence[Ask]],
    page_s: float = 0.0,
    apart: bool = False,
) -> Any:
    """What the child answers. page_s: how long a page from the drive takes, at least.

    apart: the engine runs in a process of its own, into which the child does not look.
    """
    if not Path(_NAMED).is_file():
        pytest.skip(f"${PYTHON} names no interpreter of an environment with vLLM")
    config, given, answer = folder / "tiermem.toml", folder / "given.json", folder / "answer.json"
    config.write_text(toml)
    given.write_text(
        json.dumps(
            {
                "model": str(folder / "model"), "answer": str(answer), "rounds": rounds,
                "page_s": page_s,
            }
        )
    )  # fmt: skip
    env = {
        **os.environ,
        "TIERMEM": "1", "TIERMEM_CONFIG": str(config), "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_ENABLE_V1_MULTIPROCESSING": str(int(apart)), "VLLM_NO_USAGE_STATS": "1",
        "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(CHILD.parents[2]),
    }  # fmt: skip
    child = subprocess.run(
        [_NAMED, str(CHILD), str(given)],
        capture_output=True, text=True, timeout=LONG_S, env=env, cwd=folder, check=False,
    )  # fmt: skip
    assert answer.exists(), child.stdout[-3000:] + child.stderr[-5000:]
    return {**json.loads(answer.read_text()), "log": child.stdout + child.stderr}


# ---------------------------------------------------------------- hints

PROMPT = 320
"""Tokens: ten blocks, of which all but the last can be found again (its last token is computed)."""
FOUND = PROMPT - 32
FLOOD = [[ask((1000 + i, 800))] for i in range(16)]
"""400 blocks; GPU and host hold 110 of a prefix cache of 768."""
RETAINED, NOT_RETAINED = (11, 160), (12, 160)
"""Few enough to stay on the GPU beside one of the others: half of it is kept free ahead of need."""
HINTED = [
    [ask((1, PROMPT), keep=False)],
    [ask((1, PROMPT))],  # 1: was not kept
    [ask((1, PROMPT))],  # 2: was
    [ask((2, PROMPT), session="a")],
    [ask((2, PROMPT), (3, PROMPT), session="a")],
    [ask((2, PROMPT), (4, PROMPT), session="b")],  # 5: shares the first part
    [ask((2, PROMPT), (3, PROMPT), (5, PROMPT), session="a", closed=True)],  # 6
    [ask((2, PROMPT), (3, PROMPT))],  # 7: only what b has used is left of it
    [ask((2, PROMPT), (4, PROMPT))],  # 8: b's is all there
    [ask((6, PROMPT), priority=1000, retain_s="long", colour="red")],  # 9
    [ask(NOT_RETAINED)],
    [ask(RETAINED, retain_s=3600.0, priority=50)],
    *FLOOD,
    [ask(RETAINED)],  # 28
    [ask(NOT_RETAINED)],  # 29
]


@pytest.fixture(scope="module")
def hinted(tmp_path_factory: pytest.TempPathFactory) -> Any:
    toml = f"[gpu]\nbudget = {70 * BLOCK}\n[host]\ncapacity = {40 * BLOCK}\n"
    return run(tmp_path_factory.mktemp("hints"), toml, HINTED)


def cached(answer: Any, round_: int) -> int:
    (one,) = answer["rounds"][round_]
    return int(one["cached"])


def test_what_is_not_to_be_kept_is_not_found_again(hinted: Any) -> None:
    assert cached(hinted, 1) == 0
    assert cached(hinted, 2) == FOUND


def test_a_closed_session_leaves_what_others_use(hinted: Any) -> None:
    assert cached(hinted, 5) == PROMPT
    assert cached(hinted, 6) == 2 * PROMPT
    assert cached(hinted, 7) == PROMPT
    assert cached(hinted, 8) == PROMPT + FOUND


def test_what_is_retained_outlives_a_flood(hinted: Any) -> None:
    assert cached(hinted, 28) == 160 - 32
    assert cached(hinted, 29) == 0


def test_hints_that_make_no_sense_fail_no_request(hinted: Any) -> None:
    assert len(hinted["rounds"][9][0]["tokens"]) == 4
    for name in ("priority=1000", "retain_s='long'", "no hint 'colour'"):
        assert name in hinted["log"]


def test_tokens_do_not_depend_on_what_is_kept(hinted: Any) -> None:
    rounds = [round_[0]["tokens"] for round_ in hinted["rounds"]]
    assert rounds[0] == rounds[1] == rounds[2]
    assert (rounds[10], rounds[11]) == (rounds[29], rounds[28])


# ---------------------------------------------------------------- the page and the events


def on_page(answer: Any, name: str, **labels: str) -> float:
    """The value of one of our samples."""
    for line in answer["metrics"].splitlines():
        if line.startswith(f"vllm:tiermem_{name}{{") and all(
            f'{k}="{v}"' in line for k, v in labels.items()
        ):
            return float(line.rpartition(" ")[2])
    raise AssertionError(f"{name} {labels} is not on the page")


def test_residence_moves_and_decisions_are_on_the_engine_s_page(hinted: Any) -> None:
    def value(name: str, **labels: str) -> float:
        return on_page(hinted, name, **labels)

    assert value("budget_blocks") == 70
    assert value("blocks_in_use") == 1, "block 0: the last request has ended"
    assert 0 < value("blocks", place="gpu") <= 70
    assert 0 < value("blocks", place="host") <= 40
    assert value("route_pages_total", src="gpu", dst="host") > 0
    assert value("route_bytes_total", src="gpu", dst="host") > 100 * BLOCK
    assert value("events_total", event="dropped") > 0
    for event, count in hinted["counts"].items():
        assert value("requests_total", event=event) == count
    assert re.search(r'vllm:tiermem_blocks\{[^}]*engine="0"', hinted["metrics"]), (
        "vLLM's own labels"
    )


def test_an_engine_in_another_process_tells_the_page_as_well(tmp_path: Path) -> None:
    toml = f"[gpu]\nbudget = {70 * BLOCK}\n[host]\ncapacity = {40 * BLOCK}\n"
    answer = run(tmp_path, toml, [[ask((seed, 700)) for seed in range(8)]], apart=True)
    assert on_page(answer, "budget_blocks") == 70
    assert on_page(answer, "blocks", place="host") > 0
    assert on_page(answer, "route_bytes_total", src="gpu", dst="host") > 40 * BLOCK


def test_kv_events_come_and_tell_of_blocks_that_were_dropped(hinted: Any) -> None:
    """The prefix cache has more ids than all rounds use: vLLM itself takes none of them back."""
    assert hinted["stored"] > 400
    assert hinted["events"]["dropped"] > 0
    pages = BLOCK // 4096
    assert hinted["removed"] >= hinted["events"]["dropped"] // pages
    assert hinted["removed_unknown"] == 0


# ---------------------------------------------------------------- a slow drive


@pytest.mark.parametrize("persist", [False, True])
def test_what_a_slow_drive_has_is_computed_again_instead(persist: bool, tmp_path: Path) -> None:
    """The first loads measure it: 15 ms a block; the engine computes one in about 2."""
    rounds = [[ask((seed, 700)) for seed in range(16)]] * 3
    slab = tmp_path / "slab"
    slab.mkdir(mode=0o700)
    toml = (
        f"[gpu]\nbudget = {70 * BLOCK}\n[host]\ncapacity = {16 * BLOCK}\n"
        f'[nvme]\npath = "{slab}"\ncapacity = "64MiB"\npersist = {str(persist).lower()}\n'
    )
    answer = run(tmp_path, toml, rounds, page_s=0.05)
    assert 0 < answer["counts"]["recomputed"] <= 32, "requests of two rounds, each once"
    tokens = [[one["tokens"] for one in round_] for round_ in answer["rounds"]]
    assert tokens == [tokens[0]] * 3
    last = sum(one["cached"] for one in answer["rounds"][2])
    assert last < 8 * 700, "of 11,200 tokens, most of which are on the drive"
