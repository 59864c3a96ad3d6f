"""TIERMEM=1 in vLLM without vLLM: what is refused, what is changed, and what stays as it was."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from tiermem.config import Config, Gpu, Host, Nvme
from tiermem.errors import ConfigError
from tiermem.integrations import plugin, vllm_config, vllm_seams


@dataclass
class KVTransferConfig:
    """The fields of vllm.config.KVTransferConfig that are used."""

    kv_connector: str | None = None
    kv_role: str | None = None
    kv_connector_module_path: str | None = None
    kv_connector_extra_config: dict[str, Any] = field(default_factory=dict)
    engine_id: str | None = None
    kv_load_failure_policy: str = "fail"


@pytest.fixture(autouse=True)
def vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    config, torch_utils = ModuleType("vllm.config"), ModuleType("vllm.utils.torch_utils")
    setattr(config, "KVTransferConfig", KVTransferConfig)  # noqa: B010
    sizes = {"auto": 2, "fp8": 1}
    size_of = lambda name, model: SimpleNamespace(itemsize=sizes[name])  # noqa: E731
    setattr(torch_utils, "kv_cache_dtype_str_to_dtype", size_of)  # noqa: B010
    for name in ("vllm", "vllm.utils"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "vllm.config", config)
    monkeypatch.setitem(sys.modules, "vllm.utils.torch_utils", torch_utils)


def arguments(**given: Any) -> SimpleNamespace:
    return SimpleNamespace(  # a block size that is set is kept
        **{"enable_prefix_caching": None, "kv_transfer_config": None, "block_size": 16} | given
    )


# ---------------------------------------------------------------- engine arguments


def test_sleep_mode_is_refused_with_the_way_out() -> None:
    with pytest.raises(ConfigError, match=r"enable-sleep-mode .* TIERMEM=0"):
        vllm_config.prepare(arguments(enable_sleep_mode=True), Config())


def test_an_engine_without_prefix_caching_is_refused() -> None:
    with pytest.raises(ConfigError, match="no-enable-prefix-caching"):
        vllm_config.prepare(arguments(enable_prefix_caching=False), Config())


def test_prefix_caching_is_turned_on_where_it_was_left_open() -> None:
    args = arguments()
    vllm_config.prepare(args, Config())
    assert args.enable_prefix_caching is True
    assert args.kv_transfer_config.kv_connector == "TiermemConnector"


def test_an_engine_without_other_connectors_gets_ours_alone() -> None:
    made = vllm_config.with_ours(None)
    assert (made.kv_connector, made.kv_role) == ("TiermemConnector", "kv_consumer")
    assert made.kv_connector_module_path == "tiermem.integrations.vllm"
    assert made.kv_load_failure_policy == "recompute"


def test_another_connector_stays_behind_ours_with_all_that_was_set() -> None:
    extra = {"shared_storage_path": "/mnt/kv"}
    given = {
        "kv_connector": "ExampleConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": extra,
        "engine_id": "e7",
    }
    made = vllm_config.with_ours(given)
    assert (made.kv_connector, made.kv_role, made.engine_id) == ("MultiConnector", "kv_both", "e7")
    first, second = made.kv_connector_extra_config["connectors"]
    assert first["kv_connector"] == "TiermemConnector"
    assert (second["kv_connector"], second["kv_role"]) == ("ExampleConnector", "kv_both")
    assert second["kv_connector_extra_config"] == extra


def test_several_connectors_stay_in_their_order_behind_ours() -> None:
    several = [{"kv_connector": "A"}, {"kv_connector": "B"}]
    given = KVTransferConfig("MultiConnector", "kv_both", None, {"connectors": several})
    names = [
        one["kv_connector"]
        for one in vllm_config.with_ours(given).kv_connector_extra_config["connectors"]
    ]
    assert names == ["TiermemConnector", "A", "B"]
    assert several == [{"kv_connector": "A"}, {"kv_connector": "B"}], "the user's list is his"


@pytest.mark.parametrize(
    "given",
    [
        KVTransferConfig("TiermemConnector", "kv_both"),
        KVTransferConfig(
            "MultiConnector", None, None, {"connectors": [{"kv_connector": "TiermemConnector"}]}
        ),
    ],
)
def test_ours_where_the_user_put_it_is_left_alone(given: KVTransferConfig) -> None:
    assert vllm_config.with_ours(given) is given


# ---------------------------------------------------------------- sizes


def engine(**cache: Any) -> SimpleNamespace:
    model = SimpleNamespace(
        use_mla=False,
        get_total_num_kv_heads=lambda: 8,
        get_total_num_hidden_layers=lambda: 32,
        get_head_size=lambda: 128,
    )
    return SimpleNamespace(
        model_config=model,
        cache_config=SimpleNamespace(
            **{"cache_dtype": "auto", "block_size": 16, "num_gpu_blocks_override": None} | cache
        ),
        parallel_config=SimpleNamespace(
            world_size=1, tensor_parallel_size=1, pipeline_parallel_size=1
        ),
    )


def test_a_block_has_keys_and_values_of_all_layers_of_one_rank() -> None:
    made = engine()
    assert vllm_config.block_bytes(made) == 2 << 20  # Llama-3.1-8B
    made.parallel_config.tensor_parallel_size = 4
    assert vllm_config.block_bytes(made) == 512 << 10
    assert vllm_config.block_bytes(engine(cache_dtype="fp8", block_size=32)) == 2 << 20


def test_mla_keeps_one_copy() -> None:
    made = engine()
    made.model_config.use_mla = True
    assert vllm_config.block_bytes(made) == 1 << 20


@pytest.mark.parametrize(
    ("kinds", "layers"), [((10, 52), 10), ((12, 13), 13), ((16, 16), 16)], ids=str
)
def test_a_block_of_a_hybrid_model_has_the_layers_of_one_table(
    kinds: tuple[int, int], layers: int
) -> None:
    full, windows = kinds
    made = engine()
    types = ["full_attention"] * full + ["sliding_attention"] * windows
    made.model_config.get_total_num_hidden_layers = lambda: full + windows
    made.model_config.hf_text_config = SimpleNamespace(layer_types=types)
    one_layer = vllm_config.block_bytes(made) // (full + windows)
    made.scheduler_config = SimpleNamespace(disable_hybrid_kv_cache_manager=False)
    assert vllm_config.block_bytes(made) == layers * one_layer
    made.scheduler_config.disable_hybrid_kv_cache_manager = True
    assert vllm_config.block_bytes(made) == (full + windows) * one_layer


def test_prefix_caching_that_vllm_turns_off_by_itself_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"MLA on a CPU.*TIERMEM=0"):
        vllm_config.complete(engine(enable_prefix_caching=False), Config())


def test_layers_of_the_virtual_pool_begin_on_a_page() -> None:
    made = engine(kv_cache_memory_bytes=(1 << 30) + (6 << 20))
    vllm_config.complete(made, Config(gpu=Gpu(device="cpu"), host=Host(capacity="1GiB")))
    assert made.cache_config.num_gpu_blocks_override == 1024


def test_ranks_share_host_memory_and_drive() -> None:
    given = Config(host=Host(capacity="8GiB"), nvme=Nvme(path="/mnt/x", capacity=0.5))
    mine = vllm_config.divided(given, 4)
    assert (mine.host.capacity, mine.nvme.capacity) == (2 << 30, 0.125)
    assert vllm_config.divided(given, 1) is given


def test_the_virtual_pool_holds_what_all_tiers_hold() -> None:
    made = engine(kv_cache_memory_bytes=1 << 30)
    vllm_config.complete(made, Config(gpu=Gpu(device="cpu"), host=Host(capacity="1GiB")))
    assert made.cache_config.num_gpu_blocks_override == 1024


def test_a_number_of_blocks_that_the_user_set_is_kept() -> None:
    made = engine(num_gpu_blocks_override=77)
    vllm_config.complete(made, Config(host=Host(capacity="1GiB")))
    assert made.cache_config.num_gpu_blocks_override == 77


# ---------------------------------------------------------------- releases and seams


@pytest.mark.parametrize(
    ("version", "release"), [("0.27.1", (0, 27)), ("0.33.0rc2", (0, 33)), ("0.32.0+cpu", (0, 32))]
)
def test_supported_releases_are_known(version: str, release: tuple[int, int]) -> None:
    assert vllm_seams.release_of(version) == release


@pytest.mark.parametrize("version", ["0.26.3", "0.34.0", "1.0.0", "main"])
def test_other_releases_are_refused_with_what_is_supported(version: str) -> None:
    with pytest.raises(vllm_seams.Unsupported, match=r"0\.27 to 0\.33.*TIERMEM=0"):
        vllm_seams.release_of(version)


def test_a_release_that_lacks_a_seam_is_refused_by_the_name_of_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(vllm_seams, "installed", lambda: (0, 32))
    with pytest.raises(vllm_seams.Unsupported, match=r"BlockPool\.get_num_free_blocks"):
        vllm_seams.refuse_unsupported()


def test_without_the_variable_nothing_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> tuple[int, int]:
        raise AssertionError("TIERMEM is off")

    monkeypatch.setattr(vllm_seams, "installed", fail)
    monkeypatch.setenv("TIERMEM", "0")
    plugin.activate()


def test_the_plugin_raises_where_vllm_cannot_be_supported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_seams, "installed", lambda: vllm_seams.release_of("0.34.0"))
    monkeypatch.setenv("TIERMEM", "1")
    with pytest.raises(vllm_seams.Unsupported):
        plugin.activate()


def test_engine_arguments_are_wrapped_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made = engine(num_gpu_blocks_override=9)
    calls: list[Any] = []

    class EngineArgs(SimpleNamespace):
        def create_engine_config(self, usage: str) -> SimpleNamespace:
            calls.append((usage, self.enable_prefix_caching))
            return made

    monkeypatch.setattr(vllm_config, "load", Config)
    vllm_config.inject_into(EngineArgs)
    wrapped = EngineArgs.create_engine_config
    vllm_config.inject_into(EngineArgs)
    assert EngineArgs.create_engine_config is wrapped
    assert EngineArgs(**vars(arguments())).create_engine_config("cli") is made
    assert calls == [("cli", True)]
