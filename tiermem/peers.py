"""Content that engines of one group take from one another, out of the one host pool.

    what of ours rests in the host tier under a key   is hashed (a native thread), and shown on the
                                                      pool's board, until its slot gets other bytes
    what a request lacks, and another shows           is read from the pool's file through a ring
                                                      into frames that the request holds already

Nothing is pinned, counted or asked for between processes. The other may overwrite or give back
what we are reading: then the checksum is another, and the page is computed, as if it had never
been shown. Keys are mixed with a scope, a digest of all that the bytes depend on beside the key.
"""

from __future__ import annotations

import hashlib
import logging
import math
import time
from collections import Counter, deque
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from tiermem.assemble import Parts, pinned_ring
from tiermem.board import Board, Cells
from tiermem.contents import page_keys
from tiermem.host.pinned import HostPool
from tiermem.host.reading import FromPool, Reader, Reading
from tiermem.keyindex import Keys
from tiermem.nvme.bounce import Bounced, BouncedRoute
from tiermem.nvme.digest import native_digest
from tiermem.planner import Planner
from tiermem.policies.recompute import RouteSpeed
from tiermem.pooling import Pooling
from tiermem.table import DOOMED, IS_FRAME, LABELLED, STALE, Rows
from tiermem.tier import AT_GPU, GPU, HOST, PASSED, Mask, Place, Slots

log = logging.getLogger(__name__)

LOOK_EVERY_S = 0.1
"""Between two looks at what could be shown: a pass over the slots of the host tier."""
AT_ONCE = 64
"""Pages that are hashed for one look."""
RING = 16
"""Pinned slots that others' pages cross on their way to a frame, each for itself."""
LATEST = 16
"""Requests whose pages have come that count for the speed of that."""

_NO_ROWS = np.empty(0, np.int32)


@dataclass(slots=True, eq=False)
class _Wanted:
    """Pages of a request that others have shown; the request's owner keeps their frames for it."""

    name: str
    units: npt.NDArray[np.int32]
    rows: Rows
    keys: Keys
    copied: Rows = field(default_factory=lambda: _NO_ROWS)
    done: Bounced | None = None
    begun_s: float = 0.0
    seen_s: float = 0.0  # the last look that found it under way


@dataclass(slots=True)
class _Hashing:
    """Slots whose bytes are being hashed, and how often each had been filled by then."""

    slots: Slots
    keys: Keys
    fills: npt.NDArray[np.int64]
    offsets: npt.NDArray[np.uint64]
    reading: Reading


class Peers:
    """One engine's side of it. For the thread that has the engine's turn."""

    def __init__(
        self,
        pooling: Pooling,
        board: Board,
        pool: HostPool,
        reader: Reader,
        first: FromPool,
        route: BouncedRoute,
        scope: bytes,
    ) -> None:
        """Most callers use `Peers.open`."""
        self.counts: Counter[str] = Counter()
        self._pooling = pooling
        self._board = board
        self._pool = pool
        self._reader = reader
        self._first = first
        self._route = route
        self._scope = np.frombuffer(hashlib.sha256(scope).digest()[:16], np.uint64)
        self._wanted: list[_Wanted] = []
        self._failed: list[Rows] = []
        self._hashing: _Hashing | None = None
        self._paces: deque[tuple[int, float]] = deque(maxlen=LATEST)
        self._look_s = 0.0
        self._fills = np.zeros(0, np.int64)  # by slot: how often bytes were sent there
        self._seen = np.zeros(0, np.int64)  # of these, when it was hashed last
        self._cells: Cells = np.zeros(0, np.int64)  # by slot: where its entry stands, or -1
        self._alone = False  # as of the last look
        self._retired = False

    @classmethod
    def open(cls, parts: Parts, pooling: Pooling, scope: bytes) -> Peers | None:
        """scope: whatever gives other bytes for the same key. None where it cannot be had."""
        pool, digest = parts.tiers.get(Place.HOST), native_digest()
        if not isinstance(pool, HostPool) or digest is None:
            log.warning("content is not shared: no checksum without the interpreter lock")
            return None
        reader = Reader(pooling.chunks.fd, parts.device.page_bytes, digest)
        parts.closers.append(reader.close)
        ring = pinned_ring(parts, RING)
        first, second = FromPool(reader, ring), parts.device.routes(ring)[1]
        parts.closers.append(second.close)
        route = BouncedRoute(first, second, ring)
        parts.closers.append(route.close)
        board = pooling.board()
        parts.closers.append(board.close)
        return cls(pooling, board, pool, reader, first, route, scope)

    # ---------------------------------------------------------------- what others show

    def find(self, keys: Keys, unit_pages: int) -> Mask:
        """bool[n]: units that others show whole; keys as of `Planner.label`."""
        if self._retired or self._alone or not len(keys):
            return np.zeros(len(keys), np.bool_)
        found = self._board.find(page_keys(keys, unit_pages) ^ self._scope)
        return np.asarray(found.is_there.reshape(len(keys), unit_pages).all(axis=1))

    def want(self, name: str, units: npt.NDArray[np.int32], rows: Rows, keys: Keys) -> None:
        """These pages (whole units), in use by a request and fresh, are to get others' content.

        They stay in use until `turn` gives the units back. keys: one a unit.
        """
        pages = page_keys(keys, len(rows) // len(keys)) ^ self._scope
        self._wanted.append(_Wanted(name, units, rows, pages))

    def awaits(self, name: str) -> bool:
        """Whether pages of a request have neither come nor failed to, as of the last turn."""
        return any(wanted.name == name for wanted in self._wanted)

    def speed(self) -> RouteSpeed:
        """How fast others' pages come of late: by the time during which some certainly were on
        their way, as in `directed.paces`."""
        pages, seconds = (sum(part) for part in zip((0, 0.0), *self._paces, strict=True))
        coming = sum(len(wanted.rows) for wanted in self._wanted) * self._pool.slot_bytes
        gbps = pages * self._pool.slot_bytes / seconds / 1e9 if seconds else math.inf
        return RouteSpeed(gbps, queued_bytes=coming)

    def take_failed(self) -> Rows:
        """Pages whose content did not come."""
        failed, self._failed = self._failed, []
        return np.concatenate([_NO_ROWS, *failed])

    @property
    def busy(self) -> bool:
        """True while pages are on their way, or hashed ones are to be shown."""
        return bool(self._wanted) or self._hashing is not None

    # ---------------------------------------------------------------- turns

    def filled(self, slots: Slots) -> None:
        """Bytes are sent to these slots of the host tier from now on."""
        short = int(slots.max()) + 1 - len(self._fills)
        if short > 0:
            more = np.zeros(max(short, len(self._fills)), np.int64)
            self._fills = np.concatenate([self._fills, more])
            self._seen = np.concatenate([self._seen, more])
            self._cells = np.concatenate([self._cells, more - 1])
        self._fills[slots] += 1

    def turn(self, planner: Planner) -> list[npt.NDArray[np.int32]]:
        """Go on with both; units of `want` that are used no more, for all their pages ended."""
        if self._hashing is not None and self._hashing.reading.ready():
            self._show(planner, self._hashing)
            self._hashing = None
        now_s = time.monotonic()
        if now_s >= self._look_s and self._hashing is None and not self._retired:
            self._look_s = now_s + LOOK_EVERY_S
            self._look(planner)
        ended = [wanted for wanted in self._wanted if self._has_ended(planner, wanted)]
        self._wanted = [wanted for wanted in self._wanted if wanted not in ended]
        return [wanted.units for wanted in ended]

    def retire(self) -> None:
        """The same keys mean other bytes from now on (new weights): show and take nothing more."""
        self._retired = True
        self._withdraw(np.flatnonzero(self._cells >= 0))

    # ---------------------------------------------------------------- parts: showing

    def _look(self, planner: Planner) -> None:
        """Withdraw what is not as it was shown, and have new content hashed."""
        self._alone = self._pooling.is_alone()
        if self._alone:
            return
        good = self._is_content(planner, np.arange(len(self._fills), dtype=np.int32))
        same = self._seen == self._fills
        self._withdraw(np.flatnonzero((self._cells >= 0) & ~(good & same)))
        slots = np.flatnonzero(good & ~same).astype(np.int32)[:AT_ONCE]
        if not len(slots) or GPU in planner.failed_tiers:
            return
        keys = planner.contents.keys(planner.pools[HOST].owner[slots]) ^ self._scope
        offsets = self._pool.file_offsets(slots)
        reading = self._reader.look(offsets)
        fills = self._fills[slots]
        self._seen[slots] = fills
        self._hashing = _Hashing(slots, keys, fills, offsets, reading)

    def _show(self, planner: Planner, hashed: _Hashing) -> None:
        """Slots that held the content of their key all the while are shown under it."""
        good = self._is_content(planner, hashed.slots)
        good &= self._fills[hashed.slots] == hashed.fills
        failed = hashed.reading.failed
        if failed is not None:
            good &= ~failed
        if self._retired or GPU in planner.failed_tiers or not good.any():
            return
        checksums = hashed.reading.checksums()[good]
        cells = self._board.publish(hashed.keys[good], checksums, hashed.offsets[good])
        self._cells[hashed.slots[good]] = cells
        self.counts["peers_shown"] += len(cells)
        self._look_s = 0.0  # there may be more

    def _withdraw(self, slots: npt.NDArray[np.intp]) -> None:
        if len(slots):
            self._board.withdraw(self._cells[slots])
            self._cells[slots] = -1

    def _is_content(self, planner: Planner, slots: Slots) -> Mask:
        """bool[n]: slots that hold the content of their owner's key, whole."""
        pool, table = planner.pools[HOST], planner.table
        known = slots < len(pool.owner)
        rows = np.where(known, pool.owner[np.where(known, slots, 0)], -1)
        good = rows >= 0
        flags = table.flags[rows] & (LABELLED | STALE | DOOMED)
        return np.asarray(good & (flags == LABELLED) & (table.slot(HOST)[rows] == slots))

    # ---------------------------------------------------------------- parts: taking

    def _has_ended(self, planner: Planner, wanted: _Wanted) -> bool:
        if wanted.done is None and not self._has_frames(planner, wanted.rows):
            return False
        if wanted.done is None:
            self._begin(planner, wanted)
        if wanted.done is None:
            return True
        if not wanted.done.ready():
            wanted.seen_s = time.monotonic()
            return False
        self._paces.append((len(wanted.copied), max(0.0, wanted.seen_s - wanted.begun_s)))
        failed = wanted.done.failed
        bad = _NO_ROWS if failed is None else wanted.copied[failed]
        self._fail(bad)
        self.counts["peers_taken"] += len(wanted.copied) - len(bad)
        return True

    def _has_frames(self, planner: Planner, rows: Rows) -> bool:
        table = planner.table
        shown = (table.shown[rows] == IS_FRAME) & (table.at[rows] == AT_GPU)
        return bool((shown & (table.to[rows] == 0)).all())

    def _begin(self, planner: Planner, wanted: _Wanted) -> None:
        """Their frames are there, and nobody uses them before we say so."""
        found = self._board.find(wanted.keys)
        there = found.is_there & (not self._retired)
        self._fail(wanted.rows[~there])
        wanted.copied = wanted.rows[there]
        if there.any():
            numbers = self._first.offer(found.offsets[there], found.checksums[there])
            frames = planner.table.slot(GPU)[wanted.copied]
            wanted.begun_s = time.monotonic()
            wanted.done = self._route.submit(numbers, frames, PASSED)

    def _fail(self, rows: Rows) -> None:
        if len(rows):
            self._failed.append(rows)
            self.counts["peers_missed"] += len(rows)
