"""The executor of one rank: it carries out what a director orders, and reports what became of it.

Everything here is called by the thread that drives the rank's device, in the order of its steps:
`carry` before the step's work is queued, `mark` after it, `report` whenever the director may hear.
Frames get and give back their memory in a thread beside it, in the order of the orders: the driver
takes 50 us and more for each, and no step waits for that.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import replace
from functools import partial
from queue import SimpleQueue
from typing import Literal

import numpy as np

from tiermem.assemble import Parts
from tiermem.attic import Stored
from tiermem.directed.orders import NO_SLOTS, Hello, Moved, Orders, Report
from tiermem.directed.turns import Turns
from tiermem.errors import TierFailed, TierFull
from tiermem.executor import Executor, Flight
from tiermem.leases import NO_LEASES, Leases
from tiermem.peers import Peers
from tiermem.plan import Copy, Plan
from tiermem.table import Rows
from tiermem.tier import PASSED, TIERS, Addresses, Done, Fence, Place, Slots

log = logging.getLogger(__name__)

Change = tuple[Literal["backed", "unbacked", "parked"], Slots]
"""What has become of the memory of frames."""

START_S = 120.0
_LOOK_S = 0.002


class Rank:
    """One device's tiers under a director. Close it after the device's last work."""

    def __init__(
        self,
        rank: int,
        parts: Parts,
        addresses: Callable[[Rows], Addresses],
        *,
        persist: bool = False,
        leases: Leases = NO_LEASES,
        peers: Peers | None = None,
        kernels_only: bool = False,
    ) -> None:
        """parts: which it will close. addresses: of page rows, in one reservation.

        persist: the slab of the parts is kept for the next start. leases: that the memory of the
        parts is held under, for the director; closed last. peers: with whom it shares content.
        kernels_only: as for `Region.use`, of all that is queued in a step.
        """
        self.rank = rank
        self.leases = leases
        self.peers = peers
        self.turns = Turns()
        self.page_bytes = parts.device.page_bytes
        self._persist = persist
        self._kernels_only = kernels_only
        self._parts = parts
        self._device = parts.device
        self._addresses = addresses
        self._executor = Executor(
            window=parts.device.window,
            routes=parts.routes,
            zero=parts.device.zero,
            addresses=addresses,
            region_of=lambda rows: np.zeros(len(rows), np.uint16),
            on_gone=lambda units, reason: None,  # the director tells the owner
        )
        self._flights: dict[int, Flight] = {}
        self._looks: dict[int, tuple[float, float]] = {}  # when it began, when it was last seen
        self._surely_s: dict[tuple[Place, Place], float] = {}
        self._counted_s: dict[tuple[Place, Place], float] = {}
        self._ticks: deque[tuple[int, tuple[int, int] | None]] = deque()
        self._passed = 0
        self._is_growing = True  # lower tiers are not known to have all their slots yet
        self._grown: frozenset[Place] = frozenset()
        self._slots: Mapping[Place, int] = {}
        self._moved: Mapping[tuple[Place, Place], Moved] = self.routes()
        self._changes: deque[Future[Change]] = deque()
        self._todo: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._beside = threading.Thread(target=self._change, name="tiermem-memory", daemon=True)
        self._beside.start()
        self._bare = NO_SLOTS  # frames that were to get memory, and have none
        self._receiving: dict[str, set[int]] = {}
        self._failed_rows: list[Rows] = []
        self._closed = False

    def start(self, pages: int) -> Hello:
        """Zero all frames and show the first ones at the first pages. What this rank has.

        pages: of the range; as many as there are frames are shown at most.
        """
        every = np.arange(self._await_frames(), dtype=np.int32)
        self._finish(self._device.zero(every), "frames could not be zeroed")
        first = every[:pages]
        shown = self._device.window.show(self._addresses(first), first)
        self._finish(shown, "the first pages could not be shown")
        return Hello(
            self.rank,
            self._device.page_bytes,
            len(first),
            self._capacities(len(every)),
            self._ready(),
            frozenset(self._parts.routes),
            self._held(),
        )

    # ---------------------------------------------------------------- steps

    def carry(self, orders: Orders, stream: int | None) -> None:
        """Start the plans; what the step needs has been done, or `stream` waits for it.

        Raises TierFailed when something that the step needs could not be done.
        """
        slab = self._parts.slab
        if slab is not None:
            if len(orders.forget):
                slab.forget(orders.forget)
            if orders.record is not None:
                r = orders.record
                slab.record(r.slots, r.keys, r.depths, r.tenants, slab.sequences(r.slots))
        if len(orders.back):
            self._begin(partial(self._back, orders.back))
        for plan in orders.plans:
            self._flights[plan.id] = self._executor.start(self._here(plan))
            self._looks[plan.id] = (time.monotonic(),) * 2
        if len(orders.park):
            flights = tuple(self._flights.values())
            self._begin(partial(self._park, orders.park, flights))
        for request, receive in orders.receives.items():
            self._receiving[request] = set(receive.plans)
            self._failed_rows.append(receive.missing)
        for plan_id in orders.needs:
            self._await(plan_id, stream)

    def mark(self, step: int, stream: int | None) -> None:
        """The step's work is queued on `stream` (None: it has ended)."""
        self._ticks.append((step, self._device.streams.tick(stream)))

    def skip(self, step: int) -> None:
        """The step has no work: it has ended when those before it have."""
        self._ticks.append((step, self._ticks[-1][1] if self._ticks else None))

    def report(self) -> Report:
        """What has ended since the last report; waits for nothing. Raises what a change of frames'
        memory has raised."""
        changed = self._changed()
        flew = bool(self._flights)
        ended = self._look()
        outcomes = []
        for flight in ended:
            del self._flights[flight.plan.id]
            self._clock(flight.plan)
            outcome = flight.outcome()
            outcomes.append(outcome)
            if any(flight.plan.id in plans for plans in self._receiving.values()):
                self._note_failed(flight.plan, outcome.failed)
        if self._is_growing:
            self._grown = self._growing()  # asked first: what is ready by then counts
            self._slots = self._ready()
            self._is_growing = bool(self._grown)
        if flew:
            self._moved = self.routes()
        return Report(
            self.rank,
            self._observe(),
            tuple(outcomes),
            self._slots,
            self._moved,
            changed["backed"],
            changed["unbacked"],
            changed["parked"],
            self._grown,
        )

    def has_news(self) -> bool:
        """False if a report would say what the last one has said."""
        return bool(self._flights or self._ticks or self._changes) or self._is_growing

    def routes(self) -> dict[tuple[Place, Place], Moved]:
        """What each route has moved so far."""
        return {
            route: Moved(c.pages, c.busy_s, self._surely_s.get(route, 0.0))
            for route, c in self._executor.counts().items()
        }

    def received(self) -> tuple[set[str], Rows]:
        """Requests all of whose content has come or failed to, and page rows that failed."""
        if not (self._receiving or self._failed_rows):
            return set(), NO_SLOTS
        flying = set(self._flights)
        done = {name for name, plans in self._receiving.items() if not plans & flying}
        if self.peers is not None:
            done = {name for name in done if not self.peers.awaits(name)}
            self._failed_rows.append(self.peers.take_failed())
        for name in done:
            del self._receiving[name]
        failed = np.concatenate([np.empty(0, np.int32), *self._failed_rows])
        self._failed_rows.clear()
        return done, failed

    def wait(self, timeout_s: float) -> None:
        """Until some plan or change has ended, or the timeout; at once if none is under way."""
        flight = next(iter(self._flights.values()), None)
        if flight is not None:
            flight.wait(timeout_s)
        elif self._changes:
            wait(list(self._changes), timeout_s, FIRST_COMPLETED)

    @property
    def closed(self) -> bool:
        return self._closed

    def close(self) -> None:
        """Give everything back; the device's work has ended. A second call does nothing."""
        with self.turns.lock:
            if self._closed:
                return
            self._closed = True
            self._todo.put(None)
            self._beside.join()
            for flight in self._flights.values():
                flight.wait()
            self._parts.close()
        self.leases.close()

    # ---------------------------------------------------------------- parts

    def _look(self) -> list[Flight]:
        """Flights that have ended; the others were under way at this moment."""
        now_s = time.monotonic()
        ended = []
        for plan_id, flight in self._flights.items():
            if flight.ready():
                ended.append(flight)
            else:
                self._looks[plan_id] = (self._looks[plan_id][0], now_s)
        return ended

    def _clock(self, plan: Plan) -> None:
        """Count the time during which a plan's copies were certainly under way, once a route."""
        start_s, seen_s = self._looks.pop(plan.id)
        for step in plan.steps:
            if isinstance(step, Copy):
                route = (step.src, step.dst)
                since_s = max(start_s, self._counted_s.get(route, 0.0))
                self._surely_s[route] = self._surely_s.get(route, 0.0) + max(0.0, seen_s - since_s)
                self._counted_s[route] = max(since_s, seen_s)

    def _await_frames(self) -> int:
        """Frames with memory behind them, once the device makes no more."""
        frames = self._parts.tiers[Place.GPU]
        until = time.monotonic() + START_S
        while frames.growing and time.monotonic() < until:
            time.sleep(_LOOK_S)
        return min(frames.ready, self._capacity(Place.GPU))

    def _capacity(self, place: Place) -> int:
        return self._parts.capacities.get(place, 0) if place in self._parts.tiers else 0

    def _capacities(self, frames: int) -> dict[Place, int]:
        """Slots at most; frames that have no memory by now get some only under a lease."""
        most = {place: self._capacity(place) for place in TIERS}
        return most if self.leases.sharing is not None else {**most, Place.GPU: frames}

    def _ready(self) -> dict[Place, int]:
        tiers = self._parts.tiers
        return {p: min(tiers[p].ready, self._capacity(p)) if p in tiers else 0 for p in TIERS}

    def _growing(self) -> frozenset[Place]:
        tiers = self._parts.tiers
        return frozenset(
            place
            for place in (Place.HOST, Place.NVME)
            if place in tiers
            and tiers[place].growing
            and tiers[place].ready < self._capacity(place)
        )

    def _held(self) -> Stored | None:
        slab = self._parts.slab
        if slab is None or not self._persist:
            return None
        found = slab.recovered()
        old_first = slice(None, None, -1)
        return Stored(
            found.slots[old_first],
            found.keys[old_first],
            found.depths[old_first],
            found.tenants[old_first],
        )

    def _begin(self, change: Callable[[], Change]) -> None:
        future = Future[Change]()
        self._changes.append(future)

        def carried_out() -> None:
            try:
                future.set_result(change())
            except Exception as error:  # raised by the report
                future.set_exception(error)

        self._todo.put(carried_out)

    def _changed(self) -> dict[str, Slots]:
        """Frames of which a change has ended, by what has become of them."""
        changed = dict.fromkeys(("backed", "unbacked", "parked"), NO_SLOTS)
        while self._changes and self._changes[0].done():
            what, frames = self._changes.popleft().result()
            changed[what] = np.concatenate([changed[what], frames])
        return changed

    # ---------------------------------------------------------------- the thread beside

    def _change(self) -> None:
        while (todo := self._todo.get()) is not None:
            todo()

    def _back(self, frames: Slots) -> Change:
        try:
            self._device.back(frames)
        except TierFull as error:
            log.warning("frames=%d not backed: %s", len(frames), error)
            self._bare = np.concatenate([self._bare, frames])
            return "unbacked", frames
        return "backed", frames

    def _park(self, frames: Slots, flights: tuple[Flight, ...]) -> Change:
        """Frames that these flights have hidden at the latest give their memory back."""
        for flight in flights:
            flight.wait_hidden()
        self._device.park(frames[~np.isin(frames, self._bare)])
        self._bare = np.setdiff1d(self._bare, frames)
        return "parked", frames

    # ---------------------------------------------------------------- plans and fences

    def _await(self, plan_id: int, stream: int | None) -> None:
        flight = self._flights.get(plan_id)
        if flight is None:
            return  # it has ended, and was reported
        if stream is not None and flight.order(stream, self._kernels_only):
            return
        flight.wait()
        if flight.error is not None:
            raise TierFailed(
                f"rank {self.rank}: the step needs plan {plan_id}, which failed: {flight.error}"
            )

    def _here(self, plan: Plan) -> Plan:
        """The plan with fences of steps as points on this rank's streams."""
        if not any(isinstance(step, Copy) and step.after.ticks for step in plan.steps):
            return plan
        steps = [
            replace(step, after=self._fence(step.after))
            if isinstance(step, Copy) and step.after.ticks
            else step
            for step in plan.steps
        ]
        return replace(plan, steps=tuple(steps))

    def _fence(self, steps: Fence) -> Fence:
        wanted = max(step for _, step in steps.ticks)
        tick = None
        for step, point in self._ticks:  # in order; the first at or behind the wanted step
            tick = point
            if step >= wanted:
                break
        return PASSED if tick is None else Fence((tick,))

    def _observe(self) -> int:
        if not self._ticks:
            return self._passed
        passed = self._device.streams.passed()
        while self._ticks:
            step, tick = self._ticks[0]
            if tick is not None and (tick[0] >= len(passed) or passed[tick[0]] < tick[1]):
                break
            self._passed = step
            self._ticks.popleft()
        return self._passed

    def _note_failed(self, plan: Plan, failed: tuple[object, ...]) -> None:
        for step, bad in zip(plan.steps, failed, strict=True):
            if isinstance(step, Copy) and step.dst == Place.GPU and isinstance(bad, np.ndarray):
                self._failed_rows.append(step.pages[bad])

    def _finish(self, done: Done, what: str) -> None:
        if not done.wait(START_S) or done.error is not None:
            raise TierFailed(f"rank {self.rank}: {what}: {done.error or f'over {START_S:g} s'}")
