"""Eight threads on one space with all tiers full, real bytes, every page verified.

    python -m tests.soak [--seconds 60] [--threads 8] [--seed 0] [--eager]

Each thread uses pages of a region that all share and of a region of its own (two tenants take
turns), reads and writes them itself or by kernels on its stream, allocates, frees and hints, while
one thread moves the GPU budget up and down and another calls `check()`. What every page must hold
is known; a page may go missing only if its owner was told. A hang dumps all stacks.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from tiermem.config import Config, Evict, Gpu, Host, Nvme
from tiermem.errors import NotOurs, PageLost, TierFull
from tiermem.gpu.emulated import EmulatedDevice
from tiermem.nvme.cap import bytes_for
from tiermem.planner import Access
from tiermem.region import Pages, Region
from tiermem.space import Space
from tiermem.tier import Done, Place

if TYPE_CHECKING:
    from collections.abc import Iterator

PAGE = 16 << 10
FRAMES, HOST, NVME = 48, 64, 256
SHARED, OWN = 200, 40  # pages of the shared region, and of each thread's own
TENANT = 1 << 40
"""A word of a page is its tenant's number times this, plus a value that was never used before."""
HANG_S = 60.0


class Ledger:
    """What every page of a region must hold, and who is at work on it.

    Many may read a page, or one may write it, as its users agree among themselves; tiermem is not
    told. `value` is 0 for a page whose bytes are not known.
    """

    def __init__(self, pages: int) -> None:
        self.value = [0] * pages
        self.alive = [False] * pages
        self.dropped = [0] * pages  # how often its owner was told that it is gone
        self._readers = [0] * pages
        self._writer = [False] * pages
        self._changed = threading.Condition()

    def gone(self, pages: Pages, reason: str) -> None:
        """on_gone. A page may have a new life only after this."""
        with self._changed:
            for page in pages.tolist():
                self.dropped[page] += 1
                self.value[page] = 0
                self.alive[page] = reason == "lost"

    def claim(self, pages: list[int], write: bool, wait: bool = False) -> bool:
        """The right to read or to write pages; False if others are at work and `wait` is not."""
        with self._changed:
            while any(self._writer[p] or (write and self._readers[p]) for p in pages):
                if not wait:
                    return False
                self._changed.wait()
            for page in pages:
                self._writer[page] |= write
                self._readers[page] += not write
            return True

    def release(self, pages: list[int], write: bool) -> None:
        with self._changed:
            for page in pages:
                if write:
                    self._writer[page] = False
                else:
                    self._readers[page] -= 1
            self._changed.notify_all()

    def some(self, random: Random, most: int) -> list[int]:
        """Up to `most` pages that are alive, as far as known."""
        alive = [p for p, is_alive in enumerate(self.alive) if is_alive]
        return random.sample(alive, min(len(alive), random.randint(1, most)))


@dataclass
class Plot:
    """A region, its bytes and its ledger."""

    region: Region
    words: npt.NDArray[np.int64]
    ledger: Ledger


@dataclass
class Queued:
    """A kernel that has been launched, and the pages whose claim ends with it."""

    done: Done
    plot: Plot
    pages: list[int]
    write: bool


@dataclass
class Totals:
    """What all threads did; `wrong` says what was found and must stay empty."""

    counts: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)
    values: Iterator[int] = field(default_factory=lambda: iter(range(1, TENANT)))

    def new_value(self, tenant: int) -> int:
        with self.lock:
            return next(self.values) + tenant * TENANT


class Worker:
    """One thread's life: random verbs until the time is over."""

    def __init__(self, soak: Soak, number: int) -> None:
        self.soak = soak
        self.random = Random(soak.seed * 1000 + number)
        self.number = number
        self.own = soak.plot(OWN, f"own-{number}", tenant=1 + number % 2)
        self.stream = soak.device.new_stream()
        self.queued: list[Queued] = []
        self.counts: Counter[str] = Counter()
        self.thread = threading.Thread(target=self.run, name=f"soak-{number}", daemon=True)

    def run(self) -> None:
        try:
            while not self.soak.over():
                self.act()
            self.end_kernels(0)
        except BaseException as error:
            self.soak.report(f"thread {self.number}: {type(error).__name__}: {error}")
            self.soak.stop.set()
            raise
        finally:
            with self.soak.totals.lock:
                self.soak.totals.counts.update(self.counts)

    def act(self) -> None:
        random = self.random
        plot = self.soak.shared if random.random() < 0.5 else self.own
        verb = random.random()
        if verb < 0.55:
            self.use(plot, random.choice(("read", "read", "read", "write", "fresh")))
        elif verb < 0.65:
            self.hint(plot)
        elif verb < 0.80 or plot is self.soak.shared:
            self.allocate(self.soak.shared if self.number == 0 else self.own)
        elif verb < 0.90:
            self.free(self.own)
        self.end_kernels(3)

    def use(self, plot: Plot, access: Access, only: list[int] | None = None) -> None:
        """Use pages by this thread or by a kernel; the claim is held until that has ended."""
        pages = only or plot.ledger.some(self.random, 4)
        write = access != "read"
        if not pages or (only is None and not plot.ledger.claim(pages, write)):
            return
        stream = self.stream if self.random.random() < 0.5 else None
        queued = False
        try:
            with plot.region.use(pages, access, stream=stream):
                self.counts["pages_used"] += len(pages)
                if stream is None:
                    self.work(plot, pages, write)
                else:
                    self.launch(plot, pages, write)
                    queued = True
        except TierFull:
            self.counts["full"] += 1
        except (NotOurs, PageLost):
            self.expect_told(plot, pages)
        finally:
            if not queued and only is None:
                plot.ledger.release(pages, write)

    def work(self, plot: Plot, pages: list[int], write: bool) -> None:
        for page in pages:
            if write:
                value = self.soak.totals.new_value(plot.region.tenant)
                plot.ledger.value[page] = 0
                plot.words[page] = value
                plot.ledger.value[page] = value
                self.counts["pages_written"] += 1
            elif value := plot.ledger.value[page]:
                self.verify(plot, page, value)

    def verify(self, plot: Plot, page: int, value: int) -> None:
        words = plot.words[page]
        self.counts["pages_verified"] += 1
        if not (words == value).all():
            found = np.unique(words)[:4].tolist()
            self.soak.report(f"{plot.region.name} page {page}: {found}, not {value}")

    def launch(self, plot: Plot, pages: list[int], write: bool) -> None:
        """Queue a kernel that does the work when the stream gets there, sometimes much later."""
        lag_s = self.random.choice((0.0, 0.0, 0.001, 0.005))

        def kernel() -> None:
            if lag_s:
                time.sleep(lag_s)  # not to wait for anything: to be late
            self.work(plot, pages, write)

        addresses = plot.region.address + np.array(pages, np.uint64) * np.uint64(PAGE)
        done = self.soak.device.launch(self.stream, kernel, addresses)
        self.queued.append(Queued(done, plot, pages, write))
        self.counts["kernels"] += 1

    def end_kernels(self, keep: int) -> None:
        """Give claims back whose kernels have ended; wait while more than `keep` are queued."""
        while self.queued and (len(self.queued) > keep or self.queued[0].done.ready()):
            first = self.queued.pop(0)
            if not first.done.wait(HANG_S) or first.done.error is not None:
                raise AssertionError(f"a kernel did not end well: {first.done.error}")
            first.plot.ledger.release(first.pages, first.write)

    def hint(self, plot: Plot) -> None:
        pages = plot.ledger.some(self.random, 6)
        if pages:
            plot.region.hint(pages, self.random.choice(("soon", "cold")))
            self.counts["hints"] += 1

    def allocate(self, plot: Plot) -> None:
        """New pages: they show no other tenant's bytes, and are written before others see them."""
        try:
            pages = plot.region.allocate(self.random.randint(1, 4)).tolist()
        except TierFull:
            self.counts["full"] += 1
            return
        self.counts["pages_allocated"] += len(pages)
        self.end_kernels(0)  # some may read an earlier life of these pages
        plot.ledger.claim(pages, write=True, wait=True)
        for page in pages:
            plot.ledger.value[page] = 0
        try:
            with plot.region.use(pages):
                for page in pages:
                    first = int(plot.words[page][0]) // TENANT
                    if first not in (0, plot.region.tenant):
                        self.soak.report(f"a new page shows bytes of tenant {first}")
        except NotOurs:
            self.counts["dropped_at_once"] += 1
        except TierFull:
            self.counts["full"] += 1
        with self.soak.totals.lock:
            for page in pages:
                plot.ledger.alive[page] = True
        self.use(plot, "fresh", only=pages)
        self.end_kernels(0)
        plot.ledger.release(pages, write=True)

    def free(self, plot: Plot) -> None:
        """Only of its own region, so that nobody else can have taken the page anew."""
        self.end_kernels(0)
        pages = plot.ledger.some(self.random, 6)
        if not pages:
            return
        for page in pages:
            plot.ledger.alive[page] = False
            plot.ledger.value[page] = 0
        try:
            plot.region.free(pages)
            self.counts["pages_freed"] += len(pages)
        except NotOurs:
            # Some were dropped: none was freed.
            for page in pages:
                try:
                    plot.region.free([page])
                except NotOurs:
                    self.expect_told(plot, [page])

    def expect_told(self, plot: Plot, pages: list[int]) -> None:
        """A page was refused: at the end its owner must have been told."""
        with self.soak.totals.lock:
            self.soak.refused.append((plot, pages))
        self.counts["refused"] += len(pages)


class Soak:
    """A space, its threads, and the verdict."""

    def __init__(
        self, folder: Path, *, seconds: float, threads: int = 8, seed: int = 0, eager: bool = False
    ) -> None:
        self.seed = seed
        self.seconds = seconds
        self.stop = threading.Event()
        self.totals = Totals()
        self.refused: list[tuple[Plot, list[int]]] = []
        self.space = Space.open(
            Config(
                gpu=Gpu(
                    device="cpu", budget=FRAMES * PAGE, page=PAGE,
                    hide="eager" if eager else "lazy",
                ),
                host=Host(capacity=HOST * PAGE),
                nvme=Nvme(path=folder, capacity=bytes_for(NVME, PAGE)),
                evict=Evict(gpu="lru", host="lru", nvme="lru"),
            )
        )  # fmt: skip
        device = self.space.device
        assert isinstance(device, EmulatedDevice)
        self.device = device
        self.plots: list[Plot] = []
        self.shared = self.plot(SHARED, "shared", tenant=3)
        self.workers = [Worker(self, n) for n in range(threads)]
        self._until = 0.0

    def plot(self, pages: int, name: str, tenant: int) -> Plot:
        ledger = Ledger(pages)
        region = self.space.reserve(pages * PAGE, name=name, tenant=tenant, on_gone=ledger.gone)
        plot = Plot(region, region.view(np.int64), ledger)
        self.plots.append(plot)
        return plot

    def over(self) -> bool:
        return self.stop.is_set() or time.monotonic() > self._until

    def report(self, what: str) -> None:
        with self.totals.lock:
            self.totals.wrong.append(what)

    def run(self) -> dict[str, object]:
        """Let all threads run; what they did, and what was wrong."""
        self._until = time.monotonic() + self.seconds
        for worker in self.workers:
            worker.thread.start()
        self._upset()
        for worker in self.workers:
            worker.thread.join(HANG_S)
            if worker.thread.is_alive():
                faulthandler.dump_traceback(all_threads=True)
                raise AssertionError(f"{worker.thread.name} does not end: deadlock")
        self._judge()
        counts = self.space.statistics()
        summary: dict[str, object] = {
            "seconds": self.seconds,
            "threads": len(self.workers),
            **dict(sorted(self.totals.counts.items())),
            "routes": {f"{r.src.name}-{r.dst.name}": r.pages for r in counts.routes},
            "arcs": dict(sorted(counts.counts.items())),
            "wrong": self.totals.wrong[:20],
        }
        if not self.totals.wrong:
            self.space.close()
        return summary

    def _upset(self) -> None:
        """Move the budget up and down, and assert every invariant, while the others work."""
        random = Random(self.seed)
        while not self.over():
            self.space.limit(random.randint(FRAMES // 2, FRAMES) * PAGE)
            self.totals.counts["limits"] += 1
            for _ in range(5):
                self.space.check()
                self.totals.counts["checks"] += 1
                self.stop.wait(0.02)

    def _judge(self) -> None:
        """At rest: every page that was not given up holds what was written last."""
        self.space.limit(FRAMES * PAGE)
        if not self.space.drain(HANG_S):
            self.report("the space does not come to rest")
        self.space.check()
        for plot, pages in self.refused:
            if not any(plot.ledger.dropped[page] for page in pages):
                self.report(f"{plot.region.name}: pages {pages} were refused, nobody was told")
        used = {t.place: t.used + t.kept for t in self.space.statistics().tiers}
        self.totals.counts["held_gpu"] = used[Place.GPU]
        self.totals.counts["held_host"] = used[Place.HOST]
        self.totals.counts["held_nvme"] = used[Place.NVME]
        judge = self.workers[0]
        for plot in self.plots:
            for page, value in enumerate(plot.ledger.value):
                if value and plot.ledger.alive[page]:
                    self._read_back(judge, plot, page, value)
        self.totals.counts["pages_verified"] += judge.counts["pages_verified"]

    def _read_back(self, judge: Worker, plot: Plot, page: int, value: int) -> None:
        told = plot.ledger.dropped[page]
        try:
            with plot.region.use([page]):
                judge.verify(plot, page, value)
        except (NotOurs, PageLost) as error:
            self.space.drain(HANG_S)
            if plot.ledger.dropped[page] == told:
                self.report(f"{plot.region.name} page {page}: {error}; nobody was told")


def main() -> int:
    parser = argparse.ArgumentParser(description="Eight threads, three full tiers, real bytes.")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--threads", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--eager", action="store_true", help="hide pages at once")
    parser.add_argument("--folder", type=Path, help="for the slab; default: a temporary one here")
    asked = parser.parse_args()
    faulthandler.enable()
    faulthandler.dump_traceback_later(asked.seconds + 3 * HANG_S, exit=True)
    with tempfile.TemporaryDirectory(dir=asked.folder or Path.cwd()) as folder:
        soak = Soak(
            Path(folder) / "slab", seconds=asked.seconds, threads=asked.threads, seed=asked.seed,
            eager=asked.eager,
        )  # fmt: skip
        summary = soak.run()
    print(json.dumps(summary, indent=2))
    return 1 if summary["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
