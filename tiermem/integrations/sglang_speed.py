"""How fast the engine computes prompts, as it is seen to: what a load has to be faster than."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

from tiermem.policies.recompute import ModelSpeed

LEAST_TOKENS = 256
"""A shorter prefill says more about the launch than about the model."""

_FADES = 0.98


class PrefillSpeed:
    """Tokens a second from launch to result, the best of late: waits only make it look slower."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._launched: deque[tuple[int, float]] = deque()
        self._best = 0.0

    def launched(self, tokens: int) -> None:
        """A prefill of so many new tokens was queued; results come in the same order."""
        self._launched.append((tokens, self._clock()))

    def finished(self) -> None:
        """The result of the oldest one is there."""
        if not self._launched:
            return
        tokens, start_s = self._launched.popleft()
        took_s = self._clock() - start_s
        if tokens >= LEAST_TOKENS and took_s > 0:
            self._best = max(tokens / took_s, self._best * _FADES)

    def model(self) -> ModelSpeed | None:
        """None until a prefill that says something has been seen."""
        return ModelSpeed(self._best) if self._best else None
