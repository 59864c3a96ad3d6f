"""GPU to NVMe and back through a ring of host slots, with copies that the test controls."""

from __future__ import annotations

import errno
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.nvme.fakes import LONG_S, ArrayMemory, FaultyIo, move, slots
from tiermem.errors import Closed, PageLost, TierFailed
from tiermem.nvme.bounce import BouncedRoute
from tiermem.nvme.posix import DiskThreads
from tiermem.nvme.slab import Slab
from tiermem.tier import PASSED, Done, Fence, Finished, Place, Slots

SLOT = 16 << 10
N = 40


class Copy:
    """A GPU<->host route of memory copies, done when it is submitted; notes fences and groups."""

    def __init__(self, src: ArrayMemory, dst: ArrayMemory) -> None:
        self.src, self.dst = src.place, dst.place
        self.source, self.target = src, dst
        self.fences: list[Fence] = []
        self.copied: list[int] = []
        self.fault: Exception | None = None

    def submit(self, src: Slots, dst: Slots, after: Fence) -> Done:
        if self.fault is not None:
            raise self.fault
        self.fences.append(after)
        self.copied += src.tolist()
        self.target.bytes[dst] = self.source.bytes[src]
        return Finished()

    def close(self) -> None:
        pass


class Setup:
    def __init__(self, where: Path, ring_slots: int) -> None:
        self.io = FaultyIo()
        self.slab = Slab(where, SLOT, N, prewrite=False, io=self.io)
        self.threads = DiskThreads(self.slab, threads=3)
        self.frames = ArrayMemory(SLOT, N, Place.GPU)
        self.up_ring = ArrayMemory(SLOT, ring_slots)
        self.down_ring = ArrayMemory(SLOT, ring_slots)
        self.d2h = Copy(self.frames, self.down_ring)
        self.h2d = Copy(self.up_ring, self.frames)
        self.store = BouncedRoute(self.d2h, self.threads.routes(self.down_ring)[0], self.down_ring)
        self.load = BouncedRoute(self.threads.routes(self.up_ring)[1], self.h2d, self.up_ring)

    def close(self) -> None:
        self.store.close()
        self.load.close()
        self.threads.close()
        self.slab.close()


@pytest.fixture(params=[1, 3, 8, 64])
def setup(where: Path, request: pytest.FixtureRequest) -> Iterator[Setup]:
    made = Setup(where, request.param)
    yield made
    made.close()


EVERY = np.arange(N, dtype=np.int32)


def test_pages_go_to_disk_and_come_back_in_any_order(setup: Setup) -> None:
    assert (setup.store.src, setup.store.dst) == (Place.GPU, Place.NVME)
    assert (setup.load.src, setup.load.dst) == (Place.NVME, Place.GPU)
    original = setup.frames.fill()
    rng = np.random.default_rng(3)
    disk = rng.permutation(EVERY)
    done = move(setup.store, EVERY, disk)
    assert done.error is None
    assert done.failed == []
    setup.frames.bytes[:] = 0
    back = rng.permutation(EVERY)
    assert move(setup.load, disk[back], EVERY).error is None
    assert (setup.frames.bytes == original[back]).all()


def test_the_fence_goes_to_the_leg_that_touches_the_frames(setup: Setup) -> None:
    fence = Fence(((0, 3),))
    move(setup.store, EVERY, EVERY, fence)
    move(setup.load, EVERY, EVERY, fence)
    assert set(setup.d2h.fences) == set(setup.h2d.fences) == {fence}


def test_a_torn_page_never_takes_the_second_leg(setup: Setup) -> None:
    setup.frames.fill()
    move(setup.store, EVERY, EVERY)
    junk = ArrayMemory(SLOT, 1)
    setup.io.pwrite(setup.slab.fd, memoryview(junk.bytes[0]), setup.slab.offset(17))
    before = setup.frames.bytes.copy()
    setup.h2d.copied.clear()
    done = move(setup.load, EVERY, EVERY)
    assert isinstance(done.error, PageLost)
    assert done.failed == [17]
    assert len(setup.h2d.copied) == N - 1
    assert (setup.frames.bytes == before).all()


def test_a_leg_that_refuses_fails_every_entry_and_the_ring_serves_on(setup: Setup) -> None:
    original = setup.frames.fill()
    setup.d2h.fault = TierFailed("link is down")
    done = move(setup.store, EVERY, EVERY)
    assert isinstance(done.error, TierFailed)
    assert len(done.failed) == N
    setup.d2h.fault = None
    assert move(setup.store, EVERY, EVERY).error is None
    setup.h2d.fault = TierFailed("link is down")
    assert move(setup.load, EVERY, EVERY).failed == EVERY.tolist()
    setup.h2d.fault = None
    assert move(setup.load, EVERY, EVERY).error is None
    assert (setup.frames.bytes == original).all()


def test_a_write_error_is_told_with_its_errno(setup: Setup) -> None:
    def fail(n: int, offset: int) -> None:
        raise OSError(errno.EIO, "bad sector")

    setup.io.on_write = fail
    done = move(setup.store, EVERY, EVERY)
    assert len(done.failed) == N
    assert setup.slab.failure is not None
    assert setup.slab.failure.errno == errno.EIO


def test_the_disk_reads_ahead_while_a_group_waits_for_the_link(where: Path) -> None:
    """Overlap: with the link held shut after one group, the disk fills the other groups."""
    setup = Setup(where, 8)
    try:
        setup.frames.fill()
        move(setup.store, EVERY, EVERY)
        read, gate, copying = [], threading.Event(), threading.Event()
        others = threading.Event()

        def count(n: int, offset: int) -> None:
            read.append(offset)
            if len(read) == 8:
                others.set()

        class Shut(Finished):
            def ready(self) -> bool:
                return gate.is_set()

            def wait(self, timeout_s: float | None = None) -> bool:
                return gate.wait(timeout_s)

        class ShutCopy(Copy):
            def submit(self, src: Slots, dst: Slots, after: Fence) -> Done:
                super().submit(src, dst, after)
                copying.set()
                return Shut()

        setup.io.on_read = count
        link = ShutCopy(setup.up_ring, setup.frames)
        load = BouncedRoute(setup.threads.routes(setup.up_ring)[1], link, setup.up_ring)
        done = load.submit(EVERY, EVERY, PASSED)
        assert copying.wait(LONG_S)
        assert others.wait(LONG_S), "the disk did not read ahead"
        assert not done.ready()
        gate.set()
        assert done.wait(LONG_S)
        assert done.error is None
        load.close()
    finally:
        setup.close()


def test_closing_ends_what_was_submitted_and_refuses_more(setup: Setup) -> None:
    done = setup.store.submit(EVERY, EVERY, PASSED)
    setup.store.close()
    assert done.ready()
    with pytest.raises(Closed):
        setup.store.submit(slots(0), slots(0), PASSED)


def test_a_route_that_does_not_lead_through_the_host_is_refused(setup: Setup) -> None:
    with pytest.raises(ValueError, match="host"):
        BouncedRoute(setup.h2d, setup.d2h, setup.up_ring)
