"""How fast the drive may be written: a token bucket in bytes per second."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

BURST_S = 0.25
"""A bucket holds this much time's worth: over 30 s that is 0.8 % over the rate, at most."""


class WriteBudget:
    """Bytes per second that may be written; None for no limit.

    A write is let through while the bucket is not empty and may leave it in debt, so pages larger
    than the bucket pass, and the rate holds all the same.
    """

    def __init__(
        self, bytes_per_s: int | None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.bytes_per_s = _checked(bytes_per_s)
        self.spent = 0
        """Bytes written in all, for the drive's endurance."""
        self._clock = clock
        self._tokens = self._full
        self._at = clock()
        self._lock = threading.Lock()

    @property
    def _full(self) -> float:
        return BURST_S * (self.bytes_per_s or 0)

    def limit(self, bytes_per_s: int | None) -> None:
        """Another rate from now on; a debt stays, and is paid at the new rate."""
        with self._lock:
            if self.bytes_per_s is not None:
                self._refill()
            self._at = self._clock()
            self.bytes_per_s = _checked(bytes_per_s)
            self._tokens = min(self._tokens, self._full)

    def available(self) -> int | None:
        """Bytes that may be written now; None without a limit. What a planner asks before it
        decides to demote pages to the drive."""
        with self._lock:
            if self.bytes_per_s is None:
                return None
            self._refill()
            return max(0, int(self._tokens))

    def take(self, nbytes: int) -> float:
        """Spend bytes if the bucket is not empty: 0.0; else spend nothing: seconds to wait."""
        with self._lock:
            if self.bytes_per_s is not None:
                self._refill()
                if self._tokens <= 0:
                    return max(1e-4, (1.0 - self._tokens) / self.bytes_per_s)
                self._tokens -= nbytes
            self.spent += nbytes
            return 0.0

    def _refill(self) -> None:
        assert self.bytes_per_s is not None
        now = self._clock()
        self._tokens = min(self._full, self._tokens + (now - self._at) * self.bytes_per_s)
        self._at = now


def _checked(bytes_per_s: int | None) -> int | None:
    if bytes_per_s is not None and bytes_per_s <= 0:
        raise ValueError(f"a write budget of {bytes_per_s} bytes a second would never write")
    return bytes_per_s
