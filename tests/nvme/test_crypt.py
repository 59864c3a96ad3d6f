"""Encryption at rest: nothing readable on disk, every change noticed, another key refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.nvme.fakes import ArrayMemory, Moved, move, slots
from tiermem.errors import ConfigError, PageLost
from tiermem.nvme.crypt import Cipher, drop_key
from tiermem.nvme.kept import Persist
from tiermem.nvme.posix import DiskThreads
from tiermem.nvme.slab import Slab
from tiermem.tier import Slots

pytest.importorskip("cryptography")

SLOT = 8 << 10
KEPT = Persist("rank0", {"model": "m"})


def store(slab: Slab, memory: ArrayMemory, disk: Slots) -> Moved:
    with DiskThreads(slab, threads=2) as threads:
        frames = np.arange(len(disk), dtype=np.int32)
        return move(threads.routes(memory)[0], frames, disk)


def load(slab: Slab, memory: ArrayMemory, disk: Slots) -> Moved:
    with DiskThreads(slab, threads=2) as threads:
        frames = np.arange(len(disk), dtype=np.int32)
        return move(threads.routes(memory)[1], disk, frames)


@pytest.mark.parametrize("shift", [0, 8])
def test_pages_come_back_and_their_text_is_not_on_disk(where: Path, shift: int) -> None:
    memory = ArrayMemory(SLOT, 3, shift=shift)
    memory.bytes[:] = np.frombuffer(b"secret words. " * SLOT, np.uint8)[:SLOT]
    original = memory.bytes.copy()
    with Slab(where, SLOT, 9, prewrite=False, persist=KEPT, cipher=Cipher.of_process()) as slab:
        assert store(slab, memory, slots(4, 0, 8)).error is None
        memory.bytes[:] = 0
        assert load(slab, memory, slots(4, 0, 8)).error is None
        assert (memory.bytes == original).all()
        assert b"secret" not in (where / "rank0.slab").read_bytes()


def test_equal_pages_do_not_look_equal_on_disk(where: Path) -> None:
    memory = ArrayMemory(SLOT, 2)
    with Slab(where, SLOT, 2, prewrite=False, persist=KEPT, cipher=Cipher.of_process()) as slab:
        store(slab, memory, slots(0, 1))
        raw = (where / "rank0.slab").read_bytes()
        assert raw[slab.offset(0) :][:SLOT] != raw[slab.offset(1) :][:SLOT]


@given(bit=st.integers(0, SLOT * 8 - 1))
def test_any_flipped_bit_is_noticed(bit: int) -> None:
    cipher, salt = Cipher(bytes(32)), b"salt"
    page, sealed = memoryview(bytearray(SLOT)), memoryview(bytearray(SLOT + 16))
    tag = cipher.encrypt(page, sealed, salt, 5, 3)
    cipher.decrypt(sealed, SLOT, tag, page, salt, 5, 3)
    sealed[bit // 8] ^= 1 << (bit % 8)
    with pytest.raises(PageLost):
        cipher.decrypt(sealed, SLOT, tag, page, salt, 5, 3)


@pytest.mark.parametrize(
    ("salt", "sequence", "slot"), [(b"salt", 5, 4), (b"salt", 6, 3), (b"tlas", 5, 3)]
)
def test_a_page_opens_only_where_and_as_it_was_stored(
    salt: bytes, sequence: int, slot: int
) -> None:
    cipher = Cipher(bytes(32))
    page, sealed = memoryview(bytearray(SLOT)), memoryview(bytearray(SLOT + 16))
    tag = cipher.encrypt(page, sealed, b"salt", 5, 3)
    with pytest.raises(PageLost):
        cipher.decrypt(sealed, SLOT, tag, page, salt, sequence, slot)


def test_a_kept_slab_opens_with_its_key_file_and_is_lost_without_it(where: Path) -> None:
    memory = ArrayMemory(SLOT, 1)
    original = memory.fill()
    key_file = where / "rank0.key"
    numbers = np.zeros(1, np.uint32)
    with Slab(where, SLOT, 4, persist=KEPT, cipher=Cipher.of_file(key_file)) as slab:
        assert slab.wait_ready(4)
        store(slab, memory, slots(2))
        slab.record(slots(2), np.array([[1, 2]], np.uint64), numbers, numbers)
    assert key_file.stat().st_mode & 0o777 == 0o600
    with Slab(where, SLOT, 4, persist=KEPT, cipher=Cipher.of_file(key_file)) as slab:
        assert slab.recovered().slots.tolist() == [2]
        memory.bytes[:] = 0
        assert load(slab, memory, slots(2)).error is None
        assert (memory.bytes == original).all()
    drop_key(key_file)
    with pytest.raises(ConfigError, match="another key"):
        Slab(where, SLOT, 4, persist=KEPT, cipher=Cipher.of_file(key_file))
    with pytest.raises(ConfigError, match="another cipher"):
        Slab(where, SLOT, 4, persist=KEPT)


def test_slabs_that_are_not_kept_are_each_under_a_key_of_their_own(where: Path) -> None:
    """Both draw the same sequence numbers, and their 4 bytes may be equal."""
    key = Cipher.of_process()
    memory = ArrayMemory(SLOT, 1)
    ids = set()
    for _ in range(2):
        with Slab(where, SLOT, 1, prewrite=False, cipher=key) as slab:
            assert slab.cipher is not None
            ids.add(slab.cipher.key_id)
            original = memory.fill()
            assert store(slab, memory, slots(0)).error is None
            memory.bytes[:] = 0
            assert load(slab, memory, slots(0)).error is None
            assert (memory.bytes == original).all()
    assert len(ids | {key.key_id}) == 3
    page, sealed = memoryview(bytes(SLOT)), [memoryview(bytearray(SLOT + 16)) for _ in range(3)]
    tags = {
        key.of_slab(mark).encrypt(page, into, b"salt", 7, 0)
        for mark, into in zip((b"one", b"other", b"one"), sealed, strict=True)
    }
    assert len(tags) == 2
    assert sealed[0] == sealed[2] != sealed[1]


def test_a_key_file_that_others_can_read_is_refused(where: Path) -> None:
    path = where / "k"
    path.write_bytes(bytes(32))
    path.chmod(0o640)
    with pytest.raises(ConfigError, match="mode 0600"):
        Cipher.of_file(path)


def test_a_key_of_another_length_is_refused() -> None:
    with pytest.raises(ConfigError, match="5 bytes"):
        Cipher(b"short")
