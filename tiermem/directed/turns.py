"""Whose turn it is with a director and the rank beside it: the engine's, or upkeep's."""

from __future__ import annotations

import threading
import time


class Turns:
    """The engine's step begins when it first looks, and ends when its work is queued.

    Under `lock`, and not `under_way`, director and rank may be used; during a step by the engine's
    thread alone, which then needs no lock.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.under_way = False
        self.ended_s = time.monotonic()

    def begin(self) -> None:
        """The engine begins a step, or goes on with it; waits for a turn of upkeep at most."""
        if not self.under_way:
            with self.lock:
                self.under_way = True

    def end(self) -> None:
        """The engine's work is queued."""
        self.ended_s = time.monotonic()
        self.under_way = False
