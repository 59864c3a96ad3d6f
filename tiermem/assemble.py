"""From a configuration to a device, tiers and routes: what a space is made of."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tiermem import crossover, drive, units
from tiermem.books import Crossover
from tiermem.config import Capacities, Config
from tiermem.errors import ConfigError, DriverError, TierFull
from tiermem.tier import Device, Memory, Place, Route, Showable, Tier

if TYPE_CHECKING:
    from tiermem.host.pinned import Register
    from tiermem.nvme.kept import Persist
    from tiermem.nvme.posix import DiskThreads
    from tiermem.nvme.slab import Slab
    from tiermem.pooling import Pooling

CPU_PAGE = 2 << 20
CPU_SHARE = 0.25
"""Of the memory that this process may use: what a fraction in gpu.budget means on the CPU."""

RING_SLOTS = 64
"""With 64 slots of 2 MiB a load through the ring runs at the drive's rate (tests of `nvme/bounce`
on an H200 machine, 2026-11)."""
RING_WAIT_S = 60.0


@dataclass(slots=True)
class Parts:
    """What a space composes. `paths`: the way that each route really takes, in words."""

    device: Device
    capacities: dict[Place, int]  # slots
    tiers: dict[Place, Tier] = field(default_factory=dict)
    routes: dict[tuple[Place, Place], Route] = field(default_factory=dict)
    paths: dict[tuple[Place, Place], str] = field(default_factory=dict)
    slab: Slab | None = None
    readable: Showable | None = None  # the host tier, where pages may be read in place
    crossover: Crossover | None = None
    closers: list[Callable[[], None]] = field(default_factory=list)

    def close(self) -> None:
        """Close everything in the order opposite to its making; a second call does nothing."""
        while self.closers:
            self.closers.pop()()


@dataclass(frozen=True, slots=True)
class Ground:
    """What a configuration means on this machine. device: the same name in every process."""

    device: str
    page_bytes: int
    gpu_total: int
    sizes: Capacities


def assemble(
    config: Config,
    first_gpu: int | None = None,
    persist: Persist | None = None,
    pooling: Pooling | None = None,
) -> Parts:
    """Open device, tiers and routes. On any error, what was opened is closed again.

    first_gpu: bytes of GPU memory to begin with (default: all of gpu.budget). persist: whose
    slab it is, for nvme.persist. pooling: where the host tier gets its memory, little by little.
    """
    from tiermem.nvme.kept import Persist

    persist = persist or Persist(drive.RANK)
    parts = _open(config, survey(config, persist.name), first_gpu)
    parts.tiers[Place.GPU] = parts.device.frames
    try:
        ring_slots = _ring_slots(config, parts)
        _add_host(config, parts, pooling)
        _add_nvme(config, parts, ring_slots, persist)
    except BaseException:
        parts.close()
        raise
    return parts


def on_gpu(config: Config) -> bool:
    """Whether the configuration means a GPU; "auto" takes one where CUDA works."""
    if config.gpu.device != "auto":
        return config.gpu.device.startswith("cuda")
    from tiermem.gpu import driver

    try:
        driver.load()
    except DriverError:
        return False
    return True


def survey(config: Config, rank: str = drive.RANK) -> Ground:
    """Look at the device and resolve all sizes, without opening anything that stays.

    rank: the name of a slab that is kept; what it holds already is room for it.
    """
    from tiermem.host import limits

    available = limits.available_bytes()
    disk = drive.room(config, rank)
    if not on_gpu(config):
        page = CPU_PAGE if config.gpu.page == "auto" else int(config.gpu.page)
        total = available if isinstance(config.gpu.budget, int) else int(available * CPU_SHARE)
        return Ground("cpu", page, total, _resolve(config, page, total, available, disk))
    from tiermem.gpu import driver
    from tiermem.gpu.vmm import automatic_page

    context = driver.Context(driver.load(), _index(config))
    try:
        with context:
            total = context.free_bytes()[1]
        page = automatic_page(context) if config.gpu.page == "auto" else int(config.gpu.page)
        device = f"gpu-{context.uuid}"
    finally:
        context.close()
    return Ground(device, page, total, _resolve(config, page, total, available, disk))


def _open(config: Config, ground: Ground, first_gpu: int | None) -> Parts:
    page = ground.page_bytes
    most = ground.sizes.gpu // page
    frames = most if first_gpu is None else first_gpu // page
    slots = {
        Place.GPU: most,
        Place.HOST: ground.sizes.host // page,
        Place.NVME: drive.slots_in(config, ground.sizes.nvme, page),
    }
    if ground.device == "cpu":
        from tiermem.gpu.emulated import EmulatedDevice

        emulated = EmulatedDevice(page, frames, most, guard=config.gpu.guard)
        return Parts(emulated, slots, closers=[emulated.close])
    from tiermem.gpu.vmm import CudaDevice

    total = ground.gpu_total // page
    device = CudaDevice(_index(config), page, frames, total, guard=config.gpu.guard)
    return Parts(device, slots, closers=[device.close])


def _index(config: Config) -> int:
    return int(config.gpu.device.partition(":")[2] or 0)


def _resolve(config: Config, page: int, gpu: int, host: int, disk: int) -> Capacities:
    return config.resolve(page_bytes=page, gpu_total=gpu, host_total=host, nvme_total=disk)


def _add_host(config: Config, parts: Parts, pooling: Pooling | None) -> None:
    from tiermem.host import limits
    from tiermem.host.pinned import HostPool
    from tiermem.host.within import WithinRoute

    capacity = parts.capacities[Place.HOST]
    if not capacity:
        return
    device = parts.device
    register = _register(device)
    if pooling is None:
        limits.check(capacity * device.page_bytes)
    host: Memory
    if config.host.read_in_place:
        host = parts.readable = device.host_pages(capacity)
    else:
        first, chunks = (capacity, None) if pooling is None else (0, pooling.chunks)
        host = HostPool(
            device.page_bytes, first, register=register, cpus=near(device), shared=chunks
        )
        parts.closers.append(host.close)
        if pooling is not None:
            pooling.fill(host, capacity)
            _add_route(parts, WithinRoute(host), "memory copy")
    parts.tiers[Place.HOST] = host
    down, up = device.routes(host)
    if parts.readable is not None:
        parts.crossover = crossover.measure(device, parts.readable, up)
    _add_route(parts, down, "copy engine" if register else "memory copy")
    _add_route(parts, up, "copy engine" if register else "memory copy")


def _register(device: Device) -> Register | None:
    """How host memory is pinned for the device; None where nothing needs to be."""
    from tiermem.host.pinned import Register

    pin = getattr(device, "register", None)
    return None if pin is None else Register(pin, device.unregister)  # type: ignore[attr-defined]


def near(device: Device, root: str | os.PathLike[str] = "/") -> tuple[int, ...]:
    """Processors of the GPU's NUMA node, where threads that populate host memory run, so that the
    memory comes from there; () where there is one node or the device knows of none."""
    from tiermem.host import numa

    node = getattr(device, "numa_node", None)
    if node is None or len(numa.nodes(root)) < 2:
        return ()
    return numa.cpus_of_node(node, root)


def _add_nvme(config: Config, parts: Parts, ring_slots: int, persist: Persist) -> None:
    from tiermem.nvme.posix import DiskThreads, PosixRoute

    capacity = parts.capacities[Place.NVME]
    if not capacity:
        return
    device = parts.device
    slab = parts.slab = drive.open_slab(config, device.page_bytes, capacity, persist)
    parts.closers.append(slab.close)
    threads = DiskThreads(slab)
    parts.closers.append(threads.close)
    parts.tiers[Place.NVME] = slab
    memories: list[Memory] = [device.frames] if device.torch_device == "cpu" else []
    host = parts.tiers.get(Place.HOST)
    if host is not None:
        memories.append(host)  # type: ignore[arg-type]  # the host tier is a Memory
    if not memories:
        raise ConfigError(
            "nvme.path is set and host.capacity is 0: a GPU reaches the drive through the host "
            "pool; give it some capacity"
        )
    if ring_slots:
        ring = _add_bounced(parts, threads, ring_slots)
        if drive.why_not_direct(config, device, ring) is None:
            _add_direct(parts, slab)
    elif config.nvme.mode == "kvikio":
        drive.why_not_direct(config, device, device.frames)
    for memory in memories:
        streams = device.streams if memory.place == Place.GPU else None
        for src, dst in ((memory.place, Place.NVME), (Place.NVME, memory.place)):
            _add_route(parts, PosixRoute(threads, memory, src, dst, streams), drive.path_of(slab))


def _ring_slots(config: Config, parts: Parts) -> int:
    """Slots of each of the two rings between a GPU and its drive: a part of host.capacity."""
    host = parts.capacities[Place.HOST]
    if parts.device.torch_device == "cpu" or not (parts.capacities[Place.NVME] and host):
        return 0
    slots = min(RING_SLOTS, host // 8)
    if not slots:
        raise ConfigError(
            f"host.capacity = {units.format_exactly(config.host.capacity)}: {host} pages; with an "
            "NVMe tier at least 8, because bytes cross between GPU and drive through some of them"
        )
    parts.capacities[Place.HOST] = host - 2 * slots
    return slots


def _add_bounced(parts: Parts, threads: DiskThreads, slots: int) -> Memory:
    """GPU to drive and back, each through a ring of pinned slots of its own; one of the rings.

    A page on the drive comes up without a slot of the host tier, so a full one is not in its way.
    """
    from tiermem.nvme.bounce import BouncedRoute

    device = parts.device
    down, up = pinned_ring(parts, slots), pinned_ring(parts, slots)
    legs: list[Route] = [
        device.routes(down)[0],
        threads.routes(down)[0],
        threads.routes(up)[1],
        device.routes(up)[1],
    ]
    parts.closers += [leg.close for leg in legs]
    path = f"{drive.path_of(threads.slab)}, pinned ring, copy engine"
    _add_route(parts, BouncedRoute(legs[0], legs[1], down), path)
    _add_route(parts, BouncedRoute(legs[2], legs[3], up), path)
    return up


def pinned_ring(parts: Parts, slots: int) -> Memory:
    """So many slots that pages cross on their way to the GPU or from it, and that no tier has."""
    from tiermem.host.pinned import HostPool

    device = parts.device
    ring = HostPool(device.page_bytes, slots, register=_register(device), cpus=near(device))
    parts.closers.append(ring.close)
    if not ring.wait_ready(slots, RING_WAIT_S):
        raise TierFull(f"host: no pinned memory for {slots} pages on their way from or to the GPU")
    return ring


def _add_direct(parts: Parts, slab: Slab) -> None:
    """Through kvikio instead, except for what an older version stored."""
    from tiermem.nvme.kvikio import KvikioFile, KvikioRoute

    device, ends = parts.device, (Place.GPU, Place.NVME)
    file = KvikioFile(slab)
    parts.closers.append(file.close)
    for src, dst in (ends, ends[::-1]):
        digest = device.digest()
        parts.closers.append(digest.close)
        route = KvikioRoute(
            file, slab, device.frames, src, dst, digest, device.streams, parts.routes[src, dst]
        )
        _add_route(parts, route, "kvikio")


def _add_route(parts: Parts, route: Route, path: str) -> None:
    parts.routes[route.src, route.dst] = route
    parts.paths[route.src, route.dst] = path
    parts.closers.append(route.close)
