"""Curves of hit ratio over capacity, with the ceiling of reuse."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

from tiermem.bench import svg

WIDTH, HEIGHT = 760.0, 420.0
LEFT, RIGHT, TOP, BOTTOM = 60.0, 150.0, 48.0, 370.0


class Point(Protocol):
    """What is drawn of a row."""

    @property
    def policy(self) -> str: ...
    @property
    def mode(self) -> str: ...
    @property
    def capacity_percent(self) -> float: ...
    @property
    def hit_ratio(self) -> float: ...
    @property
    def prefix_hit_ratio(self) -> float: ...


def curves(title: str, rows: Sequence[Point], ceiling: float) -> str:
    """One line a policy; capacity on a logarithmic axis; the offline optimum is dashed."""
    names = list(dict.fromkeys(row.policy for row in rows))
    stream = all(row.mode == "stream" for row in rows)
    word = "hit ratio" if stream else "prefix hit ratio"
    low = min(row.capacity_percent for row in rows)
    high = max(row.capacity_percent for row in rows)
    top = math.ceil(10 * max(ceiling, 0.1)) / 10

    def x(percent: float) -> float:
        wide = math.log(high / low) or 1.0
        return LEFT + (WIDTH - LEFT - RIGHT) * math.log(percent / low) / wide

    def y(ratio: float) -> float:
        return BOTTOM - (BOTTOM - TOP) * ratio / top

    parts = [svg.text(16, 24, f"{title}: {word} over capacity", "head")]
    for step in range(round(10 * top) + 1):
        parts.append(svg.line([(LEFT, y(step / 10)), (WIDTH - RIGHT, y(step / 10))], "var(--grid)"))
        parts.append(svg.text(LEFT - 8, y(step / 10) + 4, f"{step / 10:g}", "small soft", "end"))
    for percent in sorted({row.capacity_percent for row in rows}):
        parts.append(svg.text(x(percent), BOTTOM + 18, f"{percent:g} %", "small soft", "middle"))
    parts.append(svg.text(LEFT, BOTTOM + 38, "capacity, of the distinct blocks", "small soft"))
    parts.append(svg.line([(LEFT, y(ceiling)), (WIDTH - RIGHT, y(ceiling))], "var(--soft)"))
    parts.append(svg.text(WIDTH - RIGHT + 8, y(ceiling) - 6, "reuse ceiling", "small soft"))
    for i, name in enumerate(names):
        mine = sorted(
            (row.capacity_percent, row.hit_ratio if stream else row.prefix_hit_ratio)
            for row in rows
            if row.policy == name
        )
        points = [(x(percent), y(ratio)) for percent, ratio in mine]
        colour = svg.PALETTE[i % len(svg.PALETTE)]
        dash = "6 4" if name == "belady" else "" if i < len(svg.PALETTE) else "2 3"
        parts.append(svg.line(points, colour, width=2, dash=dash))
        label = "offline optimum" if name == "belady" else name
        parts.append(svg.rect(WIDTH - RIGHT + 30, TOP + 60 + 20 * i, 12, 12, colour, radius=2))
        parts.append(svg.text(WIDTH - RIGHT + 48, TOP + 70 + 20 * i, label, "small"))
    return svg.document(WIDTH, HEIGHT, parts, f"{word} of {', '.join(names)} over capacity")
