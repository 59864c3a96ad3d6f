"""A region: one reserved range of addresses, and the pages in it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from enum import StrEnum
from types import TracebackType
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np
import numpy.typing as npt

from tiermem.errors import Closed, ConfigError, NotOurs, PageInUse, TierFull
from tiermem.facts import Expected, Fact, Queued
from tiermem.pager import Pager
from tiermem.plan import Plan
from tiermem.planner import Access
from tiermem.policies.base import Keys, RequestFacts
from tiermem.policies.recompute import ModelSpeed, RouteSpeed, Split, split
from tiermem.policies.retention import HIGHEST, Retained
from tiermem.slices import Arriving
from tiermem.table import Extent, Rows
from tiermem.tier import Device, Place

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

Pages = npt.NDArray[np.int32]
OnGone = Callable[[Pages, str], None]
ReadInPlace = Literal["pays", "always", "never"]
_ACCESS = ("read", "write", "fresh")
READ_IN_PLACE = ("pays", "always", "never")

NEXT = -2
"""As a parent in `Region.allocate`: the next unit of the same call, which has no number yet."""


class Hint(StrEnum):
    """What the owner knows about the near future of pages."""

    SOON = "soon"  # will be used: load them if there is room
    COLD = "cold"  # will not be used for a while: start moving them down


class Home(Protocol):
    """What a region asks of the space that it belongs to."""

    pager: Pager
    device: Device
    page_bytes: int

    def now(self) -> int: ...

    def save(self, rows: range | None = None) -> int: ...

    def collect_vacant(self) -> None: ...

    def foresee(self, fact: Fact, chain: Rows, owner: int) -> None: ...

    def route_speeds(self) -> dict[Place, RouteSpeed]: ...


class Region:
    """Pages 0..pages-1 at stable addresses. Thread-safe. Page arrays are int32, deepest first.

    With `unit_pages` > 1 a page stands for its whole unit, which is used, moved and freed as one.
    """

    def __init__(
        self,
        space: Home,
        extent: Extent,
        address: int,
        name: str,
        on_gone: OnGone | None,
        numbered: bool = False,
        in_place: ReadInPlace = "pays",
    ) -> None:
        self.name = name
        self.numbered = numbered
        self.in_place = in_place
        self.address = address
        self.pages = extent.pages
        self.unit_pages = extent.unit_pages
        self.tenant = extent.tenant
        self.page_bytes = space.page_bytes
        self.nbytes = extent.pages * space.page_bytes
        self._space = space
        self._pager = space.pager
        self._first = extent.first
        self._on_gone = on_gone
        heads = np.arange(extent.first, extent.first + extent.pages, extent.unit_pages)
        self._vacant = heads[::-1].astype(np.int32)[: 0 if numbered else None]
        self._vacant_count = len(self._vacant)
        self._closed = False

    # ---------------------------------------------------------------- pages

    def allocate(
        self,
        n: int,
        *,
        pages: Sequence[int] | Pages | None = None,
        parents: Sequence[int] | Pages | None = None,
        depths: Sequence[int] | Pages | None = None,
        keys: Keys | None = None,
    ) -> Pages:
        """Put memory behind n vacant pages (whole units); int32[n], unit by unit.

        pages: which ones, n of them; given if, and only if, the region is `numbered`. One that
        was freed is waited for until queued work no longer touches it.
        parents, depths, keys: one a unit, deepest first; a parent is a page of this region, NEXT
        (the unit after it in this call) or -1. keys are for the policies, which get 64 bits of
        content keys uint64[n, 2]; `label` says that a content is there.
        What the pages hold is undefined, but never another tenant's bytes. Raises TierFull,
        allocating none, when not enough pages are vacant or too many are pinned.
        """
        units = -(-int(n) // self.unit_pages)
        named = self.numbered or pages is not None
        if units <= 0:
            raise ConfigError(f"allocate {n} pages: at least 1")
        if parents is not None and len(parents) and parents[-1] == NEXT:
            raise ConfigError(f"allocate {n} pages: the last unit has no next one for its parent")
        heads = self._claim(pages, units) if named else self._pop_vacant(units)
        rows = self._pager.planner.table.pages(heads)
        above = None if parents is None else self._above(np.asarray(parents, np.int32), heads)
        try:
            if keys is not None and keys.ndim == 2:
                keys = keys[:, 0]
            self._pager.allocate(
                rows, above, None if depths is None else np.asarray(depths, np.int32), keys
            )
        except BaseException:
            self._undo_allocate(heads)
            raise
        return rows - self._first

    def use(
        self,
        pages: int | Sequence[int] | Pages,
        access: Access = "read",
        stream: int | None = None,
        touches: int = 1,
        kernels_only: bool = False,
    ) -> Use:
        """A context in which these pages are on the GPU and stay there.

        access: "read", "write" (reads and writes), or "fresh" (the old bytes are not needed, so
        nothing is loaded). stream: the stream whose queued work touches the pages (a CUDA stream
        handle, or one of the CPU device's); host loads are then ordered before that stream's
        later work, and the pages stay until its work of this block has ended.
        touches: how often this block will read each page. With host.read_in_place, pages to be
        read may stay in the host tier, where kernels read them at the same addresses, if that
        costs less (see `Space.reserve`); pages that are read so can not be written meanwhile.
        kernels_only: nothing but kernels is queued on the stream in this block. Then the stream
        waits until its pages are shown, too, and the caller for nothing; the driver refuses to
        copy or to set memory (cuMemcpyAsync, cuMemsetAsync) that is not shown when it is asked.
        Raises TierFull, PageLost, PageInUse, NotOurs on entry; then nothing is pinned.
        """
        if touches < 1:
            raise ConfigError(f"touches {touches}: at least 1")
        if access not in _ACCESS:
            raise ConfigError(f"access {access!r}: one of {', '.join(_ACCESS)}")
        if isinstance(pages, int) and self.unit_pages == 1 and 0 <= pages < self.pages:
            return Use(self, None, pages + self._first, access, stream, touches, kernels_only)
        return Use(self, self._rows(pages), -1, access, stream, touches, kernels_only)

    def pin(
        self,
        pages: Sequence[int] | Pages,
        access: Access = "read",
        stream: int | None = None,
        touches: int = 1,
        kernels_only: bool = False,
        arriving: Arriving | None = None,
    ) -> None:
        """What entering `use` does; each page is given back by one `unpin`, in any grouping.

        arriving: for work that reads these pages from front to back. Host loads are added to it
        instead of being waited for, and the caller lets the stream (the calling thread, without
        one) wait for so many bytes of each page as what it queues next will read.
        """
        if access not in _ACCESS:
            raise ConfigError(f"access {access!r}: one of {', '.join(_ACCESS)}")
        rows = self._rows(pages)
        if len(rows):
            self._pager.use(rows, access, stream, self._counted(touches), kernels_only, arriving)

    def unpin(self, pages: Sequence[int] | Pages, stream: int | None = None) -> None:
        """Pages may leave once the work that is queued on the stream by now has ended."""
        rows = self._rows(pages)
        if len(rows):
            self._pager.unpin(rows, self._space.device.streams.tick(stream))

    def touch(self, pages: Sequence[int] | Pages) -> None:
        """Tell the policies that these pages were used just now, deepest first."""
        rows = self._rows(pages)
        with self._pager.lock:
            self._pager.planner.touch(rows, self._space.now())

    def hint(self, pages: Sequence[int] | Pages, hint: Hint | str) -> None:
        """Tell what is known of the near future; never waits, never fails for lack of room."""
        rows = self._rows(pages)
        planner = self._pager.planner
        match Hint(hint):
            case Hint.SOON:
                self._pager.decide(lambda: planner.prefetch(rows, self._space.now()))
            case Hint.COLD:
                self._pager.decide(lambda: planner.demote(rows, self._space.now()))

    def tell(self, fact: Fact) -> None:
        """Tell what is known of requests that wait and of sessions; see `tiermem.facts`.

        The prefetch policy of the configuration decides what is loaded ahead; without one nothing
        happens. Never waits. Raises NotOurs for a chain of other pages.
        """
        chain = np.empty(0, np.int32)
        if isinstance(fact, Queued | Expected) and len(fact.chain):
            rows = self._rows(fact.chain)
            chain = self._pager.planner.table.heads(rows)
        owner = int(self._pager.planner.table.region[self._first])
        self._space.foresee(fact, chain, owner)

    def split(
        self,
        chain: Sequence[int] | Pages,
        tokens: int | npt.NDArray[np.int64],
        model: ModelSpeed,
        *,
        suffix_tokens: int = 0,
        wait_s: float = 0.0,
        overlap: bool = False,
    ) -> Split:
        """How many units of a chain to load, and from where on computing is cheaper.

        chain: the first page of each unit, the first block first. tokens: of each unit, or
        int64[n]. By what each route has moved of late and what is queued on it; the rest as in
        `policies.recompute.split`. Nothing is moved. Raises NotOurs, ConfigError.
        """
        rows = self._rows(chain)
        planner = self._pager.planner
        with self._pager.lock:
            places, pages = planner.chain(planner.table.heads(rows))
        return split(
            places,
            pages * self.page_bytes,
            tokens,
            self._space.route_speeds(),
            model,
            suffix_tokens=suffix_tokens,
            wait_s=wait_s,
            overlap=overlap,
        )

    def label(self, pages: Sequence[int] | Pages, keys: Keys) -> None:
        """The bytes of these units are, whole and from now on, the content of these keys.

        keys: uint64[n, 2], one a unit, not zero: a hash of everything that the bytes depend on.
        The label holds until the unit is written, freed or lost. Raises NotOurs, PageLost.
        """
        rows = self._rows(pages)
        planner = self._pager.planner
        _check_keys(keys, len(planner.table.heads(rows)))
        with self._pager.lock:
            planner.label(rows, keys)

    def adopt(
        self,
        keys: Keys,
        pages: Sequence[int] | Pages | None = None,
        *,
        parents: Sequence[int] | Pages | None = None,
        depths: Sequence[int] | Pages | None = None,
    ) -> Pages:
        """Take over content on the drive that no region holds: what an earlier run left there.

        keys: uint64[n, 2]. pages: the vacant unit for each key, by default any. parents, depths:
        as for `allocate`; a parent that was not adopted counts as none. Returns int32[n]: the
        first page of the unit that has content keys[i] now, -1 where it is not to be had or is
        another tenant's. Nothing is loaded before a page is used; one that does not verify then
        is lost. Raises TierFull, adopting none, when not enough units are vacant.
        """
        _check_keys(keys, len(keys))
        given = None if pages is None else self._heads_of(pages, len(keys))
        above = np.full(len(keys), -1, np.int32)
        if parents is not None:
            above = np.asarray(parents, np.int32)
        deep = None if depths is None else np.asarray(depths, np.int32)
        found = np.full(len(keys), -1, np.int32)
        while not self._adopt_now(keys, given, above, deep, found):
            self._pager.drain()
        return found

    def finished(self, pages: Sequence[int] | Pages, facts: RequestFacts) -> None:
        """Tell the policies what is known of a request that ended."""
        rows = self._rows(pages)
        with self._pager.lock:
            self._pager.planner.finished(rows, facts, self._space.now())

    def retain(
        self, pages: Sequence[int] | Pages, *, priority: int = 0, seconds: float = 0.0
    ) -> None:
        """Let these pages leave the tier that they are in after all pages of lower rank.

        priority: 0 (none) to 100; for so many seconds also after any that is not retained. Where
        nothing else may leave, they do; the mark ends when a page leaves its tier. Mark whole
        chains. Raises ConfigError, NotOurs.
        """
        if not 0 <= priority <= HIGHEST or seconds < 0:
            raise ConfigError(f"priority {priority} for {seconds} s: 0 to {HIGHEST}, 0 s or more")
        rows = self._rows(pages)
        table = self._pager.planner.table
        with self._pager.lock:
            now = self._space.now()
            until = now + round(seconds * 1000) if seconds else 0
            heads = table.heads(rows)
            for place, ranking in self._pager.planner.rankings.items():
                here = heads[table.at[heads] == place]
                ranking.retain(here, priority, until, now, lambda under: Retained(1, over=under))

    def free(self, pages: Sequence[int] | Pages) -> None:
        """Forget pages, in whatever tier. Raises PageInUse or NotOurs, freeing none.

        Memory that queued work may still touch is kept back until that work has ended.
        """
        rows = self._rows(pages)
        if len(rows):
            self._pager.free(rows)

    def shelve(self, pages: Sequence[int] | Pages) -> None:
        """Free pages, and leave labelled content that is on the drive to be adopted again.

        With nvme.persist; else the same as `free`, and it raises as that does.
        """
        rows = self._rows(pages)
        if len(rows):
            planner = self._pager.planner
            self._pager.decide(lambda: planner.shelve(rows, self._space.now()))

    def held(self, pages: Sequence[int] | Pages) -> npt.NDArray[np.bool_]:
        """bool[n]: pages that are allocated and not being given up: those that `free` takes.

        Of a page that the tiers drop this is false before `on_gone` has said so.
        """
        table = self._pager.planner.table
        rows = np.asarray(pages, np.int32) + np.int32(self._first)
        with self._pager.lock:
            mask: npt.NDArray[np.bool_] = table.at[rows] != Place.NONE
            return mask & ~self._pager.planner.is_doomed(rows)

    def where(self, pages: Sequence[int] | Pages | None = None) -> npt.NDArray[np.uint8]:
        """uint8[n]: the Place of each page at this moment (default: of all)."""
        table = self._pager.planner.table
        with self._pager.lock:
            if pages is None:
                return table.at[self._first : self._first + self.pages].copy()
            return table.at[np.asarray(pages, np.int32) + self._first].copy()

    # ---------------------------------------------------------------- bytes

    def tensor(
        self,
        dtype: torch.dtype,
        shape: Sequence[int],
        strides: Sequence[int] | None = None,
        offset: int = 0,
    ) -> torch.Tensor:
        """A torch tensor over the range from byte `offset`, zero-copy; its address never changes.

        Touch an element only while its page is in use.
        """
        from tiermem.gpu.tensor import tensor

        return tensor(
            self.address + offset,
            self.nbytes - offset,
            dtype,
            shape,
            strides,
            device=self._space.device.torch_device,
        )

    def view(
        self, dtype: npt.DTypeLike = np.uint8, shape: Sequence[int] | None = None
    ) -> np.ndarray:
        """A numpy array over the range (CPU device): by default one row of bytes a page."""
        from tiermem.gpu.tensor import view

        if shape is None:
            shape = (self.pages, self.page_bytes // np.dtype(dtype).itemsize)
        return view(self.address, self.nbytes, dtype, shape)

    # ---------------------------------------------------------------- closing

    def close(self) -> None:
        """Free all pages and give the addresses back. Raises PageInUse if pages are pinned.

        With nvme.persist, labelled pages are saved before that, as by `Space.save`.
        """
        if self._closed:
            return
        planner = self._pager.planner
        mine = np.arange(self._first, self._first + self.pages, dtype=np.int32)
        with self._pager.lock:
            if self._closed:
                return
            self._refuse_pinned()
            self._closed = True
        self._space.save(range(self._first, self._first + self.pages))
        self._pager.drain()
        for _ in range(2):  # pages that queued work still touches show their frames until then
            self._pager.decide(lambda: planner.forget(mine, self._space.now()))
            self._pager.drain()
        self._space.device.release(self.address, self.nbytes)

    def __enter__(self) -> Region:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        self.close()

    # ---------------------------------------------------------------- for the space

    def refuse_pinned(self) -> None:
        """Raise PageInUse if pages are pinned or awaited."""
        with self._pager.lock:
            if not self._closed:
                self._refuse_pinned()

    def _refuse_pinned(self) -> None:
        table, mine = self._pager.planner.table, slice(self._first, self._first + self.pages)
        pinned = int(((table.pins[mine] > 0) | (table.waiters[mine] > 0)).sum())
        if pinned:
            raise PageInUse(f"region {self.name}: {pinned} pages are pinned; leave their use()")

    def take_vacant(self, rows: Rows) -> None:
        """Rows of this region became vacant. Called under the pager's lock."""
        if self.numbered:
            return  # their numbers are the owner's; the table says which are vacant
        heads = self._pager.planner.table.heads(rows)
        n = self._vacant_count
        self._vacant[n : n + len(heads)] = heads
        self._vacant_count += len(heads)

    def tell_gone(self, rows: Rows, reason: str) -> None:
        if self._on_gone is not None:
            self._on_gone(rows - self._first, reason)

    # ---------------------------------------------------------------- parts

    def _counted(self, touches: int) -> int | None:
        """`touches` of a use, as the planner takes them."""
        match self.in_place:
            case "pays":
                return touches
            case "always":
                return 0
            case "never":
                return None

    def _rows(self, pages: int | Sequence[int] | Pages) -> Rows:
        """Rows of these pages' whole units; NotOurs unless each is in the region, and once."""
        if self._closed:
            raise Closed(f"region {self.name} is closed")
        given = np.atleast_1d(np.asarray(pages))
        outside = (given < 0) | (given >= self.pages)
        if outside.any():
            bad = given[outside]
            raise NotOurs(
                f"region {self.name} has pages 0..{self.pages - 1}; {len(bad)} of {len(given)} "
                f"are not among them (first: {int(bad[0])})"
            )
        rows: Rows = given.astype(np.int32) + np.int32(self._first)
        if self.unit_pages > 1:
            table = self._pager.planner.table
            rows = table.pages(table.heads(rows))
        elif len(rows) > 1 and _has_duplicates(rows):
            raise NotOurs(f"region {self.name}: a page is named twice among {len(rows)}")
        return rows

    def _adopt_now(
        self, keys: Keys, given: Rows | None, parents: Pages, depths: Rows | None, found: Pages
    ) -> bool:
        """Adopt into `found` what can be had, in one step; False: freed units are on their way."""
        planner = self._pager.planner
        settled = True

        def verb() -> list[Plan]:
            nonlocal settled
            self._space.collect_vacant()
            shelved = planner.in_attic(keys, self.tenant, self.unit_pages)
            held = np.flatnonzero(shelved[:, 0] >= 0)
            if not len(held):
                return []
            wanted = None if given is None else given[held]
            leaving = wanted is not None and bool(planner.is_doomed(wanted).any())
            short = not self.numbered and len(held) > self._vacant_count
            if leaving or (short and not planner.is_idle()):
                settled = False
                return []
            heads = self._take_heads(len(held), wanted)
            pages = np.full(len(keys) + 1, -1, np.int32)
            pages[held] = heads
            rows = np.where(parents < 0, -1, parents + self._first).astype(np.int32)
            rows = np.where(parents == NEXT, pages[1:], rows).astype(np.int32)
            found[held] = heads - self._first
            return planner.adopt(
                heads,
                shelved[held],
                self._space.now(),
                parents=rows[held],
                depths=None if depths is None else depths[held],
            )

        self._pager.decide(verb)
        return settled

    def _take_heads(self, n: int, given: Rows | None) -> Rows:
        """n vacant units, or these: no longer vacant. Called under the lock; TierFull, NotOurs."""
        vacant = self._vacant[: self._vacant_count]
        if self.numbered:
            if given is None or self._pager.planner.table.at[given].any():
                raise NotOurs(f"region {self.name}: {n} units wanted, not given, or not vacant")
            return given
        if given is None:
            if n > len(vacant):
                raise self._too_few(n, len(vacant))
            self._vacant_count -= n
            return vacant[len(vacant) - n :][::-1].copy()
        rest = vacant[~np.isin(vacant, given)]
        if len(rest) != len(vacant) - n:
            raise NotOurs(f"region {self.name}: {n} units to adopt into, not all of them vacant")
        self._vacant_count = len(rest)
        self._vacant[: len(rest)] = rest
        return given

    def _heads_of(self, pages: Sequence[int] | Pages, n: int) -> Rows:
        heads = self._pager.planner.table.heads(self._rows(pages))
        if len(heads) != n:
            raise ConfigError(f"{len(heads)} units to adopt into, {n} keys")
        return heads

    def _too_few(self, units: int, vacant: int) -> TierFull:
        return TierFull(
            f"region {self.name}: {units} units wanted, {vacant} of "
            f"{self.pages // self.unit_pages} are vacant; free some, or reserve more"
        )

    def _above(self, parents: Pages, heads: Rows) -> Rows:
        """Rows of the parents of units that are being allocated."""
        rows = np.where(parents < 0, -1, parents + self._first).astype(np.int32)
        following = np.flatnonzero(parents == NEXT)
        rows[following] = heads[following + 1]
        return rows

    def _pop_vacant(self, units: int) -> Rows:
        if self._closed:
            raise Closed(f"region {self.name} is closed")
        while True:
            with self._pager.lock:
                self._space.collect_vacant()
                if units <= self._vacant_count:
                    self._vacant_count -= units
                    top = self._vacant_count
                    return self._vacant[top : top + units][::-1].copy()
                vacant = self._vacant_count
                coming = not self._pager.planner.is_idle()
            if not coming:
                raise self._too_few(units, vacant)
            self._pager.drain()

    def _claim(self, pages: Sequence[int] | Pages | None, units: int) -> Rows:
        """The first rows of these vacant units, once none of them is on its way out."""
        rows = self._rows([] if pages is None else pages)
        planner = self._pager.planner
        heads: Rows = rows[:: self.unit_pages]
        if not self.numbered or len(heads) != units:
            raise NotOurs(
                f"region {self.name}: {len(heads)} units named of {units} to allocate; name each "
                "in a region that is reserved as numbered, and none in any other"
            )
        while True:
            with self._pager.lock:
                leaving = bool(planner.is_doomed(rows).any())
            if not leaving:
                return heads
            self._pager.drain()

    def _undo_allocate(self, heads: Rows) -> None:
        """Vacant units that an allocation took and did not fill go back."""
        planner = self._pager.planner
        with self._pager.lock:
            self._space.collect_vacant()  # among them perhaps some of these, dropped meanwhile
            here = planner.table.at[heads] == Place.NONE
            doomed = planner.is_doomed(heads)
            if not self.numbered:
                back = np.isin(heads, self._vacant[: self._vacant_count])
                self.take_vacant(heads[here & ~doomed & ~back][::-1])
            begun = planner.table.pages(heads[~here & ~doomed])
        if len(begun):
            self._pager.free(begun)


def _check_keys(keys: Keys, n: int) -> None:
    if keys.dtype != np.uint64 or keys.shape != (n, 2) or not keys.any(axis=1).all():
        raise ConfigError(
            f"keys {keys.dtype}{list(keys.shape)}: uint64[{n}, 2] wanted, one a unit, none zero"
        )


def _has_duplicates(rows: Rows) -> bool:
    if (rows[1:] > rows[:-1]).all():
        return False
    in_order = np.sort(rows)  # np.unique takes 40 us for one element on numpy 2.4
    return bool((in_order[1:] == in_order[:-1]).any())


class Use:
    """Pages that are pinned between entering and leaving. Not reentrant."""

    __slots__ = ("_access", "_kernels_only", "_region", "_row", "_rows", "_stream", "_touches")

    def __init__(
        self,
        region: Region,
        rows: Rows | None,
        row: int,
        access: Access,
        stream: int | None,
        touches: int,
        kernels_only: bool,
    ) -> None:
        self._region = region
        self._rows = rows
        self._row = row
        self._access: Access = access
        self._stream = stream
        self._touches = touches
        self._kernels_only = kernels_only

    def __enter__(self) -> Use:
        region = self._region
        if region._closed:
            raise Closed(f"region {region.name} is closed")
        if self._rows is None:
            if region._pager.use_one(self._row, self._access != "read"):
                return self
            self._rows = np.array([self._row], np.int32)
        if len(self._rows):
            touches = region._counted(self._touches)
            region._pager.use(self._rows, self._access, self._stream, touches, self._kernels_only)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        region = self._region
        tick = region._space.device.streams.tick(self._stream)
        if self._rows is None and tick is None:
            region._pager.unpin_one(self._row)
            return
        rows = np.array([self._row], np.int32) if self._rows is None else self._rows
        if len(rows):
            region._pager.unpin(rows, tick)
