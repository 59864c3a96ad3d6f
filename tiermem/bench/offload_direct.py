"""GPU memory to the drive and back through kvikio: what a direct route could carry.

No tier uses it: what was read is not checked here. A probe finds which way kvikio really takes, and
both it and the measurement run in child processes, because cuFile can hang and can crash.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from tiermem.bench.offload_run import Run, Settings, for_a_while
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
CHILD_S = 60.0


@dataclass(frozen=True, slots=True)
class Way:
    """One direction at one depth."""

    storing: bool
    depth: int
    laps: list[Lap]


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
    run.told.begin(f"GPU to NVMe and back by kvikio, {format_exactly(page)}")
    add(run, ask(run.settings, page, probe.path == "compat"), page, f"kvikio {probe.path}")


def add(run: Run, ways: Sequence[Way], page: int, path: str) -> None:
    """A row for each."""
    run.written += PAGES * page
    for way in ways:
        ends = (GPU, NVME) if way.storing else (NVME, GPU)
        names = (run.end_name(ends[0]), run.end_name(ends[1]))
        if way.storing:
            run.written += sum(lap.nbytes for lap in way.laps)
        run.add(names, page, way.depth, way.laps, f"{path}, unchecked", work="kvikio")


def ask(settings: Settings, page: int, compat: bool, python: str = sys.executable) -> list[Way]:
    """What a child process measures. Raises TierFailed when it hangs, crashes or says nothing."""
    command = [python, "-m", "tiermem.bench.offload_direct", str(settings.nvme), str(page)]
    command += [str(settings.index), str(settings.seconds), str(settings.rounds), str(int(compat))]
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=CHILD_S, check=False)
    except subprocess.TimeoutExpired:
        raise TierFailed(f"kvikio: no answer in {CHILD_S:.0f} s") from None
    if told.returncode != 0:
        said = (told.stderr.strip().splitlines() or ["nothing"])[-1]
        raise TierFailed(f"kvikio: the child ended with {told.returncode} and said: {said}")
    ways = json.loads(told.stdout.splitlines()[-1])
    return [Way(storing, depth, [Lap(*lap) for lap in laps]) for storing, depth, laps in ways]


def main(arguments: Sequence[str]) -> None:
    """The child: measure on a slab and frames of its own, and print the laps as JSON."""
    from tiermem.gpu.vmm import CudaDevice

    directory, page, index = Path(arguments[0]), int(arguments[1]), int(arguments[2])
    settings = Settings(
        device=f"cuda:{index}",
        pages=(page,),
        rounds=int(arguments[4]),
        seconds=float(arguments[3]),
        work_bytes=PAGES * page,
        nvme=directory,
    )
    device = CudaDevice(index, page, PAGES, PAGES)
    slab = Slab(directory, page, PAGES)
    device.frames.wait_ready()
    slab.wait_ready(PAGES)
    frames = device.frames.addresses(np.arange(PAGES, dtype=np.int32)).tolist()
    offsets = [slab.offset(i) for i in range(PAGES)]
    file = KvikioFile(slab, compat=bool(int(arguments[5])))
    with device.context:
        ways = list(measured(settings, file, frames, offsets, page))
    file.close()
    slab.close()
    device.close()
    laps = [[(lap.nbytes, lap.took_s, lap.cpu_s) for lap in way.laps] for way in ways]
    told = [(way.storing, way.depth, found) for way, found in zip(ways, laps, strict=True)]
    sys.stdout.write(json.dumps(told) + "\n")


def measured(
    settings: Settings,
    file: DirectFile,
    frames: Sequence[int],
    offsets: Sequence[int],
    page: int,
) -> Iterator[Way]:
    """frames, offsets: where each page is in memory and in the file. Writes before it reads."""
    for storing in (True, False):
        call = file.pwrite if storing else file.pread
        for depth in DEPTHS:
            lap = partial(_lap, call, frames, offsets, page, depth)
            yield Way(storing, depth, for_a_while(lap, settings))


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


STEPS = 2
"""Measurements that `direct` announces."""


if __name__ == "__main__":
    main(sys.argv[1:])
