"""The PCIe tree of one machine: which link belongs to whom, and how two devices are related.

Relations carry the names that nvidia-smi gave them: PIX one switch, PXB several, PHB the host
bridge, NODE host bridges of one NUMA node, SYS between NUMA nodes.
"""

from __future__ import annotations

from enum import StrEnum

from tiermem.bench.links import Link, of_generation
from tiermem.bench.nvml import Nvml, Pair
from tiermem.bench.sysfs import Device, Node, Sysfs

DRIVES = ("nvme", "disk")
ENDS = ("gpu", *DRIVES, "nic")


class Relation(StrEnum):
    NVLINK = "NVLink"
    PIX = "PIX"
    PXB = "PXB"
    PHB = "PHB"
    NODE = "NODE"
    SYS = "SYS"
    UNKNOWN = "unknown"


class Graph:
    """Devices by address with what sysfs and NVML say of them. Read only."""

    def __init__(self, sysfs: Sysfs, nvml: Nvml | None) -> None:
        self.devices = {device.bdf: device for device in sysfs.devices}
        self.nodes = sysfs.nodes or (Node(0, "", None, None),)
        self.virtual = sysfs.virtual is not None
        self.iommu = sysfs.iommu
        self.gpus = {gpu.bus_id: gpu for gpu in nvml.gpus} if nvml else {}
        self._pairs = {(pair.a, pair.b): pair for pair in nvml.pairs} if nvml else {}

    def of_kind(self, *kinds: str) -> list[Device]:
        """Devices of these kinds in the order of kinds, then addresses."""
        by_address = sorted(self.devices.values(), key=lambda device: device.bdf)
        return [device for kind in kinds for device in by_address if device.kind == kind]

    def bridges_above(self, device: Device) -> list[Device]:
        """Bottom up; one that sysfs does not list is left out."""
        return [self.devices[bdf] for bdf in reversed(device.above) if bdf in self.devices]

    def title(self, device: Device) -> str:
        """What people call it: GPU 0, nvme0n1, switch 0000:17:00.0."""
        if device.kind == "gpu":
            gpu = self.gpus.get(device.bdf)
            return f"GPU {gpu.index}" if gpu else f"GPU {device.bdf}"
        if device.kind != "bridge":
            return device.name
        depth = len(device.above)
        port = "root port" if depth == 0 else "switch" if depth % 2 else "switch port"
        return f"{port} {device.bdf}"

    def model(self, device: Device) -> str:
        gpu = self.gpus.get(device.bdf)
        return (gpu.name if gpu else device.model) or ""

    def pair(self, a: Device, b: Device) -> Pair | None:
        """What NVML says of two GPUs."""
        gpus = (self.gpus.get(a.bdf), self.gpus.get(b.bdf))
        if gpus[0] is None or gpus[1] is None:
            return None
        low, high = sorted((gpus[0].index, gpus[1].index))
        return self._pairs.get((low, high))

    def has_link(self, device: Device) -> bool:
        """Does a PCIe link end at this device's upper side?

        Levels alternate below the host bridge: root port, link, switch's upper port, inside of the
        switch, lower port, link, ... Root ports and lower ports repeat the fields of the link
        below them. An end on the root bus is part of the processor, or passed through to a virtual
        machine, and then it has a link whether or not its fields are shown.
        """
        if device.kind == "bridge" or len(device.above) % 2 == 1:
            return len(device.above) % 2 == 1
        return device.kind in ENDS and (device.now.known or self.virtual)

    def link(self, device: Device) -> tuple[Link, Link]:
        """(now, at most) of the link at the device's upper side; both its ends limit the second."""
        now, most = device.now, device.most
        gpu = self.gpus.get(device.bdf)
        if gpu is not None:
            now = now if now.known else of_generation(gpu.gen_now, gpu.width_now)
            most = most if most.known else of_generation(gpu.gen_max, gpu.width_max)
        above = self.devices.get(device.above[-1]) if device.above else None
        return now, most if above is None else most.at_most(above.most)

    def linked(self, device: Device) -> list[Device]:
        """The device and the bridges above it, bottom up, whose upper side is a link."""
        return [part for part in (device, *self.bridges_above(device)) if self.has_link(part)]

    def node_of(self, device: Device) -> int | None:
        if device.node is None and len(self.nodes) == 1:
            return self.nodes[0].index
        return device.node

    def to_node(self, device: Device, node: Node) -> Relation:
        own = self.node_of(device)
        if own is None:
            return Relation.UNKNOWN
        return Relation.PHB if own == node.index else Relation.SYS

    def pcie(self, a: Device, b: Device) -> Relation:
        """A hypervisor shows what bus it likes: inside one, only NUMA nodes are believed."""
        nodes = (self.node_of(a), self.node_of(b))
        if None not in nodes and nodes[0] != nodes[1]:
            return Relation.SYS
        if self.virtual or (a.root != b.root and None in nodes):
            return Relation.UNKNOWN
        if a.root != b.root:
            return Relation.NODE
        common = len(shared(a, b))
        if common == 0:
            return Relation.PHB
        bridges = max(len(a.above), len(b.above)) - common
        return Relation.PIX if bridges <= 1 else Relation.PXB


def shared(a: Device, b: Device) -> tuple[str, ...]:
    """Bridges above both, the nearest to the host bridge first."""
    both: list[str] = []
    for x, y in zip(a.above, b.above, strict=False):
        if a.root != b.root or x != y:
            break
        both.append(x)
    return tuple(both)


def below(now: Link, most: Link) -> bool:
    """Is a link narrower or slower than both its ends could be, as far as that is known?"""
    narrow = now.width is not None and most.width is not None and now.width < most.width
    slow = now.gts is not None and most.gts is not None and now.gts < most.gts
    return narrow or slow
