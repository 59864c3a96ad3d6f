"""Where the bytes of an engine's KV block lie, and which pages they are.

An engine numbers blocks; a block is one run of bytes (block-outermost layouts) or a piece in each
layer (layer-outermost ones). A unit is the smallest group of neighbouring blocks whose pieces are
whole pages, so that it can be moved without its neighbours. Units are numbered like blocks, and
the rows of a page table unit by unit: row = unit * unit_pages + page of the unit, piece by piece.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tiermem.errors import ConfigError
from tiermem.table import Rows
from tiermem.tier import Addresses

Blocks = npt.NDArray[np.int64]
Run = tuple[int, int]
"""(first byte, one past the last) of a part of block 0, relative to the start of the range."""

SMALLEST_PAGE = 4096
LARGEST_AUTOMATIC_PAGE = 2 << 20


@dataclass(frozen=True, slots=True)
class Layout:
    """Blocks 0..blocks-1: block b has `stride` bytes at each of `offsets` + b * stride."""

    blocks: int
    stride: int
    offsets: tuple[int, ...]
    page_bytes: int

    def __post_init__(self) -> None:
        if self.blocks <= 0 or self.stride <= 0 or not self.offsets or self.page_bytes <= 0:
            raise ConfigError(f"a layout without bytes: {self}")
        off = [offset for offset in self.offsets if offset % self.page_bytes]
        if off:
            raise ConfigError(
                f"{len(off)} of {len(self.offsets)} layers begin within a page of "
                f"{self.page_bytes} bytes (first: byte {off[0]}); use a block-outermost layout, "
                f"or a number of blocks that is a multiple of {self.blocks_per_unit}"
            )

    @property
    def blocks_per_unit(self) -> int:
        """1 where a block is whole pages; else how many blocks move together."""
        return self.page_bytes // math.gcd(self.stride, self.page_bytes)

    @property
    def unit_pages(self) -> int:
        return len(self.offsets) * self._piece_pages

    @property
    def units(self) -> int:
        return -(-self.blocks // self.blocks_per_unit)

    @property
    def nbytes(self) -> int:
        """Of the whole range, in whole pages: a last unit that is not full has pages beyond."""
        return max(self.offsets) + self.units * self._piece_pages * self.page_bytes

    @property
    def unit_bytes(self) -> int:
        return self.unit_pages * self.page_bytes

    @property
    def _piece_pages(self) -> int:
        return self.blocks_per_unit * self.stride // self.page_bytes

    def units_of(self, blocks: Sequence[int] | Blocks) -> Rows:
        """int32[n]: the unit of each block."""
        if self.blocks_per_unit == 1:
            return np.array(blocks, np.int32)
        return (np.asarray(blocks, np.int64) // self.blocks_per_unit).astype(np.int32)

    def blocks_of(self, units: Rows) -> Blocks:
        """int64[m]: all blocks of these units."""
        first = units.astype(np.int64)[:, None] * self.blocks_per_unit
        blocks: Blocks = (first + np.arange(self.blocks_per_unit)).ravel()
        return blocks[blocks < self.blocks]

    def addresses(self, base: int, rows: Rows) -> Addresses:
        """uint64[n]: where these pages lie when the range begins at `base`."""
        if self.unit_pages == 1:
            first, page_bytes = np.uint64(base + self.offsets[0]), np.uint64(self.page_bytes)
            return rows.astype(np.uint64) * page_bytes + first
        unit, page = np.divmod(rows.astype(np.int64), self.unit_pages)
        piece, within = np.divmod(page, self._piece_pages)
        offset = np.asarray(self.offsets, np.int64)[piece]
        offset += (unit * self._piece_pages + within) * self.page_bytes
        return np.asarray(offset + base, np.uint64)


def runs_of(
    shape: Sequence[int], strides: Sequence[int], itemsize: int, offset: int, blocks: int
) -> tuple[int, list[Run]]:
    """(bytes from block to block, runs of block 0) of one layer's tensor.

    shape, strides: of the tensor, strides in elements; one dimension counts blocks, or equal
    parts of them. offset: bytes from the start of the range to the first element. Raises
    ConfigError where no dimension does.
    """
    axis = next((i for i, n in enumerate(shape) if n >= blocks and n % blocks == 0), None)
    if axis is None:
        raise ConfigError(f"a KV tensor of shape {list(shape)} has no dimension of {blocks} blocks")
    parts = shape[axis] // blocks
    stride = strides[axis] * parts * itemsize
    inner = [(n, step * itemsize) for n, step in zip(shape, strides, strict=True)]
    inner[axis] = (parts, strides[axis] * itemsize)
    runs: list[Run] = [(offset, offset + itemsize)]
    for n, step in sorted(inner, key=lambda pair: pair[1]):
        if n > 1:
            runs = merged((a + i * step, b + i * step) for i in range(n) for a, b in runs)
    return stride, runs


def merged(runs: Iterable[Run]) -> list[Run]:
    """The same bytes in as few runs as possible, in order; runs may repeat and overlap."""
    result: list[Run] = []
    for first, end in sorted(runs):
        if result and first <= result[-1][1]:
            result[-1] = (result[-1][0], max(end, result[-1][1]))
        else:
            result.append((first, end))
    return result


def layout_of(stride: int, runs: Iterable[Run], blocks: int, page_bytes: int | None) -> Layout:
    """The layout of an engine whose block 0 is these runs, and whose blocks are `stride` apart.

    page_bytes: None takes the largest page that divides the blocks, at most 2 MiB. What lies
    between the runs of one block is padding. Raises ConfigError.
    """
    offsets: list[int] = []
    for first, end in merged(runs):
        if not offsets or first >= offsets[-1] + stride:
            offsets.append(first)  # else another layer's part of the same piece
        if end > offsets[-1] + stride:
            raise ConfigError(
                f"a block reaches {end - offsets[-1]} bytes on, and the next begins after {stride}"
            )
    if page_bytes is None:
        page_bytes = automatic_page([stride, *offsets])
    return Layout(blocks, stride, tuple(offsets), page_bytes)


def automatic_page(sizes: Iterable[int]) -> int:
    """The largest power of two that divides all of these, from 4 KiB to 2 MiB."""
    common = math.gcd(LARGEST_AUTOMATIC_PAGE, *sizes)
    return max(SMALLEST_PAGE, common & -common)
