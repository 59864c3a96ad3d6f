"""Which NUMA node a PCI device hangs on and which processors belong to a node; best effort."""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path


def parse_cpulist(text: str) -> tuple[int, ...]:
    """The processors named by a kernel list such as "0-3,8,10-11"; () for an empty list."""
    cpus: set[int] = set()
    for part in text.strip().split(","):
        if not part:
            continue
        first, _, last = part.partition("-")
        cpus.update(range(int(first), int(last or first) + 1))
    return tuple(sorted(cpus))


def node_of_pci(address: str, root: str | os.PathLike[str] = "/") -> int | None:
    """The node of the PCI device at `address` ("0000:3b:00.0"); None where sysfs does not say.

    The driver writes domains with eight digits, sysfs with four; both are understood.
    """
    domain, _, rest = address.strip().lower().partition(":")
    try:
        name = f"{int(domain, 16):04x}:{rest}"
        text = (Path(root) / "sys/bus/pci/devices" / name / "numa_node").read_text()
        node = int(text)
    except (OSError, ValueError):
        return None
    return node if node >= 0 else None


def cpus_of_node(node: int, root: str | os.PathLike[str] = "/") -> tuple[int, ...]:
    """Processors of a node; () where sysfs does not say."""
    try:
        path = Path(root) / f"sys/devices/system/node/node{node}/cpulist"
        return parse_cpulist(path.read_text())
    except (OSError, ValueError):
        return ()


def stay_on(cpus: Collection[int]) -> bool:
    """Bind the calling thread to those of `cpus` that it may use; False if that binds nothing.

    Memory is taken from the node of the thread that touches it first, so a thread that populates
    a pool runs on the node of the GPU.
    """
    if not hasattr(os, "sched_setaffinity"):
        return False
    allowed = set(cpus) & os.sched_getaffinity(0)
    if not allowed:
        return False
    os.sched_setaffinity(0, allowed)
    return True
