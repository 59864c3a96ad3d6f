"""SGLang on a CPU over tiermem: the same tokens as without it, whatever moves meanwhile."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.integrations.sglang_serving import PAGE, Ended, Round, Scenario, run

pytestmark = pytest.mark.engine

THREE = [(1, 200), (2, 300), (3, 150)]
OTHERS = [(4, 200), (5, 300), (6, 150)]
ROUNDS = [Round(THREE), Round(OTHERS), Round(THREE), Round(OTHERS)]
PLAIN = {"max_total_tokens": 4096}

Serve = Callable[[Scenario], Ended]


def toml(gpu: int, host: int, more: str = "") -> str:
    """Sizes in pages; host 0 = off."""
    return f"[gpu]\nbudget = {gpu * PAGE}\n[host]\ncapacity = {host * PAGE}\n{more}"


def nvme(path: Path, pages: int, more: str = "") -> str:
    from tiermem.nvme.slab import bytes_for

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


def test_two_ranks_give_the_same_tokens(serve: Serve, plain: Serve) -> None:
    options = {"tp_size": 2}
    ended = serve(Scenario(ROUNDS, options, toml(24, 162)))  # each rank has half of a page's bytes
    assert ended.outputs() == plain(Scenario(ROUNDS, {**PLAIN, **options})).outputs()
    assert ended.cached(3) == [192, 288, 144]
    assert [ended.moved("host", "gpu", rank) > 0 for rank in range(2)] == [True, True]


@pytest.mark.parametrize("host", [0, 60], ids=["nvme", "host-and-nvme"])
def test_pages_come_back_from_a_drive(
    serve: Serve, plain: Serve, tmp_path: Path, host: int
) -> None:
    rounds = [*ROUNDS, Round([(7, 400), (8, 300)]), Round(THREE)]
    ended = serve(Scenario(rounds, {}, toml(48, host, nvme(tmp_path / "slab", 200))))
    assert ended.outputs() == plain(Scenario(rounds, PLAIN)).outputs()
    assert ended.cached(5) == [192, 288, 144]
    assert ended.moved("nvme", "gpu") + ended.moved("nvme", "host") > 0


def test_without_the_residency_step_the_engine_dies_of_a_stray_access(serve: Serve) -> None:
    ended = serve(Scenario(ROUNDS[:1], {}, toml(48, 162), env={"WITHOUT_RESIDENCY": "1"}))
    assert ended.rounds == []
    assert "Segmentation fault" in ended.log or "exit code: -11" in ended.log
