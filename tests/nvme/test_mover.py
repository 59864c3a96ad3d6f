"""The native way and the plain way of moving slots agree, also on what fails."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import xxhash

from tests.nvme.fakes import ArrayMemory, Moved, move
from tiermem.errors import PageLost
from tiermem.nvme.fsck import fsck
from tiermem.nvme.kept import Persist
from tiermem.nvme.mover import native_calls
from tiermem.nvme.posix import DiskThreads
from tiermem.nvme.records import Algorithm
from tiermem.nvme.slab import Slab
from tiermem.tier import Route, Slots

SLOT = 16 << 10
N = 48
EVERY = np.arange(N, dtype=np.int32)

pytestmark = pytest.mark.skipif(native_calls() is None, reason="no compiler, or xxhash hides it")


@pytest.fixture(params=[True, False], ids=["native", "plain"])
def native(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


def run(
    slab: Slab, native: bool, work: Callable[[Route, Route], Moved], memory: ArrayMemory
) -> Moved:
    # Fewer at the drive than threads: others look at what was moved.
    with DiskThreads(slab, threads=3, depth=1, native=native) as threads:
        return work(*threads.routes(memory))


def store(slab: Slab, native: bool, memory: ArrayMemory, disk: Slots) -> Moved:
    return run(slab, native, lambda out, back: move(out, EVERY[: len(disk)], disk), memory)


def load(slab: Slab, native: bool, memory: ArrayMemory, disk: Slots) -> Moved:
    return run(slab, native, lambda out, back: move(back, disk, EVERY[: len(disk)]), memory)


@pytest.mark.parametrize("shift", [0, 8])
def test_what_one_way_stores_the_other_way_loads(where: Path, native: bool, shift: int) -> None:
    memory = ArrayMemory(SLOT, N, shift=shift)
    original = memory.fill()
    disk = np.random.default_rng(0).permutation(EVERY)
    with Slab(where, SLOT, N, prewrite=False) as slab:
        assert store(slab, native, memory, disk).error is None
        memory.bytes[:] = 0
        assert load(slab, not native, memory, disk).error is None
        assert (memory.bytes == original).all()


def test_what_an_older_version_stored_is_readable_after_a_restart(
    where: Path, native: bool
) -> None:
    """Its checksums are over whole pages; records say so, and what is stored now has others."""
    memory = ArrayMemory(SLOT, N)
    original = memory.fill()
    keys = np.array([[slot + 1, 1] for slot in range(N)], np.uint64)
    nothing = np.zeros(N, np.uint32)
    with Slab(where, SLOT, N, persist=Persist("old"), prewrite=False) as slab:
        slab.algorithm = Algorithm.XXH3_64
        sequences = slab.begin_store(EVERY)
        for slot in EVERY.tolist():
            os.pwritev(slab.fd, [memoryview(memory.bytes[slot])], slab.offset(slot))
        whole = [[xxhash.xxh3_64_intdigest(page)] for page in original]
        slab.end_store(EVERY, sequences, np.array(whole, np.uint64))
        assert slab.record(EVERY, keys, nothing, nothing).all()
    with Slab(where, SLOT, N, persist=Persist("old"), prewrite=False) as slab:
        assert set(slab.algorithms(EVERY).tolist()) == {Algorithm.XXH3_64}
        memory.bytes[5] = 7
        assert store(slab, native, memory, EVERY[:6]).error is None
        assert set(slab.algorithms(EVERY[:6]).tolist()) == {Algorithm.XXH3_64_PIECES}
        memory.bytes[:] = 0
        assert load(slab, native, memory, EVERY).error is None
        original[5] = 7
        assert (memory.bytes == original).all()
        memory.bytes[9, 100] ^= 4
        os.pwritev(slab.fd, [memoryview(memory.bytes[9])], slab.offset(9))
        assert load(slab, native, memory, EVERY).failed == [9]
    (report,) = fsck(where)
    assert (report.readable, report.torn) == (N - 7, 1)  # six were stored anew, without a key


def test_checksums_are_the_same_both_ways(where: Path) -> None:
    memory = ArrayMemory(SLOT, N)
    memory.fill()
    with Slab(where, SLOT, 2 * N, prewrite=False) as slab:
        store(slab, True, memory, EVERY)
        store(slab, False, memory, EVERY + np.int32(N))
        assert (slab.expected(EVERY)[1] == slab.expected(EVERY + np.int32(N))[1]).all()


def test_a_torn_slot_in_a_group_fails_alone(where: Path, native: bool) -> None:
    memory = ArrayMemory(SLOT, N)
    original = memory.fill()
    with Slab(where, SLOT, N, prewrite=False) as slab:
        store(slab, native, memory, EVERY)
        junk = ArrayMemory(SLOT, 1)
        slab.io.pwrite(slab.fd, memoryview(junk.bytes[0])[:4096], slab.offset(20) + 8192)
        memory.bytes[:] = 0
        moved = load(slab, native, memory, EVERY)
        assert moved.failed == [20]
        assert isinstance(moved.error, PageLost)
        others = np.setdiff1d(EVERY, 20)
        assert (memory.bytes[others] == original[others]).all()


def test_a_short_file_fails_what_it_no_longer_holds(where: Path, native: bool) -> None:
    memory = ArrayMemory(SLOT, N)
    original = memory.fill()
    with Slab(where, SLOT, N, prewrite=False) as slab:
        store(slab, native, memory, EVERY)
        os.ftruncate(slab.fd, slab.offset(N - 5) + 4096)
        memory.bytes[:] = 0
        moved = load(slab, native, memory, EVERY)
        assert moved.failed == list(range(N - 5, N))
        assert (memory.bytes[: N - 5] == original[: N - 5]).all()


def test_reads_that_the_system_refuses_fail_with_its_errno(where: Path, native: bool) -> None:
    memory = ArrayMemory(SLOT, N)
    memory.fill()
    with Slab(where, SLOT, N, prewrite=False) as slab:
        store(slab, native, memory, EVERY)
        write_only = os.open("/dev/null", os.O_WRONLY)
        os.dup2(write_only, slab.fd)
        os.close(write_only)
        moved = load(slab, native, memory, EVERY)
        assert len(moved.failed) == N
        assert moved.errno == errno.EBADF


def test_a_store_that_cannot_be_written_latches_the_tier(where: Path, native: bool) -> None:
    memory = ArrayMemory(SLOT, N)
    with Slab(where, SLOT, N, prewrite=False) as slab:
        path = where / "other"
        path.touch()
        readonly = os.open(path, os.O_RDONLY)
        os.dup2(readonly, slab.fd)
        os.close(readonly)
        moved = store(slab, native, memory, EVERY)
        assert len(moved.failed) == N
        assert slab.failure is not None


def test_stores_wait_for_the_write_budget_and_are_counted(where: Path, native: bool) -> None:
    memory = ArrayMemory(SLOT, N)
    with Slab(where, SLOT, N, prewrite=False, write_budget=4 << 20) as slab:
        assert store(slab, native, memory, EVERY).error is None
        assert slab.statistics().written == slab.budget.spent == N * SLOT
        assert load(slab, native, memory, EVERY).error is None


def test_the_drive_is_left_after_every_kind_of_failure(where: Path, native: bool) -> None:
    memory = ArrayMemory(SLOT, N)
    original = memory.fill()
    with Slab(where, SLOT, N, prewrite=False) as slab:
        store(slab, native, memory, EVERY)
        size = os.fstat(slab.fd).st_size
        with DiskThreads(slab, threads=4, depth=1, native=native) as threads:
            _, back = threads.routes(memory)
            for _ in range(3):
                os.ftruncate(slab.fd, slab.offset(N - 5) + 4096)
                assert move(back, EVERY, EVERY).failed == list(range(N - 5, N))
            os.ftruncate(slab.fd, size)
            spared = os.dup(slab.fd)
            null = os.open("/dev/null", os.O_WRONLY)
            os.dup2(null, slab.fd)
            assert len(move(back, EVERY, EVERY).failed) == N
            os.dup2(spared, slab.fd)
            os.close(null)
            os.close(spared)
            memory.bytes[:] = 0
            some = EVERY[: N - 5]
            assert move(back, some, some).error is None
            assert (memory.bytes[some] == original[some]).all()
