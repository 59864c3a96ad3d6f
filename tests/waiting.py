"""Waiting for what other threads bring about."""

from __future__ import annotations

import time
from collections.abc import Callable

from tiermem.space import Space
from tiermem.tier import Place

LONG_S = 30.0


def until(condition: Callable[[], bool]) -> None:
    """Wait until something holds; fails after LONG_S."""
    deadline = time.monotonic() + LONG_S
    while not condition():
        assert time.monotonic() < deadline, "what is waited for does not come"
        time.sleep(0.002)


def host_slots(space: Space, slots: int) -> None:
    """Wait until the space knows of so many slots of the host tier, which grows by itself."""
    until(lambda: space.statistics().tier(Place.HOST).capacity == slots)
