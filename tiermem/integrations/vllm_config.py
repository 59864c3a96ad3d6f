"""What TIERMEM=1 changes in an engine's configuration, and what it leaves as the user set it."""

from __future__ import annotations

import functools
import logging
import os
from collections import Counter
from collections.abc import Callable
from typing import Any

from tiermem import drive, units
from tiermem.config import Capacities, Config, load
from tiermem.errors import ConfigError

log = logging.getLogger(__name__)

CONNECTOR = "TiermemConnector"
TOGETHER = "MultiConnector"  # vLLM's, of ours and another
MODULE = "tiermem.integrations.vllm"
OURS = {
    "kv_connector": CONNECTOR,
    "kv_connector_module_path": MODULE,
    # As a consumer vLLM keeps freed blocks back until running steps have ended.
    "kv_role": "kv_consumer",
}
CUDA_PAGE = 2 << 20
GOOD_PAGE = 8 << 20
"""A page of so many bytes crosses the link in 150 us; hiding one and showing another takes the
driver 53 beside that, and with 2 MiB pages that is what bounds a load: 1,024 of them took 66 ms,
256 of 8 MiB 41 ms (H200, 2026-11)."""
FULL_PAGES = 64
"""So many blocks are whole pages of 4 KiB, if the bytes of one are a multiple of 64."""
LARGEST_BLOCK = 128
"""Tokens of a block at most where we choose: a prefix is found again by whole blocks."""


def inject_into(engine_args: Any) -> None:
    """Wrap `EngineArgs.create_engine_config`, once in a process."""
    if not hasattr(engine_args.create_engine_config, "__wrapped__"):
        engine_args.create_engine_config = _injecting(engine_args.create_engine_config)


def _injecting(create: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(create)
    def create_engine_config(args: Any, *rest: Any, **more: Any) -> Any:
        config = load()
        prepare(args, config)
        made = create(args, *rest, **more)
        complete(made, config)
        return made

    return create_engine_config


def prepare(args: Any, config: Config) -> None:
    """Change engine arguments before vLLM looks at them. Raises ConfigError for what cannot be."""
    if getattr(args, "enable_sleep_mode", False):
        raise ConfigError(
            "tiermem: --enable-sleep-mode gives the KV cache to vLLM's own allocator; leave it "
            "out (`tiermem release` puts an engine to sleep), or set TIERMEM=0"
        )
    if args.enable_prefix_caching is False:
        raise ConfigError(
            "tiermem: without prefix caching nothing would ever come back from a lower tier; "
            "leave --no-enable-prefix-caching out, or set TIERMEM=0"
        )
    args.enable_prefix_caching = True
    if args.block_size is None:
        args.block_size = good_block_size(args)
    args.kv_transfer_config = with_ours(args.kv_transfer_config)
    if config.share.host is not None or (config.nvme.enabled and config.nvme.persist):
        # Before 0.32 block hashes of two runs agree only under a seed.
        os.environ.setdefault("PYTHONHASHSEED", "0")


def with_ours(given: Any) -> Any:
    """The user's transfer configuration with our connector in it, first of several."""
    from vllm.config import KVTransferConfig

    if given is None:
        return KVTransferConfig(**OURS, kv_load_failure_policy="recompute")
    if isinstance(given, dict):
        given = KVTransferConfig(**given)
    if given.kv_connector == CONNECTOR:
        return given
    if given.kv_connector == TOGETHER:
        several = list(given.kv_connector_extra_config.get("connectors", ()))
        if any(one.get("kv_connector") == CONNECTOR for one in several):
            return given
    else:
        several = [
            {
                "kv_connector": given.kv_connector,
                "kv_role": given.kv_role,
                "kv_connector_module_path": given.kv_connector_module_path,
                "kv_connector_extra_config": given.kv_connector_extra_config,
            }
        ]
    return KVTransferConfig(
        kv_connector=TOGETHER,
        kv_role=given.kv_role,
        engine_id=given.engine_id,
        kv_connector_extra_config={"connectors": [OURS, *several]},
        kv_load_failure_policy="recompute",
    )


def complete(vllm_config: Any, config: Config) -> None:
    """Set the virtual pool of blocks, unless the user has: what all tiers hold."""
    parallel = vllm_config.parallel_config
    ranks = parallel.world_size
    if config.share.enabled and (ranks > 1 or parallel.distributed_executor_backend != "uni"):
        raise ConfigError(
            f"tiermem: [share] with {ranks} ranks by the {parallel.distributed_executor_backend!r} "
            "executor: a lease is followed by one rank in its scheduler's process; leave [share] "
            "out, or use one rank (on a CPU with VLLM_ENABLE_V1_MULTIPROCESSING=0)"
        )
    cache = vllm_config.cache_config
    if not getattr(cache, "enable_prefix_caching", True):
        raise ConfigError(
            "tiermem: vLLM has turned prefix caching off for this model on this platform (MLA on a "
            "CPU without AMX, say), and without it nothing would ever come back from a lower "
            "tier; set TIERMEM=0"
        )
    if cache.num_gpu_blocks_override is not None:
        return
    block = block_bytes(vllm_config)
    held = capacities(config, ranks)
    pool = config.share.host
    host = min(held.host, pool) if isinstance(pool, int) else held.host
    budget = config.gpu.budget if isinstance(config.gpu.budget, int) else 0
    fixed = getattr(cache, "kv_cache_memory_bytes", None)
    blocks = (int(fixed or budget) + host + held.nvme) // block
    if host + held.nvme < block:
        log.warning("vllm tiers=gpu only: host.capacity and nvme hold no block of %d bytes", block)
        return
    log.info(
        "vllm blocks=%d of %s: host=%s nvme=%s a rank",
        blocks,
        units.format_bytes(block),
        units.format_bytes(host),
        units.format_bytes(held.nvme),
    )
    # Where a layer's blocks follow the last one's, each layer then begins on a page.
    cache.num_gpu_blocks_override = max(2, blocks // FULL_PAGES * FULL_PAGES or blocks)


def good_block_size(args: Any) -> int | None:
    """Tokens of a block that is whole pages, of GOOD_PAGE if it can be; None leaves it to vLLM.

    Only for plain attention on CUDA, where any multiple of 16 tokens will do.
    """
    from vllm.platforms import current_platform

    wanted = args.attention_backend or getattr(args.attention_config, "backend", None)
    if not current_platform.is_cuda() or "FLASHINFER" in str(wanted).upper():
        return None
    model = args.create_model_config()
    if model.use_mla or model.is_hybrid or model.get_sliding_window() is not None:
        return None
    token = token_bytes(model, args.kv_cache_dtype, args.tensor_parallel_size)
    whole = [n for n in range(16, LARGEST_BLOCK + 1, 16) if n * token % CUDA_PAGE == 0]
    good = [n for n in whole if n * token >= GOOD_PAGE] or whole[-1:]
    if good:
        log.info("vllm block_size=%d: %s", good[0], units.format_bytes(good[0] * token))
    return good[0] if good else None


def token_bytes(model: Any, cache_dtype: str, tensor_parallel: int) -> int:
    """Bytes that one token takes on one rank, all layers."""
    from vllm.utils.torch_utils import kv_cache_dtype_str_to_dtype

    itemsize = kv_cache_dtype_str_to_dtype(cache_dtype, model).itemsize
    heads = max(1, model.get_total_num_kv_heads() // tensor_parallel)
    copies = 1 if model.use_mla else 2
    layers = model.get_total_num_hidden_layers()
    return int(copies * layers * heads * model.get_head_size() * itemsize)


def block_bytes(vllm_config: Any) -> int:
    """Bytes of one block on one rank, of all layers whose block table it may stand in."""
    cache, parallel = vllm_config.cache_config, vllm_config.parallel_config
    model = vllm_config.model_config
    token = token_bytes(model, cache.cache_dtype, parallel.tensor_parallel_size)
    layers = int(model.get_total_num_hidden_layers())
    block = token * int(cache.block_size or 16) * layers_of_a_table(vllm_config) // layers
    return block // int(parallel.pipeline_parallel_size)


def layers_of_a_table(vllm_config: Any) -> int:
    """Layers that share a block table: all, but for windows beside full attention.

    Of those vLLM makes tables of as many layers as the rarer kind has, or of the more frequent
    one if it has less than half as many again (`_get_kv_cache_groups_uniform_page_size`).
    """
    model = vllm_config.model_config
    layers = int(model.get_total_num_hidden_layers())
    scheduler = getattr(vllm_config, "scheduler_config", None)
    if getattr(scheduler, "disable_hybrid_kv_cache_manager", True):
        return layers
    text = getattr(model, "hf_text_config", None)
    kinds = Counter(getattr(text, "layer_types", None) or ())
    if set(kinds) != {"full_attention", "sliding_attention"}:
        return layers
    few, many = sorted(kinds.values())
    return many if many < 1.5 * few else few


def capacities(config: Config, ranks: int) -> Capacities:
    """Bytes of host and drive that one of so many ranks has. Looks at no GPU."""
    from tiermem.host import limits

    found = divided(config, ranks).resolve(
        page_bytes=CUDA_PAGE,
        gpu_total=1 << 50,
        host_total=limits.available_bytes(),
        nvme_total=drive.room(config) if config.nvme.enabled else 0,
    )
    return found


def divided(config: Config, ranks: int) -> Config:
    """The configuration of one of several ranks: host memory and drive are the engine's."""
    import msgspec

    if ranks == 1:
        return config

    def part(size: int | float) -> int | float:
        return size // ranks if isinstance(size, int) else size / ranks

    replace = msgspec.structs.replace
    nvme = config.nvme
    if nvme.enabled:
        nvme = replace(nvme, capacity=part(nvme.capacity))
    return replace(
        config, host=replace(config.host, capacity=part(config.host.capacity)), nvme=nvme
    )
