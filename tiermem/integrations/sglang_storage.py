"""A storage backend for SGLang's HiCache: tiermem's host memory and drive under it.

    --enable-hierarchical-cache --hicache-mem-layout page_first --hicache-storage-backend dynamic
    --hicache-storage-backend-extra-config '{"backend_name": "tiermem", "interface_v1": 1,
      "module_path": "tiermem.integrations.sglang_storage", "class_name": "TiermemStorage"}'

HiCache has one thread for its I/O, and an exception ends it: every request that waits for it then
waits for ever. So nothing here raises once it is open: what fails is a miss, and said in the log.
Names are HiCache's hashes of tokens; which weights, layout and rank they belong to is added here.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from sglang.srt.mem_cache.hicache_storage import HiCacheStorage

from tiermem import units
from tiermem.config import Config, load
from tiermem.errors import ConfigError
from tiermem.integrations import sglang_compat as compat
from tiermem.integrations.sglang_sizes import rank_config, staged
from tiermem.integrations.sglang_store import STAGED, PageStore, Spans

log = logging.getLogger(__name__)

Answer = TypeVar("Answer")


def _miss(
    answer: Callable[..., Answer],
) -> Callable[[Callable[..., Answer]], Callable[..., Answer]]:
    """Whatever goes wrong in a method is logged, and answered as if nothing were here."""

    def around(method: Callable[..., Answer]) -> Callable[..., Answer]:
        @functools.wraps(method)
        def quiet(self: Any, keys: Sequence[str], *args: Any, **kwargs: Any) -> Answer:
            try:
                return method(self, keys, *args, **kwargs)
            except Exception as error:  # it would end HiCache's thread
                log.warning("%s of %d pages failed: %s", method.__name__, len(keys), error)
                return answer(keys)

        return quiet

    return around


class TiermemStorage(HiCacheStorage):  # type: ignore[misc]  # SGLang is untyped
    """One for each rank; opened when HiCache shows its host pool."""

    def __init__(self, storage_config: Any, kwargs: dict[str, Any]) -> None:
        extra = storage_config.extra_config or {}
        if not extra.get("interface_v1"):
            raise ConfigError('tiermem: the extra config of the backend needs "interface_v1": 1')
        self._config = storage_config
        self._store: PageStore | None = None

    def register_mem_pool_host(self, mem_pool_host: Any) -> None:
        super().register_mem_pool_host(mem_pool_host)
        pool = mem_pool_host
        _, sizes = pool.get_page_buffer_meta(_first_page(pool))
        page_bytes = sum(sizes)
        config = _sized(load(), page_bytes, self._config)
        rank, fingerprint = _identity(self._config, pool)
        self._store = PageStore(config, page_bytes, rank, fingerprint)
        log.info("storage page=%s rank=%s", units.format_bytes(page_bytes), rank)

    @_miss(lambda keys: 0)
    def batch_exists(self, keys: Sequence[str], extra_info: Any = None) -> int:
        return self._opened().leading(keys)

    @_miss(lambda keys: [False] * len(keys))
    def batch_get_v1(
        self, keys: Sequence[str], host_indices: Any, extra_info: Any = None
    ) -> list[bool]:
        return self._opened().get(keys, self._spans(host_indices))

    @_miss(lambda keys: [False] * len(keys))
    def batch_set_v1(
        self, keys: Sequence[str], host_indices: Any, extra_info: Any = None
    ) -> list[bool]:
        return self._opened().put(keys, self._spans(host_indices))

    def exists(self, key: str) -> bool:
        return self.batch_exists([key]) == 1

    def get(self, key: str, target_location: Any = None, target_sizes: Any = None) -> None:
        """Not used with interface_v1."""

    def batch_get(
        self, keys: Sequence[str], target_locations: Any = None, target_sizes: Any = None
    ) -> list[None]:
        return [None] * len(keys)

    def set(
        self, key: str, value: Any = None, target_location: Any = None, target_sizes: Any = None
    ) -> bool:
        return False

    def batch_set(
        self, keys: Sequence[str], values: Any = None, target_locations: Any = None,
        target_sizes: Any = None,
    ) -> bool:  # fmt: skip
        return False

    def _opened(self) -> PageStore:
        if self._store is None:
            raise ConfigError("HiCache has not registered its host pool")
        return self._store

    def _spans(self, host_indices: Any) -> list[Spans]:
        """The pieces of each page in HiCache's host pool."""
        pointers, sizes = self.mem_pool_host.get_page_buffer_meta(host_indices)
        pages = len(host_indices) // self.mem_pool_host.page_size
        pieces = len(pointers) // pages
        spans = list(zip(pointers, sizes, strict=True))
        return [spans[i * pieces : (i + 1) * pieces] for i in range(pages)]


def _first_page(pool: Any) -> Any:
    import torch

    return torch.arange(pool.page_size)


def _sized(config: Config, page_bytes: int, given: Any) -> Config:
    """Host memory and drive shared out between ranks; frames to stage what is on its way."""
    whole = -(-page_bytes // 4096) * 4096
    mine = rank_config(config, whole, "cpu", given.tp_size, given.tp_rank)
    return staged(mine, 2 * STAGED * whole)


def _identity(given: Any, pool: Any) -> tuple[str, dict[str, str]]:
    """The name of this rank's slab, and all that its bytes depend on beside the tokens."""
    from sglang.srt.runtime_context import get_server_args

    args = get_server_args()
    rank = f"hicache-rank{given.tp_rank}of{given.tp_size}"
    shape = [getattr(pool, name, None) for name in ("layer_num", "head_num", "head_dim")]
    return rank, {
        **compat.model_facts(args),
        "engine": "sglang-hicache",
        "dtype": str(pool.dtype),
        "layout": f"{pool.layout} {shape} {pool.page_size}",
        "rank": f"{given.tp_rank} of {given.tp_size}",
    }
