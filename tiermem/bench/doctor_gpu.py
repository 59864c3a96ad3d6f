"""What the doctor says of GPUs: driver, virtual memory, calibration, topology, NUMA placement."""

from __future__ import annotations

import ctypes
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tiermem.bench.findings import Line, note, ok, problem
from tiermem.bench.survey import Topology
from tiermem.config import Config
from tiermem.errors import DriverError
from tiermem.host.numa import parse_cpulist
from tiermem.units import format_bytes

CPU_DEVICE = 'gpu.device = "cpu" runs without a GPU'


@dataclass(frozen=True, slots=True)
class Cuda:
    """One device as the driver describes it."""

    name: str
    index: int
    driver: str | None
    cuda: str
    missing: tuple[str, ...]
    """Optional driver calls that this driver lacks."""
    memory_bytes: int
    vmm: bool
    posix_fd: bool
    rdma: bool
    """Pages can be made so that other devices reach them (GDS, peer copies)."""
    host_numa: bool
    calibration: dict[str, float] | None
    """None: not measured on this device and driver yet."""


VMM, POSIX_FD, RDMA_OF_VMM, HOST_NUMA = 102, 103, 110, 141
"""CUdevice_attribute numbers, from cuda.h."""


def ask(index: int = 0) -> Cuda | str:
    """Ask the driver about a device; its own sentence when it cannot be asked."""
    from tiermem.gpu import calibrate, driver

    try:
        cuda = driver.load()
        context = driver.Context(cuda, index)
    except DriverError as error:
        return str(error)
    try:
        total = ctypes.c_uint64()
        cuda.call("cuDeviceTotalMem", ctypes.byref(total), context.device)
        return Cuda(
            name=context.name,
            index=index,
            driver=driver_version(),
            cuda=cuda.version_text,
            missing=cuda.missing,
            memory_bytes=total.value,
            vmm=bool(context.attribute(VMM)),
            posix_fd=bool(context.attribute(POSIX_FD)),
            rdma=bool(context.attribute(RDMA_OF_VMM)),
            host_numa=bool(context.attribute(HOST_NUMA)),
            calibration=_stored(calibrate.path(context)),
        )
    except DriverError as error:
        return str(error)
    finally:
        context.close()


def driver_version(root: Path = Path("/")) -> str | None:
    """Of the kernel module, such as 580.65.06; None where there is none."""
    try:
        text = (root / "proc/driver/nvidia/version").read_text()
    except OSError:
        return None
    found = re.search(r"Kernel Module.*?\s(\d+(?:\.\d+)+)\s", text)
    return found[1] if found else None


def _stored(file: Path) -> dict[str, float] | None:
    """The numbers of a stored calibration; None where there is none or it cannot be read."""
    try:
        stored = json.loads(file.read_text())
    except (OSError, ValueError):
        return None
    numbers = stored.items() if isinstance(stored, dict) else ()
    return {name: value for name, value in numbers if isinstance(value, int | float)}


def gpu_lines(config: Config, found: Cuda | str) -> Iterator[Line]:
    """The driver and what it can do, against what the configuration asks for."""
    if isinstance(found, str):
        yield _no_driver(config.gpu.device, found)
        return
    version = found.driver or "of unknown version"
    memory = format_bytes(found.memory_bytes)
    yield ok("driver", f"{found.name}, driver {version}, CUDA {found.cuda}, {memory}")
    yield from _abilities(config, found)
    budget = config.gpu.budget
    if isinstance(budget, int) and budget > found.memory_bytes:
        yield problem(
            "driver",
            f"gpu.budget is {format_bytes(budget)}, the device has "
            f"{format_bytes(found.memory_bytes)}",
            'lower gpu.budget, or write a part of it such as "90%"',
        )
    yield _calibration(found)


def _no_driver(device: str, reason: str) -> Line:
    if device == "cpu":
        return ok("driver", f"not needed for the CPU device ({reason})")
    if device == "auto":
        return note("driver", f"no GPU: {reason}", CPU_DEVICE)
    return problem("driver", f"gpu.device is {device}, but: {reason}", CPU_DEVICE)


def _abilities(config: Config, found: Cuda) -> Iterator[Line]:
    if not found.vmm:
        yield problem(
            "CUDA virtual memory",
            "the device cannot map memory page by page",
            "nothing pages on it; " + CPU_DEVICE,
        )
        return
    able = [
        ("shared between processes", found.posix_fd),
        ("reachable by other devices", found.rdma),
    ]
    words = ", ".join(f"{'' if yes else 'not '}{what}" for what, yes in able)
    yield ok("CUDA virtual memory", f"page by page; pages are {words}")
    if found.missing:
        yield note(
            "CUDA copies",
            f"the driver lacks {', '.join(found.missing)}: small pages copy slower",
            "driver 570 (CUDA 12.8) or newer",
        )
    if found.host_numa:
        yield ok("read in place", "host pages can be shown at GPU addresses")
    elif config.host.read_in_place:
        yield problem(
            "read in place",
            "host.read_in_place is on, but this driver cannot show host pages at GPU addresses",
            "turn it off, or driver 575 (CUDA 12.9) or newer",
        )
    else:
        yield note("read in place", "host pages cannot be shown at GPU addresses here")


def _calibration(found: Cuda) -> Line:
    measured = found.calibration
    if not measured:
        return ok("calibration", "not measured yet; the first start does it in about a second")
    page = int(measured.get("page_bytes", 0))
    parts = [f"page {format_bytes(page)}"]
    for name, text in (("down", "to the host"), ("up", "to the GPU")):
        below = int(measured.get(f"gather_below_{name}", 0))
        rate = measured.get(f"{name}_gbps", 0.0)
        parts.append(f"{text} {rate:.1f} GB/s, gather kernel below {format_bytes(below)}")
    return ok("calibration", "; ".join(parts))


def topology_lines(topology: Topology) -> Iterator[Line]:
    """The advice of `tiermem topo`; one good line when there is none."""
    for advice in topology.advice:
        text = f"{advice.where}: {advice.text}"
        yield Line(advice.level, "topology", text, advice.way_out)
    if not topology.advice:
        gpus = sum(place.kind == "gpu" for place in topology.places)
        yield ok("topology", f"{gpus} GPUs, every known link at full speed (see tiermem topo)")
    if topology.no_driver and any(place.kind == "gpu" for place in topology.places):
        yield note("NVML", topology.no_driver, "pip install 'tiermem[topo]'")


def placement_lines(topology: Topology, cpus: frozenset[int] | None = None) -> Iterator[Line]:
    """Does this process run beside the GPUs? cpus: those it may use; by default asks the system."""
    allowed = frozenset(os.sched_getaffinity(0)) if cpus is None else cpus
    if len(topology.nodes) < 2:
        yield ok("NUMA", "one node: nothing to place")
        return
    near = {node.index: set(parse_cpulist(node.cpus)) & allowed for node in topology.nodes}
    for place in topology.places:
        if place.kind != "gpu":
            continue
        if place.node is None:
            yield note("NUMA", f"the node of {place.title} is not known")
        elif not near.get(place.node):
            yield note(
                "NUMA",
                f"this process may use no core of node {place.node}, where {place.title} is",
                f"numactl --cpunodebind={place.node}, or widen the container's cpuset",
            )
        else:
            yield ok("NUMA", f"{place.title}: cores of its node {place.node} may be used")
