"""The checksum of frames: kernel, CPU device and the drive's routes agree to a bit."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import xxhash

from tests.gpu.ptx import entry
from tiermem.gpu.digest import PIECE_BYTES, PTX, join
from tiermem.native import Kind, Program, group
from tiermem.nvme.digest import PIECE_BYTES as OF_THE_DRIVE
from tiermem.nvme.digest import digest, is_intact, native_digest
from tiermem.nvme.records import Algorithm

Bytes = npt.NDArray[np.uint8]
KERNEL = entry(PTX, "digest")


def aligned(pages: int, pieces: int) -> Bytes:
    """uint8[pages, bytes], each page at a multiple of 16, with random content."""
    raw = np.zeros(pages * pieces * PIECE_BYTES + 16, np.uint8)
    start = -raw.ctypes.data % 16
    made = raw[start : start + pages * pieces * PIECE_BYTES].reshape(pages, -1)
    made[:] = np.random.default_rng(pages * 100 + pieces).integers(0, 256, made.shape, np.uint8)
    return made


def by_kernel(pages: Bytes) -> npt.NDArray[np.uint64]:
    """What the GPU would compute, launch and all."""
    n, pieces = len(pages), pages.shape[1] // PIECE_BYTES
    where = np.array([page.ctypes.data for page in pages], np.uint64)
    out = np.zeros((n, pieces), np.uint64)
    KERNEL((-(-pieces // 32), n), 256, where.ctypes.data, out.ctypes.data, pieces)
    return out


def test_a_piece_is_the_same_size_for_everybody() -> None:
    assert PIECE_BYTES == OF_THE_DRIVE == 4096


@pytest.mark.parametrize(("pages", "pieces"), [(1, 1), (2, 31), (1, 32), (2, 33), (1, 512)])
def test_the_kernel_computes_xxh3_of_every_piece(pages: int, pieces: int) -> None:
    data = aligned(pages, pieces)
    expected = [
        [xxhash.xxh3_64_intdigest(piece.tobytes()) for piece in page.reshape(pieces, PIECE_BYTES)]
        for page in data
    ]
    found = by_kernel(data)
    assert found.tolist() == expected
    assert join(found).tolist() == [digest(page.data) for page in data]


@pytest.mark.parametrize("value", [0, 1, 0x7F, 0x80, 0xFF])
def test_pages_of_one_value_are_alike_everywhere(value: int) -> None:
    data = aligned(1, 4)
    data[:] = value
    assert join(by_kernel(data)).tolist() == [digest(data[0].data)]


def test_every_single_bit_flip_changes_the_kernels_answer() -> None:
    """Of a piece, every 61st bit: all positions within a byte and a stripe are among them."""
    data = aligned(1, 1)
    right = int(by_kernel(data)[0, 0])
    for bit in range(0, 8 * PIECE_BYTES, 61):
        data[0, bit // 8] ^= 1 << bit % 8
        assert int(by_kernel(data)[0, 0]) != right
        data[0, bit // 8] ^= 1 << bit % 8
    assert int(by_kernel(data)[0, 0]) == right


def test_the_native_digest_is_the_plain_one() -> None:
    native = native_digest()
    if native is None:
        pytest.skip("no compiler, or xxhash hides its functions")
    data = aligned(3, 17)
    where = np.array([page.ctypes.data for page in data], np.uint64)
    program = Program(group(native[0], Kind.PLAIN, where, data.shape[1], native[1]))
    assert program.run() is None
    found = program.calls["result"].view(np.uint64)
    assert found.tolist() == [digest(page.data) for page in data]


def test_every_bit_and_the_order_of_pieces_count() -> None:
    page = aligned(1, 3)[0]
    right = digest(page.data)
    for bit in range(0, 8 * len(page), 37):
        page[bit // 8] ^= 1 << bit % 8
        assert digest(page.data) != right
        page[bit // 8] ^= 1 << bit % 8
    swapped = np.concatenate([page[PIECE_BYTES : 2 * PIECE_BYTES], page[:PIECE_BYTES], page[8192:]])
    assert digest(swapped.data) != right
    assert digest(page.data) == right


def test_an_older_slabs_checksum_is_still_understood_and_an_unknown_one_is_not() -> None:
    page = aligned(1, 2)[0]
    whole = xxhash.xxh3_64_intdigest(page)
    assert is_intact(page.data, whole, Algorithm.XXH3_64)
    assert not is_intact(page.data, whole, Algorithm.XXH3_64_PIECES)
    assert is_intact(page.data, digest(page.data), Algorithm.XXH3_64_PIECES)
    assert not is_intact(page.data, whole, 99)
