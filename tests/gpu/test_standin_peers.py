"""Pages of the pool's file reach the frames of a CUDA device, on the stand-in driver, verified."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator

import numpy as np
import pytest

from tests.gpu.standin import StandIn
from tests.gpu.test_standin_space import FRAMES, PAGE, device_on
from tests.waiting import LONG_S
from tiermem.host.pinned import HostPool, Register
from tiermem.host.reading import FromPool, Reader
from tiermem.nvme.bounce import BouncedRoute
from tiermem.nvme.digest import digest, native_digest
from tiermem.tier import PASSED


@pytest.fixture
def fake() -> Iterator[StandIn]:
    fake = StandIn()
    yield fake
    fake.reset()


def test_others_pages_come_through_a_pinned_ring_and_spoiled_ones_fail(fake: StandIn) -> None:
    native = native_digest()
    if native is None:
        pytest.skip("this xxhash hides its C functions")
    fd = os.memfd_create("pool", os.MFD_CLOEXEC)
    for i in range(FRAMES):
        os.pwrite(fd, bytes([i + 1]) * PAGE, i * PAGE)
    sums = [digest(memoryview(bytes([i + 1]) * PAGE)) for i in range(FRAMES)]
    os.pwrite(fd, b"spoiled", 2 * PAGE + 77)
    device = device_on(fake)
    ring = HostPool(PAGE, 2, register=Register(device.register, device.unregister))
    assert ring.wait_ready(2, LONG_S)
    reader = Reader(fd, PAGE, native)
    first, second = FromPool(reader, ring), device.routes(ring)[1]
    route = BouncedRoute(first, second, ring)
    try:
        offsets = np.arange(FRAMES, dtype=np.uint64) * np.uint64(PAGE)
        frames = np.arange(FRAMES, dtype=np.int32)[::-1].copy()
        done = route.submit(first.offer(offsets, np.array(sums, np.uint64)), frames, PASSED)
        assert done.wait(LONG_S)
        assert done.failed is not None
        assert done.failed.tolist() == [False, False, True, False]
        for i, at in enumerate(device.frames.addresses(frames).tolist()):
            if i != 2:
                assert ctypes.string_at(at, PAGE) == bytes([i + 1]) * PAGE
    finally:
        route.close()
        second.close()
        reader.close()
        ring.close()
        device.close()
        os.close(fd)
