"""What a worker reads from vLLM's description of its KV cache, in several releases' shapes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("torch")

import torch

from tiermem.integrations.layout import automatic_page
from tiermem.integrations.vllm_config import CONNECTOR
from tiermem.integrations.vllm_worker import (
    arrangement,
    queues_kernels_only,
    sizes_of,
    strides_of,
)

BLOCKS, LAYER, LAYERS = 512, 16384, 4
"""Bytes of a block in one layer, K and V."""


def config(*tensors: Any) -> SimpleNamespace:
    return SimpleNamespace(kv_cache_tensors=list(tensors))


def test_before_0_29_each_layer_is_an_allocation_with_k_before_v() -> None:
    one = SimpleNamespace(size=BLOCKS * LAYER, shared_by=["l"], offset=0, block_stride=0)
    given = config(*[one] * LAYERS)
    assert sizes_of(given) == [BLOCKS * LAYER] * LAYERS
    assert automatic_page(strides_of(given, BLOCKS)) == LAYER // 2


def test_before_0_29_packed_layers_share_one_allocation() -> None:
    size = BLOCKS * LAYER * LAYERS
    given = config(
        *(
            SimpleNamespace(size=size, shared_by=["l"], offset=i * LAYER, block_stride=65536)
            for i in range(LAYERS)
        )
    )
    assert sizes_of(given) == [size]
    assert strides_of(given, BLOCKS) == [65536] * LAYERS


def test_since_0_29_layers_are_apart_in_one_allocation() -> None:
    size = BLOCKS * LAYER * LAYERS
    one = SimpleNamespace(
        size=size, layers=["a", "b"], layer_stride=BLOCKS * LAYER, block_stride=LAYER, offset=0
    )
    assert sizes_of(config(one)) == [size]
    assert automatic_page(strides_of(config(one), BLOCKS)) == LAYER


def test_since_0_29_a_block_may_be_one_run() -> None:
    one = SimpleNamespace(
        size=BLOCKS * 65536, layers=["a"], layer_stride=LAYER, block_stride=65536, offset=0
    )
    assert strides_of(config(one), BLOCKS) == [65536]


def test_content_is_the_same_only_where_values_lie_alike_in_a_block() -> None:
    def cache(blocks: int, dtype: Any = torch.bfloat16, *, heads_first: bool = False) -> Any:
        made = torch.zeros((blocks, 2, 16, 4, 64), dtype=dtype)
        return {"layer": made.transpose(2, 3).contiguous().transpose(2, 3) if heads_first else made}

    one = arrangement(cache(100), 100)
    assert one == arrangement(cache(300), 300)
    assert one != arrangement(cache(100, torch.float16), 100)
    assert one != arrangement(cache(100, heads_first=True), 100), "the same shape, other strides"
    assert one != arrangement({"other": cache(100)["layer"]}, 100)


@pytest.mark.parametrize(("connector", "alone"), [(CONNECTOR, True), ("MultiConnector", False)])
def test_steps_queue_kernels_only_where_no_other_connector_copies(
    connector: str, alone: bool
) -> None:
    transfer = SimpleNamespace(kv_connector=connector)
    assert queues_kernels_only(SimpleNamespace(kv_transfer_config=transfer)) is alone
