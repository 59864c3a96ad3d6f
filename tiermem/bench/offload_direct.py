"""GPU memory to the drive and back through kvikio: what a direct route could carry.

No tier uses it: nothing here can check on the GPU what was read (`nvme/kvikio`). Which way kvikio
really takes is found by a probe in a child process first, because cuFile can hang.
"""

from __future__ import annotations

import importlib.util
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from tiermem.bench.offload_run import Run
from tiermem.bench.rig import Lap, Watch
from tiermem.errors import TierFailed
from tiermem.nvme import kvikio
from tiermem.nvme.kvikio import DirectFile, KvikioFile, Pending
from tiermem.nvme.slab import Slab
from tiermem.tier import GPU, NVME
from tiermem.units import format_exactly

PAGES = 128
DEPTHS = (8, 32)
PROBE_S = 12.0


def direct(run: Run, page: int) -> None:
    """Both directions at every depth; a note with the reason where kvikio carries nothing."""
    assert run.settings.nvme is not None, "planned with a drive only"
    absent = [name for name in ("kvikio", "cupy") if importlib.util.find_spec(name) is None]
    if absent:
        run.note(
            f"GPU to NVMe by kvikio left out: {' and '.join(absent)} not installed "
            "(pip install 'tiermem[gds]' and cupy)"
        )
        return
    run.told.begin("kvikio: which way does it take")
    probe = kvikio.probe(run.settings.nvme, timeout_s=PROBE_S)
    if probe.path == "none":
        run.note(f"GPU to NVMe by kvikio left out: {probe.reason}")
        return
    if probe.reason:
        run.note(f"kvikio goes by {probe.path}: {probe.reason.rstrip('; ')}")
    from tiermem.gpu.vmm import CudaDevice

    index = run.settings.index
    device = CudaDevice(index, page, PAGES, PAGES)
    try:
        device.frames.wait_ready()
        frames = device.frames.addresses(np.arange(PAGES, dtype=np.int32)).tolist()
        slab = Slab(run.settings.nvme, page, PAGES)
        try:
            slab.wait_ready(PAGES)
            run.written += PAGES * page
            file = KvikioFile(slab, compat=probe.path == "compat")
            try:
                offsets = [slab.offset(i) for i in range(PAGES)]
                with device.context:
                    rows(run, file, frames, offsets, page, f"kvikio {probe.path}, unchecked")
            finally:
                file.close()
        finally:
            slab.close()
    finally:
        device.close()


def rows(
    run: Run,
    file: DirectFile,
    frames: Sequence[int],
    offsets: Sequence[int],
    page: int,
    path: str,
) -> None:
    """frames, offsets: where each page is in memory and in the file. Writes before it reads."""
    for storing in (True, False):
        call = file.pwrite if storing else file.pread
        ends = (GPU, NVME) if storing else (NVME, GPU)
        names = (run.end_name(ends[0]), run.end_name(ends[1]))
        for depth in DEPTHS:
            run.told.begin(f"{names[0]} to {names[1]} by kvikio, {format_exactly(page)} x {depth}")
            laps = run.for_a_while(partial(_lap, call, frames, offsets, page, depth))
            if storing:
                run.written += sum(lap.nbytes for lap in laps)
            run.add(names, page, depth, laps, path, work="kvikio")


def _lap(
    call: Callable[[int, int, int], Pending],
    frames: Sequence[int],
    offsets: Sequence[int],
    page: int,
    depth: int,
    seconds: float,
) -> Lap:
    """`depth` reads or writes in flight, over all pages in turn, in a fixed random order."""
    order = np.random.default_rng(depth).permutation(len(frames)).tolist()
    flying: deque[Pending] = deque()
    watch, until, n = Watch(), time.perf_counter() + seconds, 0
    try:
        while not n or time.perf_counter() < until:
            if len(flying) == depth:
                _end(flying.popleft(), page)
            at = order[n % len(order)]
            flying.append(call(frames[at], page, offsets[at]))
            n += 1
        while flying:
            _end(flying.popleft(), page)
    except RuntimeError as error:  # kvikio's only kind, without an errno
        raise TierFailed(f"kvikio: {error}") from error
    return watch.lap(n * page)


def _end(pending: Pending, page: int) -> None:
    moved = pending.get()
    if moved != page:
        raise TierFailed(f"kvikio moved {moved} of {page} bytes")


def steps() -> int:
    """How many measurements `direct` announces."""
    return 1 + 2 * len(DEPTHS)
