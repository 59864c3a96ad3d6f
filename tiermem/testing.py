"""Adversarial stand-ins for devices, tiers and routes, and contract suites for the real ones.

A fake route reads its source sometimes when a copy is submitted, sometimes when it completes and
sometimes half and half; copies finish late, out of order, and fail on demand, leaving garbage in
their destination. A fake window refuses what CUDA refuses. Kernels queued on a fake stream touch
pages when the stream gets there, so whoever hides, steals or reuses a page too early is found out.

Everything waits for `World.finish` and `Streams.advance`; nothing runs by itself, so a failing
run repeats. For policies there is `check_policy`, for routes `RouteContract`.
"""

from __future__ import annotations

import ctypes
import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from tiermem.errors import Closed, DriverError, TierFailed
from tiermem.policies.base import Candidates, Eviction
from tiermem.slices import Sliced
from tiermem.tier import (
    PASSED,
    Addresses,
    Done,
    Fence,
    Mask,
    Memory,
    Place,
    Route,
    Slots,
)

WORDS = 2
"""int64 words in a fake slot: enough for a copy to be torn."""
GARBAGE = -7


class FakeMemory:
    """Slots of two words each, in ordinary memory."""

    def __init__(self, place: Place, capacity: int) -> None:
        self.place = place
        self.slot_bytes = 8 * WORDS
        self.words: npt.NDArray[np.int64] = np.full((capacity, WORDS), GARBAGE, np.int64)

    @property
    def capacity(self) -> int:
        return len(self.words)

    @property
    def ready(self) -> int:
        return len(self.words)

    def addresses(self, slots: Slots) -> Addresses:
        start = self.words.ctypes.data
        return (start + slots.astype(np.int64) * self.slot_bytes).astype(np.uint64)

    @property
    def growing(self) -> bool:
        return False

    def resize(self, capacity: int) -> None:
        grown = np.full((capacity, WORDS), GARBAGE, np.int64)
        n = min(capacity, len(self.words))
        grown[:n] = self.words[:n]
        self.words = grown

    def close(self) -> None:
        pass


class ManualDone:
    """A Done that ends when the test says so; waiting for it makes the world move."""

    def __init__(self, world: World, run: Callable[[ManualDone], None], after: Fence) -> None:
        self.error: Exception | None = None
        self.failed: Mask | None = None
        self.after = after
        self._world = world
        self._run = run
        self._ended = False

    def ready(self) -> bool:
        return self._ended

    def wait(self, timeout_s: float | None = None) -> bool:
        self._world.finish(self)
        return True

    def end(self) -> None:
        if not self._ended:
            self._world.streams.reach(self.after)
            self._run(self)
            self._ended = True

    def order(self, stream: int | None) -> None:
        """Make a stream wait for this work; after a failure nothing more runs there."""
        if stream is None:
            self.wait()
            return

        def run() -> None:
            self._world.end(self)
            if self.error is not None:
                self._world.streams.dead.add(stream)

        self._world.streams.launch(stream, run)


class FakeStreams:
    """Streams on which kernels wait until `advance` runs them, in order."""

    def __init__(self, count: int = 2) -> None:
        self._queues: list[deque[tuple[int, Callable[[], None]]]] = [deque() for _ in range(count)]
        self._last = [0] * count
        self._passed = np.zeros(count, np.uint64)
        self.dead: set[int] = set()

    def launch(self, stream: int, kernel: Callable[[], None]) -> None:
        self._last[stream] += 1
        self._queues[stream].append((self._last[stream], kernel))

    def tick(self, stream: int | None) -> tuple[int, int] | None:
        return None if stream is None else (stream, self._last[stream])

    def passed(self) -> npt.NDArray[np.uint64]:
        return self._passed.copy()

    def advance(self, stream: int, kernels: int = 1) -> None:
        """Run the next kernels of a stream."""
        for _ in range(min(kernels, len(self._queues[stream]))):
            tick, kernel = self._queues[stream].popleft()
            if stream not in self.dead:
                kernel()
            self._passed[stream] = tick

    def reach(self, fence: Fence) -> None:
        for stream, tick in fence.ticks:
            while self._passed[stream] < tick:
                self.advance(stream)

    def wait(self, fence: Fence, timeout_s: float | None = None) -> bool:
        self.reach(fence)
        return True

    @property
    def queued(self) -> int:
        return sum(map(len, self._queues))


class World:
    """Work under way on fake tiers; finishes it in an order that a seeded generator picks."""

    def __init__(self, seed: int = 0, streams: int = 2) -> None:
        self.random = random.Random(seed)
        self.streams = FakeStreams(streams)
        self.pending: list[ManualDone] = []

    def submit(self, run: Callable[[ManualDone], None], after: Fence = PASSED) -> ManualDone:
        done = ManualDone(self, run, after)
        self.pending.append(done)
        return done

    def finish(self, done: ManualDone | None = None) -> None:
        """End one piece of work, and perhaps others before it."""
        if done is None:
            if not self.pending:
                return
            done = self.random.choice(self.pending)
        for other in self.random.sample(self.pending, self.random.randint(0, len(self.pending))):
            if other is done:
                break
            if not isinstance(other, _Ordered):
                self.end(other)
        self.end(done)

    def finish_all(self) -> None:
        while self.pending:
            self.finish()

    def end(self, done: ManualDone) -> None:
        done.end()
        if done in self.pending:
            self.pending.remove(done)


class FakeRoute:
    """Copies slots between fake memories.

    `fail(n)` makes the next n entries fail; `latched` makes the tier refuse from now on.
    """

    def __init__(self, world: World, src: FakeMemory, dst: FakeMemory) -> None:
        self.src = src.place
        self.dst = dst.place
        self._world = world
        self._memories = (src, dst)
        self._failing = 0
        self._closed = False
        self.latched = False

    def fail(self, entries: int) -> None:
        self._failing = entries

    def submit(self, src: Slots, dst: Slots, after: Fence) -> Done:
        if self._closed:
            raise Closed(f"route {self.src.name} to {self.dst.name} is closed")
        if self.latched:
            raise TierFailed(f"{self.dst.name}: failed; reopen it")
        assert len(src) == len(dst) > 0, "an empty copy, or unequal lengths"
        assert len(set(src.tolist())) == len(src), "a source slot twice"
        assert len(set(dst.tolist())) == len(dst), "a destination slot twice"
        src, dst = src.copy(), dst.copy()
        early = None
        passed = all(self._world.streams.passed()[s] >= t for s, t in after.ticks)
        if passed and self._world.random.random() < 0.67:
            early = self._memories[0].words[src].copy()
        torn = early is not None and self._world.random.random() < 0.5
        bad = min(self._failing, len(src))
        self._failing -= bad

        def run(done: ManualDone) -> None:
            late = self._memories[0].words[src]
            words = late.copy() if early is None else early
            if torn:
                words = np.column_stack([words[:, 0], late[:, 1]])
            if bad:
                words[:bad] = GARBAGE
                done.failed = np.arange(len(src)) < bad
                done.error = DriverError(f"{bad} of {len(src)} entries failed on purpose")
            self._memories[1].words[dst] = words

        return self._world.submit(run, after)

    def close(self) -> None:
        self._closed = True


class _Ordered(ManualDone):
    """Takes effect only after everything that the window was told before."""

    previous: _Ordered | None = None

    def end(self) -> None:
        if self.previous is not None:
            before, self.previous = self.previous, None
            self._world.end(before)
        super().end()


class FakeWindow:
    """Shows fake frames at addresses; refuses what CUDA refuses.

    shown: address to frame; host slot s, shown in place, is -1 - s.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self._last: _Ordered | None = None
        self.shown: dict[int, int] = {}
        self.failing = False

    def show(self, addresses: Addresses, frames: Slots) -> Done:
        pairs = list(zip(addresses.tolist(), frames.tolist(), strict=True))

        def run(done: ManualDone) -> None:
            taken = [a for a, _ in pairs if a in self.shown]
            if taken or self.failing:
                done.error = DriverError(f"show: {len(taken)} addresses show something already")
            else:
                self.shown.update(pairs)

        return self._submit(run)

    def show_in_place(self, addresses: Addresses, slots: Slots) -> Done:
        return self.show(addresses, -1 - slots)

    def hide(self, addresses: Addresses) -> Done:
        wanted = addresses.tolist()

        def run(done: ManualDone) -> None:
            absent = [a for a in wanted if a not in self.shown]
            if absent:
                done.error = DriverError(f"hide: {len(absent)} addresses show nothing")
            else:
                for address in wanted:
                    del self.shown[address]

        return self._submit(run)

    def _submit(self, run: Callable[[ManualDone], None]) -> Done:
        done = _Ordered(self._world, run, PASSED)
        done.previous = self._last
        self._last = done
        self._world.pending.append(done)
        return done


class DelayedRoute:
    """Wraps a real route: the Done is ready only after `release`, the bytes when they will."""

    def __init__(self, route: Route) -> None:
        self.src, self.dst = route.src, route.dst
        self._route = route
        self._held: list[_HeldDone] = []

    def submit(self, src: Slots, dst: Slots, after: Fence) -> Done:
        held = _HeldDone(self._route.submit(src, dst, after))
        self._held.append(held)
        return held

    @property
    def held(self) -> int:
        """Submissions that wait for `release`."""
        return len(self._held)

    def release(self) -> None:
        for held in self._held:
            held.let_go = True
        self._held.clear()

    def close(self) -> None:
        self.release()
        self._route.close()


@dataclass(slots=True)
class _HeldDone:
    done: Done
    let_go: bool = False

    @property
    def error(self) -> Exception | None:
        return self.done.error

    @property
    def failed(self) -> Mask | None:
        return self.done.failed

    def ready(self) -> bool:
        return self.let_go and self.done.ready()

    def wait(self, timeout_s: float | None = None) -> bool:
        return self.let_go and self.done.wait(timeout_s)


class LateRoute:
    """Copies each slice when somebody is made to wait for it, and not before.

    So whoever reads part of a page without waiting for it finds what was there.
    """

    def __init__(self, source: Memory, destination: Memory, slices: int = 2) -> None:
        self.src, self.dst = source.place, destination.place
        self._source = source
        self._destination = destination
        self._slices = slices
        self._closed = False

    def submit(self, src: Slots, dst: Slots, after: Fence) -> Sliced:
        if self._closed:
            raise Closed("late route: closed")
        slot_bytes = min(self._source.slot_bytes, self._destination.slot_bytes)
        firsts = [slot_bytes * i // self._slices for i in range(self._slices)]
        starts, ends = self._source.addresses(src), self._destination.addresses(dst)
        slices: list[_LateSlice] = []
        for first, end in zip(firsts, [*firsts[1:], slot_bytes], strict=True):
            before = slices[-1] if slices else None
            slices.append(_LateSlice(starts.tolist(), ends.tolist(), first, end, before))
        return Sliced(firsts, slices)

    def close(self) -> None:
        self._closed = True


@dataclass(slots=True)
class _LateSlice:
    starts: list[int]
    ends: list[int]
    first: int
    end: int
    before: _LateSlice | None
    there: bool = False
    error: Exception | None = None
    failed: Mask | None = None

    def ready(self) -> bool:
        return self.there

    def wait(self, timeout_s: float | None = None) -> bool:
        if self.before is not None:
            self.before.wait()
        if not self.there:
            for start, end in zip(self.starts, self.ends, strict=True):
                ctypes.memmove(end + self.first, start + self.first, self.end - self.first)
            self.there = True
        return True

    def order(self, stream: int | None) -> None:
        """For streams that no test holds back: what is queued on them next is behind it."""
        self.wait()


class FailingRoute:
    """Wraps a real route: submissions fail while `failing` is set; nothing is copied then."""

    def __init__(self, route: Route) -> None:
        self.src, self.dst = route.src, route.dst
        self._route = route
        self.failing = False

    def submit(self, src: Slots, dst: Slots, after: Fence) -> Done:
        if self.failing:
            raise TierFailed(f"{self.src.name} to {self.dst.name}: failing on purpose")
        return self._route.submit(src, dst, after)

    def close(self) -> None:
        self._route.close()


class RouteContract:
    """What every route promises. Subclass in a test module and implement `make`."""

    def make(self) -> tuple[Memory, Memory, Route, Callable[[], None]]:
        """(source, destination, route between them, finish): at least 8 slots each.

        finish: lets work that has been submitted end, for routes that do not run by themselves.
        """
        raise NotImplementedError

    def test_copies_each_slot_to_its_destination(self) -> None:
        src, dst, route, finish = self.make()
        slots, others = np.array([3, 0, 5], np.int32), np.array([1, 7, 2], np.int32)
        before = _peek(dst, np.array([4], np.int32))
        fill = _poke(src, slots)
        done = route.submit(slots, others, PASSED)
        finish()
        assert done.wait(30.0)
        assert done.ready()
        assert done.error is None
        assert done.failed is None
        assert (_peek(dst, others) == fill).all()
        assert (_peek(dst, np.array([4], np.int32)) == before).all()
        route.close()

    def test_refuses_work_after_close_and_closes_twice(self) -> None:
        _, _, route, finish = self.make()
        slot = np.array([0], np.int32)
        done = route.submit(slot, slot, PASSED)
        finish()
        route.close()
        route.close()
        assert done.wait(30.0)
        try:
            route.submit(slot, slot, PASSED)
        except (Closed, TierFailed):
            return
        raise AssertionError("a closed route took work")


def _poke(memory: Memory, slots: Slots) -> npt.NDArray[np.uint8]:
    rng = np.random.default_rng(int(slots[0]))
    fill = rng.integers(0, 256, (len(slots), memory.slot_bytes), dtype=np.uint8)
    for address, row in zip(memory.addresses(slots).tolist(), fill, strict=True):
        _bytes_at(address, memory.slot_bytes)[:] = row
    return fill


def _peek(memory: Memory, slots: Slots) -> npt.NDArray[np.uint8]:
    rows = [_bytes_at(a, memory.slot_bytes).copy() for a in memory.addresses(slots).tolist()]
    return np.stack(rows)


def _bytes_at(address: int, nbytes: int) -> npt.NDArray[np.uint8]:
    view: npt.NDArray[np.uint8] = np.ctypeslib.as_array(
        (ctypes.c_uint8 * nbytes).from_address(address)
    )
    return view


@dataclass
class SomeCandidates:
    """Candidates for tests of policies: a set of units that may leave."""

    units: set[int] = field(default_factory=set)

    def keep(self, units: npt.NDArray[np.int32]) -> Mask:
        return np.array([u in self.units for u in units.tolist()], np.bool_)

    def all(self) -> npt.NDArray[np.int32]:
        return np.array(sorted(self.units), np.int32)


def check_answer(candidates: Candidates, answer: npt.NDArray[np.int32], n: int) -> None:
    """Assert that a policy's answer keeps the rules that the pager checks."""
    assert len(answer) <= n, f"{len(answer)} victims, {n} asked for"
    assert len(set(answer.tolist())) == len(answer), "a unit twice"
    assert candidates.keep(answer).all(), "a unit that may not leave"
    if len(answer) < n:
        assert len(answer) == len(candidates.all()), "candidates are left over"


def check_policy(make: Callable[[int], Eviction], seed: int = 0, steps: int = 300) -> None:
    """Drive a policy with random facts and check every answer; for tests of new policies."""
    rng = random.Random(seed)
    capacity = 16
    policy = make(capacity)
    held: list[int] = []
    spare = list(range(64))
    for now in range(steps):
        if spare and rng.random() < 0.5 and len(held) < capacity:
            unit = spare.pop(rng.randrange(len(spare)))
            policy.inserted(_ids([unit]), _ids([-1]), _ids([0]), None, now)
            held.append(unit)
        elif held and rng.random() < 0.5:
            policy.accessed(_ids([rng.choice(held)]), now)
        elif held:
            candidates = SomeCandidates(set(rng.sample(held, rng.randint(0, len(held)))))
            n = rng.randint(1, 4)
            answer = policy.victims(candidates, n, now)
            check_answer(candidates, answer, n)
            for unit in answer.tolist():
                policy.removed(_ids([unit]), now)
                held.remove(unit)
                spare.append(unit)


def _ids(units: Sequence[int]) -> npt.NDArray[np.int32]:
    return np.array(units, np.int32)
