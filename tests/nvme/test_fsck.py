"""fsck says what is readable, stale and torn, and drops the rest when told to."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.nvme.fakes import ArrayMemory, move, slots
from tiermem.errors import ConfigError
from tiermem.nvme.crypt import Cipher
from tiermem.nvme.fsck import fsck
from tiermem.nvme.kept import Persist
from tiermem.nvme.posix import DiskThreads
from tiermem.nvme.slab import Slab
from tiermem.tier import Slots

SLOT = 8 << 10
MODEL = Persist("rank0", {"model": "m"})


def made(where: Path, disk: Slots, cipher: Cipher | None = None) -> None:
    """A slab with content in these slots; slot 9 was written and dropped."""
    memory = ArrayMemory(SLOT, len(disk) + 1)
    memory.fill()
    every = np.append(disk, np.int32(9)).astype(np.int32)
    keys = np.stack([every + 1, every + 1], axis=1).astype(np.uint64)
    numbers = np.zeros(len(every), np.uint32)
    with Slab(where, SLOT, 20, prewrite=False, persist=MODEL, cipher=cipher) as slab:
        with DiskThreads(slab) as threads:
            move(threads.routes(memory)[0], np.arange(len(every), dtype=np.int32), every)
        slab.record(every, keys, numbers, numbers)
        slab.forget(slots(9))


def spoil(where: Path, slot: int) -> None:
    with open(where / "rank0.slab", "r+b") as file:
        file.seek((64 << 10) + slot * SLOT + 99)
        file.write(b"?!?!")


def test_a_sound_slab_is_all_readable(where: Path) -> None:
    made(where, slots(0, 5, 19))
    seen: list[tuple[int, int]] = []
    (report,) = fsck(where, progress=lambda done, total: seen.append((done, total)))
    assert report.good
    assert (report.readable, report.torn, report.damaged) == (3, 0, 0)
    assert (report.slot_bytes, report.slots, report.clean) == (SLOT, 20, True)
    assert report.fingerprint == {"model": "m"}
    assert seen[-1] == (3, 3)


def test_a_torn_slot_is_told_and_a_repair_drops_it_alone(where: Path) -> None:
    made(where, slots(0, 5, 19))
    spoil(where, 5)
    (report,) = fsck(where)
    assert not report.good
    assert (report.readable, report.torn, report.repaired) == (2, 1, False)
    (report,) = fsck(where, repair=True)
    assert report.repaired
    (report,) = fsck(where / "rank0.slab")
    assert (report.readable, report.torn) == (2, 0)
    with Slab(where, SLOT, 20, prewrite=False, persist=MODEL) as slab:
        assert sorted(slab.recovered().slots.tolist()) == [0, 19]


def test_a_damaged_record_is_counted_and_repaired_away(where: Path) -> None:
    made(where, slots(0, 5, 19))
    path = where / "rank0.snapshot"
    raw = bytearray(path.read_bytes())
    raw[64 + 10] ^= 1
    path.write_bytes(raw)
    (report,) = fsck(where, repair=True)
    assert (report.readable, report.damaged, report.repaired) == (2, 1, True)
    assert fsck(where)[0].good


def test_a_slab_in_use_is_left_alone(where: Path) -> None:
    with Slab(where, SLOT, 20, prewrite=False, persist=MODEL):
        (report,) = fsck(where, repair=True)
    assert "in use" in (report.problem or "")
    assert not report.good


def test_what_is_no_slab_is_a_problem_and_nothing_at_all_an_error(where: Path) -> None:
    with pytest.raises(ConfigError, match="no slab at"):
        fsck(where)
    (where / "x.slab").write_bytes(b"x" * (128 << 10))
    (where / "x.slab").chmod(0o600)
    (report,) = fsck(where)
    assert "no sound superblock" in (report.problem or "")


def test_an_encrypted_slab_is_checked_with_its_key_and_only_counted_without(where: Path) -> None:
    pytest.importorskip("cryptography")
    key = where / "rank0.key"
    made(where, slots(0, 5), Cipher.of_file(key))
    (report,) = fsck(where)
    assert (report.readable, report.sealed, report.torn) == (0, 2, 0)
    spoil(where, 0)
    (report,) = fsck(where, key_file=key)
    assert (report.readable, report.sealed, report.torn) == (1, 0, 1)
    with pytest.raises(ConfigError, match="cannot open key file"):
        fsck(where, key_file=where / "misspelt.key")
    assert not (where / "misspelt.key").exists()
