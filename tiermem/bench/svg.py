"""Small pieces that all our pictures share: escaped text, boxes, lines, colours of light and dark.

A picture is one self-contained SVG: no script, no font, no address outside itself.
"""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

STYLE = """
.tm{--ink:#1c2430;--soft:#5b6675;--line:#d5dae1;--grid:#e8ebef;--paper:#ffffff;--panel:#f5f7f9;
--c0:#2f6fde;--c1:#d9730d;--c2:#1c8f6a;--c3:#9046cf;--c4:#c2375f;--c5:#6b7785;--bad:#c4291c;
font-family:system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif;font-size:12px}
@media (prefers-color-scheme:dark){.tm{--ink:#e6eaf0;--soft:#9aa5b4;--line:#3a4453;--grid:#29313d;
--paper:#141920;--panel:#1c232d;--c0:#6ea3ff;--c1:#ff9f4a;--c2:#4fc79d;--c3:#c08bf0;--c4:#f0708f;
--c5:#98a4b3;--bad:#ff7466}}
.tm text{fill:var(--ink)}.tm .soft{fill:var(--soft)}.tm .bad{fill:var(--bad);font-weight:600}
.tm .head{font-weight:600}.tm .small{font-size:11px}
""".strip()

PALETTE = tuple(f"var(--c{i})" for i in range(6))


def document(width: float, height: float, parts: Iterable[str], label: str) -> str:
    """A whole SVG file. label: what the picture shows, for those who cannot see it."""
    body = "\n".join(parts)
    return (
        f'<svg class="tm" xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" '
        f'width="{width:g}" height="{height:g}" role="img" aria-label="{escape(label)}">\n'
        f"<style>{STYLE}</style>\n"
        f'<rect width="{width:g}" height="{height:g}" fill="var(--paper)"/>\n{body}\n</svg>\n'
    )


def text(x: float, y: float, content: str, css: str = "", anchor: str = "start") -> str:
    """anchor: start, middle or end of the text is at x."""
    place = f'x="{x:.1f}" y="{y:.1f}" class="{css}" text-anchor="{anchor}"'
    return f"<text {place}>{escape(content)}</text>"


def rect(
    x: float,
    y: float,
    width: float,
    height: float,
    fill: str,
    stroke: str = "none",
    radius: float = 0,
    hint: str = "",
) -> str:
    """hint: what a pointer resting on it reads."""
    title = f"<title>{escape(hint)}</title>" if hint else ""
    return (
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{max(width, 0):.1f}" height="{max(height, 0):.1f}" '
        f'rx="{radius:g}" fill="{fill}" stroke="{stroke}">{title}</rect>'
    )


def line(
    points: Iterable[tuple[float, float]], stroke: str, width: float = 1, dash: str = ""
) -> str:
    """A polyline; dash as in stroke-dasharray."""
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    dashes = f' stroke-dasharray="{dash}"' if dash else ""
    return (
        f'<polyline points="{path}" fill="none" stroke="{stroke}" stroke-width="{width:g}" '
        f'stroke-linejoin="round"{dashes}/>'
    )


def dot(x: float, y: float, radius: float, fill: str, hint: str = "") -> str:
    title = f"<title>{escape(hint)}</title>" if hint else ""
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius:g}" fill="{fill}">{title}</circle>'


def shorten(content: str, letters: int) -> str:
    return content if len(content) <= letters else content[: letters - 1] + "…"
