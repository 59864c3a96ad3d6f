"""`tiermem topo`: GPUs, drives, NICs and NUMA nodes, their links, and the slowest of these."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from tiermem.bench import output, result
from tiermem.bench.graph import DRIVES
from tiermem.bench.paths import Path as Way
from tiermem.bench.survey import Topology, link_text, measured, node_text, survey
from tiermem.bench.topology_svg import draw


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
    for what in missing(topology):
        console.print(what, markup=False, highlight=False)
    if topology.no_driver:
        console.print(f"GPUs are shown as sysfs sees them: {topology.no_driver}", markup=False)


def missing(topology: Topology) -> list[str]:
    """What a reader would look for in vain, so that its absence is no riddle."""
    kinds = {place.kind for place in topology.places}
    said = []
    if "gpu" not in kinds:
        said.append("no GPU on any PCIe bus that this system shows")
    if "nvme" not in kinds:
        others = [place.title for place in topology.places if place.kind in DRIVES]
        more = f" (there is {', '.join(others)})" if others else ""
        said.append(f"no NVMe drive on any PCIe bus that this system shows{more}")
    return said


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
        output.save(svg, draw(topology))
    if not output.emit(topology, json):
        show(topology, Console(), every_node)
