"""One host pool for several spaces: chunks follow demand, come zeroed, and outlive their maker."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import numpy as np
import pytest

from tests.test_sharing import PAGE, PAGES, config, fill, verify
from tests.waiting import until
from tiermem import Config, ConfigError, DriverError, Host, Region, Share, Space, TierFull
from tiermem.host import pinned
from tiermem.host.shared import SharedChunks
from tiermem.ledger import Ledger, Member
from tiermem.ledger_pass import receive
from tiermem.pooling import chunk_bytes, pool_label
from tiermem.tier import Place

POOL = 64  # pages; a chunk is one page
ROOM = 4 * PAGES


@pytest.fixture(autouse=True)
def home(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="tm-") as name:
        monkeypatch.setenv("XDG_RUNTIME_DIR", name)
        yield Path(name) / "tiermem" / "host"


def pooled(name: str, *, gpu: int = 8, host: int = ROOM, idle_s: float = 60.0) -> Config:
    """A space of so many GPU pages, all its own, and a part of POOL pages of host memory."""
    given = config(name, budget=gpu, host=host, total=gpu, idle_s=idle_s)
    return msgspec.structs.replace(
        given, share=msgspec.structs.replace(given.share, group=name, host=POOL * PAGE)
    )


def both(name: str, **given: float) -> Config:
    """The same, in one group, on a card that is large enough for two."""
    one = pooled(name, **given)  # type: ignore[arg-type]
    share = msgspec.structs.replace(one.share, group="both", total=2 * PAGES * PAGE)
    return msgspec.structs.replace(one, share=share)


@contextmanager
def engine(given: Config) -> Iterator[tuple[Space, Region]]:
    with Space.open(given) as space, space.reserve(ROOM * PAGE) as region:
        yield space, region
        space.check()


def host(space: Space) -> int:
    return space.statistics().tier(Place.HOST).capacity


def members(home: Path) -> dict[str, Member]:
    (ledger,) = Ledger.found(home)
    with ledger:
        return {member.name: member for member in ledger.snapshot().members}


def memory(home: Path) -> int:
    """Bytes that the pool's file occupies, by whoever has it."""
    (ledger,) = Ledger.found(home)
    with ledger:
        fd = receive(ledger.path, pool_label(ledger.budget))
    assert fd is not None
    try:
        return os.fstat(fd).st_blocks * 512
    finally:
        os.close(fd)


def test_the_host_tier_grows_with_what_goes_down(home: Path) -> None:
    with engine(both("one")) as (space, region):
        until(lambda: host(space) == 1)
        pages = fill(region, 8)
        for _ in range(4):
            pages += fill(region, 8)
        assert host(space) >= 32
        assert space.statistics().counts.get("dropped", 0) == 0
        verify(region, pages)
        until(lambda: members(home)["one"].held == host(space) * PAGE == memory(home))
    assert Ledger.found(home) == []


def test_host_memory_moves_to_whoever_needs_it_and_no_page_is_wrong(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tiermem.membership.EXPECT_S", 10.0)
    with engine(both("old", idle_s=0.3)) as (old, kept), engine(both("new")) as (new, region):
        pages = fill(kept, 8)
        for _ in range(6):
            pages += fill(kept, 8)
        assert host(old) >= 48
        kept.free(pages[8:40])
        pages = pages[:8] + pages[40:]
        mine = fill(region, 8)
        for _ in range(3):
            mine += fill(region, 8)
        until(lambda: host(new) >= 24)
        until(lambda: host(old) + host(new) <= POOL)
        verify(region, mine)
        verify(kept, pages)
        assert old.statistics().counts.get("dropped", 0) == 0
        assert old.statistics().counts.get("host_host", 0) > 0, "pages moved before the end"


def test_a_pool_outlives_the_process_that_made_it(home: Path) -> None:
    with engine(both("first")) as (one, region), engine(both("second")) as (two, other):
        mine = fill(other, 8) + fill(other, 8)
        fill(region, 8)
        until(lambda: host(one) > 0 and host(two) >= 8)
        before = memory(home)
        region.close()
        one.close()
        with engine(both("third")) as (three, third):
            more = fill(third, 8) + fill(third, 8)
            until(lambda: host(three) >= 8)
            assert memory(home) <= before + POOL * PAGE
            verify(other, mine)
            verify(third, more)


KILLED = """
import sys
from tests.test_pooling import both, fill
from tiermem import Space
space = Space.open(both("victim"))
region = space.reserve(128 * 65536)
pages = fill(region, 8)
for _ in range(5):
    pages += fill(region, 8)
print("full", flush=True)
sys.stdin.read()
"""


def test_the_chunks_of_a_killed_process_are_free_and_read_as_zeros(home: Path) -> None:
    with engine(both("survivor")) as (space, region):
        until(lambda: host(space) == 1)
        with subprocess.Popen(
            [sys.executable, "-c", KILLED],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=Path(__file__).parents[1],
        ) as victim:
            assert victim.stdout is not None
            assert victim.stdout.readline() == b"full\n"
            until(lambda: members(home)["victim"].held >= 40 * PAGE)
            victim.send_signal(signal.SIGKILL)
        until(lambda: members(home).keys() == {"survivor"})
        until(lambda: memory(home) == members(home)["survivor"].held)
        mine = fill(region, 8)
        for _ in range(6):
            mine += fill(region, 8)
        assert host(space) >= 48
        verify(region, mine)


def test_memory_that_cannot_be_had_is_given_up_and_asked_for_again_later(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tiermem.pooling.BACKOFF_S", 0.05)
    populate, fails = pinned._populate, [False]

    def may_fail(address: int, nbytes: int) -> None:
        if fails[0]:
            raise DriverError("no memory, says the test")
        populate(address, nbytes)

    monkeypatch.setattr(pinned, "_populate", may_fail)
    with engine(both("one")) as (space, region):
        until(lambda: host(space) == 1)
        fails[0] = True
        fill(region, 8)
        fill(region, 8)
        assert host(space) == 1
        until(lambda: (one := members(home)["one"]).reserved == 0 and one.held == PAGE)
        fails[0] = False
        until(lambda: bool(fill(region, 4)) and host(space) >= 8)
        until(lambda: members(home)["one"].held == host(space) * PAGE)


def test_what_the_pool_cannot_be_is_refused() -> None:
    in_place = msgspec.structs.replace(
        both("one"), host=Host(capacity=ROOM * PAGE, read_in_place=True)
    )
    with pytest.raises(ConfigError, match=r"share\.host and host\.read_in_place"):
        Space.open(in_place)
    with engine(both("one")):
        other = both("two")
        share = msgspec.structs.replace(other.share, host=2 * POOL * PAGE)
        with pytest.raises(ConfigError, match="already share"):
            Space.open(msgspec.structs.replace(other, share=share))
    assert isinstance(Share().host, type(None))


@pytest.mark.parametrize("swept", [True, False])
def test_a_chunk_has_one_holder_and_comes_without_its_bytes(swept: bool) -> None:
    fd = SharedChunks.create(4 * PAGE)
    one, two = SharedChunks(fd, PAGE), SharedChunks(fd, PAGE)
    taken = one.take()
    os.pwrite(one.fd, b"secret", taken * PAGE)
    others = {two.take() for _ in range(3)}
    assert taken not in others
    with pytest.raises(TierFull, match="all 4 chunks"):
        two.take()
    os.close(one.fd)  # as if it had died: nothing is tidied up
    one.fd = -1
    assert os.pread(two.fd, 6, taken * PAGE) == b"secret"
    if swept:
        assert two.sweep() == 1
        assert os.pread(two.fd, 6, taken * PAGE) == bytes(6)
    assert two.take() == taken
    assert os.pread(two.fd, 6, taken * PAGE) == bytes(6)
    two.close()
    os.close(fd)


@pytest.mark.parametrize("what", ["unsealed", "odd", "pipe"])
def test_a_file_that_is_not_a_pool_is_refused(what: str, tmp_path: Path) -> None:
    if what == "pipe":
        fd, other = os.pipe()
        os.close(other)
    elif what == "odd":
        fd = SharedChunks.create(PAGE + 4096)
    else:
        fd = os.memfd_create("other", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(fd, PAGE)
    with pytest.raises(ConfigError):
        SharedChunks(fd, PAGE)
    os.close(fd)


def test_chunks_are_the_same_for_all_who_share_a_budget() -> None:
    assert chunk_bytes(64 << 30) == 256 << 20
    assert chunk_bytes(1 << 30) == 16 << 20
    assert chunk_bytes(POOL * PAGE) == PAGE
    with pytest.raises(ConfigError, match="at least"):
        chunk_bytes(1000)


def test_zeros_are_what_a_fresh_slot_holds() -> None:
    from tiermem.host.pinned import HostPool

    fd = SharedChunks.create(2 * PAGE)
    with SharedChunksOf(fd) as chunks, HostPool(PAGE, 2, shared=chunks) as pool:
        assert pool.wait_ready(2, 10)
        at = pool.addresses(np.array([0, 1], np.int32))
        view(int(at[0]))[:] = 7
        pool.resize(0)
        assert chunks.mine == 0
        pool.resize(2)
        assert pool.wait_ready(2, 10)
        assert not view(int(at[0])).any()
    os.close(fd)


@contextmanager
def SharedChunksOf(fd: int) -> Iterator[SharedChunks]:
    chunks = SharedChunks(fd, PAGE)
    try:
        yield chunks
    finally:
        chunks.close()


def view(address: int) -> np.ndarray:
    import ctypes

    return np.ctypeslib.as_array((ctypes.c_uint8 * PAGE).from_address(address))
