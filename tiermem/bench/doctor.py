"""`tiermem doctor`: what works on this machine, what does not, and the way out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Annotated, Literal

import msgspec
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tiermem.bench import output
from tiermem.bench.doctor_disk import disk_lines
from tiermem.bench.doctor_engine import seam_lines
from tiermem.bench.doctor_gpu import ask, gpu_lines, placement_lines, topology_lines
from tiermem.bench.doctor_host import host_lines
from tiermem.bench.doctor_software import software_lines
from tiermem.bench.findings import Level, Line, problem
from tiermem.bench.survey import survey
from tiermem.config import Config, load
from tiermem.errors import ConfigError


class Diagnosis(msgspec.Struct, frozen=True, kw_only=True):
    """JSON schema tiermem.doctor.v1."""

    schema: Literal["tiermem.doctor.v1"] = "tiermem.doctor.v1"
    worst: Level
    lines: tuple[Line, ...]


EXIT: dict[Level, int] = {"ok": 0, "note": 0, "problem": 1}
"""For scripts: 1 when something that was asked for will not work."""


def examine(
    file: Path | None = None,
    root: Path = Path("/"),
    *,
    nvme_path: Path | None = None,
    engine: str | None = None,
) -> Diagnosis:
    """Run every check; a bad configuration is a finding, and the rest then runs on defaults.

    root: where sys, proc and dev are looked for. nvme_path: instead of the configured one.
    engine: whose integration is examined too. Needs no GPU, no driver and no privilege.
    """
    lines: list[Line] = []
    overrides = {} if nvme_path is None else {"nvme.path": str(nvme_path)}
    try:
        config = load(file, overrides=overrides)
    except ConfigError as error:
        lines.append(problem("configuration", str(error), "correct it; see `tiermem config`"))
        config = Config()
    for check in _checks(config, root):
        lines += check()
    if engine is not None:
        lines += seam_lines(engine, config)
    return Diagnosis(worst=worst(lines), lines=tuple(lines))


def _checks(config: Config, root: Path) -> Iterator[Callable[[], Iterable[Line]]]:
    index = int(config.gpu.device.partition(":")[2] or 0)
    topology = survey(root)
    yield lambda: gpu_lines(config, ask(index))
    yield lambda: topology_lines(topology)
    yield lambda: placement_lines(topology)
    yield lambda: host_lines(config, root)
    yield lambda: disk_lines(config, root)
    yield lambda: software_lines(config)


def worst(lines: Iterable[Line]) -> Level:
    found = {line.level for line in lines}
    return "problem" if "problem" in found else "note" if "note" in found else "ok"


def show(diagnosis: Diagnosis, console: Console) -> None:
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column()
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    styles: dict[Level, str] = {"ok": "green", "note": "yellow", "problem": "bold red"}
    for line in diagnosis.lines:
        style = styles[line.level]
        text = f"{line.text}\n-> {line.way_out}" if line.way_out else line.text
        table.add_row(f"[{style}]{line.level}[/]", escape(line.area), escape(text))
    console.print(table, highlight=False)
    counts = {level: sum(line.level == level for line in diagnosis.lines) for level in EXIT}
    console.print(", ".join(f"{count} {level}" for level, count in counts.items()))


def command(
    file: Annotated[
        Path | None, typer.Argument(help="TOML file; else the one of $TIERMEM_CONFIG.")
    ] = None,
    nvme_path: Annotated[
        Path | None, typer.Option(help="A directory on a drive, instead of nvme.path.")
    ] = None,
    engine: Annotated[
        str | None, typer.Option(help="vllm or sglang: examine the integration with it too.")
    ] = None,
    json: Annotated[str | None, typer.Option(help="Write JSON to this path, or to - .")] = None,
) -> None:
    """Say what works on this machine, and what to do; exit code 1 if there is a problem."""
    console = Console(stderr=True)
    with console.status("looking at the machine"):
        diagnosis = examine(file, nvme_path=nvme_path, engine=engine)
    if not output.emit(diagnosis, json):
        show(diagnosis, Console())
    raise typer.Exit(EXIT[diagnosis.worst])
