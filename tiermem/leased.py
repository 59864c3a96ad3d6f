"""A planner whose GPU slots are lent: it asks for more before it takes any away from its pages.

What the lender grants at once arrives soon, so whoever needs it waits for that rather than evict;
so does whoever is below its share, as long as others keep giving back what they owe it. Else pages
make room for one another without waiting for others; only a request that could not be served at all
waits for them, and not for ever.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from tiermem.errors import TierFull
from tiermem.ledger_records import Report
from tiermem.plan import Plan, Request
from tiermem.planner import Planner
from tiermem.table import DIRTY, Rows
from tiermem.tier import AT_GPU, AT_NONE, GPU, HOST, NVME, Place

PATIENCE_MS = 2000
"""How long a request waits for slots that others owe us, or that are on their way."""
CLEAN_BYTES = 256 << 20
"""On their way to the host ahead of need at most: 5 ms of the link."""
CLEAN_EVERY_MS = 5
CLEAN_AGAIN_MS = 50
"""After a look at all frames that found none to copy: such a look takes 0.3 ms of a step."""

_NO_ROWS = np.empty(0, np.int32)


class Lender(Protocol):
    """Where slots come from. Called under the pager's lock: neither may wait for anybody."""

    @property
    def promised(self) -> int:
        """Slots that are ours and not grown yet."""

    @property
    def expects(self) -> bool:
        """True if some came a moment ago, or others were found to owe us some: more may come."""

    def lend(self, slots: int) -> bool:
        """Ask for so many more; what is granted is promised. True if some may come later:
        others owe them, or we were giving them up unasked."""

    def explain(self) -> str:
        """Why there is no more, with numbers and the way out."""


class HostLender(Protocol):
    """Where slots of the host tier come from. Called under the pager's lock, like a `Lender`."""

    @property
    def promised(self) -> int:
        """Slots that are ours, or will be before long, and that no memory stands behind yet."""

    def ask(self, slots: int) -> bool:
        """Ask for so many slots more; True if some are on their way."""


class NoHostLender:
    """Has what it has."""

    promised = 0

    def ask(self, slots: int) -> bool:
        return False


class NoLender:
    """Lends nothing."""

    promised = 0
    expects = False

    def lend(self, slots: int) -> bool:
        return False

    def explain(self) -> str:
        return "nobody lends more"


@dataclass(frozen=True, slots=True)
class Demand:
    """Slots of the GPU at one moment, in pages. clock: grows with every use of a unit."""

    capacity: int
    used: int
    kept: int
    clock: int
    short: int
    """So many slots more, and nothing in use would lie above the high mark."""


class LeasedPlanner(Planner):
    """All verbs of `Planner`; slots that are lacking are asked for at `lender`."""

    lender: Lender = NoLender()
    host: HostLender = NoHostLender()
    _hungry_since: int | None = None
    _told = 1 << 31  # frames in use when the lender was last told
    _cleaned = 0  # the clock when everything idle had a copy below
    _clean_at = 0

    def demand(self) -> Demand:
        """How full the GPU is now."""
        pool = self.pools[GPU]
        self._told = pool.used
        return Demand(
            capacity=pool.capacity,
            used=pool.used,
            kept=pool.kept,
            clock=self._stamp,
            short=max(0, self.beneath_mark(pool.used) - self._allowed(GPU)),
        )

    def beneath_mark(self, used: int) -> int:
        """Slots of which so many used ones are no more than the high mark allows."""
        free = min(self.headroom, used)  # as many again at most: it is half of what there is
        return max(math.ceil(used / self.marks[GPU].high), used + free)

    def report(self, page_bytes: int) -> Report:
        """How this space does, for the others to see; a pass over all frames."""
        owners = self.pools[GPU].owner
        owners = owners[owners >= 0]
        counts = self.counts
        return Report(
            movable=int(self.table.movable(owners, GPU).sum()) * page_bytes,
            pinned=self._pinned_frames() * page_bytes,
            host=self.pools[HOST].used * page_bytes,
            nvme=self.pools[NVME].used * page_bytes,
            hits_gpu=max(0, self._stamp - 1 - counts["faulted"]),
            hits_host=counts["host_gpu"],
            hits_nvme=counts["nvme_gpu"],
            moved_down=(counts["gpu_host"] + counts["gpu_nvme"]) * page_bytes,
            moved_up=(counts["host_gpu"] + counts["nvme_gpu"]) * page_bytes,
            stalls=counts["faulted"],
        )

    def used_since(self, clock: int) -> int:
        """Pages, wherever they are, that are in use, or were since the clock showed that."""
        table = self.table
        recent = table.stamp[table.unit[: table.rows]] >= np.uint64(clock)
        recent |= table.pins[: table.rows] > 0
        return int((recent & (table.at[: table.rows] != AT_NONE)).sum())

    def clean(self, page_bytes: int, now: int) -> list[Plan]:
        """Begin to copy idle pages to free slots of the host, where they have no copy: their
        frames can be given away at once then, whoever wants them. They stay where they are.

        The longest unused come first; what must leave comes before all of them.
        """
        host, table = self.pools[HOST], self.table
        if now < self._clean_at or self._stamp == self._cleaned:
            return []
        if not self._usable(HOST) or GPU in self.failed_tiers:
            return []
        self._clean_at = now + CLEAN_EVERY_MS
        under_way = sum(len(step.pages) for step in self._copies(HOST) if step.src == GPU)
        n = min(max(table.max_unit_pages, CLEAN_BYTES // page_bytes) - under_way, host.free)
        if n <= 0:
            return []
        heads = self.pools[GPU].owner
        heads = heads[heads >= 0]
        heads = heads[(table.unit[heads] == heads) & (table.at[heads] == AT_GPU)]
        heads = heads[((table.flags[heads] & DIRTY) != 0) & (table.slot(HOST)[heads] < 0)]
        idle = table.movable(heads, GPU) & table.fences.is_passed(table.fence[heads])
        oldest_first = heads[idle][np.argsort(table.stamp[heads[idle]])]
        rows, rest = self._cut(table.pages(oldest_first), n)
        if idle.all() and not len(rest):
            self._cleaned = self._stamp  # nothing to do until something is used
        if not len(rows):
            self._clean_at = now + CLEAN_AGAIN_MS
            return []
        return [self._copy_down(rows, GPU, HOST, host.take_free(len(rows)), stays=True)]

    def clock(self) -> int:
        """Grows with every use of a unit."""
        return self._stamp

    def host_used_since(self, clock: int) -> int:
        """Pages of the host tier that were used or allocated since the clock showed that."""
        owners = self.pools[HOST].owner
        owners = owners[owners >= 0]
        table = self.table
        recent = table.stamp[table.unit[owners]] >= np.uint64(clock)
        return int((recent & (table.at[owners] == HOST)).sum())

    def make_room(self, n: int, now: int) -> list[Plan]:
        """As of `Planner`, but pages go down only for what is asked for and not granted."""
        short = n - self.ready() - self._coming()
        if short > self.lender.promised:
            self.lender.lend(short - self.lender.promised)
        short -= self.lender.promised
        return self._push_down(GPU, short, now, awaited=True) if short > 0 else []

    def _push_down(self, place: Place, n: int, now: int, *, awaited: bool = False) -> list[Plan]:
        """Nothing leaves the host tier as long as it is about to get more slots."""
        if place == HOST and n > 0 and self.host.ask(n):
            self.growing.add(HOST)
            return []
        return super()._push_down(place, n, now, awaited=awaited)

    def _mark(self, place: Place, which: Literal["high", "low"]) -> float:
        if place == GPU and self._hopes():
            return float(self._allowed(GPU))
        return super()._mark(place, which)

    def _target(self, place: Place, which: Literal["high", "low"]) -> float:
        return self._mark(place, which) if self._hopes() else super()._target(place, which)

    def _hopes(self) -> bool:
        """Nothing leaves in order to be ahead of need while more slots may be on their way, nor
        before the lender was told that so many are in use."""
        return self.lender.expects or self.pools[GPU].used > self._told

    def _have_room(self, n: int, request: Request, now: int, spare_us: Rows = _NO_ROWS) -> bool:
        if self._are_available(n, spare_us):
            self._found_room()
            return True
        short = n - self._available(spare_us)
        if GPU in self.failed_tiers:
            self._hungry_since = None
            return super()._have_room(n, request, now, spare_us)
        owed = short > self.lender.promised and self.lender.lend(short - self.lender.promised)
        coming = self.lender.promised >= short or (owed and self.lender.expects)
        if coming and self._is_patient(now):
            return False  # the request asks for nothing, so its caller tries again soon
        try:
            return super()._have_room(n, request, now, spare_us)
        except TierFull as error:
            if (self.lender.promised or owed) and self._is_patient(now):
                return False
            self._hungry_since = None
            raise TierFull(f"{error}; {self.lender.explain()}") from None

    def _found_room(self) -> None:
        self._hungry_since = None

    def _is_patient(self, now: int) -> bool:
        if self._hungry_since is None:
            self._hungry_since = now
        return now - self._hungry_since < PATIENCE_MS
