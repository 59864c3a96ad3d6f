"""How a page of SGLang's KV cache lies in memory, so that one page is one run of bytes.

SGLang keeps one buffer for each layer and part (K and V, or MLA's latent), token after token. Here
a page holds the same tokens of all of them, one block a part:

    page 1                                        page 2
    | K0 | V0 | K1 | V1 | ... | K31 | V31 | pad | K0 | V0 | ...

Kernels index rows of one part, so each part gets an ordinary contiguous tensor over the whole range
that begins at its own block, and pages are numbered in blocks: page p has the number p * stride.
Token t of it is row p * stride * page_size + t in every part. No kernel has to know.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from tiermem import units
from tiermem.errors import ConfigError

MOST_WASTE = 1 / 8
"""Of a page's bytes, at most this part may be padding."""
_LONGEST_PAGE = 4096
_LARGE_ENOUGH = 256


@dataclass(frozen=True, slots=True)
class PageMajor:
    """parts: blocks in a page that hold something. row_bytes: one token of one part."""

    parts: int
    row_bytes: int
    page_size: int
    stride: int
    """Blocks from one page to the next."""

    @property
    def block_bytes(self) -> int:
        return self.page_size * self.row_bytes

    @property
    def page_bytes(self) -> int:
        return self.stride * self.block_bytes

    def rows(self, pages: int) -> int:
        """Rows of each part's tensor over pages 0 to pages - 1; a multiple of page_size."""
        return ((pages - 1) * self.stride + 1) * self.page_size

    def offset(self, part: int) -> int:
        """Bytes from the start of the range to the first row of a part."""
        return part * self.block_bytes


def choose(*, parts: int, row_bytes: int, page_size: int, granule: int) -> PageMajor:
    """The layout whose pages are whole granules of memory, padded where they must be.

    granule: bytes that can be mapped one by one. Raises ConfigError, naming a page size that can
    be, if more than an eighth of each page would be padding.
    """
    stride = _stride(parts, page_size * row_bytes, granule)
    if not _wasteful(parts, stride):
        return PageMajor(parts, row_bytes, page_size, stride)
    fits = fitting_page_size(parts=parts, row_bytes=row_bytes, least=page_size, granule=granule)
    way_out = "no page size up to 4096 fits" if fits is None else f"use --page-size {fits}"
    size = units.format_bytes(parts * page_size * row_bytes)
    raise ConfigError(
        f"sglang: a page of {page_size} tokens has {size} and memory is mapped in "
        f"{units.format_bytes(granule)}, so {1 - parts / stride:.0%} of it would be padding; "
        f"{way_out}"
    )


def fitting_page_size(
    *, parts: int, row_bytes: int, least: int, granule: int, least_bytes: int = 0
) -> int | None:
    """The smallest doubling of `least` whose pages waste little; None if there is none.

    least_bytes: a page should have, if one of at most 256 tokens can.
    """
    fits = []
    size = least
    while size <= _LONGEST_PAGE:
        if not _wasteful(parts, _stride(parts, size * row_bytes, granule)):
            fits.append(size)
        size *= 2
    large = [s for s in fits if s * row_bytes * parts >= least_bytes and s <= _LARGE_ENOUGH]
    return next(iter(large or fits), None)


def _stride(parts: int, block_bytes: int, granule: int) -> int:
    step = granule // math.gcd(granule, block_bytes)
    return -(-parts // step) * step


def _wasteful(parts: int, stride: int) -> bool:
    return 1 - parts / stride > MOST_WASTE
