"""vLLM on a CPU over tiermem: the same tokens as without it, whatever moves meanwhile.

Pages that are not resident are protected: a stray access kills the engine, and the test.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.integrations.vllm_serving import (
    BLOCK,
    EVERY_LOAD_IS_WAITED_FOR,
    HYBRID_BLOCK,
    MIXED_UP,
    NO_ORDERS,
    Ended,
    Round,
    Scenario,
    release,
    run,
)

pytestmark = pytest.mark.engine

ROUNDS = [Round(), Round(), Round()]
"""7,329 prompt tokens each, in 236 blocks; with what is generated, 250."""
WHOLE_BLOCKS = 7000
VIRTUAL = {"num_gpu_blocks_override": 512}

Serve = Callable[[Scenario], Ended]


def toml(gpu: int, host: int, more: str = "", block: int = BLOCK) -> str:
    """Sizes in blocks; host 0 = off."""
    return (
        f'[gpu]\ndevice = "cpu"\nbudget = {gpu * block}\n[host]\ncapacity = {host * block}\n{more}'
    )


def nvme(path: Path, blocks: int, more: str = "") -> str:
    return f'[nvme]\npath = "{path}"\ncapacity = {blocks * BLOCK}\n{more}'


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("vllm") / "model"


@pytest.fixture
def serve(tmp_path: Path, model: Path) -> Serve:
    return lambda scenario: run(scenario, tmp_path, model)


@pytest.fixture(scope="module")
def stock(model: Path) -> Serve:
    """The stock engine's answers, once for each set of rounds and options."""
    known: dict[str, Ended] = {}

    def ask(scenario: Scenario) -> Ended:
        key = repr(scenario)
        if key not in known:
            known[key] = run(scenario, model.parent / f"stock{len(known)}", model)
            assert known[key].status == 0, known[key].log[-3000:]
        return known[key]

    return ask


# ---------------------------------------------------------------- what moves


@pytest.mark.parametrize("resident", [40, 70, 200])
def test_a_few_resident_of_512_virtual_blocks_give_the_same_tokens(
    serve: Serve, stock: Serve, resident: int
) -> None:
    ended = serve(Scenario(ROUNDS, VIRTUAL, toml(resident, 512)))
    assert ended.tokens() == stock(Scenario(ROUNDS)).tokens()
    assert min(ended.cached()[1:]) >= WHOLE_BLOCKS
    assert ended.counted["gpu_host"] > 0
    assert ended.counted["gpu_used"] <= resident * ended.counted["unit_pages"]


def test_blocks_come_back_from_a_drive(serve: Serve, stock: Serve, tmp_path: Path) -> None:
    ended = serve(Scenario(ROUNDS, VIRTUAL, toml(70, 40, nvme(tmp_path / "slab", 600))))
    assert ended.tokens() == stock(Scenario(ROUNDS)).tokens()
    assert min(ended.cached()[1:]) >= WHOLE_BLOCKS
    assert ended.counted["nvme_gpu"] > 0


def test_requests_wait_for_their_fetches(serve: Serve, stock: Serve) -> None:
    ended = serve(Scenario(ROUNDS, VIRTUAL, toml(70, 512), changes=[EVERY_LOAD_IS_WAITED_FOR]))
    assert ended.tokens() == stock(Scenario(ROUNDS)).tokens()
    assert min(ended.cached()[1:]) >= WHOLE_BLOCKS
    assert ended.counted["waited"] > 0


LONG = [Round(new=200), Round(new=200)]
"""Every request grows by seven blocks while others run."""


@pytest.mark.parametrize("resident", [40, 60])
def test_more_running_than_the_budget_holds_are_preempted(
    serve: Serve, stock: Serve, resident: int
) -> None:
    options = {"max_num_seqs": 16}
    ended = serve(Scenario(LONG, {**VIRTUAL, **options}, toml(resident, 512)))
    assert ended.counted["resumed"] > 0
    # vLLM 0.28 by itself gives one of the prompts another answer once it is preempted, or batched
    # with others: so it is held against vLLM that has as many blocks.
    pressed = {**options, "num_gpu_blocks_override": resident}
    assert ended.tokens() == stock(Scenario(LONG, pressed)).tokens()


def test_a_prefill_in_small_chunks_gives_the_same_tokens(serve: Serve, stock: Serve) -> None:
    options = {"max_num_batched_tokens": 128}
    ended = serve(Scenario(ROUNDS, {**VIRTUAL, **options}, toml(50, 512)))
    assert ended.tokens() == stock(Scenario(ROUNDS, options)).tokens()
    assert min(ended.cached()[1:]) >= WHOLE_BLOCKS


def test_the_budget_is_halved_and_doubled_while_requests_run(serve: Serve, stock: Serve) -> None:
    limits = [(10, 45 * BLOCK), (80, 90 * BLOCK), (120, 45 * BLOCK), (150, 90 * BLOCK)]
    ended = serve(Scenario(ROUNDS, VIRTUAL, toml(90, 512), limits=limits))
    assert ended.counted["steps"] > 150
    assert ended.counted["budget"] == 90
    assert ended.tokens() == stock(Scenario(ROUNDS)).tokens()
    assert min(ended.cached()[1:]) >= WHOLE_BLOCKS


# ---------------------------------------------------------------- other kinds of attention


@pytest.fixture
def tables() -> None:
    if release() < (0, 30):
        pytest.skip("this vLLM does not show its block tables")


SMALL_STEPS = {"max_num_batched_tokens": 128}
"""A request holds what its windows look at, and what is computed right now."""


@pytest.mark.usefixtures("tables")
def test_windows_beside_full_attention_give_the_same_tokens(serve: Serve, stock: Serve) -> None:
    """Kept whole, a request of 1,024 tokens would need 96 of the 60 blocks; in its tables, 50."""
    options = {"num_gpu_blocks_override": 1024, **SMALL_STEPS}
    ended = serve(Scenario(ROUNDS, options, toml(60, 1024, block=HYBRID_BLOCK), kind="hybrid"))
    assert ended.tokens() == stock(Scenario(ROUNDS, SMALL_STEPS, kind="hybrid")).tokens()
    assert min(ended.cached()[1:]) >= WHOLE_BLOCKS
    assert ended.counted["gpu_host"] > 0
    assert ended.counted["gpu_used"] <= 60 * ended.counted["unit_pages"]


@pytest.mark.usefixtures("tables")
def test_windows_alone_give_the_same_tokens(serve: Serve, stock: Serve) -> None:
    """A request of 1,024 tokens has 32 blocks, and holds 9 of them at a time."""
    ended = serve(Scenario(ROUNDS, {**VIRTUAL, **SMALL_STEPS}, toml(20, 512), kind="windows"))
    assert ended.tokens() == stock(Scenario(ROUNDS, SMALL_STEPS, kind="windows")).tokens()
    assert min(ended.cached()[1:]) >= WHOLE_BLOCKS
    assert ended.counted["gpu_host"] > 0


# ---------------------------------------------------------------- more than one process


def test_an_engine_in_a_process_of_its_own(serve: Serve, stock: Serve) -> None:
    ended = serve(Scenario(ROUNDS, VIRTUAL, toml(70, 512), apart=True))
    assert ended.tokens() == stock(Scenario(ROUNDS)).tokens()
    assert min(ended.cached()[1:]) >= WHOLE_BLOCKS
    assert ended.counted["pid"] != ended.pid


def test_two_ranks_give_the_same_tokens(serve: Serve, stock: Serve) -> None:
    options = {"tensor_parallel_size": 2}
    ended = serve(Scenario(ROUNDS, {**VIRTUAL, **options}, toml(35, 512)))  # half a block a rank
    assert ended.tokens() == stock(Scenario(ROUNDS, options)).tokens()
    assert min(ended.cached()[1:]) >= WHOLE_BLOCKS
    assert ended.counted["budget"] == 70


def test_another_connector_beside_it_keeps_working(
    serve: Serve, stock: Serve, tmp_path: Path
) -> None:
    folder = tmp_path / "others"
    other = {
        "kv_connector": "ExampleConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"shared_storage_path": str(folder)},
    }
    options = {**VIRTUAL, "kv_transfer_config": other}
    ended = serve(Scenario(ROUNDS, options, toml(70, 512)))
    assert ended.tokens() == stock(Scenario(ROUNDS)).tokens()
    assert min(ended.cached()[1:]) >= WHOLE_BLOCKS
    assert len(list(folder.iterdir())) == 16, "one folder a prompt"


# ---------------------------------------------------------------- content that is kept


def kept(folder: Path) -> str:
    return toml(70, 128, nvme(folder, 700, "persist = true\n"))


def test_a_killed_engine_leaves_its_prefixes_to_the_next(
    serve: Serve, stock: Serve, tmp_path: Path
) -> None:
    first = serve(Scenario(ROUNDS, VIRTUAL, kept(tmp_path / "slab"), kill=True))
    assert first.status == -9
    again = serve(Scenario(ROUNDS[:2], VIRTUAL, kept(tmp_path / "slab")))
    assert again.tokens() == stock(Scenario(ROUNDS)).tokens()[:2]
    assert again.cached()[0] >= 6500
    assert again.counted["adopted"] > 200
    assert again.counted["nvme_gpu"] > 0


def spoil(folder: Path) -> None:
    """Other bytes in the middle of one page in each MiB of the slab, where it holds something: one
    page alone may be of content that was not recorded when its engine was killed."""
    (slab,) = folder.glob("*.slab")
    size, spoiled = slab.stat().st_size, set()
    with slab.open("r+b") as file:
        for at in range(size // 4, size, 4096):
            file.seek(at)
            if at >> 20 not in spoiled and len(set(file.read(4096))) > 64:
                file.seek(at + 1000)
                file.write(b"spoiled")
                spoiled.add(at >> 20)
    assert spoiled, f"{slab} holds nothing"


def test_a_page_that_was_spoiled_meanwhile_is_computed_again(
    serve: Serve, stock: Serve, tmp_path: Path
) -> None:
    serve(Scenario(ROUNDS, VIRTUAL, kept(tmp_path / "slab"), kill=True))
    spoil(tmp_path / "slab")
    again = serve(Scenario(ROUNDS[:2], VIRTUAL, kept(tmp_path / "slab")))
    assert again.tokens() == stock(Scenario(ROUNDS)).tokens()[:2]
    assert again.counted["failed_reads"] > 0
    assert again.cached()[0] > 0  # vLLM counts what was to come from the drive, too


# ---------------------------------------------------------------- what cannot work


def test_tokens_tell_a_block_from_another(serve: Serve, stock: Serve) -> None:
    ended = serve(Scenario(ROUNDS[:2], VIRTUAL, toml(70, 512), changes=[MIXED_UP]))
    right = stock(Scenario(ROUNDS)).tokens()[1]
    same = [ours == theirs for ours, theirs in zip(ended.tokens()[1], right, strict=True)]
    assert sum(same) < 12, "what is loaded hardly counts"


def test_without_the_orders_the_engine_dies_of_a_stray_access(serve: Serve) -> None:
    ended = serve(Scenario(ROUNDS[:1], VIRTUAL, toml(40, 512), changes=[NO_ORDERS]))
    assert ended.status == -11  # SIGSEGV
    assert ended.rounds == []
