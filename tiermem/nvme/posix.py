"""Routes between memory and the slab: O_DIRECT reads and writes in long-lived threads.

One `DiskThreads` serves all routes of a slab. A submission is a list of slots; threads claim a few
of them at a time, loads before stores, so one submission is spread over all threads and a demand
load overtakes the stores that wait. A store writes its source and hashes it; a load reads and
hashes what arrived: an entry whose bytes are not those that were stored is failed, never data. The
thread that was at the drive goes straight back to it if another is free to hash.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from concurrent.futures import CancelledError
from dataclasses import dataclass, field

import numpy as np

from tiermem.errors import Closed, PageLost
from tiermem.nvme.depth import DepthClimb
from tiermem.nvme.mover import Batch, Mover
from tiermem.nvme.slab import Slab
from tiermem.tier import Fence, Mask, Memory, Place, Slots, Streams

DEPTH = 8
LOWEST, HIGHEST = 2, 32
"""Slots at the drive in each direction: to begin with, and the bounds that it is adapted within."""
SPARE = 2
"""Threads beyond those at the drive, which hash, settle and claim meanwhile."""
QUEUE_SLOTS = 4096
CLAIM_BYTES = 4 << 20
"""What a thread takes at once, at most. Coming back into the interpreter after it costs 5 ms beside
a busy Python thread, whatever its size; a load that arrives meanwhile waits for it."""
HELD_BYTES = 16 << 20
"""What all threads at the drive take at least: few of them claim more each. Between two claims of
a thread the drive has one less to do; at depth 1, with 4 MiB, that cost a write 22-34 % of its rate
on a busy machine and 5 % on a quiet one (2-core, beside a plain loop of pwrite, 2026-11)."""


@dataclass(frozen=True, slots=True)
class DiskStatistics:
    """What the threads have done since they started, in slots, bytes and busy microseconds."""

    loaded: int = 0
    stored: int = 0
    load_us: float = 0.0
    store_us: float = 0.0
    torn: int = 0
    read_errors: int = 0
    write_errors: int = 0
    cancelled: int = 0
    queued_loads: int = 0
    queued_stores: int = 0
    slot_bytes: int = 0
    load_depth: int = 0
    """Reads at the drive at most, as it is now; store_depth likewise writes."""
    store_depth: int = 0


class Transfer:
    """The Done of one submission to the disk threads."""

    def __init__(self, n: int, threads: DiskThreads) -> None:
        self._failed: Mask | None = None
        self._error: Exception | None = None
        self._n = n
        self._left = n
        self._threads = threads
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

    def cancel(self) -> int:
        """Fail the entries that no thread has begun (CancelledError); how many there were."""
        return self._threads.cancel(self)

    def end(self, entries: slice, errors: dict[int, Exception]) -> None:
        """These entries have ended, some with an error. Called under the threads' lock."""
        if errors:
            if self._failed is None:
                self._failed = np.zeros(self._n, np.bool_)
            self._failed[list(errors)] = True
            self._error = self._error or next(iter(errors.values()))
        self._left -= entries.stop - entries.start
        if not self._left:
            self._ended.set()


@dataclass(slots=True, eq=False)
class _Job:
    """One submission: what it moves, for whom, and how far the threads have come with it."""

    route: PosixRoute
    batch: Batch
    after: Fence
    done: Transfer
    claimed: int = 0

    @property
    def unclaimed(self) -> int:
        return len(self.batch.slots) - self.claimed


@dataclass(slots=True)
class _Lane:
    """Loads or stores: what waits, how many threads are at the drive, and what they have done.

    depth: threads that may be at the drive, up to `most`; climb: what adapts it.
    """

    storing: bool
    most: int
    depth: int
    climb: DepthClimb | None = None
    jobs: deque[_Job] = field(default_factory=deque)
    waiting: int = 0
    running: int = 0
    slots: int = 0
    busy_s: float = 0.0
    errors: int = 0

    def adapt(self, slots: int, alone: bool) -> bool:
        """Slots have moved, with others waiting or not. True if more threads may be at it now."""
        if self.climb is None or not self.climb.note(slots, alone and self.waiting > 0):
            return False
        before, self.depth = self.depth, min(self.most, self.climb.depth)
        return self.depth > before


@dataclass(slots=True)
class _Claim:
    """Entries of a job in the hands of a thread; `moved` says what is left to be looked at."""

    lane: _Lane
    job: _Job
    entries: slice
    moved: Mask | None = None
    busy_s: float = 0.0

    @property
    def size(self) -> int:
        return int(self.entries.stop - self.entries.start)

    def all_failed(self, error: Exception) -> dict[int, Exception]:
        """Each entry to this error."""
        return dict.fromkeys(range(self.entries.start, self.entries.stop), error)


class DiskThreads:
    """The threads and the two bounded queues that all routes of one slab share."""

    def __init__(
        self,
        slab: Slab,
        *,
        threads: int | None = None,
        depth: int | None = None,
        queue_slots: int = QUEUE_SLOTS,
        native: bool | None = None,
        mover: type[Mover] = Mover,
    ) -> None:
        """depth: reads at the drive at most, and writes; None: adapted to what brings a gain.
        threads: slots in hand at most, by default two more than are at the drive; if they are
        given without a depth, all of them may be at the drive. One thread is kept from stores,
        and all but one while loads run. queue_slots: entries that may wait in each direction
        before `submit` blocks. native: move groups without the interpreter lock; None: where that
        works. mover: what each thread moves slots with.
        """
        self.slab = slab
        self._queue_slots = queue_slots
        self._lock = threading.Lock()
        self._work = threading.Condition(self._lock)  # threads wait here
        self._room = threading.Condition(self._lock)  # submitters and closers wait here
        adapted = threads is None and depth is None
        if threads is None:
            threads = (HIGHEST if depth is None else depth) + SPARE
            depth = DEPTH if depth is None else depth
        depth = threads if depth is None else min(depth, threads)
        most = max(1, threads - 1)
        self._loads = _Lane(False, threads, depth)
        self._stores = _Lane(True, most, min(depth, most))
        if adapted:
            self._loads.climb = DepthClimb(depth, LOWEST, HIGHEST)
        if adapted and slab.budget.bytes_per_s is None:
            # A budget, not the drive, decides how fast stores go: their rate teaches nothing.
            self._stores.climb = DepthClimb(depth, LOWEST, HIGHEST)
        self._checks: deque[_Claim] = deque()  # at the drive no more, and not looked at yet
        self._sleeping = 0
        self._torn = self._cancelled = 0
        self._closed = False
        self._native = native
        self._mover = mover
        self._threads = [
            threading.Thread(target=self._run, name=f"tiermem-disk-{i}", daemon=True)
            for i in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    def routes(
        self, memory: Memory, streams: Streams | None = None
    ) -> tuple[PosixRoute, PosixRoute]:
        """(memory to NVMe, NVMe to memory). streams: what the fences of submissions refer to."""
        place = memory.place
        return (
            PosixRoute(self, memory, place, Place.NVME, streams),
            PosixRoute(self, memory, Place.NVME, place, streams),
        )

    def submit(self, job: _Job, storing: bool) -> None:
        """Queue a job; blocks while its queue is full. Raises Closed."""
        n = len(job.batch.slots)
        lane = self._stores if storing else self._loads
        with self._lock:
            self._room.wait_for(
                lambda: self._closed or not lane.waiting or lane.waiting + n <= self._queue_slots
            )
            if self._closed:
                raise Closed("nvme: submit after close")
            lane.jobs.append(job)
            lane.waiting += n
            self._work.notify(min(n, max(0, lane.depth - lane.running)))

    def cancel(self, done: Transfer) -> int:
        """Fail what no thread has begun of this submission; how many entries that were."""
        with self._lock:
            for lane in (self._loads, self._stores):
                for job in lane.jobs:
                    if job.done is done:
                        lane.jobs.remove(job)
                        return self._drop(lane, job, CancelledError("cancelled before it began"))
            return 0

    def statistics(self) -> DiskStatistics:
        with self._lock:
            return DiskStatistics(
                loaded=self._loads.slots,
                stored=self._stores.slots,
                load_us=self._loads.busy_s * 1e6,
                store_us=self._stores.busy_s * 1e6,
                torn=self._torn,
                read_errors=self._loads.errors,
                write_errors=self._stores.errors,
                cancelled=self._cancelled,
                queued_loads=self._loads.waiting,
                queued_stores=self._stores.waiting,
                slot_bytes=self.slab.slot_bytes,
                load_depth=self._loads.depth,
                store_depth=self._stores.depth,
            )

    def close(self) -> None:
        """Fail what waits, end what runs, end the threads; every Done handed out ends."""
        with self._lock:
            if not self._closed:
                self._closed = True
                for lane in (self._loads, self._stores):
                    while lane.jobs:
                        self._drop(lane, lane.jobs.popleft(), Closed("nvme: closed while queued"))
                self._work.notify_all()
        for thread in self._threads:
            thread.join()

    def __enter__(self) -> DiskThreads:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # -- the threads -----------------------------------------------------------------------

    def _run(self) -> None:
        """A thread's life: claim some entries of a job and move them, or look at moved ones."""
        mover = self._mover(self.slab, native=self._native)
        while (claim := self._next()) is not None:
            began = time.perf_counter()
            errors: dict[int, Exception] | None = None
            if claim.moved is None:
                errors = self._move(mover, claim)
                claim.busy_s = time.perf_counter() - began
                if self._leave_drive(claim, done=errors is not None):
                    continue
                began = time.perf_counter()
            if errors is None:
                errors = self._look_at(mover, claim)
            self._settle(claim, errors, time.perf_counter() - began)

    def _move(self, mover: Mover, claim: _Claim) -> dict[int, Exception] | None:
        """Move a claim; entry to error if that ended it, None if it is left to be looked at."""
        job, write = claim.job, claim.lane.storing
        try:
            job.route.wait_for(job.after)
            claim.moved = mover.transfer(job.batch, claim.entries, write=write)
        except Exception as error:  # every transfer ends, whatever ended it
            return claim.all_failed(error)
        if claim.moved.all():
            return None
        # What is left needs the drive again, so this thread keeps its place there.
        return self._look_at(mover, claim)

    def _look_at(self, mover: Mover, claim: _Claim) -> dict[int, Exception]:
        """Check or record what a claim moved, and move what is left of it; entry to error."""
        assert claim.moved is not None
        batch, write = claim.job.batch, claim.lane.storing
        try:
            return mover.finish(batch, claim.entries, claim.moved, write=write)
        except Exception as error:  # as above: a thread that died here would leave its Done open
            return claim.all_failed(error)

    def _leave_drive(self, claim: _Claim, *, done: bool) -> bool:
        """Let another thread to the drive. True if somebody else will look at what was moved."""
        with self._lock:
            lane = claim.lane
            lane.running -= 1
            other = self._stores if lane is self._loads else self._loads
            more = lane.adapt(claim.size, alone=not other.running)
            if more or (lane is self._loads and not lane.running and self._stores.jobs):
                # The depth of these, or of stores, has just been raised.
                self._work.notify(max(self._loads.depth, self._stores.depth))
            if done or self._sleeping <= len(self._checks):
                return False
            self._checks.append(claim)
            self._work.notify()
            return True

    def _next(self) -> _Claim | None:
        with self._lock:
            while True:
                loads, stores = self._loads, self._stores
                if loads.jobs and loads.running < loads.depth:
                    return self._claim_from(loads)
                # One thread goes on storing while loads run, or full tiers would never drain.
                limit = 1 if loads.running else stores.depth
                wait_s: float | None = None
                if stores.jobs and stores.running < limit:
                    wait_s = self.slab.budget.take(self._size(stores) * self.slab.slot_bytes)
                    if not wait_s:
                        return self._claim_from(stores)
                if self._checks:
                    return self._checks.popleft()
                if self._closed:
                    return None
                self._sleeping += 1
                self._work.wait(wait_s)
                self._sleeping -= 1

    def _claim_from(self, lane: _Lane) -> _Claim:
        job, n = lane.jobs[0], self._size(lane)
        entries = slice(job.claimed, job.claimed + n)
        job.claimed += n
        lane.waiting -= n
        lane.running += 1
        if not job.unclaimed:
            lane.jobs.popleft()
        return _Claim(lane, job, entries)

    def _size(self, lane: _Lane) -> int:
        """Entries to claim: a share at most, so that the last ones of a job end together."""
        most = max(1, max(CLAIM_BYTES, HELD_BYTES // lane.depth) // self.slab.slot_bytes)
        return min(most, -(-lane.jobs[0].unclaimed // lane.depth))

    def _settle(self, claim: _Claim, errors: dict[int, Exception], took_s: float) -> None:
        lane, job = claim.lane, claim.job
        with self._lock:
            lane.busy_s += claim.busy_s + took_s
            lane.slots += claim.size - len(errors)
            lane.errors += sum(isinstance(e, OSError) for e in errors.values())
            self._torn += sum(isinstance(e, PageLost) for e in errors.values())
            job.route.outstanding -= claim.size
            job.done.end(claim.entries, errors)
            self._room.notify_all()

    def _drop(self, lane: _Lane, job: _Job, error: Exception) -> int:
        """Fail the unclaimed entries of a job that is no longer queued."""
        entries = slice(job.claimed, len(job.batch.slots))
        n = entries.stop - entries.start
        lane.waiting -= n
        self._cancelled += n
        job.route.outstanding -= n
        job.done.end(entries, dict.fromkeys(range(entries.start, entries.stop), error))
        self._room.notify_all()
        return n

    def begin(self, route: PosixRoute, n: int) -> None:
        with self._lock:
            route.outstanding += n

    def wait_for(self, route: PosixRoute) -> None:
        """Block until nothing of this route is queued or running."""
        with self._lock:
            self._room.wait_for(lambda: not route.outstanding)


class PosixRoute:
    """Moves whole slots between a memory and the slab, in one direction."""

    def __init__(
        self,
        threads: DiskThreads,
        memory: Memory,
        src: Place,
        dst: Place,
        streams: Streams | None = None,
    ) -> None:
        """streams: who knows whether a fence has passed; without it only passed fences come."""
        if memory.slot_bytes != threads.slab.slot_bytes:
            raise ValueError(
                f"slots of {memory.slot_bytes} bytes cannot move to slots of "
                f"{threads.slab.slot_bytes}"
            )
        self.src = src
        self.dst = dst
        self.outstanding = 0
        self._threads = threads
        self._memory = memory
        self._streams = streams
        self._closed = False

    def submit(self, src: Slots, dst: Slots, after: Fence) -> Transfer:
        """Copy whole slots once `after` has passed; see `Route.submit`.

        Blocks while more than `queue_slots` entries wait in this direction. Raises TierFailed for
        a store after a failed write; loads are tried whatever happened before.
        """
        if self._closed:
            raise Closed("nvme: submit on a closed route")
        if after.ticks and self._streams is None:
            raise ValueError("a fence was given to a route that knows no streams")
        storing = self.dst is Place.NVME
        memory_slots, disk_slots = (src, dst) if storing else (dst, src)
        slab, n = self._threads.slab, len(src)
        if storing:
            sequences = slab.begin_store(disk_slots)
            checksums = np.zeros((n, slab.checksum_words), np.uint64)
            algorithms = np.full(n, slab.algorithm, np.uint8)
        else:
            sequences, checksums = slab.expected(disk_slots)
            algorithms = slab.algorithms(disk_slots)
        done = Transfer(n, self._threads)
        addresses = self._memory.addresses(memory_slots)
        batch = Batch(disk_slots.copy(), addresses, sequences, checksums, algorithms)
        job = _Job(self, batch, after, done)
        self._threads.begin(self, n)
        try:
            self._threads.submit(job, storing)
        except Closed:
            self._threads.begin(self, -n)
            raise
        return done

    def wait_for(self, fence: Fence) -> None:
        """Block until the fence has passed. Called by a disk thread."""
        if fence.ticks and self._streams is not None:
            self._streams.wait(fence)

    def close(self) -> None:
        """Refuse new work and wait until what was submitted has ended."""
        self._closed = True
        self._threads.wait_for(self)
