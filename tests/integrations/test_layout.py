"""Blocks of engines to pages: every byte of a unit is on its pages, and on no other unit's."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tiermem.errors import ConfigError
from tiermem.integrations.layout import Layout, layout_of, merged, runs_of

KIB = 1024


def bytes_of_block(
    shape: Sequence[int], strides: Sequence[int], itemsize: int, offset: int, axis: int, block: int
) -> set[int]:
    """Every byte of one block of one layer's tensor, counted out."""
    sizes = [n if i != axis else 1 for i, n in enumerate(shape)]
    starts = np.zeros(1, np.int64) + block * strides[axis]
    for i, n in enumerate(sizes):
        if i != axis:
            starts = (starts[:, None] + np.arange(n) * strides[i]).ravel()
    first = starts * itemsize + offset
    return set((first[:, None] + np.arange(itemsize)).ravel().tolist())


def pages_of_unit(layout: Layout, unit: int) -> set[int]:
    rows = np.arange(unit * layout.unit_pages, (unit + 1) * layout.unit_pages, dtype=np.int32)
    return set(layout.addresses(0, rows).tolist())


@settings(deadline=None)
@given(
    layers=st.integers(1, 4),
    blocks=st.integers(1, 9),
    inner=st.integers(1, 3),
    outermost=st.booleans(),
    page=st.sampled_from([4096, 8192]),
    block_kib=st.sampled_from([2, 4, 6, 8, 12]),
)
def test_the_pages_of_units_are_disjoint_and_hold_all_their_blocks_bytes(
    layers: int, blocks: int, inner: int, outermost: bool, page: int, block_kib: int
) -> None:
    cells = block_kib * KIB // 512  # of 512 bytes, so that the sets stay small
    width = inner * cells
    blocks *= 4  # layers of a layer-outermost layout begin on a page
    layer_stride = width if outermost else width * blocks
    block_stride = width * layers if outermost else width
    runs, stride = [], 0
    for layer in range(layers):
        shape, strides = (blocks, inner, cells), (block_stride, cells, 1)
        stride, more = runs_of(shape, strides, 512, layer * layer_stride * 512, blocks)
        runs += more
    layout = layout_of(stride, runs, blocks, page)
    owner: dict[int, int] = {}
    for unit in range(layout.units):
        for address in pages_of_unit(layout, unit):
            assert owner.setdefault(address, unit) == unit, "a page of two units"
            assert 0 <= address <= layout.nbytes - page
    for block in range(blocks):
        unit = int(layout.units_of([block])[0])
        assert block in layout.blocks_of(np.array([unit], np.int32))
        for layer in range(layers):
            offset = layer * layer_stride * 512
            held = bytes_of_block(
                (blocks, inner, cells), (block_stride, cells, 1), 512, offset, 0, block
            )
            assert {owner[byte // page * page] for byte in held} == {unit}


def test_a_block_outermost_cache_has_one_piece_a_block() -> None:
    layers, blocks, page = 4, 8, 2048 * KIB  # [B, L, H, N, C] of an 8B model: 2 MiB a block
    per_layer = page // layers
    runs, stride = [], 0
    for layer in range(layers):
        shape = (blocks, 8, 16, 256)
        strides = (page // 2, 16 * 256, 256, 1)
        stride, more = runs_of(shape, strides, 2, layer * per_layer, blocks)
        runs += more
    layout = layout_of(stride, runs, blocks, page)
    assert (layout.offsets, layout.unit_pages, layout.blocks_per_unit) == ((0,), 1, 1)
    assert layout.addresses(page, np.array([0, 7], np.int32)).tolist() == [page, 8 * page]


@pytest.mark.parametrize("outermost", [False, True])
def test_mla_has_one_latent_a_token_in_blocks_that_are_no_whole_pages(outermost: bool) -> None:
    """DeepSeek's 512 + 64 numbers a token, as vLLM 0.32 lays them out: [blocks, 1, 16, 576]."""
    layers, blocks, block = 3, 64, 16 * 576 * 2
    step = block // 2 * (layers if outermost else 1)
    runs, stride = [], 0
    for layer in range(layers):
        offset = layer * block * (1 if outermost else blocks)
        stride, more = runs_of((blocks, 1, 16, 576), (step, 576, 576, 1), 2, offset, blocks)
        runs += more
    layout = layout_of(stride, runs, blocks, 4096)
    assert layout.blocks_per_unit == 2
    assert layout.unit_bytes == 2 * layers * block, "no byte of padding"
    owner = {
        page: unit for unit in range(layout.units) for page in pages_of_unit(layout, unit)
    }  # disjoint, because they are as many as the bytes need
    assert len(owner) * 4096 == layers * blocks * block
    for number, layer in ((0, 0), (1, 2), (62, 1), (63, 2)):
        first = layer * block * (1 if outermost else blocks) + number * step * 2
        held = {first // 4096 * 4096, (first + block - 1) // 4096 * 4096}
        assert {owner[page] for page in held} == {number // 2}


def test_tables_that_alias_one_another_are_one_layout() -> None:
    """Of a hybrid model, whose groups all begin at byte 0 (0.29 and newer)."""
    shape, strides, block, blocks = (8, 2, 32, 128), (8192, 4096, 128, 1), 16384, 8
    both = [runs_of(shape, strides, 2, layer * blocks * block, blocks) for layer in (0, 1)]
    one = [run for _, runs in both for run in runs]
    assert layout_of(block, one * 3, blocks, 4096) == layout_of(block, one, blocks, 4096)


def test_blocks_that_are_no_whole_pages_move_in_groups() -> None:
    layout = layout_of(2304 * KIB, [(0, 2304 * KIB)], 100, 2048 * KIB)  # Qwen3-8B, 16 tokens
    assert (layout.blocks_per_unit, layout.unit_pages, layout.units) == (8, 9, 13)
    assert layout.units_of([7, 8]).tolist() == [0, 1]
    assert layout.blocks_of(np.array([12], np.int32)).tolist() == [96, 97, 98, 99]
    assert layout.nbytes == 13 * 9 * 2048 * KIB


def test_keys_and_values_apart_are_two_pieces() -> None:
    shape, strides = (2, 6, 16, 2, 64), (6 * 2048, 2048, 128, 64, 1)
    stride, runs = runs_of(shape, strides, 2, 0, 6)
    layout = layout_of(stride, runs, 6, 4096)
    assert (layout.offsets, layout.unit_pages) == ((0, 6 * 4096), 2)


def test_kernel_blocks_that_split_an_engine_block_are_counted_together() -> None:
    stride, runs = runs_of((12, 16, 64), (1024, 64, 1), 4, 0, 3)  # 4 kernel blocks to a block
    assert (stride, runs) == (16384, [(0, 16384)])


def test_the_automatic_page_divides_blocks_and_layers() -> None:
    assert layout_of(16 * KIB, [(0, 16 * KIB)], 5, None).page_bytes == 16 * KIB
    assert layout_of(4 << 20, [(0, 4 << 20)], 5, None).page_bytes == 2 << 20
    assert layout_of(6 * KIB, [(0, 6 * KIB)], 4, None).page_bytes == 4 * KIB
    assert layout_of(6 * KIB, [(0, 6 * KIB)], 4, None).blocks_per_unit == 2


def test_a_layer_that_begins_within_a_page_is_refused_with_the_way_out() -> None:
    runs = [(0, 6 * KIB), (5 * 6 * KIB, 6 * 6 * KIB)]
    with pytest.raises(ConfigError, match="multiple of 2"):
        layout_of(6 * KIB, runs, 5, 4096)


def test_a_tensor_without_a_dimension_of_blocks_is_refused() -> None:
    with pytest.raises(ConfigError, match="no dimension of 7 blocks"):
        runs_of((2, 3, 5), (15, 5, 1), 2, 0, 7)


def test_blocks_that_overlap_the_next_are_refused() -> None:
    with pytest.raises(ConfigError, match="reaches"):
        layout_of(4096, [(0, 8192)], 4, 4096)


def test_runs_that_touch_or_overlap_become_one() -> None:
    assert merged([(8, 12), (0, 4), (4, 8), (20, 24), (21, 23)]) == [(0, 12), (20, 24)]
