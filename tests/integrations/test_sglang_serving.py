"""SGLang on a CPU over tiermem: the same tokens as without it, whatever moves meanwhile."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from tests.integrations import sglang_serving as sglang
from tests.integrations.children import python, run_child
from tests.integrations.sglang_serving import PAGE, Ended, Round, Scenario, release, run

pytestmark = pytest.mark.engine

THREE = [(1, 200), (2, 300), (3, 150)]
OTHERS = [(4, 200), (5, 300), (6, 150)]
ROUNDS = [Round(THREE), Round(OTHERS), Round(THREE), Round(OTHERS)]
PLAIN = {"max_total_tokens": 4096}
ALL_LOADS = {"FAULT": "all_are_worth_it"}

Serve = Callable[[Scenario], Ended]


def toml(gpu: int, host: int, more: str = "") -> str:
    """Sizes in pages; host 0 = off."""
    return f"[gpu]\nbudget = {gpu * PAGE}\n[host]\ncapacity = {host * PAGE}\n{more}"


def nvme(path: Path, pages: int, more: str = "") -> str:
    from tiermem.nvme.cap import bytes_for

    return f'[nvme]\npath = "{path}"\ncapacity = {bytes_for(pages, PAGE)}\n{more}'


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sglang") / "model"


@pytest.fixture
def serve(tmp_path: Path, model: Path) -> Serve:
    return lambda scenario: run(scenario, tmp_path, model)


@pytest.fixture(scope="module")
def plain(model: Path) -> Callable[[Scenario], Ended]:
    """The stock engine's answers, once for each set of rounds and options."""
    known: dict[str, Ended] = {}

    def ask(scenario: Scenario) -> Ended:
        key = repr(scenario)
        if key not in known:
            known[key] = run(scenario, model.parent / f"plain{len(known)}", model)
            assert known[key].status == 0, known[key].log[-3000:]
        return known[key]

    return ask


@pytest.mark.parametrize("overlap", [True, False], ids=["overlap", "no-overlap"])
def test_48_physical_of_162_virtual_pages_give_the_same_tokens(
    serve: Serve, plain: Serve, overlap: bool
) -> None:
    options = {"disable_overlap_schedule": not overlap}
    ended = serve(Scenario(ROUNDS, options, toml(48, 162)))
    assert ended.outputs() == plain(Scenario(ROUNDS, {**PLAIN, **options})).outputs()
    assert "max_total_num_tokens=2592" in ended.log  # 162 pages of 16
    assert ended.cached(2) == [192, 288, 144]
    assert ended.moved("host", "gpu") >= 39


@pytest.mark.parametrize("drive", [False, True], ids=["host", "host-and-nvme"])
def test_two_ranks_give_the_same_tokens(
    serve: Serve, plain: Serve, tmp_path: Path, drive: bool
) -> None:
    options = {"tp_size": 2}
    lower = toml(24, 20, nvme(tmp_path / "slab", 200)) if drive else toml(24, 162)
    # Each rank has half of a page's bytes.
    ended = serve(Scenario(ROUNDS, options, lower, env=ALL_LOADS))
    assert ended.outputs() == plain(Scenario(ROUNDS, {**PLAIN, **options})).outputs()
    assert ended.cached(3) == [192, 288, 144]
    up = [[ended.moved(tier, "gpu", rank) for tier in ("host", "nvme")] for rank in range(2)]
    assert all(sum(pages) > 0 for pages in up)
    assert not drive or all(pages[1] > 0 for pages in up)


@pytest.mark.parametrize("host", [0, 60], ids=["nvme", "host-and-nvme"])
def test_pages_come_back_from_a_drive(
    serve: Serve, plain: Serve, tmp_path: Path, host: int
) -> None:
    rounds = [*ROUNDS, Round([(7, 400), (8, 300)]), Round(THREE)]
    kept = toml(48, host, nvme(tmp_path / "slab", 200))
    ended = serve(Scenario(rounds, {}, kept, env=ALL_LOADS))
    assert ended.outputs() == plain(Scenario(rounds, PLAIN)).outputs()
    assert ended.cached(5) == [192, 288, 144]
    assert ended.moved("nvme", "gpu") + ended.moved("nvme", "host") > 0


def test_without_the_residency_step_the_engine_dies_of_a_stray_access(serve: Serve) -> None:
    ended = serve(Scenario(ROUNDS[:1], {}, toml(48, 162), env={"FAULT": "without_residency"}))
    assert ended.rounds == []
    assert "crashed with exit code -11" in ended.log  # SIGSEGV


@pytest.mark.parametrize("waits", [True, False], ids=["waits", "waits-for-nothing"])
def test_a_layer_is_read_once_its_bytes_are_there(
    serve: Serve, plain: Serve, tmp_path: Path, waits: bool
) -> None:
    """Loads that come no sooner than they are waited for; without the waits the tokens differ."""
    fault = "late_loads" if waits else "late_loads_that_nobody_waits_for"
    seen = tmp_path / "seen"
    ended = serve(Scenario(ROUNDS, {}, toml(48, 162), env={"FAULT": fault, "SEEN": str(seen)}))
    same = ended.outputs() == plain(Scenario(ROUNDS, PLAIN)).outputs()
    assert same == waits
    assert ended.cached(2) == [192, 288, 144]
    assert int(seen.read_text()) > 0


@pytest.mark.parametrize("chunk", [None, 64], ids=["whole", "chunked"])
def test_what_is_not_worth_a_load_is_computed_and_not_loaded_after_all(
    serve: Serve, plain: Serve, tmp_path: Path, chunk: int | None
) -> None:
    options = {"chunked_prefill_size": chunk}
    rounds = [Round(THREE), Round(OTHERS), Round(THREE)]
    kept = toml(48, 0, nvme(tmp_path / "slab", 200))
    ended = serve(Scenario(rounds, options, kept, env={"FAULT": "two_are_worth_it"}))
    assert tokens(ended) == tokens(plain(Scenario(rounds, PLAIN)))
    assert ended.cached(2) == [32, 32, 32]
    assert ended.moved("nvme", "gpu") <= 6  # the first two pages of three requests


def test_a_request_that_is_aborted_between_its_chunks_leaves_only_what_was_computed(
    serve: Serve, plain: Serve
) -> None:
    again = Round([(1, 600), (2, 300)])
    rounds = [Round([(1, 600)]), Round(OTHERS), again, again]
    options = {"chunked_prefill_size": 64}
    ended = serve(Scenario(rounds, options, toml(70, 162), env={"FAULT": "abort_a_chunk"}))
    expected = plain(Scenario(rounds, PLAIN))
    [[aborted], *later] = ended.rounds
    assert "bort" in str(aborted)
    assert 0 < later[1][0]["cached"] < 600
    assert [[r["tokens"] for r in round_] for round_ in later] == tokens(expected)[1:]


def test_tokens_of_a_running_request_that_went_bad_on_a_drive_end_it_and_no_other(
    serve: Serve, plain: Serve, tmp_path: Path
) -> None:
    slab = tmp_path / "slab"
    rounds = [Round(THREE), Round(THREE), Round(OTHERS)]
    fault = {"FAULT": "spoil_running", "SLAB": str(slab)}
    kept = toml(60, 0, nvme(slab, 200, "persist = true\n"))  # in a file that can be spoiled
    ended = serve(Scenario(rounds, {}, kept, env=fault))
    expected = tokens(plain(Scenario(rounds, PLAIN)))
    [[spoiled, *others], *later] = ended.rounds
    assert "could not be read back as written" in str(spoiled)
    assert [r["tokens"] for r in others] == expected[0][1:]
    assert [[r["tokens"] for r in round_] for round_ in later] == expected[1:]
    assert later[0][0]["cached"] == 0


def test_the_allocator_and_the_cut_of_a_branch_fit_the_engines_own_parts(tmp_path: Path) -> None:
    parts = sglang.CHILD.with_name("sglang_parts_child.py")
    child = run_child([python(*sglang.ENVIRONMENT), str(parts)], tmp_path, {}, {})
    assert child.status == 0, child.log[-3000:]


# ---------------------------------------------------------------- memory is what limits


TWO = [(1, 100), (2, 100)]
"""With 76 new tokens each ends at 176, 11 pages."""
LET_IN = {"SGLANG_CLIP_MAX_NEW_TOKENS_ESTIMATION": "8"}
"""So many tokens of an answer SGLang counts on when it lets a request in: both of TWO are, at once,
and then grow side by side until memory ends."""


def tokens(ended: Ended) -> list[list[list[int]]]:
    """What was computed again after a retraction may differ in the last digits of a logprob."""
    return [[tokens for tokens, _ in round_] for round_ in ended.outputs()]


@pytest.mark.parametrize(
    ("resident", "requests"), [(22, TWO), (21, TWO), (22, [(seed, 100) for seed in range(1, 7)])]
)
def test_a_working_set_of_the_budget_runs_and_a_larger_one_waits(
    serve: Serve, plain: Serve, resident: int, requests: list[tuple[int, int]]
) -> None:
    rounds = [Round(requests, new=76)]
    options = {"decode_log_interval": 1}
    ended = serve(Scenario(rounds, options, toml(resident + 1, 100), env=LET_IN))
    assert tokens(ended) == tokens(plain(Scenario(rounds, PLAIN)))
    assert f"resident={resident + 1}" in ended.log
    steps = re.findall(r"Decode batch, #running-req: (\d+), #token: (\d+)", ended.log)
    assert {running for running, _ in steps} <= {"1", "2"}  # the others wait in the queue
    largest = max(int(used) for _, used in steps)
    if resident == 22:
        assert largest == 22 * 16  # to the last page
        assert "Retract requests" not in ended.log
    else:
        assert 11 * 16 < largest <= resident * 16
        assert "Retract requests" in ended.log


def test_a_request_that_can_never_fit_is_refused_and_others_are_served(
    serve: Serve, plain: Serve
) -> None:
    ended = serve(Scenario([Round([(1, 400)]), Round(TWO)], {}, toml(23, 100)))
    [[refused], served] = ended.rounds
    assert "maximum allowed length" in str(refused)
    expected = plain(Scenario([Round(TWO)], PLAIN)).rounds[0]
    assert [r["tokens"] for r in served] == [r["tokens"] for r in expected]


def test_the_budget_moves_while_requests_run(serve: Serve, plain: Serve) -> None:
    moves = [
        ["limit", "sgl", "--cap", str(24 * PAGE), "--wait", "60"],
        ["limit", "sgl", "--cap", str(48 * PAGE), "--wait", "60"],
    ]
    rounds = [Round(THREE), Round(THREE, new=60, meanwhile=moves), Round(OTHERS)]
    share = '[share]\nname = "sgl"\ngroup = "test"\n'
    ended = serve(Scenario(rounds, {}, toml(48, 162, share)))
    calm = [Round(r.prompts, r.new) for r in rounds]
    assert tokens(ended) == tokens(plain(Scenario(calm, PLAIN)))
    assert "held" in ended.log
    assert ended.log.count("sgl: held") == 2


# ---------------------------------------------------------------- content that is kept


def test_a_killed_engine_leaves_its_prefixes_to_the_next(
    serve: Serve, plain: Serve, tmp_path: Path
) -> None:
    kept = toml(24, 0, nvme(tmp_path / "slab", 200, "persist = true\n"))
    more = [Round([(seed, 300)], new=8) for seed in (11, 12, 13)]
    first = serve(Scenario([Round(THREE), *more], {}, kept, kill=True))
    assert first.status == -9
    again = serve(Scenario([Round(THREE), Round(more[0].prompts, new=8)], {}, kept))
    assert again.counted("restored") > 0
    assert again.counted("adopted") > 0
    assert sum(again.cached(0)) >= 300
    expected = plain(Scenario([Round(THREE), Round(more[0].prompts, new=8)], PLAIN))
    assert again.outputs() == expected.outputs()


def test_a_prefix_that_the_tree_gave_up_comes_back_from_the_drive(
    serve: Serve, plain: Serve, tmp_path: Path
) -> None:
    kept = toml(24, 0, nvme(tmp_path / "slab", 200, "persist = true\n"))
    rounds = [Round([(seed, 300)], new=8) for seed in (11, 12, 13, 14, 11)]
    ended = serve(Scenario(rounds, {"max_total_tokens": 60 * 16}, kept))
    assert ended.counted("shelved") > 0
    assert ended.counted("adopted") > 0
    assert ended.cached(4) == [288]
    assert ended.outputs() == plain(Scenario(rounds, PLAIN)).outputs()
    bare = plain(Scenario(rounds, {"max_total_tokens": 60 * 16}))
    assert bare.cached(4)[0] < 288


# ---------------------------------------------------------------- what cannot work


def test_a_page_size_that_is_not_given_is_chosen(serve: Serve) -> None:
    ended = serve(Scenario([Round(TWO)], {"page_size": None}, toml(48, 162)))
    assert len(ended.outputs()[0]) == 2
    assert "page_bytes=16384" in ended.log


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"enable_hierarchical_cache": True}, "HiCache copies KV by itself"),
        ({"page_size": 1}, "--page-size is 1"),
    ],
)
def test_what_cannot_work_stops_the_engine_with_the_reason(
    serve: Serve, options: dict[str, object], reason: str
) -> None:
    ended = serve(Scenario([Round(TWO)], options, toml(48, 162)))
    assert ended.rounds == []
    assert ended.status != 0
    assert reason in ended.log


# ---------------------------------------------------------------- under HiCache

HICACHE = {
    "max_total_tokens": 960, "enable_hierarchical_cache": True, "hicache_ratio": 1.2,
    "hicache_write_policy": "write_through", "hicache_io_backend": "kernel",
    "hicache_mem_layout": "page_first", "hicache_storage_backend": "dynamic",
    "hicache_storage_prefetch_policy": "wait_complete",
    "hicache_storage_backend_extra_config": json.dumps(
        {
            "backend_name": "tiermem", "interface_v1": 1, "class_name": "TiermemStorage",
            "module_path": "tiermem.integrations.sglang_storage",
        }
    ),
}  # fmt: skip
SIX = [Round([(seed, 300)], new=8) for seed in range(11, 17)]
"""108 pages: HiCache holds 60 on the device and 73 in its host pool."""


def under_hicache(rounds: list[Round], folder: Path) -> Scenario:
    if release() != "0.5.17":
        pytest.skip("HiCache needs a GPU; its stand-ins for a CPU are those of 0.5.17")
    kept = toml(32, 0, nvme(folder, 200, "persist = true\n"))
    return Scenario(rounds, HICACHE, kept, on=False, env={"HICACHE_ON_CPU": "1"})


def test_hicache_gets_a_flushed_prefix_back_from_the_drive(
    serve: Serve, plain: Serve, tmp_path: Path
) -> None:
    rounds = [*SIX, SIX[0]]
    ended = serve(under_hicache(rounds, tmp_path / "slab"))
    assert tokens(ended) == tokens(plain(Scenario(rounds, PLAIN)))
    assert ended.rounds[6][0]["from"]["storage"] >= 256


def test_an_io_error_under_hicache_is_a_miss_and_no_request_hangs(
    serve: Serve, plain: Serve, tmp_path: Path
) -> None:
    slab = tmp_path / "slab"
    rounds = [*SIX, replace(SIX[0], truncate=str(slab)), SIX[1], SIX[0]]
    ended = serve(under_hicache(rounds, slab))
    calm = [replace(round_, truncate="") for round_ in rounds]
    assert tokens(ended) == tokens(plain(Scenario(calm, PLAIN)))
    assert ended.rounds[6][0]["cached"] == 0
    assert "lost page" in ended.log or "pages failed" in ended.log
