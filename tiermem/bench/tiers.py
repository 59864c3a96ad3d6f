"""Three tiers and what they cost: hits by tier, stall, time to the first token, NVMe writes.

A request looks up the leading run of its blocks that are in any tier; then all its blocks are in
GPU memory (what does not fit: in host memory). A GPU victim goes to host memory, a host victim to
NVMe, one write unless a copy lives there; NVMe keeps its copy when a block is promoted.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import msgspec
import numpy as np
import numpy.typing as npt
from rich.table import Table

from tiermem.bench.replay import EVERY, Facts, facts_of
from tiermem.bench.workload import Workload
from tiermem.policies import load
from tiermem.policies.admission import admission
from tiermem.policies.base import Eviction, Ids, Keys, Mask
from tiermem.policies.trial import checked
from tiermem.tier import TIERS, Place

BLOCK_TOKENS = 512
"""Where a trace does not say how long a prompt is."""


@dataclass(frozen=True, slots=True)
class Costs:
    """The machine and the model. The defaults are an 8B model with blocks of 512 tokens on an
    H200 (its prefill at 16,384 tokens, its host link, its virtual disk; November 2026)."""

    page_bytes: int = 64 << 20
    host_gbps: float = 54.0
    nvme_gbps: float = 3.0
    prefill_tokens_per_s: float = 34_000.0
    servers: int = 0
    prefetch: Literal["none", "queue"] = "none"
    admission: Literal["all", "second", "reuse"] = "all"
    write_mbps: float = 0.0
    nvme_policy: str = "lru"


class TierRow(msgspec.Struct, frozen=True):
    """One policy on GPU and host memory. Hits count blocks of leading runs, by where they were."""

    policy: str
    capacity_blocks: tuple[int, int, int]
    accesses: int
    gpu_hits: int
    host_hits: int
    nvme_hits: int
    prefix_hit_ratio: float
    stall_s: float
    """Seconds of loading, over all requests."""
    ttft_mean_s: float
    ttft_p50_s: float
    ttft_p90_s: float
    ttft_p99_s: float
    nvme_written_blocks: int
    nvme_written_bytes: int
    nvme_refused_blocks: int
    """Left host memory and were not written: not admitted, or over the budget."""

    def table(self) -> Table:
        """As two columns."""
        table = Table(f"{self.policy}, blocks {'/'.join(f'{n:,}' for n in self.capacity_blocks)}")
        table.add_column(justify="right")
        for word, value in (
            ("hits in GPU / host / NVMe",
             f"{self.gpu_hits:,} / {self.host_hits:,} / {self.nvme_hits:,}"),
            ("prefix hit ratio", f"{self.prefix_hit_ratio:.4f}"),
            ("stall, all requests", f"{self.stall_s:,.1f} s"),
            ("TTFT mean", f"{self.ttft_mean_s:.3f} s"),
            ("TTFT p50 / p90 / p99",
             f"{self.ttft_p50_s:.3f} / {self.ttft_p90_s:.3f} / {self.ttft_p99_s:.3f} s"),
            ("written to NVMe",
             f"{self.nvme_written_blocks:,} blocks, {self.nvme_written_bytes / 1e9:,.1f} GB"),
            ("not written", f"{self.nvme_refused_blocks:,} blocks"),
        ):  # fmt: skip
            table.add_row(word, value)
        return table


class _Tier:
    """One tier's units and policy."""

    def __init__(self, units: int, capacity: int, policy: Eviction) -> None:
        self.held: Mask = np.zeros(units, np.bool_)
        self.capacity = capacity
        self.size = 0
        self.policy = policy
        self.pinned: Mask = np.zeros(units, np.bool_)

    def keep(self, units: Ids) -> Mask:
        return self.held[units] & ~self.pinned[units]

    def all(self) -> Ids:
        return np.flatnonzero(self.held & ~self.pinned).astype(np.int32)

    def room(self, n: int, now: int) -> Ids:
        """Victims that make room for n units, taken out."""
        short = n - (self.capacity - self.size)
        if short <= 0:
            return np.empty(0, np.int32)
        units = checked(self.policy.victims(self, short, now), self, short, self.policy)
        self.take(units, now)
        return units

    def put(self, units: Ids, parents: Ids, depths: Ids, now: int) -> None:
        if len(units):
            keys: Keys = units.astype(np.uint64)
            self.policy.inserted(units, parents, depths, keys, now)
            self.held[units] = True
            self.size += len(units)

    def take(self, units: Ids, now: int) -> None:
        if len(units):
            self.policy.removed(units, now)
            self.held[units] = False
            self.size -= len(units)


class Tiers:
    """Where every block is; told of requests, it moves them."""

    def __init__(
        self, units: int, capacities: Sequence[int], policies: Sequence[Eviction], costs: Costs
    ) -> None:
        self.gpu, self.host, self.nvme = (
            _Tier(units, capacity, policy)
            for capacity, policy in zip(capacities, policies, strict=True)
        )
        for tier in (self.host, self.nvme):
            tier.pinned = self.gpu.pinned
        self.at = np.full(units, Place.NONE, np.uint8)
        self._parent: Ids = np.full(units, -1, np.int32)
        self._depth: Ids = np.zeros(units, np.int32)
        self._admission = admission(costs.admission, costs.write_mbps * 1e6, costs.page_bytes)
        self.written = self.refused = 0

    def look_up(self, blocks: Ids) -> npt.NDArray[np.uint8]:
        """Where the blocks of the leading run are."""
        places = self.at[blocks]
        absent = np.flatnonzero(places == Place.NONE)
        return places[: absent[0]] if len(absent) else places

    def use(self, blocks: Ids, now: int) -> None:
        """A request uses these blocks, each once, first block first: they come to the GPU."""
        self._depth[blocks] = np.arange(len(blocks))
        self._parent[blocks[1:]] = blocks[:-1]
        self._parent[blocks[0]] = -1
        self.gpu.pinned[blocks] = True
        self._admission.used(blocks, self._depth[blocks], now)
        deepest = blocks[::-1]
        for tier in (self.gpu, self.nvme):
            tier.policy.accessed(deepest[tier.held[deepest]], now)
        coming = deepest[~self.gpu.held[deepest]]
        self.host.take(coming[self.host.held[coming]], now)
        self._demote(self.gpu.room(len(coming), now), now)
        space = self.gpu.capacity - self.gpu.size
        up, over = coming[:space], coming[space:]
        self.gpu.put(up, self._parent[up], self._depth[up], now)
        self.at[up] = Place.GPU
        # Retouched whole, so that order by last use is order by depth.
        self.gpu.policy.accessed(deepest[self.gpu.held[deepest]], now)
        self._demote(over, now)
        self.gpu.pinned[blocks] = False

    def finish(self, blocks: Ids, facts: Facts, now: int) -> None:
        """The request that used these blocks ended."""
        deepest = blocks[::-1]
        for tier in (self.gpu, self.host, self.nvme):
            tier.policy.finished(deepest[tier.held[deepest]], facts, now)

    def _demote(self, units: Ids, now: int) -> None:
        """Out of GPU memory, into host memory, whose victims go to NVMe."""
        if not len(units):
            return
        self._to_nvme(self.host.room(len(units), now), now)
        space = self.host.capacity - self.host.size
        # What is to leave first goes past host memory if it does not hold all.
        past = max(0, len(units) - space)
        self._to_nvme(units[:past], now)
        into = units[past:]
        self.host.put(into, self._parent[into], self._depth[into], now)
        self.at[into] = Place.HOST

    def _to_nvme(self, units: Ids, now: int) -> None:
        if not len(units):
            return
        self.at[units] = Place.NVME
        new = units[~self.nvme.held[units]]
        admitted = self._admission.admit(new, now) if self.nvme.capacity else new < 0
        self.refused += int(np.count_nonzero(~admitted))
        self._lose(new[~admitted])
        new = new[admitted]
        left = self.nvme.room(len(new), now)
        # A copy that leaves takes the block with it only if it was the block's place.
        self._lose(left[self.at[left] == Place.NVME])
        space = self.nvme.capacity - self.nvme.size
        self._lose(new[space:])
        new = new[:space]
        self.nvme.put(new, self._parent[new], self._depth[new], now)
        self.written += len(new)

    def _lose(self, units: Ids) -> None:
        self.at[units] = Place.NONE
        self._admission.gone(units)


def tiered(
    workload: Workload,
    name: str,
    capacities: Sequence[int],
    costs: Costs,
    features: bool = True,
    progress: Callable[[int], None] | None = None,
) -> TierRow:
    """Replay on three tiers with one policy for GPU and host memory."""
    return timed(workload, name, capacities, costs, features, progress)[0]


def timed(
    workload: Workload,
    name: str,
    capacities: Sequence[int],
    costs: Costs,
    features: bool = True,
    progress: Callable[[int], None] | None = None,
) -> tuple[TierRow, npt.NDArray[np.float64]]:
    """The same, with each request's time to the first token in s."""
    names = (name, name, costs.nvme_policy)
    policies = [load(each, max(1, size)) for each, size in zip(names, capacities, strict=True)]
    tiers = Tiers(workload.distinct, capacities, policies, costs)
    hits = dict.fromkeys(TIERS, 0)
    stall = np.zeros(workload.requests)
    compute = np.zeros(workload.requests)
    for request in range(workload.requests):
        now = int(workload.time_ms[request])
        blocks = workload.of(request)
        _, first = np.unique(blocks, return_index=True)
        blocks = blocks if len(first) == len(blocks) else blocks[np.sort(first)]
        run = tiers.look_up(blocks)
        for place in TIERS:
            hits[place] += int(np.count_nonzero(run == place))
        stall[request] = load_s(run, costs)
        tokens = int(workload.input_tokens[request]) or BLOCK_TOKENS * len(blocks)
        compute[request] = tokens * (1 - len(run) / len(blocks)) / costs.prefill_tokens_per_s
        tiers.use(blocks, now)
        tiers.finish(blocks, facts_of(workload, request, features), now)
        if progress and request % EVERY == 0:
            progress(request)
    ttft = first_token_s(workload.time_ms / 1000, stall, compute, costs)
    p50, p90, p99 = (float(x) for x in np.percentile(ttft, (50, 90, 99)))
    row = TierRow(
        policy=name, capacity_blocks=(capacities[0], capacities[1], capacities[2]),
        accesses=workload.accesses,
        gpu_hits=hits[Place.GPU], host_hits=hits[Place.HOST], nvme_hits=hits[Place.NVME],
        prefix_hit_ratio=sum(hits.values()) / workload.accesses,
        stall_s=float(stall.sum()), ttft_mean_s=float(ttft.mean()),
        ttft_p50_s=p50, ttft_p90_s=p90, ttft_p99_s=p99,
        nvme_written_blocks=tiers.written, nvme_written_bytes=tiers.written * costs.page_bytes,
        nvme_refused_blocks=tiers.refused,
    )  # fmt: skip
    return row, ttft


def load_s(run: npt.NDArray[np.uint8], costs: Costs) -> float:
    """Seconds to bring a leading run to the GPU, one route after the other."""
    host, nvme = (int(np.count_nonzero(run == place)) for place in (Place.HOST, Place.NVME))
    nbytes = costs.page_bytes / 1e9
    return host * nbytes / costs.host_gbps + nvme * nbytes / costs.nvme_gbps


def first_token_s(
    arrival_s: npt.NDArray[np.float64],
    stall_s: npt.NDArray[np.float64],
    compute_s: npt.NDArray[np.float64],
    costs: Costs,
) -> npt.NDArray[np.float64]:
    """float64[requests]: from arrival to the first token.

    With servers, requests wait in one queue and hold a server while they load and compute; with
    prefetch they load while they wait, one at a time over the link, and hold it for computing only.
    """
    if costs.servers == 0:
        return stall_s + compute_s
    free = [0.0] * costs.servers
    link = 0.0
    found = np.empty(len(arrival_s))
    for i, arrival in enumerate(arrival_s.tolist()):
        start = max(arrival, free[0])
        if costs.prefetch == "queue":
            link = max(arrival, link) + float(stall_s[i])
            end = max(start, link) + float(compute_s[i])
        else:
            end = start + float(stall_s[i]) + float(compute_s[i])
        heapq.heapreplace(free, end)
        found[i] = end - arrival
    return found
