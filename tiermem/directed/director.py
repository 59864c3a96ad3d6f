"""The scheduler's side: which units an engine's next step needs, and how they come to be there.

A director owns page table, pools and planner; the ranks carry out its orders, in order, and an
outcome counts when all of them have reported it. It never waits: what cannot be had at once is
said (`room`, `look`), asked for (`make_room`, `fetch`), and there at a later step. Units are those
of the layout, numbered from 0; unit 0 always stays on the GPU.

    free units ── enter(fresh) ─▶ in use ── leave ─▶ cached ── enter(read) ─▶ in use
                                               ▲         │ make_room, relieve: down a tier
                                               └─ fetch ─┘ gone: dropped or lost, the owner is told

Under a lease the budget is what the ledger lets the one rank hold, asked anew with each orders.
A frame counts as held from before its memory is ordered until every rank has given it back. So it
is with the host tier where that is a part of the machine's one pool.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tiermem import evicting
from tiermem.attic import Stored
from tiermem.config import Config
from tiermem.directed.orders import NO_SLOTS, Hello, Moved, Orders, Receive, Report
from tiermem.directed.paces import Ends, Paces
from tiermem.drive import BACKLOG_BYTES
from tiermem.errors import ConfigError, TierFailed, TierFull
from tiermem.facts import Fact
from tiermem.foresight import Foresight, load_prefetch
from tiermem.keyindex import Keys
from tiermem.leased import LeasedPlanner
from tiermem.leases import NO_LEASES, Leases
from tiermem.peers import Peers
from tiermem.plan import Copy, Drop, Outcome, Plan, Request, Show, merge
from tiermem.planner import Access, Planner
from tiermem.policies.admission import admission
from tiermem.policies.base import RequestFacts
from tiermem.policies.prefetch import Quality
from tiermem.policies.recompute import I64, Places, RouteSpeed
from tiermem.policies.retention import Retained
from tiermem.pooling import Pooling
from tiermem.sharing import Sharing
from tiermem.table import DOOMED, IS_IN_PLACE, IS_RETIRED, PageTable, Rows, span
from tiermem.tier import (
    AT_GPU,
    AT_HOST,
    AT_LOST,
    AT_NVME,
    GPU,
    HOST,
    NVME,
    TIERS,
    Mask,
    Place,
    SlotPool,
)

log = logging.getLogger(__name__)

Units = npt.NDArray[np.int32]
OnGone = Callable[[Units, str], None]

BATCH = 2048
"""Pages on their way down at most that nobody waits for: two steps of a prefill at full speed."""
PIECE = 256
"""Frames that get or give back memory in one step at most: 15 ms (2 MiB each, H200, FACTS)."""
NO_UNITS: Units = np.empty(0, np.int32)
_DOOMED = int(DOOMED)


@dataclass(frozen=True, slots=True)
class Look:
    """Where units are: masks over the units that were asked for.

    here: on the GPU; shown: further down, but their frames still hold the bytes and are counted in
    `room`; below: in the host; deep: on the drive; coming: on their way up. The others hold
    nothing.
    """

    here: Mask
    shown: Mask
    below: Mask
    deep: Mask
    coming: Mask

    @property
    def gone(self) -> Mask:
        return np.asarray(~(self.here | self.shown | self.below | self.deep | self.coming))


class _Lender:
    """What a lease promises a director: also frames whose memory is ordered and not there yet."""

    def __init__(self, sharing: Sharing, ordered: Mapping[int, object]) -> None:
        self._sharing = sharing
        self._ordered = ordered

    @property
    def promised(self) -> int:
        return self._sharing.promised + len(self._ordered)

    @property
    def expects(self) -> bool:
        return self._sharing.expects

    def lend(self, slots: int) -> bool:
        return self._sharing.lend(slots)

    def explain(self) -> str:
        return self._sharing.explain()


class Director:
    """One engine's units over the tiers of all its ranks. For one thread."""

    def __init__(
        self,
        hellos: Sequence[Hello],
        units: int,
        unit_pages: int,
        config: Config,
        *,
        headroom: int = 0,
        on_gone: OnGone = lambda units, reason: None,
        clock: Callable[[], float] = time.monotonic,
        leases: Leases = NO_LEASES,
        peers: Peers | None = None,
        wake: Callable[[], None] = lambda: None,
    ) -> None:
        """hellos: of all ranks. headroom: units that should have frames at once, ahead of need.

        on_gone(units, reason): content that is lost or was dropped; called before a slot of it is
        used again. leases: that the memory of the one rank is held under; peers: with whom it
        shares content; wake: called from any thread when orders are due for it. Raises
        ConfigError if the ranks do not fit one another.
        """
        first, sharing = hellos[0], leases.sharing
        if sharing is not None and len(hellos) > 1:
            raise ConfigError(
                f"[share] and {len(hellos)} ranks: each has a device, and so a ledger, of its own, "
                "and they must hold the same; leave [share] out, or use one rank"
            )
        if first.shown < unit_pages:
            raise TierFull(
                f"gpu: {first.shown} pages to begin with, a unit has {unit_pages}; raise "
                f"{'gpu.budget' if sharing is None else 'share.floor'}"
            )
        if any((h.page_bytes, h.shown) != (first.page_bytes, first.shown) for h in hellos):
            raise ConfigError(f"ranks differ in page size or frames: {list(hellos)}")
        self.unit_pages = unit_pages
        self.units = units
        self.page_bytes = first.page_bytes
        self._ranks = len(hellos)
        self._config = config
        self._on_gone = on_gone
        self._clock = clock
        self._start_s = clock()
        self._ready = {p: min(h.ready[p] for h in hellos) for p in TIERS}
        self._capacity = {p: min(h.capacities[p] for h in hellos) for p in TIERS}
        self._log = evicting.event_log(config, self._capacity)
        table = PageTable()
        table.extend(units * unit_pages, unit_pages)
        self._sharing, self._pooling = sharing, leases.pooling
        self._is_pool_busy = False
        self._peers = peers
        planner = Planner if sharing is None else LeasedPlanner
        self._planner = planner(
            table,
            {place: SlotPool(place, self._ready[place]) for place in TIERS},
            evicting.rankings(config, self._capacity, table, self._log),
            routes=frozenset.intersection(*(h.routes for h in hellos)),
            marks=evicting.marks(config),
            in_order=True,
            batch=max(BATCH, unit_pages),
        )
        self._planner.backlog = max(unit_pages, BACKLOG_BYTES // self.page_bytes)
        self._paces = Paces(frozenset.intersection(*(h.routes for h in hellos)), self.page_bytes)
        self._foresight = self._look_ahead()
        self._planner.headroom = headroom * unit_pages
        self._users = np.zeros(units, np.int32)
        self._worthless: set[int] = set()
        self._adopted = np.zeros(units, np.bool_)  # in use, their content on its way from the drive
        self._unread = np.zeros(units, np.bool_)  # of such, in frames without it
        self._writing: Rows = np.empty(0, np.int32)  # written in use, and on their way up
        self._plans: list[Plan] = []
        self._needs: list[int] = []
        self._receives: dict[str, Receive] = {}
        self._outcomes: dict[int, list[Outcome]] = {}
        self._passed = [0] * self._ranks
        self._step = 0
        self._park = self._back = self._forget = NO_SLOTS
        self._parked = np.arange(self._ready[GPU], self._capacity[GPU], dtype=np.int32)
        self._surrendered = NO_SLOTS  # frames that are to be parked, PIECE at a time
        self._backing: dict[int, list[bool]] = {}
        self._parking: dict[int, int] = {}  # frames, and how many ranks have parked them
        self._ready_of: dict[int, Mapping[Place, int]] = {}
        self._growing_of: dict[int, frozenset[Place]] = {}
        self._planner.growing = {p for p in (HOST, NVME) if self._ready[p] < self._capacity[p]}
        self._show_first(first.shown)
        rule = admission(config.nvme.admit)
        unit_bytes = self.page_bytes * unit_pages
        self._planner.admission = evicting.asked(rule, config, unit_bytes)
        if all(h.held is not None for h in hellos):
            self._restore([h.held for h in hellos if h.held is not None])
        if sharing is not None and isinstance(self._planner, LeasedPlanner):
            leases.start(self._planner, wake)
            self._planner.lender = _Lender(sharing, self._backing)

    # ---------------------------------------------------------------- looking

    @property
    def step(self) -> int:
        """The last step whose orders have been given."""
        return self._step

    @property
    def budget(self) -> int:
        """Units that may be on the GPU at a time now."""
        return self._planner.allowed() // self.unit_pages

    @property
    def most(self) -> int:
        """Units that may be on the GPU at a time, once others have given back what they can."""
        if self._sharing is None:
            return self.budget
        return self._sharing.ceiling // self.page_bytes // self.unit_pages

    def room(self) -> int:
        """Units that could get frames in the next orders, whatever happens."""
        return max(0, self._planner.ready() // self.unit_pages)

    def coming(self) -> int:
        """Pages whose frames are on their way to be had."""
        coming = self._planner.coming()
        if isinstance(self._planner, LeasedPlanner):
            lender = self._planner.lender
            coming += max(lender.promised, int(lender.expects))
        if self._pooling is not None:  # pages wait to leave for chunks that get memory
            coming += int(self._pooling.granted)
        return coming

    @property
    def passed(self) -> int:
        """The last step whose work has ended on every rank."""
        return min(self._passed)

    def look(self, units: Units) -> Look:
        """Where these units are at this moment."""
        table = self._planner.table
        heads = self._heads(units)
        if self._are_here(heads):
            nowhere = np.zeros(len(units), np.bool_)
            return Look(~nowhere, nowhere, nowhere, nowhere, nowhere)
        places = self._planner.sources(heads)
        coming = table.to[heads] == AT_GPU
        there = places == AT_GPU
        here = there & (table.at[heads] == AT_GPU)
        rests = ~coming
        return Look(
            here,
            there & ~here & rests,
            (places == AT_HOST) & rests,
            (places == AT_NVME) & rests,
            coming,
        )

    def are_here(self, units: Units) -> bool:
        """Whether `look` would find all of them on the GPU."""
        return self._are_here(self._heads(units))

    def _are_here(self, heads: Rows) -> bool:
        """Asked of every prefix; `all` and `any` of a mask take five times as long."""
        table, where = self._planner.table, span(heads)
        if np.count_nonzero(table.at[where] != AT_GPU):
            return False
        return not np.count_nonzero(table.flags[where] & DOOMED)

    def frameless(self, units: Units) -> int:
        """How many of these have neither a frame nor one on its way."""
        table, heads = self._planner.table, self._heads(units)
        return int(np.count_nonzero((table.at[heads] != AT_GPU) & (table.to[heads] != AT_GPU)))

    def is_coming(self, unit: int) -> bool:
        """Whether `look` would find it on its way up."""
        return self._planner.table.to.item(unit * self.unit_pages) == AT_GPU

    def is_below(self, unit: int, place: Place) -> bool:
        """Whether `look` would find it in a lower tier, in this one or further down."""
        table, row = self._planner.table, unit * self.unit_pages
        if not place <= table.at.item(row) <= AT_NVME or table.to.item(row) == AT_GPU:
            return False
        seen = table.shown.item(row) in (IS_RETIRED, IS_IN_PLACE)
        return not (seen or table.flags.item(row) & _DOOMED)

    def chain(self, units: Units) -> tuple[Places, I64]:
        """For each: uint8 where a load would begin (GPU: none), int64 the bytes that it copies."""
        places, pages = self._planner.chain(self._heads(units))
        return places, pages * self.page_bytes

    def speeds(self) -> dict[Place, RouteSpeed]:
        """How fast pages come to the GPU from each tier of late, and what is queued there.

        Of one rank, the slowest; for `policies.recompute.split`.
        """
        planner = self._planner
        return {
            src: RouteSpeed(gbps, queued_bytes=planner.queued(src) * self.page_bytes)
            for src, gbps in self._paces.gbps().items()
            if src not in planner.failed_tiers
        }

    def speeds_outside(self) -> dict[Place, RouteSpeed]:
        """The same for content that `find` saw: its places are the drive, and others' host."""
        speeds = self.speeds()
        return speeds if self._peers is None else {**speeds, HOST: self._peers.speed()}

    def residence(self) -> dict[Place, int]:
        """Units by where their newest bytes are."""
        at = self._planner.table.at[self._heads(np.arange(self.units, dtype=np.int32))]
        return dict(zip(Place, np.bincount(at, minlength=len(Place)).tolist(), strict=True))

    def moved(self) -> dict[Ends, Moved]:
        """What the routes of all ranks have moved since the start, as reported so far."""
        return self._paces.totals()

    def units_in_use(self) -> int:
        return int(np.count_nonzero(self._users))

    def in_use(self, units: Units) -> Mask:
        return np.asarray(self._users[units] > 0)

    def now(self) -> int:
        """Logical milliseconds."""
        return int((self._clock() - self._start_s) * 1000)

    # ---------------------------------------------------------------- what the engine does

    def make_room(self, units: int) -> None:
        """Have `room` come to so many units: at once where their bytes are below, else later."""
        for _ in range(2):  # what is dropped below leaves room for what goes there
            plans = self._planner.make_room(units * self.unit_pages, self.now())
            self._issue(plans)
            if not any(isinstance(step, Drop) for plan in plans for step in plan.steps):
                return

    def fetch(self, units: Units) -> bool:
        """Cached units (each once, deepest first) are in use, and on their way to the GPU.

        For a step later than the next: `look` says when they have come, or are lost. False, and
        nothing is in use: there is no room yet, or to make some was at the cost of one of them.
        """
        if self.look(units).gone.any():
            return False
        new = units[self._users[units] == 0]
        if len(new):
            now, rows = self.now(), self._pages(new)
            try:
                request = self._planner.fault(rows, "read", now)
            except TierFull:
                return False
            self._issue(request.plans)
            if not request.taken:
                return False
            self._tell_used(new, now)
        self._users[units] += 1
        self._note_wanted(units)
        return True

    def await_fetched(self, units: Units) -> bool:
        """The next step's work waits for these fetched units, as far as they are on their way.

        False, and nothing has changed, where some of them do not come from the host.
        """
        table, rows = self._planner.table, self._pages(units)
        late = rows[table.to[rows] != 0]
        if not self._planner.order(Request(late)):
            return False
        self._needs += np.unique(table.move[late]).tolist()
        return True

    def enter(
        self,
        units: Units,
        access: Access = "read",
        *,
        parents: Units | None = None,
        depths: Units | None = None,
    ) -> None:
        """The next step uses these units (each once, deepest first), and all others until `leave`.

        access: "read" (they are on the GPU or in the host), "write" (so are they, unless they are
        vacant), "fresh" (their content is new, and what they held is given up). parents, depths:
        of fresh units, one each, -1 for none. A unit is left as often as it was entered. Raises
        TierFull where `room` was not heeded.
        """
        users = self._users[units]
        first = users == 0
        all_first = np.count_nonzero(users) == 0
        self._users[units] = users + 1
        self._note_wanted(units)
        now = self.now()
        if access == "write" and not all_first:
            self._planner.wrote(self._pages(units[~first]))
        new = units if all_first else units[first]
        if not len(new):
            return
        rows = self._pages(new)
        if access != "read":
            nothing = np.full(len(units), -1, np.int32)
            above = nothing if parents is None else parents
            deep = np.zeros_like(nothing) if depths is None else depths
            self._renew(new, above[first], deep[first], now, keep=access == "write")
        self._require(self._planner.fault(rows, access, now, order=access != "fresh"))
        if access != "fresh":
            self._tell_used(new, now)
        if access != "read":
            self._writing = np.concatenate([self._writing, rows])
            self._note_written()

    def leave(self, units: Units, *, worthless: Units = NO_UNITS) -> None:
        """Units that were entered (deepest first) are used no more, after the step ordered last.

        worthless: those of them whose content nobody will ask for.
        """
        users = self._users[units] - 1
        self._users[units] = users
        done = units if not np.count_nonzero(users) else units[users == 0]
        if np.count_nonzero(self._planner.table.at[self._heads(done)] == AT_LOST):
            lost = self._is_lost(done)
            self._worthless.update(done[lost].tolist())
            done = done[~lost]
        if not len(done):
            return
        unread = self._unread[done]
        if np.count_nonzero(unread):
            self._worthless.update(done[unread].tolist())
            self._unread[done] = False
        self._adopted[done] = False
        rows = self._pages(done)
        self._planner.touch(rows, self.now())
        self._planner.unpin(rows, (0, self._step))
        if len(worthless):
            self._worthless.update(worthless[self._users[worthless] == 0].tolist())

    def finished(self, units: Units, facts: RequestFacts) -> None:
        """What is known of a request that ended, for the policies."""
        if len(units):
            self._planner.finished(self._pages(units), facts, self.now())

    def retain(self, units: Units, priority: int, seconds: float) -> None:
        """These cached units leave the tier that they are in after others; see `Region.retain`."""
        now, table, heads = self.now(), self._planner.table, self._heads(units)
        until = now + round(seconds * 1000) if seconds else 0
        for place, ranking in self._planner.rankings.items():
            here = heads[table.at[heads] == int(place)]
            ranking.retain(here, priority, until, now, lambda under: Retained(1, over=under))

    def foresee(self, fact: Fact, units: Units) -> None:
        """Tell the prefetch policy of the configuration, if there is one.

        units: of the fact's chain, the first block first.
        """
        if self._foresight is not None:
            self._foresight.tell(fact, self._heads(units), 0, self.now())

    def label(self, units: Units, keys: Keys) -> None:
        """These units, whose bytes have been written, hold the content of these keys."""
        if len(units):
            self._planner.label(self._pages(units), keys)

    # ------------------------------------------------ content of an earlier run, and of others

    def find(self, keys: Keys) -> Places:
        """Of these contents, from the first on, those that can be adopted: uint8 where they are.

        On the drive, where an earlier run has left them, or in host memory of others.
        """
        shelved = self._planner.in_attic(keys, 0, self.unit_pages)[:, 0] >= 0
        found = np.where(shelved, AT_NVME, 0).astype(np.uint8)
        if self._peers is not None and not shelved.all():
            found[~shelved & self._peers.find(keys, self.unit_pages)] = AT_HOST
        return found[: len(found) if found.all() else int(found.argmin())]

    def adopt(self, units: Units, keys: Keys, name: str, *, parents: Units, depths: Units) -> Mask:
        """Units get the content of these keys, from where `find` saw it; bool[n]: which are on the
        drive, and labelled.

        All are in use from now on, those that get nothing with frames to be computed into. name:
        of the request that is told back (`Orders.receives`) when all of it has come.
        """
        self._note_wanted(units)
        found = self._adopt(units, keys, parents, depths)
        plans: tuple[int, ...] = ()
        if found.any():
            request = self._planner.fault(self._pages(units[found]), "read", self.now())
            self._issue(request.plans)
            if request.taken:
                self._users[units[found]] += 1
                self._adopted[units[found]] = True
                plans = tuple(sorted(request.pending))
            else:
                found[:] = False
        missing = units[~found]
        if len(missing):
            self.enter(missing, "fresh", parents=parents[~found], depths=depths[~found])
            missing = self._want(missing, keys[~found], name)
        self._receives[name] = Receive(plans, self._pages(missing))
        return found

    def _want(self, units: Units, keys: Keys, name: str) -> Units:
        """Of these units, in use and fresh, have others' content brought; those that none has."""
        if self._peers is None:
            return units
        theirs = self._peers.find(keys, self.unit_pages)
        if theirs.any():
            self._users[units[theirs]] += 1  # until it has ended, whoever else lets them go
            rows = self._pages(units[theirs])
            self._peers.want(name, units[theirs], rows, keys[theirs])
        return units[~theirs]

    def _adopt(self, units: Units, keys: Keys, parents: Units, depths: Units) -> Mask:
        """bool[n]: units that are on the drive now, with the content of their keys."""
        shelved = self._planner.in_attic(keys, 0, self.unit_pages)
        found: Mask = (shelved[:, 0] >= 0) & (self._users[units] == 0)
        if found.any():
            self._vacate(units[found])
            found &= self._planner.table.at[self._heads(units)] == 0
        if found.any():
            above = np.where(parents < 0, -1, self._heads(parents)).astype(np.int32)
            self._issue(
                self._planner.adopt(
                    self._heads(units[found]),
                    shelved[found],
                    self.now(),
                    parents=above[found],
                    depths=depths[found],
                )
            )
        return found

    def give_up(self, units: Units) -> None:
        """Nobody will ask for these cached units: they hold nothing any more, here or below."""
        self._vacate(units[self._users[units] == 0])

    def mend(self, units: Units) -> Mask:
        """Adopted units that are used from the next step on. bool[n]: those whose content did not
        come; they have frames, and are computed anew."""
        unread = self._unread[units]
        self._adopted[units] = self._unread[units] = False
        return unread

    def forget_content(self) -> None:
        """No content that has a key counts any more, here or on the drive."""
        if self._peers is not None:
            self._peers.retire()
        self._forget = np.concatenate([self._forget, self._planner.unlabel()])

    # ---------------------------------------------------------------- steps

    def limit(self, nbytes: int) -> None:
        """Change the budget on every rank; what is above it goes down as fast as it can."""
        frames = nbytes // self.page_bytes
        most = self._capacity[GPU]
        if not self.unit_pages <= frames <= most:
            raise ConfigError(
                f"limit {nbytes} bytes = {frames} pages of {self.page_bytes}; {self.unit_pages} "
                f"to {most} can be"
            )
        if self._sharing is not None:
            self._sharing.ceiling = frames * self.page_bytes
        else:
            self._planner.limits[GPU] = frames

    def orders(self) -> Orders:
        """What the ranks do before the next step's work."""
        now = self.now()
        planner = self._planner
        self._free_worthless(now)
        if self._sharing is not None:
            self._follow_lease(self._sharing)
        if self._pooling is not None:
            self._follow_pool(self._pooling, now)
        if self._peers is not None:
            for units in self._peers.turn(planner):
                self.leave(units, worthless=units)
        self._issue(planner.relieve(now))
        if planner.attic is not None:
            self._issue(planner.back_up(now))
        if isinstance(planner, LeasedPlanner):
            self._issue(planner.clean(self.page_bytes, now))
        if self._foresight is not None:
            self._issue(self._foresight.turn(now))
        self._obey_limit()
        if self._sharing is not None:
            self._sharing.settle(self._held())
        self._step += 1
        record = planner.take_unrecorded() if planner.is_unrecorded else None
        orders = Orders(
            self._step,
            tuple(self._plans),
            tuple(self._needs),
            record if record is not None and len(record.slots) else None,
            self._forget,
            self._park,
            self._back,
            self._receives,
        )
        self._plans, self._needs, self._receives = [], [], {}
        self._park = self._back = self._forget = NO_SLOTS
        return orders

    def is_idle(self) -> bool:
        """True if nothing is under way, and nothing waits to be ordered."""
        ordered = len(self._surrendered) or self._backing or self._parking
        under_way = self._plans or ordered or self._is_pool_busy
        if self._peers is not None:
            under_way = under_way or self._peers.busy
        return not under_way and self._planner.is_idle()

    def unsaved(self) -> int:
        """Units with a key whose content is above the drive only, where it is to be kept."""
        return self._planner.unsaved(range(self.units * self.unit_pages))[0]

    def settle(self, report: Report) -> None:
        """Take one rank's report into the table. Raises TierFailed once the GPU has failed."""
        now = self.now()
        planner = self._planner
        if report.passed > self._passed[report.rank]:
            self._passed[report.rank] = report.passed
            planner.table.fences.observe(np.array([min(self._passed)], np.uint64))
        self._take_parked(report)
        self._take_backed(report)
        self._paces.observe(report)
        for outcome in report.outcomes:
            heard = self._outcomes.setdefault(outcome.plan, [])
            heard.append(outcome)
            if len(heard) == self._ranks:
                del self._outcomes[outcome.plan]
                whole = merge(heard)
                self._issue(planner.settle(whole, now))
                if any(bad is not None for bad in whole.failed):
                    self._mend(now)
        if not planner.is_idle():
            self._issue(planner.settle_idle())
        planner.take_reaped()
        self._note_written()
        self._grow(report)
        if Place.GPU in planner.failed_tiers:
            raise TierFailed("gpu: a rank could not show a page, or load one that a step waits for")

    def statistics(self) -> dict[str, int]:
        """Counters since the start, and pages in each tier."""
        planner = self._planner
        pools = {f"{p.name.lower()}_used": planner.pools[p].used for p in TIERS}
        return {**planner.counts, **pools, "in_use": int((self._users > 0).sum())}

    def events(self) -> dict[str, int]:
        """Pages by what happened to them since the start; `metrics.EVENTS` says what each means."""
        return {**self._planner.counts, **({} if self._peers is None else self._peers.counts)}

    def check(self) -> None:
        """Assert every invariant of the table, and that exactly what is in use is pinned."""
        self._planner.check()
        table = self._planner.table
        heads = self._heads(np.arange(self.units, dtype=np.int32))
        pinned = (table.pins[heads] > 0) | (table.waiters[heads] > 0)
        lost = table.at[heads] == AT_LOST
        assert not (pinned & (self._users == 0)).any(), "pinned and not in use"
        assert not ((self._users > 0) & ~pinned & ~lost).any(), "in use and not pinned"

    # ---------------------------------------------------------------- parts

    def _heads(self, units: Units) -> Rows:
        if self.unit_pages == 1:
            return units
        heads: Rows = units * np.int32(self.unit_pages)
        return heads

    def _pages(self, units: Units) -> Rows:
        return self._planner.table.pages(self._heads(units))

    def _is_lost(self, units: Units) -> Mask:
        """In use or not, what they held did not come; they have no frames and no pins."""
        table, heads = self._planner.table, self._heads(units)
        return np.asarray((table.at[heads] == AT_LOST) & (table.to[heads] == 0))

    def _issue(self, plans: list[Plan]) -> None:
        """Plans go to the ranks with the next orders; what only the owner must hear, it hears."""
        for plan in plans:
            if all(isinstance(step, Drop) for step in plan.steps):
                self._tell_gone(plan)
                continue
            self._plans.append(plan)
            if self._peers is not None:
                for step in plan.steps:
                    if isinstance(step, Copy) and step.dst == HOST:
                        self._peers.filled(step.dst_slots)

    def _tell_gone(self, plan: Plan) -> None:
        for step in plan.steps:
            assert isinstance(step, Drop), "told are drops"
            here = step.units[step.units < self.units * self.unit_pages]
            if len(here):
                self._on_gone((here // self.unit_pages).astype(np.int32), step.reason)
        outcome = Outcome(plan.id, tuple(None for _ in plan.steps))
        self._issue(self._planner.settle(outcome, self.now()))

    def _require(self, request: Request) -> None:
        """What a request comes to must be true before the next step's work."""
        self._issue(request.plans)
        if not request.taken:
            raise TierFull(
                f"gpu: {len(request.rows)} pages are needed by the next step, and "
                f"{self._planner.ready()} could be had at once"
            )
        self._needs += sorted(request.pending)

    def _renew(self, units: Units, parents: Units, depths: Units, now: int, *, keep: bool) -> None:
        """Units get other content: those that held none get frames, the others a new name.

        keep: they keep their names, because what they hold stays beside the new.
        """
        heads = self._heads(units)
        above = np.where(parents < 0, -1, self._heads(parents)).astype(np.int32)
        vacant = self._planner.table.at[heads] == 0
        blank = np.count_nonzero(vacant)
        if not keep and blank < len(vacant):
            old = ~vacant
            self._planner.rename(heads[old], above[old], depths[old], now)
        if blank:
            request = self._planner.allocate(
                self._pages(units[vacant]), now, parents=above[vacant], depths=depths[vacant]
            )
            self._require(request)

    def _mend(self, now: int) -> None:
        """Adopted units whose content did not come keep frames, to be computed into.

        They have them in spite of a limit that has fallen meanwhile, as everything in use has:
        those that the load was for are free at this moment.
        """
        units = np.flatnonzero(self._adopted & (self._users > 0)).astype(np.int32)
        units = units[self._is_lost(units)]
        if not len(units):
            return
        planner, rows = self._planner, self._pages(units)
        limit = planner.limits.pop(GPU, None)
        try:
            self._require(planner.fault(rows, "fresh", now))
        finally:
            if limit is not None:
                planner.limits[GPU] = limit
        self._adopted[units], self._unread[units] = False, True
        self._writing = np.concatenate([self._writing, rows])
        self._note_written()

    def _note_written(self) -> None:
        """Pages that are written have no copies below, from the moment that they are up."""
        if len(self._writing):
            up = self._planner.table.at[self._writing] == AT_GPU
            if np.count_nonzero(up):
                self._planner.wrote(self._writing[up])
                self._writing = self._writing[~up]

    def _vacate(self, units: Units) -> None:
        """Give up what these unused units hold, where nothing is under way with it."""
        table = self._planner.table
        heads = self._heads(units)
        rests = np.logical_or.reduce([table.movable(heads, place) for place in TIERS])
        idle = units[rests & table.fences.is_passed(table.fence[heads])]
        if len(idle):
            self._issue(self._planner.free(self._pages(idle), self.now()))
            self._planner.take_reaped()

    def _tell_used(self, units: Units, now: int) -> None:
        """To the policy of the GPU only; `leave` tells of the whole use, in its last order, once
        for each rule that counts uses. What is fresh has been told as inserted."""
        heads = self._heads(units)
        here = self._planner.table.at[heads] == AT_GPU
        if n := np.count_nonzero(here):
            heads = heads if n == len(heads) else heads[here]
            self._planner.rankings[GPU].accessed(heads, now)

    def _note_wanted(self, units: Units) -> None:
        if self._worthless:
            self._worthless.difference_update(units.tolist())

    def _free_worthless(self, now: int) -> None:
        if self._worthless:
            units = np.fromiter(self._worthless, np.int32)
            self._vacate(units)
            gone = self._planner.table.at[self._heads(units)] == 0
            self._worthless.difference_update(units[gone].tolist())

    def _show_first(self, frames: int) -> None:
        """Frames that the ranks show already are those of the first units, retired and empty."""
        planner = self._planner
        first = np.arange(frames // self.unit_pages, dtype=np.int32)
        rows = self._pages(first)
        request = planner.allocate(rows, 0)
        (plan,) = request.plans
        (show,) = (step for step in plan.steps if isinstance(step, Show))
        assert np.array_equal(show.frames, rows), "frames are given out from the first on"
        planner.settle(Outcome(plan.id, tuple(None for _ in plan.steps)), 0)
        planner.free(self._pages(first[1:]), 0)
        planner.take_reaped()
        self._users[0] = 1
        planner.fault(self._pages(first[:1]), "read", 0)

    def _restore(self, held: list[Stored]) -> None:
        """What the slabs of all ranks agree on may be adopted; the rest is forgotten."""
        self._planner.open_attic(self._capacity[NVME])
        common = agreed(held)
        mine = [np.setdiff1d(h.slots, common.slots).astype(np.int32) for h in held]
        self._forget = np.unique(np.concatenate(mine)) if mine else NO_SLOTS
        self._planner.restore(common, 0)

    def _held(self) -> int:
        """Frames that have memory on some rank, or are about to."""
        pool = self._planner.pools[GPU]
        return pool.capacity + len(self._surrendered) + len(self._backing) + len(self._parking)

    def _follow_lease(self, sharing: Sharing) -> None:
        """The limit is what the ledger lets us hold."""
        planner = self._planner
        assert isinstance(planner, LeasedPlanner), "a lease makes a leased planner"
        sharing.settle(self._held())
        planner.limits[GPU] = sharing.limit(planner.demand())
        if sharing.is_report_due():
            sharing.report(planner.report(self.page_bytes))

    def _follow_pool(self, pooling: Pooling, now: int) -> None:
        """The host tier has what the ledger of the machine's pool lets it have.

        The one rank is in this process and its outcomes are settled, so a slot beyond the planner's
        end is one that nobody reads or writes, and its memory can go at once.
        """
        if not (self._is_pool_busy or pooling.is_due()):
            return
        planner = self._planner
        assert isinstance(planner, LeasedPlanner), "a lease makes a leased planner"
        self._is_pool_busy = pooling.turn(
            planner, lambda verb: self._issue(verb()), nullcontext(), now
        )

    def _look_ahead(self) -> Foresight | None:
        """What the configuration says of loads ahead of need."""
        policy, budget = load_prefetch(self._config), self._config.prefetch.budget
        if policy is None:
            return None
        if isinstance(budget, float):
            budget = int(budget * self._capacity[GPU] * self.page_bytes)
        quality = self._planner.gauge = Quality(self.page_bytes)
        ahead = Foresight(self._planner, quality, self.page_bytes, self.speeds)
        ahead.run(policy, budget, self.now())
        return ahead

    def _obey_limit(self) -> None:
        """Free frames above the limit are parked, and parked ones below it get memory again."""
        planner = self._planner
        if len(above := planner.surrender()):
            self._surrendered = np.concatenate([self._surrendered, above])
        short = planner.limits.get(GPU, self._held()) - self._held()
        if short > 0 and len(self._parked):
            short = min(short, PIECE)
            fresh, self._parked = self._parked[:short], self._parked[short:]
            self._back = np.concatenate([self._back, fresh])
            self._backing.update({frame: [] for frame in fresh.tolist()})
        if len(self._surrendered):
            self._park, self._surrendered = self._surrendered[:PIECE], self._surrendered[PIECE:]
            self._parking.update(dict.fromkeys(self._park.tolist(), 0))

    def _take_parked(self, report: Report) -> None:
        """Frames whose memory every rank has given back."""
        if not len(report.parked):
            return
        for frame in report.parked.tolist():
            self._parking[frame] += 1
        done = [frame for frame, ranks in self._parking.items() if ranks == self._ranks]
        for frame in done:
            del self._parking[frame]
        if done:
            self._parked = np.concatenate([self._parked, np.array(done, np.int32)])

    def _take_backed(self, report: Report) -> None:
        """Frames with memory on every rank are ours again; those with none on one, on no rank."""
        if not (len(report.backed) or len(report.unbacked)):
            return
        for frames, has in ((report.backed, True), (report.unbacked, False)):
            for frame in frames.tolist():
                self._backing[frame].append(has)
        told = [frame for frame, has in self._backing.items() if len(has) == self._ranks]
        good = [frame for frame in told if all(self._backing.pop(frame))]
        bad = np.array(sorted(set(told) - set(good)), np.int32)
        if good:
            self._planner.grow(GPU, np.array(good, np.int32))
        if not len(bad):
            return
        log.warning("limit not reached: a device has no memory for %d pages", len(bad))
        self._surrendered = np.concatenate([self._surrendered, bad])
        if self._sharing is None:
            self._planner.limits[GPU] = self._planner.allowed()
        else:
            self._sharing.no_memory()

    def _grow(self, report: Report) -> None:
        """Slots of the lower tiers that have memory on every rank by now."""
        if self._ready_of.get(report.rank) == report.ready and not self._planner.growing:
            return
        self._ready_of[report.rank] = report.ready
        self._growing_of[report.rank] = report.growing
        if len(self._ready_of) < self._ranks:
            return
        for place in (HOST, NVME) if self._pooling is None else (NVME,):
            ready = min(r[place] for r in self._ready_of.values())
            if ready > self._ready[place]:
                self._planner.grow(place, np.arange(self._ready[place], ready, dtype=np.int32))
                self._ready[place] = ready
        growing = set().union(*self._growing_of.values())
        if self._pooling is not None:
            growing = growing - {HOST} | ({HOST} if self._pooling.growing else set())
        self._planner.growing = growing


def agreed(held: Sequence[Stored]) -> Stored:
    """What all slabs have in the same slot under the same key, in the first one's order."""
    first, *others = held
    same = np.ones(len(first.slots), np.bool_)
    for other in others:
        where = {slot: i for i, slot in enumerate(other.slots.tolist())}
        at = np.array([where.get(slot, -1) for slot in first.slots.tolist()], np.int64)
        same &= at >= 0
        if len(other.slots):
            same &= (other.keys[at] == first.keys).all(axis=1)
    return Stored(first.slots[same], first.keys[same], first.depths[same], first.tenants[same])
