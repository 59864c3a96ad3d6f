"""The ledger: shares, grants, files that were tampered with, and processes that die."""

from __future__ import annotations

import os
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tiermem import ledger_file
from tiermem.errors import ConfigError, TierFull
from tiermem.ledger import Kind, Lease, Ledger, LedgerBusy, LedgerError, Report
from tiermem.ledger_file import (
    HEADER_WORDS,
    RECORD_WORDS,
    RECORDS,
    Head,
    LedgerFile,
    Word,
    runtime_directory,
)
from tiermem.ledger_shares import Claim, claim, fair_shares, grant, owed
from tiermem.ledger_wake import Bell, Listener, is_alive, myself, start_time

PAGE = 4096
BUDGET = 64 * PAGE


@pytest.fixture
def directory() -> Iterator[Path]:
    """Short, because a path of pytest's is longer than some like for a socket."""
    with tempfile.TemporaryDirectory(prefix="tm-") as name:
        yield Path(name)


@contextmanager
def opened(directory: Path, budget: int = BUDGET) -> Iterator[Ledger]:
    with Ledger.open("cpu", budget, directory=directory) as ledger:
        yield ledger


def taken(lease: Lease, pages: int) -> int:
    """Reserve and commit; how many pages were granted."""
    granted = lease.reserve(pages * PAGE)
    lease.commit(granted)
    return granted // PAGE


# Shares -------------------------------------------------------------------------------------------

claims_strategy = st.lists(
    st.builds(
        claim,
        floor=st.integers(0, 20),
        cap=st.integers(20, 200),
        weight=st.floats(0.01, 100),
        charged=st.integers(0, 60),
        wanted=st.integers(0, 300),
        asleep=st.booleans(),
    ),
    min_size=1,
    max_size=6,
)


@given(claims_strategy)
def test_fair_shares_keep_floors_and_caps_and_leave_nothing_that_is_wanted(
    claims: list[Claim],
) -> None:
    budget = 130
    shares = fair_shares(budget, claims)
    assert sum(shares) <= budget
    for share, each in zip(shares, claims, strict=True):
        assert each.low <= share <= each.high
    unmet = sum(each.high for each in claims) - sum(shares)
    assert unmet == 0 or budget - sum(shares) <= len(claims), "room is left that somebody wants"


@given(claims_strategy, st.integers(1, 200))
def test_a_grant_fits_into_what_is_free_and_leaves_the_floors_of_others(
    claims: list[Claim], nbytes: int
) -> None:
    budget = 400
    granted = grant(budget, claims, fair_shares(budget, claims), 0, nbytes)
    free = budget - sum(each.charged for each in claims)
    assert 0 <= granted <= max(0, min(nbytes, free))
    lacking = sum(max(0, each.low - each.charged) for each in claims[1:])
    beyond = granted - max(0, claims[0].low - claims[0].charged)
    assert beyond <= 0 or granted <= free - lacking


@given(claims_strategy)
def test_what_is_owed_is_excess_and_together_as_much_as_is_short(claims: list[Claim]) -> None:
    budget = max(sum(each.charged for each in claims), 130)
    shares = fair_shares(budget, claims)
    due = owed(budget, claims, shares)
    need = sum(max(0, s - c.charged) for s, c in zip(shares, claims, strict=True))
    short = need - (budget - sum(each.charged for each in claims))
    for each, share, one in zip(claims, shares, due, strict=True):
        assert 0 <= one <= max(0, each.charged - share)
    assert sum(due) >= max(0, short)
    assert sum(due) <= max(0, short) + len(claims)


def test_weights_share_what_is_above_the_floors() -> None:
    claims = [claim(20, 999, 1, 0, 999), claim(0, 999, 3, 0, 999)]
    assert fair_shares(100, claims) == [40, 60]


def test_a_sleeper_lends_its_floor_out() -> None:
    claims = [claim(50, 999, 1, 0, 0, asleep=True), claim(0, 999, 1, 0, 999)]
    assert fair_shares(100, claims) == [0, 100]
    assert fair_shares(100, [claim(50, 999, 1, 0, 0), claims[1]]) == [50, 50]


def test_two_busy_members_near_their_shares_leave_each_other_alone() -> None:
    near = [claim(0, 999, 1, 51, 999), claim(0, 999, 1, 49, 999)]
    assert owed(100, near, fair_shares(100, near), band=2) == [0, 0]
    apart = [claim(0, 999, 1, 55, 999), claim(0, 999, 1, 45, 999)]
    assert owed(100, apart, fair_shares(100, apart), band=2) == [5, 0]


def test_the_band_protects_nobody_from_a_floor() -> None:
    claims = [claim(0, 999, 1, 51, 999), claim(50, 999, 1, 49, 50)]
    assert owed(100, claims, fair_shares(100, claims), band=2) == [1, 0]


# Verbs --------------------------------------------------------------------------------------------


def test_the_first_comer_may_borrow_all_and_gives_half_back_when_asked(directory: Path) -> None:
    with opened(directory) as one, opened(directory) as two:
        first = one.join("first", page_bytes=PAGE)
        assert taken(first, 100) == 64
        second = two.join("second", page_bytes=PAGE)
        assert second.reserve(64 * PAGE) == 0
        assert first.dues() == (32 * PAGE, 32 * PAGE)
        first.release(32 * PAGE)
        assert first.dues() == (32 * PAGE, 0)
        assert taken(second, 64) == 32
        assert taken(first, 1) == 0, "a borrower may not take back what he owes"
        second.want(second.held)
        second.release(16 * PAGE)
        second.want(second.held)
        assert taken(first, 64) == 16


def test_bytes_are_charged_until_they_are_released(directory: Path) -> None:
    with opened(directory) as ledger:
        one = ledger.join("one", page_bytes=PAGE)
        assert one.reserve(60 * PAGE) == 60 * PAGE
        assert ledger.snapshot().free == 4 * PAGE
        one.commit(40 * PAGE)
        assert (one.held, one.reserved) == (40 * PAGE, 20 * PAGE)
        one.cancel(20 * PAGE)
        assert ledger.snapshot().free == 24 * PAGE
        one.leave()
        assert ledger.snapshot().free == BUDGET
        one.leave()


def test_releasing_what_is_not_held_is_a_bug_of_ours(directory: Path) -> None:
    with opened(directory) as ledger:
        one = ledger.join("one", page_bytes=PAGE)
        with pytest.raises(AssertionError, match="released"):
            one.release(PAGE)
        assert taken(one, 1) == 1, "the lock was given back"


def test_a_floor_is_there_at_once_whoever_borrows(directory: Path) -> None:
    with opened(directory) as ledger:
        borrower = ledger.join("borrower", page_bytes=PAGE)
        owner = ledger.join("owner", page_bytes=PAGE, floor=20 * PAGE)
        assert taken(borrower, 64) == 44
        assert taken(owner, 20) == 20


def test_floors_that_do_not_fit_together_are_refused(directory: Path) -> None:
    with opened(directory) as ledger:
        ledger.join("one", page_bytes=PAGE, floor=40 * PAGE)
        with pytest.raises(TierFull, match="the others' floors are 163840"):
            ledger.join("two", page_bytes=PAGE, floor=25 * PAGE)
        two = ledger.join("two", page_bytes=PAGE, floor=24 * PAGE)
        (member,) = (m for m in ledger.snapshot().members if m.slot == two.slot)
        with pytest.raises(TierFull, match="tiermem limit"):
            ledger.change(member, floor=25 * PAGE)


def test_new_terms_hold_at_once(directory: Path) -> None:
    with opened(directory) as ledger:
        one = ledger.join("one", page_bytes=PAGE)
        assert taken(one, 50) == 50
        (member,) = ledger.snapshot().members
        ledger.change(member, cap=8 * PAGE, weight=2.0)
        assert one.cap == 8 * PAGE
        assert one.dues()[0] == 8 * PAGE
        assert one.reserve(PAGE) == 0
        with pytest.raises(ConfigError, match="floor <= cap"):
            ledger.change(member, floor=9 * PAGE)
        one.leave()
        with pytest.raises(LedgerError, match="has ended"):
            ledger.change(member, cap=BUDGET)


def test_a_report_is_seen_by_others_and_grants_nothing(directory: Path) -> None:
    with opened(directory) as ledger:
        one = ledger.join("an engine with a name", page_bytes=PAGE)
        one.report(Report(movable=1, pinned=2, stalls=3, moved_down=4), target=5)
        (member,) = ledger.snapshot().members
        assert (member.name, member.kind) == ("an engine with a name", Kind.ENGINE)
        assert (member.movable, member.pinned, member.stalls, member.target) == (1, 2, 3, 5)
        assert member.held == 0


def test_a_full_directory_is_an_answer_with_the_way_out(directory: Path) -> None:
    with opened(directory) as ledger:
        leases = [ledger.join(str(i), page_bytes=PAGE) for i in range(RECORDS)]
        with pytest.raises(TierFull, match=r"all 64 records are in use.*share\.group"):
            ledger.join("one more", page_bytes=PAGE)
        leases[3].leave()
        assert ledger.join("one more", page_bytes=PAGE).slot == 3


def test_one_word_says_whether_anything_has_changed(directory: Path) -> None:
    with opened(directory) as ledger:
        one = ledger.join("one", page_bytes=PAGE)
        assert one.is_changed()
        assert not one.is_changed()
        one.report(Report(stalls=1), target=0)
        assert not one.is_changed()
        ledger.join("two", page_bytes=PAGE)
        assert one.is_changed()


def test_a_change_that_a_busy_ledger_kept_from_being_looked_at_is_not_forgotten(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def busy(file: LedgerFile, timeout_s: float = 1.0) -> NoReturn:
        raise LedgerBusy("somebody holds the lock")

    with opened(directory) as ledger:
        one = ledger.join("one", page_bytes=PAGE)
        taken(one, 8)
        two = ledger.join("two", page_bytes=PAGE)
        two.want(4 * PAGE)
        assert one.is_changed()
        with monkeypatch.context() as held:
            held.setattr(LedgerFile, "locked", busy)
            with pytest.raises(LedgerBusy):
                one.dues()
        assert one.is_changed()
        one.dues()
        assert not one.is_changed()


class LedgerMachine(RuleBasedStateMachine):
    """Members that come, take, give and go, beside plain sums."""

    def __init__(self) -> None:
        super().__init__()
        self.home = tempfile.TemporaryDirectory(prefix="tm-")
        self.ledger = Ledger.open("cpu", BUDGET, directory=Path(self.home.name))
        self.leases: list[Lease] = []
        self.floors: list[int] = []

    @rule(floor=st.integers(0, 24), weight=st.floats(0.1, 10))
    @precondition(lambda self: len(self.leases) < 5)
    def join(self, floor: int, weight: float) -> None:
        if sum(self.floors) + floor > 64:
            return
        lease = self.ledger.join("m", page_bytes=PAGE, floor=floor * PAGE, weight=weight)
        self.leases.append(lease)
        self.floors.append(floor)

    @rule(which=st.integers(0, 4), pages=st.integers(1, 70), keep=st.floats(0, 1))
    def reserve(self, which: int, pages: int, keep: float) -> None:
        if which >= len(self.leases):
            return
        lease = self.leases[which]
        granted = lease.reserve(pages * PAGE)
        assert granted % PAGE == 0
        kept = int(granted / PAGE * keep) * PAGE
        lease.commit(kept)
        lease.cancel(granted - kept)

    @rule(which=st.integers(0, 4))
    def obey(self, which: int) -> None:
        if which < len(self.leases):
            lease = self.leases[which]
            _, due = lease.dues()
            lease.release(min(lease.held, -(-due // PAGE) * PAGE))

    @rule(which=st.integers(0, 4), part=st.floats(0, 1))
    def give(self, which: int, part: float) -> None:
        if which < len(self.leases):
            lease = self.leases[which]
            lease.release(int(lease.held / PAGE * part) * PAGE)
            lease.want(lease.held)

    @rule(which=st.integers(0, 4))
    def leave(self, which: int) -> None:
        if which < len(self.leases):
            self.leases.pop(which).leave()
            self.floors.pop(which)

    @rule()
    def settle(self) -> None:
        """Once everybody has given what he owes, every floor can be had at once."""
        for lease in self.leases:
            _, due = lease.dues()
            lease.release(min(lease.held, -(-due // PAGE) * PAGE))
        for lease, floor in zip(self.leases, self.floors, strict=True):
            short = floor * PAGE - lease.held
            if short > 0:
                assert lease.reserve(short) == short
                lease.commit(short)

    @invariant()
    def never_above_the_budget(self) -> None:
        snapshot = self.ledger.snapshot()
        assert snapshot.free >= 0
        assert sum(lease.held + lease.reserved for lease in self.leases) == BUDGET - snapshot.free

    def teardown(self) -> None:
        for lease in self.leases:
            lease.leave()
        assert self.ledger.snapshot().members == ()
        self.ledger.close()
        self.home.cleanup()


TestLedgerMachine = LedgerMachine.TestCase
TestLedgerMachine.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)


# Files --------------------------------------------------------------------------------------------


def test_the_runtime_directory_is_ours_and_nobody_elses(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    env = {"XDG_RUNTIME_DIR": str(directory)}
    made = runtime_directory(env)
    assert made == directory / "tiermem"
    assert made.stat().st_mode & 0o777 == 0o700
    made.chmod(0o755)
    with pytest.raises(LedgerError, match="open to others"):
        runtime_directory(env)
    made.rmdir()
    made.symlink_to(directory)
    with pytest.raises(LedgerError, match="no plain directory"):
        runtime_directory(env)
    made.unlink()
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(LedgerError, match="belongs to uid"):
        runtime_directory(env)


def test_a_ledger_of_another_user_is_refused(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened(directory) as ledger:
        assert ledger.path.stat().st_mode & 0o777 == 0o600
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(LedgerError, match="belongs to uid"), opened(directory):
        pass


def test_a_ledger_that_others_may_read_is_refused(directory: Path) -> None:
    with opened(directory) as ledger:
        path = ledger.path
    path.chmod(0o644)
    with pytest.raises(LedgerError, match="chmod go-rwx"), opened(directory):
        pass


def test_a_link_in_place_of_the_ledger_is_refused(directory: Path) -> None:
    with opened(directory) as ledger:
        path = ledger.path
    path.rename(directory / "elsewhere")
    path.symlink_to(directory / "elsewhere")
    with pytest.raises(LedgerError, match="cannot be opened"), opened(directory):
        pass


DAMAGE: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "truncated": (lambda raw: raw[:1000], "1000 bytes instead of"),
    "not a ledger": (lambda raw: b"\x55" * len(raw), "not a ledger"),
    "another version": (lambda raw: raw[:8] + struct.pack("<q", 7) + raw[16:], "version 7"),
    "another size": (lambda raw: raw + b"\0" * 8, "instead of"),
    "a flipped bit": (lambda raw: raw[:24] + bytes([raw[24] ^ 4]) + raw[25:], "damaged header"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_ledger_that_nobody_uses_is_made_anew(
    directory: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    damage, says = DAMAGE[kind]
    with opened(directory) as ledger:
        ledger.join("left over", page_bytes=PAGE)
        path = ledger.path
    path.write_bytes(damage(path.read_bytes()))
    with opened(directory) as ledger:
        assert ledger.snapshot().members == ()
        assert ledger.budget == BUDGET
    assert says in caplog.text


@pytest.mark.parametrize("kind", [kind for kind in DAMAGE if kind != "truncated"])
def test_a_damaged_ledger_in_use_is_refused(directory: Path, kind: str) -> None:
    damage, says = DAMAGE[kind]
    with opened(directory) as ledger:
        whole = ledger.path.read_bytes()
        ledger.path.write_bytes(damage(whole))
        with pytest.raises(LedgerError, match=f"{says}.*in use"), opened(directory):
            pass
        ledger.path.write_bytes(whole)
        assert ledger.snapshot().members == ()


def test_a_truncated_ledger_in_use_is_refused(directory: Path) -> None:
    with opened(directory) as ledger:
        os.truncate(ledger.path, 1000)
        with pytest.raises(LedgerError, match=r"1000 bytes.*in use"), opened(directory):
            pass
        os.truncate(ledger.path, ledger_file.SIZE)  # or closing would touch what is not there


def test_what_a_record_only_tells_does_not_make_it_damaged(directory: Path) -> None:
    with opened(directory) as one:
        lease = one.join("a", page_bytes=PAGE)
        lease.report(Report(stalls=-1), -PAGE)
        (member,) = one.snapshot().members
        assert (member.target, member.stalls) == (-PAGE, -1)


def test_a_damaged_record_is_named_and_grants_nothing(directory: Path) -> None:
    with opened(directory) as ledger:
        good, bad = (ledger.join(name, page_bytes=PAGE) for name in ("good", "bad"))
        poke(ledger, bad.slot, Word.HELD, -5)
        with pytest.raises(LedgerError, match=f"process {os.getpid()} is damaged"):
            good.reserve(PAGE)


def test_a_record_that_is_gone_is_an_error_not_a_grant(directory: Path) -> None:
    with opened(directory) as ledger:
        lease = ledger.join("one", page_bytes=PAGE)
        poke(ledger, lease.slot, Word.STATE, 0)
        with pytest.raises(LedgerError, match="our record is gone"):
            lease.reserve(PAGE)


def test_a_ledger_of_another_pid_namespace_is_refused(directory: Path) -> None:
    with opened(directory), pytest.MonkeyPatch.context() as patch:
        patch.setattr(ledger_file, "_pid_space", lambda: 42)
        with pytest.raises(LedgerError, match="pid namespace"), opened(directory):
            pass


def test_all_engines_of_a_group_mean_the_same_budget_and_device(directory: Path) -> None:
    with opened(directory) as ledger:
        with (
            pytest.raises(ConfigError, match=r"share\.total = 4096 bytes"),
            opened(directory, PAGE),
        ):
            pass
        with pytest.raises(LedgerError, match="is of device cpu, not cuda"):
            Ledger(ledger.path, "cuda", BUDGET)
    with opened(directory, PAGE) as ledger:
        assert ledger.budget == PAGE, "nobody is left who means another one"


def test_a_removed_ledger_is_noticed(directory: Path) -> None:
    with opened(directory) as ledger:
        assert ledger.is_in_place()
        ledger.path.unlink()
        assert not ledger.is_in_place()
        with opened(directory):
            assert not ledger.is_in_place()


def test_a_clock_that_jumps_changes_nothing(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened(directory) as ledger:
        one = ledger.join("one", page_bytes=PAGE)
        for jump in (0.0, 4e9, -4e9):
            monkeypatch.setattr(time, "time", lambda jump=jump: jump)
            poke(ledger, one.slot, Word.BEAT, max(0, int(jump)) * 1000)
            assert taken(one, 1) == 1
            assert ledger.reap() == 0
            assert ledger.snapshot().members[0].age_s >= 0


def test_only_ledgers_in_use_are_found(directory: Path) -> None:
    assert Ledger.found(directory) == []
    with opened(directory) as ledger:
        (found,) = Ledger.found(directory)
        assert (found.device, found.budget) == ("cpu", BUDGET)
        found.close()
        assert ledger.is_in_place()
    assert Ledger.found(directory) == []


# Processes ----------------------------------------------------------------------------------------

MEMBER = """
import sys, time
from pathlib import Path
from tiermem.ledger import Ledger
ledger = Ledger.open("cpu", {budget}, directory=Path(sys.argv[1]))
lease = ledger.join("child", page_bytes=4096)
lease.commit(lease.reserve({pages} * 4096))
{then}
print("ready", flush=True)
time.sleep(600)
"""


TAKE_LOCK = """
import os
from tiermem.ledger_file import GRANT, Lock
assert Lock(os.open(ledger.path, os.O_RDWR), GRANT).take()
"""


@contextmanager
def child(directory: Path, pages: int, then: str = "") -> Iterator[subprocess.Popen[str]]:
    code = MEMBER.format(budget=BUDGET, pages=pages, then=then)
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(directory)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "ready\n"
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def test_what_a_killed_process_held_is_free_again(directory: Path) -> None:
    with opened(directory) as ledger:
        mine = ledger.join("mine", page_bytes=PAGE)
        with child(directory, 50) as other:
            assert taken(mine, 64) == 14
            assert ledger.reap() == 0
            other.send_signal(signal.SIGKILL)
            other.wait()
            assert ledger.reap() == 1
        assert taken(mine, 64) == 50
        assert [path.suffix for path in directory.iterdir()].count(".sock") == 1


def test_a_process_that_waits_to_be_reaped_by_its_parent_counts_as_gone(directory: Path) -> None:
    with opened(directory) as ledger, child(directory, 50) as other:
        owner = ledger.owners().pop()
        assert is_alive(owner)
        os.kill(other.pid, signal.SIGKILL)
        os.waitid(os.P_PID, other.pid, os.WEXITED | os.WNOWAIT)
        assert not is_alive(owner)
        assert ledger.reap() == 1


def test_the_lock_of_a_killed_process_is_free(directory: Path) -> None:
    with opened(directory) as ledger:
        lease = ledger.join("mine", page_bytes=PAGE)
        with child(directory, 0, TAKE_LOCK) as other:
            with pytest.raises(LedgerError, match=r"another process has held the lock for 0\.05 s"):
                lease.reserve(PAGE, timeout_s=0.05)
            other.kill()
            other.wait()
            assert taken(lease, 1) == 1


def test_a_pid_that_is_used_again_is_somebody_else(directory: Path) -> None:
    with opened(directory) as ledger:
        lease = ledger.join("mine", page_bytes=PAGE)
        taken(lease, 9)
        poke(ledger, lease.slot, Word.START, start_time(os.getpid()) + 1)
        assert ledger.reap() == 1
        assert ledger.snapshot().members == ()


def test_a_forked_child_has_no_part_in_the_ledger(directory: Path) -> None:
    with opened(directory) as ledger:
        lease = ledger.join("mine", page_bytes=PAGE)
        pid = os.fork()
        if not pid:
            try:
                lease.reserve(PAGE)
            except LedgerError as error:
                os._exit(0 if "opened by a parent process" in str(error) else 2)
            os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert taken(lease, 1) == 1


def test_two_processes_never_hold_more_than_there_is(directory: Path) -> None:
    busy = (
        "import threading, time\n"
        "def churn():\n"
        "    while True:\n"
        "        lease.commit(lease.reserve(40 * 4096)); lease.release(lease.held)\n"
        "        time.sleep(0.0005)\n"
        "threading.Thread(target=churn, daemon=True).start()"
    )
    with opened(directory) as ledger:
        lease = ledger.join("mine", page_bytes=PAGE)
        with child(directory, 0, busy), child(directory, 0, busy):
            for _ in range(500):
                lease.commit(lease.reserve(40 * PAGE))
                assert ledger.snapshot().free >= 0
                lease.release(lease.held)


# Waking -------------------------------------------------------------------------------------------


def test_a_ring_wakes_and_the_end_of_a_process_is_heard(directory: Path) -> None:
    woken, ended = threading.Event(), threading.Event()
    with opened(directory) as ledger:
        lease = ledger.join("mine", page_bytes=PAGE)
        listener = Listener(lease.bell, lambda: ledger.owners() - {myself()}, woken.set, ended.set)
        try:
            with child(directory, 50) as other:
                assert woken.wait(10), "a newcomer rings"
                woken.clear()
                ring(ledger, lease)
                assert woken.wait(10)
                other.kill()
                assert ended.wait(10)
        finally:
            listener.close()
            listener.close()


def test_a_datagram_of_another_user_is_not_heard(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened(directory) as ledger:
        lease = ledger.join("mine", page_bytes=PAGE)
        ring(ledger, lease)
        assert lease.bell.heard()
        ring(ledger, lease)
        monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
        assert not lease.bell.heard()


def test_a_crowd_of_rings_blocks_nobody(directory: Path) -> None:
    with opened(directory) as ledger:
        lease = ledger.join("mine", page_bytes=PAGE)
        ring(ledger, lease, 10_000)
        assert lease.bell.heard()
        assert not lease.bell.heard()


def test_changes_are_written_down_if_a_log_is_there(directory: Path) -> None:
    with opened(directory) as ledger:
        log = ledger.path.with_suffix(".events")
    log.touch()
    with opened(directory) as ledger:
        taken(ledger.join("mine", page_bytes=PAGE), 5)
    events = [line.split() for line in log.read_text().splitlines()]
    assert [event[3] for event in events] == ["join", "want", "reserve", "commit", "leave"]
    assert events[-2][5:] == [str(5 * PAGE), "0", str(BUDGET)]


def ring(ledger: Ledger, lease: Lease, times: int = 1) -> None:
    bell = Bell(ledger.path)
    bell.ring([lease.slot] * times)
    bell.close()


def poke(ledger: Ledger, slot: int, word: Word, value: int) -> None:
    """Write into a record from outside."""
    with ledger.path.open("r+b") as file:
        file.seek(8 * (HEADER_WORDS + slot * RECORD_WORDS + word))
        file.write(struct.pack("<q", value))


def test_the_header_ends_before_the_records() -> None:
    assert max(Head) + 16 <= HEADER_WORDS
