"""A rig on the tests' stand-in for the CUDA driver, which does nothing: what is left is Python."""

from __future__ import annotations

import time

from tests.gpu.standin import StandIn
from tiermem.assemble import Parts
from tiermem.bench.rig import GROUP, Hide, Rig, Shape
from tiermem.config import Config
from tiermem.gpu.calibrate import Calibration
from tiermem.gpu.vmm import CudaDevice
from tiermem.space import Space
from tiermem.tier import Place

PAGE = 2 << 20


class DriverlessRig(Rig):
    """A CUDA device of so many pages and a host tier of twice as many, with no memory behind."""

    def __init__(self, pages: int, hide: Hide) -> None:
        super().__init__(Shape("cuda:0", PAGE, pages), hide)

    def _open(self, config: Config) -> Space:
        self._fake = StandIn()
        self._fake.idle(True)
        gpu, host = self.shape.pages, 2 * self.shape.pages + GROUP
        links = Calibration(page_bytes=PAGE, up_gbps=1e6, down_gbps=1e6)  # nobody sleeps for a copy
        device = CudaDevice(0, PAGE, gpu, gpu + 8, driver=self._fake.driver(), calibration=links)
        capacities = {Place.GPU: gpu, Place.HOST: host, Place.NVME: 0}
        parts = Parts(device, capacities, closers=[device.close])
        pages = device.host_pages(host)
        for tier in (device.frames, pages):
            tier.wait_ready()
        parts.tiers[Place.GPU], parts.tiers[Place.HOST] = device.frames, pages
        for route in device.routes(pages):
            parts.routes[route.src, route.dst] = route
            parts.paths[route.src, route.dst] = "stand-in"
            parts.closers.append(route.close)
        return Space(config, parts)

    def close(self) -> None:
        super().close()
        self._fake.reset()


def group_us(r: Rig, n: int, stealing: bool) -> list[float]:
    """us of use() of n groups of 64 cold pages, entered and left, all settled in between."""
    took: list[float] = []
    with r.region("a") as a, r.region("b") as b:
        here = a, r.fill(a)
        r.down(*here)
        there = (b, r.fill(b)) if stealing else here
        while len(took) < n:
            if stealing:
                r.down(*there)
            for pages in here[1]:
                start = time.perf_counter()
                with here[0].use(pages, "read", r.stream):
                    pass
                took.append((time.perf_counter() - start) * 1e6)
                r.space.drain()
            if not stealing:
                r.dirty(*here)
                r.down(*here)
            here, there = there, here
    return took[1:]
