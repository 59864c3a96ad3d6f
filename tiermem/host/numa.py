"""Which NUMA node a PCI device hangs on and which processors belong to a node; best effort."""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Collection
from pathlib import Path

_GET_MEMPOLICY = {"x86_64": 239, "aarch64": 236}
_NODE_OF_ADDRESS = 1 | 2
"""MPOL_F_NODE | MPOL_F_ADDR"""


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


def nodes(root: str | os.PathLike[str] = "/") -> tuple[int, ...]:
    """The nodes that have memory, as sysfs numbers them; () where it does not say."""
    base = Path(root) / "sys/devices/system/node"
    try:
        return parse_cpulist((base / "has_memory").read_text())
    except (OSError, ValueError):
        return ()


def node_of_memory(address: int) -> int | None:
    """The node that holds the page at `address`; None where the kernel does not say."""
    number = _GET_MEMPOLICY.get(platform.machine())
    if number is None:
        return None
    node, none = ctypes.c_int(-1), ctypes.c_void_p(None)
    libc = ctypes.CDLL(None, use_errno=True)
    refused = libc.syscall(
        ctypes.c_long(number), ctypes.byref(node), none, ctypes.c_ulong(0),
        ctypes.c_void_p(address), ctypes.c_ulong(_NODE_OF_ADDRESS),
    )  # fmt: skip
    return node.value if refused == 0 else None


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
