"""`tiermem yield`: leave room on the card for a process that is not ours, and take it back."""

from __future__ import annotations

import contextlib
import select
import time
from collections.abc import Callable
from typing import Annotated, Literal

import msgspec
import typer

from tiermem.bench import engines, output
from tiermem.bench.engines import NoEngine, size
from tiermem.errors import TierFull
from tiermem.ledger import Kind, Lease, Ledger, Report
from tiermem.ledger_wake import is_alive, start_time

TICK_S = 0.25


class Yielded(msgspec.Struct, frozen=True, kw_only=True):
    """JSON schema tiermem.yield.v1. first_s, took_s: until the first byte, and all, were free."""

    schema: Literal["tiermem.yield.v1"] = "tiermem.yield.v1"
    nbytes: int
    first_s: float
    took_s: float
    held_for_pid: int | None


def command(
    nbytes: Annotated[str, typer.Option("--bytes", help="Room, such as 20GiB or 25%.")],
    pid: Annotated[
        int | None, typer.Option("--for", help="Keep it until this process ends.")
    ] = None,
    seconds: Annotated[float | None, typer.Option(help="Keep it for so long.")] = None,
    device: Annotated[str | None, typer.Option(help="If engines share more than one.")] = None,
    wait_s: Annotated[float, typer.Option("--wait", help="Seconds to wait for the room.")] = 30.0,
    json: Annotated[
        str | None, typer.Option(metavar="PATH", help="Write the result as JSON; - for here.")
    ] = None,
) -> None:
    """Make the engines on a card leave room, and keep it until Ctrl-C or the end of a process."""
    start = 0 if pid is None else start_time(pid)
    if pid is not None and not start:
        raise NoEngine(f"--for {pid}: there is no such process")
    with engines.in_use() as ledgers:
        ledger = engines.find_card(ledgers, device)
        wanted = engines.size_of(nbytes, ledger.budget)
        name = f"room for {pid}" if pid is not None else "room"
        lease = ledger.join(name, page_bytes=1, floor=wanted, cap=wanted, kind=Kind.ROOM)
        first_s, took_s = make_room(ledger, lease, wanted, wait_s)
        made = Yielded(nbytes=wanted, first_s=first_s, took_s=took_s, held_for_pid=pid)
        until = None if seconds is None else time.monotonic() + seconds
        over = (lambda: False) if pid is None else (lambda: not is_alive((pid, start)))
        with contextlib.suppress(KeyboardInterrupt):
            if not output.emit(made, json):
                typer.echo(
                    f"{size(wanted)} are free on {ledger.device} after {took_s * 1e3:.0f} ms"
                )
            keep(lease, over, until)


def make_room(ledger: Ledger, lease: Lease, nbytes: int, wait_s: float) -> tuple[float, float]:
    """Reserve all of it; seconds until the first byte and the last. TierFull if it takes longer."""
    start = time.monotonic()
    first_s = 0.0
    while True:
        granted = lease.reserve(nbytes - lease.reserved)
        took_s = time.monotonic() - start
        if granted and not first_s:
            first_s = took_s
        if lease.reserved >= nbytes:
            lease.commit(lease.reserved)
            return first_s, took_s
        if took_s > wait_s:
            snapshot = ledger.snapshot()
            held = ", ".join(
                f"{m.name} holds {size(m.held)} ({size(m.pinned)} pinned)"
                for m in snapshot.members
                if m.slot != lease.slot
            )
            raise TierFull(
                f"room for {size(nbytes)}: {size(lease.reserved)} after {wait_s:g} s; {held}"
            )
        ledger.reap()
        lease.ring()
        _wait(lease, 0.02)


def keep(lease: Lease, over: Callable[[], bool], until: float | None) -> None:
    """Hold the room until it is over, or until then."""
    while not over() and (until is None or time.monotonic() < until):
        lease.report(Report(pinned=lease.held), lease.held)
        _wait(lease, TICK_S)


def _wait(lease: Lease, timeout_s: float) -> None:
    select.select([lease.bell.socket], [], [], timeout_s)
    lease.bell.heard()
