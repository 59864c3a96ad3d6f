"""A route between the GPU and the slab through a small ring of pinned host slots.

    load:   slab ──disk route──▶ ring ──host-to-GPU route──▶ frames
    store:  frames ──GPU-to-host route──▶ ring ──disk route──▶ slab

The ring is used in groups, in order: while one group crosses PCIe the next ones are on the disk,
so the whole runs at the pace of the slower of the two. Bytes that did not verify on the disk leg
never take the second leg.
"""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass

import numpy as np

from tiermem.errors import Closed
from tiermem.tier import PASSED, Done, Fence, Mask, Memory, Place, Route, Slots

GROUPS = 16
"""Parts of the ring that are filled and emptied on their own. With 64 slots of 2 MiB a load runs
at the drive's rate and a store at 87-91 % of it (H200 machine, 2026-11)."""


class Bounced:
    """The Done of one bounced submission."""

    def __init__(self) -> None:
        self._failed: Mask | None = None
        self._error: Exception | None = None
        self._ended = threading.Event()

    @property
    def error(self) -> Exception | None:
        return self._error if self._ended.is_set() else None

    @property
    def failed(self) -> Mask | None:
        return self._failed if self._ended.is_set() else None

    def ready(self) -> bool:
        return self._ended.is_set()

    def wait(self, timeout_s: float | None = None) -> bool:
        return self._ended.wait(timeout_s)

    def end(self, failed: Mask, error: Exception | None) -> None:
        self._failed = failed if failed.any() else None
        self._error = error
        self._ended.set()


@dataclass(slots=True, eq=False)
class _Job:
    src: Slots
    dst: Slots
    after: Fence
    done: Bounced
    failed: Mask
    error: Exception | None = None
    left: int = 0


@dataclass(slots=True)
class _Group:
    """Entries [start, stop) of a job, on some slots of the ring, on one of the two legs."""

    job: _Job
    start: int
    stop: int
    ring: Slots
    leg: Done
    alive: Slots


class BouncedRoute:
    """Composes two routes over a ring: src to ring by `first`, ring to dst by `second`."""

    def __init__(self, first: Route, second: Route, ring: Memory, *, queue: int = 64) -> None:
        """ring: host slots that nobody else uses, all ready; at least one. queue: submissions
        that may wait before `submit` blocks. Both routes are closed by whoever made them.
        """
        if first.dst is not Place.HOST or second.src is not Place.HOST or ring.ready < 1:
            raise ValueError("a bounced route leads through at least one ready host slot")
        self.src = first.src
        self.dst = second.dst
        self._first = first
        self._second = second
        slots = np.arange(ring.ready, dtype=np.int32)
        self._free = deque(np.array_split(slots, min(GROUPS, len(slots))))
        self._jobs: deque[_Job] = deque()
        self._queue = queue
        self._busy = False
        self._closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="tiermem-bounce", daemon=True)
        self._thread.start()

    def submit(self, src: Slots, dst: Slots, after: Fence) -> Bounced:
        """Copy slot src[i] to dst[i] once `after` has passed; see `Route.submit`."""
        n = len(src)
        job = _Job(src.copy(), dst.copy(), after, Bounced(), np.zeros(n, np.bool_), None, n)
        with self._changed:
            self._changed.wait_for(lambda: self._closed or len(self._jobs) < self._queue)
            if self._closed:
                raise Closed("nvme: submit on a closed route")
            self._jobs.append(job)
            self._changed.notify_all()
        return job.done

    def close(self) -> None:
        """Refuse new work and wait until what was submitted has ended."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join()

    # -- the pipeline, one thread ----------------------------------------------------------

    def _run(self) -> None:
        landing: deque[_Group] = deque()  # first leg
        leaving: deque[_Group] = deque()  # second leg
        job: _Job | None = None
        at = 0
        while True:
            if job is None:
                job, at = self._take(block=not landing and not leaving), 0
            if job is None and not landing and not leaving:
                return
            if job is not None and self._free:
                stop = min(at + len(self._free[0]), len(job.src))
                self._start(job, at, stop, landing)
                at = stop
                job = job if at < len(job.src) else None
            elif landing and (landing[0].leg.ready() or not leaving):
                self._pass_on(landing.popleft(), leaving)
            elif leaving and (leaving[0].leg.ready() or not landing):
                self._finish(leaving.popleft())
            else:
                # Neither end is ready: the disk is the slower one as a rule, wait for it briefly.
                leaving[0].leg.wait(0.0005) or landing[0].leg.wait(0.0005)

    def _take(self, block: bool) -> _Job | None:
        with self._changed:
            if block:
                self._changed.wait_for(lambda: self._closed or bool(self._jobs))
            if not self._jobs:
                return None
            self._changed.notify_all()
            return self._jobs.popleft()

    def _start(self, job: _Job, start: int, stop: int, landing: deque[_Group]) -> None:
        ring = self._free.popleft()
        part = np.arange(start, stop, dtype=np.int32)
        try:
            # A frame is touched by one leg only; the fence belongs to that one.
            after = job.after if self.src is Place.GPU else PASSED
            leg = self._first.submit(job.src[start:stop], ring[: len(part)], after)
        except Exception as error:  # the Done must end, whatever the leg raised
            self._free.append(ring)
            self._fail(job, part, error)
            self._settle(job, len(part))
            return
        landing.append(_Group(job, start, stop, ring, leg, part))

    def _pass_on(self, group: _Group, leaving: deque[_Group]) -> None:
        job = group.job
        self._collect(group)
        if not len(group.alive):
            self._free.append(group.ring)
            self._settle(job, group.stop - group.start)
            return
        after = job.after if self.dst is Place.GPU else PASSED
        try:
            ring = group.ring[group.alive - group.start]
            group.leg = self._second.submit(ring, job.dst[group.alive], after)
        except Exception as error:
            self._free.append(group.ring)
            self._fail(job, group.alive, error)
            self._settle(job, group.stop - group.start)
            return
        leaving.append(group)

    def _finish(self, group: _Group) -> None:
        self._collect(group)
        self._free.append(group.ring)
        self._settle(group.job, group.stop - group.start)

    def _collect(self, group: _Group) -> None:
        """Wait for the group's leg and take out of `alive` what failed on it."""
        group.leg.wait()
        if group.leg.error is None and group.leg.failed is None:
            return
        failed = group.leg.failed
        bad = np.ones(len(group.alive), np.bool_) if failed is None else failed
        error = group.leg.error or OSError("a copy failed")
        self._fail(group.job, group.alive[bad], error)
        group.alive = group.alive[~bad]

    def _fail(self, job: _Job, entries: Slots, error: Exception) -> None:
        job.failed[entries] = True
        job.error = job.error or error

    def _settle(self, job: _Job, n: int) -> None:
        job.left -= n
        if not job.left:
            job.done.end(job.failed, job.error)
