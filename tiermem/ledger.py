"""The ledger: how many bytes of a device each process that shares it may hold.

    reserve ──▶ (back the memory) ──▶ commit ──▶ held ──▶ (give it back) ──▶ release
       └── cancel ◀── the memory could not be had

Bytes are charged from `reserve` until after `release`, so no two processes are ever promised the
same byte: charged = held + reserved, and all of it together is at most the budget. Each process
changes its own record, under the file's lock; totals and shares are derived from the records. A
record whose process has ended is reaped by anyone. See `ledger_shares` for who may have how much.
"""

from __future__ import annotations

import logging
import time
from pathlib import Path

from tiermem import ledger_shares
from tiermem.errors import ConfigError, TierFull
from tiermem.ledger_file import (
    DEVICE_BYTES,
    FREE,
    HEADER_WORDS,
    LIVE,
    MILLION,
    NAME_BYTES,
    RECORD_WORDS,
    RECORDS,
    SUFFIX,
    Head,
    LedgerBusy,
    LedgerError,
    LedgerFile,
    Word,
    ledger_path,
    runtime_directory,
)
from tiermem.ledger_records import (
    REPORTED,
    Kind,
    Member,
    Report,
    Snapshot,
    claims_of,
    member,
)
from tiermem.ledger_shares import Claim
from tiermem.ledger_wake import Bell, Owner, is_alive, myself

__all__ = ["Kind", "Lease", "Ledger", "LedgerBusy", "LedgerError", "Member", "Report", "Snapshot"]

log = logging.getLogger(__name__)

BAND = 128
"""An excess of this part of the budget is left with a busy member."""

ANYTHING = 1 << 62


class Ledger:
    """The open ledger of one device. Thread-safe; close it, or use it as a context manager."""

    def __init__(
        self, path: Path, device: str = "", budget: int | None = None, *, exact: bool = True
    ) -> None:
        """Most callers use `open` or `found`."""
        self._file = LedgerFile(path, device, budget, exact=exact)
        self._bell = Bell(path)
        self._leases: list[Lease] = []
        self.path = path
        self.device = self._file.text(Head.DEVICE, DEVICE_BYTES)

    @classmethod
    def open(
        cls,
        device: str,
        budget: int,
        *,
        group: str = "default",
        exact: bool = True,
        directory: Path | None = None,
    ) -> Ledger:
        """The ledger of a device and a group of engines of this user; made if it is not there.

        budget: bytes that all members may hold together. If others share already, theirs is in
        force, and an exact one that differs is refused. Raises LedgerError, ConfigError.
        """
        where = runtime_directory() if directory is None else directory
        return cls(ledger_path(where, device, group), device, budget, exact=exact)

    @classmethod
    def found(cls, directory: Path | None = None) -> list[Ledger]:
        """The ledgers that are in use now."""
        where = runtime_directory() if directory is None else directory
        ledgers = []
        for path in sorted(where.glob(f"*{SUFFIX}")):
            try:
                ledgers.append(cls(path))
            except LedgerError as error:
                log.info("ledger passed over path=%s reason=%s", path, error)
        return ledgers

    @property
    def budget(self) -> int:
        return int(self._file.words[Head.BUDGET])

    @property
    def band(self) -> int:
        """Bytes of excess that nobody has to give back."""
        return self.budget // BAND

    # ---------------------------------------------------------------- members

    def join(
        self,
        name: str,
        *,
        page_bytes: int,
        floor: int = 0,
        cap: int = ANYTHING,
        weight: float = 1.0,
        kind: Kind = Kind.ENGINE,
    ) -> Lease:
        """Become a member that holds nothing yet. page_bytes: grants are multiples of it.

        Raises TierFull if there is no record left, or all floors together exceed the budget.
        """
        _refuse_senseless(floor, cap, weight)
        pid, start = myself()
        with self._file.locked() as words:
            self._reap()
            live = self._file.live()
            self._refuse_floors(live, -1, min(floor, cap))
            first = self._vacant(live)
            words[first : first + RECORD_WORDS] = memoryview(bytes(8 * RECORD_WORDS)).cast("q")
            for word, value in (
                (Word.PID, pid),
                (Word.START, start),
                (Word.FLOOR, floor),
                (Word.CAP, cap),
                (Word.WEIGHT, int(weight * MILLION)),
                (Word.KIND, kind),
                (Word.PAGE_BYTES, page_bytes),
                (Word.BEAT, now_ms()),
            ):
                words[first + word] = value
            self._file.set_text(first + Word.NAME, NAME_BYTES, name)
            words[first] = LIVE
            words[Head.MEMBERSHIP] += 1
            self._file.note("join", slot_of(first), floor)
        lease = Lease(self._file, first, page_bytes)
        self._leases.append(lease)
        self._bell.ring(map(slot_of, live))
        return lease

    def snapshot(self) -> Snapshot:
        """All records at one moment, with the shares that follow from them."""
        with self._file.locked() as words:
            live = self._file.live()
            budget = int(words[Head.BUDGET])
            rows = [words[first : first + RECORD_WORDS].tolist() for first in live]
            names = [self._file.text(first + Word.NAME, NAME_BYTES) for first in live]
            claims = claims_of(words, live)
        fair = ledger_shares.fair_shares(budget, claims)
        owed = ledger_shares.owed(budget, claims, fair, budget // BAND)
        now = now_ms()
        members = tuple(
            member(slot_of(live[i]), rows[i], names[i], fair[i], owed[i], now)
            for i in range(len(live))
        )
        return Snapshot(self.path, self.device, budget, members)

    def change(
        self,
        whom: Member,
        *,
        floor: int | None = None,
        cap: int | None = None,
        weight: float | None = None,
        asleep: bool | None = None,
    ) -> None:
        """Change the terms of another process, and wake all.

        Raises ConfigError for terms that cannot hold, TierFull for a floor that is not there,
        LedgerError if the process has ended meanwhile.
        """
        first = HEADER_WORDS + whom.slot * RECORD_WORDS
        with self._file.locked() as words:
            if (words[first], words[first + Word.PID]) != (LIVE, whom.pid):
                raise LedgerError(f"{whom.name} (pid {whom.pid}) has ended")
            floor = words[first + Word.FLOOR] if floor is None else floor
            cap = words[first + Word.CAP] if cap is None else cap
            weight = words[first + Word.WEIGHT] / MILLION if weight is None else weight
            _refuse_senseless(floor, cap, weight)
            live = self._file.live()
            self._refuse_floors(live, first, floor)
            words[first + Word.FLOOR] = floor
            words[first + Word.CAP] = cap
            words[first + Word.WEIGHT] = int(weight * MILLION)
            if asleep is not None:
                words[first + Word.ASLEEP] = asleep
            self._file.note("terms", whom.slot, cap)
        self._bell.ring(map(slot_of, live))

    def reap(self) -> int:
        """Forget members whose process has ended; how many there were."""
        with self._file.locked():
            return self._reap()

    def owners(self) -> set[Owner]:
        """The processes of all members."""
        with self._file.locked() as words:
            live = self._file.live()
            return {(words[first + Word.PID], words[first + Word.START]) for first in live}

    def is_in_place(self) -> bool:
        """False once the file was removed or replaced, so that newcomers do not see us."""
        return self._file.is_in_place()

    def close(self) -> None:
        """Leave all leases and let go of the file; a second call does nothing."""
        for lease in self._leases:
            lease.leave()
        self._bell.close()
        self._file.close()

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # ---------------------------------------------------------------- parts, under the lock

    def _reap(self) -> int:
        words = self._file.words
        reaped = 0
        for first in self._file.live():
            owner = words[first + Word.PID], words[first + Word.START]
            if is_alive(owner):
                continue
            held = words[first + Word.HELD] + words[first + Word.RESERVED]
            words[first] = FREE
            words[Head.MEMBERSHIP] += 1
            self._file.note("reap", slot_of(first), held)
            self._bell.sweep(slot_of(first))
            log.info("ledger reaped pid=%d bytes=%d", owner[0], held)
            reaped += 1
        return reaped

    def _vacant(self, live: tuple[int, ...]) -> int:
        for slot in range(RECORDS):
            first = HEADER_WORDS + slot * RECORD_WORDS
            if first not in live:
                return first
        raise TierFull(
            f"{self.path}: all {RECORDS} records are in use by running processes; end one, or "
            "choose another share.group"
        )

    def _refuse_floors(self, live: tuple[int, ...], but: int, floor: int) -> None:
        words = self._file.words
        others = sum(
            min(words[first + Word.FLOOR], words[first + Word.CAP])
            for first in live
            if first != but
        )
        if others + floor > self.budget:
            raise TierFull(
                f"{self.path}: a floor of {floor} bytes, and the others' floors are {others} of "
                f"{self.budget}; lower one with `tiermem limit ENGINE --floor`"
            )


class Lease:
    """One member's record, and the verbs that change what it holds. Thread-safe.

    Bytes that `reserve` has granted are ours from then on. A verb takes the file's lock and does
    no other system call; `ring` tells the others, and is called where that may cost some.
    """

    def __init__(self, file: LedgerFile, first: int, page_bytes: int) -> None:
        """Made by `Ledger.join`."""
        self.slot = slot_of(first)
        self.page_bytes = page_bytes
        self._file = file
        self._first = first
        self._owing: set[int] = set()  # slots to be rung
        self._seen = -1
        self.share = 0  # as of the last `reserve`
        self.lacking = 0  # of our share, as of the last `reserve`: others still hold it
        self.owed = 0  # and of that others owe so much; what is less than the band, nobody owes
        self._left = False
        self.bell = Bell(file.path, self.slot)

    # ---------------------------------------------------------------- bytes

    def want(self, nbytes: int) -> None:
        """Say how much would be held if it could be had; shares are made by it."""
        with self._file.locked() as words:
            self._want(words, nbytes)

    def reserve(self, nbytes: int, timeout_s: float = 1.0) -> int:
        """Charge up to nbytes more, in whole pages; how many bytes were granted.

        What is not granted now is wanted from now on, and those who hold more than their share
        are to be rung. Raises LedgerError if the lock cannot be had.
        """
        with self._file.locked(timeout_s) as words:
            first = self._first
            charged = words[first + Word.HELD] + words[first + Word.RESERVED]
            if words[first + Word.WANTED] < charged + nbytes:
                self._want(words, charged + nbytes)
            live, claims, shares = self._claims(words)
            mine = live.index(first)
            budget = words[Head.BUDGET]
            granted = ledger_shares.grant(budget, claims, shares, mine, nbytes)
            granted -= granted % self.page_bytes
            if granted:
                words[first + Word.RESERVED] += granted
                self._note(words, "reserve", granted)
            self.share = shares[mine]
            self.lacking = min(nbytes, max(0, shares[mine] - charged)) - granted
            self.owed = 0
            if granted < nbytes:
                owed = ledger_shares.owed(budget, claims, shares, budget // BAND)
                self._owing |= {slot_of(f) for f, due in zip(live, owed, strict=True) if due}
                self.owed = min(self.lacking, sum(owed) - owed[mine])
            return granted

    def borrow(self, nbytes: int) -> int:
        """Charge up to nbytes that nobody needs, beyond what is wanted; how many were granted."""
        with self._file.locked() as words:
            first = self._first
            live, claims, shares = self._claims(words)
            mine = live.index(first)
            room = words[first + Word.CAP] - claims[mine].charged
            spare = ledger_shares.spare(words[Head.BUDGET], claims, shares, mine)
            granted = max(0, min(nbytes, room, spare))
            granted -= granted % self.page_bytes
            if granted:
                words[first + Word.RESERVED] += granted
                self._note(words, "borrow", granted)
            return granted

    def commit(self, nbytes: int) -> None:
        """The reserved bytes are held now: memory stands behind them."""
        with self._file.locked() as words:
            self._settle(words, held=nbytes, reserved=-nbytes)
            self._note(words, "commit", nbytes)

    def cancel(self, nbytes: int) -> None:
        """The reserved bytes are not needed, or could not be had."""
        with self._file.locked() as words:
            self._settle(words, held=0, reserved=-nbytes)
            self._note(words, "cancel", nbytes)
            self._owing |= self._needy(words)

    def release(self, nbytes: int) -> None:
        """The held bytes have been given back to the device: others may have them."""
        with self._file.locked() as words:
            self._settle(words, held=-nbytes, reserved=0)
            self._note(words, "release", nbytes)
            self._owing |= self._needy(words)

    # ---------------------------------------------------------------- looking

    @property
    def held(self) -> int:
        return int(self._file.words[self._first + Word.HELD])

    @property
    def reserved(self) -> int:
        return int(self._file.words[self._first + Word.RESERVED])

    @property
    def wanted(self) -> int:
        return int(self._file.words[self._first + Word.WANTED])

    @property
    def cap(self) -> int:
        return int(self._file.words[self._first + Word.CAP])

    @property
    def floor(self) -> int:
        return int(self._file.words[self._first + Word.FLOOR])

    @property
    def asleep(self) -> bool:
        """Whether somebody has put this member to sleep, or it has itself."""
        return bool(self._file.words[self._first + Word.ASLEEP])

    def is_changed(self) -> bool:
        """Whether any record has changed since the last call; reads one word."""
        epoch = self._file.words[Head.EPOCH]
        changed = bool(epoch != self._seen)
        self._seen = epoch
        return changed

    def dues(self) -> tuple[int, int]:
        """(fair share, bytes to give back now). If the ledger is busy, what has changed counts as
        not looked at yet."""
        try:
            with self._file.locked() as words:
                live, claims, shares = self._claims(words)
                mine = live.index(self._first)
                budget = words[Head.BUDGET]
                owed = ledger_shares.owed(budget, claims, shares, budget // BAND)
                return shares[mine], owed[mine]
        except LedgerBusy:
            self._seen = -1
            raise

    def is_alone(self) -> bool:
        """True if nobody else is a member now."""
        with self._file.locked():
            return len(self._file.live()) == 1

    # ---------------------------------------------------------------- telling

    def wake_up(self) -> None:
        """End the sleep that somebody ordered: the floor is ours again."""
        with self._file.locked() as words:
            words[self._first + Word.ASLEEP] = 0
            self._note(words, "wake", 0)

    def report(self, report: Report, target: int) -> None:
        """Let others see how we are. Takes no lock: no grant depends on any of this."""
        words, first = self._file.words, self._first
        for word, field in REPORTED:
            words[first + word] = getattr(report, field)
        words[first + Word.TARGET] = target
        words[first + Word.BEAT] = now_ms()

    def ring(self) -> None:
        """Wake those whom our last verbs concern: who owes us, or waits for what we gave."""
        if self._owing:
            owing, self._owing = self._owing, set()
            self.bell.ring(owing - {self.slot})

    def leave(self) -> None:
        """Give everything back and be a member no more; a second call does nothing."""
        if self._left:
            return
        self._left = True
        with self._file.locked() as words:
            nbytes = words[self._first + Word.HELD] + words[self._first + Word.RESERVED]
            words[self._first] = FREE
            words[Head.MEMBERSHIP] += 1
            self._file.note("leave", self.slot, nbytes)
            others = [slot_of(first) for first in self._file.live()]
        self.bell.ring(others)
        self.bell.close()

    # ---------------------------------------------------------------- parts, under the lock

    def _claims(self, words: memoryview) -> tuple[tuple[int, ...], list[Claim], list[int]]:
        """(first words, claims, fair shares) of all members."""
        live = self._file.live()
        if self._first not in live:
            raise LedgerError(f"{self._file.path}: our record is gone; open the space again")
        claims = claims_of(words, live)
        return live, claims, ledger_shares.fair_shares(words[Head.BUDGET], claims)

    def _needy(self, words: memoryview) -> set[int]:
        """Slots of those who hold less than their fair share."""
        return {
            slot_of(first)
            for first, claim, share in zip(*self._claims(words), strict=True)
            if claim.charged < share
        }

    def _settle(self, words: memoryview, held: int, reserved: int) -> None:
        """What is held rises before what is reserved falls: killed between, we count too much."""
        first = self._first
        new_held = words[first + Word.HELD] + held
        new_reserved = words[first + Word.RESERVED] + reserved
        assert new_held >= 0, f"{-held} bytes released, {words[first + Word.HELD]} held"
        assert new_reserved >= 0, f"{-reserved} bytes of {words[first + Word.RESERVED]} reserved"
        words[first + Word.HELD] = new_held
        words[first + Word.RESERVED] = new_reserved

    def _want(self, words: memoryview, nbytes: int) -> None:
        if words[self._first + Word.WANTED] != nbytes:
            words[self._first + Word.WANTED] = nbytes
            self._note(words, "want", nbytes)

    def _note(self, words: memoryview, event: str, nbytes: int) -> None:
        words[self._first + Word.SEQ] += 1
        self._file.note(event, self.slot, nbytes)


def slot_of(first: int) -> int:
    return (first - HEADER_WORDS) // RECORD_WORDS


def now_ms() -> int:
    """Of the clock that nobody sets; the same for all processes of a machine."""
    return time.monotonic_ns() // 1_000_000


def _refuse_senseless(floor: int, cap: int, weight: float) -> None:
    if not 0 <= floor <= cap:
        raise ConfigError(f"floor {floor}, cap {cap} bytes: 0 <= floor <= cap")
    if not MILLION**-1 <= weight <= MILLION:
        raise ConfigError(f"weight {weight}: between 0.000001 and 1000000")
