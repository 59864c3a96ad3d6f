"""What goes on while an engine makes no steps, where director and rank are in one process.

    engine   begin ── looks, enters, orders ── carry, work, mark ── end        begin ──
    upkeep                                                          turn  turn

An engine that has nothing to do makes no steps, and then a director would hear nothing and order
nothing: no page would go down, be written behind, or be given back to who shares the device. So a
thread makes steps without work in between. It touches nothing while a step of the engine is under
way, and a step of the engine waits for one of these at most.
"""

from __future__ import annotations

import logging
import threading
import time

from tiermem.directed.director import Director
from tiermem.directed.orders import Report
from tiermem.directed.rank import Rank

log = logging.getLogger(__name__)

QUIET_S = 0.02
"""After a step of the engine: the next one does all of this, and soon."""
SOON_S = 0.0003
"""After something was ordered or has ended: giving a frame back takes four turns."""
MOVING_S = 0.002
REST_S = 0.01
"""After orders, while nothing has ended: beside an engine's step each turn takes the interpreter
lock from it."""
IDLE_S = 0.1


class Upkeep:
    """Runs until closed, or until its rank is. `error`: what it has stopped at."""

    def __init__(self, rank: Rank) -> None:
        self._rank = rank
        self._awake = threading.Event()
        self._stop = False
        self._ordered_s = 0.0
        self._is_woken = False
        self._thread: threading.Thread | None = None
        self.error: Exception | None = None

    def start(self, director: Director) -> None:
        self._thread = threading.Thread(
            target=self._run, args=(director,), name="tiermem-upkeep", daemon=True
        )
        self._thread.start()

    def wake(self) -> None:
        """From any thread: others that share the device want something, or have given some."""
        self._is_woken = True
        self._awake.set()

    def close(self) -> None:
        """End the thread; a second call does nothing."""
        self._stop = True
        self._awake.set()
        if self._thread is not None:
            self._thread.join()

    def _run(self, director: Director) -> None:
        while not self._stop:
            try:
                pause_s = self._turn(director)
            except Exception as error:  # the engine's next step raises it
                self.error = error
                log.exception("upkeep stopped: nothing moves while the engine is idle")
                return
            self._awake.wait(pause_s)
            self._awake.clear()

    def _turn(self, director: Director) -> float:
        """A step without work, unless the engine is at it; seconds until the next look."""
        rank = self._rank
        if time.monotonic() - rank.turns.ended_s < QUIET_S:
            return QUIET_S
        with rank.turns.lock:
            if rank.turns.under_way:
                return QUIET_S
            if rank.closed:
                self._stop = True
                return 0.0
            report = rank.report()
            director.settle(report)
            if self._may_rest(report):
                return MOVING_S
            orders = director.orders()
            rank.carry(orders, None)
            rank.skip(orders.step)
            if director.is_idle():
                return IDLE_S
            news = report.outcomes or orders.plans or len(orders.park) or len(orders.back)
            return SOON_S if news else MOVING_S

    def _may_rest(self, report: Report) -> bool:
        """Whether orders would be the last ones again: nothing has ended or was done since."""
        now_s, given_s = time.monotonic(), self._ordered_s
        frames = len(report.backed) or len(report.unbacked) or len(report.parked)
        news = report.outcomes or frames or self._is_woken or given_s < self._rank.turns.ended_s
        if not news and now_s - given_s < REST_S:
            return True
        self._is_woken, self._ordered_s = False, now_s
        return False
