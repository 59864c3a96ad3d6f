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
        in_flight = [f"--iodepth={depth}"]
        if engine in THREADS:
            in_flight = [f"--numjobs={depth}", "--thread", "--group_reporting"]
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
            return _read(told.stdout, engine, write)
        said = (told.stderr or told.stdout).strip()
    raise FioFailed(f"fio did not run on {file}: {said[-300:]}")


def _read(text: str, engine: str, write: bool) -> FioRate:
    job = json.loads(text[text.index("{") :])["jobs"][0]
    side = job["write" if write else "read"]
    busy_s = (job["usr_cpu"] + job["sys_cpu"]) / 100 * job["job_runtime"] / 1000
    return FioRate(float(side["bw_bytes"]), busy_s * 1e6 / max(1, side["total_ios"]), engine)
