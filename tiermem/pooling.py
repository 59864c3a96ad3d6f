"""The host tier's part in one pool for all engines of a machine: it follows a lease in chunks.

    a thread that makes room   asks for chunks that are lacking (`ask`), and waits for those granted
    the mover, every turn      says what is wanted, gives back what is owed, takes what is granted
    the listener               wakes the mover, and frees the memory of a process that has ended

There is one ledger for the pool beside those of the devices. Its bytes are the rule; the file that
the chunks lie in is passed from process to process (`ledger_pass`), and if nobody alive answers a
newcomer makes another under the same ledger, so nothing depends on who came first.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

from tiermem import membership
from tiermem.board import Board, board_bytes
from tiermem.config import Config
from tiermem.errors import ConfigError
from tiermem.host import limits
from tiermem.host.pinned import HostPool
from tiermem.host.shared import SharedChunks
from tiermem.leased import LeasedPlanner
from tiermem.ledger import ANYTHING, Lease, Ledger, LedgerBusy, LedgerError
from tiermem.ledger_file import exclusive, private_directory, runtime_directory
from tiermem.ledger_pass import Porter, receive
from tiermem.membership import Membership
from tiermem.plan import Plan
from tiermem.tier import HOST

log = logging.getLogger(__name__)

MOST_CHUNK = 256 << 20
LEAST_CHUNK = 64 << 10
CHUNKS = 64
"""A pool has at least so many chunks, unless they would be smaller than LEAST_CHUNK."""
TURN_EVERY_S = 0.01
"""Between two turns if nothing was asked for and nobody woke us: what is wanted changes slowly."""
BACKOFF_S = 0.5
"""After memory for a chunk could not be had or pinned."""
ASKED_S = 1.0


class Pooling(Membership):
    """One space's lease of the shared host pool. Opened before the space's parts, closed last."""

    what = "host lease"

    def __init__(
        self, ledger: Ledger, lease: Lease, chunks: SharedChunks, porter: Porter, idle_s: float
    ) -> None:
        """Most callers use `Pooling.open`."""
        super().__init__(ledger, lease, idle_s)
        self.chunks = chunks
        self._porter = porter
        self._pool: HostPool | None = None
        self._most_slots = 0
        self._slots_per_chunk = 1
        self._most_chunks = chunks.chunks
        self._asked_bytes = chunks.chunk_bytes
        self._busy_until = 0.0
        self._is_woken = True
        self._turned_s = 0.0
        self._board: Board | None = None

    @classmethod
    def open(cls, config: Config) -> Pooling:
        """Join the machine's pool, making it if nobody has, and reserve the first chunk.

        Raises ConfigError, LedgerError, TierFull with numbers.
        """
        size = config.share.host
        assert size is not None, "share.host is set"
        if config.host.read_in_place:
            raise ConfigError(
                "share.host and host.read_in_place: pages are read in place from memory that the "
                "driver makes for one process; set one of the two only"
            )
        budget = size if isinstance(size, int) else int(size * limits.available_bytes())
        home = private_directory(runtime_directory() / "host")
        ledger = Ledger.open(
            "host", budget, group=config.share.group_name, exact=isinstance(size, int),
            directory=home,
        )  # fmt: skip
        try:
            chunk = chunk_bytes(ledger.budget)
            lease = ledger.join(
                config.share.name or f"{Path(sys.argv[0]).stem or 'python'}-{os.getpid()}",
                page_bytes=chunk,
                floor=chunk,
                cap=ANYTHING,
                weight=config.share.weight,
            )
            chunks, porter = _join_file(ledger, chunk)
            lease.reserve(chunk)
            return cls(ledger, lease, chunks, porter, config.share.idle_s)
        except BaseException:
            ledger.close()
            raise

    def fill(self, pool: HostPool, most_slots: int) -> None:
        """The host tier is made, empty as yet. most_slots: host.capacity."""
        self._pool = pool
        self._most_slots = most_slots
        self._slots_per_chunk = pool.slots_per_chunk
        self._most_chunks = min(self.chunks.chunks, -(-most_slots // pool.slots_per_chunk))

    def start(self, planner: LeasedPlanner, wake: Callable[[], None]) -> None:
        """All tiers are made: from now on `turn` is called, again and again."""

        def woken() -> None:
            self._is_woken = True
            wake()

        planner.host = self
        self.listen(woken)

    def board(self) -> Board:
        """The table behind the chunks, in which engines show one another what is there."""
        nbytes = self.chunks.chunks * self.chunks.chunk_bytes
        board = self._board = Board(self.chunks.fd, nbytes, board_bytes(nbytes))
        board.sweep(self._ledger.owners())
        return board

    def is_alone(self) -> bool:
        """True if nobody else has a part of the pool now, or that cannot be said."""
        try:
            return self._lease.is_alone()
        except LedgerError:
            return True

    def _release(self) -> None:
        self._porter.close()
        self.chunks.close()

    # ---------------------------------------------------------------- threads that make room

    @property
    def promised(self) -> int:
        """Slots that are ours, or will be before long, and that no memory stands behind yet."""
        if self._warned or time.monotonic() < self._no_memory_until:
            return 0
        lease = self._lease
        first = 0 if lease.held or lease.reserved else self._slots_per_chunk  # our floor
        return first + lease.reserved // lease.page_bytes * self._slots_per_chunk

    def ask(self, slots: int) -> bool:
        """Ask for slots that are lacking; True if some are on their way, or others that owe us
        some keep giving back. Never waits."""
        now = time.monotonic()
        if self._warned or now < self._no_memory_until:
            return False
        lease = self._lease
        lacking = slots - self.promised
        try:
            charged = lease.held + lease.reserved
            chunks = -(-lacking // self._slots_per_chunk)
            nbytes = min(chunks * lease.page_bytes, self._most_chunks * lease.page_bytes - charged)
            if nbytes > 0:
                self._reserve(nbytes)
                self._asked_bytes, self._asked_until = charged + nbytes, now + ASKED_S
                self._wake()
            self._busy_until = 0.0
        except LedgerBusy:
            self._busy_until = self._busy_until or now + membership.EXPECT_S
            return now < self._busy_until
        except LedgerError as error:
            log.debug("no host memory lent reason=%s", error)
        return self.promised > 0 or (self._is_owed and now < self._expects_until)

    # ---------------------------------------------------------------- the mover

    @property
    def growing(self) -> bool:
        """True while more slots are on their way."""
        return self.promised > 0 or (self._pool is not None and self._pool.growing)

    @property
    def granted(self) -> bool:
        """True while chunks that are ours get memory: that ends soon, whatever others do."""
        return self._lease.reserved > 0 and self.growing

    def is_due(self) -> bool:
        """Whether something was asked for, or has changed, or the last turn was long ago."""
        return self._is_woken or time.monotonic() - self._turned_s >= TURN_EVERY_S

    def turn(
        self,
        planner: LeasedPlanner,
        decide: Callable[[Callable[[], list[Plan]]], object],
        lock: AbstractContextManager[object],
        now: int,
    ) -> bool:
        """The mover's turn: the tier follows the lease, whole chunks at a time.

        decide: runs a verb of the planner and has its plans carried out; lock: what it runs under.
        True while the tier still grows, or has more than it should. Waits for no memory.
        """
        pool = self._pool
        assert pool is not None, "the tiers are made"
        self._is_woken, self._turned_s = False, time.monotonic()
        self._settle(pool)
        with lock:
            since = self._warm_since(planner.clock(), self._idle_s / 16)
            warm = planner.host_used_since(since)
        end = self._limit(warm)
        if end > pool.capacity:
            pool.resize(end)  # memory follows in the background
        ready = min(end, pool.ready)
        with lock:
            there = planner.host_end()
            settled = there == ready == planner.pools[HOST].end
        if not settled:
            decide(lambda: planner.confine(ready, now))
            with lock:
                there = max(ready, planner.host_end())
        keep = -(-max(end, there) // self._slots_per_chunk) * self._slots_per_chunk
        if keep < pool.capacity:
            pool.resize(keep)
            self._settle(pool)
        held = self._lease.held // self._lease.page_bytes
        in_hand = pool.statistics().in_hand > 0
        if self._lease.reserved and end <= held * self._slots_per_chunk and not in_hand:
            self._give_up_promised()  # no thread takes chunks now: all below `keep` are taken
        return self.growing or in_hand or there > end

    def _limit(self, warm: int) -> int:
        """Slots that the host tier may have from now on, promised ones included."""
        lease, chunk = self._lease, self._lease.page_bytes
        held, due = lease.held // chunk, 0
        try:
            if not self._warned:
                self._tell_wanted(warm)
            if lease.is_changed():
                self._owed = lease.dues()[1]
            over = lease.held - min(lease.cap, self._most_chunks * chunk)
            due = -(-max(self._owed, over, 0) // chunk)
            if due or self._warned:
                return min(max(0, held - due) * self._slots_per_chunk, self._most_slots)
            if lease.held + lease.reserved < min(lease.wanted, self._most_chunks * chunk):
                self._get_ahead(lease.wanted - lease.held - lease.reserved)
            lease.ring()
        except LedgerBusy:
            pass  # the next turn finds the same
        except LedgerError as error:
            self._warn(error)
            return held * self._slots_per_chunk
        chunks = held + lease.reserved // chunk
        return min(chunks * self._slots_per_chunk, self._most_slots)

    def _settle(self, pool: HostPool) -> None:
        """Tell the ledger how many chunks have memory behind them, and whoever waits for some."""
        seen = pool.statistics()
        if seen.failure is not None:
            self._no_memory_until = time.monotonic() + BACKOFF_S
            pool.resize(seen.ready)
        change = self.chunks.mine * self._lease.page_bytes - self._lease.held
        try:
            if change > 0:
                self._lease.commit(min(change, self._lease.reserved))
            elif change < 0:
                self._lease.release(-change)
            self._lease.ring()
            if seen.failure is not None:
                self._lease.cancel(self._lease.reserved)
        except LedgerBusy:
            return  # the next turn finds the same difference
        except LedgerError as error:
            self._warn(error)

    def _give_up_promised(self) -> None:
        try:
            self._lease.cancel(self._lease.reserved)
            self._lease.ring()
        except LedgerBusy:
            return
        except LedgerError as error:
            self._warn(error)

    # ---------------------------------------------------------------- parts

    def _tell_wanted(self, warm: int) -> None:
        """Chunks for pages of the host tier that were used within idle_s, or were asked for."""
        lease = self._lease
        wanted = max(1, -(-warm // self._slots_per_chunk)) * lease.page_bytes
        if time.monotonic() < self._asked_until:
            wanted = max(wanted, self._asked_bytes)
        if wanted != lease.wanted:
            lease.want(wanted)

    def _get_ahead(self, nbytes: int) -> None:
        if time.monotonic() >= self._no_memory_until:
            self._lease.reserve(nbytes, membership.LOCK_S)

    def _ended(self) -> None:
        super()._ended()
        self.chunks.sweep()
        if self._board is not None:
            self._board.sweep(self._ledger.owners())


def chunk_bytes(budget: int) -> int:
    """The same in every process that shares so many bytes: a power of two."""
    part = max(LEAST_CHUNK, min(MOST_CHUNK, budget // CHUNKS))
    chunk = 1 << (part.bit_length() - 1)
    if budget < chunk:
        raise ConfigError(f"share.host = {budget} bytes: at least {chunk}")
    return chunk


def pool_label(budget: int) -> bytes:
    """What the file of a pool is, for whoever asks for it."""
    chunk = chunk_bytes(budget)
    return f"tiermem host pool 2 {budget // chunk * chunk} {chunk}".encode()


def _join_file(ledger: Ledger, chunk: int) -> tuple[SharedChunks, Porter]:
    """The file from somebody who has it, or a new one; and whoever comes next has it from us."""
    nbytes = ledger.budget // chunk * chunk
    tail, label = board_bytes(nbytes), pool_label(ledger.budget)
    with exclusive(ledger.path.parent):
        fd = receive(ledger.path, label)
        if fd is None:
            if len(ledger.owners()) > 1:
                log.warning("host pool: nobody passes the file on, another is made")
            fd = SharedChunks.create(nbytes + tail)
        try:
            chunks = SharedChunks(fd, chunk, tail)
        finally:
            os.close(fd)
        return chunks, Porter(ledger.path, label, chunks.reopened)
