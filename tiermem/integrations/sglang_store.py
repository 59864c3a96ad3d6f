"""Pages by name in host memory and on a drive, for whoever has bytes at an address.

What HiCache's storage backend stands on. A store is a space of its own on the CPU device, whose
frames only stage what comes and goes; its tiers below keep it, by their own policies and limits.
"""

from __future__ import annotations

import ctypes
import logging
import threading
from collections.abc import Mapping, Sequence

import numpy as np
import xxhash

from tiermem.config import Config
from tiermem.errors import NotOurs, PageLost, TierFailed, TierFull
from tiermem.keyindex import Keys
from tiermem.region import Pages
from tiermem.space import Space
from tiermem.tier import AT_LOST, AT_NONE

log = logging.getLogger(__name__)

Spans = Sequence[tuple[int, int]]
"""(address, bytes) of the pieces of one page, in order."""

STAGED = 16
"""Pages that are on their way in or out at once, of the frames that the space has."""


class PageStore:
    """Thread-safe. Closes with `close`."""

    def __init__(
        self, config: Config, page_bytes: int, rank: str, fingerprint: Mapping[str, str]
    ) -> None:
        """config: its gpu.page holds a page, its gpu.budget at least twice STAGED of them."""
        self._space = Space.open(config, rank=rank, fingerprint=fingerprint)
        self._page_bytes = page_bytes
        self._salt = xxhash.xxh3_128_digest(repr(sorted(fingerprint.items())).encode())
        slots = sum(tier.configured for tier in self._space.statistics().tiers)
        self._region = self._space.reserve(
            (slots + 2 * STAGED) * self._space.page_bytes, name="store", on_gone=self._gone
        )
        self._pages: dict[bytes, int] = {}
        self._names: dict[int, bytes] = {}
        self._lock = threading.Lock()
        self._one_at_a_time = threading.Lock()

    def leading(self, names: Sequence[str]) -> int:
        """How many of these pages, from the first on, are here."""
        keys = self._keys(names)
        with self._lock:
            here = np.array([key.tobytes() in self._pages for key in keys], np.bool_)
        if not here.all():
            here |= self._space.find(keys) != AT_NONE
        return int(np.argmin(here)) if not here.all() else len(names)

    def put(self, names: Sequence[str], spans: Sequence[Spans]) -> list[bool]:
        """Take pages in; whether each is here now. Raises what the space raises, but TierFull."""
        keys = self._keys(names)
        done = [False] * len(names)
        with self._one_at_a_time:
            for start in range(0, len(names), STAGED):
                some = range(start, min(start + STAGED, len(names)))
                with self._lock:
                    fresh = [i for i in some if keys[i].tobytes() not in self._pages]
                for i in set(some) - set(fresh):
                    done[i] = True
                if fresh and not self._put(fresh, keys, spans):
                    break
                for i in fresh:
                    done[i] = True
        return done

    def _put(self, which: list[int], keys: Keys, spans: Sequence[Spans]) -> bool:
        try:
            pages = self._region.allocate(len(which))
        except TierFull:
            return False
        # Named before they may leave: a page that is dropped takes its name with it.
        with self._region.use(pages, "write"):
            for i, page in zip(which, pages.tolist(), strict=True):
                self._copy(spans[i], page, inwards=True)
            self._region.label(pages, keys[which])
            self._name(pages, keys[which])
        return True

    def _name(self, pages: Pages, keys: Keys) -> None:
        with self._lock:
            for page, key in zip(pages.tolist(), keys, strict=True):
                self._pages[key.tobytes()] = page
                self._names[page] = key.tobytes()

    def get(self, names: Sequence[str], spans: Sequence[Spans]) -> list[bool]:
        """Copy pages out; whether each was here and is as it was put in."""
        keys = self._keys(names)
        with self._one_at_a_time:
            pages = self._held(keys)
            return [
                bool(page >= 0) and self._get(int(page), span)
                for page, span in zip(pages, spans, strict=True)
            ]

    def _held(self, keys: Keys) -> Pages:
        """int32[n]: the page of each key, also those that an earlier run left; -1: not here."""
        with self._lock:
            found = [self._pages.get(key.tobytes(), -1) for key in keys]
        pages = np.array(found, np.int32)
        missing = np.flatnonzero(pages < 0)
        if len(missing):
            pages[missing] = self._region.adopt(keys[missing])
            missing = missing[pages[missing] >= 0]
            self._name(pages[missing], keys[missing])
            dropped = missing[~self._region.held(pages[missing])]  # before they had names
            self._unname(pages[dropped])
            pages[dropped] = -1
        return pages

    def _get(self, page: int, spans: Spans) -> bool:
        try:
            with self._region.use(page):
                self._copy(spans, page, inwards=False)
                return True
        except (PageLost, TierFailed, NotOurs) as error:  # NotOurs: it was dropped just now
            log.warning("lost page: %s", error)
            self._forget(page)
            return False

    def _forget(self, page: int) -> None:
        self._unname(np.array([page], np.int32))
        if self._region.where([page])[0] == AT_LOST:
            self._region.free([page])

    def _copy(self, spans: Spans, page: int, *, inwards: bool) -> None:
        at = self._region.address + page * self._region.page_bytes
        assert sum(nbytes for _, nbytes in spans) <= self._page_bytes, "more than a page"
        for address, nbytes in spans:
            to, start = (at, address) if inwards else (address, at)
            ctypes.memmove(to, start, nbytes)
            at += nbytes

    def _gone(self, pages: Pages, reason: str) -> None:
        self._unname(pages)

    def _unname(self, pages: Pages) -> None:
        with self._lock:
            for page in pages.tolist():
                name = self._names.pop(page, None)
                if name is not None and self._pages[name] == page:
                    del self._pages[name]

    def _keys(self, names: Sequence[str]) -> Keys:
        """uint64[n, 2]: names in the key space of this store's fingerprint."""
        made = b"".join(xxhash.xxh3_128_digest(self._salt + name.encode()) for name in names)
        keys: Keys = np.frombuffer(made, np.uint64).reshape(-1, 2).copy()
        return keys

    def drain(self) -> None:
        """Wait until nothing moves."""
        self._space.drain()

    def close(self) -> None:
        self._space.close()
