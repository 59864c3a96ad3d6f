"""What one who follows a lease does, whatever it is of: reserve, hear others, wait for them."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable
from typing import ClassVar

from tiermem.errors import TierMemError
from tiermem.ledger import Lease, Ledger
from tiermem.ledger_wake import Listener, myself

log = logging.getLogger(__name__)

LOCK_S = 0.002
"""How long a faulting thread waits for the ledger's lock; then it goes on with what it has."""
EXPECT_S = 0.25
"""So long we wait for the next bytes from others before pages of ours make room instead."""


class Membership:
    """A member of one ledger: it reserves, listens, and is frozen by the first failure."""

    what: ClassVar[str] = "lease"

    def __init__(self, ledger: Ledger, lease: Lease, idle_s: float) -> None:
        """Closes the ledger with itself. idle_s: unused for so long, pages count as cold."""
        self._ledger = ledger
        self._lease = lease
        self._idle_s = idle_s
        self._wake: Callable[[], None] = lambda: None
        self._listener: Listener | None = None
        self._asked_bytes = 0
        self._asked_until = 0.0
        self._no_memory_until = 0.0
        self._expects_until = 0.0
        self._is_owed = False
        self._owed = 0
        self._clocks: deque[tuple[float, int]] = deque()  # (when, the planner's clock)
        self._warned = False
        self._closed = False

    def listen(self, wake: Callable[[], None]) -> None:
        """From now on, wake whoever makes our turns when others' records change or one ends."""
        self._wake = wake
        self._listener = Listener(
            self._lease.bell, lambda: self._ledger.owners() - {myself()}, wake, self._ended
        )

    def close(self) -> None:
        """All memory has been given back: leave the ledger. A second call does nothing."""
        if self._closed:
            return
        self._closed = True
        if self._listener is not None:
            self._listener.close()
        self._release()
        self._ledger.close()

    def _release(self) -> None:
        """What else goes, once nobody listens and before the ledger does."""

    def _ended(self) -> None:
        """A member has ended; called by the listener."""
        self._ledger.reap()

    def _reserve(self, nbytes: int) -> int:
        """Ask for bytes within our share; notes whether others owe us and how long to expect it."""
        granted = self._lease.reserve(nbytes, LOCK_S)
        owed = self._lease.owed > 0
        if granted or (owed and not self._is_owed):
            self._expects_until = time.monotonic() + EXPECT_S
        self._is_owed = owed
        return granted

    def _warm_since(self, clock: int, every_s: float) -> int:
        """What the planner's clock showed idle_s ago; it shows this now. every_s: between looks."""
        now, clocks = time.monotonic(), self._clocks
        if not clocks or now - clocks[-1][0] >= every_s:
            clocks.append((now, clock))
        while len(clocks) > 1 and clocks[1][0] <= now - self._idle_s:
            clocks.popleft()
        return clocks[0][1]

    def _warn(self, error: TierMemError) -> None:
        if not self._warned:
            log.warning(
                "%s frozen: nothing more is taken until reopened, reason=%s", self.what, error
            )
        self._warned = True
