"""Everything that can be said of how a machine is connected, gathered into one record."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations
from pathlib import Path
from typing import Literal

import msgspec

from tiermem.bench import nvml as nvml_reader
from tiermem.bench import sysfs
from tiermem.bench.advice import Advice, LinkState, advise, link_state
from tiermem.bench.graph import ENDS, Graph
from tiermem.bench.links import Link
from tiermem.bench.nvml import Nvml
from tiermem.bench.paths import Paths, Peers, Triple
from tiermem.bench.result import Result
from tiermem.bench.sysfs import Device, Node


class Place(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One device as it is drawn: what it is, and its link to the bridge above it."""

    bdf: str
    kind: str
    title: str
    model: str
    root: str
    above: tuple[str, ...]
    node: int | None
    has_link: bool
    now: Link
    most: Link
    state: LinkState


class Topology(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Everything that `tiermem topo` knows; its JSON is schema tiermem.topo.v1."""

    schema: Literal["tiermem.topo.v1"] = "tiermem.topo.v1"
    nodes: tuple[Node, ...]
    places: tuple[Place, ...]
    triples: tuple[Triple, ...]
    peers: tuple[Peers, ...]
    advice: tuple[Advice, ...]
    iommu: str
    virtual: str | None
    driver: str | None
    no_driver: str | None
    """Why NVML did not answer."""
    measured_gbps: dict[str, float]
    """By end ("gpu:0", "nvme"): the best one-way rate of a result file."""


def survey(root: Path = Path("/"), measured_gbps: Mapping[str, float] | None = None) -> Topology:
    """Look at the machine, or at a captured one: a folder that holds sys/ and maybe nvml.json.

    Needs no privilege, no GPU and no driver; what cannot be read is None or "unknown".
    """
    tree, driver = sysfs.read(root), _nvml(root)
    graph = Graph(tree, driver if isinstance(driver, Nvml) else None)
    paths = Paths(graph, measured_gbps or {})
    triples = paths.triples()
    return Topology(
        nodes=tree.nodes,
        places=tuple(_place(graph, device) for device in _drawn(graph)),
        triples=triples,
        peers=tuple(paths.peers(a, b) for a, b in combinations(graph.of_kind("gpu"), 2)),
        advice=advise(graph, triples),
        iommu=tree.iommu,
        virtual=tree.virtual,
        driver=driver.driver if isinstance(driver, Nvml) else None,
        no_driver=driver if isinstance(driver, str) else None,
        measured_gbps=dict(measured_gbps or {}),
    )


def measured(found: Result) -> dict[str, float]:
    """The best one-way rate by end: a GPU's from host copies, a drive's from disk rows."""
    best: dict[str, float] = {}
    for row in found.rows:
        if row.direction != "one-way" or row.beside or row.gpus != 1:
            continue
        ends = {row.src.partition(":")[0]: row.src, row.dst.partition(":")[0]: row.dst}
        if ends.keys() not in ({"gpu", "host"}, {"host", "nvme"}):
            continue
        end = ends.get("gpu") or ends["nvme"]
        best[end] = max(best.get(end, 0.0), row.gbps.median)
    return best


def _nvml(root: Path) -> Nvml | str:
    if root.resolve() == Path("/"):
        return nvml_reader.read()
    try:
        return msgspec.json.decode((root / "nvml.json").read_bytes(), type=Nvml)
    except OSError:
        return "no nvml.json beside the captured tree"
    except msgspec.DecodeError as error:
        return f"nvml.json cannot be read ({error})"


def _drawn(graph: Graph) -> list[Device]:
    """GPUs, drives, NICs and every bridge above one of them, parents before children."""
    ends = graph.of_kind(*ENDS)
    above = {bdf for end in ends for bdf in end.above}
    bridges = [device for device in graph.of_kind("bridge") if device.bdf in above]
    return sorted([*ends, *bridges], key=lambda d: (d.root, *d.above, d.bdf))


def _place(graph: Graph, device: Device) -> Place:
    now, most = graph.link(device)
    return Place(
        bdf=device.bdf,
        kind=device.kind,
        title=graph.title(device),
        model=graph.model(device),
        root=device.root,
        above=device.above,
        node=graph.node_of(device),
        has_link=graph.has_link(device),
        now=now,
        most=most,
        state=link_state(graph, device),
    )


def link_text(place: Place) -> str:
    """Gen5 x16 63.0 GB/s, about 55 usable."""
    if not place.has_link:
        return ""
    rate, usable = place.now.theoretical_gbps, place.now.usable_gbps
    if rate is None or usable is None:
        return f"link {place.now}"
    more = {
        "trained-down": f", trained down from {place.most}",
        "idle": f", idle: up to {place.most}",
    }
    return f"{place.now} {rate:.1f} GB/s, about {usable:.1f} usable{more.get(place.state, '')}"


def node_text(topology: Topology, index: int | None) -> str:
    if index is None:
        return "NUMA node unknown"
    node = next((node for node in topology.nodes if node.index == index), None)
    if node is None:
        return f"NUMA node {index}"
    memory = "" if node.memory_bytes is None else f", {node.memory_bytes / 2**30:.0f} GiB"
    return f"NUMA node {index}, cores {node.cpus or 'none'}{memory}"
