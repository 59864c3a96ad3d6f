"""What an engine knows of the near future, for `Region.tell`: requests that wait, sessions that
will come back. Numbers are the engine's own; regions of one engine may use the same ones.

A chain names pages of the region, one a unit, in the order of its blocks: the first one first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tiermem.errors import ConfigError

Chain = Sequence[int] | npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True, eq=False)
class Queued:
    """A request waits and will use this chain; within_s: when it is expected to start, if known."""

    request: int
    chain: Chain
    within_s: float | None = None

    def __post_init__(self) -> None:
        if self.within_s is not None and not self.within_s >= 0:
            raise ConfigError(f"request {self.request} within {self.within_s} s: 0 or more")


@dataclass(frozen=True, slots=True)
class Left:
    """A request that was queued has started, or will not."""

    request: int


@dataclass(frozen=True, slots=True, eq=False)
class Expected:
    """A session is likely to come back in so many seconds and to use this chain then."""

    session: int
    chain: Chain
    in_s: float
    probability: float = 1.0

    def __post_init__(self) -> None:
        if not self.in_s >= 0 or not 0 <= self.probability <= 1:
            raise ConfigError(
                f"session {self.session} expected in {self.in_s} s with probability "
                f"{self.probability}: 0 s or more, 0 to 1"
            )


@dataclass(frozen=True, slots=True)
class Idle:
    """A session waits for its user, and nobody knows how long."""

    session: int


@dataclass(frozen=True, slots=True)
class Ended:
    """A session will not come back."""

    session: int


Fact = Queued | Left | Expected | Idle | Ended
