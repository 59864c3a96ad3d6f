"""The vLLM connector: no vLLM function is patched, the engine calls these hooks itself.

vLLM makes one object in the scheduler's process and one in each worker's. The scheduler's owns a
`Director` (vllm_scheduler.py), a worker's a `Rank` (vllm_worker.py); what travels between them
rides on vLLM's own metadata. Here is only which hook means what.

| vLLM calls | we |
| --- | --- |
| get_mem_pool_context, or the constructor before 0.31 | answer the KV cache's torch.zeros |
| register_kv_caches, get_handshake_metadata | show the first blocks; say what this rank has |
| bind_kv_cache_manager | what a request holds, where sliding windows give blocks back |
| bind_gpu_block_pool | let free blocks mean blocks that can have frames |
| get_num_new_matched_tokens | fetch what a waiting request will need; look on the drive |
| update_state_after_alloc, request_finished | blocks are in use; they are not |
| build_connector_meta | orders of the step |
| handle_preemptions | the worker carries them out, before the step |
| wait_for_save | the step's work is queued: a fence |
| get_finished, build_connector_worker_meta, update_connector_output | what became of orders |
| get_kv_connector_stats, build_prom_metrics | metrics on vLLM's own page |
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorWorkerMetadata,
    SupportsHMA,
)

from tiermem.directed.orders import Hello, Orders, Report
from tiermem.integrations.layout import Layout
from tiermem.integrations.vllm_scheduler import EngineSide
from tiermem.integrations.vllm_stats import TiermemPage, TiermemStats
from tiermem.integrations.vllm_worker import RankSide

if TYPE_CHECKING:
    import torch


@dataclass
class Introduction(KVConnectorHandshakeMetadata):  # type: ignore[misc]  # untyped here
    """What a worker tells the scheduler once: its tiers, and where blocks lie."""

    hello: Hello
    layout: Layout


@dataclass
class StepOrders(KVConnectorMetadata):  # type: ignore[misc]  # untyped here
    orders: Orders


@dataclass
class StepReports(KVConnectorWorkerMetadata):  # type: ignore[misc]  # untyped here
    reports: list[Report] = field(default_factory=list)

    def aggregate(self, other: KVConnectorWorkerMetadata) -> KVConnectorWorkerMetadata:
        assert isinstance(other, StepReports), "reports of another connector"
        return StepReports(self.reports + other.reports)


SEVERAL_TABLES = (SupportsHMA,) if hasattr(KVConnectorBase_V1, "bind_kv_cache_manager") else ()
"""Before 0.30 vLLM does not show what a request holds, and turns its hybrid cache off for us."""


class TiermemConnector(KVConnectorBase_V1, *SEVERAL_TABLES):  # type: ignore[misc]  # untyped here
    """vLLM's KV cache over GPU memory, pinned host memory and NVMe, at addresses that stay."""

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config=vllm_config, role=role, kv_cache_config=kv_cache_config)
        self._engine: EngineSide | None = None
        self._rank: RankSide | None = None
        if role == KVConnectorRole.SCHEDULER:
            self._engine = EngineSide(vllm_config, kv_cache_config)
        else:
            self._rank = RankSide(vllm_config, kv_cache_config)

    @property
    def requires_kv_delivery(self) -> bool:
        """A block that is not kept is a later miss, so a preempted request loses no output."""
        return False

    @property
    def engine(self) -> EngineSide:
        assert self._engine is not None, "a scheduler's hook on a worker"
        return self._engine

    @property
    def rank(self) -> RankSide:
        assert self._rank is not None, "a worker's hook on the scheduler"
        return self._rank

    # ---------------------------------------------------------------- worker

    def get_mem_pool_context(self) -> AbstractContextManager[None] | None:
        return self.rank.memory()

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        self.rank.register(kv_caches)

    def get_handshake_metadata(self) -> Introduction:
        return Introduction(self.rank.hello, self.rank.layout)

    def handle_preemptions(self, kv_connector_metadata: KVConnectorMetadata) -> None:
        assert isinstance(kv_connector_metadata, StepOrders), "orders of another connector"
        self.rank.carry(kv_connector_metadata.orders)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Everything that a step needs is there before it: `handle_preemptions`."""

    def wait_for_layer_load(self, layer_name: str) -> None:
        """As above."""

    def save_kv_layer(
        self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any
    ) -> None:
        """Bytes leave by pages, when their blocks are no longer in use."""

    def wait_for_save(self) -> None:
        self.rank.mark()

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        return None, self.rank.received() or None

    def get_block_ids_with_load_errors(self) -> set[int]:
        return self.rank.take_failed_blocks()

    def build_connector_worker_meta(self) -> StepReports | None:
        report = self.rank.take_report()
        return None if report is None else StepReports([report])

    # ---------------------------------------------------------------- scheduler

    def set_xfer_handshake_metadata(
        self, metadata: dict[int, KVConnectorHandshakeMetadata]
    ) -> None:
        met = [one for _, one in sorted(metadata.items()) if isinstance(one, Introduction)]
        self.engine.meet([one.hello for one in met], met[0].layout)

    def bind_kv_cache_manager(self, kv_cache_manager: Any) -> None:
        super().bind_kv_cache_manager(kv_cache_manager)
        self.engine.see_tables(lambda name: kv_cache_manager.get_blocks(name).blocks)

    def bind_gpu_block_pool(self, gpu_block_pool: Any) -> None:
        self.engine.bind(gpu_block_pool)

    def get_num_new_matched_tokens(
        self, request: Any, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        return self.engine.match(request, num_computed_tokens)

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        self.engine.admit(request, blocks.get_block_ids(), num_external_tokens)

    def build_connector_meta(self, scheduler_output: Any) -> StepOrders:
        return StepOrders(self.engine.orders(scheduler_output))

    def update_connector_output(self, connector_output: Any) -> None:
        meta = connector_output.kv_connector_worker_meta
        self.engine.hear(meta.reports if isinstance(meta, StepReports) else ())

    def request_finished(
        self, request: Any, block_ids: list[int]
    ) -> tuple[bool, dict[str, Any] | None]:
        self.engine.finish(request)
        return False, None

    def request_finished_all_groups(
        self, request: Any, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        self.engine.finish(request)
        return False, None

    def has_pending_block_frees(self) -> bool:
        return self.engine.is_making_room()

    def reset_cache(self) -> bool | None:
        self.engine.forget_content()
        return True

    def get_kv_connector_stats(self) -> TiermemStats | None:
        stats = None if self._engine is None else self._engine.take_stats()
        return None if stats is None else TiermemStats(stats)

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> TiermemStats:
        return TiermemStats({} if data is None else data)

    @classmethod
    def build_prom_metrics(
        cls,
        vllm_config: Any,
        metric_types: dict[type, Any],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> TiermemPage:
        return TiermemPage(vllm_config, metric_types, labelnames, per_engine_labelvalues)

    def take_events(self) -> Iterable[Any]:
        return ()

    def shutdown(self) -> None:
        if self._engine is not None:
            self._engine.close()
        if self._rank is not None:
            self._rank.close()

    @classmethod
    def get_required_kvcache_layout(cls, vllm_config: Any) -> str | None:
        """One run of bytes a block, where the platform's kernels can take it (0.29 and newer)."""
        from vllm.platforms import current_platform

        from tiermem.integrations import vllm_seams

        if current_platform.is_cpu() or vllm_seams.installed() < (0, 29):
            return None
        backend = str(getattr(getattr(vllm_config, "attention_config", None), "backend", ""))
        return "BLHNC" if "FLASHINFER" in backend.upper() else "BLNHC"
