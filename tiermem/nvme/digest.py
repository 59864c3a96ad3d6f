"""The checksum of a page: XXH3-64 over the XXH3-64s of its 4 KiB pieces.

Pieces make it a tree of two levels, so that a GPU computes the same number where the bytes are, one
piece for every eight threads (`gpu/digest.py`), while a processor uses the xxhash library on pages
that are in its cache. Records of older slabs carry XXH3-64 over the whole page: these stay
readable.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util

import numpy as np
import xxhash

from tiermem.native import pointer
from tiermem.native.library import library
from tiermem.nvme.files import Buffer
from tiermem.nvme.records import Algorithm

PIECE_BYTES = 4096


def digest(page: Buffer) -> int:
    """Of a page whose size is a multiple of 4 KiB, with the interpreter lock held."""
    view = memoryview(page)
    starts = range(0, len(view), PIECE_BYTES)
    pieces = [xxhash.xxh3_64_intdigest(view[at : at + PIECE_BYTES]) for at in starts]
    return xxhash.xxh3_64_intdigest(np.array(pieces, "<u8").tobytes())


def is_intact(page: Buffer, checksum: int, algorithm: int) -> bool:
    """Whether these bytes are those that a checksum was made of; False for an unknown one."""
    match algorithm:
        case Algorithm.XXH3_64_PIECES:
            return digest(page) == checksum
        case Algorithm.XXH3_64:
            return xxhash.xxh3_64_intdigest(page) == checksum
        case _:
            return False


@functools.cache
def native_digest() -> tuple[int, int] | None:
    """(address of `tm_hash_pieces`, its third argument); None where xxhash hides its C functions.

    Called as (address of the page, bytes, that argument). Raises DriverError without a compiler.
    """
    sample = np.arange(4 * PIECE_BYTES, dtype=np.uint8)
    try:
        spec = importlib.util.find_spec("xxhash._xxhash")
        found = ctypes.CDLL("" if spec is None else spec.origin)
        # The dispatching one picks AVX: 22 us a 2 MiB page against 58 (2-core, 2026-11).
        hash64 = getattr(found, "XXH3_64bits_dispatch", None) or found.XXH3_64bits
    except (AttributeError, OSError):
        return None
    pieces, inner = library().free.tm_hash_pieces, pointer(hash64)
    same = pieces(sample.ctypes.data, len(sample), inner) == digest(sample.data)
    return (pointer(pieces), inner) if same else None
