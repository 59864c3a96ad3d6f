"""The direct route against a file that reads and writes plain memory; and the probe's child."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import xxhash

from tests.nvme.fakes import ArrayMemory, GatedStreams, ended, move, slots
from tiermem.errors import Closed, ConfigError, PageLost, TierFailed
from tiermem.nvme.crypt import Cipher
from tiermem.nvme.digest import digest
from tiermem.nvme.files import memory_at
from tiermem.nvme.kvikio import KvikioRoute, Pending, Probe, check_digest, probe
from tiermem.nvme.posix import DiskThreads
from tiermem.nvme.records import Algorithm
from tiermem.nvme.slab import Slab, Words
from tiermem.tier import PASSED, Addresses, Fence, Place

SLOT = 16 << 10
N = 16
EVERY = np.arange(N, dtype=np.int32)


class Outcome:
    def __init__(self, moved: int | RuntimeError) -> None:
        self.moved = moved

    def get(self) -> int:
        if isinstance(self.moved, RuntimeError):
            raise self.moved
        return self.moved


class PlainFile:
    """What kvikio does, on host memory: errors are RuntimeErrors without an errno."""

    def __init__(self, slab: Slab) -> None:
        self.slab = slab
        self.broken = False

    def pread(self, address: int, nbytes: int, offset: int) -> Pending:
        if self.broken:
            return Outcome(RuntimeError("cuFile: I/O error"))
        return Outcome(os.preadv(self.slab.fd, [memory_at(address, nbytes)], offset))

    def pwrite(self, address: int, nbytes: int, offset: int) -> Pending:
        if self.broken:
            raise RuntimeError("cuFile: I/O error")
        return Outcome(os.pwritev(self.slab.fd, [memory_at(address, nbytes)], offset))

    def close(self) -> None:
        pass


class PlainDigest:
    """What a device does, on host memory."""

    def __call__(self, addresses: Addresses) -> Words:
        return np.array([digest(memory_at(int(a), SLOT)) for a in addresses], np.uint64)

    def close(self) -> None:
        pass


class OtherDigest(PlainDigest):
    """A device that computes something else."""

    def __call__(self, addresses: Addresses) -> Words:
        return super().__call__(addresses) ^ np.uint64(1)


class Setup:
    def __init__(self, where: Path, streams: GatedStreams | None = None) -> None:
        self.slab = Slab(where, SLOT, N, prewrite=False)
        self.file = PlainFile(self.slab)
        self.frames = ArrayMemory(SLOT, N, Place.GPU)
        ends = (Place.GPU, Place.NVME)
        self.threads = DiskThreads(self.slab)
        other = self.threads.routes(self.frames)[1]
        computes = PlainDigest()
        self.store = KvikioRoute(self.file, self.slab, self.frames, *ends, computes, streams)
        self.load = KvikioRoute(
            self.file, self.slab, self.frames, *ends[::-1], computes, other=other
        )

    def close(self) -> None:
        self.store.close()
        self.load.close()
        self.threads.close()
        self.slab.close()


@pytest.fixture
def setup(where: Path) -> Iterator[Setup]:
    made = Setup(where)
    yield made
    made.close()


def test_pages_come_back_and_the_posix_route_agrees_on_their_checksums(setup: Setup) -> None:
    original = setup.frames.fill()
    assert move(setup.store, EVERY, EVERY[::-1].copy()).error is None
    setup.frames.bytes[:] = 0
    assert move(setup.load, EVERY[::-1].copy(), EVERY).error is None
    assert (setup.frames.bytes == original).all()
    host = ArrayMemory(SLOT, N)
    with DiskThreads(setup.slab) as threads:
        assert move(threads.routes(host)[1], EVERY[::-1].copy(), EVERY).error is None
    assert (host.bytes == original).all()


def test_other_bytes_than_were_stored_fail_that_entry(setup: Setup) -> None:
    setup.frames.fill()
    move(setup.store, EVERY, EVERY)
    junk = ArrayMemory(SLOT, 1)
    os.pwritev(setup.slab.fd, [memoryview(junk.bytes[0])], setup.slab.offset(5))
    moved = move(setup.load, EVERY, EVERY)
    assert moved.failed == [5]
    assert isinstance(moved.error, PageLost)


def test_a_slot_that_was_never_stored_fails(setup: Setup) -> None:
    assert move(setup.load, slots(3), slots(0)).failed == [0]


def test_a_failed_write_latches_the_tier_and_a_failed_read_does_not(setup: Setup) -> None:
    original = setup.frames.fill()
    move(setup.store, slots(0), slots(0))
    setup.file.broken = True
    assert move(setup.load, slots(0), slots(1)).failed == [0]
    assert move(setup.store, slots(1), slots(1)).failed == [0]
    setup.file.broken = False
    with pytest.raises(TierFailed):
        setup.store.submit(slots(1), slots(1), PASSED)
    assert move(setup.load, slots(0), slots(2)).error is None
    assert (setup.frames.bytes[2] == original[0]).all()


def test_a_store_waits_for_its_fence(where: Path) -> None:
    streams = GatedStreams()
    setup = Setup(where, streams)
    done = setup.store.submit(slots(0), slots(0), Fence(((0, 1),)))
    setup.frames.bytes[0] = 9
    streams.gate.set()
    assert ended(done).error is None
    assert move(setup.load, slots(0), slots(1)).error is None
    assert (setup.frames.bytes[1] == 9).all()
    setup.close()


def test_a_closed_route_refuses_work(setup: Setup) -> None:
    setup.load.close()
    with pytest.raises(Closed):
        setup.load.submit(slots(0), slots(0), PASSED)


def test_an_encrypted_slab_has_no_direct_route(where: Path) -> None:
    pytest.importorskip("cryptography")
    with (
        Slab(where, SLOT, N, prewrite=False, cipher=Cipher.of_process()) as slab,
        pytest.raises(ConfigError, match="posix"),
    ):
        KvikioRoute(
            PlainFile(slab), slab, ArrayMemory(SLOT, N), Place.GPU, Place.NVME, PlainDigest()
        )  # fmt: skip


def test_a_page_damaged_by_one_bit_on_its_way_is_noticed(setup: Setup) -> None:
    original = setup.frames.fill()
    move(setup.store, EVERY, EVERY)
    rng = np.random.default_rng(3)
    damaged = ArrayMemory(SLOT, 1)
    for bit in rng.integers(0, 8 * SLOT, 20).tolist():
        damaged.bytes[0] = original[7]
        damaged.bytes[0, bit // 8] ^= 1 << bit % 8
        os.pwritev(setup.slab.fd, [memoryview(damaged.bytes[0])], setup.slab.offset(7))
        assert move(setup.load, slots(7), slots(7)).failed == [0]


def test_what_an_older_version_stored_is_loaded_through_the_host(where: Path) -> None:
    """Its checksum is over the whole page, which no device computes here."""
    setup = Setup(where)
    setup.slab.algorithm = Algorithm.XXH3_64
    original = setup.frames.fill()
    sequences = setup.slab.begin_store(EVERY)
    for slot in EVERY.tolist():
        os.pwritev(setup.slab.fd, [memoryview(setup.frames.bytes[slot])], setup.slab.offset(slot))
    whole = np.array([[xxhash.xxh3_64_intdigest(page)] for page in original], np.uint64)
    setup.slab.end_store(EVERY, sequences, whole)
    setup.slab.algorithm = Algorithm.XXH3_64_PIECES
    setup.frames.bytes[:] = 1
    move(setup.store, slots(3), slots(3))
    setup.frames.bytes[:] = 0
    assert move(setup.load, EVERY, EVERY).error is None
    original[3] = 1
    assert (setup.frames.bytes == original).all()
    assert setup.threads.statistics().loaded == N
    without = KvikioRoute(
        setup.file, setup.slab, setup.frames, Place.NVME, Place.GPU, PlainDigest()
    )
    assert move(without, slots(2, 3), slots(2, 3)).failed == [0]
    without.close()
    setup.close()


def test_a_device_that_computes_other_checksums_is_found_out() -> None:
    memory = ArrayMemory(SLOT, 1)
    at = int(memory.addresses(slots(0))[0])
    assert check_digest(PlainDigest(), at, SLOT)
    assert not check_digest(OtherDigest(), at, SLOT)


@pytest.mark.parametrize(
    ("found", "faster"),
    [
        (Probe("gds", 6.0, 6.0, "", 3.0, 3.0), True),
        (Probe("compat", 3.1, 3.1, "", 3.0, 3.0), False),  # within the margin
        (Probe("compat", 9.0, 1.0, "", 3.0, 3.0), False),
        (Probe("gds", 3.0, 3.0), True),  # direct I/O is refused to the host
        (Probe("none"), False),
    ],
)
def test_a_direct_path_is_taken_if_pages_go_and_come_sooner(found: Probe, faster: bool) -> None:
    assert found.is_faster is faster


def test_the_probe_tells_why_there_is_no_direct_path(where: Path) -> None:
    found = probe(where, python="/bin/false")
    assert found.path == "none"
    assert "no answer" in found.reason


def test_a_probe_that_hangs_is_ended(where: Path, tmp_path: Path) -> None:
    hangs = tmp_path / "python"
    hangs.write_text("#!/bin/sh\nexec sleep 600\n")
    hangs.chmod(0o755)
    found = probe(where, python=str(hangs), timeout_s=0.2)
    assert found.path == "none"
    assert "no answer in 0 s" in found.reason


def test_a_probe_that_answers_names_the_path_that_it_took(where: Path, tmp_path: Path) -> None:
    """The child fails with GDS forced and works in compat mode, as on a machine without it."""
    child = tmp_path / "python"
    child.write_text(
        '#!/bin/sh\n[ "$KVIKIO_COMPAT_MODE" = ON ] || { echo "no nvidia-fs" >&2; exit 1; }\n'
        'echo \'{"write": 1.5, "read": 2.5, "posix_write": 3.0, "posix_read": 3.5}\'\n'
    )
    child.chmod(0o755)
    found = probe(where, python=str(child))
    assert (found.path, found.write_gbps, found.read_gbps) == ("compat", 1.5, 2.5)
    assert (found.posix_write_gbps, found.posix_read_gbps) == (3.0, 3.5)
    assert "no nvidia-fs" in found.reason


def test_a_child_that_moved_nothing_has_found_no_path(where: Path, tmp_path: Path) -> None:
    child = tmp_path / "python"
    child.write_text('#!/bin/sh\necho \'{"write": 0, "read": 2.5}\'\n')
    child.chmod(0o755)
    assert probe(where, python=str(child)).path == "none"
