"""Directors under a lease: what they hold follows the ledger, also while no steps are made."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests import directed_soak, sharing_soak
from tests.directed_ranks import Ranks, ids
from tests.directed_soak import Steps
from tests.sharing_soak import FLOOR, GROUP, PAGE, PAGES
from tests.waiting import LONG_S
from tiermem import ConfigError, Share
from tiermem.directed.director import Director
from tiermem.errors import DriverError
from tiermem.gpu.emulated import EmulatedDevice
from tiermem.ledger import Ledger, Member
from tiermem.tier import Slots


@pytest.fixture(autouse=True)
def home(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A runtime directory of our own."""
    with tempfile.TemporaryDirectory(prefix="tm-") as name:
        monkeypatch.setenv("XDG_RUNTIME_DIR", name)
        yield Path(name)


@pytest.fixture
def ledger() -> Iterator[Ledger]:
    with Ledger.open("cpu", PAGES * PAGE, group=GROUP) as opened:
        yield opened


@pytest.fixture
def chat() -> Iterator[Steps]:
    steps = Steps("chat")
    yield steps
    steps.close()


def member(ledger: Ledger, name: str) -> Member:
    return next(m for m in ledger.snapshot().members if m.name == name)


def eventually(condition: Callable[[], bool], what: str) -> None:
    until = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < until, what
        time.sleep(0.002)


def fill(steps: Steps, units: int) -> None:
    """So many units are on the GPU, which is all of this engine's."""
    for first in range(1, units, 20):
        assert steps.write(list(range(first, min(first + 20, units))))


def test_an_engine_alone_grows_to_the_whole_budget(chat: Steps, ledger: Ledger) -> None:
    assert member(ledger, "chat").held < PAGES * PAGE
    fill(chat, PAGES)
    assert chat.read(list(range(1, PAGES))) == PAGES - 1
    assert member(ledger, "chat").held == PAGES * PAGE
    chat.check()


def test_an_idle_engine_gives_to_one_that_needs_it(chat: Steps, ledger: Ledger) -> None:
    fill(chat, PAGES)
    code = Steps("code")
    try:
        fill(code, PAGES - FLOOR)
        assert code.read(list(range(1, PAGES - FLOOR))) == PAGES - FLOOR - 1
        assert member(ledger, "code").held >= (PAGES - FLOOR) * PAGE
        held = sum(m.held + m.reserved for m in ledger.snapshot().members)
        assert held <= PAGES * PAGE
        chat.check()
        assert chat.read(list(range(1, FLOOR))) == FLOOR - 1
    finally:
        code.close()


def test_an_engine_that_makes_no_steps_obeys_a_lower_cap(chat: Steps, ledger: Ledger) -> None:
    fill(chat, PAGES)
    ledger.change(member(ledger, "chat"), cap=20 * PAGE)
    eventually(lambda: member(ledger, "chat").held <= 20 * PAGE, "held stays above the cap")
    assert chat.until(lambda: chat.has_room(19))
    assert chat.ranks.director.room() <= 19
    chat.take()
    ledger.change(member(ledger, "chat"), cap=PAGES * PAGE)
    assert chat.read(list(range(1, PAGES))) == PAGES - 1


def test_what_is_in_use_stays_under_a_lower_cap(chat: Steps, ledger: Ledger) -> None:
    fill(chat, PAGES)
    used = list(range(1, 41))
    chat.until(lambda: chat.has_room(0))
    chat.ranks.director.enter(ids(*used))
    chat.take(read=used)
    ledger.change(member(ledger, "chat"), floor=0, cap=20 * PAGE)
    eventually(lambda: member(ledger, "chat").held <= 41 * PAGE, "what is not used stays")
    assert chat.until(lambda: True)
    assert chat.ranks.director.room() == 0
    chat.take(read=used)
    assert member(ledger, "chat").held == 41 * PAGE
    chat.leave(used)
    eventually(lambda: member(ledger, "chat").held <= 20 * PAGE, "held stays above the cap")


def test_an_engine_put_to_sleep_wakes_with_its_next_request(chat: Steps, ledger: Ledger) -> None:
    fill(chat, PAGES)
    ledger.change(member(ledger, "chat"), asleep=True)
    eventually(lambda: member(ledger, "chat").held == PAGE, "it holds more than a page")
    assert chat.read(list(range(1, PAGES))) == PAGES - 1
    assert not member(ledger, "chat").asleep


def test_an_idle_engine_becomes_small_beside_another(chat: Steps, ledger: Ledger) -> None:
    fill(chat, PAGES)
    code = Steps("code")
    try:
        eventually(lambda: member(ledger, "chat").held == FLOOR * PAGE, "it does not give back")
    finally:
        code.close()


def test_frames_count_as_held_until_the_rank_has_parked_them(ledger: Ledger) -> None:
    share = Share(group=GROUP, name="chat", total=PAGES * PAGE, idle_s=60)
    ranks = Ranks(ranks=1, units=300, page=PAGE, budget=PAGES, host=300, share=share)
    try:
        ranks.ensure(50)
        before = member(ledger, "chat").held
        assert before >= 50 * PAGE
        ledger.change(member(ledger, "chat"), cap=20 * PAGE)
        orders = ranks.director.orders()
        for _ in range(20):
            if len(orders.park):
                break
            ranks.ranks[0].carry(orders, None)
            ranks.ranks[0].skip(orders.step)
            ranks.ranks[0].wait(0.05)
            ranks.hear()
            orders = ranks.director.orders()
        assert len(orders.park)
        assert member(ledger, "chat").held == before
        ranks.ranks[0].carry(orders, None)
        ranks.ranks[0].skip(orders.step)
        assert member(ledger, "chat").held == before
        ranks.ranks[0].wait(LONG_S)
        ranks.hear()
        ranks.director.orders()
        assert member(ledger, "chat").held == before - len(orders.park) * PAGE
    finally:
        ranks.close()


@pytest.mark.parametrize("verb", ["back", "park"])
def test_no_step_waits_for_the_memory_of_frames(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    share = Share(group=GROUP, name="chat", total=PAGES * PAGE, idle_s=60)
    ranks = Ranks(ranks=1, units=300, page=PAGE, budget=PAGES, host=300, share=share)
    go_on, real = threading.Event(), getattr(EmulatedDevice, verb)

    def late(device: EmulatedDevice, frames: Slots) -> None:
        assert go_on.wait(LONG_S)
        real(device, frames)

    try:
        if verb == "park":
            ranks.ensure(50)
            ledger.change(member(ledger, "chat"), cap=20 * PAGE)
        monkeypatch.setattr(EmulatedDevice, verb, late)
        ranks.director.make_room(20)
        for _ in range(20):
            orders = ranks.step()
            ranks.hear()
            if len(getattr(orders, verb)):
                break
        room = ranks.director.room()
        assert len(getattr(orders, verb))
        for _ in range(3):
            ranks.step()
            ranks.hear()
            assert ranks.director.room() == room
            assert not ranks.director.is_idle()
        go_on.set()
        ranks.settle()
        ranks.ensure(19)  # of a cap of 20
    finally:
        go_on.set()
        ranks.close()


def test_memory_that_could_not_be_changed_is_an_error_of_the_next_report(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lost(device: EmulatedDevice, frames: Slots) -> None:
        raise DriverError("cuMemCreate: the device is lost")

    share = Share(group=GROUP, name="chat", total=PAGES * PAGE, idle_s=60)
    ranks = Ranks(ranks=1, units=300, page=PAGE, budget=PAGES, host=300, share=share)
    try:
        monkeypatch.setattr(EmulatedDevice, "back", lost)
        ranks.director.make_room(20)
        for _ in range(3):
            ranks.step()
        ranks.ranks[0].wait(LONG_S)
        with pytest.raises(DriverError, match="lost"):
            ranks.hear()
    finally:
        ranks.close()


def test_directors_that_burst_and_are_killed_harm_nobody() -> None:
    outcome = sharing_soak.soak(
        seconds=8, engines=2, seed=3, every_s=2.0, program=directed_soak.__file__
    )
    assert outcome.faults == []
    assert outcome.kills > 0
    assert outcome.samples > 50
    assert max(outcome.freed_s, default=0.0) < 1.0
    assert outcome.most_held > PAGES * PAGE // 2
    assert sum(seen["verified"] for seen in outcome.engines) > 0


def test_the_survivor_of_a_kill_gets_all_of_it(home: Path, chat: Steps, ledger: Ledger) -> None:
    other = sharing_soak.Engine(directed_soak.__file__, "code", 1, home)
    try:
        eventually(lambda: any(m.name == "code" for m in ledger.snapshot().members), "no start")
        fill(chat, PAGES - FLOOR)
    finally:
        other.kill()
    fill(chat, PAGES)
    assert chat.read(list(range(1, PAGES))) == PAGES - 1
    assert member(ledger, "chat").held == PAGES * PAGE


def test_an_engine_that_makes_no_steps_leaves_room_for_a_job_and_takes_it_back(
    chat: Steps, ledger: Ledger
) -> None:
    """`tiermem yield` for a process that is not ours, twice; then that ends."""
    fill(chat, PAGES)
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as job:
        rooms = [room(40 * PAGE, job.pid), room(20 * PAGE, job.pid)]
        held = {m.name: m.held for m in ledger.snapshot().members}
        assert held["chat"] <= (PAGES - 60) * PAGE
        assert sum(held.values()) <= PAGES * PAGE
        assert chat.read(list(range(1, 60))) == 59
        job.communicate(b"\n")
        for each in rooms:
            with each:
                assert each.wait(10) == 0
    eventually(lambda: len(ledger.snapshot().members) == 1, "the room is not given back")
    assert chat.read(list(range(1, PAGES))) == PAGES - 1
    assert member(ledger, "chat").held == PAGES * PAGE


def room(nbytes: int, pid: int) -> subprocess.Popen[bytes]:
    """Made, and kept until that process ends."""
    given = ["yield", "--bytes", str(nbytes), "--for", str(pid)]
    code = f"from tiermem.cli import main; main({given!r})"
    made = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert made.stdout is not None
    assert b"are free on cpu" in made.stdout.readline()
    return made


def test_a_lease_of_several_ranks_is_refused(ledger: Ledger) -> None:
    share = Share(group=GROUP, name="chat", total=PAGES * PAGE)
    ranks = Ranks(ranks=1, units=30, page=PAGE, budget=PAGES, host=30, share=share)
    try:
        with pytest.raises(ConfigError, match="2 ranks"):
            Director(ranks.hellos * 2, 30, 1, ranks.config, leases=ranks.ranks[0].leases)
    finally:
        ranks.close()
