"""Whole spaces on the stand-in CUDA driver: bad hardware, and what still works then."""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest

from tests.gpu.standin import StandIn
from tests.waiting import LONG_S, host_slots, until
from tiermem.assemble import Parts
from tiermem.books import Crossover
from tiermem.config import Config, Gpu, Host
from tiermem.errors import DriverError, PageInUse, TierFailed, TierFull
from tiermem.gpu.calibrate import Calibration
from tiermem.gpu.vmm import CudaDevice
from tiermem.host.pinned import HostPool, Register
from tiermem.region import Pages, Region
from tiermem.space import Space
from tiermem.tier import Place, Showable

PAGE = 2 << 20
FRAMES = 4
HOST_PAGES = 8


@pytest.fixture
def fake() -> Iterator[StandIn]:
    fake = StandIn()
    yield fake
    fake.reset()


def device_on(fake: StandIn) -> CudaDevice:
    calibration = Calibration(page_bytes=PAGE)
    return CudaDevice(0, PAGE, FRAMES, 12, driver=fake.driver(), calibration=calibration)


@contextmanager
def opened(fake: StandIn, *, in_place: bool = False) -> Iterator[Space]:
    """A space as `assemble` composes it; chunks of two host pages."""
    gpu = Gpu(device="cuda:0", budget=FRAMES * PAGE, page=PAGE, high=1.0, low=1.0)
    size = HOST_PAGES * PAGE
    config = Config(gpu=gpu, host=Host(capacity=size, high=1.0, low=1.0, read_in_place=in_place))
    device = device_on(fake)
    capacities = {Place.GPU: FRAMES, Place.HOST: HOST_PAGES, Place.NVME: 0}
    parts = Parts(device, capacities, closers=[device.close])
    parts.tiers[Place.GPU] = device.frames
    host: Showable | HostPool
    if in_place:
        host = parts.readable = device.host_pages(HOST_PAGES)
        parts.crossover = Crossover(4, 4)
    else:
        register = Register(device.register, device.unregister)
        host = HostPool(PAGE, HOST_PAGES, chunk_bytes=2 * PAGE, register=register, threads=1)
        parts.closers.append(host.close)
    parts.tiers[Place.HOST] = host
    for route in device.routes(host):
        parts.routes[route.src, route.dst] = route
        parts.paths[route.src, route.dst] = "stand-in"
        parts.closers.append(route.close)
    with Space(config, parts) as space:
        if isinstance(host, HostPool):
            host.wait_ready(HOST_PAGES, LONG_S)
        yield space


def write(region: Region, pages: Pages) -> None:
    for page in pages.tolist():
        with region.use(page, "write"):
            ctypes.memset(region.address + page * PAGE, page + 1, PAGE)


def assert_written(region: Region, pages: Pages) -> None:
    for page in pages.tolist():
        with region.use(page):
            at = region.address + page * PAGE
            assert ctypes.string_at(at, 8) == bytes([page + 1]) * 8


@pytest.mark.parametrize(
    ("attribute", "says"), [(102, "no virtual memory management"), (122, "no stream writes")]
)
def test_a_device_without_what_paging_needs_is_refused(
    fake: StandIn, attribute: int, says: str
) -> None:
    fake.deny(attribute)
    with pytest.raises(DriverError, match=f"{says}; use the CPU device"):
        device_on(fake)
    assert fake.in_use() == 0


def test_a_device_that_makes_no_host_pages_pages_but_does_not_read_in_place(fake: StandIn) -> None:
    fake.deny(141)
    device = device_on(fake)
    try:
        with pytest.raises(DriverError, match=r"550 or newer; set host\.read_in_place = false"):
            device.host_pages(4)
    finally:
        device.close()
    with opened(fake) as space, space.reserve(8 * PAGE) as region:
        pages = region.allocate(FRAMES)
        write(region, pages)
        region.hint(pages, "cold")
        assert space.drain(LONG_S)
        assert_written(region, pages)


def test_host_pages_that_cannot_be_had_are_a_full_tier(fake: StandIn) -> None:
    device = device_on(fake)
    try:
        before = fake.in_use()
        fake.limit(before + 2 * PAGE)
        with pytest.raises(
            TierFull, match=r"host: need 4 pages of 2.0MiB.*gave 2; lower host\.cap"
        ):
            device.host_pages(4)
        assert fake.in_use() == before
    finally:
        device.close()


def test_memory_that_others_took_meanwhile_is_had_again_when_they_give_it_back(
    fake: StandIn, caplog: pytest.LogCaptureFixture
) -> None:
    with opened(fake) as space, space.reserve(16 * PAGE) as region:
        host_slots(space, HOST_PAGES)
        pages = region.allocate(FRAMES)
        write(region, pages)
        kept = fake.in_use() - 2 * PAGE
        space.limit(2 * PAGE)
        until(lambda: fake.in_use() == kept)
        fake.limit(kept)  # somebody else has the rest of the device
        with caplog.at_level(logging.WARNING):
            space.limit(FRAMES * PAGE)
            more = region.allocate(2)  # by eviction
            write(region, more)
        assert_written(region, np.concatenate([pages, more]))
        with region.use(more), pytest.raises(TierFull, match=r"need 1 pages, .* 2 of 2 pinned"):
            region.use(int(pages[0])).__enter__()
        until(lambda: any("no memory for 2 pages" in r.getMessage() for r in caplog.records))
        fake.limit(1 << 40)
        space.limit(FRAMES * PAGE)
        until(lambda: space.statistics().tier(Place.GPU).capacity == FRAMES)
        with region.use(pages):
            pass
        space.check()


def test_a_chunk_that_cannot_be_pinned_leaves_a_smaller_pool_that_serves(
    fake: StandIn, caplog: pytest.LogCaptureFixture
) -> None:
    fake.fail("cuMemHostRegister", 3, 712)
    with (
        caplog.at_level(logging.WARNING),
        opened(fake) as space,
        space.reserve(16 * PAGE) as region,
    ):
        host_slots(space, 4)
        told = [r for r in caplog.records if "host pool stays at" in r.getMessage()]
        assert len(told) == 1
        assert "cuMemHostRegister" in told[0].getMessage()
        pages = region.allocate(FRAMES)
        write(region, pages)
        more = region.allocate(2)
        write(region, more)
        assert_written(region, np.concatenate([pages, more]))
        space.check()


def test_a_lost_device_is_told_to_every_user_and_the_space_closes(fake: StandIn) -> None:
    with opened(fake) as space:
        region = space.reserve(8 * PAGE)
        pages = region.allocate(2)
        write(region, pages)
        region.hint(pages, "cold")
        assert space.drain(LONG_S)
        other = region.allocate(FRAMES)  # the frames of the first are others' now
        region.free(other)
        fake.fail_always("cuMemcpyBatchAsync", 700)
        with pytest.raises(TierFailed):
            region.use(pages).__enter__()
        fake.reset()


def test_pages_are_read_in_place_on_the_stand_in(fake: StandIn) -> None:
    with opened(fake, in_place=True) as space:
        region = space.reserve(16 * PAGE, in_place="always")
        host_slots(space, HOST_PAGES)
        pages = region.allocate(2)
        write(region, pages)
        region.hint(pages, "cold")
        assert space.drain(LONG_S)
        write(region, region.allocate(FRAMES))  # takes the frames that still show them
        with region.use(pages):
            assert (region.where(pages) == Place.HOST).all()
            with pytest.raises(PageInUse):
                region.use(int(pages[0]), "write").__enter__()
        assert_written(region, pages)
        assert space.statistics().counts["read_in_place"] >= 2
        write(region, pages)
        assert (region.where(pages) == Place.GPU).all()
        assert_written(region, pages)
        space.check()
        region.close()
