"""What a slab that persists knows of its slots, and what the page table knows: kept alike."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from tiermem.attic import Stored
from tiermem.pager import Pager
from tiermem.table import Rows

if TYPE_CHECKING:
    from tiermem.nvme.slab import Slab

log = logging.getLogger(__name__)

_TICK_S = 0.02
_REPORT_S = 1.0


class Keeping:
    """Takes over what a slab held when it was opened; tells it what has come to it since."""

    def __init__(self, slab: Slab, pager: Pager, slots: int, now: int) -> None:
        """slots: of the drive's tier, all that it will have. Before the first page moves."""
        self._slab = slab
        self._pager = pager
        found = slab.recovered()
        oldest_first = slice(None, None, -1)
        held = Stored(
            found.slots[oldest_first],
            found.keys[oldest_first],
            found.depths[oldest_first],
            found.tenants[oldest_first],
        )
        with pager.lock:
            pager.planner.open_attic(slots)
            pager.planner.restore(held, now)

    def record(self) -> int:
        """Have the slab record the labelled pages that reached it; how many it keeps.

        The table says what is in a slot now, and the slab writes it down a moment later; if the
        slot has been given to other bytes in between, its sequence number is another.
        """
        planner = self._pager.planner
        with self._pager.lock:
            held = planner.take_unrecorded()
            sequences = self._slab.sequences(held.slots)
        if not len(held.slots):
            return 0
        kept = self._slab.record(held.slots, held.keys, held.depths, held.tenants, sequences)
        n = int(kept.sum())
        with self._pager.lock:
            planner.counts["recorded"] += n
        return n

    def save(self, rows: range, timeout_s: float, now: Callable[[], int]) -> int:
        """Copy labelled pages that rest idle above the drive to it; how many units have none then.

        Until all of these rows have one, time is up, or what is left is in use or finds no room.
        If an interrupt ends it, what was begun is carried out and settled by others.
        """
        pager, planner = self._pager, self._pager.planner
        began = told = time.monotonic()
        while True:
            begun = pager.decide(lambda: planner.back_up(now(), last=True)) if timeout_s else 0
            pager.settle_ready()
            self.record()
            with pager.lock:
                left, under_way = planner.unsaved(rows)
                helps, fence = planner.awaits_back_up(rows)
            at = time.monotonic()
            if not left or at - began >= timeout_s:
                break
            if at - told >= _REPORT_S:
                told = at
                log.info("save units_left=%d after_s=%.0f", left, at - began)
            if begun or under_way:
                pager.wait_some(_TICK_S)
            elif not helps:
                break
            elif fence.ticks:
                pager.wait_fence(fence, _TICK_S)
            else:
                time.sleep(_TICK_S)  # for the write budget
        if left and timeout_s:
            log.warning(
                "save units_left=%d took_s=%.1f limit_s=%.1f: the next start will not have them",
                left, time.monotonic() - began, timeout_s,
            )  # fmt: skip
        return left


class Nobody:
    """Stands where a region would, for the pages of the attic."""

    def take_vacant(self, rows: Rows) -> None:
        """A page of the attic that has left is found by its slot when it is wanted again."""

    def tell_gone(self, rows: Rows, reason: str) -> None:
        """Content that no region holds is missed by none."""

    def close(self) -> None:
        """It has no addresses to give back."""
