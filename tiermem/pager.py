"""The pager: one planner, one executor and the lock between them.

Decide under the lock, act outside it, settle under it. Plans wait in a queue from the moment they
are decided, and any thread starts them; so a thread that is interrupted leaves nothing behind.
Whoever waits settles what has ended, and pins what it waited for in the same step.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from tiermem.errors import Closed, PageLost, TierFailed
from tiermem.executor import Executor, Flight
from tiermem.interrupts import Uninterrupted
from tiermem.plan import Plan
from tiermem.planner import Access, Planner, Request
from tiermem.policies.base import Keys
from tiermem.slices import Arriving
from tiermem.stats import Latencies
from tiermem.table import Rows
from tiermem.tier import Fence, Orderable, Place

T = TypeVar("T")

_ATTEMPTS = 4
_GROWING_S = 0.002
_TICK_S = 0.05  # how long a waiter sleeps at most before it looks again
_ANY_S = 0.001  # the same where any of several flights will do: the oldest may write to a drive


class _Reader(NamedTuple):
    """Who waits for loads instead of the caller."""

    stream: int | None
    kernels_only: bool
    arriving: Arriving | None


class Pager:
    """Faults, allocations and frees from any thread. See `Planner` for what each verb does."""

    def __init__(
        self,
        planner: Planner,
        executor: Executor,
        *,
        now: Callable[[], int],
        passed: Callable[[], npt.NDArray[np.uint64]],
        wait_fence: Callable[[Fence, float], bool],
        wake: Callable[[], None] = lambda: None,
    ) -> None:
        """now: logical milliseconds. passed, wait_fence: of the device's streams. wake: the mover.

        `lock` guards the planner and everything that its owner keeps beside it.
        """
        self.lock = threading.Lock()
        self.planner = planner
        self.executor = executor
        self._now = now
        self._passed = passed
        self._wait_fence = wait_fence
        self._wake = wake
        self._settled = threading.Condition(self.lock)
        self._todo: deque[Plan] = deque()
        self._starting: set[int] = set()
        self._flights: dict[int, Flight] = {}
        self.fault_latency = Latencies()
        self._closed = False

    # ---------------------------------------------------------------- verbs

    def use(
        self,
        rows: Rows,
        access: Access,
        stream: int | None = None,
        touches: int | None = None,
        kernels_only: bool = False,
        arriving: Arriving | None = None,
    ) -> None:
        """Make pages resident and pin them: all or nothing; returns when they may be touched.

        With a stream and read access, the stream rather than the caller waits for host loads.
        touches: as for `Planner.fault`. kernels_only, arriving: as for `Region.use`, `Region.pin`.
        """
        reader = None
        if access == "read" and (stream is not None or arriving is not None):
            reader = _Reader(stream, kernels_only, arriving)
            if arriving is not None:
                self.executor.slices = True
        writes = access != "read"
        attempts = 0
        start_s = 0.0
        while True:
            with self.lock:
                self._refuse_closed()
                self._settle_ended()
                request = self.planner.fault(
                    rows, access, self._now(), order=reader is not None, touches=touches
                )
                self._todo.extend(request.plans)
                awaited = len(request.pending)
                # Decided here: once the lock is free, others settle what is pending.
                resident = request.taken and not request.pending
                if resident:
                    self._enter(rows, writes)
            if not resident:
                start_s = start_s or time.perf_counter()
            taken = request.taken
            try:
                if not taken:
                    self._start()
                    self._await_any(request, awaited)
                elif self._come(request, resident, writes, reader):
                    break
            except BaseException:  # also Ctrl-C: what is on its way lands without its pins
                with self.lock:
                    self.planner.abandon(request)
                raise
            if taken:
                attempts += 1
                self._refuse_failed(request, attempts)
        if start_s:
            self.fault_latency.add(time.perf_counter() - start_s)
            self._wake_if_pressed()

    def _come(self, request: Request, resident: bool, writes: bool, reader: _Reader | None) -> bool:
        """Carry a taken request out and wait for it; False: ask again, for it was badly served."""
        self._start()
        if resident:
            return True
        if reader is not None and len(request.rows) > 1:
            self.settle_ready()  # what came before, while these are being shown
        if reader is not None and self._order(request, reader):
            self._wake()  # nobody else will settle these loads
            return True
        self._await_all(request)
        with self.lock:
            if not request.failed and Place.GPU not in self.planner.failed_tiers:
                self._enter(request.rows, writes)
                return True
            self.planner.abandon(request)
        return False

    def use_one(self, row: int, write: bool) -> bool:
        """The fast path of `use` for one page that rests on the GPU; False: take the other."""
        with self.lock:
            self._refuse_closed()
            return self.planner.pin_one(row, write, self._now())

    def unpin_one(self, row: int) -> None:
        with self.lock:
            self.planner.table.pins[row] -= 1

    def unpin(self, rows: Rows, tick: tuple[int, int] | None) -> None:
        with self.lock:
            self.planner.unpin(rows, tick)

    def allocate(
        self,
        rows: Rows,
        parents: Rows | None = None,
        depths: Rows | None = None,
        keys: Keys | None = None,
    ) -> None:
        """Put frames behind vacant pages: all or nothing."""
        while True:
            with self.lock:
                self._refuse_closed()
                self._settle_ended()
                request = self.planner.allocate(
                    rows, self._now(), parents=parents, depths=depths, keys=keys
                )
                self._todo.extend(request.plans)
                awaited = len(request.pending)
            self._start()
            if request.taken:
                break
            self._await_any(request, awaited)
        self._await_all(request)
        if request.failed:
            self.free(rows)
            raise TierFailed(f"gpu: {len(request.failed)} of {len(rows)} frames could not be shown")
        self._wake_if_pressed()

    def free(self, rows: Rows) -> None:
        self.decide(lambda: self.planner.free(rows, self._now()))

    def decide(self, verb: Callable[[], list[Plan]]) -> int:
        """Run a verb of the planner under the lock and start its plans; how many there were."""
        with self.lock:
            self._refuse_closed()
            self._settle_ended()
            plans = verb()
            self._todo.extend(plans)
        self._start()
        if plans:
            self._wake()
        return len(plans)

    # ---------------------------------------------------------------- settling

    def settle_ready(self) -> int:
        """Settle every flight that has ended; how many did."""
        with self.lock:
            ended = self._settle_ended()
        self._start()
        return ended

    def busy(self) -> bool:
        """True while a plan is queued or under way."""
        with self.lock:
            return bool(self._todo or self._starting or self._flights)

    def wait_some(self, timeout_s: float) -> None:
        """Wait until some flight may have ended."""
        with self.lock:
            flight = next(iter(self._flights.values()), None)
        if flight is not None:
            flight.wait(timeout_s)

    def drain(self, timeout_s: float | None = None) -> bool:
        """Wait until nothing is under way and no freed page waits; False on timeout."""
        until = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            self._start()
            self.settle_ready()
            with self.lock:
                idle = not (self._todo or self._starting) and self.planner.is_idle()
                fence = self.planner.doomed_fence()
            if idle:
                return True
            if until is not None and time.monotonic() > until:
                return False
            if fence.ticks:
                self._wait_fence(fence, _TICK_S)
            self.wait_some(_TICK_S)

    def wait_fence(self, fence: Fence, timeout_s: float) -> bool:
        """Wait until work queued on streams has passed a point; False on timeout."""
        return self._wait_fence(fence, timeout_s)

    def close(self) -> None:
        """Refuse new work and settle what is under way."""
        with self.lock:
            self._closed = True
            self._settled.notify_all()
        self.drain()

    # ---------------------------------------------------------------- parts

    def _wake_if_pressed(self) -> None:
        """The mover has something to do once a tier is above its high mark."""
        if self.planner.is_pressed():
            self._wake()

    def _enter(self, rows: Rows, writes: bool) -> None:
        self.planner.touch(rows, self._now())
        if writes:
            self.planner.wrote(rows)

    def _observe(self) -> None:
        fences = self.planner.table.fences
        if not fences.all_passed:
            fences.observe(self._passed())

    def _start(self) -> None:
        """Start queued plans. A plan is queued, starting or a flight until it is settled."""
        while self._todo:
            with self.lock:
                if not self._todo:
                    return
                plan = self._todo.popleft()
                self._starting.add(plan.id)
            flight = None
            try:
                with Uninterrupted():
                    flight = self.executor.start(plan)
            finally:
                with self.lock:
                    self._starting.discard(plan.id)
                    if flight is None:  # interrupted before: somebody else will start it
                        self._todo.appendleft(plan)
                    else:
                        self._flights[plan.id] = flight
                    self._settled.notify_all()

    def _settle_ended(self) -> int:
        self._observe()
        ended = [f for f in self._flights.values() if f.ready()] if self._flights else []
        for flight in ended:
            self._settle(flight)
        self._todo.extend(self.planner.settle_idle())
        return len(ended)

    def _settle(self, flight: Flight) -> None:
        del self._flights[flight.plan.id]
        self._todo.extend(self.planner.settle(flight.outcome(), self._now()))
        self._settled.notify_all()
        if self.planner.is_unrecorded:
            self._wake()  # the mover tells the drive

    def _await_any(self, request: Request, awaited: int) -> None:
        """Wait until one of the plans that a request waits for has settled, or its fence passed.

        awaited: how many they were when it was made; by now others may have settled one.
        """
        if not awaited:
            if request.fence.ticks:
                self._wait_fence(request.fence, _TICK_S)
            elif not request.plans:
                with self.lock:  # a tier is growing
                    self._settled.wait(_GROWING_S)
            return
        while len(request.pending) == awaited:
            self._wait_for(request, some=True)

    def _await_all(self, request: Request) -> None:
        while request.pending:
            self._wait_for(request, some=False)

    def _wait_for(self, request: Request, some: bool) -> None:
        with self.lock:
            flights = [self._flights[p] for p in sorted(request.pending) if p in self._flights]
            if not flights and self._starting:
                self._settled.wait(_TICK_S)
        if flights and not (some and any(f.ready() for f in flights)):
            flights[0].wait(_ANY_S if some and len(flights) > 1 else _TICK_S)
        self.settle_ready()

    def _order(self, request: Request, reader: _Reader) -> bool:
        """Let the stream wait for this request's loads; False if any must be waited for."""
        with self.lock:
            while request.pending & self._starting:  # the mover has one in hand
                self._settled.wait(_TICK_S)
            flights = [self._flights.get(p) for p in request.pending]
            if not flights or None in flights or not self.planner.order(request):
                return False
        stream, kernels_only, arriving = reader
        later: list[Orderable] | None = None if arriving is None else []
        if not all([f.order(stream, kernels_only, later) for f in flights if f is not None]):
            return False
        if arriving is not None:
            for load in later or ():
                arriving.add(load)
        with self.lock:
            self.planner.run_ahead(request, self._now())
        return True

    def _refuse_failed(self, request: Request, attempts: int) -> None:
        with self.lock:
            table = self.planner.table
            lost = int((table.at[request.rows] == Place.LOST).sum())
            gpu_failed = Place.GPU in self.planner.failed_tiers
        if gpu_failed:
            raise TierFailed("gpu: the tier has failed; close the space and open it again")
        if lost:
            raise PageLost(
                f"{lost} of {len(request.rows)} pages could not be read back as written; "
                'compute them again with access="fresh"'
            )
        if attempts >= _ATTEMPTS:
            raise TierFailed(
                f"{len(request.failed)} of {len(request.rows)} pages could not be loaded in "
                f"{attempts} attempts; their bytes are kept below"
            )

    def _refuse_closed(self) -> None:
        if self._closed:
            raise Closed("the space is closed; open another one")
