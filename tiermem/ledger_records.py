"""What a ledger's records say: members, and all of them at one moment."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache
from pathlib import Path

from tiermem.ledger_file import MILLION, RECORDS, LedgerError, Word
from tiermem.ledger_shares import Claim, claim


class Kind(IntEnum):
    ENGINE = 0
    ROOM = 1  # room for a process that is not ours


@dataclass(frozen=True, slots=True)
class Member:
    """One process's record at one moment. All sizes in bytes, counters since it joined."""

    slot: int
    pid: int
    start: int
    name: str
    kind: Kind
    floor: int
    cap: int
    weight: float
    held: int
    reserved: int
    wanted: int
    fair: int
    owed: int
    target: int
    asleep: bool
    page_bytes: int
    movable: int
    pinned: int
    host: int
    nvme: int
    hits_gpu: int
    hits_host: int
    hits_nvme: int
    moved_down: int
    moved_up: int
    stalls: int
    age_s: float
    """Since the owner's last turn."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """All members of a ledger at one moment, between two changes."""

    path: Path
    device: str
    budget: int
    members: tuple[Member, ...]

    @property
    def held(self) -> int:
        return sum(member.held for member in self.members)

    @property
    def free(self) -> int:
        return self.budget - self.held - sum(member.reserved for member in self.members)


@dataclass(frozen=True, slots=True)
class Report:
    """What an owner tells about itself, for others to see; no grant depends on it."""

    movable: int = 0
    pinned: int = 0
    host: int = 0
    nvme: int = 0
    hits_gpu: int = 0
    hits_host: int = 0
    hits_nvme: int = 0
    moved_down: int = 0
    moved_up: int = 0
    stalls: int = 0


REPORTED = [(Word[name.upper()], name) for name in Report.__dataclass_fields__]


_CLAIM_WORDS = int(Word.KIND)
"""A claim is made of the words before this one."""

_FLOOR, _CAP, _WEIGHT, _HELD, _RESERVED, _WANTED, _ASLEEP = (
    int(Word[name]) for name in ("FLOOR", "CAP", "WEIGHT", "HELD", "RESERVED", "WANTED", "ASLEEP")
)


def claims_of(words: memoryview, firsts: Sequence[int]) -> list[Claim]:
    """The claims of the records that begin at these words; LedgerError as of `_claim_of`."""
    return [_claim_of(bytes(words[first : first + _CLAIM_WORDS])) for first in firsts]


@lru_cache(maxsize=4 * RECORDS)
def _claim_of(raw: bytes) -> Claim:
    """The claim that a record's first words make; LedgerError if they cannot be meant.

    Cached, as of several records one has changed since the last look.
    """
    row = memoryview(raw).cast("q").tolist()
    if min(row) < 0 or not row[_WEIGHT]:
        raise LedgerError(
            f"the record of process {row[Word.PID]} is damaged; end that process, and the record "
            "is forgotten"
        )
    charged = row[_HELD] + row[_RESERVED]
    weight = row[_WEIGHT] / MILLION
    return claim(row[_FLOOR], row[_CAP], weight, charged, row[_WANTED], bool(row[_ASLEEP]))


def member(slot: int, row: list[int], name: str, fair: int, owed: int, now_ms: int) -> Member:
    """A record as others see it."""
    told = {field: row[word] for word, field in REPORTED}
    return Member(
        slot=slot,
        pid=row[Word.PID],
        start=row[Word.START],
        name=name,
        kind=Kind(row[Word.KIND]),
        floor=row[Word.FLOOR],
        cap=row[Word.CAP],
        weight=row[Word.WEIGHT] / MILLION,
        held=row[Word.HELD],
        reserved=row[Word.RESERVED],
        wanted=row[Word.WANTED],
        fair=fair,
        owed=owed,
        target=row[Word.TARGET],
        asleep=bool(row[Word.ASLEEP]),
        page_bytes=row[Word.PAGE_BYTES],
        age_s=max(0, now_ms - row[Word.BEAT]) / 1000,
        **told,
    )
