"""Couples a space to the ledger: what it may hold follows its lease, its lease follows demand.

    who                      does
    a faulting thread        asks for what it lacks; granted bytes are backed by the mover (`lend`)
    the mover, every turn    says what is wanted, gives back what is owed, takes what is free
    the listener             wakes the mover when other members' records change or one has ended

Bytes are charged before the device is asked for them and until after it has them back. Wanted is
the working set: pages used within the last `share.idle_s`, wherever they are. More than that is
borrowed while nobody needs it, and given back first.
"""

from __future__ import annotations

import logging
import os
import select
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tiermem.assemble import Ground, survey
from tiermem.config import Config
from tiermem.errors import TierFull
from tiermem.leased import Demand, LeasedPlanner
from tiermem.ledger import ANYTHING, Lease, Ledger, LedgerBusy, LedgerError, Report
from tiermem.membership import Membership
from tiermem.stats import LeaseStatistics

log = logging.getLogger(__name__)

STEPS = 32
"""A lease grows by this part of the budget, or by what is lacking."""
AHEAD = 4
"""Steps at most that are asked for beyond what is lacking, by whoever waits for others; as much as
has come since it began to."""
FIRST_S = 10.0
"""How long opening waits for the first page, while others give back."""
BACKOFF_S = 0.2
"""After the device had no memory for what the ledger granted (a dead process's, for a while)."""
WARM_EVERY_S = 0.1
PLACE_EVERY_S = 5.0
REPORT_EVERY_S = 0.1


@dataclass(frozen=True, slots=True)
class Terms:
    """Bytes of one space; all are whole pages. first: what it opens with."""

    page_bytes: int
    ceiling: int
    first: int


class Sharing(Membership):
    """One space's lease. `Space` opens it first and closes it last."""

    def __init__(self, ledger: Ledger, lease: Lease, terms: Terms, idle_s: float) -> None:
        """Most callers use `Sharing.open`. terms.first bytes are reserved already."""
        super().__init__(ledger, lease, idle_s)
        self.terms = terms
        self.ceiling = terms.ceiling
        self._planner: LeasedPlanner | None = None
        self._place_checked = self._warmed = self._reported = 0.0
        self._warm = terms.first // terms.page_bytes
        self._counted = 0  # frames in use when the working set was counted last
        self._slept_at = -1
        self._rests = False  # gives up what nobody else needs, for it was not used
        self._is_alone: bool | None = None  # None: not looked at since the last change
        self._waits_since: int | None = None  # with so many bytes charged, for what others give
        self._news = True

    @classmethod
    def open(cls, config: Config) -> Sharing:
        """Join the ledger of the configured device and reserve the first pages.

        Raises LedgerError, ConfigError, or TierFull if others give nothing back in time.
        """
        ground = survey(config)
        share = config.share
        total = share.total
        budget = total if isinstance(total, int) else int(total * ground.gpu_total)
        ledger = Ledger.open(
            ground.device, budget, group=share.group_name, exact=isinstance(total, int)
        )
        try:
            page = ground.page_bytes
            cap = ground.sizes.cap if share.cap is not None else ANYTHING
            lease = ledger.join(
                share.name or f"{Path(sys.argv[0]).stem or 'python'}-{os.getpid()}",
                page_bytes=page,
                floor=ground.sizes.floor // page * page,
                cap=cap // page * page,
                weight=share.weight,
            )
            ceiling = min(ground.sizes.gpu, ledger.budget // page * page)
            first = _first_pages(ledger, lease, ground, ceiling)
            return cls(ledger, lease, Terms(page, ceiling, first), share.idle_s)
        except BaseException:
            ledger.close()
            raise

    def start(self, planner: LeasedPlanner, wake: Callable[[], None]) -> None:
        """The space is made: what was reserved for it is backed, or will be very soon."""
        self._planner = planner
        self._lease.commit(self._lease.reserved)
        planner.lender = self
        self.listen(wake)

    def statistics(self) -> LeaseStatistics | None:
        """The lease and the ledger at this moment; None if the ledger does not answer."""
        try:
            snapshot = self._ledger.snapshot()
        except LedgerError:
            return None
        for mine in snapshot.members:
            if mine.slot == self._lease.slot:
                return LeaseStatistics(
                    held=mine.held,
                    reserved=mine.reserved,
                    wanted=mine.wanted,
                    share=mine.fair,
                    owed=mine.owed,
                    floor=mine.floor,
                    cap=min(mine.cap, self.ceiling),
                    members=len(snapshot.members),
                    budget=snapshot.budget,
                    all_held=snapshot.held,
                    free=snapshot.free,
                )
        return None

    # ---------------------------------------------------------------- faulting threads

    @property
    def promised(self) -> int:
        """Pages that are ours and not backed yet."""
        return 0 if self._warned else self._lease.reserved // self.terms.page_bytes

    @property
    def expects(self) -> bool:
        """True while bytes that we asked for have come of late, or were found to be owed to us."""
        return time.monotonic() < self._expects_until

    def lend(self, slots: int) -> bool:
        """Ask the ledger for pages that are lacking now; True if others hold more of our share, or
        we were about to give up what we need after all."""
        now = time.monotonic()
        if self._warned or now < self._no_memory_until:
            return False
        try:
            charged = self._lease.held + self._lease.reserved
            nbytes = slots * self.terms.page_bytes
            if not self.expects:
                self._waits_since = None
            else:  # it waits, or the last one did: others give while this one is served
                nbytes += max(min(nbytes, AHEAD * self._step()), self._ahead())
            nbytes = max(0, min(nbytes, self.ceiling - charged))
            if not (nbytes or self._rests):
                return False
            if self._lease.asleep:
                self._lease.wake_up()
            if nbytes:
                nbytes = self._ask(nbytes, self.ceiling - charged)
            if self._is_owed and self._waits_since is None:
                self._waits_since = charged
        except LedgerError as error:
            log.debug("nothing lent reason=%s", error)
            return False
        self._note_asked(charged + nbytes)
        self._wake()
        return self._is_owed or self._rests

    def _note_asked(self, nbytes: int) -> None:
        """So many bytes in all are wanted for a while, or as many as were asked for before."""
        now = time.monotonic()
        before = self._asked_bytes if now < self._asked_until else 0  # part of it may have come
        self._asked_bytes, self._asked_until = max(before, nbytes), now + 1.0

    def _ahead(self) -> int:
        """Bytes to be asked for beyond need: what has come since others were first waited for."""
        if self._waits_since is None:
            return 0
        came = self._lease.held + self._lease.reserved - self._waits_since
        return min(came, AHEAD * self._step())

    def _ask(self, nbytes: int, most: int) -> int:
        """Ask for bytes; for more, where nobody gives so few. How many were asked for."""
        granted = self._reserve(nbytes)
        if self._lease.lacking and not self._is_owed and nbytes < most:
            page = self.terms.page_bytes
            nbytes = min(nbytes + (self._ledger.band // page + 1) * page, most)
            self._reserve(nbytes - granted)
        return nbytes

    def explain(self) -> str:
        lease = self._lease
        return (
            f"lease: {lease.held} bytes held and {lease.reserved} reserved of a share of "
            f"{lease.share}, cap {min(lease.cap, self.ceiling)}; raise share.weight or share.floor "
            "(`tiermem top` shows who holds the rest)"
        )

    # ---------------------------------------------------------------- the mover

    def limit(self, demand: Demand) -> int:
        """The mover's turn: pages that the space may hold from now on, promised ones included."""
        page = self.terms.page_bytes
        held = self._lease.held // page
        try:
            if not self._warned:
                self._check_place()
                self._tell_wanted(demand)
            due = -(-self._due(demand) // page)
            if due > 0 or self._warned:
                self._return_promised()
            else:
                self._get_ahead(demand)
            self._lease.ring()
        except LedgerBusy:
            return held + self._lease.reserved // page
        except LedgerError as error:
            self._warn(error)
            return held
        return max(1, held - due + self._lease.reserved // page)

    def settle(self, pages: int) -> None:
        """Memory stands behind this many frames now: tell the ledger, and whoever waits for it."""
        change = pages * self.terms.page_bytes - self._lease.held
        try:
            if change > 0:
                self._lease.commit(change)
            elif change < 0:
                self._lease.release(-change)
            self._lease.ring()
        except LedgerBusy:
            return  # the next turn finds the same difference
        except LedgerError as error:
            self._warn(error)

    def no_memory(self) -> None:
        """The device could not back what was promised: give it up, and ask again later."""
        self._no_memory_until = time.monotonic() + BACKOFF_S
        self._return_promised()

    def is_report_due(self) -> bool:
        return self._news or time.monotonic() - self._reported >= REPORT_EVERY_S

    def report(self, report: Report) -> None:
        """Let others see how this space does."""
        self._reported = time.monotonic()
        self._news = False
        self._lease.report(report, max(0, self._lease.held - self._owed))

    # ---------------------------------------------------------------- parts of the mover's turn

    def _tell_wanted(self, demand: Demand) -> None:
        """Wanted follows the working set up at once, and down in steps."""
        now = time.monotonic()
        if now - self._warmed >= WARM_EVERY_S:
            self._warmed, self._counted = now, demand.used
            assert self._planner is not None, "the space has started"
            self._warm = self._planner.used_since(self._warm_since(demand.clock, 0.0))
        came = max(0, demand.used - self._counted)  # in use since, so as warm
        page = self.terms.page_bytes
        assert self._planner is not None, "the space has started"
        wanted = self._planner.beneath_mark(self._warm + came) * page
        if now < self._asked_until:
            wanted = max(wanted, self._asked_bytes)
        wanted = min(wanted, self.ceiling)
        if self._lease.asleep:
            wanted = 0
        if wanted > self._lease.wanted or wanted <= self._lease.wanted - self._step():
            self._lease.want(wanted)

    def _due(self, demand: Demand) -> int:
        """Bytes to give back now: by order, because others need them, or because we are idle."""
        lease = self._lease
        held, page = lease.held, self.terms.page_bytes
        self._rests = self._sleeps(demand)
        if self._rests:
            return max(0, held - page)
        if lease.is_changed():
            self._news = True
            self._is_alone = None
            self._owed = lease.dues()[1]
        over = held - min(lease.cap, self.ceiling)
        idle = 0
        if self._is_idle(demand):
            if self._is_alone is None:
                self._is_alone = lease.is_alone()
            if not self._is_alone:
                idle = held - max(page, lease.floor, self._warm * page)
        needed = max(self._owed, over, 0)
        self._rests = idle > needed
        return max(needed, idle)

    def _sleeps(self, demand: Demand) -> bool:
        """Whether somebody has put us to sleep; the first use of a page ends that."""
        if not self._lease.asleep:
            self._slept_at = -1
            return False
        if self._slept_at < 0:
            self._slept_at = demand.clock
        if demand.clock == self._slept_at:
            return True
        self._lease.wake_up()
        return False

    def _is_idle(self, demand: Demand) -> bool:
        """True if no page was used for idle_s, and nobody waits for some to be there."""
        now = time.monotonic()
        if now < self._asked_until or not self._clocks or self._clocks[0][0] > now - self._idle_s:
            return False
        return self._clocks[0][1] == demand.clock

    def _get_ahead(self, demand: Demand) -> None:
        """Take so many pages that all in use are below the mark: our own first, then spare ones."""
        page, lease = self.terms.page_bytes, self._lease
        charged = lease.held + lease.reserved
        lacking, now = demand.short * page - lease.reserved, time.monotonic()
        if not self.expects:
            self._waits_since = None
        elif self._waits_since is not None:  # what is taken is asked for again before any lacks
            self._note_asked(demand.used * page + self._ahead())
        if now < self._asked_until and not lease.asleep:
            lacking = max(lacking, self._asked_bytes - charged)
        room = self.ceiling - charged
        if min(lacking, room) <= 0 or now < self._no_memory_until:
            return
        ours = min(lacking, room)
        if now >= self._asked_until:  # what is in use may be cold
            ours = min(ours, lease.wanted - charged)
        got = self._reserve(ours) if ours > 0 else 0
        if lacking > got:
            lease.borrow(min(max(lacking - got, self._step()), room - got))

    def _return_promised(self) -> None:
        self._lease.cancel(self._lease.reserved)

    def _step(self) -> int:
        page = self.terms.page_bytes
        return max(page, self.terms.ceiling // STEPS // page * page)

    def _check_place(self) -> None:
        now = time.monotonic()
        if now - self._place_checked < PLACE_EVERY_S:
            return
        self._place_checked = now
        if not self._ledger.is_in_place():
            raise LedgerError(
                f"{self._ledger.path} was removed or replaced, so newcomers do not see this space"
            )


def _first_pages(ledger: Ledger, lease: Lease, ground: Ground, ceiling: int) -> int:
    """Reserve what a space opens with: its floor, or a step; less if others hold it, never none."""
    page = ground.page_bytes
    wish = max(page, ground.sizes.floor // page * page, ceiling // STEPS // page * page)
    wish = min(wish, ceiling)
    until = time.monotonic() + FIRST_S
    while True:
        lease.reserve(wish - lease.reserved)
        if lease.reserved >= wish or (lease.reserved and time.monotonic() > until - 0.9 * FIRST_S):
            return lease.reserved
        if time.monotonic() > until:
            members = ", ".join(
                f"{m.name} holds {m.held} ({m.pinned} pinned)" for m in ledger.snapshot().members
            )
            raise TierFull(
                f"{ledger.path}: not one page of {page} bytes was given back in {FIRST_S:.0f} s: "
                f"{members} of {ledger.budget}; `tiermem limit` or `tiermem release` makes room"
            )
        ledger.reap()
        lease.ring()
        select.select([lease.bell.socket], [], [], 0.02)
        lease.bell.heard()
