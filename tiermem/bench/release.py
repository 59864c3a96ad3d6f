"""`tiermem release`: put an engine's cache to sleep in lower tiers."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
import typer

from tiermem.bench import engines, output
from tiermem.bench.engines import size
from tiermem.ledger import Member


class Released(msgspec.Struct, frozen=True, kw_only=True):
    """JSON schema tiermem.release.v1. reached: it holds its last page or what is pinned."""

    schema: Literal["tiermem.release.v1"] = "tiermem.release.v1"
    engine: engines.EngineRow
    held_before: int
    took_s: float
    reached: bool


def command(
    engine: Annotated[str, typer.Argument(help="Name or pid, as `tiermem top` shows it.")],
    wait_s: Annotated[float, typer.Option("--wait", help="Seconds to wait for it.")] = 30.0,
    json: Annotated[
        str | None, typer.Option(metavar="PATH", help="Write the result as JSON; - for here.")
    ] = None,
) -> None:
    """Move an engine's pages to its lower tiers and lend its floor out; it wakes at its next use.

    Pages in use stay; a vLLM engine always uses one block. Ends with 1 if it holds more than those
    when the wait is over, or if it woke meanwhile.
    """
    with engines.in_use() as ledgers:
        ledger, member = engines.find(ledgers, engine)
        ledger.change(member, asleep=True)
        after, took_s, ended = engines.wait_for(
            ledger, member, lambda now: _is_down(now) or not now.asleep, wait_s
        )
        row = engines.row(after, ledger.budget)
    reached = ended and after.asleep
    result = Released(engine=row, held_before=member.held, took_s=took_s, reached=reached)
    if not output.emit(result, json):
        typer.echo(
            f"{row.name}: held {size(member.held)} -> {size(row.held)} in {took_s * 1e3:.0f} ms, "
            f"pinned {size(row.pinned)}; host {size(row.host)}, nvme {size(row.nvme)}"
        )
        if not after.asleep:
            typer.echo("it was used meanwhile, and is awake")
    if not reached:
        raise typer.Exit(1)


def _is_down(member: Member) -> bool:
    return member.held <= max(member.page_bytes, member.pinned)
