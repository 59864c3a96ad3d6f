"""What there is to reach: one large copy each way and both, and what the driver's calls cost.

Nothing here goes through our routes, so these figures judge them. They are judged in turn: after
each round another tool copies as much, in code that is not ours (`offload_verify`).
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from tiermem.assemble import near
from tiermem.bench import offload_verify as verify
from tiermem.bench.offload_run import Run
from tiermem.bench.result import Direction
from tiermem.bench.rig import Lap, Watch
from tiermem.host.pinned import HostPool, Register
from tiermem.tier import GPU, HOST, Place

MEMMOVE_BYTES = 64 << 20
COPY_BYTES = 256 << 20
READY_S = 60.0
FLOOR_CALLS = 64
WAYS: tuple[tuple[tuple[Place, Place], ...], ...] = (
    ((GPU, HOST),),
    ((HOST, GPU),),
    ((HOST, GPU), (GPU, HOST)),
)


def ceilings(run: Run) -> None:
    """One large copy down, up, and both at once."""
    (_cuda_ceilings if run.settings.cuda else _memory_ceilings)(run)


def _measure(run: Run, path: str, nbytes: int, copy: Callable[[tuple[bool, ...]], None]) -> None:
    """copy: moves `nbytes` in each of the given directions (True: to the GPU) and waits."""
    other = verify.copies(run)
    for ways in WAYS:
        ends = ways[0]
        directions = tuple(dst is GPU for _, dst in ways)
        both = len(ways) > 1
        names = (run.end_name(ends[0]), run.end_name(ends[1]))
        run.told.begin(f"ceiling: {names[0]} to {names[1]}{', both ways' if both else ''}")

        theirs: list[float] = []

        def lap(
            seconds: float,
            directions: tuple[bool, ...] = directions,
            theirs: list[float] = theirs,
        ) -> Lap:
            watch, until, n = Watch(), time.perf_counter() + seconds, 0
            while not n or time.perf_counter() < until:
                copy(directions)
                n += len(directions)
            ours = watch.lap(n * nbytes)
            if other is not None:
                theirs.append(other.gbps(directions, seconds))
            return ours

        direction: Direction = "both" if both else "one-way"
        laps = run.for_a_while(lap)
        run.add(names, nbytes, 1, laps, path, direction=direction, work="ceiling")
        if other is not None:
            verify.check_copies(run, run.rows[-1], other.tool, theirs[1:])


def _memory_ceilings(run: Run) -> None:
    """memmove between two host buffers: all that the CPU device can do."""
    with HostPool(MEMMOVE_BYTES, 4) as pool, ThreadPoolExecutor(2) as threads:
        pool.wait_ready(4, READY_S)
        at = pool.addresses(np.arange(4, dtype=np.int32)).tolist()
        pairs = {False: (at[0], at[1]), True: (at[2], at[3])}

        def move(up: bool) -> None:
            src, dst = pairs[up]
            ctypes.memmove(dst, src, MEMMOVE_BYTES)

        def copy(directions: Sequence[bool]) -> None:
            if len(directions) == 1:
                move(directions[0])
            else:
                list(threads.map(move, directions))

        _measure(run, "memmove", MEMMOVE_BYTES, copy)


def _cuda_ceilings(run: Run) -> None:
    """cuMemcpyAsync between pinned memory and device memory, a stream for each direction."""
    from tiermem.gpu.copy import open_stream
    from tiermem.gpu.vmm import CudaDevice

    device = CudaDevice(run.settings.index, COPY_BYTES, 2)
    try:
        call = device.context.driver.call
        register = Register(device.register, device.unregister)
        with HostPool(COPY_BYTES, 2, register=register, cpus=near(device)) as pool:
            pool.wait_ready(2, READY_S)
            slots = np.arange(2, dtype=np.int32)
            device.frames.wait_ready()
            host, frames = pool.addresses(slots).tolist(), device.frames.addresses(slots).tolist()
            streams = [open_stream(device.context) for _ in slots]

            def copy(directions: Sequence[bool]) -> None:
                for up in directions:
                    dst, src = (frames[1], host[1]) if up else (host[0], frames[0])
                    call("cuMemcpyAsync", dst, src, COPY_BYTES, streams[up])
                for up in directions:
                    call("cuStreamSynchronize", streams[up])

            with device.context:
                _measure(run, "one cuMemcpyAsync", COPY_BYTES, copy)
                for stream in streams:
                    call("cuStreamDestroy", stream)
    finally:
        device.close()


def driver_floors(run: Run, page: int) -> None:
    """us a page of the driver's own calls, 64 of them in one native program."""
    from tiermem.gpu.driver import Context, load
    from tiermem.gpu.frames import DEVICE, Backing, reserve
    from tiermem.native import Kind, Program, group

    run.told.begin("driver floors: create, map, access, unmap, release")
    context = Context(load(), run.settings.index)
    driver, n = context.driver, FLOOR_CALLS
    backing = Backing(context, DEVICE, context.device)
    times: dict[str, list[float]] = {}
    with context:
        start = reserve(context, n * page, page)
        at = np.arange(n, dtype=np.uint64) * np.uint64(page) + np.uint64(start)
        handles = np.zeros(n, np.uint64)
        into = np.arange(n, dtype=np.uint64) * np.uint64(8) + np.uint64(handles.ctypes.data)
        access, descs = backing.access.ctypes.data, len(backing.access) // 3
        calls = {
            "cuMemCreate": (into, page, backing.prop.ctypes.data, 0),
            "cuMemMap": (at, page, 0, handles, 0),
            "cuMemSetAccess": (at, page, access, descs),
            "cuMemUnmap": (at, page),
            "cuMemRelease": (handles,),
        }
        for _ in range(run.settings.rounds + 1):
            for name, columns in calls.items():
                program = Program(group(driver.address(name), Kind.STATUS, *columns))
                began = time.perf_counter()
                failure = program.run()
                times.setdefault(name, []).append((time.perf_counter() - began) / n * 1e6)
                if failure is not None:
                    raise driver.error(name, failure.code)
        driver.call("cuMemAddressFree", start, n * page)
    context.close()
    for name, samples in times.items():
        run.figure(f"driver.{name}", "us/page", samples[1:])
