"""A bf16 GEMM beside continuous paging in both directions; a section of `gpu_pager.py`."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable
from contextlib import closing

import numpy as np

from tiermem.bench import paging
from tiermem.bench.rig import AHEAD, Lap, Shape, rig

SIDE = 8192
GEMMS = 32  # in one graph, so that launching costs no Python: about 55 ms on an H200
ROUNDS = 40


class Paging:
    """A thread that swaps two working sets, round after round, until it is told to stop."""

    def __init__(self, shape: Shape) -> None:
        self._shape = shape
        self._stop = threading.Event()
        self._warm = threading.Event()
        self.laps: list[Lap] = []
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        try:
            with rig(self._shape, "lazy", AHEAD) as r, closing(paging.swap(r)) as laps:
                for lap in laps:
                    self.laps.append(lap)
                    self._warm.set()
                    if self._stop.is_set():
                        return
        except BaseException as error:
            self.error = error
            self._warm.set()

    def __enter__(self) -> Paging:
        self._thread.start()
        self._warm.wait(120)
        self.laps.clear()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join()
        if self.error is not None:
            raise self.error


def gemm(device: str) -> dict[str, object]:
    """ms a graph of GEMMs alone and beside swapping 2 and 8 MiB pages, in turns; GB/s swapped."""
    replay = _replayer(device)
    found: dict[str, object] = {}
    for name, shape in _shapes(device).items():
        alone = [replay() for _ in range(ROUNDS)]
        with Paging(shape) as beside:
            busy = [replay() for _ in range(ROUNDS)]
            while not beside.laps and beside.error is None:
                time.sleep(0.01)
            swapped = [lap.gbps for lap in beside.laps]
        alone += [replay() for _ in range(ROUNDS)]
        slower = 100.0 * (statistics.median(busy) / statistics.median(alone) - 1.0)
        found |= {
            f"gemm_alone_{name}_ms": alone,
            f"gemm_beside_{name}_ms": busy,
            f"gemm_slower_{name}_percent": [slower],
            f"swap_beside_{name}_gbps": swapped,
        }
    return found


def _shapes(device: str) -> dict[str, Shape]:
    if device == "cpu":
        return {"64KiB": Shape(device, 65536, 256)}
    return {"2MiB": Shape(device, 2 << 20, 2048), "8MiB": Shape(device, 8 << 20, 512)}


def _replayer(device: str) -> Callable[[], float]:
    """Runs the GEMMs once; ms that took, on the device's own clock where it has one."""
    if device == "cpu":
        a = np.ones((256, 256), np.float32)

        def run() -> float:
            start = time.perf_counter()
            a @ a
            return (time.perf_counter() - start) * 1e3

        return run
    import torch

    a = torch.randn(SIDE, SIDE, device="cuda", dtype=torch.bfloat16)
    b = torch.randn(SIDE, SIDE, device="cuda", dtype=torch.bfloat16)
    c = torch.empty(SIDE, SIDE, device="cuda", dtype=torch.bfloat16)
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    with torch.cuda.stream(stream):
        torch.matmul(a, b, out=c)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(GEMMS):
            torch.matmul(a, b, out=c)

    def replay() -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        with torch.cuda.stream(stream):
            start.record()
            graph.replay()
            end.record()
        end.synchronize()
        return float(start.elapsed_time(end))

    for _ in range(5):  # clocks settle
        replay()
    return replay
