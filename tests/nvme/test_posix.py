"""Routes to and from the slab: whole slots, verified on every load, failures that are told."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator
from concurrent.futures import CancelledError
from pathlib import Path

import numpy as np
import pytest

from tests.nvme.fakes import (
    LONG_S,
    ArrayMemory,
    FaultyIo,
    GatedStreams,
    ended,
    failing,
    interrupted_once,
    move,
    noting,
    shortened,
    slots,
)
from tiermem.errors import Closed, PageLost, TierFailed
from tiermem.nvme.mover import Batch, Mover
from tiermem.nvme.posix import DiskThreads
from tiermem.nvme.slab import Slab
from tiermem.tier import PASSED, Fence, Mask, Place

SLOT = 16 << 10
N = 64


@pytest.fixture
def io() -> FaultyIo:
    return FaultyIo()


@pytest.fixture
def slab(where: Path, io: FaultyIo) -> Iterator[Slab]:
    with Slab(where, SLOT, N, prewrite=False, io=io) as slab:
        yield slab


@pytest.fixture
def threads(slab: Slab) -> Iterator[DiskThreads]:
    with DiskThreads(slab, threads=4) as threads:
        yield threads


@pytest.fixture
def memory() -> ArrayMemory:
    return ArrayMemory(SLOT, N)


@pytest.mark.parametrize("shift", [0, 512, 3])
@pytest.mark.parametrize("place", [Place.HOST, Place.GPU])
def test_what_was_stored_comes_back_in_any_order(
    threads: DiskThreads, place: Place, shift: int
) -> None:
    memory = ArrayMemory(SLOT, N, place, shift)
    store, load = threads.routes(memory)
    assert (store.src, store.dst, load.src, load.dst) == (place, Place.NVME, Place.NVME, place)
    original = memory.fill()
    rng = np.random.default_rng(1)
    everything = np.arange(N, dtype=np.int32)
    disk = rng.permutation(everything)
    assert move(store, everything, disk).error is None
    memory.bytes[:] = 0
    back = rng.permutation(N).astype(np.int32)
    done = move(load, disk[back], everything)
    assert done.error is None
    assert done.failed == []
    assert (memory.bytes == original[back]).all()


def test_a_page_larger_than_the_claim_moves_whole(where: Path) -> None:
    big = 2 << 20
    memory = ArrayMemory(big, 6)
    with Slab(where, big, 6, prewrite=False) as slab, DiskThreads(slab, threads=3) as threads:
        store, load = threads.routes(memory)
        original = memory.fill()
        assert move(store, slots(0, 1, 2, 3, 4, 5), slots(5, 4, 3, 2, 1, 0)).error is None
        memory.bytes[:] = 0
        assert move(load, slots(5, 4, 3, 2, 1, 0), slots(0, 1, 2, 3, 4, 5)).error is None
        assert (memory.bytes == original).all()


def test_a_flipped_bit_on_disk_fails_that_entry_and_no_other(
    threads: DiskThreads, slab: Slab, memory: ArrayMemory
) -> None:
    store, load = threads.routes(memory)
    original = memory.fill()
    move(store, slots(0, 1, 2), slots(10, 11, 12))
    spoiled = ArrayMemory(SLOT, 1)
    spoiled.bytes[0] = original[1]
    spoiled.bytes[0, 777] ^= 4
    slab.io.pwrite(slab.fd, memoryview(spoiled.bytes[0]), slab.offset(11))
    done = move(load, slots(10, 11, 12), slots(20, 21, 22))
    assert isinstance(done.error, PageLost)
    assert done.failed == [1]
    assert (memory.bytes[20] == original[0]).all()
    assert (memory.bytes[22] == original[2]).all()
    assert threads.statistics().torn == 1


def test_a_slot_that_was_never_stored_cannot_be_loaded(
    threads: DiskThreads, memory: ArrayMemory
) -> None:
    _, load = threads.routes(memory)
    done = move(load, slots(7), slots(0))
    assert isinstance(done.error, PageLost)
    assert done.failed == [0]


def test_a_slot_that_was_forgotten_cannot_be_loaded(
    threads: DiskThreads, slab: Slab, memory: ArrayMemory
) -> None:
    store, load = threads.routes(memory)
    memory.fill()
    move(store, slots(0), slots(7))
    slab.forget(slots(7))
    assert isinstance(move(load, slots(7), slots(0)).error, PageLost)


def test_a_read_error_keeps_its_errno_fails_its_entry_and_later_reads_are_tried(
    threads: DiskThreads, io: FaultyIo, memory: ArrayMemory
) -> None:
    store, load = threads.routes(memory)
    original = memory.fill()
    move(store, slots(0), slots(0))
    io.on_read = failing(errno.EIO)
    done = move(load, slots(0), slots(1))
    assert done.errno == errno.EIO
    assert done.failed == [0]
    io.on_read = lambda n, offset: None
    assert move(load, slots(0), slots(1)).error is None
    assert (memory.bytes[1] == original[0]).all()
    assert threads.statistics().read_errors == 1


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EROFS])
def test_a_write_error_ends_stores_and_loads_go_on(
    threads: DiskThreads, slab: Slab, io: FaultyIo, memory: ArrayMemory, number: int
) -> None:
    store, load = threads.routes(memory)
    original = memory.fill()
    move(store, slots(0), slots(0))
    io.on_write = failing(number)
    done = move(store, slots(1), slots(1))
    assert done.errno == number
    assert done.failed == [0]
    io.on_write = lambda n, offset: None
    with pytest.raises(TierFailed, match="reopen"):
        store.submit(slots(2), slots(2), PASSED)
    assert slab.failure is not None
    assert slab.failure.errno == number
    assert move(load, slots(0), slots(5)).error is None
    assert (memory.bytes[5] == original[0]).all()
    assert isinstance(move(load, slots(1), slots(6)).error, PageLost)


def test_a_store_that_failed_over_an_older_one_never_serves_the_older_one(
    threads: DiskThreads, io: FaultyIo, memory: ArrayMemory
) -> None:
    store, load = threads.routes(memory)
    memory.fill()
    move(store, slots(0), slots(0))
    io.on_write = failing(errno.EIO)
    move(store, slots(1), slots(0))
    assert isinstance(move(load, slots(0), slots(3)).error, PageLost)


def test_short_reads_and_short_writes_are_gone_on_with(
    threads: DiskThreads, io: FaultyIo, memory: ArrayMemory
) -> None:
    io.on_read = io.on_write = shortened(4096)
    store, load = threads.routes(memory)
    original = memory.fill()
    assert move(store, slots(0, 1), slots(0, 1)).error is None
    assert move(load, slots(0, 1), slots(2, 3)).error is None
    assert (memory.bytes[2:4] == original[:2]).all()


def test_interrupted_calls_are_made_again(
    threads: DiskThreads, io: FaultyIo, memory: ArrayMemory
) -> None:
    io.on_read, io.on_write = interrupted_once(), interrupted_once()
    store, load = threads.routes(memory)
    original = memory.fill()
    assert move(store, slots(0), slots(0)).error is None
    assert move(load, slots(0), slots(1)).error is None
    assert (memory.bytes[1] == original[0]).all()


def test_a_file_that_was_cut_behind_our_back_is_a_miss(
    threads: DiskThreads, slab: Slab, memory: ArrayMemory
) -> None:
    store, load = threads.routes(memory)
    memory.fill()
    move(store, slots(0), slots(N - 1))
    os.ftruncate(slab.fd, slab.offset(N - 1) + 4096)
    done = move(load, slots(N - 1), slots(1))
    assert done.errno == errno.ENODATA
    assert done.failed == [0]


def test_a_store_waits_for_its_fence_before_it_reads(
    threads: DiskThreads, memory: ArrayMemory
) -> None:
    streams = GatedStreams()
    store, _ = threads.routes(memory, streams)
    _, load = threads.routes(memory)
    memory.fill()
    fence = Fence(((0, 7),))
    done = store.submit(slots(0), slots(0), fence)
    assert not done.ready()
    late = np.arange(SLOT, dtype=np.uint32).astype(np.uint8)
    memory.bytes[0] = late
    streams.gate.set()
    assert done.wait(LONG_S)
    assert streams.asked == [fence]
    assert move(load, slots(0), slots(1)).error is None
    assert (memory.bytes[1] == late).all()


def test_a_fence_without_streams_is_refused(threads: DiskThreads, memory: ArrayMemory) -> None:
    store, _ = threads.routes(memory)
    with pytest.raises(ValueError, match="no streams"):
        store.submit(slots(0), slots(0), Fence(((0, 1),)))


def test_a_load_overtakes_stores_that_wait(slab: Slab, io: FaultyIo, memory: ArrayMemory) -> None:
    order: list[str] = []
    started, gate = threading.Event(), threading.Event()

    def write(n: int, offset: int) -> None:
        started.set()
        assert gate.wait(LONG_S)
        order.append("store")

    with DiskThreads(slab, threads=1) as threads:
        store, load = threads.routes(memory)
        move(store, slots(0), slots(0))
        io.on_write = write
        io.on_read = noting(order, "load")
        first = store.submit(slots(1), slots(1), PASSED)
        assert started.wait(LONG_S)
        second = store.submit(slots(2), slots(2), PASSED)
        wanted = load.submit(slots(0), slots(5), PASSED)
        gate.set()
        assert all(done.wait(LONG_S) for done in (first, second, wanted))
    assert order == ["store", "load", "store"]


def test_cancelling_ends_what_no_thread_has_begun(
    slab: Slab, io: FaultyIo, memory: ArrayMemory
) -> None:
    started, gate = threading.Event(), threading.Event()

    def write(n: int, offset: int) -> None:
        started.set()
        assert gate.wait(LONG_S)

    io.on_write = write
    with DiskThreads(slab, threads=1) as threads:
        store, _ = threads.routes(memory)
        first = store.submit(slots(0), slots(0), PASSED)
        assert started.wait(LONG_S)
        second = store.submit(slots(1, 2), slots(1, 2), PASSED)
        assert second.cancel() == 2
        assert second.ready()
        assert isinstance(second.error, CancelledError)
        assert ended(second).failed == [0, 1]
        assert first.cancel() == 0
        gate.set()
        assert first.wait(LONG_S)
        assert first.error is None
        assert threads.statistics().cancelled == 2


def test_a_full_queue_blocks_the_submitter_until_there_is_room(
    slab: Slab, io: FaultyIo, memory: ArrayMemory
) -> None:
    started, gate, through = threading.Event(), threading.Event(), threading.Event()

    def write(n: int, offset: int) -> None:
        started.set()
        assert gate.wait(LONG_S)

    io.on_write = write
    with DiskThreads(slab, threads=1, queue_slots=2) as threads:
        store, _ = threads.routes(memory)
        dones = [store.submit(slots(0), slots(0), PASSED)]
        assert started.wait(LONG_S)
        dones.append(store.submit(slots(1, 2), slots(1, 2), PASSED))

        def third() -> None:
            dones.append(store.submit(slots(3), slots(3), PASSED))
            through.set()

        submitter = threading.Thread(target=third)
        submitter.start()
        assert threads.statistics().queued_stores == 2
        assert not through.is_set()
        gate.set()
        submitter.join(LONG_S)
        assert all(done.wait(LONG_S) for done in dones)


def test_closing_ends_every_done(slab: Slab, io: FaultyIo, memory: ArrayMemory) -> None:
    started, gate = threading.Event(), threading.Event()

    def write(n: int, offset: int) -> None:
        started.set()
        assert gate.wait(LONG_S)

    io.on_write = write
    threads = DiskThreads(slab, threads=1)
    store, load = threads.routes(memory)
    first = store.submit(slots(0), slots(0), PASSED)
    assert started.wait(LONG_S)
    second = store.submit(slots(1), slots(1), PASSED)
    closing = threading.Thread(target=threads.close)
    closing.start()
    assert second.wait(LONG_S)
    assert isinstance(second.error, Closed)
    gate.set()
    closing.join(LONG_S)
    assert first.ready()
    assert first.error is None
    with pytest.raises(Closed):
        load.submit(slots(0), slots(1), PASSED)


def test_a_closed_route_refuses_work_after_ending_what_it_had(
    threads: DiskThreads, memory: ArrayMemory
) -> None:
    store, _ = threads.routes(memory)
    done = store.submit(np.arange(N, dtype=np.int32), np.arange(N, dtype=np.int32), PASSED)
    store.close()
    assert done.ready()
    with pytest.raises(Closed):
        store.submit(slots(0), slots(0), PASSED)


def test_slots_of_another_size_are_refused(threads: DiskThreads) -> None:
    with pytest.raises(ValueError, match="slots of 4096 bytes"):
        threads.routes(ArrayMemory(4096, 2))


def test_many_submissions_from_many_threads_all_come_back(
    threads: DiskThreads, memory: ArrayMemory
) -> None:
    store, load = threads.routes(memory)
    original = memory.fill()
    wrong: list[int] = []

    def work(mine: np.ndarray) -> None:
        rng = np.random.default_rng(int(mine[0]))
        for _ in range(20):
            some = rng.permutation(mine)[:5].astype(np.int32)
            move(store, some, some)
            memory.bytes[some] = 0
            if move(load, some, some).error or (memory.bytes[some] != original[some]).any():
                wrong.append(int(mine[0]))

    workers = [threading.Thread(target=work, args=(np.arange(i, i + 16),)) for i in range(0, N, 16)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(LONG_S)
    assert wrong == []


class Crowd:
    """A fault that is none, but holds every call until `most` are in it, and counts them."""

    def __init__(self, most: int) -> None:
        self.inside = self.highest = 0
        self._most = most
        self._changed = threading.Condition()

    def __call__(self, n: int, offset: int) -> None:
        with self._changed:
            self.inside += 1
            self.highest = max(self.highest, self.inside)
            self._changed.notify_all()
            # The last few calls have nobody to wait for.
            self._changed.wait_for(lambda: self.highest >= self._most, LONG_S)
            self.inside -= 1


def test_no_more_than_depth_reads_and_writes_are_at_the_drive(
    slab: Slab, io: FaultyIo, memory: ArrayMemory
) -> None:
    everything = np.arange(N, dtype=np.int32)
    with DiskThreads(slab, depth=3) as threads:
        store, load = threads.routes(memory)
        io.on_write = Crowd(3)
        assert move(store, everything, everything).error is None
        io.on_read = Crowd(3)
        assert move(load, everything, everything).error is None
        found = threads.statistics()
        assert (found.load_depth, found.store_depth) == (3, 3)
    assert (io.on_write.highest, io.on_read.highest) == (3, 3)


@pytest.mark.parametrize("storing", [True, False])
def test_whatever_ends_the_look_at_what_was_moved_ends_its_transfer(
    slab: Slab, memory: ArrayMemory, storing: bool
) -> None:
    class Dazed(Mover):
        def finish(
            self, batch: Batch, entries: slice, moved: Mask, *, write: bool
        ) -> dict[int, Exception]:
            if write == storing:
                raise MemoryError("no room to compare them")
            return super().finish(batch, entries, moved, write=write)

    with DiskThreads(slab, threads=2, mover=Dazed) as threads:
        store, load = threads.routes(memory)
        stored = move(store, slots(0, 1), slots(1, 0))
        looked_at = stored if storing else move(load, slots(1, 0), slots(0, 1))
        assert isinstance(looked_at.error, MemoryError)
        assert looked_at.failed == [0, 1]
        # Its threads are still there, and a store that nobody looked at is nowhere recorded.
        again = move(load, slots(1, 0), slots(0, 1))
        assert isinstance(again.error, PageLost if storing else MemoryError)


@pytest.mark.parametrize(("depth", "most"), [(1, 8), (2, 4), (4, 2), (8, 2)])
def test_few_threads_claim_more_each_and_never_more_than_their_share(
    where: Path, depth: int, most: int
) -> None:
    """Slots of 2 MiB: 16 MiB for all threads together, or 4 MiB for each."""
    claims: list[int] = []

    class Noting(Mover):
        def transfer(self, batch: Batch, entries: slice, *, write: bool) -> Mask:
            claims.append(entries.stop - entries.start)
            return super().transfer(batch, entries, write=write)

    n, big = 16, 2 << 20
    memory, everything = ArrayMemory(big, n), np.arange(n, dtype=np.int32)
    with (
        Slab(where, big, n, prewrite=False) as slab,
        DiskThreads(slab, depth=depth, mover=Noting) as threads,
    ):
        store, load = threads.routes(memory)
        for route in (store, load):
            claims.clear()
            assert move(route, everything, everything).error is None
            assert sum(claims) == n
            assert max(claims) == most
            assert min(claims) >= 1


def test_without_settings_the_depth_starts_at_eight_and_stays_in_its_bounds(
    slab: Slab, memory: ArrayMemory
) -> None:
    everything = np.arange(N, dtype=np.int32)
    memory.fill()
    with DiskThreads(slab) as threads:
        found = threads.statistics()
        assert (found.load_depth, found.store_depth) == (8, 8)
        store, load = threads.routes(memory)
        move(store, everything, everything)
        for _ in range(50):
            dones = [load.submit(everything, everything, PASSED) for _ in range(8)]
            assert all(ended(done).error is None for done in dones)
        assert 2 <= threads.statistics().load_depth <= 32
