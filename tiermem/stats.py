"""Frozen snapshots of what a space holds and has done."""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from tiermem.policies.base import PrefetchQuality, ShadowReport
from tiermem.tier import Place


@dataclass(frozen=True, slots=True)
class TierStatistics:
    """Slots of one tier, in pages. used + kept + free == capacity <= configured."""

    place: Place
    configured: int
    capacity: int
    used: int
    kept: int
    free: int
    bytes_used: int
    policy: str
    fallbacks: int
    late: int
    failed: bool


@dataclass(frozen=True, slots=True)
class RouteStatistics:
    """What one route moved. busy_s: wall time with a copy under way; path: the way really taken."""

    src: Place
    dst: Place
    pages: int
    nbytes: int
    failed: int
    busy_s: float
    path: str

    @property
    def gbps(self) -> float:
        """10^9 bytes a second while busy; 0 if nothing moved."""
        return self.nbytes / self.busy_s / 1e9 if self.busy_s else 0.0


@dataclass(frozen=True, slots=True)
class LatencyStatistics:
    """Percentiles of the last samples, in seconds; 0 without samples."""

    n: int
    p50_s: float
    p99_s: float


@dataclass(frozen=True, slots=True)
class LeaseStatistics:
    """GPU bytes of this process under its lease, and of all processes that share the device."""

    held: int
    reserved: int
    wanted: int
    share: int
    owed: int
    floor: int
    cap: int
    members: int
    budget: int
    all_held: int
    free: int


@dataclass(frozen=True, slots=True)
class PrefetchStatistics:
    """The prefetch policy that runs. queued: requests that wait; budget: bytes that may be loaded
    ahead and unused; failures: times that a policy was replaced because it broke the rules."""

    policy: str
    queued: int
    budget: int
    failures: int
    quality: PrefetchQuality


@dataclass(frozen=True, slots=True)
class Statistics:
    """One moment of a space. counts: how often each arc of the state drawing was taken."""

    page_bytes: int
    pages: int
    tiers: tuple[TierStatistics, ...]
    routes: tuple[RouteStatistics, ...]
    counts: Mapping[str, int]
    fault: LatencyStatistics
    lease: LeaseStatistics | None = None  # None: the GPU is not shared
    prefetch: PrefetchStatistics | None = None  # None: nothing is loaded ahead by a policy
    shadow: tuple[ShadowReport, ...] = ()  # of the policies on trial, the one that runs first

    def tier(self, place: Place) -> TierStatistics:
        return next(t for t in self.tiers if t.place == place)


class Pace:
    """How fast a route is of late: bytes by the time that it was busy, the latest counting most."""

    def __init__(self, half_s: float = 2.0) -> None:
        """half_s: after so much more busy time, a copy counts half."""
        self._half_s = half_s
        self._seen = (0, 0.0)
        self._nbytes = 0.0
        self._busy_s = 0.0

    def observe(self, nbytes: int, busy_s: float) -> None:
        """Totals since the route was opened, never less than before."""
        more, longer_s = nbytes - self._seen[0], busy_s - self._seen[1]
        self._seen = (nbytes, busy_s)
        fade = 0.5 ** (longer_s / self._half_s)
        self._nbytes = self._nbytes * fade + more
        self._busy_s = self._busy_s * fade + longer_s

    @property
    def gbps(self) -> float:
        """10^9 bytes a second; infinite until something has moved."""
        return self._nbytes / self._busy_s / 1e9 if self._nbytes and self._busy_s else math.inf


class Latencies:
    """The last `size` samples of a duration."""

    def __init__(self, size: int = 1 << 16) -> None:
        self._lock = threading.Lock()
        self._samples = np.zeros(size, np.float32)
        self._n = 0

    def add(self, took_s: float) -> None:
        with self._lock:
            self._samples[self._n % len(self._samples)] = took_s
            self._n += 1

    def statistics(self) -> LatencyStatistics:
        with self._lock:
            samples = self._samples[: min(self._n, len(self._samples))].copy()
        if not len(samples):
            return LatencyStatistics(0, 0.0, 0.0)
        p50, p99 = np.percentile(samples, [50, 99])
        return LatencyStatistics(self._n, float(p50), float(p99))
