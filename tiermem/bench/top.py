"""`tiermem top`: who holds the card, one row an engine."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Annotated, Literal

import msgspec
import typer
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from tiermem.bench import engines, output
from tiermem.bench.engines import Card, EngineRow, size

COLOURS = ("cyan", "green", "magenta", "yellow", "blue", "red")
BAR = 60


class Top(msgspec.Struct, frozen=True, kw_only=True):
    """JSON schema tiermem.top.v1."""

    schema: Literal["tiermem.top.v1"] = "tiermem.top.v1"
    cards: tuple[Card, ...]


def command(
    every_s: Annotated[float, typer.Option("--every", help="Seconds between two looks.")] = 1.0,
    once: Annotated[bool, typer.Option(help="Look once and end.")] = False,
    json: Annotated[
        str | None, typer.Option(metavar="PATH", help="Write one look as JSON; - for here.")
    ] = None,
) -> None:
    """Watch the engines that share this GPU; end with Ctrl-C."""
    first = look()
    if output.emit(first, json):
        return
    console = Console()
    if once or json is not None:
        console.print(screen(first, None, 0))
        return
    try:
        with Live(screen(first, None, 0), console=console, auto_refresh=False) as live:
            before, then = first, time.monotonic()
            while True:
                time.sleep(every_s)
                top, now = look(), time.monotonic()
                live.update(screen(top, before, now - then), refresh=True)
                before, then = top, now
    except KeyboardInterrupt:
        return


def look() -> Top:
    with engines.in_use() as ledgers:
        return Top(cards=tuple(engines.card(ledger.snapshot()) for ledger in ledgers))


def screen(top: Top, before: Top | None, over_s: float) -> RenderableType:
    """Everything as rich shows it. before: the look `over_s` earlier, for rates."""
    if not top.cards:
        return Text("no engine shares a device now; see docs/colocation.md")
    old = {e.pid: e for card in before.cards for e in card.engines} if before else {}
    return Group(*(part for card in top.cards for part in _card(card, old, over_s)))


def _card(card: Card, old: dict[int, EngineRow], over_s: float) -> list[RenderableType]:
    title = f"{card.device}: {size(card.held)} of {size(card.budget)} held, {size(card.free)} free"
    table = Table(title=title, title_justify="left")
    table.add_column("engine")
    for name in ("pid", "held", "leased", "wanted", "share", "pinned", "floor", "cap", "weight"):
        table.add_column(name, justify="right")
    for name in ("host", "nvme", "hits gpu/host/nvme", "down GB/s", "up GB/s", "faults/s"):
        table.add_column(name, justify="right")
    for i, engine in enumerate(card.engines):
        table.add_row(*_cells(engine, old.get(engine.pid), over_s, COLOURS[i % len(COLOURS)]))
    return [bar(card), table]


def _cells(engine: EngineRow, old: EngineRow | None, over_s: float, colour: str) -> list[str]:
    state = " (asleep)" if engine.asleep else " (room)" if engine.kind == "room" else ""
    hits = [engine.hits_gpu, engine.hits_host, engine.hits_nvme]
    rates = ["", "", ""]
    if old is not None and over_s > 0:
        hits = [
            engine.hits_gpu - old.hits_gpu,
            engine.hits_host - old.hits_host,
            engine.hits_nvme - old.hits_nvme,
        ]
        rates = [
            f"{(engine.moved_down - old.moved_down) / over_s / 1e9:.2f}",
            f"{(engine.moved_up - old.moved_up) / over_s / 1e9:.2f}",
            f"{(engine.stalls - old.stalls) / over_s:.0f}",
        ]
    return [
        f"[{colour}]{engine.name}[/]{state}",
        str(engine.pid),
        size(engine.held),
        size(engine.held + engine.reserved),
        size(engine.wanted),
        size(engine.share),
        size(engine.pinned),
        size(engine.floor),
        "-" if engine.cap is None else size(engine.cap),
        f"{engine.weight:g}",
        size(engine.host),
        size(engine.nvme),
        _shares(hits),
        *rates,
    ]


def _shares(hits: Sequence[int]) -> str:
    total = sum(hits)
    return " / ".join(f"{n / total:.0%}" for n in hits) if total > 0 else "-"


def bar(card: Card) -> Text:
    """Who holds the card, to scale."""
    text = Text("[")
    cells = 0
    charged = 0
    for i, engine in enumerate(card.engines):
        charged += engine.held + engine.reserved
        width = round(BAR * charged / card.budget) - cells
        cells += width
        text.append("#" * width, style=COLOURS[i % len(COLOURS)])
    text.append("." * (BAR - cells), style="dim")
    text.append("]")
    return text
