"""`tiermem limit`: change an engine's cap, floor or weight while it runs."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
import typer

from tiermem.bench import engines, output
from tiermem.bench.engines import size
from tiermem.errors import ConfigError


class Limited(msgspec.Struct, frozen=True, kw_only=True):
    """JSON schema tiermem.limit.v1. reached: it holds no more than its cap now.

    pinned_s: seconds until it held no more than its cap or, if that is more, what is pinned; null
    if it did not come so far in time. took_s: until it held no more than its cap, or until the
    command no longer waited.
    """

    schema: Literal["tiermem.limit.v1"] = "tiermem.limit.v1"
    engine: engines.EngineRow
    held_before: int
    pinned_s: float | None
    took_s: float
    reached: bool


def command(
    engine: Annotated[str, typer.Argument(help="Name or pid, as `tiermem top` shows it.")],
    cap: Annotated[str | None, typer.Option(help="Most bytes, such as 20GiB or 50%.")] = None,
    floor: Annotated[str | None, typer.Option(help="Bytes that nobody takes away.")] = None,
    weight: Annotated[float | None, typer.Option(help="Share of the rest.")] = None,
    wait_s: Annotated[float, typer.Option("--wait", help="Seconds to wait for it.")] = 10.0,
    json: Annotated[
        str | None, typer.Option(metavar="PATH", help="Write the result as JSON; - for here.")
    ] = None,
) -> None:
    """Change what an engine may hold; pages above a lower cap move down at once.

    Ends with 1 if the engine still holds more than its cap, because its pages are in use: it
    comes down as they are let go.
    """
    if cap is None and floor is None and weight is None:
        raise ConfigError("tiermem limit: give --cap, --floor or --weight")
    with engines.in_use() as ledgers:
        ledger, member = engines.find(ledgers, engine)
        ledger.change(
            member,
            cap=None if cap is None else engines.size_of(cap, ledger.budget),
            floor=None if floor is None else engines.size_of(floor, ledger.budget),
            weight=weight,
        )
        after, pinned_s, down = engines.wait_for(
            ledger, member, lambda now: now.held <= max(now.cap, now.page_bytes, now.pinned), wait_s
        )
        after, more_s, reached = engines.wait_for(
            ledger, after, lambda now: now.held <= max(now.cap, now.page_bytes), wait_s - pinned_s
        )
        row = engines.row(after, ledger.budget)
    took_s = pinned_s + more_s
    result = Limited(
        engine=row,
        held_before=member.held,
        pinned_s=pinned_s if down else None,
        took_s=took_s,
        reached=reached,
    )
    if not output.emit(result, json):
        now_cap = "none" if row.cap is None else size(row.cap)
        typer.echo(
            f"{row.name}: held {size(member.held)} -> {size(row.held)} in {took_s * 1e3:.0f} ms, "
            f"pinned {size(row.pinned)}; cap {now_cap}, floor {size(row.floor)}, "
            f"weight {row.weight:g}"
        )
        if not reached:
            so_far = f"; down to those after {pinned_s * 1e3:.0f} ms" if down else ""
            typer.echo(
                f"it holds more than its cap: pages in use come down when they are let go{so_far}"
            )
    if not reached:
        raise typer.Exit(1)
