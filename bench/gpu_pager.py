"""The bars of the GPU tier, through the whole pager, as JSON; resumable, section by section.

    python bench/gpu_pager.py [--out pager.json] [--only SECTION ...] [--device cuda:0]

A section that is in the output file already is not measured again. Figures are lists of rounds;
the summary prints n, median and p99 of each.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np

from bench import gpu_profile, gpu_slices
from bench.gpu_gemm import gemm
from bench.gpu_in_place import crossover, in_place_rate
from tiermem.bench import paging
from tiermem.bench.rig import AHEAD, Lap, Rig, Shape, rig
from tiermem.config import Config, Gpu, Host
from tiermem.space import Space

MIB = 1 << 20
ROUNDS = 5
SHORT_S = 0.0002
Section = Callable[[str], dict[str, object]]


def shapes(device: str) -> dict[str, Shape]:
    if device == "cpu":
        return {"64KiB": Shape(device, 65536, 1024)}
    return {"2MiB": Shape(device, 2 * MIB, 4096), "8MiB": Shape(device, 8 * MIB, 2048)}


def gbps(laps: list[Lap]) -> list[float]:
    return [lap.gbps for lap in laps]


def cpu(laps: list[Lap]) -> list[float]:
    """Processor seconds of the process for each GiB moved."""
    return [lap.cpu_s / (lap.nbytes / 2**30) for lap in laps]


SCENES: dict[str, paging.Scene] = {
    "evict": paging.evict,
    "load": paging.load,
    "steal": paging.steal,
    "swap": paging.swap,
    "load_ahead": paging.load_ahead,
    "steal_ahead": paging.steal_ahead,
}


@contextmanager
def rig_for(name: str, shape: Shape) -> Iterator[Rig]:
    """A space of its own for each scene."""
    hide = "eager" if name.startswith("load") else "lazy"
    with rig(shape, hide, AHEAD if name == "swap" else 0) as r:  # type: ignore[arg-type]
        yield r


def streams(device: str) -> dict[str, object]:
    """Evict, load, steal and swap (GB/s)."""
    found: dict[str, object] = {}
    for name, shape in shapes(device).items():
        for work, scene in SCENES.items():
            with rig_for(work, shape) as r:
                laps = paging.take(scene(r), ROUNDS)
                found[f"{work}_{name}_gbps"] = gbps(laps)
                found[f"{work}_{name}_cpu_s_per_gib"] = cpu(laps)
    return found


def guard(device: str) -> dict[str, object]:
    """The main rows with the guard page shown wherever no page is (GB/s)."""
    found: dict[str, object] = {}
    for name, shape in shapes(device).items():
        guarded = replace(shape, pages=shape.pages // 4, guard=True)
        for work in ("evict", "load", "steal", "swap"):
            with rig_for(work, guarded) as r:
                found[f"{work}_{name}_gbps"] = gbps(paging.take(SCENES[work](r), ROUNDS))
    return found


def busy(device: str) -> dict[str, object]:
    """The main rows beside a thread of pure Python, by how long it may keep the interpreter lock.

    200 us instead of Python's 5 ms (`sys.setswitchinterval`), which is the application's to set.
    """
    found: dict[str, object] = {}
    usual = sys.getswitchinterval()
    for keeps_s, suffix in ((usual, ""), (SHORT_S, "_short")):
        sys.setswitchinterval(keeps_s)
        try:
            alone = paging.alone_per_s(1.0)
            for name, shape in shapes(device).items():
                few = replace(shape, pages=shape.pages // 4)  # at a tenth of the quiet rate
                for work in ("evict", "load", "steal", "swap"):
                    with rig_for(work, few) as r, paging.BusyThread() as thread:
                        laps = paging.take(SCENES[work](r), ROUNDS)
                    lost = 100.0 * (1.0 - thread.per_s / alone)
                    found[f"{work}_{name}{suffix}_gbps"] = gbps(laps)
                    found[f"{work}_{name}{suffix}_thread_lost_percent"] = [lost]
        finally:
            sys.setswitchinterval(usual)
    return found


def fault(device: str) -> dict[str, object]:
    found: dict[str, object] = {}
    for name, shape in shapes(device).items():
        with rig(shape, "eager") as r:
            found[f"fault_{name}_us"] = paging.fault_us(r, 500, stealing=False)
        with rig(shape) as r:
            found[f"fault_stealing_{name}_us"] = paging.fault_us(r, 500, stealing=True)
    return found


def window(device: str) -> dict[str, object]:
    found: dict[str, object] = {}
    for name, shape in shapes(device).items():
        with rig(shape) as r:
            shows, hides = paging.window_us(r, 4 * ROUNDS)
        found |= {f"show_{name}_us": shows, f"hide_{name}_us": hides}
    return found


def allocate(device: str) -> dict[str, object]:
    found: dict[str, object] = {}
    shape = next(iter(shapes(device).values()))
    shape = Shape(shape.device, shape.page_bytes, 4096)
    for hide, sizes in (("eager", (1, 64, 512)), ("lazy", (1, 512, 4096))):
        for n in sizes:
            with rig(shape, hide) as r:  # type: ignore[arg-type]
                a, b = paging.allocate_us(r, n, 50 if n < 4096 else 20)
            found |= {f"allocate_{hide}_{n}_us": a, f"free_{hide}_{n}_us": b}
    return found


def first_page(device: str) -> dict[str, object]:
    """Seconds from Space.open until a page is usable, beside a pool of 64 GiB that grows."""
    big = "64GiB" if device != "cpu" else "1GiB"
    page = 2 * MIB if device != "cpu" else 65536
    config = Config(gpu=Gpu(device=device, budget=512 * page, page=page), host=Host(capacity=big))
    start = time.perf_counter()
    with Space.open(config) as space, space.reserve(512 * page) as region:
        pages = region.allocate(1)
        with region.use(pages, "write"):
            first = time.perf_counter() - start
        while True:
            host = space.statistics().tiers[1]
            if host.capacity == host.configured or time.perf_counter() - start > 60:
                break
            time.sleep(0.02)
        took = time.perf_counter() - start
    return {
        "first_page_s": [first],
        "pool_gib_per_s": [host.capacity * page / 2**30 / took],
        "pool_gib": [host.capacity * page / 2**30],
    }


def profile(device: str) -> dict[str, object]:
    """The parts of a load, call by call (us): what a row that misses its bar is made of."""
    return gpu_profile.profile(shapes(device), 2)


def slices(device: str) -> dict[str, object]:
    """When a group of 2 GiB can be read, by page size (ms)."""
    if device == "cpu":
        return gpu_slices.slices({"64KiB": Shape(device, 65536, 256)}, ROUNDS)
    sizes = {"2MiB": 2 * MIB, "8MiB": 8 * MIB, "32MiB": 32 * MIB}
    shapes = {name: Shape(device, page, (2 << 30) // page) for name, page in sizes.items()}
    return gpu_slices.slices(shapes, ROUNDS)


SECTIONS: dict[str, Section] = {
    f.__name__: f
    for f in (
        streams, fault, window, allocate, first_page, busy, guard, crossover, in_place_rate, gemm,
        profile, slices,
    )
}  # fmt: skip


def summary(figures: dict[str, object]) -> None:
    for key, values in figures.items():
        if isinstance(values, list):
            p99 = float(np.percentile(values, 99))
            print(f"  {key:42} n={len(values):4} median={statistics.median(values):10.2f} "
                  f"p99={p99:10.2f}", flush=True)  # fmt: skip
        else:
            print(f"  {key}: {values}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("pager.json"))
    parser.add_argument("--only", nargs="*", default=list(SECTIONS))
    parser.add_argument("--device", default="cuda:0")
    arguments = parser.parse_args()
    found = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
    for name in arguments.only:
        if name in found:
            continue
        print(name, flush=True)
        start = time.perf_counter()
        try:
            found[name] = SECTIONS[name](arguments.device)
            summary(found[name])
        except Exception:
            traceback.print_exc()
            continue
        print(f"  took {time.perf_counter() - start:.1f} s", flush=True)
        arguments.out.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
