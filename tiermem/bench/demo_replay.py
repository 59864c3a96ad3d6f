"""Replays requests against a space with real bytes: one block of a prompt is one page.

The rule of a request: look up all of its blocks; use the ones that are resident, in any tier, and
verify them; while they are pinned, store the missing ones deepest first, as many as find room; then
touch all stored ones deepest first. A hit counts for the prefix if all blocks before it hit too.
"""

from __future__ import annotations

import threading
from contextlib import ExitStack
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from tiermem.bench.demo_content import Content, content_of
from tiermem.bench.replay import facts_of
from tiermem.bench.workload import I32, Workload
from tiermem.errors import NotOurs, PageLost, TierFull
from tiermem.planner import Access
from tiermem.region import NEXT, Hint, Pages
from tiermem.space import Space
from tiermem.tier import TIERS, Place

Positions = npt.NDArray[np.int64]

SHOWN_WRONG = 5
SPARE_PAGES = 64


@dataclass(frozen=True, slots=True)
class Wrong:
    """A page that came back with other bytes than were written."""

    request: int
    block: int
    page: int
    place: Place
    """Where it had been when the request looked it up."""


@dataclass(slots=True)
class Score:
    """What has been replayed so far. prefix_hits: by the tier in which a block was found."""

    requests: int = 0
    accesses: int = 0
    hits: int = 0
    prefix_hits: dict[Place, int] = field(default_factory=lambda: dict.fromkeys(TIERS, 0))
    stored: int = 0
    not_stored: int = 0
    gone: int = 0
    lost: int = 0
    verified: int = 0
    wrong: int = 0
    first_wrong: list[Wrong] = field(default_factory=list)


class Replay:
    """One region of a space that holds the blocks of a workload. Close it before the space."""

    def __init__(self, space: Space, workload: Workload, *, hints: bool) -> None:
        """hints: tell the space of each request's resident blocks while the one before it runs."""
        configured = {t.place: t.configured for t in space.statistics().tiers}
        longest = int(np.diff(workload.start).max())
        pages = sum(configured.values()) + 2 * longest + SPARE_PAGES
        self.score = Score()
        self._space = space
        self._workload = workload
        self._hints = hints
        self._below = configured[Place.HOST] + configured[Place.NVME] > 0
        # With tiers below, half of the GPU stays free of pins, so that pages can pass through.
        most = configured[Place.GPU]
        self._at_once = max(1, most // 2) if self._below else most
        self._map = BlockMap(workload.distinct, pages)
        self._region = space.reserve(
            pages * space.page_bytes, name="demo", on_gone=self._map.forget_gone
        )
        self._content: Content = content_of(self._region, space.device.torch_device)

    def close(self) -> None:
        self._region.close()

    def request(self, index: int) -> None:
        """Replay one request."""
        self._free_lost()
        if self._hints and index + 1 < self._workload.requests:
            self._hint(index + 1)
        blocks = self._workload.of(index)
        found = self._map.pages(blocks)
        places = self._region.where(np.maximum(found, 0))
        hit = np.zeros(len(blocks), np.bool_)
        with ExitStack() as held:
            for part in self._parts(blocks, found >= 0):
                held.close()
                hit[self._verify(held, index, part, blocks, found, places)] = True
            self._store(self._deepest_first(blocks, self._map.pages(blocks) < 0), blocks)
        stored = self._map.pages(blocks)
        stored = stored[self._deepest_first(blocks, stored >= 0)]
        self._region.touch(stored)
        self._region.finished(stored, facts_of(self._workload, index, True))
        self._count(blocks, hit | self._repeated(blocks, hit), places)

    # ---------------------------------------------------------------- parts

    def _hint(self, index: int) -> None:
        blocks = self._workload.of(index)
        pages = self._map.pages(blocks)
        pages = pages[self._deepest_first(blocks, pages >= 0)]
        if len(pages):
            self._region.hint(pages, Hint.SOON)

    def _deepest_first(self, blocks: I32, chosen: npt.NDArray[np.bool_]) -> Positions:
        """Positions of the chosen blocks, deepest first; a block that is named twice, once."""
        at = np.flatnonzero(chosen)
        if len(at) > 1 and _has_repeats(blocks[at]):
            at = at[np.sort(np.unique(blocks[at], return_index=True)[1])]
        return at[::-1]

    def _parts(self, blocks: I32, resident: npt.NDArray[np.bool_]) -> list[Positions]:
        at = self._deepest_first(blocks, resident)
        return [at[i : i + self._at_once] for i in range(0, len(at), self._at_once)]

    def _verify(
        self,
        held: ExitStack,
        index: int,
        at: Positions,
        blocks: I32,
        found: Pages,
        places: npt.NDArray[np.uint8],
    ) -> Positions:
        """Use and check the blocks at these positions; the ones that were there."""
        kept = self._enter(held, found[at], "read")
        at = at[kept]
        bad = self._content.wrong(found[at], blocks[at].astype(np.int64))
        self.score.verified += len(at)
        for i in at[bad].tolist():
            self.score.wrong += 1
            if len(self.score.first_wrong) < SHOWN_WRONG:
                wrong = Wrong(index, int(blocks[i]), int(found[i]), Place(int(places[i])))
                self.score.first_wrong.append(wrong)
        return at

    def _enter(self, held: ExitStack, pages: Pages, access: Access) -> npt.NDArray[np.bool_]:
        """Use these pages until `held` closes; bool[n]: which of them were still there."""
        stream = self._content.stream
        try:
            held.enter_context(self._region.use(pages, access, stream))
            return np.ones(len(pages), np.bool_)
        except (NotOurs, PageLost):
            # One of them left between the look-up and here: take the others one by one.
            there = np.zeros(len(pages), np.bool_)
        for i, page in enumerate(pages.tolist()):
            try:
                held.enter_context(self._region.use(page, access, stream))
                there[i] = True
            except (NotOurs, PageLost):
                self._map.forget(pages[i : i + 1])
                self.score.gone += 1
        return there

    def _store(self, missing: Positions, blocks: I32) -> None:
        """Allocate and fill pages for the blocks at these positions, as far as there is room."""
        while len(missing):
            n = min(len(missing), self._at_once, self._space.room())
            some, missing = missing[:n], missing[n:]
            try:
                pages = self._allocate(some, blocks) if n else None
            except TierFull:
                pages = None
            if pages is None:
                self.score.not_stored += len(some) + len(missing)
                return
            with ExitStack() as held:
                there = self._enter(held, pages, "fresh")
                self._content.fill(pages[there], blocks[some[there]].astype(np.int64))
            self.score.stored += int(there.sum())
            if not self._below:
                self.score.not_stored += len(missing)
                return

    def _allocate(self, at: Positions, blocks: I32) -> Pages:
        """Pages for the blocks at these positions, deepest first, hung below their parents."""
        above = self._map.pages(blocks[np.maximum(at - 1, 0)])
        parents = np.where(at > 0, above, -1)
        parents[:-1][at[1:] == at[:-1] - 1] = NEXT
        ids = blocks[at]
        pages = self._region.allocate(
            len(at), parents=parents, depths=at.astype(np.int32), keys=ids.astype(np.uint64)
        )
        self._map.remember(ids, pages)
        return pages

    def _free_lost(self) -> None:
        """Lost pages keep their number until the owner lets go of it."""
        lost = self._map.take_lost()
        self.score.lost += len(lost)
        if len(lost):
            self._region.free(lost)

    def _repeated(self, blocks: I32, hit: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
        """Further mentions of a block that was a hit are hits too."""
        if hit.all() or not _has_repeats(blocks):
            return hit
        return np.isin(blocks, blocks[hit])

    def _count(
        self, blocks: I32, hit: npt.NDArray[np.bool_], places: npt.NDArray[np.uint8]
    ) -> None:
        score = self.score
        prefix = len(blocks) if hit.all() else int(hit.argmin())
        score.requests += 1
        score.accesses += len(blocks)
        score.hits += int(hit.sum())
        for place in TIERS:
            score.prefix_hits[place] += int(np.count_nonzero(places[:prefix] == place))


class BlockMap:
    """Which page holds which block. Pages are forgotten from whatever thread drops them."""

    def __init__(self, blocks: int, pages: int) -> None:
        self._lock = threading.Lock()
        self._page_of = np.full(blocks, -1, np.int32)
        self._block_of = np.full(pages, -1, np.int64)
        self._lost: list[Pages] = []

    def pages(self, blocks: I32) -> Pages:
        """int32[n]: the page of each block, or -1."""
        with self._lock:
            return self._page_of[blocks]

    def remember(self, blocks: I32, pages: Pages) -> None:
        with self._lock:
            self._page_of[blocks] = pages
            self._block_of[pages] = blocks

    def forget(self, pages: Pages) -> None:
        with self._lock:
            blocks = self._block_of[pages]
            # A page may be told of twice: by its owner's look, and by the space.
            mine = blocks[(blocks >= 0) & (self._page_of[blocks] == pages)]
            self._page_of[mine] = -1
            self._block_of[pages] = -1

    def forget_gone(self, pages: Pages, reason: str) -> None:
        """The space's `on_gone`."""
        self.forget(pages)
        if reason == "lost":
            with self._lock:
                self._lost.append(pages.copy())

    def take_lost(self) -> Pages:
        with self._lock:
            lost, self._lost = self._lost, []
        return np.concatenate(lost) if lost else np.empty(0, np.int32)


def _has_repeats(blocks: I32) -> bool:
    in_order = np.sort(blocks)
    return bool((in_order[1:] == in_order[:-1]).any())
