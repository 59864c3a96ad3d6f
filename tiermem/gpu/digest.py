"""Checksums of frames, computed on the GPU: XXH3-64 over the XXH3-64s of their 4 KiB pieces.

A direct route between GPU and drive has its bytes checked where they are. The number must be the
one that processors compute (`nvme/digest.py`, by the xxhash library), so the kernel is XXH3 to the
bit, for inputs of exactly 4 KiB: eight accumulators, one a thread; 64 stripes of 64 bytes, a
scramble after every 16th, another key for the last (Collet, xxHash specification 0.8, and its
default secret). The second level is 1/512 of the bytes and done by the host.

PTX text, which the driver compiles. `tests/gpu/ptx.py` runs this very text on a processor.
"""

from __future__ import annotations

import ctypes
import threading
from typing import Final

import numpy as np
import numpy.typing as npt
import xxhash

from tiermem.errors import DriverError
from tiermem.gpu.driver import Context
from tiermem.gpu.gather import Module, launch
from tiermem.gpu.streams import Timeline
from tiermem.tier import Addresses

Words = npt.NDArray[np.uint64]

PIECE_BYTES: Final = 4096
_THREADS: Final = 256
_PIECES: Final = _THREADS // 8  # a block
_PAGES: Final = 64  # a launch

SECRET: Final = bytes.fromhex(
    "b8fe6c3923a44bbe7c01812cf721ad1cded46de9839097db7240a4a4b7b3671fcb79e64eccc0e578825ad07dccff7221"
    "b8084674f743248ee03590e6813a264c3c2852bb91c300cb88d0658b1b532ea371644897a20df94e3819ef46a9deacd8"
    "a8fa763fe39c343ff9dcbbc7c70b4f1d8a51e04bcdb45931c89f7ec9d9787364eac5ac8334d3ebc3c581a0fffa1363eb"
    "170ddd51b7f0da49d316552629d4689e2b16be587d47a1fc8ff8b8d17ad031ce45cb3a8f95160428afd7fbcabb4b407e"
)
"""XXH3's own; 192 bytes."""
_PRIME32_1, _PRIME32_2, _PRIME32_3 = 0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D
_PRIME64_1, _PRIME64_2 = 0x9E3779B185EBCA87, 0xC2B2AE3D27D4EB4F
_PRIME64_3, _PRIME64_4, _PRIME64_5 = 0x165667B19E3779F9, 0x85EBCA77C2B2AE63, 0x27D4EB2F165667C5
_AVALANCHE = 0x165667919E3779F9

_KEYS, _LAST, _MERGE, _INIT = 0, 24, 32, 40  # words of the table


def _table() -> list[int]:
    """The secret in words; its eight words at 121 and at 11; what accumulators begin with."""
    at = [*range(0, 192, 8), *range(121, 185, 8), *range(11, 75, 8)]
    words = [int.from_bytes(SECRET[i : i + 8], "little") for i in at]
    start = [_PRIME32_3, _PRIME64_1, _PRIME64_2, _PRIME64_3]
    return words + start + [_PRIME64_4, _PRIME32_2, _PRIME64_5, _PRIME32_1]


def _stripe(at: int, key: str) -> str:
    """Read 16 bytes, of which this thread's 8 are multiplied and its neighbour's 8 added."""
    return f"""
  ld.global.v2.u64 {{%even, %odd}}, [%from+{at}];
  selp.b64 %own, %odd, %even, %is_odd;
  selp.b64 %other, %even, %odd, %is_odd;
  xor.b64 %own, %own, {key};
  mov.b64 {{%low, %high}}, %own;
  mul.wide.u32 %own, %low, %high;
  add.u64 %acc, %acc, %own;
  add.u64 %acc, %acc, %other;"""


def _exchange(distance: int) -> str:
    """%other is the %own of the thread whose lane differs in that bit."""
    shuffle = "shfl.sync.bfly.b32"
    return f"""
  mov.b64 {{%low, %high}}, %own;
  {shuffle} %low, %low, {distance}, 0x1f, 0xffffffff;
  {shuffle} %high, %high, {distance}, 0x1f, 0xffffffff;
  mov.b64 %other, {{%low, %high}};"""


def _text() -> str:
    scramble = f"""
  shr.u64 %own, %acc, 47;
  xor.b64 %acc, %acc, %own;
  xor.b64 %acc, %acc, %key16;
  mul.lo.u64 %acc, %acc, {_PRIME32_1};"""
    stripes = ""
    for n in range(64):
        stripes += _stripe(64 * n, f"%key{n % 16}" if n < 63 else "%last")
        stripes += scramble if n in (15, 31, 47) else ""
    keys = "".join(f"\n  ld.global.u64 %key{n}, [%table+{8 * (_KEYS + n)}];" for n in range(17))
    add_other = "\n  add.u64 %own, %own, %other;"
    return f"""
.version 7.0
.target sm_70
.address_size 64
.global .align 16 .u64 words[48] = {{{", ".join(map(str, _table()))}}};
.visible .entry digest(.param .u64 p_pages, .param .u64 p_out, .param .u64 p_pieces)
{{
  .reg .pred %is_odd, %is_first, %is_piece, %writes;
  .reg .b32 %x, %y, %thread, %lane, %piece, %pieces, %most, %read, %low, %high, %bit;
  .reg .b64 %table, %from, %to, %at, %even, %odd, %own, %other, %acc, %last, %merge, %key<17>;
  mov.u32 %x, %ctaid.x;
  mov.u32 %y, %ctaid.y;
  mov.u32 %thread, %tid.x;
  and.b32 %lane, %thread, 7;
  shr.u32 %piece, %thread, 3;
  mad.lo.u32 %piece, %x, {_PIECES}, %piece;
  ld.param.u64 %at, [p_pieces];
  cvt.u32.u64 %pieces, %at;
  setp.lt.u32 %is_piece, %piece, %pieces;
  sub.u32 %most, %pieces, 1;
  min.u32 %read, %piece, %most;
  ld.param.u64 %from, [p_pages];
  mul.wide.u32 %at, %y, 8;
  add.u64 %from, %from, %at;
  ld.global.u64 %from, [%from];
  mul.wide.u32 %at, %read, {PIECE_BYTES};
  add.u64 %from, %from, %at;
  and.b32 %bit, %lane, 6;
  mul.wide.u32 %at, %bit, 8;
  add.u64 %from, %from, %at;
  and.b32 %bit, %lane, 1;
  setp.eq.u32 %is_odd, %bit, 1;
  mov.u64 %table, words;
  mul.wide.u32 %at, %lane, 8;
  add.u64 %table, %table, %at;{keys}
  ld.global.u64 %last, [%table+{8 * _LAST}];
  ld.global.u64 %merge, [%table+{8 * _MERGE}];
  ld.global.u64 %acc, [%table+{8 * _INIT}];{stripes}
  xor.b64 %own, %acc, %merge;{_exchange(1)}
  mul.lo.u64 %at, %own, %other;
  mul.hi.u64 %own, %own, %other;
  xor.b64 %own, %own, %at;{_exchange(2)}{add_other}{_exchange(4)}{add_other}
  add.u64 %own, %own, {PIECE_BYTES * _PRIME64_1 % 2**64};
  shr.u64 %at, %own, 37;
  xor.b64 %own, %own, %at;
  mul.lo.u64 %own, %own, {_AVALANCHE};
  shr.u64 %at, %own, 32;
  xor.b64 %own, %own, %at;
  setp.eq.u32 %is_first, %lane, 0;
  and.pred %writes, %is_first, %is_piece;
  mad.lo.u32 %piece, %y, %pieces, %piece;
  mul.wide.u32 %at, %piece, 8;
  ld.param.u64 %to, [p_out];
  add.u64 %to, %to, %at;
  @%writes st.global.u64 [%to], %own;
  ret;
}}
"""


PTX: Final = _text()


def join(pieces: Words) -> Words:
    """uint64[n]: the checksums of pages from those of their pieces, uint64[n, pieces]."""
    return np.array([xxhash.xxh3_64_intdigest(row.tobytes()) for row in pieces], np.uint64)


class FrameDigest:
    """Computes checksums of frames at their aliases; any thread may call, one at a time runs."""

    def __init__(self, context: Context, line: Timeline, page_bytes: int) -> None:
        """line: of a stream of its own."""
        self._context = context
        self._line = line
        self._pieces = page_bytes // PIECE_BYTES
        self._lock = threading.Lock()
        self._module = Module(context, PTX)
        self._kernel = self._module.kernel("digest")
        pointer = ctypes.c_uint64()
        words = _PAGES * (1 + self._pieces)
        with context:
            context.driver.call("cuMemHostAlloc", ctypes.byref(pointer), 8 * words, 3)
        self._address = pointer.value
        raw = (ctypes.c_uint64 * words).from_address(self._address)
        self._words = np.frombuffer(memoryview(raw), np.uint64)

    def __call__(self, addresses: Addresses) -> Words:
        """uint64[n]: of the frames at these addresses; their writers have ended. DriverError."""
        with self._lock:
            parts = [addresses[i : i + _PAGES] for i in range(0, len(addresses), _PAGES)]
            return np.concatenate([np.empty(0, np.uint64), *map(self._some, parts)])

    def _some(self, addresses: Addresses) -> Words:
        n, pieces = len(addresses), self._pieces
        self._words[:n] = addresses
        out = self._address + 8 * _PAGES
        with self._context:
            grid, stream = (-(-pieces // _PIECES), n), self._line.stream
            launch(self._context, self._kernel, grid, _THREADS, stream, self._address, out, pieces)
            tick = self._line.mark()
        self._line.wait(tick)
        if self._line.failure is not None:
            raise DriverError(f"digest of {n} pages: {self._line.failure}")
        return join(self._words[_PAGES : _PAGES + n * pieces].reshape(n, pieces))

    def close(self) -> None:
        """Nobody computes any more; a second call does nothing."""
        self._module.close()
        if self._address:
            with self._context:
                self._context.driver.attempt("cuMemFreeHost", self._address)
            self._address = 0
            self._words = np.zeros(0, np.uint64)


class ProcessorDigest:
    """The same of memory that the processor addresses: the CPU device's."""

    def __init__(self, page_bytes: int) -> None:
        self._page_bytes = page_bytes

    def __call__(self, addresses: Addresses) -> Words:
        return np.array([self._one(at) for at in addresses.tolist()], np.uint64)

    def _one(self, address: int) -> int:
        page = memoryview((ctypes.c_uint8 * self._page_bytes).from_address(address)).cast("B")
        starts = range(0, self._page_bytes, PIECE_BYTES)
        pieces = [xxhash.xxh3_64_intdigest(page[at : at + PIECE_BYTES]) for at in starts]
        return int(join(np.array([pieces], np.uint64))[0])

    def close(self) -> None:
        pass
