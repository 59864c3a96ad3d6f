"""Damage to records, superblocks and snapshots is noticed: every bit, every torn sector."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tiermem.errors import ConfigError
from tiermem.keyindex import KeyIndex
from tiermem.nvme.journal import Journal, replay
from tiermem.nvme.records import BYTES, RECORD, Kind, Records, seal, seed_of, sound
from tiermem.nvme.superblock import BYTES as BLOCK
from tiermem.nvme.superblock import VERSION, Superblock, choose, require, unpack

UUID = bytes(range(16))
SEED = seed_of(UUID)


def puts(n: int, seed: int = 0) -> Records:
    """Records with random content in slots 0..n-1."""
    rng = np.random.default_rng(seed)
    made = np.frombuffer(rng.bytes(n * BYTES), RECORD).copy()
    made["slot"], made["kind"] = np.arange(n), Kind.PUT
    return made


@pytest.mark.parametrize("blank", [False, True])
def test_every_flipped_bit_of_a_record_is_noticed(blank: bool) -> None:
    record = seal(np.zeros(1, RECORD) if blank else puts(1), SEED)
    flipped = np.repeat(record.view(np.uint8).reshape(1, BYTES), BYTES * 8, axis=0)
    bits = np.arange(BYTES * 8)
    flipped[bits, bits // 8] ^= (1 << (bits % 8)).astype(np.uint8)
    assert sound(record, SEED).all()
    assert not sound(flipped.reshape(-1).view(RECORD), SEED).any()


def test_zeros_and_records_of_another_slab_are_not_sound() -> None:
    assert not sound(np.zeros(3, RECORD), SEED).any()
    assert not sound(seal(puts(50), SEED), seed_of(bytes(16))).any()


def block(epoch: int, *, clean: bool = True) -> bytes:
    return Superblock(4096, 10, 5, epoch, UUID, 1, clean, {"model": "m", "dtype": "bf16"}).pack()


def test_a_superblock_comes_back_as_it_was_packed() -> None:
    found = unpack(block(7))
    assert found is not None
    assert (found.slots, found.ready, found.epoch, found.clean) == (10, 5, 7, True)
    assert found.fingerprint == {"model": "m", "dtype": "bf16"}


@given(st.integers(0, BLOCK * 8 - 1))
def test_any_flipped_bit_of_a_superblock_is_noticed(bit: int) -> None:
    damaged = bytearray(block(7))
    damaged[bit // 8] ^= 1 << (bit % 8)
    assert unpack(bytes(damaged)) is None


def test_the_newer_superblock_counts() -> None:
    found = choose((block(7), block(8, clean=False)))
    assert found is not None
    assert (found.epoch, found.clean) == (8, False)


def test_beside_a_damaged_superblock_nothing_is_believed_clean_and_epochs_are_skipped() -> None:
    damaged = block(8)[:-1] + b"?"
    found = choose((block(7), damaged))
    assert found is not None
    assert (found.epoch, found.clean) == (9, False)
    assert choose((damaged, damaged)) is None


def test_an_unused_superblock_is_not_a_damaged_one() -> None:
    found = choose((bytes(BLOCK), block(1)))
    assert found is not None
    assert found.clean


@pytest.mark.parametrize(
    ("slot_bytes", "fingerprint", "says"),
    [
        (8192, {"model": "m", "dtype": "bf16"}, "page size: it has 4096, asked for is 8192"),
        (4096, {"model": "other", "dtype": "bf16"}, "another model: it has 'm'"),
        (4096, {"model": "m"}, "another dtype"),
        (4096, {"model": "m", "dtype": "bf16", "rank": "1"}, "another rank: it has None"),
    ],
)
def test_another_slab_is_refused_with_the_field_that_differs(
    slot_bytes: int, fingerprint: dict[str, str], says: str
) -> None:
    found = unpack(block(1))
    assert found is not None
    with pytest.raises(ConfigError, match=says):
        require(found, slot_bytes, fingerprint, "x.slab")


def test_a_newer_version_is_refused_by_its_number() -> None:
    newer = Superblock(4096, 1, 1, 1, UUID, 1, True, {}, version=VERSION + 1).pack()
    found = unpack(newer)
    assert found is not None
    with pytest.raises(ConfigError, match=f"newer version .format {VERSION + 1}"):
        require(found, 4096, {}, "x.slab")


def test_a_fingerprint_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ConfigError, match="hash"):
        Superblock(4096, 1, 1, 1, UUID, 1, True, {"model": "m" * 5000}).pack()


def written(directory: Path, n: int) -> Path:
    """A snapshot of the first n / 2 of n records and a journal with the others."""
    journal = Journal(directory, "r", UUID, 1, 1 << 30)
    records = puts(n)
    journal.publish(journal.rotate(), records[: n // 2])
    journal.append(records[n // 2 :])
    journal.close()
    return directory


def test_snapshot_and_journal_together_say_what_was_put(tmp_path: Path) -> None:
    found = replay(written(tmp_path, 100), "r", UUID, 100)
    assert found.damaged == 0
    assert found.snapshot
    assert (found.records["key"] == puts(100)["key"]).all()


def test_the_last_word_on_a_slot_counts_across_files(tmp_path: Path) -> None:
    journal = Journal(tmp_path, "r", UUID, 1, 1 << 30)
    journal.append(puts(4, seed=1))
    gone = np.zeros(1, RECORD)
    gone["kind"], gone["slot"] = Kind.DROP, 2
    journal.append(gone)
    journal.rotate()
    journal.append(puts(1, seed=2))
    journal.close()
    found = replay(tmp_path, "r", UUID, 10)
    assert found.records["slot"].tolist() == [0, 1, 3]
    assert (found.records["key"][0] == puts(1, seed=2)["key"][0]).all()
    assert (found.records["key"][1] == puts(4, seed=1)["key"][1]).all()


def test_slots_above_the_file_are_not_found(tmp_path: Path) -> None:
    assert len(replay(written(tmp_path, 100), "r", UUID, 30).records) == 30


@given(data=st.data())
def test_a_flipped_bit_or_torn_sector_costs_what_it_touched_and_is_counted(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    where = written(tmp_path_factory.mktemp("torn"), 300)
    name = data.draw(st.sampled_from(["r.snapshot", "r.journal.2"]))
    raw = bytearray((where / name).read_bytes())
    if data.draw(st.booleans(), label="sector"):
        start = data.draw(st.integers(0, len(raw) // 4096)) * 4096
        end = min(start + 4096, len(raw))
        raw[start:end] = bytes(end - start)
        touched = range(start // BYTES, end // BYTES)
    else:
        bit = data.draw(st.integers(0, len(raw) * 8 - 1), label="bit")
        raw[bit // 8] ^= 1 << (bit % 8)
        touched = range(bit // 8 // BYTES, bit // 8 // BYTES + 1)
    (where / name).write_bytes(raw)
    found = replay(where, "r", UUID, 300)
    assert found.damaged >= len(touched)
    kept = set(found.records["slot"].tolist())
    first = 0 if name == "r.snapshot" else 150
    # Record 0 of a file is its header; without it nothing of the file is believed.
    lost = {first + i - 1 for i in touched} if 0 not in touched else range(first, first + 150)
    assert kept == set(range(300)) - set(lost)
    original = puts(300)
    assert (found.records["key"] == original["key"][found.records["slot"]]).all()


def test_a_torn_tail_of_the_journal_costs_only_itself(tmp_path: Path) -> None:
    where = written(tmp_path, 100)
    path = where / "r.journal.2"
    os.truncate(path, path.stat().st_size - 10)
    found = replay(where, "r", UUID, 100)
    assert len(found.records) == 99
    assert found.damaged == 1


def test_a_snapshot_cut_at_the_edge_of_a_record_is_noticed(tmp_path: Path) -> None:
    where = written(tmp_path, 100)
    path = where / "r.snapshot"
    os.truncate(path, path.stat().st_size - 2 * BYTES)
    found = replay(where, "r", UUID, 100)
    assert len(found.records) == 98
    assert found.damaged == 2


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 15)), max_size=200))
def test_the_index_finds_what_a_dictionary_finds(changes: list[tuple[int, int]]) -> None:
    keys = np.zeros((41, 2), np.uint64)
    index = KeyIndex(keys)
    for slot, key in changes:
        keys[slot] = (key * 977, key and 5)
        if key:
            index.add(np.array([slot], np.int32))
    wanted = np.array([(k * 977, 5) for k in range(1, 16)], np.uint64)
    for key, slot in zip(wanted, index.find(wanted), strict=True):
        holders = np.flatnonzero((keys == key).all(axis=1)).tolist()
        assert slot in (holders or [-1])


def test_the_index_finds_many_keys_at_once_and_not_the_others() -> None:
    rng = np.random.default_rng(0)
    keys = rng.integers(1, 1 << 63, (20_000, 2), dtype=np.uint64)
    index = KeyIndex(keys)
    assert (index.find(keys) == np.arange(20_000)).all()
    others = rng.integers(1, 1 << 63, (20_000, 2), dtype=np.uint64)
    assert (index.find(others) == -1).all()
    assert index.find(np.zeros((3, 2), np.uint64)).tolist() == [-1, -1, -1]


def test_a_slot_that_does_not_count_hides_no_other_with_its_key() -> None:
    keys = np.zeros((20, 2), np.uint64)
    index = KeyIndex(keys)
    keys[:10] = (7, 1)
    keys[10:] = (8, 1)
    index.add(np.arange(20, dtype=np.int32))
    wanted = np.array([(7, 1), (8, 1), (9, 1)], np.uint64)
    found = index.find(wanted, lambda slots, which: slots % 10 == 4 + which)
    assert found.tolist() == [4, 15, -1]
