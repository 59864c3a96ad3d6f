"""How a run of `bench offload` is shown: while it goes on, and at its end."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table

from tiermem.bench import report, svg, words
from tiermem.bench.offload_run import Interrupted, Section
from tiermem.bench.result import AGREE, Result, Row

WIDE = 120
"""Columns of a terminal from which on paths are shown; they are in the JSON always."""
FIGURES = {"GB/s": 6, "p5 - p95": 15, "ceiling": 7, "link": 5, "p50 / p99 us": 12, "CPU s": 6}
"""Headings and the columns that their figures need; CPU seconds are for a GiB."""


class Watcher:
    """Shows how far a run is and how long it may still take; ends it when asked to.

    A bar on a terminal; elsewhere a line for each measurement.
    """

    def __init__(self, sections: Sequence[Section], console: Console) -> None:
        self.stop = False
        """Set from a signal handler: the next measurement does not begin."""
        self._console = console
        self._total_s = sum(section.seconds for section in sections)
        self._planned_s = 0.0  # of what has been done
        self._share_s = 0.0
        self._left = 0
        self._start = time.perf_counter()
        columns = (BarColumn(28), TextColumn("{task.percentage:3.0f} %"))
        more = (TextColumn("{task.fields[left]:>11}"), TextColumn("{task.description}"))
        self._bar = Progress(
            *columns, *more, console=console, transient=True, disable=not console.is_terminal
        )
        self._task = self._bar.add_task("", total=self._total_s, left="")

    def __enter__(self) -> Watcher:
        self._bar.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._bar.stop()

    def enter(self, section: Section) -> None:
        self._share_s = section.seconds / max(1, section.steps)
        self._left = section.steps

    def leave(self) -> None:
        """The section is over, whether or not it measured everything that it meant to."""
        self._planned_s += self._left * self._share_s
        self._left = 0

    def begin(self, title: str) -> None:
        if self.stop:
            raise Interrupted
        if self._left:
            self._left -= 1
            self._planned_s += self._share_s
        minutes, seconds = divmod(round(self.left_s()), 60)
        text = f"{minutes}:{seconds:02} left"
        before = max(0.0, self._planned_s - self._share_s)
        self._bar.update(self._task, completed=before, description=title, left=text)
        if not self._console.is_terminal:
            percent = 100 * before / self._total_s
            self._say(f"{percent:3.0f} % {text:>10}  {title}")

    def measured(self, row: Row) -> None:
        if not self._console.is_terminal:
            self._say(f"{' ' * 17}{row.gbps.median:.2f} GB/s  {words.title(row)}")

    def left_s(self) -> float:
        """Seconds, from the plan and how much faster or slower the run has been until now."""
        before = self._planned_s - self._share_s
        if before <= 0:
            return self._total_s
        slower = (time.perf_counter() - self._start) / before
        return (self._total_s - before) * min(max(slower, 0.3), 10.0)

    def _say(self, text: str) -> None:
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)


def show(found: Result, console: Console) -> None:
    """Rows, figures and notes."""
    where = ", ".join(found.machine.gpus) if found.device == "cuda" else "the CPU device"
    title = f"Offload on {where}, {found.took_s:.0f} s"
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    table.add_column("what")
    for name, width in FIGURES.items():
        table.add_column(name, justify="right", no_wrap=True, min_width=width)
    wide = console.width >= WIDE
    if wide:
        table.add_column("path", overflow="fold")
    ceilings = ceilings_of(found.rows)
    for row in found.rows:
        ceiling = ceilings.get((row.src, row.dst, row.direction))
        own = row.work == "ceiling" or row.gpus > 1
        table.add_row(
            words.title(row),
            f"{row.gbps.median:.2f}",
            f"{row.gbps.p5:.2f} - {row.gbps.p95:.2f}",
            f"{row.gbps.median / ceiling:.0%}" if ceiling and not own else "",
            "" if row.percent_of_link is None else f"{row.percent_of_link:.0f} %",
            "" if row.page_us is None else f"{row.page_us.p50:,.0f} / {row.page_us.p99:,.0f}",
            "" if row.cpu_s_per_gib is None else f"{row.cpu_s_per_gib:.3f}",
            *((row.path,) if wide else ()),
        )
    console.print(table)
    _show_figures(found, console)
    _show_checks(found, console)
    for note in found.notes:
        console.print(f"note: {note}", style="yellow", highlight=False, markup=False)


def _show_figures(found: Result, console: Console) -> None:
    if not found.figures:
        return
    title = "Calls, faults, allocations"
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    table.add_column("what")
    for name in ("median", "p99", "n"):
        table.add_column(name, justify="right")
    table.add_column("unit")
    for name, figure in found.figures.items():
        p99 = f"{figure.p99:,.2f}" if figure.n > 1 else ""
        table.add_row(name, f"{figure.median:,.2f}", p99, str(figure.n), figure.unit)
    console.print(table)


def _show_checks(found: Result, console: Console) -> None:
    if not found.checks:
        return
    title = f"Beside independent tools (agree: within {AGREE:.0%})"
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for name in ("what", "tool"):
        table.add_column(name)
    for name in ("ours GB/s", "theirs", "ratio", "95 %", "n"):
        table.add_column(name, justify="right")
    table.add_column("")
    for check in found.checks:
        rates = (f"{check.ours_gbps:.2f}", f"{check.theirs_gbps:.2f}", f"{check.ratio:.3f}")
        verdict = check.verdict if check.agrees else f"[yellow]{check.verdict}[/]"
        table.add_row(check.what, check.tool, *rates, check.interval, str(check.n), verdict)
    console.print(table)


def ceilings_of(rows: Sequence[Row]) -> dict[tuple[str, str, str], float]:
    """GB/s of the one large copy between two ends, by direction."""
    found: dict[tuple[str, str, str], float] = {
        (row.src, row.dst, row.direction): row.gbps.median
        for row in rows
        if row.work == "ceiling" and row.gpus == 1
    }
    for (src, dst, direction), rate in list(found.items()):
        if direction == "both":
            found.setdefault((dst, src, direction), rate)
    return found


def picture(found: Result) -> str:
    """The pictures of the HTML report below one another, as one SVG file."""
    parts, y, width = [], 0.0, 0.0
    for drawn in report.charts(found.rows):
        size = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', drawn)
        if size is None:
            raise ValueError("a chart without a viewBox")
        parts.append(drawn.replace("<svg ", f'<svg y="{y:g}" ', 1))
        width, y = max(width, float(size[1])), y + float(size[2])
    return svg.document(width, y, parts, f"Offload, {len(found.rows)} measurements")
