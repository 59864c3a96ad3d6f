"""The engines that share a device, as the commands top, limit, release and yield see them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import msgspec

from tiermem import units
from tiermem.errors import TierMemError
from tiermem.ledger import Kind, Ledger, Member, Snapshot

LOOK_EVERY_S = 0.002


class NoEngine(TierMemError):
    """No engine of that name, or more than one; the message lists those that there are."""


class EngineRow(msgspec.Struct, frozen=True, kw_only=True):
    """One process. Sizes in bytes; hits, moves and stalls are counters since it joined."""

    name: str
    pid: int
    kind: str
    held: int
    reserved: int
    wanted: int
    share: int
    owed: int
    floor: int
    cap: int | None
    weight: float
    pinned: int
    movable: int
    host: int
    nvme: int
    asleep: bool
    hits_gpu: int
    hits_host: int
    hits_nvme: int
    moved_down: int
    moved_up: int
    stalls: int
    age_s: float


class Card(msgspec.Struct, frozen=True, kw_only=True):
    """One device and group."""

    device: str
    path: str
    budget: int
    held: int
    free: int
    engines: tuple[EngineRow, ...]


def row(member: Member, budget: int) -> EngineRow:
    return EngineRow(
        name=member.name,
        pid=member.pid,
        kind=member.kind.name.lower(),
        held=member.held,
        reserved=member.reserved,
        wanted=member.wanted,
        share=member.fair,
        owed=member.owed,
        floor=member.floor,
        cap=member.cap if member.cap < budget else None,
        weight=member.weight,
        pinned=member.pinned,
        movable=member.movable,
        host=member.host,
        nvme=member.nvme,
        asleep=member.asleep,
        hits_gpu=member.hits_gpu,
        hits_host=member.hits_host,
        hits_nvme=member.hits_nvme,
        moved_down=member.moved_down,
        moved_up=member.moved_up,
        stalls=member.stalls,
        age_s=member.age_s,
    )


def card(snapshot: Snapshot) -> Card:
    return Card(
        device=snapshot.device,
        path=str(snapshot.path),
        budget=snapshot.budget,
        held=snapshot.held,
        free=snapshot.free,
        engines=tuple(row(member, snapshot.budget) for member in snapshot.members),
    )


@contextmanager
def in_use() -> Iterator[list[Ledger]]:
    """All ledgers of this user that somebody uses; ended processes are forgotten first."""
    ledgers = Ledger.found()
    try:
        for ledger in ledgers:
            ledger.reap()
        yield ledgers
    finally:
        for ledger in ledgers:
            ledger.close()


def find(ledgers: Sequence[Ledger], engine: str) -> tuple[Ledger, Member]:
    """The engine of this name or pid."""
    known = [
        (ledger, member)
        for ledger in ledgers
        for member in ledger.snapshot().members
        if member.kind == Kind.ENGINE
    ]
    fits = [(a, m) for a, m in known if engine in (m.name, str(m.pid))]
    if len(fits) == 1:
        return fits[0]
    names = ", ".join(f"{m.name} (pid {m.pid})" for _, m in fits or known) or "none"
    if fits:
        raise NoEngine(f"{engine} means {len(fits)} engines, give a pid: {names}")
    raise NoEngine(
        f"no engine {engine} shares a device now; there are: {names}. An engine shares if its "
        "configuration has a [share] section"
    )


def find_card(ledgers: Sequence[Ledger], device: str | None) -> Ledger:
    """The ledger of this device, or the only one there is."""
    fits = [ledger for ledger in ledgers if device in (None, ledger.device, ledger.path.stem)]
    if len(fits) == 1:
        return fits[0]
    names = ", ".join(ledger.path.stem for ledger in ledgers) or "none"
    wanted = "" if device is None else f" {device}"
    raise NoEngine(f"--device{wanted}: {len(fits)} fit; devices that engines share now: {names}")


def now(ledger: Ledger, member: Member) -> Member:
    """The member's record at this moment; NoEngine once it has ended."""
    for each in ledger.snapshot().members:
        if (each.slot, each.pid, each.start) == (member.slot, member.pid, member.start):
            return each
    raise NoEngine(f"{member.name} (pid {member.pid}) has ended")


def wait_for(
    ledger: Ledger, member: Member, reached: Callable[[Member], bool], timeout_s: float
) -> tuple[Member, float, bool]:
    """(its record, seconds until it was so or the wait ended, whether it was so).

    reached: told the record, with nothing pinned until the engine has reported since: what it said
    before may no longer be so.
    """
    start = time.monotonic()
    while True:
        member = now(ledger, member)
        took_s = time.monotonic() - start
        is_fresh = member.age_s + 0.001 < took_s  # told in whole milliseconds
        if reached(member if is_fresh else replace(member, pinned=0)):
            return member, took_s, True
        if took_s > timeout_s:
            return member, took_s, False
        time.sleep(LOOK_EVERY_S)


def size_of(text: str, budget: int) -> int:
    """Bytes, or a part of the budget: "20GiB", "25%"."""
    size = units.parse_size(text)
    return size if isinstance(size, int) else int(size * budget)


def size(nbytes: int) -> str:
    return units.format_bytes(nbytes)
