"""A picture of a `Topology`: NUMA nodes as panels, switches and ends as boxes, links as lines."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from tiermem.bench import svg
from tiermem.bench.graph import Relation
from tiermem.bench.survey import Place, Topology, link_text, node_text

ROW, BOX, WIDE, GAP, EDGE = 44, 34, 208, 190, 16
FILL = {"gpu": "var(--c2)", "nvme": "var(--c0)", "disk": "var(--c0)", "nic": "var(--c3)"}


@dataclass(slots=True)
class _Box:
    """A host bridge, a switch or an end, with where it is drawn."""

    title: str
    model: str = ""
    kind: str = "bridge"
    label: str = ""
    bad: bool = False
    below: list[_Box] = field(default_factory=list)
    depth: int = 0
    y: float = 0.0


def draw(topology: Topology) -> str:
    """An SVG document. Root ports and switch ports are left out: their links are drawn."""
    panels = list(_panels(topology))
    depth = max((_deepest(box) for _, boxes in panels for box in boxes), default=0)
    width = max(980.0, EDGE * 4 + (depth + 1) * WIDE + depth * GAP)
    parts: list[str] = []
    y = float(EDGE)
    for title, boxes in panels:
        top, y = y, y + 34
        parts.append("")
        slot = len(parts) - 1
        for box in boxes:
            y = _place(box, y)
            parts += _drawn(box)
        y += 8
        parts[slot] = svg.rect(
            EDGE, top, width - 2 * EDGE, y - top, "var(--panel)", "var(--line)", 8
        ) + svg.text(EDGE * 2, top + 22, title, "head")
        y += EDGE
    for note in _notes(topology):
        parts.append(svg.text(EDGE * 2, y + 12, note[0], note[1]))
        y += 20
    return svg.document(width, y + EDGE, parts, "How GPUs, memory, drives and NICs are connected")


def _panels(topology: Topology) -> Iterator[tuple[str, list[_Box]]]:
    known = [node.index for node in topology.nodes]
    others = {place.node for place in topology.places} - set(known)
    for index in [*known, *sorted(others, key=str)]:
        places = [place for place in topology.places if place.node == index]
        yield node_text(topology, index), _boxes(places)


def _boxes(places: list[Place]) -> list[_Box]:
    roots: dict[str, _Box] = {}
    boxes: dict[str, _Box] = {}
    for place in places:
        parent = next((boxes[bdf] for bdf in reversed(place.above) if bdf in boxes), None)
        if parent is None:
            parent = roots.setdefault(place.root, _Box(f"host bridge {place.root}"))
        if place.kind == "bridge" and not place.has_link:
            boxes[place.bdf] = parent
            continue
        box = _Box(
            place.title,
            place.model,
            place.kind,
            link_text(place).split(", ")[0],
            place.state == "trained-down",
        )
        if box.bad:
            box.label = f"{place.now}, not {place.most}"
        parent.below.append(box)
        boxes[place.bdf] = box
    return list(roots.values())


def _deepest(box: _Box) -> int:
    return 1 + max(map(_deepest, box.below)) if box.below else 0


def _place(box: _Box, y: float, depth: int = 0) -> float:
    """Give every box its row, a parent the middle of its children; the y below all of them."""
    box.depth = depth
    if not box.below:
        box.y = y
        return y + ROW
    for child in box.below:
        y = _place(child, y, depth + 1)
    box.y = (box.below[0].y + box.below[-1].y) / 2
    return y


def _drawn(box: _Box) -> Iterator[str]:
    x = EDGE * 2 + box.depth * (WIDE + GAP)
    for child in box.below:
        child_x, middle, end = x + WIDE + GAP, box.y + BOX / 2, child.y + BOX / 2
        bend = x + WIDE + 16
        colour = "var(--bad)" if child.bad else "var(--soft)"
        points = [(x + WIDE, middle), (bend, middle), (bend, end), (child_x, end)]
        yield svg.line(points, colour, 2.5 if child.bad else 1.2)
        css = "small bad" if child.bad else "small soft"
        yield svg.text(bend + 6, end - 4, child.label, css)
        yield from _drawn(child)
    fill = FILL.get(box.kind, "var(--c5)")
    yield svg.rect(x, box.y, WIDE, BOX, "var(--paper)", fill, 5, f"{box.title} {box.model}")
    yield svg.rect(x, box.y, 5, BOX, fill, radius=2)
    y = box.y + (14 if box.model else 21)
    yield svg.text(x + 14, y, svg.shorten(box.title, 28), "head")
    if box.model:
        yield svg.text(x + 14, box.y + 28, svg.shorten(box.model, 32), "small soft")


def _notes(topology: Topology) -> Iterator[tuple[str, str]]:
    """(sentence, style) for what lines between boxes cannot show."""
    linked = [pair for pair in topology.peers if pair.relation is Relation.NVLINK]
    if linked:
        ends = sorted({end for pair in linked for end in (pair.a, pair.b)})
        rates = {pair.path.usable_gbps for pair in linked if pair.path.usable_gbps}
        speed = f", about {min(rates):.0f} GB/s usable each way between two" if rates else ""
        yield f"NVLink between {len(ends)} GPUs{speed}", "soft"
    for advice in topology.advice:
        css = "bad" if advice.level == "problem" else "soft"
        yield f"{advice.level}: {advice.where}: {svg.shorten(advice.text, 130)}", css
