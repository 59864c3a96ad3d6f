"""The table of the host pool: what one shows others find; an entry that is torn counts as none."""

from __future__ import annotations

import os
from collections.abc import Iterator

import numpy as np
import pytest

from tiermem.board import ENTRY_BYTES, LEAST_CELLS, WAYS, Board, Word, board_bytes
from tiermem.keyindex import Keys
from tiermem.ledger_wake import myself

FIRST = 8192
NBYTES = board_bytes(1 << 20)


def keys_of(*numbers: int) -> Keys:
    return np.array([[n, n * 7 + 1] for n in numbers], np.uint64)


def words(*numbers: int) -> np.ndarray:
    return np.array(numbers, np.uint64)


@pytest.fixture
def fd() -> Iterator[int]:
    made = os.memfd_create("board", os.MFD_CLOEXEC)
    os.ftruncate(made, FIRST + NBYTES)
    yield made
    os.close(made)


@pytest.fixture
def boards(fd: int) -> Iterator[tuple[Board, Board]]:
    one, two = Board(fd, FIRST, NBYTES), Board(fd, FIRST, NBYTES)
    yield one, two
    one.close()
    two.close()


def test_what_one_shows_another_finds_and_not_itself(boards: tuple[Board, Board]) -> None:
    one, two = boards
    one.publish(keys_of(1, 2, 3), words(11, 12, 13), words(0, 4096, 8192))
    found = two.find(keys_of(3, 9, 1))
    assert found.is_there.tolist() == [True, False, True]
    assert found.checksums[[0, 2]].tolist() == [13, 11]
    assert found.offsets[[0, 2]].tolist() == [8192, 0]
    assert not one.find(keys_of(1, 2, 3)).is_there.any()
    assert not two.find(keys_of()[:0].reshape(0, 2)).is_there.any()


def test_what_is_withdrawn_is_not_found_and_nobody_withdraws_what_is_not_his(
    boards: tuple[Board, Board],
) -> None:
    one, two = boards
    cells = one.publish(keys_of(1, 2), words(11, 12), words(0, 4096))
    two.withdraw(cells)
    assert two.find(keys_of(1, 2)).is_there.all()
    one.withdraw(cells[:1])
    assert two.find(keys_of(1, 2)).is_there.tolist() == [False, True]
    assert one.shown() == 1
    one.close()
    assert not two.find(keys_of(2)).is_there.any()
    assert one.shown() == 0


@pytest.mark.parametrize("word", Word)
def test_an_entry_that_was_torn_counts_as_none(
    fd: int, boards: tuple[Board, Board], word: int
) -> None:
    """As when two write one cell, or one is killed while it writes."""
    one, two = boards
    (cell,) = one.publish(keys_of(5), words(15), words(4096)).tolist()
    at = FIRST + cell * ENTRY_BYTES + 8 * word
    os.pwrite(fd, bytes(b ^ 1 for b in os.pread(fd, 1, at)), at)
    assert not two.find(keys_of(5)).is_there.any()
    again = one.publish(keys_of(5), words(16), words(8192))
    assert again.tolist() == [cell], "the cell is free again"
    assert two.find(keys_of(5)).checksums.tolist() == [16]


def test_of_many_contents_that_fall_together_the_last_ones_stay(
    boards: tuple[Board, Board],
) -> None:
    one, two = boards
    buckets = NBYTES // ENTRY_BYTES // WAYS
    same = np.array([[i * buckets, 0] for i in range(1, 3 * WAYS)], np.uint64)
    same = same[same[:, 0] < 1 << 32]
    assert len(same) > 2 * WAYS
    one.publish(same, words(*range(len(same))), words(*range(len(same))))
    found = two.find(same)
    assert 1 <= found.is_there.sum() <= WAYS
    assert found.is_there[-1]
    there = np.flatnonzero(found.is_there)
    assert found.checksums[there].tolist() == there.tolist()


def test_entries_of_a_process_that_has_ended_are_swept(boards: tuple[Board, Board]) -> None:
    one, two = boards
    one.publish(keys_of(1, 2), words(11, 12), words(0, 4096))
    assert two.sweep({myself(), (1, 5)}) == 0
    assert two.find(keys_of(1)).is_there.all()
    assert two.sweep({(myself()[0], myself()[1] + 1)}) == 2, "another process of the same number"
    assert not two.find(keys_of(1, 2)).is_there.any()
    assert two.sweep(set()) == 0


def test_the_table_has_room_for_four_times_as_many_pages_as_the_pool() -> None:
    assert board_bytes(64 << 30) == 8 << 20
    assert board_bytes(1 << 20) == LEAST_CELLS * ENTRY_BYTES
    assert board_bytes((64 << 30) + 1) == 8 << 20


def test_a_small_pool_of_small_pages_has_all_of_them_found(boards: tuple[Board, Board]) -> None:
    """A chain of 72 pages is of no use if one in twenty of them is missing."""
    one, two = boards
    keys = np.random.default_rng(1).integers(1, 1 << 63, (4096, 2)).astype(np.uint64)
    one.publish(keys, words(*range(4096)), words(*range(4096)))
    assert two.find(keys).is_there.all()
