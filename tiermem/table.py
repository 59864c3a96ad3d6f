"""The page table: where the newest bytes of every page are, and where they are heading.

One row a page, numpy columns, no I/O and no lock. Only `planner.py` writes it.

             allocate                 _start(HOST)               _land_down
   NONE ───────────────▶ GPU ────────────────────▶ GPU→HOST ───────────────▶ HOST
    ▲                    ▲ ▲ ◀──── _cancel ──────────┘                        │  │ _start(NVME)
    │ _reap (free), or   │ │           _load                                  │  ▼
    │ _settle_drop       │ └─ _land_up ── HOST→GPU ◀──────────────────────────┘ HOST→NVME
    │ (on_gone first)    └─── _land_up ── NVME→GPU ◀──── _load ───┐             │ _land_down
    │                                     NVME→HOST ◀── _stage ───┤             ▼
    │      GPU→NVME: _start(NVME), where a direct route exists    └─────────── NVME
    └── any resting state                                          _read_failed │ no spare
        a page in flight, or behind a fence, is DOOMED first                    ▼
                                     HOST, NVME, LOST ── fault(fresh) ─▶ GPU   LOST

   GPU, clean, spare below ── _step_down ─▶ HOST or NVME, no transfer
   HOST, clean, spare on NVMe ── _step_down ─▶ NVME, no transfer
   HOST or NVME, frame retired ── _take_back ─▶ GPU, no transfer (such a page is not staged)
   LOST, being shown blank ── fault(read) ─▶ the same, awaited: in order, its writer goes first
   GPU or HOST, labelled ── back_up ─▶ the same place, with a spare on NVMe if `gen` is the same
   GPU, idle and dirty, under a lease ── clean ─▶ GPU, with a spare in the host if `gen` is the same
   HOST, slot beyond the tier's end ── confine ─▶ HOST, another slot once copied (_land_within)
   HOST, failed load, spare on NVMe ── _read_failed ─▶ NVME
   HOST ── _show_in_place ─▶ HOST→HOST ── _land_in_place ─▶ HOST, read at its address (IN_PLACE);
           a write, a read too many, a free and every way down hide it first
   NONE ── adopt ─▶ NVME, in the slot of a page of the attic, which becomes NONE
   closing, shelve; labelled, on NVMe ── _shelve ─▶ the slot is the attic's, whose page was NONE

What an address shows (`shown`): NOTHING ─ _load, allocate ▶ FRAME ─ _land_down ▶ RETIRED (lazy) or
HIDING (eager); RETIRED ─ stolen ▶ HIDING ─ settle ▶ NOTHING; RETIRED ─ _take_back ▶ FRAME;
NOTHING ─ _show_in_place ▶ IN_PLACE ─ _hide ▶ HIDING.
Where plans are carried out in order, a hide takes effect when it is planned: HIDING is skipped.

A page is claimed while `move` names an open plan; a cancelled transfer lets go of the claim and
lives on only in `busy`, until it settles; a copy by `back_up`, `clean` or `confine` never claims.
Pages of one unit are always in the same state.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import numpy.typing as npt

from tiermem.fences import Fences
from tiermem.tier import (
    AT_GPU,
    AT_HOST,
    AT_LOST,
    AT_NONE,
    AT_NVME,
    GPU,
    HOST,
    NVME,
    TIERS,
    Mask,
    Place,
    SlotPool,
)

Rows = npt.NDArray[np.int32]

DIRTY = np.uint8(1)  # newer than every copy below
DOOMED = np.uint8(2)  # freed or dropped; becomes NONE once idle
STALE = np.uint8(4)  # copies below are old; released once idle
ORDERED = np.uint8(8)  # a load that streams wait for; may be pinned, not cancelled
LABELLED = np.uint8(16)  # holds the content of its key (contents.py); a write clears it


class Shown(IntEnum):
    """What a page's address maps now."""

    NOTHING = 0
    FRAME = 1
    RETIRED = 2  # a frame whose page has left, still holding equal bytes (or a freed page's frame)
    HIDING = 3  # a hide is under way
    IN_PLACE = 4  # a host slot, read over the link at the page's own address


IS_NOTHING, IS_FRAME, IS_RETIRED, IS_HIDING, IS_IN_PLACE = (int(shown) for shown in Shown)


@dataclass(frozen=True, slots=True)
class Extent:
    """The rows of one region: [first, first + pages), `unit_pages` to a unit."""

    first: int
    pages: int
    unit_pages: int
    tenant: int


_COLUMNS: dict[str, tuple[npt.DTypeLike, int]] = {
    "at": (np.uint8, 0),
    "to": (np.uint8, 0),
    "shown": (np.uint8, 0),
    "flags": (np.uint8, 0),
    "busy": (np.int16, 0),
    "waiters": (np.int16, 0),
    "pins": (np.int32, 0),
    "reads": (np.uint16, 0),
    "gen": (np.uint32, 0),
    "fence": (np.uint32, 0),
    "move": (np.uint32, 0),
    "stamp": (np.uint64, 0),
    "region": (np.uint16, 0),
    "tenant": (np.uint16, 0),
    "unit": (np.int32, -1),
    "parent": (np.int32, -1),
    "depth": (np.int32, 0),
}


def span(rows: Rows) -> slice | Rows:
    """These rows, each once, as a slice if they lie one after the other, up or down.

    To look at columns and to set them (512 entries in 0.2 us instead of 2). What is read by a slice
    is no copy: it is to be used before the column changes.
    """
    n = len(rows)
    if not n:
        return rows
    first, last = rows.item(0), rows.item(-1)
    if n == 1:
        return slice(first, first + 1)
    if last - first == n - 1 and np.count_nonzero(rows[1:] > rows[:-1]) == n - 1:
        return slice(first, last + 1)
    if first - last == n - 1 and np.count_nonzero(rows[1:] < rows[:-1]) == n - 1:
        return slice(first, last - 1 if last else None, -1)
    return rows


class PageTable:
    """Columns over all pages of a space.

    at       u8     Place of the newest bytes
    to       u8     Place a claimed move is heading for, else NONE; HOST at HOST: to be shown there
    shown    u8     Shown
    flags    u8     DIRTY | DOOMED | STALE | ORDERED | LABELLED
    busy     i16    transfers and hides in flight, also cancelled ones
    waiters  i16    threads that get a pin the moment the load commits
    pins     i32    users; a pinned page stays on the GPU, or in place
    reads    u16    touches in place since the page was last loaded
    gen      u32    bumped by every write
    fence    u32    id in `fences`: the last queued work that may touch the page
    move     u32    the plan that has claimed the page, else 0
    stamp    u64    order of the last access
    region, tenant  u16; unit i32: row of the unit's first page
    parent   i32    unit of the previous block of the chain, or -1; depth i32
    slot     i32[3] slot in GPU, HOST, NVME, or -1: the newest bytes, or a kept copy
    """

    at: npt.NDArray[np.uint8]
    to: npt.NDArray[np.uint8]
    shown: npt.NDArray[np.uint8]
    flags: npt.NDArray[np.uint8]
    busy: npt.NDArray[np.int16]
    waiters: npt.NDArray[np.int16]
    pins: npt.NDArray[np.int32]
    reads: npt.NDArray[np.uint16]
    gen: npt.NDArray[np.uint32]
    fence: npt.NDArray[np.uint32]
    move: npt.NDArray[np.uint32]
    stamp: npt.NDArray[np.uint64]
    region: npt.NDArray[np.uint16]
    tenant: npt.NDArray[np.uint16]
    unit: Rows
    parent: Rows
    depth: Rows

    def __init__(self) -> None:
        self.fences = Fences()
        self.extents: list[Extent] = []
        self.rows = 0
        self.min_unit_pages = self.max_unit_pages = 1
        for name, (dtype, _) in _COLUMNS.items():
            setattr(self, name, np.empty(0, dtype))
        self._slots = [np.empty(0, np.int32) for _ in TIERS]

    def slot(self, place: Place) -> Rows:
        """int32[rows]: the slot of each page in a tier, -1 for none. A view: writes go through."""
        return self._slots[place - 1]

    def extend(self, pages: int, unit_pages: int = 1, tenant: int = 0) -> Extent:
        """Add a region's rows, all NONE. `pages` is a multiple of `unit_pages`."""
        extent = Extent(self.rows, pages, unit_pages, tenant)
        for name, (dtype, fill) in _COLUMNS.items():
            old = getattr(self, name)
            setattr(self, name, np.concatenate([old, np.full(pages, fill, dtype)]))
        more = np.full(pages, -1, np.int32)
        self._slots = [np.concatenate([old, more]) for old in self._slots]
        rows = np.arange(extent.first, extent.first + pages, dtype=np.int32)
        self.unit[rows] = rows - (rows - extent.first) % unit_pages
        self.region[rows] = len(self.extents)
        self.tenant[rows] = tenant
        self.max_unit_pages = max(self.max_unit_pages, unit_pages)
        self.min_unit_pages = min(self.min_unit_pages, unit_pages) if self.extents else unit_pages
        self.extents.append(extent)
        self.rows += pages
        return extent

    def heads(self, rows: Rows) -> Rows:
        """The units of these rows (each once), each once, in order of first appearance."""
        if self.max_unit_pages == 1:
            return rows
        units = self.unit[rows]
        size = self.max_unit_pages
        if size == self.min_unit_pages and not len(rows) % size:
            several = units.reshape(-1, size)
            if (several == several[:, :1]).all():  # whole units, one after the other
                return several[:, 0].copy()
        _, first = np.unique(units, return_index=True)
        return units[np.sort(first)]

    def pages(self, units: Rows) -> Rows:
        """All rows of these units, unit by unit."""
        if self.max_unit_pages == 1 or not len(units):
            return units
        if self.min_unit_pages == self.max_unit_pages:
            within = np.arange(self.max_unit_pages, dtype=np.int32)
            return (units[:, None] + within).ravel()
        sizes = np.array([e.unit_pages for e in self.extents], np.int32)[self.region[units]]
        starts = np.cumsum(sizes) - sizes
        return (
            np.repeat(units - starts, sizes) + np.arange(int(sizes.sum()), dtype=np.int32)
        ).astype(np.int32)

    def bytes_per_page(self) -> float:
        """Resident bytes a page of all columns."""
        columns = sum(getattr(self, name).itemsize for name in _COLUMNS)
        return float(columns + sum(column.itemsize for column in self._slots))

    def movable(self, units: Rows, place: Place) -> Mask:
        """bool[n]: units that rest in `place` and that nobody uses, awaits or is moving."""
        may = (
            (self.at[units] == place)
            & (self.to[units] == 0)
            & (self.busy[units] == 0)
            & (self.pins[units] == 0)
            & (self.waiters[units] == 0)
            & ((self.flags[units] & DOOMED) == 0)
        )
        if place == AT_HOST and not self.fences.all_passed:
            read = self.shown[units] == IS_IN_PLACE  # queued work may read it where it is
            may &= ~read | self.fences.is_passed(self.fence[units])
        return np.asarray(may)

    def check(self, pools: dict[Place, SlotPool], gpu_failed: bool = False) -> None:
        """Assert every invariant of docs/design.md that the table and the pools can show.

        gpu_failed: a load that a stream already waited for has failed, so pages may be pinned
        whose bytes never came; the tier serves nobody any more.
        """
        at, to, shown, flags = self.at, self.to, self.shown, self.flags
        dirty, stale = (flags & DIRTY) != 0, (flags & STALE) != 0
        ordered, doomed = (flags & ORDERED) != 0, (flags & DOOMED) != 0
        assert (at <= AT_LOST).all(), "unknown place"
        assert (to <= AT_NVME).all(), "no move leads there"
        assert (self.pins >= 0).all(), "negative pins"
        assert (self.waiters >= 0).all(), "negative waiters"
        assert (self.busy >= 0).all(), "negative busy"
        resting_gpu = (at == AT_GPU) & (to == 0)
        in_place = shown == IS_IN_PLACE
        placing = (at == AT_HOST) & (to == AT_HOST)
        assert gpu_failed or ((self.pins == 0) | resting_gpu | ordered | in_place).all(), (
            "3: a pinned page is away or moving"
        )
        assert (~in_place | ((at == AT_HOST) & (to == 0))).all(), (
            "an address shows a host slot that may change"
        )
        assert (~placing | (shown == IS_NOTHING)).all(), "shown in place over something"
        assert (~ordered | (to == AT_GPU)).all(), "3: ordered without a load"
        assert (~doomed | (self.pins == 0)).all(), "a doomed page is pinned"
        labelled = (flags & LABELLED) != 0
        assert not (labelled & (doomed | (at == AT_NONE) | (at == AT_LOST))).any(), (
            "a label on a page without bytes"
        )
        assert ((self.waiters == 0) | (to == AT_GPU) | placing).all(), "waiters without a load"
        assert ((to == 0) | ((self.busy > 0) & (self.move > 0))).all(), "a move without transfer"
        for place in TIERS:
            slot = self.slot(place)
            here = at == place
            assert (~here | (slot >= 0)).all(), f"4: at {place.name} without a slot there"
            self._check_slots(place, slot, pools)
        for place in (HOST, NVME):
            copy = self.slot(place) >= 0
            assert not (copy & ((at == AT_NONE) | (at == AT_LOST)) & ~doomed & ~stale).any(), (
                f"5: a page without bytes owns a {place.name} slot"
            )
        assert (~dirty | (at == AT_GPU)).all(), "6: dirty away from the GPU"
        spare = (self.slot(HOST) >= 0) | (self.slot(NVME) >= 0)
        assert not (dirty & spare & ~stale).any(), "6: a dirty page keeps a spare"
        assert (~stale | (self.busy > 0)).all(), "6: stale copies of an idle page"
        frame = self.slot(GPU) >= 0
        visible = (shown == IS_FRAME) | (shown == IS_RETIRED)
        assert (~visible | frame).all(), "an address shows a frame that is not the page's"
        assert not (in_place & frame).any(), "a page read in place owns a frame"
        assert (~resting_gpu | (shown == IS_FRAME)).all(), "on the GPU and not shown"
        self._check_units()

    def _check_slots(self, place: Place, slot: Rows, pools: dict[Place, SlotPool]) -> None:
        """2: one owner a slot, and the table and the pool agree who."""
        pool = pools[place]
        pool.check()
        rows = np.flatnonzero(slot >= 0).astype(np.int32)
        slots = slot[rows]
        assert len(np.unique(slots)) == len(slots), f"2: a {place.name} slot has two pages"
        assert (pool.owner[slots] == rows).all(), f"2: {place.name} owners differ"
        kept = pool.oldest_kept()
        owners = pool.owner[kept]
        assert (owners >= 0).all(), f"2: kept {place.name} unowned"
        assert (slot[owners] == kept).all(), f"2: a kept {place.name} slot is another page's"
        assert (self.at[owners] != place).all(), f"2: the newest bytes in a kept {place.name} slot"

    def _check_units(self) -> None:
        if self.max_unit_pages > 1:
            for name in ("at", "to", "pins", "waiters", "flags", "move"):
                column = getattr(self, name)
                assert (column == column[self.unit]).all(), f"a unit's pages differ in {name}"
