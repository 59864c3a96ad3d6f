"""Our figures beside tools that share no code with us, taken turn about in the same run.

The link: plain large copies, on a GPU by torch with CUDA events, on the CPU device by numpy. The
drive: fio on the file that our own threads use, with a thread for each read or write in flight as
they have it; against io_uring `bench nvme` compares them.
"""

from __future__ import annotations

import importlib.util
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Protocol

import numpy as np

from tiermem.bench import fio, nvme, words
from tiermem.bench.offload_run import Run, Settings
from tiermem.bench.result import Check, Row
from tiermem.units import format_exactly

if TYPE_CHECKING:
    import torch

COPY_BYTES = 256 << 20
NUMPY_BYTES = 64 << 20
DISK_PAGE = 2 << 20
DISK_DEPTH = 8
DISK_SECONDS = 0.25
DISK_ROUNDS = 9
"""A shared drive moves by 20 % within a minute (H200 machine, 2026-11): three rounds of 0.5 s said
nothing. Nine pairs are the fewest whose interval leaves the worst one out at either end."""
DISK_BYTES = 256 << 20

Ways = tuple[bool, ...]
"""Directions at once: True to the GPU, False from it."""


class Copies(Protocol):
    """Plain large copies by somebody else's code."""

    tool: str

    def gbps(self, ways: Ways, seconds: float) -> float:
        """Copy in the given directions at once for about so long; the rate of all together."""


class NumpyCopies:
    """numpy between two buffers of its own, as the CPU device has no link."""

    tool = f"numpy, copies of {format_exactly(NUMPY_BYTES)}"

    def __init__(self) -> None:
        self._pairs = [[np.ones(NUMPY_BYTES, np.uint8) for _ in range(2)] for _ in range(2)]

    def gbps(self, ways: Ways, seconds: float) -> float:
        began, n = time.perf_counter(), 0
        with ThreadPoolExecutor(len(ways)) as threads:
            while not n or time.perf_counter() - began < seconds:
                if len(ways) == 1:  # handing it over takes 2 % of a copy
                    self._copy(ways[0])
                else:
                    list(threads.map(self._copy, ways))
                n += len(ways)
        return n * NUMPY_BYTES / (time.perf_counter() - began) / 1e9

    def _copy(self, up: bool) -> None:
        src, dst = self._pairs[up]
        np.copyto(dst, src)


class TorchCopies:
    """torch between pinned and device memory of its own; the time is that of CUDA events."""

    def __init__(self, index: int) -> None:
        import torch

        self.tool = (
            f"torch {torch.__version__}, copies of {format_exactly(COPY_BYTES)}, CUDA events"
        )
        self._torch = torch
        self._device = torch.device("cuda", index)
        self._pairs: list[tuple[torch.Tensor, torch.Tensor]] = []
        for up in (False, True):
            host = torch.ones(COPY_BYTES, dtype=torch.uint8).pin_memory()
            there = torch.ones(COPY_BYTES, dtype=torch.uint8, device=self._device)
            self._pairs.append((host, there) if up else (there, host))
        self._streams = [torch.cuda.Stream(self._device) for _ in range(2)]  # type: ignore[no-untyped-call]

    def gbps(self, ways: Ways, seconds: float) -> float:
        n = 4
        while True:
            took_s = self._timed(ways, n)
            if took_s >= seconds:
                return n * len(ways) * COPY_BYTES / took_s / 1e9
            n *= 2

    def _timed(self, ways: Ways, n: int) -> float:
        """Seconds from the first copy's start to the last one's end, `n` in each direction."""
        torch = self._torch
        events = []
        torch.cuda.synchronize(self._device)
        for up in ways:
            src, dst = self._pairs[up]
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            with torch.cuda.stream(self._streams[up]):
                start.record()
                for _ in range(n):
                    dst.copy_(src, non_blocking=True)
                stop.record()
            events.append((start, stop))
        torch.cuda.synchronize(self._device)
        first = events[0][0]
        took_ms: float = max(first.elapsed_time(stop) for _, stop in events)
        return took_ms / 1e3


def copies(run: Run) -> Copies | None:
    """Who measures the link beside us; None, and a note, where there is nobody."""
    if not run.settings.verify:
        return None
    if not run.settings.cuda:
        return NumpyCopies()
    if importlib.util.find_spec("torch") is None:
        run.note("the link was not checked: that is done through torch, which is not installed")
        return None
    import torch

    if not torch.cuda.is_available():
        run.note("the link was not checked: this torch has no CUDA")
        return None
    try:
        found = TorchCopies(run.settings.index)
        found.gbps((True, False), 0.01)
    except RuntimeError as error:  # torch's kind for a device that it cannot use, or that is full
        run.note(f"the link was not checked: torch says {str(error).splitlines()[0]}")
        return None
    return found


def check_copies(run: Run, row: Row, tool: str, theirs_gbps: list[float]) -> None:
    """Our large copies, and later our best route, beside theirs; taken turn about."""
    what = f"{words.title(row)} ({row.src} to {row.dst})"
    run.checks.append(Check.of(what, tool, row.gbps.rounds, theirs_gbps))
    if row.direction == "one-way" and run.settings.cuda:
        run.theirs[row.src, row.dst] = (tool, tuple(theirs_gbps))


def check_routes(run: Run) -> None:
    """The fastest batched route each way beside the independent copies of the same run."""
    for (src, dst), (tool, theirs) in run.theirs.items():
        rows = [
            row
            for row in run.rows
            if (row.src, row.dst, row.work, row.beside) == (src, dst, "", "")
            and row.direction == "one-way"
            and row.gpus == 1
        ]
        if rows:
            best = max(rows, key=lambda row: row.gbps.median)
            what = f"{words.title(best)} ({src} to {dst})"
            run.checks.append(Check.of(what, tool, best.gbps.rounds, theirs, turns=False))


def disk(run: Run) -> None:
    """Our threads and our route beside fio, on one file, in turns; a note where there is no fio."""
    assert run.settings.nvme is not None, "planned with a drive only"
    tool = fio.version()
    if tool is None:
        run.note("the drive was not checked: fio is not installed (apt install fio)")
        return
    found = nvme.run(
        run.settings.nvme,
        page=DISK_PAGE,
        nbytes=DISK_BYTES // 2 if run.settings.quick else DISK_BYTES,
        depths=(DISK_DEPTH,),
        seconds=min(DISK_SECONDS, 4 * run.settings.seconds),
        rounds=_disk_rounds(run.settings),
        engines=fio.THREADS,
        told=lambda text: run.told.begin(f"the drive beside fio: {text}"),
    )
    for row in found.rows:
        rates = row.rounds_gbps
        if row.direction == "write":
            moved = sum(sum(rounds) for rounds in rates.values()) * found.seconds * 1e9
            run.written += int(moved)
        run.written += 2 * found.file_bytes  # filled before and after
        name = f"disk {row.direction}s {format_exactly(row.page_bytes)} x {row.depth}"
        for way, more in (("bare", "without checksums"), ("route", "with checksums")):
            run.checks.append(
                Check.of(f"{name}, {more}", f"{tool} psync threads", rates[way], rates["fio"])
            )


def disk_steps(settings: Settings) -> int:
    """How many measurements `disk` announces."""
    return 2 * _disk_rounds(settings)


def _disk_rounds(settings: Settings) -> int:
    return settings.rounds if settings.quick else DISK_ROUNDS
