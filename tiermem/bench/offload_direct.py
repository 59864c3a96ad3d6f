"""GPU memory to the drive and back through kvikio, beside the way through pinned host memory.

The route is the one that `nvme.mode = "kvikio"` gives, which checks on the GPU. A probe finds which
way kvikio really takes, and both it and the measurement run in child processes, because cuFile can
hang and can crash.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tiermem.bench.offload_routes import Bare, bare, calls, fill
from tiermem.bench.offload_run import Run, Settings, for_a_while
from tiermem.bench.offload_stream import stream
from tiermem.bench.rig import Lap
from tiermem.errors import TierFailed
from tiermem.nvme import kvikio
from tiermem.tier import GPU, NVME
from tiermem.units import format_exactly

NBYTES = 256 << 20
DEPTHS = (8, 32)
PROBE_S = 12.0
CHILD_S = 60.0
STEPS = 2
"""Measurements that `direct` announces."""


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
            "(pip install 'tiermem[gds]')"
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
    add(run, ask(run.settings, page), page, f"kvikio {probe.path}, checked on the GPU")


def add(run: Run, ways: Sequence[Way], page: int, path: str) -> None:
    """A row for each."""
    run.written += NBYTES
    for way in ways:
        ends = (GPU, NVME) if way.storing else (NVME, GPU)
        names = (run.end_name(ends[0]), run.end_name(ends[1]))
        if way.storing:
            run.written += sum(lap.nbytes for lap in way.laps)
        run.add(names, page, way.depth, way.laps, path, work="kvikio")


def ask(settings: Settings, page: int, python: str = sys.executable) -> list[Way]:
    """What a child process measures. Raises TierFailed when it hangs, crashes or says nothing."""
    command = [python, "-m", "tiermem.bench.offload_direct", str(settings.nvme), str(page)]
    command += [settings.device, str(settings.seconds), str(settings.rounds)]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # it has children of its own, which end with it
    ) as child:
        try:
            out, err = child.communicate(timeout=CHILD_S)
        except subprocess.TimeoutExpired:
            raise TierFailed(f"kvikio: no answer in {CHILD_S:.0f} s") from None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
    if child.returncode != 0:
        said = (err.strip().splitlines() or ["nothing"])[-1]
        raise TierFailed(f"kvikio: the child ended with {child.returncode} and said: {said}")
    ways = json.loads(out.splitlines()[-1])
    return [Way(storing, depth, [Lap(*lap) for lap in laps]) for storing, depth, laps in ways]


def main(arguments: Sequence[str]) -> None:
    """The child: measure on tiers of its own, and print the laps as JSON."""
    directory, page, device, seconds, rounds = arguments
    settings = Settings(
        device=device,
        pages=(int(page),),
        rounds=int(rounds),
        seconds=float(seconds),
        work_bytes=NBYTES,
        nvme=Path(directory),
    )
    with bare(settings, int(page), mode="kvikio") as b:
        ways = list(measured(settings, b))
    told = [
        (way.storing, way.depth, [(lap.nbytes, lap.took_s, lap.cpu_s) for lap in way.laps])
        for way in ways
    ]
    sys.stdout.write(json.dumps(told) + "\n")


def measured(settings: Settings, b: Bare) -> Iterator[Way]:
    """Stores, then loads of what was stored."""
    fill(b.lane((GPU, NVME)))
    for ends in ((GPU, NVME), (NVME, GPU)):
        for depth in DEPTHS:
            lap = partial(stream, [b.lane(ends)], *calls(depth), b.page)
            yield Way(ends[1] is NVME, depth, for_a_while(lap, settings.seconds, settings.rounds))


if __name__ == "__main__":
    main(sys.argv[1:])
