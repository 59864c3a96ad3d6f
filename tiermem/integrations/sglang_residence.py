"""Which pages must be on the GPU for which request, and how they get there.

A request holds its pages from its first batch on until it is released; so a step costs something
only for what is new in it. Pages that several requests share are pinned once. Everything else may
leave by the policies, after the work that was queued on the forward stream when it was released.

What a request has computed and what it will write are told apart at every step: a page that it
reads must have its bytes, or nothing that comes of it counts; one that it writes has no copy below
from then on.

One thread, SGLang's scheduler, makes all calls but `gone`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt

from tiermem.errors import NotOurs, PageLost, TierFull
from tiermem.planner import Access
from tiermem.region import Hint
from tiermem.slices import Arriving
from tiermem.tier import AT_GPU, AT_LOST, AT_NVME, Mask

log = logging.getLogger(__name__)

Pages = npt.NDArray[np.int32]
_NO_PAGES = np.empty(0, np.int32)
PADDING = 0
LOST = "lost"
"""Why a page is gone whose bytes could not be read as written; `Region`'s on_gone says it."""


class PagedRegion(Protocol):
    """What this module uses of a `Region`."""

    @property
    def pages(self) -> int: ...

    def allocate(self, n: int, *, pages: Pages, depths: Pages) -> Pages: ...

    def pin(
        self,
        pages: Pages,
        access: Access = "read",
        stream: int | None = None,
        touches: int = 1,
        kernels_only: bool = False,
        arriving: Arriving | None = None,
    ) -> None: ...

    def unpin(self, pages: Pages, stream: int | None = None) -> None: ...

    def touch(self, pages: Pages) -> None: ...

    def hint(self, pages: Pages, hint: Hint) -> None: ...

    def shelve(self, pages: Pages) -> None: ...

    def held(self, pages: Pages) -> Mask: ...

    def where(self, pages: Pages) -> npt.NDArray[np.uint8]: ...


def _where(mask: Mask) -> Pages:
    pages: Pages = np.flatnonzero(mask).astype(np.int32)
    return pages


@dataclass(slots=True)
class _Held:
    """Pages of a request in the order of its tokens; the first `pinned` of them are pinned."""

    pages: list[int] = field(default_factory=list)
    pinned: int = 0

    def lacking(self, first: int = 0, end: int | None = None) -> list[int]:
        """Of the pages from `first` to before `end`, those that it has not pinned."""
        return self.pages[max(first, self.pinned) : end]


class Residence:
    """The pages of one engine's pool."""

    def __init__(
        self,
        region: PagedRegion,
        stream: Callable[[], int | None],
        page_size: int,
        await_drive: Callable[[bool], None] = lambda needed: None,
    ) -> None:
        """stream: the one that the engine's next work is queued on. page_size: tokens in a page.

        await_drive: told when pages of running requests have to leave, which must not be dropped
        because a drive is behind, and when none are below any more. Page 0 becomes resident.
        """
        self._region = region
        self._stream = stream
        self._page_size = page_size
        self._held: dict[Hashable, _Held] = {}
        self._await_drive = await_drive
        self.arriving = Arriving()
        """Pages that are pinned and on their way from the host, until the engine's stream waits."""
        self._away: set[Hashable] = set()
        """Running requests whose pages had to leave, until they are back."""
        self._early = np.zeros(region.pages, np.bool_)
        """Pages that are pinned until the next step, for requests that it may begin with."""
        self._ready = np.zeros(region.pages, np.bool_)
        """Pages that nobody has yet, with memory and pinned, for a step that writes them."""
        self._users = np.zeros(region.pages, np.int32)
        self._backed = np.zeros(region.pages, np.bool_)
        self._blank = np.zeros(region.pages, np.bool_)
        """Pages that lost their bytes while a request counted on them: nothing in them counts."""
        self.let_go = 0
        """Requests whose pages had to leave while they were not in the batch."""
        padding = np.array([PADDING], np.int32)
        region.allocate(1, pages=padding, depths=padding)
        region.pin(padding, "write")
        self._backed[PADDING] = True

    # ---------------------------------------------------------------- what requests hold

    def follow(self, request: Hashable, pages: Iterable[int]) -> None:
        """These are all pages of a request, in order; it keeps the pins on what is unchanged."""
        new = list(pages)
        held = self._held.get(request)
        if held is None:
            self._held[request] = _Held(new)
            return
        same = 0
        while same < held.pinned and same < len(new) and new[same] == held.pages[same]:
            same += 1
        self._unpin(held, same)
        held.pages = new

    def extend(self, request: Hashable, pages: Iterable[int]) -> None:
        """A request has further pages."""
        self._held[request].pages.extend(pages)

    def pages(self, request: Hashable) -> list[int] | None:
        """The pages of a request, in order; None if it is not followed. Not to be changed."""
        held = self._held.get(request)
        return None if held is None else held.pages

    def release(self, request: Hashable) -> None:
        """A request has ended, or left the GPU: it holds nothing. Twice is fine."""
        held = self._held.pop(request, None)
        self._come_back([request])
        if held is not None and held.pinned:
            deepest_first = np.array(held.pages[: held.pinned][::-1], np.int32)
            self._region.touch(deepest_first)
            self._unpin(held, 0)

    def release_others(self, living: Collection[Hashable]) -> None:
        """Release every request that is not among these."""
        for request in [r for r in self._held if r not in living]:
            self.release(request)

    # ---------------------------------------------------------------- before a step

    def bare(self, pages: Pages) -> Pages:
        """Those of these pages that have nothing behind them."""
        found: Pages = pages[~self._backed[pages]]
        return found

    def prepare(self, pages: Pages) -> None:
        """These free pages, which will be handed out next, get memory now. May raise TierFull."""
        bare = self.bare(pages)
        if len(bare):
            self._region.allocate(len(bare), pages=bare, depths=np.zeros(len(bare), np.int32))
            self._region.pin(bare, "write")
            self._backed[bare] = self._ready[bare] = True

    def unprepare(self, pages: Pages | None = None) -> bool:
        """Free pages that were prepared, of these or all, have no memory; False: there was none."""
        if pages is None:
            pages = _where(self._ready)
        ready = pages[self._ready[pages]]
        if len(ready):
            self._region.unpin(ready, self._stream())
            self._ready[ready] = False
            self.forget(ready)
        return bool(len(ready))

    def hold(self, pages: Pages, at_once: int) -> int:
        """Cached pages that a request was matched with stay up until the next step.

        Those in the host are `arriving`, and those on a drive are read now. at_once: pages of one
        call, of which all come or none. Returns how many are held, from the first on: as many as
        have their bytes, unless they do not fit into the budget.
        """
        try:
            while not self._hold(pages[: self.leading(pages)], at_once):
                pass
        except TierFull:
            if self.unprepare():
                return self.hold(pages, at_once)
        held = self._early[pages] | (self._users[pages] > 0)
        return len(pages) if held.all() else int(np.argmin(held))

    def _hold(self, pages: Pages, at_once: int) -> bool:
        """False: some of these pages were lost, or dropped just now."""
        pages = pages[~self._early[pages] & (self._users[pages] == 0)]
        on_drive = self._region.where(pages) == AT_NVME if len(pages) else np.empty(0, np.bool_)
        above, below = pages[~on_drive], pages[on_drive]
        try:
            # Those on the drive last: the caller waits for them, and makes room for them.
            for start in range(0, len(above), at_once):
                some = above[start : start + at_once]
                self._region.pin(
                    some, "read", self._stream(), kernels_only=True, arriving=self.arriving
                )
                self._early[some] = True
            for start in range(0, len(below), at_once):
                some = below[start : start + at_once]
                self._region.pin(some)
                self._early[some] = True
        except NotOurs:  # the tiers have begun to drop one just now
            return False
        except PageLost as error:
            log.warning("lost pages=%d: %s", len(pages), error)
            return False
        return True

    def _let_early_go(self, pages: Pages) -> bool:
        """Of these pages, give up what is pinned until the next step; False: nothing was."""
        early = pages[self._early[pages]]
        if len(early):
            self._early[early] = False
            self._region.unpin(early, self._stream())
        return bool(len(early))

    def ensure(self, computed: Mapping[Hashable, int], by_layer: bool = False) -> list[Hashable]:
        """All pages of these requests may be touched by what is queued on the stream next.

        computed: tokens of each request of a batch that are there before it runs; it reads those
        and writes behind them. Loads from host memory are waited for by the stream, those from a
        drive by the caller. by_layer: the stream is yet to wait for `arriving`.

        Returns the requests some of whose tokens are gone: all of their pages have memory, and
        nothing that comes of them counts. Raises TierFull if the pages do not fit into the budget.
        """
        lacking = {r: n for r, n in computed.items() if self._held[r].lacking()}
        spoiled = self._renounce(lacking)
        while lacking:
            try:
                self._pin_or_make_way(lacking, computed)
                break
            except (PageLost, NotOurs):  # NotOurs: the tiers have begun to drop one just now
                blank = int(self._blank.sum())
                spoiled = self._renounce(lacking)
                if int(self._blank.sum()) == blank:
                    raise
        self._let_early_go(_where(self._early))
        if not by_layer:
            self.arriving.order(self._stream())
        return spoiled

    def _renounce(self, computed: Mapping[Hashable, int]) -> list[Hashable]:
        """The requests some of whose computed pages have no bytes; these pages become blank."""
        spoiled = []
        for request, tokens in computed.items():
            begun = -(-tokens // self._page_size)
            pages = np.array(self._held[request].lacking(end=begun), np.int32)
            gone = pages[~self.valid(pages)]
            if len(gone):
                spoiled.append(request)
                self._blank[gone] = True
                self._backed[gone] &= self._region.held(gone)
        return spoiled

    def _pin_or_make_way(
        self, lacking: Mapping[Hashable, int], batch: Collection[Hashable]
    ) -> None:
        try:
            self._pin(lacking)
        except TierFull:
            waiting = [r for r, h in self._held.items() if r not in batch and h.pinned]
            needed = np.array([p for r in lacking for p in self._held[r].lacking()], np.int32)
            pinned = _where(self._ready | self._early)
            spare = pinned[~np.isin(pinned, needed)]
            if not (self.unprepare(spare) or self._let_early_go(spare)):
                if not waiting:
                    raise
                self._send_away(waiting)
            self._pin_or_make_way(lacking, batch)

    def _send_away(self, requests: list[Hashable]) -> None:
        if not self._away:
            self._await_drive(True)
        self._away.update(requests)
        for request in requests:
            self._unpin(self._held[request], 0)
        self.let_go += len(requests)

    def _come_back(self, requests: Iterable[Hashable]) -> None:
        if self._away:
            self._away.difference_update(requests)
            if not self._away:
                self._await_drive(False)

    def _pin(self, lacking: Mapping[Hashable, int]) -> None:
        stream = self._stream()
        needed = [self._held[request] for request in lacking]
        taken: list[Pages] = []
        fresh, accesses = self._accesses(lacking)
        try:
            # Loads last: the caller waits for the others, and would for what comes before them.
            if len(fresh):
                self._allocate(fresh, needed)
                self._region.pin(fresh, "write")
                taken.append(fresh)
            held = accesses["read"][self._early[accesses["read"]]]
            accesses["read"] = accesses["read"][~self._early[accesses["read"]]]
            for access, pages in accesses.items():
                if len(pages):
                    self._region.pin(
                        pages, access, stream, kernels_only=True, arriving=self.arriving
                    )
                    taken.append(pages)
        except BaseException:
            for pages in taken:
                self._region.unpin(pages, stream)
            raise
        self._early[held] = False  # their pins are the requests' from now on
        for one in needed:
            new = one.pages[one.pinned :]
            self._users[new] += 1
            self._ready[new] = False
            one.pinned = len(one.pages)
        self._come_back(lacking)

    def _accesses(self, lacking: Mapping[Hashable, int]) -> tuple[Pages, dict[Access, Pages]]:
        """(pages without memory, the others by how they are used) that nobody has pinned yet."""
        read: list[int] = []
        written: list[int] = []
        for request, tokens in lacking.items():
            whole = tokens // self._page_size
            read += self._held[request].lacking(end=whole)
            written += self._held[request].lacking(whole)
        pages = np.unique(np.array(read + written, np.int32))
        pages = pages[(self._users[pages] == 0) & ~self._ready[pages]]
        old = pages[self._backed[pages]]
        fresh = pages[~self._backed[pages]]
        lost = old[self._blank[old]]
        if len(lost):
            lost = lost[self._region.where(lost) == AT_LOST]
            old = old[~np.isin(old, lost)]
        rewritten = np.isin(old, np.array(written, np.int32)) if written and len(old) else None
        if rewritten is None or not rewritten.any():
            return fresh, {"fresh": lost, "write": _NO_PAGES, "read": old}
        return fresh, {"fresh": lost, "write": old[rewritten], "read": old[~rewritten]}

    def _allocate(self, fresh: Pages, lacking: list[_Held]) -> None:
        depth_of = {p: i for h in lacking for i, p in enumerate(h.pages[h.pinned :], h.pinned)}
        depths = np.array([depth_of[p] for p in fresh.tolist()], np.int32)
        deepest_first = np.argsort(-depths, kind="stable")
        self._region.allocate(len(fresh), pages=fresh[deepest_first], depths=depths[deepest_first])
        self._backed[fresh] = True

    def _unpin(self, held: _Held, keep: int) -> None:
        """Pins of all but the first `keep` pages are given back."""
        left = np.array(held.pages[keep : held.pinned], np.int32)
        held.pinned = min(held.pinned, keep)
        if not len(left):
            return
        self._users[left] -= 1
        idle = left[self._users[left] == 0]
        if len(idle):
            self._region.unpin(idle, self._stream())

    # ---------------------------------------------------------------- what the pool holds

    def forget(self, pages: Pages) -> None:
        """The engine has freed these pages: they are dropped in all tiers.

        Only content that has a name and a copy on a drive that is kept stays there.
        """
        if self._users[pages].any():
            self._let_go_of(set(pages.tolist()))
        self._let_early_go(pages)
        self.unprepare(pages)
        backed = pages[self._backed[pages]]
        while len(backed):
            backed = backed[self._region.held(backed)]
            try:
                if len(backed):
                    self._region.shelve(backed)
                break
            except NotOurs:  # the tiers have begun to drop one of them just now
                continue
        self._backed[pages] = False
        self._blank[pages] = False

    def _let_go_of(self, pages: set[int]) -> None:
        for held in self._held.values():
            for i, page in enumerate(held.pages):
                if page in pages:
                    self._unpin(held, i)
                    del held.pages[i:]
                    break

    def gone(self, pages: Pages, reason: str) -> None:
        """The tiers dropped or lost pages that the engine still counts on. From any thread.

        What is lost stays allocated, without bytes, until the engine frees it.
        """
        log.debug("gone pages=%d reason=%s", len(pages), reason)
        if reason != LOST:
            self._backed[pages] = False

    def valid(self, pages: Pages) -> Mask:
        """bool[n]: which of these pages still have their bytes, as far as is known."""
        mask: Mask = self._backed[pages] & ~self._blank[pages]
        if mask.any():
            mask[mask] = self._alive(pages[mask])
        return mask

    def leading(self, pages: Pages) -> int:
        """How many of these pages, from the first on, still have their bytes."""
        valid = self.valid(pages)
        return len(pages) if valid.all() else int(np.argmin(valid))

    def _alive(self, pages: Pages) -> Mask:
        alive: Mask = self._region.held(pages) & (self._region.where(pages) != AT_LOST)
        return alive

    def adopted(self, pages: Pages) -> None:
        """The region has taken over bytes for these pages from an earlier run."""
        self._backed[pages] = True

    def below(self, pages: Pages) -> Pages:
        """Those of these pages that have bytes, and not on the GPU."""
        backed = pages[self._backed[pages]]
        found: Pages = backed[self._region.where(backed) != AT_GPU] if len(backed) else _NO_PAGES
        return found

    def promote(self, pages: Pages) -> None:
        """These pages, which are below, will be wanted soon, the first of them first."""
        if len(pages):
            self._region.hint(pages, Hint.SOON)

    def on_drive(self, pages: Pages) -> Pages:
        """Those of these pages that rest on a drive."""
        backed = pages[self._backed[pages]]
        found: Pages = backed[self._region.where(backed) == AT_NVME] if len(backed) else _NO_PAGES
        return found

    def reset(self) -> None:
        """The engine has flushed its cache: every page but the padding is free."""
        self.release_others(())
        self._let_early_go(_where(self._early))
        self.unprepare()
        pages = np.flatnonzero(self._backed).astype(np.int32)
        self.forget(pages[pages != PADDING])
