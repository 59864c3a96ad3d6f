"""Two kinds of chart as SVG: groups of bars with their spread, and lines over logarithmic axes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tiermem.bench import svg

WIDTH, LEFT, RIGHT, TOP = 1040.0, 64.0, 36.0, 56.0
LETTER = 6.6
"""Pixels that a letter of 12 pixels takes at most, on average."""


@dataclass(frozen=True, slots=True)
class Bar:
    """One bar; low and high are the ends of its spread."""

    value: float
    low: float | None = None
    high: float | None = None
    hint: str = ""


@dataclass(frozen=True, slots=True)
class Group:
    """Bars of one label, one for each series; None: the series has none here."""

    label: str
    bars: tuple[Bar | None, ...]


@dataclass(frozen=True, slots=True)
class Curve:
    name: str
    points: tuple[tuple[float, float], ...]
    dash: str = ""


@dataclass(frozen=True, slots=True)
class Mark:
    """A point worth reading off, with what it says."""

    x: float
    y: float
    text: str


def bars(title: str, unit: str, series: Sequence[str], groups: Sequence[Group]) -> str:
    """Horizontal groups of bars: long labels stay readable however many groups there are.

    title says what is shown, unit what the axis counts, series names the bars of each group.
    """
    thick = 15.0
    longest = max((len(group.label) for group in groups), default=0)
    label_width = min(max(longest, len(unit), 12) * LETTER + 24, 320.0)
    top = _top([bar for group in groups for bar in group.bars if bar])
    plot = WIDTH - label_width - 74
    tall = [sum(bar is not None for bar in group.bars) * (thick + 3) + 12 for group in groups]
    height = TOP + sum(tall) + 30
    parts = [
        svg.text(16, 24, title, "head"),
        *(_legend(series, WIDTH - 20) if len(series) > 1 else ()),
    ]
    for step in _ticks(top):
        x = label_width + plot * step / top
        parts.append(svg.line([(x, TOP - 4), (x, height - 26)], "var(--grid)"))
        parts.append(svg.text(x, height - 11, f"{step:g}", "small soft", "middle"))
    parts.append(svg.text(label_width - 10, height - 11, unit, "small soft", "end"))
    y = TOP
    for group, room in zip(groups, tall, strict=True):
        middle = y + (room - 12) / 2 + 3
        parts.append(svg.text(label_width - 10, middle, svg.shorten(group.label, 45), "", "end"))
        drawn = [(i, bar) for i, bar in enumerate(group.bars) if bar is not None]
        for line, (i, bar) in enumerate(drawn):
            at = y + line * (thick + 3)
            parts += _bar(bar, label_width, at, plot / top, thick, svg.PALETTE[i % 6])
        y += room
    return svg.document(WIDTH, height, parts, f"{title}, {unit}")


def _bar(bar: Bar, x: float, y: float, scale: float, thick: float, fill: str) -> list[str]:
    end, middle = x + bar.value * scale, y + thick / 2
    parts = [svg.rect(x, y, bar.value * scale, thick, fill, radius=2, hint=bar.hint)]
    text_from = end
    if bar.low is not None and bar.high is not None:
        low, high = x + bar.low * scale, x + bar.high * scale
        parts.append(svg.line([(low, middle), (high, middle)], "var(--ink)", 1.4))
        parts += [svg.line([(at, y + 4), (at, y + thick - 4)], "var(--ink)") for at in (low, high)]
        text_from = max(end, high)
    parts.append(svg.text(text_from + 6, middle + 4, f"{bar.value:.3g}", "small soft"))
    return parts


def curves(
    title: str, x_unit: str, y_unit: str, lines: Sequence[Curve], marks: Sequence[Mark] = ()
) -> str:
    """Lines over logarithmic axes; every point positive."""
    height, bottom = 400.0, 352.0
    xs = [x for line in lines for x, _ in line.points]
    ys = [y for line in lines for _, y in line.points]
    at_x = _log(min(xs), max(xs), LEFT, WIDTH - RIGHT)
    at_y = _log(min(ys), max(ys), bottom, TOP)
    parts = [svg.text(16, 24, title, "head")]
    for x in _decades(min(xs), max(xs)):
        parts.append(svg.line([(at_x(x), TOP), (at_x(x), bottom)], "var(--grid)"))
        parts.append(svg.text(at_x(x), bottom + 16, f"{x:,.0f}", "small soft", "middle"))
    for y in _decades(min(ys), max(ys)):
        parts.append(svg.line([(LEFT, at_y(y)), (WIDTH - RIGHT, at_y(y))], "var(--grid)"))
        parts.append(svg.text(LEFT - 8, at_y(y) + 4, f"{y:,g}", "small soft", "end"))
    for i, line in enumerate(lines):
        places = [(at_x(x), at_y(y)) for x, y in line.points]
        parts.append(svg.line(places, svg.PALETTE[i % 6], 2.2, line.dash))
    for mark in marks:
        parts.append(svg.dot(at_x(mark.x), at_y(mark.y), 4.5, "var(--ink)", mark.text))
        # beside rising lines the free corners are the upper left and the lower right
        left = at_x(mark.x) > WIDTH * 0.5
        x, y = at_x(mark.x) + (-9 if left else 9), at_y(mark.y) + (-9 if left else 17)
        parts.append(svg.text(x, y, mark.text, "head", "end" if left else "start"))
    parts += _legend([line.name for line in lines], WIDTH - RIGHT)
    parts.append(svg.text((LEFT + WIDTH) / 2, height - 10, x_unit, "small soft", "middle"))
    parts.append(svg.text(16, TOP - 8, y_unit, "small soft"))
    return svg.document(WIDTH, height, parts, f"{title}; {y_unit} over {x_unit}")


def _legend(names: Sequence[str], right: float) -> list[str]:
    """From the right edge to the left, below the title."""
    parts: list[str] = []
    x = right
    for i in reversed(range(len(names))):
        x -= len(names[i]) * LETTER + 34
        parts.append(svg.rect(x, 33, 11, 11, svg.PALETTE[i % 6], radius=2))
        parts.append(svg.text(x + 16, 43, names[i], "small"))
    return parts


def _top(values: Sequence[Bar]) -> float:
    return max([bar.high or bar.value for bar in values] + [bar.value for bar in values] + [1e-9])


def _ticks(top: float) -> list[float]:
    """Four to nine round steps from 0."""
    raw = top / 6
    power: float = 10.0 ** math.floor(math.log10(raw))
    step = next(power * f for f in (1, 2, 2.5, 5, 10) if power * f >= raw)
    return [round(i * step, 9) for i in range(int(top / step + 1e-9) + 1)]


def _decades(low: float, high: float) -> list[float]:
    """1, 10, 100 ... between the two; with 2 and 5 where there are few of them."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    factors = (1, 2, 5) if last - first <= 3 else (1,)
    steps = [10.0**power * factor for power in range(first, last + 1) for factor in factors]
    return [step for step in steps if low <= step * 1.0001 and step <= high * 1.0001]


def _log(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    a, b = math.log(low), math.log(high)
    span = b - a if b > a else 1.0
    return lambda value: start + (math.log(value) - a) / span * (end - start)
