"""What only GPUs have: host pages read in place, several GPUs at once, copies between them."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from tiermem.bench.offload_routes import IN_FLIGHT, MAIN_GROUP, bare
from tiermem.bench.offload_run import Run, Settings
from tiermem.bench.offload_stream import end, stream
from tiermem.bench.result import Direction
from tiermem.bench.rig import Lap, Watch
from tiermem.tier import GPU, HOST, PASSED
from tiermem.units import format_exactly

if TYPE_CHECKING:
    from tiermem.gpu.vmm import CudaDevice

IN_PLACE_BYTES = 128 << 20
PEER_BYTES = 256 << 20
KERNEL_ONLY = 1 << 30
"""Bytes below which pieces go through the gather kernel: all of them."""


@contextmanager
def context_kept(settings: Settings) -> Iterator[None]:
    """Keep the primary context while parts of a run open and close the device: otherwise each of
    them makes it anew. Nothing without CUDA."""
    if not settings.cuda:
        yield
        return
    from tiermem.gpu.driver import Context, load

    context = Context(load(), settings.index)
    try:
        yield
    finally:
        context.close()


def in_place(run: Run, page: int) -> None:
    """A kernel reads host pages at the pages' own GPU addresses; what showing them costs."""
    from tiermem.gpu.calibrate import Calibration
    from tiermem.gpu.vmm import CudaDevice

    run.told.begin(f"read in place, {format_exactly(page)} pages")
    n = max(2, IN_PLACE_BYTES // page)
    settings = Calibration(
        page_bytes=page, gather_below_down=KERNEL_ONLY, gather_below_up=KERNEL_ONLY
    )
    index = run.settings.index
    device = CudaDevice(index, page, n, calibration=settings)
    try:
        _in_place(run, device, page, n)
    finally:
        device.close()


def _in_place(run: Run, device: CudaDevice, page: int, n: int) -> None:
    device.frames.wait_ready()
    window, name = device.window, format_exactly(page)
    began = time.perf_counter()
    host = device.host_pages(n)
    run.figure(f"in-place.create.{name}", "us/page", [(time.perf_counter() - began) / n * 1e6])
    start = device.reserve(n * page)
    at = np.arange(n, dtype=np.uint64) * np.uint64(page) + np.uint64(start)
    slots = np.arange(n, dtype=np.int32)
    into, sizes = device.frames.addresses(slots), np.full(n, page, np.uint64)
    kernel = device.routes(host)[1]
    shows: list[float] = []
    hides: list[float] = []

    def lap(seconds: float) -> Lap:
        began = time.perf_counter()
        end([window.show_in_place(at, slots, host.arena)])
        shows.append((time.perf_counter() - began) / n * 1e6)
        watch, until, reads = Watch(), time.perf_counter() + seconds, 0
        while not reads or time.perf_counter() < until:
            end([kernel.submit_pieces(at, into, sizes, PASSED)])
            reads += 1
        read = watch.lap(reads * n * page)
        began = time.perf_counter()
        end([window.hide(at)])
        hides.append((time.perf_counter() - began) / n * 1e6)
        return read

    laps = run.for_a_while(lap)
    device.release(start, n * page)
    ends = (run.end_name(HOST), run.end_name(GPU, device.context.index))
    run.add(ends, page, n, laps, "kernel at the page's address", route="in-place")
    run.figure(f"in-place.show.{name}", "us/page", shows[1:])
    run.figure(f"in-place.hide.{name}", "us/page", hides[1:])


def together(run: Run, page: int, count: int) -> None:
    """The routes between host and GPU on all GPUs at once, each with memory of its own."""
    with ExitStack() as stack:
        rigs = [
            stack.enter_context(bare(run.settings, page, gpu=i, disk=False)) for i in range(count)
        ]
        for ends in ((GPU, HOST), (HOST, GPU)):
            src, dst = (place.name.lower() for place in ends)
            run.told.begin(f"{src} to {dst}, {count} GPUs at once")
            lanes = [rig.lane(ends) for rig in rigs]
            group = min(MAIN_GROUP, min(rig.n for rig in rigs) // 2)
            laps = run.for_a_while(partial(stream, lanes, group, IN_FLIGHT, page))
            names = (run.end_name(ends[0]), run.end_name(ends[1]))
            run.add(names, page, group, laps, rigs[0].parts.paths[ends], gpus=count)


def peers(run: Run) -> None:
    """Large copies from GPU 0 to GPU 1 and both ways, by torch; a note where it is not there."""
    if importlib.util.find_spec("torch") is None:
        run.note("gpu-gpu left out: it is measured through torch, which is not installed")
        return
    import torch

    if torch.cuda.device_count() < 2:
        run.note("gpu-gpu left out: torch sees fewer than two GPUs")
        return
    buffers = [torch.zeros(PEER_BYTES, dtype=torch.uint8, device=f"cuda:{i}") for i in (0, 0, 1, 1)]
    pairs = ((buffers[0], buffers[2]), (buffers[3], buffers[1]))
    path = "peer copy" if torch.cuda.can_device_access_peer(0, 1) else "copy through the host"
    for ways in (1, 2):
        run.told.begin(f"gpu 0 to gpu 1{', both ways' if ways == 2 else ''}")

        def lap(seconds: float, ways: int = ways) -> Lap:
            watch, until, n = Watch(), time.perf_counter() + seconds, 0
            while not n or time.perf_counter() < until:
                for src, dst in pairs[:ways]:
                    dst.copy_(src, non_blocking=True)
                torch.cuda.synchronize(0)
                torch.cuda.synchronize(1)
                n += ways
            return watch.lap(n * PEER_BYTES)

        laps = run.for_a_while(lap)
        names = (run.end_name(GPU, 0), run.end_name(GPU, 1))
        direction: Direction = "both" if ways == 2 else "one-way"
        run.add(names, PEER_BYTES, 1, laps, path, direction=direction, work="ceiling")
