"""vLLM's classes for connector statistics, over `vllm_metrics`. Imported in vLLM processes only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prometheus_client import Counter, Gauge
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import (
    KVConnectorPromMetrics,
    KVConnectorStats,
)

from tiermem.integrations.vllm_metrics import Page


class TiermemStats(KVConnectorStats):  # type: ignore[misc]  # untyped here
    """One snapshot of totals; a later one replaces it."""

    def to_dict(self) -> dict[str, Any]:
        return dict(self.data)

    def reset(self) -> None:
        self.data: dict[str, Any] = {}

    def aggregate(self, other: KVConnectorStats) -> KVConnectorStats:
        return TiermemStats({**self.data, **other.data})

    def reduce(self) -> dict[str, int | float]:
        """For vLLM's line in the log, every ten seconds: where blocks are."""
        names = ("blocks place=gpu", "blocks place=host", "blocks place=nvme", "blocks_in_use")
        return {name: self.data[name] for name in names if name in self.data}

    def is_empty(self) -> bool:
        return not self.data


class TiermemPage(KVConnectorPromMetrics):  # type: ignore[misc]  # untyped here
    """tiermem's metrics among vLLM's."""

    def __init__(
        self,
        vllm_config: Any,
        metric_types: Mapping[type, Any],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        self._page = Page(
            metric_types[Gauge], metric_types[Counter], labelnames, per_engine_labelvalues
        )

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        self._page.show(transfer_stats_data, engine_idx)
