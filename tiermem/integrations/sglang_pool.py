"""From SGLang's own description of its KV pool to an open engine; what cannot work is refused."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tiermem.config import Config, load
from tiermem.errors import ConfigError
from tiermem.integrations import sglang_compat as compat
from tiermem.integrations.sglang_engine import Agree, Engine, Identity, alone
from tiermem.integrations.sglang_layout import PageMajor, choose, fitting_page_size
from tiermem.integrations.sglang_sizes import Sizes, plan, rank_config
from tiermem.sections import CUDA_PAGE, SMALLEST_PAGE

_MUST_BE_OFF = {
    "enable_hierarchical_cache": "HiCache copies KV by itself; use tiermem's tiers, or its storage "
    "backend under HiCache with TIERMEM=0 (docs/sglang.md)",
    "enable_lmcache": "LMCache replaces the tree",
    "enable_flexkv": "FlexKV replaces the tree",
    "enable_memory_saver": "the memory saver frees the KV cache by itself",
    "enable_dp_attention": "data-parallel attention is not supported yet",
    "enable_unified_memory": "its pool is not an ordinary one",
    "enable_page_major_kv_layout": "its kernels know another layout",
    "enable_hisparse": "it has tiers of its own",
    "enable_pdmux": "two batches run at once",
}


def refuse(configurator: Any) -> None:
    """Raise ConfigError if this engine cannot run over tiermem, with the reason."""
    args = configurator.server_args
    for name, reason in _MUST_BE_OFF.items():
        if getattr(args, name, False):
            raise ConfigError(f"sglang: --{name.replace('_', '-')} is on: {reason}")
    if configurator.is_hybrid_swa:
        raise ConfigError(
            "sglang: this model has sliding-window layers, whose pool is split in two; start with "
            "--disable-hybrid-swa-memory to keep all layers in one, or TIERMEM=0"
        )
    if configurator.mambaish_config is not None:
        raise ConfigError("sglang: this model keeps a state beside its KV cache (Mamba, linear)")
    if configurator.is_draft_worker or not configurator.spec_algorithm.is_none():
        raise ConfigError("sglang: speculative decoding has a second pool; one pool is supported")
    if configurator.post_capture_kv_active:
        raise ConfigError("sglang: SGLANG_ENABLE_POST_CAPTURE_KV_SIZING makes its own memory")
    if args.disaggregation_mode != "null" or args.pp_size > 1 or getattr(args, "dcp_size", 1) > 1:
        raise ConfigError("sglang: disaggregation, pipeline and context parallelism: not supported")
    if configurator.page_size == 1:
        raise ConfigError("sglang: --page-size is 1; a page must be larger, such as 16")


@dataclass(frozen=True, slots=True)
class Plan:
    """What will be opened once SGLang makes its buffers."""

    config: Config
    layout: PageMajor
    sizes: Sizes
    identity: Identity
    step_tokens: int

    @classmethod
    def of(cls, configurator: Any, stock_bytes: int) -> Plan:
        """stock_bytes: what SGLang found free for its KV cache."""
        refuse(configurator)
        on_cpu = str(configurator.device).startswith("cpu")
        device = "cpu" if on_cpu else f"cuda:{configurator.gpu_id}"
        layout = _layout(configurator, SMALLEST_PAGE if on_cpu else CUDA_PAGE)
        args = configurator.server_args
        ranks = max(1, args.tp_size // max(1, args.nnodes))
        config = rank_config(load(), layout.page_bytes, device, ranks, compat.tp_rank())
        identity = _identity(configurator, layout)
        sizes = plan(config, layout.page_bytes, stock_bytes, _agreement())
        return cls(config, layout, sizes, identity, _step_tokens(args))

    @property
    def pool_bytes(self) -> int:
        """What makes SGLang come to `sizes.virtual` pages: it knows of no padding."""
        layout = self.layout
        return self.sizes.virtual * layout.parts * layout.block_bytes

    def refuse_unlike(self, pool: Any, row_shape: tuple[int, int]) -> None:
        """Raise ConfigError if the pool that is made is not the one that was planned."""
        layout = self.layout
        row_bytes = row_shape[0] * row_shape[1] * pool.store_dtype.itemsize
        parts = layout.parts // (2 if hasattr(pool, "v_head_dim") else 1)
        found = (pool.layer_num, pool.page_size, row_bytes)
        if found != (parts, layout.page_size, layout.row_bytes):
            raise ConfigError(
                f"sglang: a pool of {found} (layers, page size, bytes a row) is made, "
                f"{(parts, layout.page_size, layout.row_bytes)} was expected"
            )

    def open(self, pages: int) -> Engine:
        return Engine(self.config, self.layout, self.sizes, self.identity, pages, self.step_tokens)


def _step_tokens(args: Any) -> int:
    """Tokens that SGLang computes in one step at most."""
    chunk = args.chunked_prefill_size
    return int(chunk if chunk and chunk > 0 else args.max_prefill_tokens)


def _layout(configurator: Any, granule: int) -> PageMajor:
    args, layers = configurator.server_args, configurator.layer_info.num_effective_layers
    if configurator.kv_cache_dtype_str in ("fp4_e2m1", "mxfp8", "nvfp4", "fp4_mx_block16"):
        raise ConfigError(f"sglang: --kv-cache-dtype {configurator.kv_cache_dtype_str} has scales")
    mla = configurator.use_mla_backend
    row = _row(configurator.model_config, args.tp_size, mla)
    return choose(
        parts=layers if mla else 2 * layers,
        row_bytes=row * configurator.kv_cache_dtype.itemsize,
        page_size=configurator.page_size,
        granule=granule,
    )


def _row(model: Any, tp_size: int, mla: bool) -> int:
    """Numbers that one token has in one part of a layer on each rank."""
    if mla:
        return int(model.kv_lora_rank + model.qk_rope_head_dim)
    return int(model.get_num_kv_heads(tp_size) * model.head_dim)


LEAST_PAGE = 16
GOOD_PAGE_BYTES = 8 << 20
"""Showing a page costs 33 us whatever its size (H200, 2026-11): 8 MiB take 150 us to copy, so the
calls are hidden behind the copies, which they are not at 2 MiB."""
_ITEM = {"fp8_e5m2": 1, "fp8_e4m3": 1, "bf16": 2, "bfloat16": 2}


def page_size_for(args: Any) -> int:
    """The page size that is taken where the user gives none: the smallest that wastes little.

    args: SGLang's arguments while they are resolved. Raises ConfigError if none does.
    """
    model = compat.model_of(args)
    mla = str(getattr(model.attention_arch, "name", "")) == "MLA"
    layers = model.num_hidden_layers
    row = _row(model, args.tp_size, mla) * _ITEM.get(args.kv_cache_dtype, model.dtype.itemsize)
    on_cpu = args.device == "cpu"
    granule = SMALLEST_PAGE if on_cpu else CUDA_PAGE
    parts = layers if mla else 2 * layers
    size = fitting_page_size(
        parts=parts, row_bytes=row, least=LEAST_PAGE, granule=granule,
        least_bytes=0 if on_cpu else GOOD_PAGE_BYTES,
    )  # fmt: skip
    if size is None:
        raise ConfigError(
            f"sglang: no page size makes pages of {parts} x {row} bytes a token whole pieces of "
            f"{granule} bytes; set TIERMEM=0 to serve without tiermem"
        )
    return size


def _identity(configurator: Any, layout: PageMajor) -> Identity:
    """Everything that a page's bytes depend on beside its tokens."""
    args = configurator.server_args
    rank = compat.tp_rank()
    fingerprint = {
        **compat.model_facts(args),
        "engine": "sglang",
        "dtype": f"{configurator.model_dtype} {configurator.kv_cache_dtype}",
        "layout": f"{layout.parts}x{layout.row_bytes} {layout.page_size} {layout.stride}",
        "rank": f"{rank} of {args.tp_size}",
    }
    return Identity(f"sglang-rank{rank}of{args.tp_size}", fingerprint)


def _agreement() -> Agree:
    from sglang.srt.distributed.parallel_state import get_world_group

    group = get_world_group()
    return alone if group.world_size == 1 else compat.least_over(group.cpu_group)
