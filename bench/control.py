"""What the core costs when no byte moves: the control plane, as JSON, each figure beside its bar.

    python bench/control.py [--out control.json] [--only SECTION ...] [--pages 1000000]

The output: {"schema": "tiermem.control.v1", "machine": {...}, "pages": int, "rows": [row, ...]}
with a row for each figure:

    name     what was measured                    unit     us, us/page, MB, pages/s, %
    n        samples                              median, p99   over the samples (p99 = worst side)
    bar      what the median must reach, or null  holds    whether it does, or null

Sections: `memory` (bytes allocated for tables of 1M pages),
`planner` (settling, pinning, victims on a table of 1M rows), `use` (pages that rest on the GPU,
through the public API), `fault` (one page of the host tier), `allocate` (pages whose addresses
still show frames), `driverless` (the same on a CUDA device whose driver does nothing, and loads of
groups of 64 pages: what Python takes of them; needs a C compiler), `window` (showing and hiding
groups of 64 pages on the CPU device, alone and beside a thread of pure Python).
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import tempfile
import time
import tracemalloc
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import msgspec
import numpy as np

from tiermem.bench import paging
from tiermem.bench.machine import machine
from tiermem.bench.paging import BusyThread
from tiermem.bench.rig import Hide, Shape, rig
from tiermem.config import Config, Gpu, Host
from tiermem.gpu.emulated import EmulatedDevice
from tiermem.nvme.kept import Persist
from tiermem.nvme.slab import Slab
from tiermem.plan import Outcome, Plan
from tiermem.planner import Planner
from tiermem.policies.registry import load
from tiermem.ranking import Ranking
from tiermem.region import Region
from tiermem.space import Space
from tiermem.table import PageTable, Rows
from tiermem.tier import TIERS, Done, Place, SlotPool

SCHEMA = "tiermem.control.v1"
MB = 1_000_000
ROUTES = tuple((a, b) for a in TIERS for b in TIERS if a != b)
GROUP = 64
HIDES: tuple[Hide, ...] = ("eager", "lazy")


@dataclass(frozen=True)
class Row:
    """One figure. `bar` is the most (or, for rates, the least) that the median may be."""

    name: str
    unit: str
    n: int
    median: float
    p99: float
    bar: float | None = None
    holds: bool | None = None


def row(name: str, unit: str, samples: list[float], bar: float | None = None) -> Row:
    """A row whose figure should be small."""
    median, p99 = np.percentile(samples, [50, 99])
    holds = None if bar is None else bool(median <= bar)
    return Row(name, unit, len(samples), round(float(median), 4), round(float(p99), 4), bar, holds)


def rate_row(name: str, unit: str, samples: list[float], bar: float | None = None) -> Row:
    """A row whose figure should be large."""
    median, p1 = np.percentile(samples, [50, 1])
    holds = None if bar is None else bool(median >= bar)
    return Row(name, unit, len(samples), round(float(median), 2), round(float(p1), 2), bar, holds)


def timed(
    work: Callable[[], object], n: int, *, per: float = 1.0, warm: int = 0, inner: int = 1
) -> list[float]:
    """us of n calls, each divided by `per`. inner: calls in one sample, for what a timer blurs."""
    for _ in range(warm):
        work()
    samples = []
    for _ in range(n):
        start = time.perf_counter()
        for _ in range(inner):
            work()
        samples.append((time.perf_counter() - start) * 1e6 / inner / per)
    return samples


# ---------------------------------------------------------------- a planner without a device


def planner_of(pages: int, gpu: int, host: int, nvme: int = 0) -> Planner:
    """A planner with the default policies and one region of `pages` rows; nothing behind it."""
    table = PageTable()
    sizes = {Place.GPU: gpu, Place.HOST: host, Place.NVME: nvme}
    rankings = {p: Ranking(p, load("lru", max(1, sizes[p])), table) for p in TIERS}
    pools = {p: SlotPool(p, n) for p, n in sizes.items()}
    planner = Planner(table, pools, rankings, routes=ROUTES)
    table.extend(pages)
    return planner


def settle(planner: Planner, plans: list[Plan]) -> None:
    """As if every step had succeeded."""
    for plan in plans:
        planner.settle(Outcome(plan.id, (None,) * len(plan.steps)), 0)


def fill(planner: Planner, rows: Rows, group: int = 512) -> None:
    """Allocate pages and let them rest on the GPU."""
    for start in range(0, len(rows), group):
        request = planner.allocate(rows[start : start + group], 0)
        settle(planner, request.plans)


def rows_of(first: int, n: int) -> Rows:
    return np.arange(first, first + n, dtype=np.int32)


# ---------------------------------------------------------------- sections


def memory(pages: int) -> list[Row]:
    """Bytes that stay allocated, for `pages` pages and scaled to a million.

    The bars are those of the page table, without and with what the slab knows of as many slots,
    keys included. Slot pools and the policies of two tiers come on top.
    """
    slots = min(pages, 1 << 17)
    table = _held(lambda: _table(pages)) / pages
    pools = _held(lambda: [SlotPool(Place.GPU, pages // 4), SlotPool(Place.HOST, pages)]) / pages
    used = _held(lambda: _on_two_tiers(pages)) / pages
    spares = _held(lambda: _with_spares(pages)) / pages
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
        keyed = _held(lambda: _keyed_slab(Path(folder), slots)) / slots
    return [
        row("table_1M_pages", "MB", [table], 64.0),
        row("table_1M_pages_nvme_keys", "MB", [table + keyed], 110.0),
        row("slot_pools_1M_pages", "MB", [pools]),
        row("planner_1M_pages_two_tiers", "MB", [used]),
        row("planner_1M_pages_all_spares", "MB", [spares]),
    ]


def _table(pages: int) -> PageTable:
    table = PageTable()
    table.extend(pages)
    return table


def _held(make: Callable[[], object]) -> float:
    """Bytes that an object keeps allocated, as tracemalloc (and numpy, which reports to it) say."""
    gc.collect()
    tracemalloc.start()
    kept = make()
    gc.collect()
    held = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    close = getattr(kept, "close", None)
    if close is not None:
        close()
    return float(held)


def _on_two_tiers(pages: int) -> Planner:
    """A quarter on the GPU, the rest in the host tier."""
    gpu = pages // 4
    planner = planner_of(pages, gpu, pages - gpu)
    for first in range(0, pages - gpu, gpu):
        rows = rows_of(first, gpu)
        fill(planner, rows)
        for start in range(first, first + gpu, 512):
            part = rows_of(start, min(512, first + gpu - start))
            settle(planner, planner.demote(part, 0))
    fill(planner, rows_of(pages - gpu, gpu))
    return planner


def _with_spares(pages: int) -> Planner:
    """All on the GPU, each with a clean copy in the host tier: the most that spares can cost."""
    planner = planner_of(pages, pages, pages)
    fill(planner, rows_of(0, pages))
    for start in range(0, pages, 512):
        part = rows_of(start, min(512, pages - start))
        settle(planner, planner.demote(part, 0))
        request = planner.fault(part, "read", 0)
        settle(planner, request.plans)
        planner.unpin(part, None)
    return planner


def _keyed_slab(folder: Path, slots: int) -> Slab:
    """A kept slab, every slot of which carries a key."""
    slab = Slab(folder / "slab", 4096, slots, prewrite=False, persist=Persist())
    assert slab.wait_ready(slots, 120.0), "the slab does not get ready"
    for start in range(0, slots, 4096):
        part = rows_of(start, min(4096, slots - start))
        sequences = slab.begin_store(part)
        slab.end_store(part, sequences, np.ones((len(part), slab.checksum_words), np.uint64))
        keys = np.stack([part.astype(np.uint64) + np.uint64(1)] * 2, axis=1)
        zeros = np.zeros(len(part), np.uint32)
        slab.record(part, keys, zeros, zeros)
    return slab


def planner(pages: int) -> list[Row]:
    """Verbs on a table of `pages` rows."""
    found = []
    quarter = pages // 4
    p = planner_of(pages, pages, quarter)
    fill(p, rows_of(0, pages))
    down, up = _settles(p, quarter)
    found.append(row("settle_down_512", "us/page", down, 0.3))
    found.append(row("settle_up_512", "us/page", up, 0.3))
    resident = rows_of(pages // 2, 512)

    def pin_unpin() -> None:
        p.fault(resident, "read", 0)
        p.touch(resident, 0)
        p.unpin(resident, None)

    def pin_unpin_behind_a_fence() -> None:
        p.fault(resident, "read", 0)
        p.touch(resident, 0)
        ticks[0] += 1
        p.unpin(resident, (0, ticks[0]))

    ticks = [0]
    found.append(row("pin_unpin_512", "us", timed(pin_unpin, 2000, warm=50), 50.0))
    found.append(
        row("pin_unpin_512_stream", "us", timed(pin_unpin_behind_a_fence, 2000, warm=50), 50.0)
    )
    p.table.fences.observe(np.array([ticks[0]], np.uint64))
    ranking = p.rankings[Place.GPU]
    found.append(row("victims_256", "us", timed(lambda: ranking.victims(256, 0), 200), 2000.0))
    touched = np.random.default_rng(0).permutation(pages).astype(np.int32)
    for start in range(0, pages, 4096):
        p.touch(touched[start : start + 4096], 0)
    found.append(
        row("victims_256_shuffled", "us", timed(lambda: ranking.victims(256, 0), 200), 2000.0)
    )
    return found


def _settles(p: Planner, host: int) -> tuple[list[float], list[float]]:
    """us a page of settling 512 pages that went to the host, and 512 that came back."""
    down, up = [], []
    for first in range(0, min(host, 200 * 512), 512):
        part = rows_of(first, 512)
        (plan,) = p.demote(part, 0)
        outcome = Outcome(plan.id, (None,))
        start = time.perf_counter()
        p.settle(outcome, 0)
        down.append((time.perf_counter() - start) * 1e6 / 512)
    p.pools[Place.GPU].release(p.pools[Place.GPU].oldest_kept())  # or they would be taken back
    p.table.slot(Place.GPU)[rows_of(0, len(down) * 512)] = -1
    p.table.shown[rows_of(0, len(down) * 512)] = 0
    for first in range(0, len(down) * 512, 512):
        part = rows_of(first, 512)
        request = p.fault(part, "read", 0)
        (plan,) = request.plans
        outcome = Outcome(plan.id, (None,) * len(plan.steps))
        start = time.perf_counter()
        p.settle(outcome, 0)
        up.append((time.perf_counter() - start) * 1e6 / 512)
        p.unpin(part, None)
    return down, up


@contextmanager
def resident_region(pages: int) -> Iterator[Region]:
    """A region on the CPU device with room for all of its pages."""
    page = 4096
    gpu = Gpu(device="cpu", budget=(pages + 64) * page, page=page, high=1.0, low=1.0)
    with Space.open(Config(gpu=gpu, host=Host(capacity=0))) as space:
        yield space.reserve(pages * page, name="control")


def use(pages: int) -> list[Row]:
    """`region.use` of pages that rest on the GPU, entered and left."""
    found = []
    with resident_region(4096) as region:
        everything = region.allocate(4096)
        one, some = int(everything[7]), everything[:512]

        def use_one() -> None:
            with region.use(one):
                pass

        def write_one() -> None:
            with region.use(one, "write"):
                pass

        def use_512() -> None:
            with region.use(some):
                pass

        found.append(row("use_1", "us", timed(use_one, 2000, warm=200, inner=10), 10.0))
        found.append(row("use_1_write", "us", timed(write_one, 2000, warm=200, inner=10), 10.0))
        found.append(row("use_512", "us", timed(use_512, 2000, warm=50)))
    return found


def fault(pages: int) -> list[Row]:
    """`use()` of one page in the host tier until its stream may read it, on the CPU device.

    Pages of 4 KiB, so that nearly all of it is the pager's and the device layer's own time.
    """
    with rig(Shape("cpu", 4096, 1024), "eager") as r:
        took = [us for _ in range(4) for us in paging.fault_us(r, 600, stealing=False)]
    return [row("fault_1", "us", took)]


def allocate(pages: int) -> list[Row]:
    """Pages whose frames are still shown from their last life: nothing is mapped."""
    found = []
    for n, rounds in ((1, 2000), (512, 500), (4096, 200)):
        with resident_region(4096) as region:
            region.free(region.allocate(4096))
            allocates, frees = [], []
            for _ in range(rounds):
                start = time.perf_counter()
                taken = region.allocate(n)
                middle = time.perf_counter()
                region.free(taken)
                frees.append((time.perf_counter() - middle) * 1e6)
                allocates.append((middle - start) * 1e6)
        found.append(row(f"allocate_{n}", "us", allocates[5:]))
        found.append(row(f"free_{n}", "us", frees[5:]))
    return found


def driverless(pages: int) -> list[Row]:
    """What the host does for a fault, a group and an allocation on CUDA, without the driver."""
    from bench.driverless import DriverlessRig, group_us

    found = []
    for hide in HIDES:
        with closing(DriverlessRig(1024, hide)) as r:
            faults = [us for _ in range(3) for us in paging.fault_us(r, 600, stealing=False)]
            name = "fault_1_free_frame" if hide == "eager" else "fault_1_own_frame"
            found.append(row(name, "us", faults))
            if hide == "lazy":
                stolen = [us for _ in range(3) for us in paging.fault_us(r, 600, stealing=True)]
                found.append(row("fault_1_stolen_frame", "us", stolen))
            name = "load_64_free_frames" if hide == "eager" else "load_64_stolen_frames"
            found.append(row(name, "us", group_us(r, 150, stealing=hide == "lazy")))
            for n, rounds in ((1, 1500), (512, 150)):
                allocates, frees = paging.allocate_us(r, n, rounds)
                what = "to_show" if hide == "eager" else "shown"
                found.append(row(f"allocate_{n}_{what}", "us", allocates))
                found.append(row(f"free_{n}_{what}", "us", frees))
    return found


def window(
    pages: int,
    seconds: float = 0.5,
    rounds: int = 9,
    shapes: tuple[tuple[int, int], ...] = ((2 << 20, 16), (64 << 10, 128)),
) -> list[Row]:
    """Pages shown and hidden a second in groups of 64, in turns alone and beside a busy thread.

    Turns, because other work on the machine would otherwise fall on one side only. Frames are
    scattered, so that no two pages share a call. 2 MiB is what the CPU device uses by default;
    with 64 KiB a group is mapped in a twentieth of the time, and Python's share in it shows. So
    many groups are in flight that they bridge the 5 ms in which the interpreter lock comes back.
    shapes: page size and groups in flight, each.
    """
    return [found for shape in shapes for found in _window_of(*shape, seconds, rounds)]


def _window_of(page: int, in_flight: int, seconds: float, rounds: int) -> list[Row]:
    quiet, busy, alone, beside = [], [], [], []
    with EmulatedDevice(page, GROUP * in_flight) as device:
        work = _shower(device, in_flight)
        work(seconds)
        for _ in range(rounds):
            quiet.append(work(seconds))
            with BusyThread() as thread:
                time.sleep(seconds)
            alone.append(thread.per_s)
            with BusyThread() as thread:
                busy.append(work(seconds))
            beside.append(thread.per_s)
    kept = [100.0 * b / q for b, q in zip(busy, quiet, strict=True)]
    slower = [100.0 * (1.0 - b / a) for b, a in zip(beside, alone, strict=True)]
    size = f"{page >> 10}KiB"
    return [
        rate_row(f"show_hide_{size}_quiet", "pages/s", quiet),
        rate_row(f"show_hide_{size}_beside", "pages/s", busy),
        rate_row(f"show_hide_{size}_rate_kept", "%", kept, 90.0),
        row(f"python_slower_{size}", "%", slower, 3.0),
    ]


def _shower(device: EmulatedDevice, in_flight: int) -> Callable[[float], float]:
    """Shows and hides groups, `in_flight` of them queued at any time; pages a second."""
    n = GROUP * in_flight
    start = device.reserve(n * device.page_bytes)
    at = np.arange(n, dtype=np.uint64) * np.uint64(device.page_bytes) + np.uint64(start)
    frames = np.random.default_rng(0).permutation(n).astype(np.int32)
    groups = [slice(i, i + GROUP) for i in range(0, n, GROUP)]
    pairs = [(at[g], frames[g]) for g in groups]

    def run(seconds: float) -> float:
        queued: deque[Done] = deque()
        ended, began = 0, time.perf_counter()
        while time.perf_counter() - began < seconds:
            for where, what in pairs:
                queued.append(device.window.show(where, what))
                queued.append(device.window.hide(where))
                while len(queued) > in_flight:
                    queued.popleft().wait()
                    ended += GROUP
        while queued:
            queued.popleft().wait()
            ended += GROUP
        return ended / (time.perf_counter() - began)

    return run


SECTIONS: dict[str, Callable[[int], list[Row]]] = {
    "memory": memory,
    "planner": planner,
    "use": use,
    "fault": fault,
    "allocate": allocate,
    "driverless": driverless,
    "window": window,
}


def measure(sections: list[str], pages: int) -> dict[str, object]:
    """The record that is written; see the top of this file."""
    rows = [r for name in sections for r in SECTIONS[name](pages)]
    return {
        "schema": SCHEMA,
        "machine": msgspec.to_builtins(machine()),
        "pages": pages,
        "rows": [asdict(r) for r in rows],
    }


def show(rows: list[dict[str, object]]) -> None:
    print(f"{'figure':<30}{'unit':>11}{'n':>7}{'median':>13}{'p99':>13}{'bar':>9}")
    for r in rows:
        verdict = {None: "", True: "  holds", False: "  MISSED"}[r["holds"]]  # type: ignore[index]
        bar = "" if r["bar"] is None else r["bar"]
        print(
            f"{r['name']:<30}{r['unit']:>11}{r['n']:>7}{r['median']:>13}{r['p99']:>13}{bar:>9}"
            + verdict
        )


def main() -> int:
    parser = argparse.ArgumentParser(description="What the core costs when no byte moves.")
    parser.add_argument("--out", type=Path, help="write JSON here")
    parser.add_argument("--only", nargs="*", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--pages", type=int, default=1_000_000)
    asked = parser.parse_args()
    record = measure(asked.only, asked.pages)
    rows = record["rows"]
    assert isinstance(rows, list)
    show(rows)
    if asked.out:
        asked.out.write_text(json.dumps(record, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
