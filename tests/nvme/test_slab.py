"""The slab: bounded, private, preallocated, and grown behind the caller's back."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

import numpy as np
import pytest

from tests.nvme.fakes import LONG_S, FaultyIo, failing, slots
from tiermem.errors import Closed, ConfigError, TierFailed, TierFull
from tiermem.nvme.cap import bytes_for, slots_for
from tiermem.nvme.slab import Slab
from tiermem.tier import Place

SLOT = 16 << 10


def test_a_slab_becomes_ready_in_the_background_and_takes_its_space_at_once(where: Path) -> None:
    with Slab(where, SLOT, 100) as slab:
        assert slab.place is Place.NVME
        assert slab.statistics().bytes_held >= 100 * SLOT
        assert slab.wait_ready(100, LONG_S)
        assert slab.ready == slab.capacity == 100


def test_without_prewriting_every_slot_is_ready_at_once(where: Path) -> None:
    with Slab(where, SLOT, 100, prewrite=False) as slab:
        assert slab.ready == 100


def test_an_ephemeral_slab_leaves_nothing_behind_and_has_no_name(where: Path) -> None:
    with Slab(where, SLOT, 4) as slab:
        assert os.listdir(where) == []
        assert os.fstat(slab.fd).st_mode & 0o777 == 0o600
    assert os.listdir(where) == []


def test_ready_grows_while_prewriting_is_still_under_way(where: Path) -> None:
    io, reached, may_go_on = FaultyIo(), threading.Event(), threading.Event()
    big = 8 << 20

    def hold_the_second(n: int, offset: int) -> None:
        if offset > big:
            reached.set()
            assert may_go_on.wait(LONG_S)

    io.on_write = hold_the_second
    with Slab(where, big, 3, io=io) as slab:
        assert reached.wait(LONG_S)
        assert slab.ready == 1
        with pytest.raises(TierFull, match="slot 1 is not ready: 1 of 3"):
            slab.begin_store(slots(1))
        may_go_on.set()
        assert slab.wait_ready(3, LONG_S)


def test_the_byte_cap_covers_metadata_and_is_refused_with_what_would_fit(where: Path) -> None:
    cap = bytes_for(10, SLOT)
    assert slots_for(cap, SLOT) == 10
    with pytest.raises(ConfigError, match="10 slots fit"):
        Slab(where, SLOT, 11, byte_cap=cap)
    with Slab(where, SLOT, 10, byte_cap=cap) as slab:
        assert slab.wait_ready(10, LONG_S)
        assert slab.statistics().bytes_held <= cap
        with pytest.raises(ConfigError):
            slab.resize(11)
        assert slab.capacity == 10


def test_the_floor_of_free_space_is_kept(where: Path) -> None:
    facts = os.statvfs(where)
    free = facts.f_bavail * facts.f_frsize
    with pytest.raises(TierFull, match="stay free"):
        Slab(where, SLOT, 1000, floor_bytes=free)


def test_growing_keeps_what_is_known_and_shrinking_gives_space_back(where: Path) -> None:
    with Slab(where, SLOT, 10, byte_cap=bytes_for(50, SLOT)) as slab:
        assert slab.wait_ready(10, LONG_S)
        stored = slab.begin_store(slots(3, 9))
        slab.end_store(slots(3, 9), stored, np.array([[5], [6]], np.uint64))
        slab.resize(50)
        assert slab.wait_ready(50, LONG_S)
        sequences, checksums = slab.expected(slots(3, 9, 40))
        assert sequences.tolist() == [*stored.tolist(), 0]
        assert checksums[:2].tolist() == [[5], [6]]
        held = slab.statistics().bytes_held
        slab.resize(5)
        assert slab.capacity == slab.ready == 5
        assert slab.statistics().bytes_held <= held - 45 * SLOT
        slab.resize(20)
        assert slab.wait_ready(20, LONG_S)
        assert list(slab.expected(slots(9))[0]) == [0]


def test_a_store_in_progress_is_not_to_be_read(where: Path) -> None:
    with Slab(where, SLOT, 4, prewrite=False) as slab:
        first = slab.begin_store(slots(2))
        slab.end_store(slots(2), first, np.array([[1]], np.uint64))
        assert slab.expected(slots(2))[0] == first
        again = slab.begin_store(slots(2))
        assert again > first
        assert slab.expected(slots(2))[0][0] == 0


def test_a_failing_prewrite_latches_the_slab_and_wakes_whoever_waits(where: Path) -> None:
    io = FaultyIo()
    io.on_write = failing(errno.EIO)
    with Slab(where, SLOT, 4, io=io) as slab:
        assert not slab.wait_ready(4, LONG_S)
        assert slab.ready == 0
        with pytest.raises(TierFailed, match="reopen"):
            slab.begin_store(slots(0))


def test_a_directory_that_others_can_enter_is_refused(where: Path) -> None:
    where.chmod(0o755)
    with pytest.raises(ConfigError, match="chmod 700"):
        Slab(where, SLOT, 1)


def test_a_path_that_is_no_directory_is_refused(where: Path) -> None:
    (where / "file").touch()
    with pytest.raises(ConfigError, match=r"nvme\.path"):
        Slab(where / "file", SLOT, 1)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make a directory of another user")
def test_a_directory_of_another_user_is_refused(where: Path) -> None:
    os.chown(where, 12345, 12345)
    with pytest.raises(ConfigError, match="uid 12345"):
        Slab(where, SLOT, 1)


@pytest.mark.parametrize(("slot", "capacity"), [(0, 1), (4095, 1), (4096, -1)])
def test_sizes_that_cannot_be_meant_are_refused(where: Path, slot: int, capacity: int) -> None:
    with pytest.raises(ConfigError):
        Slab(where, slot, capacity)


def test_use_after_close_is_refused_and_a_second_close_does_nothing(where: Path) -> None:
    slab = Slab(where, SLOT, 4)
    slab.close()
    slab.close()
    with pytest.raises(Closed):
        slab.begin_store(slots(0))
    with pytest.raises(Closed):
        slab.resize(2)
