"""What is wrong, or could be better, with how a machine is put together."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Literal

import msgspec

from tiermem.bench.graph import DRIVES, ENDS, Graph, Relation, below
from tiermem.bench.links import Link
from tiermem.bench.paths import Triple
from tiermem.bench.sysfs import Device

RESEAT = "reseat the device or its riser; look at bifurcation and link speed in the firmware setup"
MEASURE = "measure: tiermem bench offload --json r.json; tiermem topo --measured r.json"


class Advice(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    level: Literal["problem", "note"]
    where: str
    text: str
    way_out: str


def advise(graph: Graph, triples: Sequence[Triple]) -> tuple[Advice, ...]:
    """Problems first."""
    found = [
        *_links(graph),
        *_far_drives(triples),
        *_shared_uplinks(graph),
        *_peer_traffic(graph, triples),
        *_unknown(graph),
    ]
    return tuple(sorted(found, key=lambda advice: advice.level != "problem"))


LinkState = Literal["none", "unknown", "full", "idle", "trained-down"]


def link_state(graph: Graph, device: Device) -> LinkState:
    """Does the link above a device run as fast as both its ends can?

    idle: a GPU that is not at full clocks, or does not say, with all its lanes at a lower speed.
    """
    now, most = graph.link(device)
    if not graph.has_link(device):
        return "none"
    if not below(now, most):
        return "full" if now.known else "unknown"
    gpu = graph.gpus.get(device.bdf)
    narrow = below(Link(width=now.width), Link(width=most.width))
    sleepy = device.kind == "gpu" and (gpu is None or gpu.pstate != 0)
    return "idle" if sleepy and not narrow else "trained-down"


def _rate(link: Link) -> str:
    rate = link.theoretical_gbps
    return f"{link}" if rate is None else f"{link} ({rate:.1f} GB/s)"


def _links(graph: Graph) -> Iterator[Advice]:
    """Trained down: slower than both ends could be. A slot that is slower by design: a note."""
    ends = graph.of_kind(*ENDS)
    above = {bdf for end in ends for bdf in end.above}
    for device in [*ends, *(d for d in graph.of_kind("bridge") if d.bdf in above)]:
        if not graph.has_link(device):
            continue
        now, most = graph.link(device)
        state, where = link_state(graph, device), graph.title(device)
        slower = f"the link runs at {_rate(now)} where both ends can do {_rate(most)}"
        if state == "trained-down":
            yield Advice("problem", where, f"trained down: {slower}", RESEAT)
        elif state == "idle":
            text = f"{slower}; an idle GPU may lower its speed to save power"
            yield Advice("note", where, text, "look again while it copies")
        elif device.kind in ("gpu", *DRIVES) and below(most, device.most):
            yield Advice(
                "note",
                where,
                f"the slot limits it to {_rate(most)}; the device could do {_rate(device.most)}",
                "a wider or newer slot, if one is free",
            )


def _far_drives(triples: Sequence[Triple]) -> Iterator[Advice]:
    """A drive that no GPU reaches without crossing, and the other way round."""
    by_drive: dict[str, set[Relation]] = defaultdict(set)
    by_gpu: dict[str, set[Relation]] = defaultdict(set)
    for triple in triples:
        by_drive[triple.drive].add(triple.gpu_drive)
        by_gpu[triple.gpu].add(triple.gpu_drive)
    for drive, relations in by_drive.items():
        if relations == {Relation.SYS}:
            yield Advice(
                "problem",
                drive,
                "sits behind another NUMA node than every GPU: each byte crosses between sockets",
                "move it to a slot of a GPU's socket, or use another drive for nvme.path",
            )
    for gpu, relations in by_gpu.items():
        if relations == {Relation.SYS}:
            yield Advice(
                "problem",
                gpu,
                "has no drive on its own NUMA node",
                "put a drive on its socket, or serve from a GPU that has one",
            )


def _shared_uplinks(graph: Graph) -> Iterator[Advice]:
    """Ends below one switch that together want more than its uplink carries."""
    for bridge in graph.of_kind("bridge"):
        uplink = graph.link(bridge)[0].theoretical_gbps
        if not graph.has_link(bridge) or uplink is None:
            continue
        for kinds, word in ((("gpu",), "GPUs"), (DRIVES, "drives")):
            below_it = [end for end in graph.of_kind(*kinds) if bridge.bdf in end.above]
            wanted = sum(graph.link(end)[0].theoretical_gbps or 0.0 for end in below_it)
            if len(below_it) > 1 and wanted > uplink * 1.01:
                yield Advice(
                    "note",
                    graph.title(bridge),
                    f"{len(below_it)} {word} want {wanted:.1f} GB/s through an uplink of "
                    f"{uplink:.1f} GB/s when they all copy to or from host memory",
                    "expect less each when they work at once",
                )


def _peer_traffic(graph: Graph, triples: Sequence[Triple]) -> Iterator[Advice]:
    near = [t for t in triples if t.gpu_drive in (Relation.PIX, Relation.PXB)]
    redirecting = [d.bdf for d in graph.of_kind("bridge") if d.acs_redirect]
    if near and redirecting:
        yield Advice(
            "note",
            ", ".join(redirecting[:4]) + (", ..." if len(redirecting) > 4 else ""),
            "ACS redirect is on: peer traffic below a switch goes up to the root complex and back",
            "for direct GPU-NVMe copies turn ACS off in the firmware (not with untrusted guests)",
        )
    if near and graph.iommu == "translating":
        yield Advice(
            "note",
            "IOMMU",
            "translates DMA addresses: direct GPU-NVMe copies are slowed or refused",
            "boot with iommu=pt, or turn it off",
        )


def _unknown(graph: Graph) -> Iterator[Advice]:
    ends = graph.of_kind("gpu", *DRIVES)
    dark = [d for d in ends if graph.has_link(d) and not graph.link(d)[0].known]
    if dark:
        names = ", ".join(graph.title(device) for device in dark)
        yield Advice("note", names, "link speed and width are not shown here", MEASURE)
    lost = [d for d in ends if graph.node_of(d) is None]
    if lost:
        names = ", ".join(graph.title(device) for device in lost)
        yield Advice("note", names, "the firmware does not say to which NUMA node", MEASURE)
    if graph.virtual and ends:
        yield Advice(
            "note",
            "virtual machine",
            "the bus is the hypervisor's drawing: relations are unknown and not guessed",
            MEASURE,
        )
