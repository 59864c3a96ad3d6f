"""Pages of the pool's file are read with their checksums, and count only with the right one."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator

import numpy as np
import pytest

from tiermem.host.pinned import HostPool
from tiermem.host.reading import Digest, FromPool, Reader
from tiermem.nvme.digest import digest, native_digest
from tiermem.tier import PASSED

PAGE = 8192
PAGES = 6
LONG_S = 20.0


@pytest.fixture
def native() -> Digest:
    found = native_digest()
    if found is None:
        pytest.skip("this xxhash hides its C functions")
    return found


@pytest.fixture
def fd() -> Iterator[int]:
    made = os.memfd_create("pool", os.MFD_CLOEXEC)
    for i in range(PAGES):
        os.pwrite(made, bytes([i + 1]) * PAGE, i * PAGE)
    yield made
    os.close(made)


@pytest.fixture
def reader(fd: int, native: Digest) -> Iterator[Reader]:
    made = Reader(fd, PAGE, native)
    yield made
    made.close()


def offsets(*pages: int) -> np.ndarray:
    return np.array(pages, np.uint64) * np.uint64(PAGE)


def test_a_look_gives_the_checksums_of_pages(reader: Reader) -> None:
    reading = reader.look(offsets(2, 0, 5))
    assert reading.wait(LONG_S)
    assert reading.failed is None
    assert reading.error is None
    assert reading.checksums().tolist() == [
        digest(memoryview(bytes([i]) * PAGE)) for i in (3, 1, 6)
    ]


def test_reading_what_was_punched_out_takes_no_memory(fd: int, reader: Reader) -> None:
    os.ftruncate(fd, 0)
    os.ftruncate(fd, PAGES * PAGE)
    reading = reader.look(offsets(1, 2))
    assert reading.wait(LONG_S)
    assert reading.checksums().tolist() == [digest(memoryview(bytes(PAGE)))] * 2
    assert os.fstat(fd).st_blocks == 0


def test_pages_with_the_bytes_that_were_offered_come_and_others_fail(
    fd: int, reader: Reader
) -> None:
    sums = np.array([digest(memoryview(bytes([i + 1]) * PAGE)) for i in range(PAGES)], np.uint64)
    os.pwrite(fd, b"other", 3 * PAGE + 9)
    with HostPool(PAGE, 4) as pool:
        assert pool.wait_ready(4, LONG_S)
        route = FromPool(reader, pool)
        numbers = route.offer(offsets(4, 3, 0), sums[[4, 3, 0]])
        slots = np.array([2, 0, 1], np.int32)
        done = route.submit(numbers, slots, PASSED)
        assert done.wait(LONG_S)
        assert done.failed is not None
        assert done.failed.tolist() == [False, True, False]
        at = pool.addresses(slots)
        assert page(int(at[0])) == bytes([5]) * PAGE
        assert page(int(at[2])) == bytes([1]) * PAGE


def test_a_place_beyond_the_file_is_no_page(reader: Reader) -> None:
    """Also where the bytes of the page before it would be what was expected."""
    sums = np.array([digest(memoryview(bytes([6]) * PAGE))] * 2, np.uint64)
    with HostPool(PAGE, 2) as pool:
        assert pool.wait_ready(2, LONG_S)
        into = np.repeat(pool.addresses(np.array([0], np.int32)), 2)
        done = reader.read(offsets(5, PAGES), into, sums)
        assert done.wait(LONG_S)
        assert done.failed is not None
        assert done.failed.tolist() == [False, True]


def test_a_file_that_cannot_be_read_fails_whatever_was_asked_of_it(native: Digest) -> None:
    reading_end, writing_end = os.pipe()
    os.close(writing_end)
    reader = Reader(reading_end, PAGE, native)
    done = reader.look(offsets(0, 1))
    assert done.wait(LONG_S)
    assert done.failed is not None
    assert done.failed.all()
    assert done.error is not None
    reader.close()
    os.close(reading_end)


def page(address: int) -> bytes:
    return ctypes.string_at(address, PAGE)
