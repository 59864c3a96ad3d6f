"""`tiermem topo`: GPUs, drives, NICs and NUMA nodes, their links, and the slowest of these."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations
from pathlib import Path
from typing import Annotated, Literal

import msgspec
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from tiermem.bench import nvml as nvml_reader
from tiermem.bench import output, result, sysfs
from tiermem.bench.advice import Advice, LinkState, advise, link_state
from tiermem.bench.graph import ENDS, Graph
from tiermem.bench.links import Link
from tiermem.bench.nvml import Nvml
from tiermem.bench.paths import Path as Way
from tiermem.bench.paths import Paths, Peers, Triple
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


def measured(found: result.Result) -> dict[str, float]:
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


# Terminal ------------------------------------------------------------------------------------


def show(topology: Topology, console: Console, every_node: bool = False) -> None:
    """The tree, the paths, the advice."""
    console.print(_tree(topology))
    if topology.triples:
        console.print(_paths_table(topology, every_node))
    if topology.peers:
        console.print(_peers_table(topology))
    for advice in topology.advice:
        style = "bold red" if advice.level == "problem" else "yellow"
        text = f"{advice.where}: {advice.text}. {advice.way_out}"
        console.print(f"[{style}]{advice.level}[/] {escape(text)}", highlight=False)
    if topology.no_driver:
        console.print(f"GPUs are shown as sysfs sees them: {topology.no_driver}", markup=False)


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


def _tree(topology: Topology) -> Tree:
    virtual = f"virtual machine ({topology.virtual})" if topology.virtual else "machine"
    trunk = Tree(f"{virtual}, IOMMU {topology.iommu}, driver {topology.driver or 'unknown'}")
    nodes: dict[int | None, Tree] = {}
    for index in [node.index for node in topology.nodes]:
        nodes[index] = trunk.add(node_text(topology, index))
    branches: dict[str, Tree] = {}
    for place in topology.places:
        if place.node not in nodes:
            nodes[place.node] = trunk.add(node_text(topology, place.node))
        root = f"{place.root} {place.node}"
        if root not in branches:
            branches[root] = nodes[place.node].add(f"host bridge {place.root}")
        parent = next((branches[b] for b in reversed(place.above) if b in branches), None)
        style = (
            "red" if place.state == "trained-down" else "green" if place.kind == "gpu" else "none"
        )
        text = "  ".join(part for part in (place.title, place.model, link_text(place)) if part)
        branches[place.bdf] = (parent or branches[root]).add(Text(text, style))
    return trunk


def _way(way: Way) -> str:
    if way.usable_gbps is None:
        return "unknown"
    sign = "" if way.complete else "at most "
    return f"{sign}{way.usable_gbps:.1f} GB/s: {way.bottleneck}"


def _paths_table(topology: Topology, every_node: bool) -> Table:
    table = Table(title="GPU, memory and drive", title_justify="left")
    for name in ("GPU", "node", "drive", "GPU-node", "node-drive", "GPU-drive"):
        table.add_column(name)
    table.add_column("through memory", overflow="fold")
    table.add_column("peer to peer", overflow="fold")
    for t in topology.triples:
        if t.best or every_node:
            relations = (t.gpu_node, t.node_drive, t.gpu_drive)
            table.add_row(
                t.gpu, str(t.node), t.drive, *map(str, relations), _way(t.bounce), _way(t.direct)
            )
    return table


def _peers_table(topology: Topology) -> Table:
    table = Table(title="GPU and GPU", title_justify="left")
    for name in ("GPUs", "relation", "over PCIe", "path", "P2P"):
        table.add_column(name)
    for pair in topology.peers:
        table.add_row(f"{pair.a}, {pair.b}", pair.relation, pair.pcie, _way(pair.path), pair.p2p)
    return table


# Command -------------------------------------------------------------------------------------


def command(
    root: Annotated[Path, typer.Option(help="A captured machine: a folder with sys/.")] = Path("/"),
    json: Annotated[str | None, typer.Option(help="Write JSON to this path, or to - .")] = None,
    svg: Annotated[Path | None, typer.Option(help="Draw a picture into this file.")] = None,
    measured_in: Annotated[
        Path | None, typer.Option("--measured", help="Result of bench offload: use its rates.")
    ] = None,
    every_node: Annotated[bool, typer.Option("--every-node", help="Paths by all nodes.")] = False,
) -> None:
    """Show how GPUs, memory, drives and NICs are connected, and what slows them."""
    rates = measured(result.read(measured_in)) if measured_in else {}
    topology = survey(root, rates)
    if svg is not None:
        from tiermem.bench.topology_svg import draw

        output.save(svg, draw(topology))
    if not output.emit(topology, json):
        show(topology, Console(), every_node)
