"""The pager's promises about queued work, on the CPU device and on a GPU."""

from __future__ import annotations

from typing import cast

import pytest

from tests.gpu.device_contract import Engine
from tests.gpu.pager_contract import PagerContract
from tests.gpu.test_emulated import CpuEngine
from tiermem.gpu.emulated import EmulatedDevice
from tiermem.space import Space


class TestLazyOnTheCpu(PagerContract):
    device = "cpu"
    page = 64 << 10

    def engine_of(self, space: Space) -> Engine:
        return CpuEngine(cast(EmulatedDevice, space.device))


class TestEagerOnTheCpu(TestLazyOnTheCpu):
    hide = "eager"


@pytest.mark.gpu
class TestLazyOnAGpu(PagerContract):
    device = "cuda:0"
    page = 2 << 20

    def engine_of(self, space: Space) -> Engine:
        from tests.gpu.test_cuda_device import CudaEngine
        from tiermem.gpu.vmm import CudaDevice

        return CudaEngine(cast(CudaDevice, space.device))


@pytest.mark.gpu
class TestEagerOnAGpu(TestLazyOnAGpu):
    hide = "eager"
