"""Carries plans out on windows, routes and devices, and reports what became of them.

Plain: it decides nothing, knows no policy and never touches the table. A step that cannot even be
submitted is an outcome like any other: its entries failed, and the planner settles that.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import cast

import numpy as np
import numpy.typing as npt

from tiermem.errors import TierMemError
from tiermem.plan import Copy, Drop, Hide, Outcome, Plan, Show, ShowInPlace, Step, Zero
from tiermem.table import Rows
from tiermem.tier import (
    Addresses,
    Done,
    Finished,
    Mask,
    Orderable,
    Place,
    Route,
    Slots,
    Window,
)

log = logging.getLogger(__name__)

OnGone = Callable[[Rows, str], None]
Part = npt.NDArray[np.int64] | slice
_ALL = slice(None)


@dataclass(frozen=True, slots=True)
class RouteCounts:
    """What a route has moved so far. busy_s: wall time during which a copy was under way."""

    pages: int
    failed: int
    busy_s: float


class _Meter:
    """Counts one route's copies; overlapping copies count their time once."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running = 0
        self._since = 0.0
        self.counts = RouteCounts(0, 0, 0.0)

    def start(self) -> None:
        with self._lock:
            if not self._running:
                self._since = time.perf_counter()
            self._running += 1

    def stop(self, pages: int, failed: int) -> None:
        with self._lock:
            self._running -= 1
            busy_s = 0.0 if self._running else time.perf_counter() - self._since
            old = self.counts
            self.counts = RouteCounts(old.pages + pages, old.failed + failed, old.busy_s + busy_s)


class Flight:
    """A plan that is being carried out."""

    def __init__(self, plan: Plan, dones: list[Done], meters: dict[int, _Meter]) -> None:
        self.plan = plan
        self._dones = dones
        self._meters = meters

    def ready(self) -> bool:
        return all(done.ready() for done in self._dones)

    def wait(self, timeout_s: float | None = None) -> bool:
        """Block until every step has ended, or until the timeout."""
        if timeout_s is None:
            return all(done.wait() for done in self._dones)
        until = time.monotonic() + timeout_s
        return all(done.wait(max(0.0, until - time.monotonic())) for done in self._dones)

    def order(
        self, stream: int | None, kernels_only: bool, later: list[Orderable] | None = None
    ) -> bool:
        """Make a stream wait for the copies and the caller for the rest; False if it cannot.

        kernels_only: as for `Region.use`; the stream waits until pages are shown, too. What hides
        others has ended by then, well or not, and nobody waits for it.
        later: gets the copies instead, for the stream to wait for later.
        """
        rest: list[Done] = []
        for step, done in zip(self.plan.steps, self._dones, strict=True):
            if kernels_only and isinstance(step, Hide):
                continue
            copies = isinstance(step, Copy)
            # An `Orderable`; asking for the protocol takes 10 us.
            order = getattr(done, "order", None) if copies or kernels_only else None
            if order is not None:
                if copies and later is not None:
                    later.append(cast(Orderable, done))
                else:
                    order(stream)
            elif copies:
                return False
            else:
                rest.append(done)
        for done in rest:
            done.wait()
        return self.error is None

    def wait_hidden(self) -> None:
        """Block until what it hides is hidden."""
        for step, done in zip(self.plan.steps, self._dones, strict=True):
            if isinstance(step, Hide):
                done.wait()

    @property
    def error(self) -> Exception | None:
        """Why a step failed, of those that have ended."""
        return next((done.error for done in self._dones if done.error is not None), None)

    def outcome(self) -> Outcome:
        """What became of each step; only once `ready`."""
        failed, error = [], None
        for i, (step, done) in enumerate(zip(self.plan.steps, self._dones, strict=True)):
            bad = _failed(step, done)
            failed.append(bad)
            error = error or done.error
            if i in self._meters and isinstance(step, Copy):
                lost = 0 if bad is None else int(bad.sum())
                self._meters[i].stop(len(step.pages) - lost, lost)
        return Outcome(self.plan.id, tuple(failed), error)


class _Several:
    """The Done of a step that took a call for each region: its pages failed where theirs did."""

    def __init__(self, n: int, parts: list[npt.NDArray[np.int64]], dones: list[Done]) -> None:
        self._n = n
        self._parts = parts
        self._dones = dones

    @property
    def error(self) -> Exception | None:
        return next((done.error for done in self._dones if done.error is not None), None)

    @property
    def failed(self) -> Mask | None:
        bad = np.zeros(self._n, np.bool_)
        for part, done in zip(self._parts, self._dones, strict=True):
            if done.error is not None:
                bad[part] = True if done.failed is None else done.failed
        return bad if bad.any() else None

    def ready(self) -> bool:
        return all(done.ready() for done in self._dones)

    def wait(self, timeout_s: float | None = None) -> bool:
        return all(done.wait(timeout_s) for done in self._dones)


def _failed(step: Step, done: Done) -> Mask | None:
    if done.error is None and done.failed is None:
        return None
    entries = _entries(step)
    if done.failed is None or len(done.failed) != entries:
        return np.ones(entries, np.bool_)
    return done.failed if done.failed.any() else None


def _entries(step: Step) -> int:
    match step:
        case Copy() | Hide() | Show() | ShowInPlace():
            return len(step.pages)
        case Zero():
            return len(step.frames)
        case Drop():
            return len(step.units)


class Executor:
    """One device's window and routes. Any thread may start plans; nothing here blocks for long."""

    def __init__(
        self,
        *,
        window: Window,
        routes: Mapping[tuple[Place, Place], Route],
        zero: Callable[[Slots], Done],
        addresses: Callable[[Rows], Addresses],
        region_of: Callable[[Rows], npt.NDArray[np.uint16]],
        on_gone: OnGone,
        in_place: Callable[[Addresses, Slots], Done] | None = None,
    ) -> None:
        """addresses, region_of: of page rows. on_gone: called before slots are reused.

        in_place: shows host slots at addresses, where the host tier can.
        """
        self._window = window
        self._routes = dict(routes)
        self._zero = zero
        self._addresses = addresses
        self._region_of = region_of
        self._on_gone = on_gone
        self._in_place = in_place
        self._meters = {key: _Meter() for key in self._routes}
        self.slices = False  # somebody reads loads from front to back (`tiermem.slices`)
        self.failed_callbacks = 0

    @property
    def routes(self) -> set[tuple[Place, Place]]:
        return set(self._routes)

    def counts(self) -> dict[tuple[Place, Place], RouteCounts]:
        return {key: meter.counts for key, meter in self._meters.items()}

    def start(self, plan: Plan) -> Flight:
        """Submit every step in order; returns at once. Never raises for what a step does.

        What follows zeroing that failed is not done: it would show another tenant's bytes.
        """
        dones: list[Done] = []
        meters: dict[int, _Meter] = {}
        soiled: Exception | None = None
        for i, step in enumerate(plan.steps):
            if soiled is not None:
                dones.append(Finished(soiled))
                continue
            if isinstance(step, Copy):
                meters[i] = self._meters[step.src, step.dst]
                meters[i].start()
            try:
                dones.append(self._submit(step))
            except TierMemError as error:
                log.debug("step failed plan=%d step=%s: %s", plan.id, type(step).__name__, error)
                dones.append(Finished(error))
            if isinstance(step, Zero):
                soiled = dones[-1].error
        return Flight(plan, dones, meters)

    def _submit(self, step: Step) -> Done:
        match step:
            case Copy():
                route = self._routes[step.src, step.dst]
                submit = route.submit
                if self.slices and step.dst == Place.GPU:
                    submit = getattr(route, "submit_slices", submit)
                return submit(step.src_slots, step.dst_slots, step.after)
            case Show():
                return self._by_region(
                    step.pages,
                    lambda part: self._window.show(
                        self._addresses(step.pages[part]), step.frames[part]
                    ),
                )
            case ShowInPlace():
                show = self._in_place
                assert show is not None, "a planner with a crossover has a host tier to show"
                return self._by_region(
                    step.pages,
                    lambda part: show(self._addresses(step.pages[part]), step.slots[part]),
                )
            case Hide():
                return self._by_region(
                    step.pages, lambda part: self._window.hide(self._addresses(step.pages[part]))
                )
            case Zero():
                done = self._zero(step.frames)
                done.wait()  # before a later step copies into the frame or shows it
                return done
            case Drop():
                return self._tell(step)

    def _by_region(self, rows: Rows, call: Callable[[Part], Done]) -> Done:
        """One call of the window for each region among the pages."""
        if len(rows) == 1:
            return call(_ALL)
        regions = self._region_of(rows)
        if (regions == regions[0]).all():
            return call(_ALL)
        parts = [np.flatnonzero(regions == region) for region in sorted(set(regions.tolist()))]
        dones: list[Done] = []
        for part in parts:
            try:
                dones.append(call(part))
            except TierMemError as error:
                dones.append(Finished(error))
        return _Several(len(rows), parts, dones)

    def _tell(self, step: Drop) -> Done:
        try:
            self._on_gone(step.units, step.reason)
        except Exception:
            self.failed_callbacks += 1
            log.exception("on_gone failed units=%d reason=%s", len(step.units), step.reason)
        return Finished()

    def close(self) -> None:
        for route in self._routes.values():
            route.close()
