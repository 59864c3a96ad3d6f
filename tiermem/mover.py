"""The mover: one thread that keeps tiers below their marks and settles what nobody waits for."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from tiermem.pager import Pager

log = logging.getLogger(__name__)

BUSY_S = 0.004  # while work is under way; who waits settles by himself, at once
YIELD_S = 0.001
"""Whoever woke the mover has something to do first, and would have to share the interpreter lock:
a fault of one page takes 10 % longer in the median and 20 times as long in the worst percent."""
GROWING_S = 0.01
IDLE_S = 0.5


class Mover:
    """Runs `turn` whenever it is woken, while work is under way, and now and then."""

    def __init__(self, pager: Pager, turn: Callable[[], bool]) -> None:
        """turn: one round of upkeep; returns True if more is to be done soon."""
        self._pager = pager
        self._turn = turn
        self._awake = threading.Event()
        self._stop = False
        self._thread = threading.Thread(target=self._run, name="tiermem-mover", daemon=True)
        self.error: Exception | None = None

    def start(self) -> None:
        self._thread.start()

    def wake(self) -> None:
        """From any thread; costs nothing when the mover is awake already."""
        if not self._awake.is_set():
            self._awake.set()

    def close(self) -> None:
        self._stop = True
        self._awake.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        while not self._stop:
            try:
                more = self._turn()
            except Exception as error:
                self.error = error
                log.exception("mover stopped; pages move on demand only from now on")
                return
            if self._stop:
                return
            if self._pager.busy():
                time.sleep(BUSY_S)
            else:
                if self._awake.wait(GROWING_S if more else IDLE_S):
                    time.sleep(YIELD_S)
                self._awake.clear()
