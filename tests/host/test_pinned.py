"""The pinned pool: grows in the background, keeps addresses, gives whole chunks back."""

from __future__ import annotations

import ctypes
import logging
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from tests.waiting import until
from tiermem.errors import Closed, ConfigError
from tiermem.host.pinned import HostPool, Register
from tiermem.tier import Place

SLOT = 64 << 10
LONG_S = 20.0


def slots(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int32)


def bytes_at(address: int, nbytes: int = SLOT) -> np.ndarray:
    return np.ctypeslib.as_array((ctypes.c_uint8 * nbytes).from_address(int(address)))


def test_every_slot_holds_its_own_bytes() -> None:
    with HostPool(SLOT, 37, chunk_bytes=8 * SLOT) as pool:
        assert pool.wait_ready(37, LONG_S)
        assert pool.place is Place.HOST
        every = pool.addresses(np.arange(37, dtype=np.int32))
        assert every.dtype == np.uint64
        assert len(np.unique(every)) == 37
        assert not np.any(every % 4096)
        for i, address in enumerate(every):
            bytes_at(address)[:] = i
        assert all((bytes_at(address) == i).all() for i, address in enumerate(every))


def test_slot_sizes_that_do_not_divide_a_huge_page_work() -> None:
    size = 12 << 10
    with HostPool(size, 1000, chunk_bytes=1 << 20) as pool:
        assert pool.wait_ready(1000, LONG_S)
        bytes_at(pool.addresses(slots(999))[0], size)[:] = 7
        assert pool.statistics().bytes_held == 1000 * size


def test_ready_grows_by_chunks_while_a_chunk_is_still_being_pinned() -> None:
    first_done, may_go_on = threading.Event(), threading.Event()
    pinned: list[int] = []

    def pin(address: int, nbytes: int) -> None:
        if pinned:
            first_done.set()
            assert may_go_on.wait(LONG_S)
        pinned.append(nbytes)

    register = Register(pin, lambda address: None)
    with HostPool(SLOT, 10, chunk_bytes=4 * SLOT, register=register, threads=1) as pool:
        assert first_done.wait(LONG_S)
        assert pool.ready == 4
        assert not pool.wait_ready(5, 0.0)
        may_go_on.set()
        assert pool.wait_ready(10, LONG_S)
        assert pinned == [4 * SLOT, 4 * SLOT, 2 * SLOT]
        assert pool.statistics().registered == 3


def test_growing_keeps_addresses_and_bytes() -> None:
    with HostPool(SLOT, 5, chunk_bytes=2 * SLOT) as pool:
        assert pool.wait_ready(5, LONG_S)
        before = pool.addresses(np.arange(5, dtype=np.int32))
        for i, address in enumerate(before):
            bytes_at(address)[:] = 100 + i
        pool.resize(23)
        assert pool.wait_ready(23, LONG_S)
        assert (pool.addresses(np.arange(5, dtype=np.int32)) == before).all()
        assert all((bytes_at(a) == 100 + i).all() for i, a in enumerate(before))
        assert len(np.unique(pool.addresses(np.arange(23, dtype=np.int32)))) == 23


def test_shrinking_unpins_and_frees_whole_chunks_and_growing_takes_them_back_zeroed() -> None:
    pinned: set[int] = set()
    register = Register(lambda address, nbytes: pinned.add(address), pinned.remove)
    with HostPool(SLOT, 16, chunk_bytes=4 * SLOT, register=register) as pool:
        assert pool.wait_ready(16, LONG_S)
        assert len(pinned) == 4
        bytes_at(pool.addresses(slots(15))[0])[:] = 9
        pool.resize(6)
        assert pool.capacity == pool.ready == 6
        assert pool.statistics().bytes_held == 8 * SLOT
        assert len(pinned) == 2
        pool.resize(16)
        assert pool.wait_ready(16, LONG_S)
        assert not bytes_at(pool.addresses(slots(15))[0]).any()
        assert len(pinned) == 4
    assert not pinned


def test_a_pool_made_smaller_does_not_wait_for_the_chunk_in_hand_which_goes_back() -> None:
    started, may_go_on = threading.Event(), threading.Event()
    pinned: set[int] = set()

    def pin(address: int, nbytes: int) -> None:
        pinned.add(address)
        if len(pinned) == 2:
            started.set()
            assert may_go_on.wait(LONG_S)

    register = Register(pin, pinned.remove)
    with HostPool(SLOT, 16, chunk_bytes=4 * SLOT, register=register, threads=1) as pool:
        assert started.wait(LONG_S)
        pool.resize(4)
        assert pool.statistics().in_hand == 1
        assert pool.statistics().bytes_held == 4 * SLOT
        may_go_on.set()
        until(lambda: pool.statistics().in_hand == 0)
        assert len(pinned) == 1
        assert pool.statistics().bytes_held == 4 * SLOT
        pool.resize(16)
        assert pool.wait_ready(16, LONG_S)
    assert not pinned


def test_a_chunk_that_cannot_be_pinned_leaves_the_pool_at_what_it_has(
    caplog: pytest.LogCaptureFixture,
) -> None:
    pinned: list[int] = []

    def pin(address: int, nbytes: int) -> None:
        if len(pinned) == 2:
            raise OSError(12, "out of pinnable memory")
        pinned.append(address)

    with caplog.at_level(logging.WARNING), HostPool(
        SLOT, 20, chunk_bytes=4 * SLOT, register=Register(pin, pinned.remove), threads=1
    ) as pool:  # fmt: skip
        assert not pool.wait_ready(20, LONG_S)
        assert pool.ready == 8
        assert "out of pinnable memory" in (pool.statistics().failure or "")
        assert pool.statistics().bytes_held == 8 * SLOT
        bytes_at(pool.addresses(slots(7))[0])[:] = 1
    assert len([r for r in caplog.records if "stays at" in r.message]) == 1


def test_a_resize_after_a_failure_tries_again() -> None:
    calls: list[int] = []

    def pin(address: int, nbytes: int) -> None:
        calls.append(address)
        if len(calls) == 1:
            raise OSError(12, "not now")

    with HostPool(SLOT, 4, register=Register(pin, lambda address: None)) as pool:
        assert not pool.wait_ready(4, LONG_S)
        pool.resize(4)
        assert pool.wait_ready(4, LONG_S)


def test_use_after_close_is_refused_and_a_second_close_does_nothing() -> None:
    pool = HostPool(SLOT, 4)
    pool.close()
    pool.close()
    with pytest.raises(Closed):
        pool.resize(8)
    assert not pool.wait_ready(4, LONG_S)


def test_closing_while_it_grows_waits_for_the_chunk_in_hand_and_unpins_it() -> None:
    started, may_go_on = threading.Event(), threading.Event()
    pinned: set[int] = set()

    def pin(address: int, nbytes: int) -> None:
        started.set()
        assert may_go_on.wait(LONG_S)
        pinned.add(address)

    register = Register(pin, pinned.remove)
    pool = HostPool(SLOT, 4096, chunk_bytes=4 * SLOT, register=register, threads=1)
    assert started.wait(LONG_S)
    closing = threading.Thread(target=pool.close)
    closing.start()
    may_go_on.set()
    closing.join(LONG_S)
    assert not closing.is_alive()
    assert not pinned


@pytest.mark.parametrize(("slot", "capacity"), [(0, 1), (1000, 1), (-4096, 1), (4096, -1)])
def test_sizes_that_cannot_be_meant_are_refused(slot: int, capacity: int) -> None:
    with pytest.raises(ConfigError):
        HostPool(slot, capacity)


def test_an_empty_pool_is_ready_and_can_grow() -> None:
    with HostPool(SLOT, 0) as pool:
        assert pool.wait_ready(0, LONG_S)
        assert len(pool.addresses(slots())) == 0
        pool.resize(3)
        assert pool.wait_ready(3, LONG_S)


def huge_bytes() -> int:
    """Bytes of this process's mappings of the pool that are huge pages."""
    rows = Path("/proc/self/smaps").read_text().split("tiermem-host")[1:]
    fields = (line.split() for row in rows for line in row.splitlines()[:30])
    return sum(int(f[1]) << 10 for f in fields if f and f[0] == "ShmemPmdMapped:")


def test_large_slots_lie_on_huge_pages_where_the_kernel_can() -> None:
    with HostPool(2 << 20, 4, huge_pages=False) as plain:
        assert plain.wait_ready(4, LONG_S)
        base = huge_bytes()
    with HostPool(2 << 20, 4) as pool:
        assert pool.wait_ready(4, LONG_S)
        assert pool.statistics().bytes_held == 8 << 20
        if huge_bytes() == base:
            pytest.skip("this kernel gives no huge pages for shared memory (before 6.1, or full)")
        assert huge_bytes() == base + (8 << 20)


def test_a_process_that_ends_while_its_pool_grows_ends_quietly() -> None:
    code = "from tiermem.host.pinned import HostPool; pool = HostPool(1 << 20, 4096, threads=2)"
    for _ in range(3):
        ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert (ended.returncode, ended.stderr) == (0, "")
