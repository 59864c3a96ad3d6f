"""What a slab that persists knows of its slots, and what the page table knows: kept alike."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tiermem.attic import Stored
from tiermem.pager import Pager
from tiermem.table import Rows

if TYPE_CHECKING:
    from tiermem.nvme.slab import Slab


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


class Nobody:
    """Stands where a region would, for the pages of the attic."""

    def take_vacant(self, rows: Rows) -> None:
        """A page of the attic that has left is found by its slot when it is wanted again."""

    def tell_gone(self, rows: Rows, reason: str) -> None:
        """Content that no region holds is missed by none."""

    def close(self) -> None:
        """It has no addresses to give back."""
