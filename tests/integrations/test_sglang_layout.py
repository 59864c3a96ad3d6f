"""Where a page of SGLang's pool lies: strides, padding, and the tensors that kernels see."""

import numpy as np
import pytest

from tiermem.errors import ConfigError
from tiermem.integrations.sglang_layout import PageMajor, choose, fitting_page_size

MIB = 1 << 20


@pytest.mark.parametrize(
    ("parts", "row_bytes", "page_size", "page_bytes"),
    [
        (64, 8 * 128 * 2, 16, 2 * MIB),  # Llama-3.1-8B
        (160, 2 * 128 * 2, 128, 10 * MIB),  # Llama-3.1-70B on four GPUs
        (72, 8 * 128 * 2, 128, 18 * MIB),  # Qwen3-8B
        (61, 576 * 2, 256, 18 * MIB),  # DeepSeek-V3, three blocks of padding
    ],
)
def test_a_page_is_whole_granules(
    parts: int, row_bytes: int, page_size: int, page_bytes: int
) -> None:
    layout = choose(parts=parts, row_bytes=row_bytes, page_size=page_size, granule=2 * MIB)
    assert layout.page_bytes == page_bytes
    assert layout.parts <= layout.stride <= layout.parts * 8 / 7


def test_a_page_size_that_wastes_memory_is_refused_with_one_that_does_not() -> None:
    with pytest.raises(ConfigError, match="--page-size 64"):
        choose(parts=72, row_bytes=2048, page_size=16, granule=2 * MIB)
    assert fitting_page_size(parts=72, row_bytes=2048, least=16, granule=2 * MIB) == 64


@pytest.mark.parametrize(
    ("parts", "row_bytes", "page_size"),
    [(64, 2048, 64), (160, 512, 128), (72, 2048, 64), (61, 1152, 256), (4, 128, 4096)],
)
def test_pages_are_large_where_a_page_of_few_tokens_can_be(
    parts: int, row_bytes: int, page_size: int
) -> None:
    found = fitting_page_size(
        parts=parts, row_bytes=row_bytes, least=16, granule=2 * MIB, least_bytes=8 * MIB
    )
    assert found == page_size


def test_no_page_size_may_fit() -> None:
    assert fitting_page_size(parts=3, row_bytes=2, least=1, granule=2 * MIB) is None
    with pytest.raises(ConfigError, match="no page size"):
        choose(parts=3, row_bytes=2, page_size=1, granule=2 * MIB)


@pytest.mark.parametrize("stride", [4, 7])
def test_parts_seen_by_kernels_never_share_a_byte_and_a_page_is_one_run(stride: int) -> None:
    layout = PageMajor(parts=4, row_bytes=8, page_size=2, stride=stride)
    pages = 5
    memory = np.full(pages * layout.page_bytes // 8, -1, np.int64)
    for part in range(layout.parts):
        first = layout.offset(part) // 8
        rows = memory[first : first + layout.rows(pages)]
        assert len(rows) == layout.rows(pages)
        assert layout.rows(pages) % layout.page_size == 0
        for page in range(pages):
            index = page * layout.stride * layout.page_size
            taken = rows[index : index + layout.page_size]
            assert (taken == -1).all()
            taken[:] = page
    by_page = memory.reshape(pages, -1)
    used = layout.parts * layout.page_size
    assert (by_page[:, :used] == np.arange(pages)[:, None]).all()
    assert (by_page[:, used:] == -1).all()
