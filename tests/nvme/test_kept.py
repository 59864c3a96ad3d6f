"""A slab that is kept: what it holds comes back, what is another's is refused, all is bounded."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from tests.nvme.fakes import LONG_S, ArrayMemory, FaultyIo, failing, move, slots
from tiermem.errors import ConfigError, PageLost
from tiermem.keyindex import Keys
from tiermem.nvme.cap import bytes_for
from tiermem.nvme.files import open_index, write_all
from tiermem.nvme.journal import files_of
from tiermem.nvme.kept import Persist
from tiermem.nvme.posix import DiskThreads
from tiermem.nvme.slab import Slab
from tiermem.tier import Slots

SLOT = 8 << 10
N = 40
MODEL = Persist("rank0", {"model": "m", "dtype": "bf16"})


def open_slab(where: Path, capacity: int = N, **options: object) -> Slab:
    settings: dict[str, object] = {"prewrite": False, "persist": MODEL, **options}
    return Slab(where, SLOT, capacity, **settings)  # type: ignore[arg-type]


def keys_of(*values: int) -> Keys:
    return np.array([(v, v * 31 + 1) for v in values], np.uint64)


def put(slab: Slab, memory: ArrayMemory, disk: Slots, keys: Keys) -> None:
    """Store frames 0..n-1 in these slots and record their content, as a space does."""
    n = len(disk)
    with DiskThreads(slab, threads=2) as threads:
        frames = np.arange(n, dtype=np.int32)
        assert move(threads.routes(memory)[0], frames, disk).error is None
    depths = np.arange(n, dtype=np.uint32)
    assert slab.record(disk, keys, depths, depths + np.uint32(7)).all()


def get(slab: Slab, disk: Slots) -> tuple[np.ndarray, list[int]]:
    """The bytes of these slots, and which of them could not be loaded."""
    memory = ArrayMemory(SLOT, len(disk))
    with DiskThreads(slab, threads=2) as threads:
        moved = move(threads.routes(memory)[1], disk, np.arange(len(disk), dtype=np.int32))
    return memory.bytes, moved.failed


def test_a_reopened_slab_holds_what_was_recorded(where: Path) -> None:
    memory = ArrayMemory(SLOT, 3)
    original = memory.fill()
    with open_slab(where) as slab:
        put(slab, memory, slots(5, 9, 30), keys_of(1, 2, 3))
        assert slab.find(keys_of(2, 4)).tolist() == [9, -1]
    with open_slab(where) as slab:
        found = slab.recovered()
        assert found.clean
        assert found.damaged == 0
        assert found.slots.tolist() == [30, 9, 5]
        assert (found.keys == keys_of(3, 2, 1)).all()
        assert found.depths.tolist() == [2, 1, 0]
        assert found.tenants.tolist() == [9, 8, 7]
        assert slab.find(keys_of(1, 2, 3)).tolist() == [5, 9, 30]
        got, failed = get(slab, slots(5, 9, 30))
        assert failed == []
        assert (got == original).all()


def test_a_content_that_comes_too_late_for_its_slot_is_not_recorded(where: Path) -> None:
    memory = ArrayMemory(SLOT, 2)
    memory.fill()
    both, numbers = slots(5, 9), np.zeros(2, np.uint32)
    with open_slab(where) as slab:
        put(slab, memory, both, keys_of(1, 2))
        seen = slab.sequences(both)
        put(slab, memory, slots(5), keys_of(3))  # the slot has been given to another page
        kept = slab.record(both, keys_of(1, 4), numbers, numbers, seen)
        assert kept.tolist() == [False, True]
        assert slab.find(keys_of(1, 2, 3, 4)).tolist() == [-1, -1, 5, 9]


def test_what_was_not_recorded_is_not_found(where: Path) -> None:
    memory = ArrayMemory(SLOT, 2)
    with open_slab(where) as slab, DiskThreads(slab) as threads:
        move(threads.routes(memory)[0], slots(0), slots(0))
    with open_slab(where) as slab:
        assert len(slab.recovered().slots) == 0
        assert get(slab, slots(0))[1] == [0]


def test_what_was_forgotten_or_overwritten_is_not_found(where: Path) -> None:
    memory = ArrayMemory(SLOT, 3)
    with open_slab(where) as slab:
        put(slab, memory, slots(0, 1, 2), keys_of(1, 2, 3))
        slab.forget(slots(0))
        with DiskThreads(slab) as threads:
            move(threads.routes(memory)[0], slots(0), slots(1))
        assert slab.find(keys_of(1, 2, 3)).tolist() == [-1, -1, 2]
    with open_slab(where) as slab:
        assert slab.recovered().slots.tolist() == [2]
        assert slab.find(keys_of(1, 2, 3)).tolist() == [-1, -1, 2]


def test_recovered_slots_that_were_taken_again_are_no_longer_listed(where: Path) -> None:
    memory = ArrayMemory(SLOT, 2)
    with open_slab(where) as slab:
        put(slab, memory, slots(0, 1), keys_of(1, 2))
    with open_slab(where) as slab:
        put(slab, memory, slots(0), keys_of(9))
        assert slab.recovered().slots.tolist() == [1]


def test_a_store_that_failed_is_not_recorded(where: Path) -> None:
    io = FaultyIo()
    memory = ArrayMemory(SLOT, 2)
    with open_slab(where, io=io) as slab:
        io.on_write = failing(errno.EIO)
        with DiskThreads(slab) as threads:
            assert move(threads.routes(memory)[0], slots(0), slots(4)).errno == errno.EIO
        io.on_write = lambda n, offset: None
        nothing = np.zeros(1, np.uint32)
        assert not slab.record(slots(4), keys_of(1), nothing, nothing).any()
        assert slab.find(keys_of(1)).tolist() == [-1]


def test_bytes_spoiled_while_the_slab_was_closed_are_a_miss(where: Path) -> None:
    memory = ArrayMemory(SLOT, 2)
    memory.fill()
    with open_slab(where) as slab:
        put(slab, memory, slots(0, 1), keys_of(1, 2))
        at = slab.offset(1)
    with open(where / "rank0.slab", "r+b") as file:
        file.seek(at + 5000)
        byte = file.read(1)[0]
        file.seek(at + 5000)
        file.write(bytes([byte ^ 1]))
    with open_slab(where) as slab:
        assert get(slab, slots(0, 1))[1] == [1]


def test_files_are_private(where: Path) -> None:
    with open_slab(where):
        assert {p.stat().st_mode & 0o777 for p in where.iterdir()} == {0o600}


@pytest.mark.parametrize(
    ("persist", "slot_bytes", "says"),
    [
        (Persist("rank0", {"model": "x", "dtype": "bf16"}), SLOT, "another model"),
        (MODEL, 2 * SLOT, "another page size"),
    ],
)
def test_another_model_or_page_size_is_refused_and_nothing_is_lost(
    where: Path, persist: Persist, slot_bytes: int, says: str
) -> None:
    memory = ArrayMemory(SLOT, 1)
    with open_slab(where) as slab:
        put(slab, memory, slots(3), keys_of(1))
    with pytest.raises(ConfigError, match=says):
        Slab(where, slot_bytes, N, persist=persist)
    with open_slab(where) as slab:
        assert slab.recovered().slots.tolist() == [3]


def test_a_file_that_is_no_slab_is_refused(where: Path) -> None:
    path = where / "rank0.slab"
    path.write_bytes(b"something else" * 10_000)
    path.chmod(0o600)
    with pytest.raises(ConfigError, match="no sound superblock"):
        open_slab(where)


def test_a_link_in_place_of_the_file_is_refused(where: Path, tmp_path: Path) -> None:
    (tmp_path / "other").touch(0o600)
    (where / "rank0.slab").symlink_to(tmp_path / "other")
    with pytest.raises(ConfigError, match="cannot open"):
        open_slab(where)


def test_a_file_open_to_others_is_refused(where: Path) -> None:
    open_slab(where).close()
    (where / "rank0.slab").chmod(0o644)
    with pytest.raises(ConfigError, match="mode 0600"):
        open_slab(where)


def test_a_second_opening_of_the_same_slab_is_refused_also_in_one_process(where: Path) -> None:
    with open_slab(where), pytest.raises(ConfigError, match=f"pid {os.getpid()}"):
        open_slab(where)
    open_slab(where).close()


SECOND = """
import sys
from tiermem.errors import ConfigError
from tiermem.nvme.kept import Persist
from tiermem.nvme.slab import Slab
try:
    Slab(sys.argv[1], 8192, 40, persist=Persist("rank0", {"model": "m", "dtype": "bf16"}))
except ConfigError as error:
    print(error)
"""


def test_a_second_process_on_the_same_slab_is_told_who_has_it(where: Path) -> None:
    with open_slab(where):
        told = subprocess.run(
            [sys.executable, "-c", SECOND, str(where)], capture_output=True, text=True, check=True
        )
    assert f"in use by another process (pid {os.getpid()})" in told.stdout


def test_ranks_with_names_of_their_own_share_a_directory(where: Path) -> None:
    one = Slab(where, SLOT, 4, prewrite=False, persist=Persist("rank0"))
    two = Slab(where, SLOT, 4, prewrite=False, persist=Persist("rank1"))
    memory = ArrayMemory(SLOT, 1)
    put(one, memory, slots(1), keys_of(1))
    put(two, memory, slots(2), keys_of(1))
    one.close()
    two.close()
    with Slab(where, SLOT, 4, prewrite=False, persist=Persist("rank1")) as two:
        assert two.recovered().slots.tolist() == [2]


def test_a_slab_reopened_smaller_keeps_what_fits_and_larger_keeps_all(where: Path) -> None:
    memory = ArrayMemory(SLOT, 3)
    with open_slab(where) as slab:
        put(slab, memory, slots(2, 20, 39), keys_of(1, 2, 3))
    with open_slab(where, 25) as slab:
        assert sorted(slab.recovered().slots.tolist()) == [2, 20]
    with open_slab(where, 100, prewrite=True) as slab:
        assert slab.wait_ready(100, LONG_S)
        assert sorted(slab.recovered().slots.tolist()) == [2, 20]
        assert get(slab, slots(2, 20))[1] == []
        put(slab, memory, slots(99, 21, 0), keys_of(4, 5, 6))
        assert slab.find(keys_of(1, 3, 4)).tolist() == [2, -1, 99]
        slab.resize(50)
        assert slab.find(keys_of(4, 5)).tolist() == [-1, 21]
    with open_slab(where, 50) as slab:
        assert sorted(slab.recovered().slots.tolist()) == [0, 2, 20, 21]


def test_the_byte_cap_holds_over_journals_and_both_snapshots(where: Path) -> None:
    cap = bytes_for(N, SLOT)
    rng = np.random.default_rng(0)
    nothing = np.zeros(8, np.uint32)
    largest = 0
    with open_slab(where, byte_cap=cap) as slab:
        for _ in range(600):
            some = rng.permutation(N)[:8].astype(np.int32)
            sequences = slab.begin_store(some)
            slab.end_store(some, sequences, sequences[:, None])
            slab.record(some, rng.integers(1, 1 << 60, (8, 2), np.uint64), nothing, nothing)
            largest = max(largest, on_disk(where))
        held = slab.statistics()
        assert held.bytes_held <= held.byte_cap == cap
    assert N * SLOT < largest <= cap
    with open_slab(where, byte_cap=cap) as slab:
        assert len(slab.recovered().slots) == slab.statistics().keyed > 0


def on_disk(where: Path) -> int:
    total = 0
    for path in where.iterdir():
        try:
            total += path.stat().st_blocks * 512
        except FileNotFoundError:  # a journal that a snapshot has just replaced
            continue
    return total


def test_a_kept_slab_goes_on_serving_without_its_index(where: Path) -> None:
    """The directory is taken away under it: persistence ends, loads and stores go on."""
    memory = ArrayMemory(SLOT, 2)
    original = memory.fill()
    with open_slab(where) as slab:
        put(slab, memory, slots(0), keys_of(1))
        for path in where.iterdir():
            path.unlink()
        where.rmdir()
        nothing = np.zeros(1, np.uint32)
        for key in range(2, 4000):
            sequences = slab.begin_store(slots(1))
            slab.end_store(slots(1), sequences, sequences[:, None])
            slab.record(slots(1), keys_of(key), nothing, nothing)
            if slab.statistics().persistence != "on":
                break
        assert "No such file" in slab.statistics().persistence
        got, failed = get(slab, slots(0))
        assert failed == []
        assert (got[0] == original[0]).all()


def test_an_index_lost_to_a_full_disk_is_removed_and_the_slab_serves_on(
    where: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = ArrayMemory(SLOT, 2)
    memory.fill()

    def full(fd: int, data: bytes) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with open_slab(where) as slab:
        put(slab, memory, slots(0), keys_of(1))
        monkeypatch.setattr("tiermem.nvme.journal.write_all", full)
        slab.forget(slots(0))
        assert "No space left" in slab.statistics().persistence
        with DiskThreads(slab) as threads:
            assert move(threads.routes(memory)[0], slots(1), slots(2)).error is None
        assert get(slab, slots(2))[1] == []
    monkeypatch.undo()
    with open_slab(where) as slab:
        found = slab.recovered()
        assert len(found.slots) == 0
        assert not found.clean


def test_a_snapshot_under_way_when_the_index_is_given_up_does_not_bring_it_back(
    where: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is forgotten after that stands in no journal: an old snapshot would find it again."""
    with open_slab(where) as slab:
        put(slab, ArrayMemory(SLOT, 1), slots(0), keys_of(1))
    given_up = threading.Event()

    def begun_late(path: Path, *, truncate: bool) -> int:
        if path.name.endswith(".new"):
            assert given_up.wait(LONG_S)
        return open_index(path, truncate=truncate)

    def full(fd: int, data: bytes) -> None:
        if threading.current_thread() is threading.main_thread():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write_all(fd, data)

    monkeypatch.setattr("tiermem.nvme.journal.open_index", begun_late)
    with open_slab(where) as slab:  # folds what it has read into a snapshot, in the background
        monkeypatch.setattr("tiermem.nvme.journal.write_all", full)
        slab.forget(slots(0))
        assert "No space left" in slab.statistics().persistence
        given_up.set()
    monkeypatch.undo()
    assert files_of(where, "rank0") == []


def test_a_slab_whose_process_was_killed_is_known_as_not_closed_in_order(where: Path) -> None:
    code = SECOND.replace("except", "    import os; os._exit(9)\nexcept")
    subprocess.run([sys.executable, "-c", code, str(where)], check=False)
    with open_slab(where) as slab:
        assert not slab.recovered().clean
    with open_slab(where) as slab:
        assert slab.recovered().clean


def test_sequence_numbers_are_never_drawn_twice_over_openings(where: Path) -> None:
    seen: set[int] = set()
    for _ in range(4):
        with open_slab(where) as slab:
            drawn = slab.begin_store(slots(0, 1, 2)).tolist()
            slab.resize(N - 1)
            drawn += slab.begin_store(slots(0, 1)).tolist()
        assert not seen & set(drawn)
        assert drawn == sorted(drawn)
        seen |= set(drawn)


def test_a_hundred_thousand_records_are_read_back(where: Path) -> None:
    n = 100_000
    rng = np.random.default_rng(0)
    keys = rng.integers(1, 1 << 60, (n, 2), np.uint64)
    numbers = np.arange(n, dtype=np.uint32)
    every = np.arange(n, dtype=np.int32)
    with Slab(where, 4096, n, prewrite=False, persist=MODEL) as slab:
        slab.end_store(every, slab.begin_store(every), numbers.astype(np.uint64)[:, None])
        assert slab.record(every, keys, numbers, numbers).all()
    with Slab(where, 4096, n, prewrite=False, persist=MODEL) as slab:
        assert (slab.find(keys) == every).all()
        assert len(slab.recovered().slots) == n


def test_an_entry_without_a_stored_page_says_that_the_page_is_lost(where: Path) -> None:
    memory = ArrayMemory(SLOT, 1)
    with open_slab(where) as slab, DiskThreads(slab) as threads:
        moved = move(threads.routes(memory)[1], slots(3), slots(0))
        assert isinstance(moved.error, PageLost)


@pytest.mark.parametrize("offset", [0, 32 << 10])
def test_one_damaged_superblock_is_survived_and_taken_as_not_closed_in_order(
    where: Path, offset: int
) -> None:
    memory = ArrayMemory(SLOT, 1)
    with open_slab(where) as slab:
        put(slab, memory, slots(3), keys_of(1))
    for _ in range(3):
        with open(where / "rank0.slab", "r+b") as file:
            file.seek(offset + 100)
            file.write(b"?" * 64)
        with open_slab(where) as slab:
            found = slab.recovered()
            assert found.slots.tolist() == [3]
            assert not found.clean
    with open_slab(where) as slab:
        assert slab.recovered().clean
