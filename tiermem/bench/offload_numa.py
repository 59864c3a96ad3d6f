"""Host memory of every NUMA node, local to the GPU and remote: the routes from and to each."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np

from tiermem.assemble import assemble
from tiermem.bench.offload_run import Run
from tiermem.bench.offload_stream import Lane, stream
from tiermem.config import Config, Gpu
from tiermem.host.numa import cpus_of_node, node_of_memory, nodes
from tiermem.host.pinned import HostPool, Register
from tiermem.tier import Device

PAGES = 128
GROUP = 32
IN_FLIGHT = 8
READY_S = 60.0


def numa(run: Run, page: int, root: Path = Path("/")) -> None:
    """A pool on each node in turn; a note where there is one node, or none is to be had there.

    root: where sysfs is looked for.
    """
    found = nodes(root)
    if len(found) < 2:
        run.note("one NUMA node: there is no remote memory to measure")
        return
    device = run.settings.device
    parts = assemble(Config(gpu=Gpu(device=device, budget=PAGES * page, page=page)))
    try:
        for node in found:
            with run.leaving_out(f"memory of node {node}"):
                _of_node(run, parts.device, page, node, cpus_of_node(node, root))
    finally:
        parts.close()


def _of_node(run: Run, device: Device, page: int, node: int, cpus: tuple[int, ...]) -> None:
    pin = getattr(device, "register", None)
    register = None if pin is None else Register(pin, device.unregister)  # type: ignore[attr-defined]
    with HostPool(page, PAGES, register=register, cpus=cpus) as pool:
        if not pool.wait_ready(PAGES, READY_S):
            run.note(f"memory of node {node} left out: {pool.statistics().failure}")
            return
        slots = np.arange(PAGES, dtype=np.int32)
        really = {node_of_memory(address) for address in pool.addresses(slots).tolist()}
        if really != {node}:
            run.note(_elsewhere(node, really))
            return
        routes = device.routes(pool)
        try:
            for route in routes:
                run.told.begin(f"memory of node {node}: {route.src.name} to {route.dst.name}")
                lane = Lane(route, slots, slots)
                laps = run.for_a_while(partial(stream, [lane], GROUP, IN_FLIGHT, page))
                names = [run.end_name(end) for end in (route.src, route.dst)]
                src, dst = (f"host:node{node}" if name == "host" else name for name in names)
                path = "copy engine" if register else "memory copy"
                run.add((src, dst), page, GROUP, laps, path)
        finally:
            for route in routes:
                route.close()


def _elsewhere(node: int, really: set[int | None]) -> str:
    if None in really:
        return (
            f"memory of node {node} left out: the system does not say where memory is "
            "(get_mempolicy is refused; containers need CAP_SYS_NICE)"
        )
    there = ", ".join(str(each) for each in sorted(each for each in really if each is not None))
    return (
        f"memory of node {node} left out: the kernel gave memory of node {there}; "
        f"allow it with numactl --membind={node}, or widen the container's cpuset"
    )


def steps(root: Path = Path("/")) -> int:
    """How many measurements `numa` announces."""
    count = len(nodes(root))
    return 2 * count if count > 1 else 0
