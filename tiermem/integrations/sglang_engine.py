"""tiermem in one of SGLang's scheduler processes: its space, and what it knows of its requests.

Every tensor-parallel rank is such a process with a space of its own. What SGLang decides by our
numbers (how many pages fit, how much of a prefix is there) is agreed on by all ranks first;
what is only our own business (where a page is, when it moves) is not.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt

from tiermem.config import Config
from tiermem.drive import BACKLOG_BYTES
from tiermem.integrations.sglang_gates import Gates
from tiermem.integrations.sglang_keys import KeyChain
from tiermem.integrations.sglang_layers import LayerWaits
from tiermem.integrations.sglang_layout import PageMajor
from tiermem.integrations.sglang_pages import FreePages, Pages
from tiermem.integrations.sglang_residence import PADDING, Residence
from tiermem.integrations.sglang_sizes import Sizes, opened
from tiermem.integrations.sglang_speed import PrefillSpeed
from tiermem.space import Space
from tiermem.tier import AT_NONE

if TYPE_CHECKING:
    import torch

Agree = Callable[[list[int]], list[int]]
"""The least of each number over all ranks; every rank calls it at the same point."""

PREPARED = 8
"""Free pages that get memory in a round of an idle engine: a request that comes meanwhile waits for
no more. 8 of 8 MiB took 1.4 ms beside other engines (bench/sglang_gpu.py, hooks, H200, 2026-11)."""
LOOK_EVERY = 16
"""Rounds of the scheduler between two looks at a budget that takes more than a lock to learn."""


def alone(numbers: list[int]) -> list[int]:
    """`Agree` where there is one rank."""
    return numbers


@dataclass(frozen=True, slots=True)
class Identity:
    """rank: the name of this process's slab. fingerprint: what its bytes mean."""

    rank: str
    fingerprint: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Usable:
    """Of the pages of a prefix, from the first on. there: not lost. load: worth it; not above."""

    there: int
    load: int


@dataclass(frozen=True, slots=True)
class Matched:
    """The cached pages of a request, when so many tokens had been freed (`PageMajorAllocator`)."""

    pages: Pages
    freed: int


@dataclass(frozen=True, slots=True)
class Ended:
    """What is known of a request that ended (`RequestFacts`); None where SGLang does not say."""

    session: int | None
    reason: str | None
    output_tokens: int
    turn: int | None = None


class Engine:
    """Opens the space, which lives as long as the process."""

    def __init__(
        self,
        config: Config,
        layout: PageMajor,
        sizes: Sizes,
        identity: Identity,
        pages: int,
        step_tokens: int = 0,
    ) -> None:
        """pages: of SGLang's pool, without the padding; at most sizes.virtual.

        step_tokens: new ones in a step at most. Frames for those of two are kept free, or stand
        behind free pages while the engine is idle.
        """
        self.layout = layout
        step = -(-step_tokens // layout.page_size)
        self._ahead = 0 if config.share.enabled else min(max(step, PREPARED), sizes.gpu // 4)
        self.stream: int | None = None
        self.agree: Agree = alone
        self.space = Space.open(
            opened(config, sizes, layout.page_bytes),
            rank=identity.rank,
            fingerprint=identity.fingerprint,
            headroom=max(0, min(2 * step, sizes.gpu // 2) - self._ahead),
        )
        self._persists = config.nvme.enabled and config.nvme.persist
        self._may_lose = config.nvme.enabled
        self.region = self.space.reserve(
            (pages + 1) * layout.page_bytes, name="sglang-kv", on_gone=self._gone, numbered=True
        )
        self.residence = Residence(
            self.region, lambda: self.stream, layout.page_size, self._await_drive
        )
        self.layers = self._waits_of(layout.parts)
        self._outpaces = False
        self._budget = self.space.budget()
        self._round = 0
        self.gates = Gates(pages, layout.page_size, lambda: self._budget)
        self.speed = PrefillSpeed()
        self.caps: dict[Hashable, int] = {}
        """Tokens that a request may be matched with at most, while it is being matched."""
        self.bypassing: MutableMapping[Hashable, int] = WeakKeyDictionary()
        """Requests that compute again what the tree has, from how many pages on."""
        self.matched: MutableMapping[Hashable, Matched] = WeakKeyDictionary()
        """What requests were matched with last: the same again while the tree has lost nothing."""
        self.ended: list[tuple[Hashable, Ended]] = []
        """Requests that ended in this round of the scheduler, and how."""
        self._chains: dict[Hashable, KeyChain] = {}
        self._labelled: dict[Hashable, int] = {}
        self._served = False
        self._salt: str | None = None

    # ---------------------------------------------------------------- memory

    def buffer(self, part: int, dtype: torch.dtype, row_shape: Sequence[int]) -> torch.Tensor:
        """The tensor [rows, *row_shape] of one layer's K, V or latent over the whole range."""
        rows = self.layout.rows(self.gates.pages + 1)
        return self.region.tensor(dtype, (rows, *row_shape), offset=self.layout.offset(part))

    def wait_by_layer(self, layers: int) -> LayerWaits:
        """Batches wait for each of so many layers by itself, where SGLang asks for each."""
        self.layers = self._waits_of(layers)
        return self.layers

    def _waits_of(self, layers: int) -> LayerWaits:
        layer_bytes = self.layout.parts // layers * self.layout.block_bytes
        return LayerWaits(self.residence.arriving, lambda: self.stream, layers, layer_bytes)

    def blank_padding(self, first: torch.Tensor) -> None:
        """What padded tokens read is zeros, as in SGLang's own buffers.

        first: the tensor of part 0, whose storage begins with page 0.
        """
        nbytes = self.layout.page_bytes
        first.view(-1)[: nbytes // first.element_size()].zero_()

    def free_pages(self) -> FreePages:
        """All pages of the pool, none of them in use: for a pool that is made, or flushed.

        A flush may mean that the weights have changed: content gets other names from then on, so
        that what was kept before is not found again by this process, nor what it keeps later by
        another one.
        """
        self.ended.clear()
        self.residence.reset()
        self._chains.clear()
        self._labelled.clear()
        if self._served:
            self._salt = os.urandom(16).hex()
        self._served = True
        return FreePages(self.gates.pages, self._freed)

    def _freed(self, pages: Pages) -> None:
        self.residence.forget(pages)

    def _gone(self, pages: Pages, reason: str) -> None:
        self.residence.gone(pages, reason)

    # ---------------------------------------------------------------- rounds of the scheduler

    @property
    def is_alone(self) -> bool:
        """Whether there is one rank, which decides for itself."""
        return self.agree is alone

    def look(self) -> None:
        """Take over a budget that has changed; all ranks in the same round."""
        self._round += 1
        cheap = self.is_alone and not self.space.shared
        if cheap or self._round % LOOK_EVERY == 1:
            before = self._budget
            [self._budget] = self.agree([self.space.budget()])
            if self._budget < before:
                self.residence.unprepare()
            self.space.count_on(self._budget)  # until the next look, by what was let in meanwhile

    def prepare(self, free: FreePages) -> None:
        """Nothing else is to be done: some of the pages that the next step may take get memory, if
        there is some at once. Its prompt then waits for none.

        They are pinned, so not where other processes may want their memory.
        """
        following = self.residence.bare(free.next(min(self._ahead, self._budget // 4)))[:PREPARED]
        if 0 < len(following) <= self.space.ready():
            self.residence.prepare(following)

    def outpace(self) -> None:
        """From now on nobody waits for a drive that is behind: what it cannot take is dropped."""
        self._outpaces = True
        self._await_drive(False)

    def _await_drive(self, needed: bool) -> None:
        if self._outpaces:
            self.space.limit_backlog(None if needed else BACKLOG_BYTES)

    # ---------------------------------------------------------------- prefixes

    def promote(self, pages: Pages) -> None:
        """A request that waits has these cached pages: bring up those that are worth a load."""
        self.residence.promote(self.residence.below(pages[: self._worth(pages)]))

    def bring(self, pages: Pages, free: FreePages) -> None:
        """As `promote`, for a request of the next batch: nothing runs, and it may have any frame.

        All of them come in one group, so that the batch can begin with their first layers
        (`LayerWaits`). Where frames are short, those of free pages are given back but for a few.
        What a drive has comes when the request is matched.
        """
        if self._may_lose:
            self.promote(pages)
            return
        wanted = self.residence.below(pages)
        if len(wanted) > self.space.ready():
            self.residence.unprepare(free.next(self._ahead)[PREPARED:])
        if len(wanted):
            self.residence.hold(wanted, len(wanted))

    def usable(self, pages: Pages) -> Usable:
        """What of these cached pages, from the first on, can be read and should be, on all ranks.

        With a drive all of it comes up now, and stays until the next step: nothing could be done
        then about a page that is not what was written, or that was dropped meanwhile.
        """
        if not len(pages):
            return Usable(0, 0)
        there = self.residence.leading(pages)
        load = self._worth(pages[:there])
        if self._may_lose:
            held = self.residence.hold(pages[:load], max(1, (self._budget - 1) // 4))
            load = held if self._outpaces else load  # the others might be dropped
            there = self.residence.leading(pages)
        there, load = self.agree([there, min(load, there)])
        return Usable(there, load)

    def _worth(self, pages: Pages) -> int:
        """How many of these pages, from the first on, are sooner loaded than computed again."""
        if not self._may_lose:  # there is no drive
            return len(pages)
        model = self.speed.model()
        if model is None or not len(self.residence.on_drive(pages)):
            return len(pages)  # host memory is always faster
        return self.region.split(pages, self.layout.page_size, model).load

    # ---------------------------------------------------------------- content that is kept

    @property
    def persists(self) -> bool:
        """Whether content outlives its pages, on a drive."""
        return self._persists

    def label(self, request: Hashable, tokens: Sequence[int], extra: str | None) -> None:
        """The first whole pages of a request hold these tokens, and are its tree's from now on."""
        held = self.residence.pages(request)
        if not self._persists or held is None:
            return
        count = min(len(tokens) // self.layout.page_size, len(held))
        done = self._labelled.get(request, 0)
        if count <= done:
            return
        chain = self._chains.get(request)
        if chain is None:
            chain = self._chains[request] = self._chain(extra)
        keys = chain.keys(tokens, count)[done:]
        pages = np.array(held[done:count], np.int32)
        here = self.residence.valid(pages) & (pages != PADDING)
        if here.any():
            self.region.label(pages[here], keys[here])
        self._labelled[request] = count

    def release_ended(self) -> None:
        """Let go of requests whose pages the tree has taken over; no page was taken since."""
        ended, self.ended = self.ended, []
        for request, facts in ended:
            self._tell_finished(request, facts)
            self.release(request)

    def _tell_finished(self, request: Hashable, facts: Ended) -> None:
        held = self.residence.pages(request)
        if held:
            pages = np.array(held[::-1], np.int32)
            self.region.finished(pages[self.residence.valid(pages)], facts)

    def release(self, request: Hashable) -> None:
        """A request has ended or was sent back: it holds nothing."""
        self.residence.release(request)
        self._chains.pop(request, None)
        self._labelled.pop(request, None)

    def kept(self, tokens: Sequence[int], extra: str | None, matched: int, pages: int) -> int:
        """How many pages after the first `matched` of this prompt the drive has kept, agreed on."""
        if not self._persists or pages <= matched:
            return 0
        keys = self._chain(extra).keys(tokens, pages)[matched:]
        places = self.space.find(keys)
        absent = np.flatnonzero(places == AT_NONE)
        [count] = self.agree([int(absent[0]) if len(absent) else len(keys)])
        return count

    def adopt(self, tokens: Sequence[int], extra: str | None, matched: int, pages: Pages) -> int:
        """Free pages take over what the drive kept of a prompt; how many, from the first on.

        The rest of `pages` holds nothing. The same number on all ranks.
        """
        self.residence.unprepare(pages)
        keys = self._chain(extra).keys(tokens, matched + len(pages))[matched:]
        depths = np.arange(matched, matched + len(pages), dtype=np.int32)
        deepest_first = slice(None, None, -1)
        found = self.region.adopt(
            keys[deepest_first], pages[deepest_first], depths=depths[deepest_first]
        )[deepest_first]
        missing = np.flatnonzero(found < 0)
        [count] = self.agree([int(missing[0]) if len(missing) else len(pages)])
        self.residence.adopted(pages[found >= 0])
        return count

    def _chain(self, extra: str | None) -> KeyChain:
        salted = extra if self._salt is None else f"{self._salt}\0{extra}"
        return KeyChain(self.layout.page_size, salted)

    def page_numbers(self, indices: npt.NDArray[np.integer]) -> Pages:
        """int32[n]: the pages of token indices of SGLang, one index a page."""
        numbers: Pages = (indices // (self.layout.page_size * self.layout.stride)).astype(np.int32)
        return numbers

    def first_indices(self, pages: Pages) -> npt.NDArray[np.int64]:
        """int64[n]: the index of the first token of each page, as SGLang knows it."""
        return pages.astype(np.int64) * (self.layout.page_size * self.layout.stride)
