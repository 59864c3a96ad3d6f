"""What prefetch takes off a request's wait: the same requests with each policy, as JSON.

    python bench/prefetch.py [--device cpu] [--gpu-pages 256] [--page 2MiB] [--json prefetch.json]

Sessions of equal chains, four times what the GPU tier holds, come back in random order. The next
four requests are told while one is computed (a sleep). Prints, for each policy, the wait of a
request until its chain is on the GPU, and the quality of prefetch.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from pathlib import Path

import msgspec
import numpy as np

from tiermem import Config, Evict, Gpu, Host, Space
from tiermem.bench.machine import machine
from tiermem.config import Prefetch
from tiermem.facts import Expected, Left, Queued
from tiermem.policies.base import PrefetchQuality
from tiermem.region import Region
from tiermem.stats import Statistics
from tiermem.tier import GPU
from tiermem.units import parse_bytes

AHEAD = 4
WARM = 20


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cpu", help="cpu, or cuda:0")
    parser.add_argument("--gpu-pages", type=int, default=256)
    parser.add_argument("--page", default="2MiB")
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--compute-ms", type=float, default=20.0)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    page, pages = parse_bytes(given.page), given.gpu_pages
    rows = []
    for name in ("off", "queue", "hint"):
        config = Config(
            gpu=Gpu(device=given.device, page=page, budget=pages * page, high=1.0, low=0.75),
            host=Host(capacity=5 * pages * page),
            evict=Evict(gpu="lru", host="lru"),
            prefetch=Prefetch(name=name, budget=pages * page // 4),
        )
        with Space.open(config) as space:
            rows.append({"policy": name, **serve(space, pages, given.requests, given.compute_ms)})
        print(json.dumps(rows[-1]))
    if given.json:
        found = {
            "schema": "tiermem.prefetch.v1",
            "machine": msgspec.to_builtins(machine()),
            "device": given.device,
            "page_bytes": page,
            "gpu_pages": pages,
            "chain_pages": pages // 16,
            "compute_ms": given.compute_ms,
            "rows": rows,
        }
        given.json.write_text(json.dumps(found, indent=1) + "\n")


def serve(space: Space, pages: int, requests: int, compute_ms: float) -> dict[str, object]:
    """Waits of the requests after a warm-up, in ms, and what became of pages loaded ahead."""
    region = space.reserve(4 * pages * space.page_bytes)
    chains = [region.allocate(pages // 16) for _ in range(64)]  # deepest first
    for chain in chains:
        with region.use(chain, "write"):
            pass
    order = np.random.default_rng(0).integers(0, 64, requests + AHEAD).tolist()
    for at in range(AHEAD):
        _tell(region, at, order, chains, compute_ms)
    waits_ms = []
    before = space.statistics()
    for at, session in enumerate(order[:requests]):
        _tell(region, at + AHEAD, order, chains, compute_ms)
        start_s = time.perf_counter()
        with region.use(chains[session]):
            waits_ms.append(1e3 * (time.perf_counter() - start_s))
            region.tell(Left(at))
            time.sleep(compute_ms / 1e3)
        if at == WARM:
            before = space.statistics()
    after = space.statistics()
    found: dict[str, object] = {
        "requests": requests - WARM,
        "wait_ms_p50": float(np.percentile(waits_ms[WARM:], 50)),
        "wait_ms_p99": float(np.percentile(waits_ms[WARM:], 99)),
        "loaded_on_demand_pages": after.counts["faulted"] - before.counts["faulted"],
        "loaded_pages": _arrived(after) - _arrived(before),
    }
    if before.prefetch is not None and after.prefetch is not None:
        quality = since(before.prefetch.quality, after.prefetch.quality)
        for name in ("coverage", "accuracy", "timeliness", "pollution", "wasted_bytes"):
            found[name] = getattr(quality, name)
    return found


def _tell(
    region: Region, at: int, order: list[int], chains: list[np.ndarray], compute_ms: float
) -> None:
    """A request joins the queue; of every second session it was known before that it would come."""
    if at >= len(order):
        return
    chain = chains[order[at]][::-1]
    if at % 2:
        region.tell(Expected(order[at], chain, in_s=AHEAD * compute_ms / 1e3))
    region.tell(Queued(at, chain))


def since(before: PrefetchQuality, after: PrefetchQuality) -> PrefetchQuality:
    """What was counted between two moments."""
    counts = {
        field.name: getattr(after, field.name) - getattr(before, field.name)
        for field in dataclasses.fields(after)
    }
    return PrefetchQuality(**{**counts, "page_bytes": after.page_bytes})


def _arrived(now: Statistics) -> int:
    return sum(route.pages for route in now.routes if route.dst == GPU)


if __name__ == "__main__":
    main()
