"""A slab under full load: is its byte cap ever exceeded, and does its write budget hold?

    python -m tests.nvme.soak [--seconds 30] [--budget 16MiB/s] [--path DIR]

Threads store, load, record, forget, grow and shrink, with snapshots and journals turning over,
while another samples what the file system charges for all files (st_blocks). Prints JSON; exit
code 1 if the cap was exceeded, a page was wrong, or the budget was off by more than 2 %.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np

from tests.nvme.fakes import ArrayMemory
from tests.nvme.killed import content
from tests.waiting import LONG_S
from tiermem import units
from tiermem.nvme.cap import bytes_for
from tiermem.nvme.kept import Persist
from tiermem.nvme.posix import DiskThreads, Transfer
from tiermem.nvme.slab import Slab
from tiermem.tier import PASSED, Slots

SLOT = 16 << 10
MOST = 512
WORKERS = 2
MINE = MOST // 2 // (WORKERS + 1)
"""Slots that each worker has to itself; those above are for growing and shrinking."""


@dataclass(frozen=True)
class Report:
    seconds: float
    budget_bytes_per_s: int | None
    written: int
    rate_of_budget: float | None
    byte_cap: int
    samples: int
    most_bytes: int
    most_of_cap: float
    metadata_of_slots: float
    snapshots: int
    resizes: int
    pages_stored: int
    pages_verified: int
    wrong: int

    def problems(self) -> list[str]:
        found = []
        if self.most_bytes > self.byte_cap:
            found.append(f"{self.most_bytes} bytes on disk, the cap is {self.byte_cap}")
        if self.wrong:
            found.append(f"{self.wrong} wrong pages")
        if self.rate_of_budget is not None and abs(self.rate_of_budget - 1) > 0.02:
            found.append(f"wrote {self.rate_of_budget:.1%} of the budget")
        return found


class Soak:
    """The slab, its workers and what they found."""

    def __init__(
        self,
        where: Path,
        seconds: float,
        budget: int | None,
        enough: Callable[[Soak], bool] = lambda soak: True,
    ) -> None:
        """enough: until this is so it goes on, for LONG_S more at most; a drive may be busy."""
        self.where, self.seconds, self.budget, self.enough = where, seconds, budget, enough
        self.cap = bytes_for(MOST, SLOT)
        self.stored = self.verified = self.wrong = self.resizes = 0
        self.sampled: list[int] = []
        self.snapshots: set[int] = set()
        self.errors: list[BaseException] = []
        self.lock = threading.Lock()

    def run(self) -> Report:
        with (
            Slab(
                self.where, SLOT, MOST, byte_cap=self.cap, write_budget=self.budget,
                persist=Persist("rank0"),
            ) as slab,
            DiskThreads(slab) as threads,
        ):  # fmt: skip
            slab.wait_ready(MOST)
            began, spent = time.monotonic(), slab.budget.spent
            # What the full bucket held at the start is not the rate.
            saved = slab.budget.available() or 0
            self.end = began + self.seconds
            jobs: list[Callable[[], None]] = [self.sample, lambda: self.turn_over(slab)]
            jobs += [partial(self.work, slab, threads, i) for i in range(WORKERS)]
            running = [threading.Thread(target=self.guard, args=(job,)) for job in jobs]
            if self.budget is not None:
                running.append(
                    threading.Thread(target=self.guard, args=(partial(self.press, threads),))
                )
            for thread in running:
                thread.start()
            for thread in running:
                thread.join()
            took = time.monotonic() - began
            written = slab.budget.spent - spent
            left = slab.budget.available() or 0
        if self.errors:
            raise self.errors[0]
        rate = None if self.budget is None else (written - saved + left) / took / self.budget
        most = max(self.sampled)
        return Report(
            took, self.budget, written, rate, self.cap, len(self.sampled), most, most / self.cap,
            (self.cap - MOST * SLOT) / (MOST * SLOT), len(self.snapshots), self.resizes,
            self.stored, self.verified, self.wrong,
        )  # fmt: skip

    def goes_on(self) -> bool:
        over = time.monotonic() - self.end
        return over < 0 or (over < LONG_S and not self.enough(self))

    def guard(self, job: Callable[[], None]) -> None:
        try:
            job()
        except BaseException as error:
            self.errors.append(error)
            self.end = 0.0

    def work(self, slab: Slab, threads: DiskThreads, number: int) -> None:
        """Store, record, load and verify in slots of its own; now and then forget some."""
        rng = np.random.default_rng(number)
        memory = ArrayMemory(SLOT, 2 * MINE)
        store, load = threads.routes(memory)
        frames = np.arange(MINE, dtype=np.int32)
        mine: Slots = frames + np.int32(number * MINE)
        numbers = np.zeros(MINE, np.uint32)
        while self.goes_on():
            keys = rng.integers(1, 1 << 40, (MINE, 2), np.uint64)
            memory.bytes[:MINE] = content(keys)
            part = rng.permutation(MINE)[: rng.integers(1, MINE)].astype(np.int32)
            done = store.submit(frames[part], mine[part], PASSED)
            done.wait()
            if done.error is not None:
                raise done.error
            slab.record(mine[part], keys[part], numbers[part], numbers[part])
            done = load.submit(mine[part], frames[part] + np.int32(MINE), PASSED)
            done.wait()
            if done.error is not None:
                raise done.error
            bad = (memory.bytes[MINE + part] != memory.bytes[part]).any(axis=1)
            with self.lock:
                self.stored += len(part)
                self.verified += len(part)
                self.wrong += int(bad.sum())
            slab.forget(mine[part[: len(part) // 4]])

    def press(self, threads: DiskThreads) -> None:
        """Keep stores waiting all the time, or the budget would not be what limits them."""
        memory = ArrayMemory(SLOT, MINE)
        store, _ = threads.routes(memory)
        frames = np.arange(MINE, dtype=np.int32)
        halves = np.array_split(frames, 2)
        running: list[Transfer] = []
        while self.goes_on():
            part = halves[0]
            halves.reverse()
            running.append(store.submit(part, part + np.int32(WORKERS * MINE), PASSED))
            if len(running) == 2:
                running.pop(0).wait()
        for done in running:
            done.wait()

    def turn_over(self, slab: Slab) -> None:
        """Grow and shrink above everybody's slots."""
        rng = np.random.default_rng(99)
        while self.goes_on():
            slab.resize(int(rng.integers(MOST // 2, MOST + 1)))
            slab.wait_ready(slab.capacity)
            self.resizes += 1

    def sample(self) -> None:
        """What the file system charges for everything in the directory."""
        while self.goes_on() or not self.sampled:
            charged = 0
            for entry in os.scandir(self.where):
                try:
                    facts = entry.stat()
                except FileNotFoundError:  # a journal that was folded into a snapshot
                    continue
                charged += facts.st_blocks * 512
                if entry.name.endswith(".snapshot"):
                    self.snapshots.add(facts.st_mtime_ns)
            self.sampled.append(charged)
            time.sleep(0.002)  # the distance of samples, not a synchronisation


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--budget", default="16MiB/s", help="write budget; off for none")
    parser.add_argument("--path", type=Path, help="where to make the slab (default: a new one)")
    given = parser.parse_args()
    budget = None if given.budget == "off" else units.parse_rate(given.budget)
    with tempfile.TemporaryDirectory(dir=given.path, prefix="tiermem-soak-") as where:
        report = Soak(Path(where), given.seconds, budget).run()
    problems = report.problems()
    print(json.dumps({**asdict(report), "problems": problems}, indent=2))
    sys.exit(1 if problems else 0)


if __name__ == "__main__":
    main()
