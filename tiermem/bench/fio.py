"""Runs fio on a slab's file, as the yardstick for our own routes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tiermem.errors import TierMemError

ENGINES = ("io_uring", "libaio", "psync")
THREADS = ("psync",)
"""As our own route does it: a thread for each read or write in flight."""
HUGE = "glibc.malloc.hugetlb=1"
"""fio takes its buffers from malloc; with this, and aligned to 2 MiB, they are huge pages."""


RAMP = "--ramp_time=100ms"
"""Not counted: io_uring's threads start, and the buffers are touched for the first time. Counted,
rounds of 0.3 s at depth 32 came to 0.1 GB/s of a drive that does 3.7 (busy 2-core, 2026-11)."""
ALL_STOP = "--exitall"
"""When one thread's time is up, all stop. Else those that started late go on alone, and with 32 of
them and 0.2 s fio reported 4.6 GB/s of the same drive (2-core, 2026-11)."""


class FioFailed(TierMemError):
    """fio is there and did not measure; the message has what it said."""


@dataclass(frozen=True, slots=True)
class FioRate:
    """One run: bytes per second, and processor time spent on one block."""

    bytes_per_s: float
    cpu_us: float
    engine: str


def version() -> str | None:
    """What fio calls itself; None where it is not installed."""
    path = shutil.which("fio")
    if path is None:
        return None
    told = subprocess.run([path, "--version"], capture_output=True, text=True, check=False)
    return told.stdout.strip() or None


def measure(
    file: Path,
    offset: int,
    nbytes: int,
    block: int,
    depth: int,
    *,
    write: bool,
    seconds: float,
    engines: Sequence[str] = ENGINES,
) -> FioRate:
    """Random whole blocks of [offset, offset + nbytes), O_DIRECT, `depth` in flight.

    By the first of `engines` that works here.
    """
    said = ""
    for engine in engines:
        in_flight, jobs = [f"--iodepth={depth}"], 1
        if engine in THREADS:
            in_flight = [f"--numjobs={depth}", "--thread", "--group_reporting", ALL_STOP]
            jobs = depth
        command = [
            "fio",
            "--name=tiermem",
            f"--filename={file}",
            f"--offset={offset}",
            f"--size={nbytes}",
            f"--bs={block}",
            f"--rw={'randwrite' if write else 'randread'}",
            f"--ioengine={engine}",
            *in_flight,
            "--direct=1",
            f"--iomem_align={2 << 20}",
            RAMP,
            "--time_based=1",
            f"--runtime={round(seconds * 1000)}ms",  # a fraction of a second would be cut to 0
            "--allow_file_create=0",
            "--random_generator=tausworthe64",
            "--output-format=json",
        ]
        env = {**os.environ, "GLIBC_TUNABLES": HUGE}
        told = subprocess.run(
            command, capture_output=True, text=True, env=env, timeout=120, check=False
        )
        if told.returncode == 0:
            return read_report(told.stdout, engine, write=write, jobs=jobs)
        said = (told.stderr or told.stdout).strip()
    raise FioFailed(f"fio did not run on {file}: {said[-300:]}")


def read_report(text: str, engine: str, *, write: bool, jobs: int) -> FioRate:
    """What one run of `jobs` equal jobs says of itself, with anything before the JSON."""
    job = json.loads(text[text.index("{") :])["jobs"][0]
    side, ran_s = job["write" if write else "read"], job["job_runtime"] / 1000  # of all jobs
    busy_s = (job["usr_cpu"] + job["sys_cpu"]) / 100 * ran_s
    # Each job's bytes by the time that it was counted for, not by the longest of these times.
    bytes_per_s = side["io_bytes"] * jobs / ran_s
    return FioRate(bytes_per_s, busy_s * 1e6 / max(1, side["total_ios"]), engine)
