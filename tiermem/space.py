"""The facade: one device in one process, its regions, and the thread that keeps it tidy."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from contextlib import ExitStack
from types import MappingProxyType, TracebackType
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from tiermem import evicting, units
from tiermem.assemble import Parts, assemble
from tiermem.config import Config, changed, reload
from tiermem.drive import RANK
from tiermem.errors import Closed, ConfigError
from tiermem.executor import Executor
from tiermem.facts import Fact
from tiermem.foresight import Foresight, load_prefetch
from tiermem.keeping import Keeping, Nobody
from tiermem.keyindex import Keys
from tiermem.leased import LeasedPlanner
from tiermem.leases import NO_LEASES, Leases
from tiermem.mover import Mover
from tiermem.pager import Pager
from tiermem.plan import Plan
from tiermem.planner import Planner
from tiermem.policies.admission import Budgeted, admission
from tiermem.policies.base import Admission, ShadowReport
from tiermem.policies.prefetch import Prefetch, Quality
from tiermem.policies.recompute import RouteSpeed
from tiermem.policies.shadow import Shadow
from tiermem.region import READ_IN_PLACE, OnGone, ReadInPlace, Region
from tiermem.stats import Pace, RouteStatistics, Statistics, TierStatistics
from tiermem.supply import Supply
from tiermem.table import PageTable, Rows
from tiermem.tier import GPU, TIERS, Addresses, Finished, Place, SlotPool
from tiermem.watch import WatchedFile

if TYPE_CHECKING:
    from tiermem.metrics import Endpoint
    from tiermem.tier import Done, Slots

log = logging.getLogger(__name__)

_U64 = (1 << 64) - 1


class Space:
    """Tiered memory on one device. Thread-safe; close it, or use it as a context manager."""

    def __init__(
        self, config: Config, parts: Parts, leases: Leases = NO_LEASES, headroom: int = 0
    ) -> None:
        """Compose a space of given parts, which it will close. Most callers use `Space.open`.

        leases: that its GPU and host memory are held under; closed last. headroom: as for `open`.
        """
        self.config = config
        self.device = parts.device
        self.page_bytes = parts.device.page_bytes
        self._parts = parts
        self._regions: list[Region | Nobody] = []
        self._row_0 = np.zeros(0, np.uint64)  # where row 0 would be, going by each region's first
        self._start_s = time.monotonic()
        self._closed = False
        self._metrics: Endpoint | None = None
        self._paces = {src: Pace() for src, dst in parts.routes if dst == GPU}
        table = PageTable()
        self._configured = dict(parts.capacities)
        pools = {place: SlotPool(place, self._backed(place)) for place in TIERS}
        self._log = evicting.event_log(config, self._configured)
        rankings = evicting.rankings(config, self._configured, table, self._log)
        self._leases = leases
        self._sharing, self._pooling = leases.sharing, leases.pooling
        planner = Planner if leases.sharing is None else LeasedPlanner
        self._planner = planner(
            table,
            pools,
            rankings,
            routes=parts.routes,
            marks=evicting.marks(config),
            eager=config.gpu.hide == "eager",
        )
        self._planner.headroom = headroom
        self._executor = Executor(
            window=parts.device.window,
            routes=parts.routes,
            zero=self._zero,
            addresses=self.addresses,
            region_of=lambda rows: table.region[rows],
            on_gone=self._on_gone,
            in_place=None if parts.readable is None else parts.readable.show,
        )
        self._planner.crossover = parts.crossover
        self.pager = Pager(
            self._planner,
            self._executor,
            now=self.now,
            passed=parts.device.streams.passed,
            wait_fence=parts.device.streams.wait,
            wake=lambda: self._mover.wake(),
        )
        self._rule = admission(config.nvme.admit)
        self._planner.admission = self._asked(self._rule, config)
        self._shadow = self._planner.onlooker = self._on_trial(config)
        self._foresight: Foresight | None = None
        self._set_foresight(config, load_prefetch(config))
        self._watched = WatchedFile(config.file) if config.file else None
        self._mover = Mover(self.pager, self._turn)
        self._keeping = self._open_keeping()
        self._supply = Supply(parts, self._configured, self.pager, leases)
        self._supply.grow()
        if isinstance(self._planner, LeasedPlanner):
            leases.start(self._planner, self._mover.wake)
        self._mover.start()

    @classmethod
    def open(
        cls,
        config: Config | None = None,
        *,
        rank: str = RANK,
        fingerprint: Mapping[str, str] = MappingProxyType({}),
        headroom: int = 0,
    ) -> Space:
        """Open the device and tiers of a configuration (default: what `tiermem.load` finds).

        headroom: pages that should find frames at once, ahead of need: what one step may ask for.
        The marks of the GPU are lowered for it, by half of the budget at most.
        For nvme.persist: rank names the slab, one for each process of a path; fingerprint says
        what the bytes mean (model, revision, layout, dtype, ...), and a slab made for another is
        refused. Content keys must tell apart whatever it does not.
        Raises ConfigError, DriverError, TierFull with numbers; then nothing is left open.
        """
        from tiermem.config import load
        from tiermem.nvme.kept import Persist

        if headroom < 0:
            raise ConfigError(f"headroom {headroom}: a number of pages, 0 or more")
        config = load() if config is None else config
        with ExitStack() as opened:
            leases = Leases.open(config)
            opened.callback(leases.close)
            persist = Persist(rank, fingerprint)
            parts = assemble(config, leases.first_gpu, persist, leases.pooling)
            opened.callback(parts.close)
            space = cls(config, parts, leases, headroom)
            opened.pop_all()
        for line in config.describe():
            log.info("config %s", line)
        if config.metrics.port is not None:
            from tiermem.metrics import serve

            space._metrics = serve(space.statistics, config.metrics.port)
        return space

    # ---------------------------------------------------------------- regions

    def reserve(
        self,
        nbytes: int | str,
        *,
        name: str = "",
        unit_pages: int = 1,
        tenant: int = 0,
        on_gone: OnGone | None = None,
        numbered: bool = False,
        in_place: ReadInPlace = "pays",
    ) -> Region:
        """Reserve a range of addresses; nothing is behind it until pages are allocated.

        nbytes: rounded up to whole units. tenant: pages of different tenants never see each
        other's bytes. on_gone(pages, reason): pages that were dropped or lost; called from any
        thread, before their slots are reused, and must not block. numbered: the owner says which
        pages it allocates, because its own books number them. in_place, with host.read_in_place:
        whether kernels read pages in the host tier where they are: where that `pays` by
        measurement, `always`, or `never`.
        """
        self._refuse_closed()
        self._refuse_in_place(in_place)
        wanted = _parse("reserve", nbytes)
        if wanted <= 0 or unit_pages <= 0:
            raise ConfigError(f"reserve {wanted} bytes in units of {unit_pages} pages: both > 0")
        unit_bytes = unit_pages * self.page_bytes
        pages = -(-wanted // unit_bytes) * unit_pages
        address = self.device.reserve(pages * self.page_bytes)
        with self.pager.lock:
            larger = unit_pages > self._planner.table.max_unit_pages
            extent = self._planner.table.extend(pages, unit_pages, tenant)
            if larger:  # imagined tiers hold fewer of them
                self._shadow = self._planner.onlooker = self._on_trial(self.config)
            title = name or f"region-{len(self._regions)}"
            region = Region(self, extent, address, title, on_gone, numbered, in_place)
            self._regions.append(region)
            if isinstance(self._planner.admission, Budgeted):
                self._planner.admission.weigh(self.page_bytes * self._planner.table.max_unit_pages)
            row_0 = (address - extent.first * self.page_bytes) & _U64
            self._row_0 = np.append(self._row_0, np.uint64(row_0))
        return region

    def addresses(self, rows: Rows) -> Addresses:
        """uint64[n]: the address of each page row."""
        if len(rows) == 1:
            row: int = rows.item()
            index = self._planner.table.region.item(row)
            at = self._row_0.item(index) + row * self.page_bytes
            return np.array([at & _U64], np.uint64)
        offsets = rows.astype(np.uint64) * np.uint64(self.page_bytes)
        addresses: Addresses = self._row_0[self._planner.table.region[rows]] + offsets
        return addresses

    def find(self, keys: Keys, *, tenant: int = 0) -> npt.NDArray[np.uint8]:
        """uint8[n]: the Place where content keys[i] (uint64[n, 2]) of this tenant is; 0 = nowhere.

        Of a unit of several pages, where its first page is. Content that no region holds can be
        had by `Region.adopt`.
        """
        with self.pager.lock:
            return self._planner.places(keys, tenant)

    def room(self) -> int:
        """Pages that could be allocated now: free, retired, or movable off the GPU."""
        with self.pager.lock:
            return self._planner.room()

    def ready(self) -> int:
        """Pages that could be allocated now without waiting for anything."""
        with self.pager.lock:
            return self._planner.ready()

    def route_speeds(self) -> dict[Place, RouteSpeed]:
        """How fast pages come to the GPU from each tier of late, and what is queued there.

        For `policies.recompute.split`; `Region.split` asks it for pages of its own.
        """
        with self.pager.lock:
            return self._speeds()

    def budget(self) -> int:
        """GPU pages that may be used at once now: those that there are, up to the limit.

        Of a device that is shared: what is held, and what is free and could be had.
        """
        lease = None if self._sharing is None else self._sharing.statistics()
        if lease is not None:
            return min(lease.cap, max(lease.floor, lease.held + lease.free)) // self.page_bytes
        with self.pager.lock:
            frames = self._planner.pools[Place.GPU].capacity
        limit = self._supply.limit
        return frames if limit is None else min(frames, limit)

    def count_on(self, pages: int) -> None:
        """So many GPU pages are counted on until this is called again.

        A limit that falls meanwhile takes none of those away that there are; `budget` tells of it
        at once. So whoever plans work by the budget can start it, and then plan with less.
        """
        if pages != self._supply.counted_on:
            self._supply.counted_on = pages
            self._mover.wake()

    def limit_backlog(self, nbytes: int | None) -> None:
        """So many bytes are on their way to the drive at most; the default, None: any number.

        For pages that their owner can make again: what must leave beyond that is dropped, and
        `on_gone` says so, instead of whoever needs room waiting for the drive.
        """
        most = self._planner.table.max_unit_pages
        with self.pager.lock:
            self._planner.backlog = None if nbytes is None else max(most, nbytes // self.page_bytes)

    @property
    def shared(self) -> bool:
        """Whether other processes may take and give memory of this device."""
        return self._sharing is not None

    # ---------------------------------------------------------------- limits and live changes

    def limit(self, gpu: int | str) -> None:
        """Change the GPU budget; pages above it move down in the background at once.

        Up to the frames that the device was opened with (on CUDA: all of its memory).
        """
        nbytes = _parse("limit", gpu)
        frames = nbytes // self.page_bytes
        most = self.device.frames.capacity
        if self._sharing is not None:
            most = self._sharing.terms.ceiling // self.page_bytes
        if not 0 < frames <= most:
            raise ConfigError(
                f"limit {nbytes} bytes = {frames} pages of {self.page_bytes}; 1 to {most} can be"
            )
        if self._sharing is not None:
            self._sharing.ceiling = frames * self.page_bytes
        else:
            self._supply.limit_to(frames)
        self._mover.wake()

    def apply(self, config: Config) -> tuple[str, ...]:
        """Take over what a changed configuration says anew; which keys changed.

        Raises ConfigError or BadPolicy and leaves everything as it is if a key that changed
        cannot change while running, or a policy cannot be loaded.
        """
        keys = changed(self.config, config)
        fresh = {
            place: evicting.policy(place, config, self._configured[place])
            for place in TIERS
            if {f"evict.{place.name.lower()}", f"evict.{place.name.lower()}_params"} & set(keys)
        }
        looks_ahead = any(key.startswith("prefetch.") for key in keys)
        ahead = load_prefetch(config) if looks_ahead else None
        begins = any(key.startswith(("shadow.", "evict.gpu")) for key in keys)
        shadow = self._on_trial(config) if begins else self._shadow
        with self.pager.lock:
            self._shadow = self._planner.onlooker = shadow
            if looks_ahead:
                self._set_foresight(config, ahead)
            if {"nvme.admit", "nvme.write_budget"} & set(keys):
                self._readmit(config)
            for place, policy in fresh.items():
                named = evicting.named(place, config, self._configured[place])
                self._planner.rankings[place].swap(policy, self.now(), named)
            self._planner.marks |= evicting.marks(config)
        if self._parts.slab is not None:
            self._parts.slab.budget.limit(config.nvme.write_budget)
        self.config = config
        self._mover.wake()
        return keys

    # ---------------------------------------------------------------- looking

    def statistics(self) -> Statistics:
        """A frozen snapshot."""
        with self.pager.lock:
            planner = self._planner
            tiers = tuple(self._tier_statistics(place) for place in TIERS)
            counts = dict(planner.counts)
            pages = planner.pages
            ahead = None if self._foresight is None else self._foresight.statistics()
            shadow = self._shadow_reports()
        routes = tuple(
            RouteStatistics(
                src, dst, c.pages, c.pages * self.page_bytes, c.failed, c.busy_s,
                self._parts.paths.get((src, dst), ""),
            )
            for (src, dst), c in sorted(self._executor.counts().items())
        )  # fmt: skip
        fault = self.pager.fault_latency.statistics()
        lease = None if self._sharing is None else self._sharing.statistics()
        return Statistics(
            self.page_bytes, pages, tiers, routes, counts, fault, lease, ahead, shadow
        )

    def check(self) -> None:
        """Assert every invariant of the page table; for tests and for finding bugs."""
        with self.pager.lock:
            self._planner.check()
        if self._mover.error is not None:
            raise self._mover.error

    def save(self, rows: range | None = None, timeout_s: float | None = None) -> int:
        """With nvme.persist: copy labelled pages that are not on the drive to it, and wait.

        rows: of the page table, by default all. timeout_s: by default nvme.save_s. Returns how
        many units have no copy there after it: those in use, those without room, or all that
        time did not allow; what nvme.admit refused is not counted, until it is used again.
        """
        if self._keeping is None or self._closed:
            return 0
        rows = range(self._planner.table.rows) if rows is None else rows
        limit_s = self.config.nvme.save_s if timeout_s is None else timeout_s
        return self._keeping.save(rows, limit_s, self.now)

    def drain(self, timeout_s: float | None = None) -> bool:
        """Wait until no page is moving; False on timeout."""
        return self.pager.drain(timeout_s)

    # ---------------------------------------------------------------- closing

    def close(self) -> None:
        """End all moves and give everything back; addresses of its regions become invalid.

        Waits for work queued on streams behind the fences of used pages. With nvme.persist,
        labelled pages are saved first, for nvme.save_s at most; an interrupt ends that, not the
        closing. Twice is fine. Raises PageInUse, closing nothing, while pages are pinned.
        """
        if self._closed:
            return
        for region in self._regions:
            if isinstance(region, Region):
                region.refuse_pinned()
        try:
            self.save()
        finally:
            self._close()

    def _close(self) -> None:
        self._closed = True
        if self._metrics is not None:
            self._metrics.close()
        self._mover.close()
        for region in self._regions:
            region.close()
        self._record()
        self.pager.close()
        self._parts.close()
        self._leases.close()
        if self._log is not None:
            self._log.close()

    def __enter__(self) -> Space:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        self.close()

    # ---------------------------------------------------------------- for regions

    def collect_vacant(self) -> None:
        """Hand pages that became vacant back to their regions. Called under the pager's lock."""
        rows = self._planner.take_reaped()
        if not len(rows):
            return
        region_of = self._planner.table.region[rows]
        if (region_of == region_of[0]).all():  # np.unique of one element takes 40 us
            self._regions[region_of[0]].take_vacant(rows)
            return
        for index in np.unique(region_of).tolist():
            self._regions[index].take_vacant(rows[region_of == index])

    def foresee(self, fact: Fact, chain: Rows, owner: int) -> None:
        """A region tells what it knows; chain: units, the first block first."""
        if self._foresight is None:
            return
        with self.pager.lock:
            self._foresight.tell(fact, chain, owner, self.now())
        self._mover.wake()

    # ---------------------------------------------------------------- parts

    def _turn(self) -> bool:
        """One round of the mover; True while a tier still grows, or holds more than its limit."""
        self.pager.settle_ready()
        self._record()
        growing = self._supply.grow()
        if isinstance(self._planner, LeasedPlanner) and self._sharing is not None:
            self._supply.follow_lease(self._sharing, self._planner)
            if self._pooling is not None:
                pager, now = self.pager, self.now()
                growing |= self._pooling.turn(self._planner, pager.decide, pager.lock, now)
        else:
            self._supply.keep_limit()
        self.pager.decide(self._upkeep)
        self._supply.obey_limit()
        if self._watched is not None and self._watched.rewritten():
            self._follow_file()
        return self._look_ahead() or growing or self._planner.short_of_limit(Place.GPU) < 0

    def _look_ahead(self) -> bool:
        """Load what the prefetch policy names; True if there may be more soon."""
        foresight = self._foresight
        if foresight is None:
            return False
        self.pager.decide(lambda: foresight.turn(self.now()))
        return foresight.is_hungry

    def _set_foresight(self, config: Config, policy: Prefetch | None) -> None:
        """This policy decides what is loaded ahead, within the budget of the configuration."""
        if policy is None:
            self._foresight = self._planner.gauge = None
            return
        if self._foresight is None:
            quality = self._planner.gauge = Quality(self.page_bytes)
            self._foresight = Foresight(self._planner, quality, self.page_bytes, self._speeds)
        budget = config.prefetch.budget
        if isinstance(budget, float):
            budget = int(budget * self._configured[Place.GPU] * self.page_bytes)
        self._foresight.run(policy, budget, self.now())

    def _on_trial(self, config: Config) -> Shadow | None:
        return evicting.shadow(config, self._configured, self._planner.table.max_unit_pages)

    def _shadow_reports(self) -> tuple[ShadowReport, ...]:
        """What policies on trial would have done; a miss costs a load from the tier below."""
        if self._shadow is None:
            return ()
        unit_bytes = self.page_bytes * self._planner.table.max_unit_pages
        deepest = evicting.shadow_tiers(self.config)[-1]
        below = sorted((src, speed.gbps) for src, speed in self._speeds().items() if src > deepest)
        miss_s = unit_bytes / (below[0][1] * 1e9) if below else 0.0
        return self._shadow.report(unit_bytes, miss_s)

    def _speeds(self) -> dict[Place, RouteSpeed]:
        """`route_speeds`, under the lock."""
        counts = self._executor.counts()
        speeds: dict[Place, RouteSpeed] = {}
        for src, pace in self._paces.items():
            pace.observe(counts[src, GPU].pages * self.page_bytes, counts[src, GPU].busy_s)
            if src not in self._planner.failed_tiers:
                queued = self._planner.queued(src) * self.page_bytes
                speeds[src] = RouteSpeed(pace.gbps, queued_bytes=queued)
        return speeds

    def _upkeep(self) -> list[Plan]:
        planner, now = self._planner, self.now()
        self.collect_vacant()
        plans = planner.relieve(now) + planner.back_up(now)
        if isinstance(planner, LeasedPlanner):
            plans += planner.clean(self.page_bytes, now)
        return plans

    def _open_keeping(self) -> Keeping | None:
        """With nvme.persist, what the drive holds is the attic's, the first range of the table."""
        slab = self._parts.slab
        if slab is None or not self.config.nvme.persist:
            return None
        self._regions.append(Nobody())
        self._row_0 = np.append(self._row_0, np.uint64(0))
        return Keeping(slab, self.pager, self._configured[Place.NVME], self.now())

    def _record(self) -> None:
        if self._keeping is not None:
            self._keeping.record()

    def _follow_file(self) -> None:
        """The configuration's file was rewritten: take it over, or say why not."""
        try:
            keys = self.apply(reload(self.config))
        except Exception as error:  # a policy of the user's may fail in any way at import
            log.warning("config refused file=%s; the old plan stays: %s", self.config.file, error)
            return
        for key in keys:
            log.info("config changed %s = %r", key, self.config.settings()[key])

    def _backed(self, place: Place) -> int:
        tier = self._parts.tiers.get(place)
        return 0 if tier is None else min(tier.ready, self._configured[place])

    def _tier_statistics(self, place: Place) -> TierStatistics:
        pool, ranking = self._planner.pools[place], self._planner.rankings[place]
        return TierStatistics(
            place=place,
            configured=self._configured[place],
            capacity=pool.capacity,
            used=pool.used,
            kept=pool.kept,
            free=pool.free,
            bytes_used=pool.used * self.page_bytes,
            policy=ranking.name,
            fallbacks=ranking.fallbacks,
            late=ranking.late,
            failed=place in self._planner.failed_tiers,
        )

    def _zero(self, frames: Slots) -> Done:
        return self.device.zero(frames) if len(frames) else Finished()

    def _on_gone(self, gone: Rows, reason: str) -> None:
        table = self._planner.table
        rows = table.pages(gone)
        region_of = table.region[rows]
        for index in np.unique(region_of).tolist():
            self._regions[index].tell_gone(rows[region_of == index], reason)

    def now(self) -> int:
        """Logical time: milliseconds since the space was opened."""
        return int((time.monotonic() - self._start_s) * 1000)

    def _readmit(self, config: Config) -> None:
        """Another rule, or another budget over the same one, which keeps what it has learnt."""
        if config.nvme.admit != self.config.nvme.admit:
            self._rule = admission(config.nvme.admit)
        self._planner.admission = self._asked(self._rule, config)

    def _asked(self, rule: Admission, config: Config) -> Admission | None:
        return evicting.asked(rule, config, self.page_bytes * self._planner.table.max_unit_pages)

    def _refuse_in_place(self, in_place: str) -> None:
        if in_place not in READ_IN_PLACE:
            raise ConfigError(f"in_place {in_place!r}: one of {', '.join(READ_IN_PLACE)}")
        if in_place == "always" and self._planner.crossover is None:
            raise ConfigError(
                'reserve(in_place="always"): the host tier cannot be read in place; set '
                "host.read_in_place = true and host.capacity"
            )

    def _refuse_closed(self) -> None:
        if self._closed:
            raise Closed("the space is closed; open another one")


def _parse(verb: str, size: int | str) -> int:
    try:
        return units.parse_bytes(size)
    except ValueError as error:
        raise ConfigError(f"{verb} {size!r}: {error}") from None
