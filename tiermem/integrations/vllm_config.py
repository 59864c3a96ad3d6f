"""What TIERMEM=1 changes in an engine's configuration, and what it leaves as the user set it."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable
from typing import Any

from tiermem import drive, units
from tiermem.config import Capacities, Config, load
from tiermem.errors import ConfigError

log = logging.getLogger(__name__)

CONNECTOR = "TiermemConnector"
MODULE = "tiermem.integrations.vllm"
OURS = {
    "kv_connector": CONNECTOR,
    "kv_connector_module_path": MODULE,
    # As a consumer vLLM keeps freed blocks back until running steps have ended.
    "kv_role": "kv_consumer",
}
CUDA_PAGE = 2 << 20
LARGEST_BLOCK = 256
"""Tokens: what a block is made larger for, so that it is whole pages, at most."""


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
    if config.share.host is not None:
        raise ConfigError(
            "tiermem: share.host is not supported in vLLM, where each engine has host.capacity of "
            "its own; leave share.host out"
        )
    args.kv_transfer_config = with_ours(args.kv_transfer_config)
    if config.nvme.enabled and config.nvme.persist:
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
    if given.kv_connector == "MultiConnector":
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
        kv_connector="MultiConnector",
        kv_role=given.kv_role,
        engine_id=given.engine_id,
        kv_connector_extra_config={"connectors": [OURS, *several]},
        kv_load_failure_policy="recompute",
    )


def complete(vllm_config: Any, config: Config) -> None:
    """Set the virtual pool of blocks, unless the user has: what all tiers hold."""
    ranks = vllm_config.parallel_config.world_size
    if config.share.enabled and ranks > 1:
        raise ConfigError(
            f"tiermem: [share] with {ranks} ranks: each GPU has a ledger of its own, and all ranks "
            "must hold the same; leave [share] out, or run with one rank"
        )
    cache = vllm_config.cache_config
    if cache.num_gpu_blocks_override is not None:
        return
    block = block_bytes(vllm_config)
    held = capacities(config, ranks)
    budget = config.gpu.budget if isinstance(config.gpu.budget, int) else 0
    fixed = getattr(cache, "kv_cache_memory_bytes", None)
    blocks = (int(fixed or budget) + held.host + held.nvme) // block
    if held.host + held.nvme < block:
        log.warning("vllm tiers=gpu only: host.capacity and nvme hold no block of %d bytes", block)
        return
    log.info(
        "vllm blocks=%d of %s: host=%s nvme=%s a rank",
        blocks,
        units.format_bytes(block),
        units.format_bytes(held.host),
        units.format_bytes(held.nvme),
    )
    cache.num_gpu_blocks_override = max(2, blocks)


def block_bytes(vllm_config: Any) -> int:
    """Bytes of one block on one rank, all layers."""
    model, cache, parallel = (
        vllm_config.model_config,
        vllm_config.cache_config,
        vllm_config.parallel_config,
    )
    from vllm.utils.torch_utils import kv_cache_dtype_str_to_dtype

    itemsize = kv_cache_dtype_str_to_dtype(cache.cache_dtype, model).itemsize
    heads = model.get_num_kv_heads(parallel)
    copies = 1 if model.use_mla else 2
    layers = model.get_num_layers(parallel)
    tokens = int(cache.block_size or 16)
    return int(copies * layers * heads * model.get_head_size() * itemsize * tokens)


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
