"""`tiermem fsck`: verify kept slabs, say what is readable, stale or torn, and drop the rest."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import msgspec
import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from tiermem import units
from tiermem.bench import output
from tiermem.nvme.fsck import SlabReport, fsck

DAMAGED = 1
"""Exit code when a slab is damaged or could not be checked, also when a repair has mended it."""


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """What `--json` writes."""

    schema: str = "tiermem.fsck.v1"
    good: bool
    """Nothing was wrong in any slab, before a repair."""
    slabs: tuple[SlabReport, ...]


def show(reports: Sequence[SlabReport], console: Console) -> None:
    """A row a slab, and under the table what to do about those that are not good."""
    table = Table(title="Slabs")
    for heading in (
        "slab", "pages of", "slots", "closed in order",
        "readable", "stale", "torn", "damaged records", "not checked", "verdict",
    ):  # fmt: skip
        table.add_column(heading, justify="left" if heading in ("slab", "verdict") else "right")
    for report in reports:
        table.add_row(
            escape(Path(report.path).name),
            units.format_bytes(report.slot_bytes) if report.slot_bytes else "-",
            str(report.slots),
            "yes" if report.clean else "no",
            *(
                str(count)
                for count in (
                    report.readable, report.stale, report.torn, report.damaged, report.sealed,
                )
            ),
            _verdict(report),
        )  # fmt: skip
    console.print(table)
    for note in _notes(reports):
        console.print(note, style="yellow", highlight=False, markup=False)


def _verdict(report: SlabReport) -> str:
    if report.problem is not None:
        return "[red]not checked[/]"
    if report.repaired:
        return "[yellow]repaired[/]"
    return "[green]good[/]" if report.good else "[red]damaged[/]"


def _notes(reports: Sequence[SlabReport]) -> list[str]:
    notes = [f"{r.path}: {r.problem}" for r in reports if r.problem is not None]
    if any(not r.good and not r.repaired and r.problem is None for r in reports):
        notes.append("--repair drops the pages that are not readable and keeps all others")
    if any(r.sealed for r in reports):
        notes.append("encrypted pages were only counted: --key-file names their key")
    return notes


def command(
    path: Annotated[Path, typer.Argument(help="A slab, or a directory that holds some.")],
    repair: Annotated[bool, typer.Option("--repair", help="Drop what is not readable.")] = False,
    json: Annotated[str | None, typer.Option(help="Write JSON to this path, or to - .")] = None,
    key_file: Annotated[
        Path | None, typer.Option("--key-file", help="Key of an encrypted slab.")
    ] = None,
) -> None:
    """Verify every page of kept slabs; exit code 0 if all are good, 1 if not, 2 if none is there.

    Nothing is written without --repair. A slab that a process has open is left alone.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("verifying", total=None)
        reports = fsck(
            path,
            repair,
            key_file=key_file,
            progress=lambda done, total: progress.update(task, completed=done, total=total),
        )
    result = Result(good=all(report.good for report in reports), slabs=tuple(reports))
    if not output.emit(result, json):
        show(reports, Console())
    if not result.good:
        raise typer.Exit(DAMAGED)
