"""Load or recompute, for a request that waits: how much of what is kept of it to bring up.

A prefix below the GPU is worth its load only while that is quicker than computing it. Both speeds
are measured here and now: what the routes have moved of late (`Director.speeds`), and what steps
of prefill have taken (`Prefill`). Until both are known everything is loaded, which measures one.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Collection, Mapping

import numpy as np

from tiermem.policies.recompute import I64, ModelSpeed, Places, RouteSpeed, split
from tiermem.tier import AT_GPU, Place

LEAST_TOKENS = 256
"""A step of fewer is mostly what every step costs, and says little about long prompts."""
ENOUGH = 4
"""Steps that must have been measured before anything is decided by them."""
LATEST = 31
"""Steps of prefill whose median counts."""
DECODING = 16
"""A request with so many tokens in a step, or fewer, is decoding, perhaps speculatively."""
IN_FLIGHT = 8
"""Steps that have begun and not ended at most; more means that the ends of some are not told."""

REMEASURE_S = 30.0
"""A route from which nothing was loaded for so long, because it was slow, is tried again."""
TRIED = 8
"""Blocks that such a try loads."""


class Prefill:
    """How fast the engine computes prompts: tokens of a step of prefill by its wall time."""

    def __init__(self) -> None:
        self._begun: deque[tuple[int, float]] = deque(maxlen=IN_FLIGHT)
        self._ended_s = 0.0
        self._rates: deque[float] = deque(maxlen=LATEST)
        self._speed: ModelSpeed | None = None

    def begin(self, tokens: Collection[int], now_s: float, *, loads: bool) -> None:
        """A step is given out. tokens: of each of its requests; loads: it waits for copies too."""
        prompt = 0
        if not loads and sum(tokens) >= LEAST_TOKENS:
            prompt = sum(n for n in tokens if n > DECODING)
        self._begun.append((prompt, now_s))

    def end(self, now_s: float) -> None:
        """The oldest step has ended; of steps that overlap each takes the time since the last."""
        if not self._begun:
            return
        prompt, since_s = self._begun.popleft()
        took_s = now_s - max(since_s, self._ended_s)
        self._ended_s = now_s
        if prompt >= LEAST_TOKENS and took_s > 0:
            self._rates.append(prompt / took_s)
            if len(self._rates) >= ENOUGH:
                self._speed = ModelSpeed(statistics.median(self._rates))

    def speed(self) -> ModelSpeed | None:
        """The median of late; None until enough is known."""
        return self._speed


class Choice:
    """How many blocks of a chain to load; what is slow is tried again from time to time."""

    def __init__(self) -> None:
        self.prefill = Prefill()
        self._loaded_s: dict[int, float] = {}

    def cut(
        self,
        places: Places,
        nbytes: int | I64,
        block_tokens: int,
        routes: Mapping[Place, RouteSpeed],
        suffix_tokens: int,
        now_s: float,
    ) -> int:
        """Blocks [0, cut) are worth having, the rest is computed sooner than it comes.

        places: uint8[n] of each block, the first one first. suffix_tokens: behind the chain.
        """
        model = self.prefill.speed()
        if model is None:
            return len(places)
        if takes_all(places, nbytes, block_tokens, routes, model):
            for place in np.flatnonzero(np.bincount(places)).tolist():
                self._loaded_s[place] = now_s
            return len(places)
        found = split(places, nbytes, block_tokens, routes, model, suffix_tokens=suffix_tokens)
        cut = found.load
        if cut < len(places) and self._is_overdue(int(places[cut]), routes, now_s):
            cut = min(len(places), cut + TRIED)
        for place in np.unique(places[:cut]).tolist():
            self._loaded_s[place] = now_s
        return cut

    def _is_overdue(self, place: int, routes: Mapping[Place, RouteSpeed], now_s: float) -> bool:
        """Whether what stopped the chain is a route, from which nothing has come for long."""
        last_s = self._loaded_s.setdefault(place, now_s)
        return place in routes and now_s - last_s >= REMEASURE_S


def takes_all(
    places: Places,
    nbytes: int | I64,
    tokens: int,
    routes: Mapping[Place, RouteSpeed],
    model: ModelSpeed,
) -> bool:
    """Whether `split` would surely load a whole chain; asked first, as that is the usual answer.

    So it is where all of it that is below comes by one route, each block sooner than it is
    computed: every further block that is loaded saves time, but for the wait before the first.
    The time that all blocks from that one on take to compute is more than the whole load.
    """
    below = np.flatnonzero(places != AT_GPU)
    if not len(below):
        return True
    first = int(below[0])
    route = routes.get(Place(places.item(first)))
    if route is None or np.count_nonzero(places[below] != places[first]):
        return False
    most = int(nbytes if isinstance(nbytes, int) else nbytes.max())
    block_s = tokens / model.prefill_tokens_per_s
    bytes_per_s = route.gbps * 1e9
    if most / bytes_per_s > block_s:
        return False
    load_s = route.latency_s + (route.queued_bytes + most * len(below)) / bytes_per_s
    return load_s < (len(places) - first) * block_s
