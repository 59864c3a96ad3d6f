"""Load or recompute: how much of a chain to fetch, and from where on computing is cheaper.

A chain's blocks are needed in order: what is loaded must be a prefix, the rest is computed. So the
question is one number: the length of the loaded prefix with the least time to the first token.
Nothing here knows a space: places, sizes and speeds come in, a cut goes out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tiermem.errors import ConfigError
from tiermem.tier import Place

Places = npt.NDArray[np.uint8]
I64 = npt.NDArray[np.int64]
F64 = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class RouteSpeed:
    """One route to the GPU as it is now.

    gbps: 10^9 bytes a second while busy; infinite where nothing has been measured yet, so that
    the first loads are made and measure it. queued_bytes: what others have under way on it.
    """

    gbps: float = math.inf
    latency_s: float = 0.0
    queued_bytes: int = 0


@dataclass(frozen=True, slots=True)
class ModelSpeed:
    """How fast the engine computes a prompt.

    prefill_tokens_per_s: as measured at short prompts; attention_s_per_token2: what each token
    costs more for each token before it (attention grows with length), 0 if not known.
    """

    prefill_tokens_per_s: float
    attention_s_per_token2: float = 0.0


@dataclass(frozen=True, slots=True)
class Split:
    """Load blocks [0, load), compute the rest.

    load_s, compute_s: of the two parts, waits included. total_s: until both are done;
    compute_all_s: the same if nothing were loaded. Less is never possible with another cut.
    """

    load: int
    load_s: float
    compute_s: float
    total_s: float
    compute_all_s: float


def split(
    places: Places,
    nbytes: int | I64,
    tokens: int | I64,
    routes: Mapping[Place, RouteSpeed],
    model: ModelSpeed,
    *,
    suffix_tokens: int = 0,
    wait_s: float = 0.0,
    overlap: bool = False,
) -> Split:
    """The cheapest cut of a chain. O(n): 73 us for 1,000 blocks (2-core, loaded).

    places: uint8[n], where each block is, first block first. nbytes, tokens: of each block, or
    int64[n]; a block of 0 bytes is on its way already and costs the wait for what is queued.
    routes: by the place that they come from. What lies behind the first block that no route
    reaches (NONE, LOST, a tier without one) must be computed.
    suffix_tokens: behind the chain, computed in any case. wait_s: until the processors are free
    for this request; loads need not wait for that. overlap: loads run beside the computation (an
    engine that starts computing while layers arrive), so the longer of the two counts, not the
    sum. Raises ConfigError for speeds that are not above 0.
    """
    _refuse_still(routes, model)
    n = len(places)
    held = [Place.GPU, *routes]
    gone = np.flatnonzero(~np.isin(places, np.array(held, np.uint8)))
    reach = int(gone[0]) if len(gone) else n
    sizes = np.broadcast_to(np.asarray(nbytes, np.int64), n)
    arrived_s = arrivals_s(places[:reach], sizes[:reach], routes)
    load_s = np.maximum.accumulate(np.concatenate([np.zeros(1), arrived_s]))
    starts = _running(np.broadcast_to(np.asarray(tokens, np.int64), n))
    compute_s = _compute_s(starts[: reach + 1], int(starts[-1]) + suffix_tokens, model)
    total_s = np.maximum(load_s, wait_s + (compute_s if overlap else 0.0))
    if not overlap:
        total_s = total_s + compute_s
    # Of equals the longer prefix: it leaves the processors free.
    cut = reach - int(total_s[::-1].argmin())
    return Split(
        load=cut,
        load_s=float(load_s[cut]),
        compute_s=float(compute_s[cut]),
        total_s=float(total_s[cut]),
        compute_all_s=float(wait_s + compute_s[0]),
    )


def arrivals_s(places: Places, nbytes: I64, routes: Mapping[Place, RouteSpeed]) -> F64:
    """float64[n]: when each block is there if all are asked for now, in this order.

    Routes run side by side; each serves what is queued on it first. 0 where nothing is loaded.
    """
    arrived_s = np.zeros(len(places))
    for place, route in routes.items():
        here = places == place
        behind = route.queued_bytes + np.cumsum(nbytes[here])
        arrived_s[here] = behind / (route.gbps * 1e9) + route.latency_s
    return arrived_s


def _running(each: I64) -> I64:
    """int64[n + 1]: the sum before each."""
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(each)])


def _compute_s(starts: I64, whole: int, model: ModelSpeed) -> F64:
    """Seconds to compute the tokens from each start to the end."""
    linear = (whole - starts) / model.prefill_tokens_per_s
    # The sum of positions from the start to the end.
    squares = (float(whole) ** 2 - starts.astype(np.float64) ** 2) / 2
    seconds: F64 = linear + model.attention_s_per_token2 * squares
    return seconds


def _refuse_still(routes: Mapping[Place, RouteSpeed], model: ModelSpeed) -> None:
    still = [place.name.lower() for place, route in routes.items() if not route.gbps > 0]
    if still or not model.prefill_tokens_per_s > 0:
        raise ConfigError(
            f"load or recompute: prefill {model.prefill_tokens_per_s} tokens/s, "
            f"routes at 0 GB/s: {', '.join(still) or 'none'}; leave out what is not there, "
            "and a route that was not measured has no gbps"
        )
