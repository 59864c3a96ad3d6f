"""What lies between GPUs, the memory of NUMA nodes and drives, and which part is the slowest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec

from tiermem.bench.graph import DRIVES, Graph, Relation, shared
from tiermem.bench.links import NVLINK_USABLE
from tiermem.bench.sysfs import Device, Node


class Hop(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One thing that bytes pass: a PCIe link, the link between sockets, a measured end."""

    name: str
    theoretical_gbps: float | None
    usable_gbps: float | None


class Path(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The hops of one way, and the slowest of those that are known."""

    hops: tuple[Hop, ...]
    bottleneck: str | None
    usable_gbps: float | None
    complete: bool
    """False: a hop's rate is not known, so `usable_gbps` is an upper bound."""


class Triple(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One GPU, the memory of one NUMA node, one drive."""

    gpu: str
    node: int
    drive: str
    gpu_node: Relation
    node_drive: Relation
    gpu_drive: Relation
    bounce: Path
    """Drive to the node's memory to the GPU, or back."""
    direct: Path
    """Peer to peer, where GDS or p2pdma can do it."""
    best: bool = False
    """The best node for this GPU and this drive."""


class Peers(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Two GPUs."""

    a: str
    b: str
    relation: Relation
    pcie: Relation
    """Their relation without NVLink."""
    path: Path
    p2p: str


def path_of(hops: Sequence[Hop]) -> Path:
    """The slowest known hop decides; one that is not known makes the rate an upper bound."""
    known = [(hop.usable_gbps, hop.name) for hop in hops if hop.usable_gbps is not None]
    rate, name = min(known) if known else (None, None)
    return Path(tuple(hops), name, rate, len(known) == len(hops) > 0)


class Paths:
    """Paths over one graph. Measured rates in GB/s by end: "gpu:0" before "gpu", ..."""

    def __init__(self, graph: Graph, measured_gbps: Mapping[str, float]) -> None:
        self.graph = graph
        self.measured = measured_gbps

    def triples(self) -> tuple[Triple, ...]:
        """Every GPU, drive and node; the best node of each GPU and drive is marked."""
        found: list[Triple] = []
        for gpu in self.graph.of_kind("gpu"):
            for drive in self.graph.of_kind(*DRIVES):
                nodes = [self.triple(gpu, node, drive) for node in self.graph.nodes]
                best = min(nodes, key=_rank)
                found += [msgspec.structs.replace(t, best=t is best) for t in nodes]
        return tuple(found)

    def triple(self, gpu: Device, node: Node, drive: Device) -> Triple:
        title = self.graph.title
        gpu_node, drive_node = self.graph.to_node(gpu, node), self.graph.to_node(drive, node)
        hops = [
            *self.hops(gpu),
            *_crossing(gpu_node, f"{title(gpu)} - node {node.index}"),
            *_crossing(drive_node, f"node {node.index} - {title(drive)}"),
            *self.hops(drive),
        ]
        return Triple(
            gpu=title(gpu),
            node=node.index,
            drive=title(drive),
            gpu_node=gpu_node,
            node_drive=drive_node,
            gpu_drive=self.graph.pcie(gpu, drive),
            bounce=path_of(hops),
            direct=self.direct(gpu, drive),
        )

    def peers(self, a: Device, b: Device) -> Peers:
        pcie, pair = self.graph.pcie(a, b), self.graph.pair(a, b)
        relation, path = pcie, self.direct(a, b)
        if pair is not None and pair.nvlinks:
            rate = pair.nvlink_gbps
            usable = None if rate is None else rate * NVLINK_USABLE
            hop = Hop(f"{pair.nvlinks} NVLinks", rate, usable)
            relation, path = Relation.NVLINK, path_of([hop])
        p2p = pair.p2p if pair else "unknown"
        return Peers(self.graph.title(a), self.graph.title(b), relation, pcie, path, p2p)

    def direct(self, a: Device, b: Device) -> Path:
        """Peer to peer: only the links below the lowest bridge that both share."""
        above = shared(a, b)
        hops = [
            *self.hops(a, without=above),
            *_crossing(self.graph.pcie(a, b), "peer to peer"),
            *self.hops(b, without=above),
        ]
        return path_of(hops)

    def hops(self, end: Device, without: Sequence[str] = ()) -> list[Hop]:
        """What bytes pass from an end up to the host bridge: its own speed if measured, links."""
        return [
            *self._measured(end),
            *(self._link(part) for part in self.graph.linked(end) if part.bdf not in without),
        ]

    def _link(self, device: Device) -> Hop:
        now, _ = self.graph.link(device)
        return Hop(f"{self.graph.title(device)} {now}", now.theoretical_gbps, now.usable_gbps)

    def _measured(self, end: Device) -> list[Hop]:
        gpu = self.graph.gpus.get(end.bdf)
        which = f"gpu:{gpu.index}" if gpu else f"nvme:{end.name}"
        rate = self.measured.get(which, self.measured.get(which.partition(":")[0]))
        return [] if rate is None else [Hop(f"{self.graph.title(end)} as measured", None, rate)]


def _crossing(relation: Relation, what: str) -> list[Hop]:
    """The rate between sockets, or of what a hypervisor hides, stands nowhere in sysfs."""
    if relation is Relation.SYS:
        return [Hop(f"between NUMA nodes ({what})", None, None)]
    if relation is Relation.UNKNOWN:
        return [Hop(f"not shown ({what})", None, None)]
    return []


def _rank(triple: Triple) -> tuple[int, bool, int]:
    """Fewest crossings between nodes first; then the GPU's own node, for its link is the wider."""
    crossings = [triple.gpu_node, triple.node_drive].count(Relation.SYS)
    return crossings, triple.gpu_node is not Relation.PHB, triple.node
