from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import msgspec
import pytest
import typer
from typer.testing import CliRunner

from tests.bench.fixtures.results import result, row
from tiermem.bench.breakeven import (
    MEASURED_TPS,
    Answers,
    NoRates,
    Source,
    answer,
    break_even,
    command,
    compute_s,
    draw,
    load_s,
    prefill_speed,
    sources,
)
from tiermem.bench.models import MODELS, UnknownModel, model
from tiermem.bench.result import write

MIB = 1 << 20
LLAMA = MODELS["Llama-3.1-8B"]


@pytest.mark.parametrize(
    ("name", "block_mib"),
    [
        ("Llama-3.1-8B", 2.0),
        ("Llama-3.1-70B", 5.0),
        ("Qwen3-8B", 2.25),
        ("Qwen3-32B", 4.0),
        ("gpt-oss-20b", 0.375),
        ("DeepSeek-V3", 1.07),
    ],
)
def test_a_block_of_sixteen_tokens_has_the_bytes_that_vllm_shows(
    name: str, block_mib: float
) -> None:
    assert model(name).token_bytes() * 16 / MIB == pytest.approx(block_mib, abs=0.003)


def test_a_rank_of_four_holds_a_quarter_of_grouped_heads_and_all_of_a_latent() -> None:
    big, latent = MODELS["Llama-3.1-70B"], MODELS["DeepSeek-V3"]
    assert big.rank_bytes(16, 4) == 1.25 * MIB
    assert big.rank_bytes(16, 16) == big.prompt_bytes(16) / 8
    assert latent.rank_bytes(16, 4) == latent.prompt_bytes(16)


def test_window_layers_stop_growing_at_their_window() -> None:
    shape = MODELS["gpt-oss-20b"]
    assert shape.prompt_bytes(100) == 100 * 2 * shape.token_bytes()
    assert shape.prompt_bytes(1000) == (1000 + 128) * shape.token_bytes()


def test_the_time_to_compute_agrees_with_both_lengths_that_were_measured() -> None:
    assert compute_s(LLAMA, MEASURED_TPS, 4096) == pytest.approx(0.0902, rel=0.01)
    assert compute_s(LLAMA, MEASURED_TPS, 16384) == pytest.approx(0.469, rel=0.1)


def test_the_time_to_load_is_the_bytes_at_the_rate_after_the_fixed_time() -> None:
    source = Source("host", 55.0, 0.001, "made")
    assert load_s(LLAMA, source, 4096) == pytest.approx(0.001 + 4096 * 131072 / 55e9)


def test_at_the_break_even_loading_wins_and_one_token_below_it_does_not() -> None:
    for rate in (0.5, 2.0, 4.0, 8.0, 55.0):
        for shape in MODELS.values():
            source = Source("made", rate, 0.002, "made")
            speed = prefill_speed(shape)
            tokens = break_even(shape, source, speed)
            if tokens is None:
                continue
            assert load_s(shape, source, tokens) < compute_s(shape, speed, tokens)
            assert load_s(shape, source, tokens - 1) >= compute_s(shape, speed, tokens - 1)


def test_a_disk_that_is_too_slow_never_wins() -> None:
    assert break_even(LLAMA, Source("disk", 0.1, 0.0, "made"), MEASURED_TPS) is None


def test_a_faster_gpu_moves_the_break_even_up_and_a_faster_disk_moves_it_down() -> None:
    def at(rate: float, speed: float) -> int:
        tokens = break_even(LLAMA, Source("disk", rate, 0.001, "made"), speed)
        assert tokens is not None
        return tokens

    assert at(3.0, 50_000) > at(3.0, 45_000) > at(4.0, 45_000)


def test_sources_take_the_fastest_plain_row_and_the_disk_stands_in_for_a_missing_route() -> None:
    made = result(
        [
            row("host-gpu", "host", "gpu:0", [50.0], group=16),
            row("host-gpu", "host", "gpu:0", [54.0], group=64, page_us=(40.0, 60.0)),
            row("host-gpu", "host", "gpu:0", [92.0], direction="both"),
            row("nvme-host", "nvme", "host", [3.1], path="posix"),
        ]
    )
    host, disk = sources(made)
    assert (host.name, host.gbps) == ("host", 54.0)
    assert host.fixed_s == pytest.approx(40e-6)
    assert (disk.name, disk.gbps) == ("NVMe", 3.1)
    assert disk.measured.endswith("posix")
    direct = result([*made.rows, row("nvme-gpu", "nvme", "gpu:0", [2.8])])
    assert sources(direct)[1].gbps == 2.8


def test_a_speed_that_was_scaled_is_marked_as_an_estimate_and_a_given_one_is_not() -> None:
    given = (Source("host", 55.0, 0.0, "made"),)
    guessed = answer(["Llama-3.1-8B", "Qwen3-32B"], given).answers
    assert [found.estimated for found in guessed] == [False, True]
    assert not answer(["Qwen3-32B"], given, prefill_tps=9000).answers[0].estimated


def test_a_name_that_is_not_in_the_table_is_answered_with_the_table() -> None:
    assert model("qwen3-8b").name == "Qwen3-8B"
    with pytest.raises(UnknownModel, match="DeepSeek-V3"):
        model("GPT-5")


def runner() -> typer.Typer:
    app = typer.Typer()
    app.command()(command)
    return app


def test_the_command_answers_from_a_result_with_table_json_and_picture(tmp_path: Path) -> None:
    path, record, picture = tmp_path / "r.json", tmp_path / "b.json", tmp_path / "b.svg"
    rows = [
        row("host-gpu", "host", "gpu:0", [55.0]),
        row("nvme-gpu", "nvme", "gpu:0", [3.1], page_us=(700.0, 900.0)),
    ]
    write(result(rows), path)
    arguments = [str(path), "--json", str(record), "--svg", str(picture)]
    ran = CliRunner().invoke(runner(), arguments)
    assert ran.exit_code == 0, ran.output
    assert all(name in ran.output for name in MODELS)
    answers = msgspec.json.decode(record.read_bytes(), type=Answers)
    assert len(answers.answers) == 12
    said = " ".join(ElementTree.fromstring(picture.read_text()).itertext())
    assert "load from NVMe" in said
    assert "NVMe: " in said


def test_without_any_rate_the_command_says_how_to_get_one() -> None:
    ran = CliRunner().invoke(runner(), [])
    assert isinstance(ran.exception, NoRates)
    ran = CliRunner().invoke(runner(), ["--nvme-gbps", "7", "--model", "Qwen3-8B"])
    assert ran.exit_code == 0
    assert "given" in ran.output


def test_a_picture_without_a_crossing_has_no_mark() -> None:
    answers = answer(["Llama-3.1-8B"], (Source("disk", 0.1, 0.0, "made"),))
    assert "circle" not in draw(answers, "Llama-3.1-8B")


def test_rates_of_the_cpu_device_are_said_to_mean_nothing_for_a_gpu(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    for device, said in (("cpu", True), ("cuda", False)):
        write(result([row("host-gpu", "host", "gpu", [9.0])], device=device), path)
        ran = CliRunner().invoke(runner(), [str(path)])
        assert ("nothing about a GPU" in " ".join(ran.output.split())) == said


def test_a_ceiling_is_no_rate_to_load_at() -> None:
    rows = [
        row("nvme-gpu", "nvme", "gpu:0", [3.0]),
        msgspec.structs.replace(row("nvme-gpu", "nvme", "gpu:0", [8.0]), work="ceiling"),
    ]
    [source] = sources(result(rows))
    assert source.gbps == 3.0
