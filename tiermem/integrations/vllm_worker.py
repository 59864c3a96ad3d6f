"""The worker's side of the vLLM connector: the KV cache's addresses, and a `Rank` behind them."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from torch.overrides import TorchFunctionMode

from tiermem import units
from tiermem.assemble import assemble
from tiermem.config import Config, load
from tiermem.directed.orders import Hello, Orders, Report
from tiermem.directed.rank import Rank
from tiermem.errors import ConfigError
from tiermem.gpu.tensor import tensor
from tiermem.integrations.layout import Layout, Run, automatic_page, layout_of, runs_of
from tiermem.integrations.threads import switch_sooner
from tiermem.integrations.vllm_config import CUDA_PAGE, TOGETHER, divided
from tiermem.leases import Leases
from tiermem.nvme.kept import Persist
from tiermem.peers import Peers

log = logging.getLogger(__name__)

RANKS: dict[str, Rank] = {}
"""Ranks of this process by engine id: a scheduler in the same process hears them at once."""

GRAPHS = 0.015
"""Part of the GPU left for what is allocated after the KV cache, CUDA graphs above all, where
vLLM's own estimate cannot be had."""


class RankSide:
    """What the connector does in a worker."""

    def __init__(self, vllm_config: Any, kv_cache_config: Any) -> None:
        """Open the device and the tiers, and reserve the cache's range. Raises ConfigError."""
        switch_sooner()
        self._vllm = vllm_config
        self._blocks: int = kv_cache_config.num_blocks
        self._engine_id: str = vllm_config.kv_transfer_config.engine_id
        self._sizes = sizes_of(kv_cache_config)
        self._device = torch.device(vllm_config.device_config.device_type)
        self._is_cuda = self._device.type == "cuda"
        if self._is_cuda:
            self._device = torch.device("cuda", torch.cuda.current_device())
        parallel = vllm_config.parallel_config
        mine = divided(load(), parallel.world_size)
        config = self._configured(mine, strides_of(kv_cache_config, self._blocks))
        name, number = rank_name(vllm_config), int(getattr(parallel, "rank", 0))
        self._leases = Leases.open(config)
        persist = Persist(name, fingerprint(vllm_config))
        try:
            self._parts = assemble(config, self._leases.first_gpu, persist, self._leases.pooling)
        except BaseException:
            self._leases.close()
            raise
        self._number = number
        self._persist = config.nvme.enabled and config.nvme.persist
        page = self._parts.device.page_bytes
        self._nbytes = sum(-(-size // page) * page for size in self._sizes) + 64 * page
        self._base = self._parts.device.reserve(self._nbytes)
        self._given = 0
        self._mode: _Answer | None = None
        self._rank: Rank | None = None
        self._report: Report | None = None
        self._failed: set[int] = set()
        self._step = 0
        if not has_memory_hook():
            self._mode = _Answer(self._answer)
            self._mode.__enter__()  # type: ignore[no-untyped-call]

    # ---------------------------------------------------------------- memory

    def memory(self) -> AbstractContextManager[None]:
        """While this is open, the KV cache's torch.zeros is answered with our range."""

        @contextmanager
        def answering() -> Iterator[None]:
            with _Answer(self._answer):
                yield

        return answering()

    def register(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """The cache's tensors are made: where blocks lie, and the first of them are shown.

        Raises ConfigError unless every tensor lies in our range.
        """
        try:
            self._register(kv_caches)
        except BaseException:
            self.close()
            raise

    def _register(self, kv_caches: dict[str, torch.Tensor]) -> None:
        if self._mode is not None:
            self._mode.__exit__(None, None, None)  # type: ignore[no-untyped-call]
            self._mode = None
        outside = [
            name
            for name, one in kv_caches.items()
            if not self._base <= one.data_ptr() < self._base + self._nbytes
        ]
        if outside or not kv_caches:
            raise ConfigError(
                f"tiermem: {len(outside)} of {len(kv_caches)} KV tensors are not in its range "
                f"(first: {outside[:1]}); this vLLM allocates its cache in a way that is not "
                "supported, unset TIERMEM"
            )
        self.layout = self._layout(kv_caches)
        self._arranged = arrangement(kv_caches, self._blocks)
        if self.layout.nbytes > self._nbytes:
            raise ConfigError(
                f"tiermem: blocks reach {self.layout.nbytes} bytes, {self._nbytes} are reserved"
            )
        addresses = partial(self.layout.addresses, self._base)
        self._rank = Rank(
            self._number,
            self._parts,
            addresses,
            persist=self._persist,
            leases=self._leases,
            peers=self._open_peers(),
            kernels_only=queues_kernels_only(self._vllm),
        )
        RANKS[self._engine_id] = self._rank
        self.hello: Hello = self._rank.start(self.layout.units * self.layout.unit_pages)
        log.info(
            "vllm rank=%d blocks=%d unit=%s frames=%d page=%s",
            self._number,
            self._blocks,
            units.format_bytes(self.layout.unit_bytes),
            self.hello.capacities[1],  # type: ignore[index]
            units.format_bytes(self.layout.page_bytes),
        )

    # ---------------------------------------------------------------- steps

    def carry(self, orders: Orders) -> None:
        self._step = orders.step
        self.rank.carry(orders, self._stream())

    def mark(self) -> None:
        self.rank.mark(self._step, self._stream())
        self.rank.turns.end()

    def received(self) -> set[str]:
        """Requests whose content has come, or failed to; the report goes with the same output."""
        with self.rank.turns.lock:
            self._keep(self.rank.report())
            done, rows = self.rank.received()
        if not len(rows):
            return done
        failed = np.unique(rows // self.layout.unit_pages).astype(np.int32)
        self._failed.update(self.layout.blocks_of(failed).tolist())
        return done

    def take_failed_blocks(self) -> set[int]:
        failed, self._failed = self._failed, set()
        return failed

    def take_report(self) -> Report | None:
        report, self._report = self._report, None
        return report

    @property
    def rank(self) -> Rank:
        assert self._rank is not None, "the KV caches are registered first"
        return self._rank

    def close(self) -> None:
        RANKS.pop(self._engine_id, None)
        if self._rank is not None:
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
            self._rank.close()
            return
        self._parts.close()
        self._leases.close()

    # ---------------------------------------------------------------- parts

    def _open_peers(self) -> Peers | None:
        """Content is shared with engines in which the same blocks would have the same bytes."""
        if self._leases.pooling is None or self.layout.blocks_per_unit > 1:
            return None
        layout = [self.layout.stride, len(self.layout.offsets), self.layout.page_bytes]
        scope = json.dumps([fingerprint(self._vllm), layout, self._arranged], sort_keys=True)
        return Peers.open(self._parts, self._leases.pooling, scope.encode())

    def _keep(self, report: Report) -> None:
        assert self._report is None, "the last report was not taken"
        self._report = report

    def _stream(self) -> int | None:
        if not self._is_cuda:
            return None
        return int(torch.cuda.current_stream(self._device).cuda_stream)

    def _answer(self, nbytes: int) -> torch.Tensor | None:
        """A tensor over the next part of the range, if so many bytes are what the cache takes."""
        if nbytes not in self._sizes:
            return None
        offset = self._given
        page = self._parts.device.page_bytes
        self._given += -(-nbytes // page) * page
        if self._given > self._nbytes:
            return None
        return tensor(self._base + offset, nbytes, torch.int8, (nbytes,), device=str(self._device))

    def _layout(self, kv_caches: dict[str, torch.Tensor]) -> Layout:
        stride, runs = 0, list[Run]()
        for name, one in kv_caches.items():
            offset = one.data_ptr() - self._base
            step, more = runs_of(one.shape, one.stride(), one.element_size(), offset, self._blocks)
            if stride not in (0, step):
                raise ConfigError(
                    f"tiermem: blocks of {name} are {step} bytes apart, others {stride}; caches "
                    "whose layers have blocks of different sizes are not supported"
                )
            stride = step
            runs += more
        return layout_of(stride, runs, self._blocks, self._parts.device.page_bytes)

    def _configured(self, config: Config, strides: list[int]) -> Config:
        """The configuration with the page and the GPU budget that this engine comes to."""
        gpu = config.gpu
        if self._device.type == "cpu":
            page = automatic_page(strides) if gpu.page == "auto" else gpu.page
            return msgspec.structs.replace(
                config, gpu=msgspec.structs.replace(gpu, device="cpu", page=page)
            )
        device = f"cuda:{self._device.index}"
        wanted = gpu.page
        if wanted == "auto" and len(strides) == 1 and strides[0] % CUDA_PAGE == 0:
            wanted = strides[0]  # a block is one page
        budget = gpu.budget
        if not isinstance(budget, int) and not _was_set(config, "gpu.budget"):
            shared = config.share.total if config.share.enabled else None
            fixed = shared if isinstance(shared, int) else None
            budget = fixed or left_for_cache(self._vllm, self._device)
        return msgspec.structs.replace(
            config, gpu=msgspec.structs.replace(gpu, device=device, budget=budget, page=wanted)
        )


class _Answer(TorchFunctionMode):
    """Answers torch.zeros of whole KV caches; everything else goes through."""

    def __init__(self, answer: Callable[[int], torch.Tensor | None]) -> None:
        super().__init__()
        self._answer = answer

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.zeros and kwargs.get("dtype") is torch.int8:
            size = args[0] if args else kwargs.get("size")
            count = size[0] if isinstance(size, (tuple, list)) and len(size) == 1 else size
            if isinstance(count, int) and (ours := self._answer(count)) is not None:
                return ours
        return func(*args, **kwargs)


def _was_set(config: Config, key: str) -> bool:
    return any(name == key for name, _ in config.sources)


def arrangement(kv_caches: Mapping[str, torch.Tensor], blocks: int) -> list[object]:
    """How values lie within a block of each tensor; the same whatever the number of blocks."""
    return [
        [
            name,
            str(one.dtype),
            [-1 if size == blocks else size for size in one.shape],
            np.argsort(one.stride(), kind="stable").tolist(),
        ]
        for name, one in sorted(kv_caches.items())
    ]


def has_memory_hook() -> bool:
    """Whether vLLM asks the connector for a memory context (0.31 and newer)."""
    from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1

    return hasattr(KVConnectorBase_V1, "get_mem_pool_context")


def sizes_of(kv_cache_config: Any) -> list[int]:
    """Bytes of each allocation that the cache will be: one since 0.29, one a layer before."""
    tensors = kv_cache_config.kv_cache_tensors
    if getattr(tensors[0], "block_stride", 0):
        return [int(tensors[0].size)]
    return [int(one.size) for one in tensors]


def strides_of(kv_cache_config: Any, blocks: int) -> list[int]:
    """Byte counts that a page must divide: from block to block, and where layers begin."""
    tensors = kv_cache_config.kv_cache_tensors
    if not getattr(tensors[0], "block_stride", 0):  # of each layer, perhaps all K before all V
        return [int(one.size) // blocks // 2 for one in tensors]
    strides = [int(one.block_stride) for one in tensors]
    for one in tensors:
        if (
            getattr(one, "layer_stride", 0) > one.block_stride
        ):  # layers apart, each a range of its own
            strides += [int(one.offset), int(one.layer_stride)]
    return [stride for stride in strides if stride]


def left_for_cache(vllm_config: Any, device: torch.device) -> int:
    """Bytes of GPU memory that vLLM means the KV cache to have, at this moment of its start."""
    fixed = getattr(vllm_config.cache_config, "kv_cache_memory_bytes", None)
    if fixed:
        return int(fixed)
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    stats = torch.cuda.memory_stats(device)
    peak = stats["allocated_bytes.all.peak"] - stats["allocated_bytes.all.current"]
    share = float(vllm_config.cache_config.gpu_memory_utilization)
    left = int(share * total) - int(total - free) - int(peak) - int(GRAPHS * total)
    if left <= 0:
        raise ConfigError(
            f"tiermem: nothing is left for the KV cache: {free} of {total} bytes free, "
            f"gpu_memory_utilization={share}; raise it, or set gpu.budget"
        )
    return left


def queues_kernels_only(vllm_config: Any) -> bool:
    """False where another connector may copy blocks that are not shown yet: the driver refuses."""
    return bool(vllm_config.kv_transfer_config.kv_connector != TOGETHER)


def rank_name(vllm_config: Any) -> str:
    """The name of this rank's slab under nvme.path: one for each model and rank."""
    model = Path(str(vllm_config.model_config.model)).name or "model"
    safe = "".join(c if c.isalnum() or c in "._-" else "-" for c in model)[:40]
    parallel = vllm_config.parallel_config
    return f"vllm-{safe}-{int(getattr(parallel, 'rank', 0))}of{parallel.world_size}"


def fingerprint(vllm_config: Any) -> dict[str, str]:
    """What the bytes of a slab mean: another value of any of these, and they mean nothing."""
    import vllm

    model, cache = vllm_config.model_config, vllm_config.cache_config
    parallel = vllm_config.parallel_config
    return {
        "engine": "vllm",
        "vllm": str(vllm.__version__),
        "model": str(model.model),
        "revision": str(getattr(model, "revision", None)),
        "weights": weights_of(str(model.model), vllm_config),
        "dtype": f"{model.dtype} {cache.cache_dtype}",
        "block": str(cache.block_size),
        "layout": str(getattr(cache, "kv_cache_layout", None)),
        "rank": f"{int(getattr(parallel, 'rank', 0))} of {parallel.world_size}",
        "hash": f"{cache.prefix_caching_hash_algo}",
    }


def weights_of(model: str, vllm_config: Any) -> str:
    """A digest that changes with the weights: files of a local model; load format and seed."""
    facts: list[object] = [str(vllm_config.load_config.load_format)]
    folder = Path(model)
    if folder.is_dir():
        for file in sorted(folder.iterdir()):
            if file.suffix in (".safetensors", ".bin", ".pt", ".gguf"):
                stat = file.stat()
                facts.append([file.name, stat.st_size, stat.st_mtime_ns])
            elif file.name == "config.json":
                facts.append(hashlib.sha256(file.read_bytes()).hexdigest())
    if "dummy" in str(facts[0]).lower():
        facts.append(vllm_config.model_config.seed)
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
