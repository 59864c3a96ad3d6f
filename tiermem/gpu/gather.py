"""A kernel that copies many small pieces between the GPU and mapped host memory.

Copy engines pay a fixed cost an entry: at 16 KiB they reach 5.5 GB/s upwards where this kernel
moves 50 (FACTS "Copies", H200). It is PTX text, which the driver compiles: no toolkit needed.
"""

from __future__ import annotations

import ctypes
from typing import Final

import numpy as np
import numpy.typing as npt

from tiermem.gpu.driver import Context
from tiermem.gpu.streams import Timeline
from tiermem.tier import Addresses

_THREADS: Final = 256
_VECTOR: Final = 16  # bytes a thread moves at once
_BLOCK_BYTES: Final = _THREADS * _VECTOR * 4  # one block, one round of the unrolled loop
_MOST_BLOCKS: Final = 32  # blocks a piece
_PIECES: Final = 8192  # pieces a launch
_SLOTS: Final = 4  # launches in flight before the host waits

# Block (x, y) copies every gridDim.x-th 4 KiB of piece y: four independent 16-byte loads a round.
PTX: Final = """
.version 7.0
.target sm_70
.address_size 64
.visible .entry gather(.param .u64 p_dst, .param .u64 p_src, .param .u64 p_size)
{
  .reg .pred %over;
  .reg .b32 %i<8>, %a<4>, %b<4>, %c<4>, %e<4>;
  .reg .b64 %dst, %src, %size, %piece, %at, %step, %step3, %end, %from, %to;
  mov.u32 %i0, %ctaid.y;
  mul.wide.u32 %piece, %i0, 8;
  ld.param.u64 %dst, [p_dst];
  ld.param.u64 %src, [p_src];
  ld.param.u64 %size, [p_size];
  add.u64 %dst, %dst, %piece;
  add.u64 %src, %src, %piece;
  add.u64 %size, %size, %piece;
  ld.global.u64 %dst, [%dst];
  ld.global.u64 %src, [%src];
  ld.global.u64 %size, [%size];
  mov.u32 %i1, %ctaid.x;
  mov.u32 %i2, %ntid.x;
  mov.u32 %i3, %tid.x;
  mov.u32 %i4, %nctaid.x;
  mad.lo.u32 %i5, %i1, %i2, %i3;
  mul.wide.u32 %at, %i5, 16;
  mul.lo.u32 %i6, %i4, %i2;
  mul.wide.u32 %step, %i6, 16;
  mul.lo.u64 %step3, %step, 3;
WIDE:
  add.u64 %end, %at, %step3;
  setp.ge.u64 %over, %end, %size;
  @%over bra TAIL;
  add.u64 %from, %src, %at;
  add.u64 %to, %dst, %at;
  ld.global.cs.v4.u32 {%a0, %a1, %a2, %a3}, [%from];
  add.u64 %from, %from, %step;
  ld.global.cs.v4.u32 {%b0, %b1, %b2, %b3}, [%from];
  add.u64 %from, %from, %step;
  ld.global.cs.v4.u32 {%c0, %c1, %c2, %c3}, [%from];
  add.u64 %from, %from, %step;
  ld.global.cs.v4.u32 {%e0, %e1, %e2, %e3}, [%from];
  st.global.cs.v4.u32 [%to], {%a0, %a1, %a2, %a3};
  add.u64 %to, %to, %step;
  st.global.cs.v4.u32 [%to], {%b0, %b1, %b2, %b3};
  add.u64 %to, %to, %step;
  st.global.cs.v4.u32 [%to], {%c0, %c1, %c2, %c3};
  add.u64 %to, %to, %step;
  st.global.cs.v4.u32 [%to], {%e0, %e1, %e2, %e3};
  add.u64 %at, %end, %step;
  bra WIDE;
TAIL:
  setp.ge.u64 %over, %at, %size;
  @%over bra DONE;
  add.u64 %from, %src, %at;
  add.u64 %to, %dst, %at;
  ld.global.cs.v4.u32 {%a0, %a1, %a2, %a3}, [%from];
  st.global.cs.v4.u32 [%to], {%a0, %a1, %a2, %a3};
  add.u64 %at, %at, %step;
  bra TAIL;
DONE:
  ret;
}
"""


class Module:
    """One PTX module on the device, and its kernels by name."""

    def __init__(self, context: Context, ptx: str) -> None:
        handle = ctypes.c_uint64()
        with context:
            context.driver.call("cuModuleLoadData", ctypes.byref(handle), ptx.encode())
        self.context = context
        self._handle = handle.value

    def kernel(self, name: str) -> int:
        handle = ctypes.c_uint64()
        with self.context:
            self.context.driver.call(
                "cuModuleGetFunction", ctypes.byref(handle), self._handle, name.encode()
            )
        return handle.value

    def close(self) -> None:
        if self._handle:
            with self.context:
                self.context.driver.attempt("cuModuleUnload", self._handle)
            self._handle = 0


def launch(
    context: Context, kernel: int, grid: tuple[int, int], threads: int, stream: int, *args: int
) -> None:
    """Queue a kernel whose parameters are all 64-bit. The context is current."""
    values = (ctypes.c_uint64 * len(args))(*args)
    pointers = (ctypes.c_uint64 * len(args))(
        *(ctypes.addressof(values) + 8 * n for n in range(len(args)))
    )
    context.driver.call("cuLaunchKernel", kernel, *grid, 1, threads, 1, 1, 0, stream, pointers, 0)


class Gather:
    """Launches of the kernel on one stream; the piece lists sit in pinned memory."""

    def __init__(self, context: Context, line: Timeline) -> None:
        self._context = context
        self._line = line
        self._module = Module(context, PTX)
        self._kernel = self._module.kernel("gather")
        pointer = ctypes.c_uint64()
        size = _SLOTS * 3 * _PIECES * 8
        with context:
            context.driver.call("cuMemHostAlloc", ctypes.byref(pointer), size, 3)
        self._address = pointer.value
        raw = (ctypes.c_uint64 * (size // 8)).from_address(self._address)
        self._lists = np.frombuffer(memoryview(raw), np.uint64).reshape(_SLOTS, 3, _PIECES)
        self._ticks = [0] * _SLOTS
        self._turn = 0

    @staticmethod
    def takes(dst: Addresses, src: Addresses, sizes: npt.NDArray[np.uint64]) -> bool:
        """True if every address and size is a multiple of 16."""
        joined = np.bitwise_or.reduce(dst) | np.bitwise_or.reduce(src)
        return int(joined | np.bitwise_or.reduce(sizes)) % _VECTOR == 0

    def copy(self, dst: Addresses, src: Addresses, sizes: npt.NDArray[np.uint64]) -> None:
        """Queue the copies on the stream of this object. The context is current."""
        for first in range(0, len(dst), _PIECES):
            part = slice(first, first + _PIECES)
            self._launch(dst[part], src[part], sizes[part])

    def _launch(self, dst: Addresses, src: Addresses, sizes: npt.NDArray[np.uint64]) -> None:
        slot, n = self._turn, len(dst)
        self._turn = (slot + 1) % _SLOTS
        self._line.wait(self._ticks[slot])
        lists = self._lists[slot]
        lists[0, :n], lists[1, :n], lists[2, :n] = dst, src, sizes
        blocks = min(max(-(-int(sizes.max()) // _BLOCK_BYTES), 1), _MOST_BLOCKS)
        address = self._address + slot * 3 * _PIECES * 8
        arrays = (address, address + _PIECES * 8, address + 2 * _PIECES * 8)
        stream = self._line.stream
        launch(self._context, self._kernel, (blocks, n), _THREADS, stream, *arrays)
        self._ticks[slot] = self._line.mark()

    def close(self) -> None:
        """The stream is idle when this is called."""
        self._module.close()
        if self._address:
            with self._context:
                self._context.driver.attempt("cuMemFreeHost", self._address)
            self._address = 0
            self._lists = np.zeros((0, 3, 0), np.uint64)
