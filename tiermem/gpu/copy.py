"""Routes between GPU frames and host slots: one batched call a group, through the aliases."""

from __future__ import annotations

import ctypes
import threading
import time
from collections import deque
from typing import Final

import numpy as np
import numpy.typing as npt

from tiermem.errors import Closed
from tiermem.gpu.driver import Context, CudaError, DeviceLost
from tiermem.gpu.gather import Gather
from tiermem.gpu.routine import Routine
from tiermem.gpu.streams import NON_BLOCKING, CudaDone, CudaStreams, Gate, Timeline, Words
from tiermem.slices import Sliced, cuts
from tiermem.tier import PASSED, Addresses, Fence, Memory, Place, Slots

Sizes = npt.NDArray[np.uint64]

_BATCH: Final = 2048  # entries a call: enqueuing them takes 1.0 ms (FACTS "Copies", H200)
_QUEUED: Final = 8192  # entries in flight before submit blocks: the driver's own ring would too
_SPIN_BYTES: Final = 4 << 20  # copies up to this size are waited for by spinning (80 us)
# Bytes between two gates. A page faulted in beside copies down takes 171, 321 or 1,050 us with
# 8, 16 MiB or no gates; both ways at once run at 95, 98 or 100 GB/s (bench gpu_floor, H200).
_GATED: Final = 16 << 20
_FASTER: Final = 1.15  # than measured, so that nobody sleeps past the end of a copy
# Copies of 256 KiB reach 53.9 GB/s and of 2 MiB 54.8 (FACTS "Copies", H200); 32 MiB take 0.6 ms.
_SLICE: Final = 1 << 20
_SLICED: Final = 32 << 20
# CUmemcpyAttributes: source access in stream order, no location hints, no flags.
_STREAM_ORDER: Final = np.array([1, 0, 0, 0, 0, 0], np.uint32)
_FROM_ENTRY_0: Final = np.zeros(1, np.uint64)


def open_stream(context: Context) -> int:
    """A stream that does not synchronise with the default stream."""
    handle = ctypes.c_uint64()
    with context:
        context.driver.call("cuStreamCreateWithPriority", ctypes.byref(handle), NON_BLOCKING, 0)
    return handle.value


class Lane:
    """One stream of ours with its timeline: work in one direction, in order, one caller at a time.

    gather_below: pieces smaller than this many bytes go through the gather kernel.
    gbps: the link's measured rate this way, by which waits know how long to sleep; 0 if unknown.
    gate: what copies of this lane make way for, 16 MiB (0.3 ms) at a time.
    """

    def __init__(
        self,
        context: Context,
        words: Words,
        gather_below: int = 0,
        gbps: float = 0.0,
        gate: Gate | None = None,
    ) -> None:
        self.context = context
        self.lock = threading.Lock()
        self.closed = False
        self.gather_below = gather_below
        self._gbps = gbps
        self._gate = gate
        self._due = 0.0
        self.line = Timeline(words, open_stream(context))
        # Made now: loading a module may wait for running kernels.
        self._gather = Gather(context, self.line) if gather_below else None
        entry = np.zeros(4, np.uint64)  # to, from, bytes, which of the entries failed
        self._entry = entry.data
        self._one = self._batch_of_one(entry) if self._has_batches() else None
        self._failure: CudaError | None = None
        self._queued: deque[tuple[int, int]] = deque()
        self._entries = 0

    def _has_batches(self) -> bool:
        return self.context.driver.has("cuMemcpyBatchAsync")

    def _batch_of_one(self, entry: npt.NDArray[np.uint64]) -> Routine:
        """entry: where its destination, source and size stand, a word each."""
        to, start, size, failed = (entry.ctypes.data + 8 * i for i in range(4))
        how, first = _STREAM_ORDER.ctypes.data, _FROM_ENTRY_0.ctypes.data
        stream = self.line.stream
        return self.line.marking(
            ("cuMemcpyBatchAsync", to, start, size, 1, how, first, 1, failed, stream)
        )

    def takes_one(self, nbytes: int) -> bool:
        """Whether `copy_one` copies a piece of this size as `copy` would."""
        return self._one is not None and self._gate is None and nbytes >= self.gather_below

    def copy_one(self, dst: int, src: int, nbytes: int) -> CudaDone:
        """`copy` of one piece that it `takes_one`, for half the time; call with the lock held."""
        self.admit(1)
        assert self._one is not None, "asked before"
        self._entry[0], self._entry[1], self._entry[2] = dst, src, nbytes
        try:
            return self.done(1, nbytes, self._one)
        except CudaError as error:
            self._abandon(error)
            raise

    def copy(self, dst: Addresses, src: Addresses, sizes: Sizes) -> CudaDone:
        """Queue n copies; call with the lock held and the context current.

        On an error nothing of the group is running any more when it is raised.
        """
        self.admit(len(dst))
        try:
            self._copy(dst, src, sizes)
            return self.done(len(dst), int(sizes.sum()))
        except CudaError as error:
            self._abandon(error)
            raise

    def _abandon(self, error: CudaError) -> None:
        if isinstance(error, DeviceLost):
            self._failure = self.line.failure = error
        else:
            self.line.wait(self.line.mark())

    def _copy(self, dst: Addresses, src: Addresses, sizes: Sizes) -> None:
        if int(sizes.max()) < self.gather_below and Gather.takes(dst, src, sizes):
            if self._gather is None:
                self._gather = Gather(self.context, self.line)
            self._gather.copy(dst, src, sizes)
        elif self._has_batches():
            together = _BATCH
            if self._gate is not None:
                together = min(max(_GATED // int(sizes.max()), 1), _BATCH)
            for first in range(0, len(dst), together):
                part = slice(first, first + together)
                if self._gate is not None:
                    self._gate.pass_through(self.line.stream)
                self._batch(dst[part], src[part], sizes[part])
        else:
            for to, start, size in zip(dst.tolist(), src.tolist(), sizes.tolist(), strict=True):
                self.context.driver.call("cuMemcpyAsync", to, start, size, self.line.stream)

    def _batch(self, dst: Addresses, src: Addresses, sizes: Sizes) -> None:
        failed = ctypes.c_uint64(len(dst))
        code = self.context.driver.attempt(
            "cuMemcpyBatchAsync",
            dst.ctypes.data,
            src.ctypes.data,
            sizes.ctypes.data,
            len(dst),
            _STREAM_ORDER.ctypes.data,
            _FROM_ENTRY_0.ctypes.data,
            1,
            ctypes.byref(failed),
            self.line.stream,
        )
        if code:
            at = f"entry {failed.value} of {len(dst)}" if failed.value < len(dst) else ""
            raise self.context.driver.error("cuMemcpyBatchAsync", code, at)

    def zero(self, addresses: Addresses, nbytes: int) -> CudaDone:
        """Queue filling with zeros; call with the lock held and the context current."""
        self.admit(len(addresses))
        driver = self.context.driver
        try:
            for address in addresses.tolist():
                driver.call("cuMemsetD32Async", address, 0, nbytes // 4, self.line.stream)
            return self.done(len(addresses), 0)
        except CudaError as error:
            self._abandon(error)
            raise

    def admit(self, entries: int) -> None:
        """Refuse after close or a lost device; wait while too many entries are in flight."""
        if self.closed:
            raise Closed("copy: the route or its device is closed")
        if self._failure is not None:
            raise self._failure
        while self._queued and (
            self._entries + entries > _QUEUED or self.line.passed(self._queued[0][0])
        ):
            tick, n = self._queued.popleft()
            if not self.line.passed(tick):
                self.line.wait(tick)
            self._entries -= n
        if self.line.failure is not None:
            raise self.line.failure

    def done(self, entries: int, nbytes: int, work: Routine | None = None) -> CudaDone:
        """Mark the end of what was just queued, or of this work, which is queued now."""
        tick = self.line.mark(work)
        self._queued.append((tick, entries))
        self._entries += entries
        if nbytes <= _SPIN_BYTES:
            return CudaDone(self.line, tick)
        if self._gbps:
            took_s = nbytes / (_FASTER * self._gbps * 1e9)
            self._due = max(time.perf_counter(), self._due) + took_s
        return CudaDone(self.line, tick, 0.0, self._due)

    def close(self) -> None:
        """Wait for what is queued, then free; a second call does nothing."""
        with self.lock:
            if self.closed:
                return
            self.closed = True
        driver = self.context.driver
        with self.context:
            driver.attempt("cuStreamSynchronize", self.line.stream)
            if self._gather is not None:
                self._gather.close()
            self.line.close()
            driver.attempt("cuStreamDestroy", self.line.stream)


class CudaRoute:
    """Copies whole slots one way between two memories; see `tier.Route`.

    Its Dones can be ordered: a stream may wait for a copy without the host.
    """

    def __init__(
        self, lane: Lane, streams: CudaStreams, source: Memory, destination: Memory
    ) -> None:
        self.src: Place = source.place
        self.dst: Place = destination.place
        self._lane = lane
        self._streams = streams
        self._source = source
        self._destination = destination
        self._slot_bytes = min(source.slot_bytes, destination.slot_bytes)
        self._sizes: Sizes = np.full(_BATCH, self._slot_bytes, np.uint64)
        self._closed = False

    @property
    def stream(self) -> int:
        """The CUstream of this route, for work that a caller orders behind or before its copies."""
        return self._lane.line.stream

    def submit(self, src: Slots, dst: Slots, after: Fence) -> CudaDone:
        n = len(src)
        start, to = self._source.addresses(src), self._destination.addresses(dst)
        if n == 1 and not after.ticks and self._lane.takes_one(self._slot_bytes):
            with self._lane.lock:
                self._refuse_closed()
                return self._lane.copy_one(to.item(), start.item(), self._slot_bytes)
        if n > len(self._sizes):
            self._sizes = np.full(n, self._slot_bytes, np.uint64)
        return self.submit_pieces(start, to, self._sizes[:n], after)

    def submit_slices(self, src: Slots, dst: Slots, after: Fence) -> CudaDone | Sliced:
        """`submit` for who reads the slots from front to back: large groups come in slices."""
        parts = list(cuts(len(src), self._slot_bytes, _SLICE, _SLICED))
        if len(parts) == 1:
            return self.submit(src, dst, after)
        start, to = self._source.addresses(src), self._destination.addresses(dst)
        dones = []
        for first, end in parts:
            at, sizes = np.uint64(first), np.full(len(src), end - first, np.uint64)
            dones.append(self.submit_pieces(start + at, to + at, sizes, after))
            after = PASSED
        return Sliced([first for first, _ in parts], dones)

    def submit_pieces(self, src: Addresses, dst: Addresses, sizes: Sizes, after: Fence) -> CudaDone:
        """Copy sizes[i] bytes from src[i] to dst[i] once `after` has passed; else as `submit`.

        For pieces smaller than a slot; which way they go was measured (`calibrate`).
        """
        lane = self._lane
        with lane.lock, lane.context:
            self._refuse_closed()
            self._streams.order(lane.line.stream, after)
            return lane.copy(
                np.ascontiguousarray(dst), np.ascontiguousarray(src), np.ascontiguousarray(sizes)
            )

    def _refuse_closed(self) -> None:
        if self._closed:
            raise Closed("copy: this route is closed")

    def close(self) -> None:
        """Refuse new work and wait for what was submitted; a second call does nothing."""
        with self._lane.lock:
            self._closed = True
        self._lane.close()
