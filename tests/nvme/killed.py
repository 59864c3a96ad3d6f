"""A process that stores, forgets, grows and shrinks a slab until it is killed; and its judge.

The content of a page is a function of its key, so whoever finds a key knows what must be there.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from tests.nvme.fakes import ArrayMemory, move
from tiermem.keyindex import Keys
from tiermem.nvme.cap import bytes_for
from tiermem.nvme.kept import Persist
from tiermem.nvme.posix import DiskThreads
from tiermem.nvme.slab import GRAIN, Slab
from tiermem.tier import Slots

SLOT = 16 << 10
MOST = 96
PERSIST = Persist("rank0", {"model": "kill"})


def open_slab(where: Path, capacity: int) -> Slab:
    return Slab(where, SLOT, capacity, byte_cap=bytes_for(MOST, SLOT), persist=PERSIST)


def content(keys: Keys) -> np.ndarray:
    """uint8[n, SLOT]: the page that each key names."""
    base = np.arange(SLOT // 8, dtype=np.uint64)
    words = (base * (keys[:, :1] | np.uint64(1))) ^ keys[:, 1:]
    return words.view(np.uint8)


def run(where: Path, seed: int) -> None:
    """Work for ever; the parent ends it with SIGKILL."""
    rng = np.random.default_rng(seed)
    memory = ArrayMemory(SLOT, 16)
    with open_slab(where, MOST) as slab, DiskThreads(slab, threads=3) as threads:
        slab.wait_ready(MOST)
        store, _ = threads.routes(memory)
        print("working", flush=True)
        while True:
            what = rng.integers(0, 20)
            some = rng.permutation(slab.capacity)[: rng.integers(1, 16)].astype(np.int32)
            if what == 0:
                slab.resize(int(rng.integers(MOST // 2, MOST)))
                slab.wait_ready(slab.capacity)
            elif what == 1:
                slab.forget(some)
            else:
                put(slab, store, memory, some, rng)


def put(slab: Slab, store: object, memory: ArrayMemory, disk: Slots, rng: object) -> None:
    n = len(disk)
    keys = rng.integers(1, 1 << 40, (n, 2), np.uint64)  # type: ignore[attr-defined]
    memory.bytes[:n] = content(keys)
    assert move(store, np.arange(n, dtype=np.int32), disk).error is None  # type: ignore[arg-type]
    numbers = np.zeros(n, np.uint32)
    slab.record(disk, keys, numbers, numbers)


def kill_once(where: Path, seed: int, after_s: float) -> None:
    """Let a process work for a while after it has begun, then end it where it stands."""
    command = [sys.executable, "-m", "tests.nvme.killed", str(where), str(seed)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"working\n", child.stderr and child.stderr.read()
        time.sleep(after_s)  # the moment of the kill, not a synchronisation
        child.send_signal(signal.SIGKILL)


def judge(where: Path) -> tuple[int, int, int]:
    """Reopen and load all that is found: (pages found, not verified, wrong)."""
    memory = ArrayMemory(SLOT, MOST)
    with open_slab(where, MOST) as slab, DiskThreads(slab, threads=3) as threads:
        found = slab.recovered()
        assert (slab.find(found.keys) == found.slots).all()
        n = len(found.slots)
        if not n:
            return 0, 0, 0
        moved = move(threads.routes(memory)[1], found.slots, np.arange(n, dtype=np.int32))
        good = np.setdiff1d(np.arange(n), moved.failed)
        wrong = (memory.bytes[good] != content(found.keys[good])).any(axis=1)
        return n, len(moved.failed), int(wrong.sum())


def fill_index(where: Path, records: int, *, killed: bool) -> None:
    """Make a slab whose index has so many records, of pages that nobody wrote."""
    slab = Slab(where, GRAIN, records, prewrite=False, persist=PERSIST)
    rng = np.random.default_rng(0)
    for part in np.array_split(np.arange(records, dtype=np.int32), max(1, records // 4096)):
        sequences = slab.begin_store(part)
        slab.end_store(part, sequences, rng.integers(1, 1 << 60, (len(part), 1), np.uint64))
        numbers = np.zeros(len(part), np.uint32)
        slab.record(part, rng.integers(1, 1 << 60, (len(part), 2), np.uint64), numbers, numbers)
    if killed:
        sys.stdout.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    slab.close()


def reopen_s(where: Path, records: int) -> tuple[float, int]:
    """(seconds until the index of a slab can be asked, records found)."""
    began = time.perf_counter()
    with Slab(where, GRAIN, records, prewrite=False, persist=PERSIST) as slab:
        found = slab.recovered()
        assert (slab.find(found.keys[:100]) == found.slots[:100]).all()
        return time.perf_counter() - began, len(found.slots)


def time_reopening(where: Path, records: int, *, killed: bool) -> tuple[float, int]:
    """Fill an index in a process that is killed, or ends in order; then reopen it here."""
    how = "fill-killed" if killed else "fill"
    command = [sys.executable, "-m", "tests.nvme.killed", str(where), how, str(records)]
    ended = subprocess.run(command, check=False).returncode
    assert ended == (-signal.SIGKILL if killed else 0)
    return reopen_s(where, records)


def main() -> None:
    """Commands, after a directory of mode 0700:

    SEED           work until killed
    loop N         kill N times, print what was found
    reopen N       print how long an index of N records takes to open, closed in order and killed
    fill[-killed] N
    """
    where, what = Path(sys.argv[1]), sys.argv[2]
    if what in ("fill", "fill-killed"):
        fill_index(where, int(sys.argv[3]), killed=what == "fill-killed")
    elif what == "reopen":
        for killed in (False, True):
            with tempfile.TemporaryDirectory(dir=where) as inner:
                took_s, found = time_reopening(Path(inner), int(sys.argv[3]), killed=killed)
            how = "killed" if killed else "closed in order"
            print(f"records={found} after={how!r} index_ready_s={took_s:.3f}")
    elif what == "loop":
        loop(where, int(sys.argv[3]))
    else:
        run(where, int(what))


def loop(where: Path, kills: int) -> None:
    rng = np.random.default_rng(0)
    total = np.zeros(3, np.int64)
    times = []
    for i in range(kills):
        kill_once(where, i, float(rng.uniform(0, 0.25)))
        began = time.perf_counter()
        total += judge(where)
        times.append(time.perf_counter() - began)
    found, lost, wrong = total.tolist()
    print(
        f"kills={kills} found={found} not_verified={lost} wrong={wrong} "
        f"reopen_and_verify_s median={np.median(times):.3f} max={max(times):.3f}"
    )


if __name__ == "__main__":
    main()
