"""What the topology says of the two ends of a benchmark row: their link and their relation.

Ends are written as in a result file: kind, and which one (gpu:0, host:node1, nvme:nvme0n1).
"""

from __future__ import annotations

from tiermem.bench.graph import DRIVES, Relation
from tiermem.bench.survey import Place, Topology

HOST = "host"


def place_of(topology: Topology, end: str) -> Place | None:
    """The device of an end; without a name the only one of its kind, else None."""
    kind, _, which = end.partition(":")
    kinds = DRIVES if kind == "nvme" else (kind,)
    name = f"GPU {which}" if kind == "gpu" else which
    found = [place for place in topology.places if place.kind in kinds]
    if which:
        found = [place for place in found if name in place.title.split(", ") or name == place.bdf]
    return found[0] if len(found) == 1 else None


def link_gbps(topology: Topology, src: str, dst: str) -> float | None:
    """The usable rate of the links between two ends through host memory, or between two peers.

    What 100 % of `percent_of_link` is. None where a link on the way is not known.
    """
    if src == dst:
        return None
    peers = _peers(topology, src, dst)
    if peers is not None:
        return peers[1]
    rates = [_up(topology, end) for end in (src, dst) if end.partition(":")[0] != HOST]
    known = [rate for rate in rates if rate is not None]
    return min(known) if known and len(known) == len(rates) else None


def relation(topology: Topology, src: str, dst: str) -> Relation:
    """As `tiermem topo` names it. host without a node: known only where there is one node."""
    peers = _peers(topology, src, dst)
    if peers is not None:
        return peers[0]
    host = next((end for end in (src, dst) if end.partition(":")[0] == HOST), None)
    if host is not None:
        device = place_of(topology, dst if host == src else src)
        return _to_host(topology, device, host)
    titles = {place.title for end in (src, dst) if (place := place_of(topology, end))}
    for triple in topology.triples:
        if titles == {triple.gpu, triple.drive}:
            return triple.gpu_drive
    return Relation.UNKNOWN


def _peers(topology: Topology, src: str, dst: str) -> tuple[Relation, float | None] | None:
    titles = {place.title for end in (src, dst) if (place := place_of(topology, end))}
    for pair in topology.peers:
        if titles == {pair.a, pair.b}:
            return pair.relation, pair.path.usable_gbps if pair.path.complete else None
    return None


def _up(topology: Topology, end: str) -> float | None:
    """The slowest link from a device up to the host bridge; in a virtual machine the device's own,
    for the bridges above it are the hypervisor's drawing."""
    place = place_of(topology, end)
    if place is None:
        return None
    bridges = () if topology.virtual else place.above
    above = [other for other in topology.places if other.bdf in bridges]
    rates = [part.now.usable_gbps for part in (place, *above) if part.has_link]
    known = [rate for rate in rates if rate is not None]
    return min(known) if known and len(known) == len(rates) else None


def _to_host(topology: Topology, device: Place | None, host: str) -> Relation:
    which = host.partition(":node")[2]
    if device is None or device.node is None:
        return Relation.UNKNOWN
    if not which:
        return Relation.PHB if len(topology.nodes) < 2 else Relation.UNKNOWN
    return Relation.PHB if int(which) == device.node else Relation.SYS
