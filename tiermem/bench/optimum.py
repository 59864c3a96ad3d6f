"""What no policy can beat: the offline optimum of request mode, and the ceiling of reuse."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from tiermem.bench import fast
from tiermem.bench.replay import next_accesses
from tiermem.bench.workload import I64, Workload
from tiermem.policies.trial import Score

DEPTH_BITS = 22
"""A request has fewer blocks than two to this power; so has the trace requests to the rest."""

NEVER = 2**62


def optimum(workload: Workload, capacity: int) -> Score:
    """Belady for requests: keep what a next request needs soonest, the shallower one of equals."""
    hit = np.zeros(workload.accesses, np.uint8)
    fast.optimum(
        workload.blocks, workload.start, next_requests(workload), NEVER,
        workload.distinct, capacity, hit,
    )  # fmt: skip
    return scored(workload, hit)


def next_requests(workload: Workload) -> I64:
    """int64[accesses]: (next request with this block) << 22 | depth, or NEVER."""
    following = next_accesses(workload.blocks)
    request = np.repeat(np.arange(workload.requests), np.diff(workload.start))
    depth = np.arange(workload.accesses) - workload.start[request]
    later = np.append(request, 0)[following]
    return np.where(following < workload.accesses, later << DEPTH_BITS | depth, NEVER)


def scored(workload: Workload, hit: npt.NDArray[np.uint8]) -> Score:
    """Hits and prefix hits from one byte an access."""
    size = np.diff(workload.start)
    end = np.repeat(workload.start[1:], size)
    first_miss = np.minimum.reduceat(
        np.where(hit == 0, np.arange(len(hit)), end), workload.start[:-1]
    )
    return Score(
        accesses=workload.accesses,
        hits=int(hit.sum()),
        prefix_hits=int((first_miss - workload.start[:-1]).sum()),
        inserted=int(len(hit) - hit.sum()),
    )


def ceiling(workload: Workload) -> float:
    """The ratio of accesses to blocks that were seen before: endless capacity."""
    return 1 - len(np.unique(workload.blocks)) / workload.accesses
