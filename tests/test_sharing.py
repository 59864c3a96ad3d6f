"""Spaces that share a device: who holds what, and what happens when they want more or less."""

from __future__ import annotations

import itertools
import os
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from tests import sharing_soak
from tests.waiting import LONG_S, until
from tiermem import Config, ConfigError, Gpu, Host, Region, Share, Space, TierFull
from tiermem.assemble import assemble
from tiermem.gpu.emulated import EmulatedDevice
from tiermem.leased import Demand
from tiermem.leases import Leases
from tiermem.ledger import Ledger, Member
from tiermem.ledger_file import LedgerError
from tiermem.sharing import Sharing
from tiermem.tier import Memory, Place, Slots

PAGE = 64 << 10
PAGES = 64


@pytest.fixture(autouse=True)
def home(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A runtime directory of our own; its ledgers are in `tiermem` below it."""
    with tempfile.TemporaryDirectory(prefix="tm-") as name:
        monkeypatch.setenv("XDG_RUNTIME_DIR", name)
        yield Path(name) / "tiermem"


def config(
    name: str,
    *,
    floor: int = 0,
    cap: int | None = None,
    total: int = PAGES,
    budget: int = PAGES,
    idle_s: float = 60.0,
    host: int = 4 * PAGES,
) -> Config:
    """Sizes in pages."""
    return Config(
        gpu=Gpu(device="cpu", budget=budget * PAGE, page=PAGE),
        host=Host(capacity=host * PAGE),
        share=Share(
            name=name,
            floor=floor * PAGE,
            cap=None if cap is None else cap * PAGE,
            total=total * PAGE,
            idle_s=idle_s,
        ),
    )


@contextmanager
def engine(given: Config) -> Iterator[tuple[Space, Region]]:
    with Space.open(given) as space, space.reserve(4 * PAGES * PAGE) as region:
        yield space, region
        space.check()


def fill(region: Region, n: int) -> list[int]:
    """Allocate n pages and write each page's number into it."""
    pages: list[int] = region.allocate(n).tolist()
    with region.use(pages, "fresh"):
        region.view(np.uint64)[pages] = np.array(pages, np.uint64)[:, None] + 1
    return pages


def verify(region: Region, pages: list[int]) -> None:
    view = region.view(np.uint64)
    for page in pages:
        with region.use(page):
            assert (view[page] == page + 1).all()


def members(home: Path) -> dict[str, Member]:
    (ledger,) = Ledger.found(home)
    with ledger:
        return {member.name: member for member in ledger.snapshot().members}


def held(space: Space) -> int:
    return space.statistics().tier(Place.GPU).capacity


def test_without_a_share_section_no_ledger_is_touched(home: Path) -> None:
    with Space.open(Config(gpu=Gpu(device="cpu", budget=4 * PAGE, page=PAGE))) as space:
        assert held(space) == 4
    assert not home.exists()


def test_a_space_opens_small_and_grows_with_what_it_allocates(home: Path) -> None:
    with engine(config("one")) as (space, region):
        assert held(space) < 8
        pages = fill(region, 50)
        assert held(space) >= 50
        assert space.statistics().counts.get("gpu_host", 0) == 0, "nothing had to leave"
        verify(region, pages)
        until(lambda: members(home)["one"].held == held(space) * PAGE)
    assert Ledger.found(home) == []


def test_a_newcomer_gets_its_share_of_a_full_card(home: Path) -> None:
    with engine(config("old")) as (old, kept):
        pages = fill(kept, PAGES)
        assert held(old) == PAGES
        with engine(config("new")) as (new, region):
            more = fill(region, PAGES // 2)
            assert held(new) == PAGES // 2
            assert held(old) <= PAGES // 2
            verify(region, more)
            verify(kept, pages)
        until(lambda: members(home).keys() == {"old"})


@contextmanager
def newcomer(total: int = PAGES, host: int = 4 * PAGES) -> Iterator[tuple[Space, Region]]:
    """A space beside one that holds the whole card, and whose pages are verified in the end."""
    with engine(config("old", total=total, budget=total)) as (_, kept):
        pages = fill(kept, total)
        with engine(config("new", total=total, budget=total, host=host)) as (new, region):
            yield new, region
        verify(kept, pages)


def test_a_newcomer_waits_for_its_share_rather_than_lose_pages_of_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("tiermem.membership.EXPECT_S", 10.0)
    with newcomer(host=0) as (new, region):
        mine = fill(region, 2)
        mine += fill(region, 24)
        verify(region, mine)
        assert new.statistics().counts.get("dropped", 0) == 0


def test_while_one_request_of_many_is_served_others_give_for_the_next(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("tiermem.membership.EXPECT_S", 10.0)
    real, me, asked = Sharing._note_asked, threading.get_ident(), list[int]()

    def note_asked(sharing: Sharing, nbytes: int) -> None:
        if threading.get_ident() == me:  # the mover asks for more as time goes by
            asked.append(nbytes)
        real(sharing, nbytes)

    with newcomer() as (new, region):
        monkeypatch.setattr(Sharing, "_note_asked", note_asked)
        more = fill(region, 4)
        assert 4 * PAGE <= max(asked) < 8 * PAGE, "a small one asks for as much again at most"
        more += fill(region, 16)
        until(lambda: held(new) >= 20 + 8)  # an eighth of the ceiling
        more += fill(region, PAGES // 2 - 20)
        assert held(new) == PAGES // 2, "and no more than its share"
        verify(region, more)


def test_who_waits_for_one_request_after_another_is_given_as_much_as_has_come(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("tiermem.membership.EXPECT_S", 10.0)
    with newcomer() as (new, region):
        more = fill(region, 6)
        until(lambda: held(new) >= 10)
        more += fill(region, 3)  # of which none is lacking
        until(lambda: held(new) >= 9 + 7)  # for what has come is asked for again
        more += fill(region, held(new) - 7)  # of which two are lacking
        until(lambda: held(new) >= 16 + 2 + 6)  # and not two more
        verify(region, more)


def test_a_page_that_is_less_than_anybody_has_to_give_comes_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An excess of 1/128 of the card is left with its holder, so whoever lacks less asks for more
    rather than wait for what nobody owes, or lose pages of its own."""
    monkeypatch.setattr("tiermem.membership.EXPECT_S", LONG_S)
    monkeypatch.setattr("tiermem.leased.PATIENCE_MS", LONG_S * 1000)
    monkeypatch.setattr("tiermem.sharing.AHEAD", 0)
    with newcomer(total=4 * PAGES, host=0) as (new, region):  # so that 1/128 is two pages
        more = fill(region, 32)
        began = time.monotonic()
        more += fill(region, held(new) + 1 - len(more))
        assert time.monotonic() < began + LONG_S / 2
        assert new.statistics().counts.get("dropped", 0) == 0
        verify(region, more)


def test_others_hear_of_each_few_frames_that_have_no_memory_any_more(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tiermem.supply.GROUP", 4)
    seen: list[tuple[int, int]] = []
    park = EmulatedDevice.park

    def noted(device: EmulatedDevice, frames: Slots) -> None:
        seen.append((len(frames), members(home)["old"].held // PAGE))
        park(device, frames)

    with engine(config("old")) as (_, kept):
        pages = fill(kept, PAGES)
        monkeypatch.setattr(EmulatedDevice, "park", noted)
        with engine(config("new")) as (_, region):
            fill(region, PAGES // 2)
            until(lambda: members(home)["old"].held <= PAGES // 2 * PAGE)
            assert max(n for n, _ in seen) == 4
            fell = [before - after for (_, before), (_, after) in itertools.pairwise(seen)]
            assert fell.count(4) >= 3, "the bytes of one go are free before the next"
        verify(kept, pages)


def test_pages_that_come_while_a_lease_is_followed_do_not_leave_for_it(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The newcomer's mover found nothing in use, and one of its two pages owed to the other."""
    real, found, came = Sharing.limit, threading.Event(), threading.Event()
    later: list[int] = []
    monkeypatch.setattr("tiermem.membership.EXPECT_S", 10.0)

    with engine(config("old")) as (old, kept):
        pages = fill(kept, PAGES)

        def limit(sharing: Sharing, demand: Demand) -> int:
            frames = real(sharing, demand)
            if sharing is old._sharing:
                return frames
            if found.is_set():
                later.append(demand.used)
            elif frames == 1:
                monkeypatch.setattr("tiermem.sharing.WARM_EVERY_S", float("inf"))
                found.set()
                assert came.wait(LONG_S)
            return frames

        monkeypatch.setattr(Sharing, "limit", limit)
        with engine(config("new", host=0)) as (new, region):
            assert found.wait(LONG_S)
            mine = fill(region, 2)
            came.set()
            until(lambda: len(later) >= 3)
            assert later[0] == 2
            verify(region, mine)
            assert new.statistics().counts.get("dropped", 0) == 0
        verify(kept, pages)


def test_others_that_owe_and_give_nothing_are_not_waited_for_long(home: Path) -> None:
    with engine(config("old")) as (_, kept):
        pages = fill(kept, PAGES)
        with kept.use(pages[: PAGES - 6]), engine(config("new")) as (new, region):
            mine = fill(region, 4)
            for _ in range(4):
                mine += fill(region, 4)
            assert held(new) <= 6
            verify(region, mine)


def test_a_request_above_the_share_is_refused_with_the_lease(home: Path) -> None:
    with engine(config("old")) as (_, kept):
        fill(kept, PAGES)
        with (
            engine(config("new")) as (_, region),
            pytest.raises(TierFull, match=r"need 60 pages.*share of 2097152.*share\.weight"),
        ):
            region.allocate(60)


def test_a_floor_is_there_from_the_start(home: Path) -> None:
    with engine(config("greedy")) as (_, kept):
        pages = fill(kept, PAGES)
        with engine(config("modest", floor=16)) as (modest, region):
            until(lambda: members(home)["modest"].held >= 16 * PAGE)
            mine = fill(region, 16)
            for _ in range(3):
                verify(kept, pages)
                verify(region, mine)
            assert held(modest) >= 16


def test_pinned_pages_stay_whoever_asks(home: Path) -> None:
    with engine(config("old")) as (old, kept):
        pages = fill(kept, PAGES)
        with kept.use(pages[:50]), engine(config("new", floor=8)) as (new, region):
            fill(region, 8)
            with pytest.raises(TierFull):
                region.allocate(20)
            assert held(old) >= 50
            assert held(new) <= 14
        until(lambda: held(old) <= PAGES)
        verify(kept, pages)


def test_a_cap_that_is_lowered_moves_pages_down_at_once(home: Path) -> None:
    with engine(config("one")) as (space, region):
        pages = fill(region, 40)
        (ledger,) = Ledger.found(home)
        with ledger:
            (member,) = ledger.snapshot().members
            ledger.change(member, cap=10 * PAGE)
            until(lambda: held(space) <= 10)
            until(lambda: ledger.snapshot().held <= 10 * PAGE)
            verify(region, pages)
            assert held(space) <= 10
            (member,) = ledger.snapshot().members
            ledger.change(member, cap=PAGES * PAGE)
        with region.use(pages):
            assert held(space) >= 40


def test_a_sleeper_gives_all_and_wakes_at_the_next_use(home: Path) -> None:
    with engine(config("one", floor=32)) as (space, region):
        pages = fill(region, 40)
        (ledger,) = Ledger.found(home)
        with ledger:
            (member,) = ledger.snapshot().members
            ledger.change(member, asleep=True)
            until(lambda: ledger.snapshot().held == PAGE)
            verify(region, pages[:20])
            until(lambda: not ledger.snapshot().members[0].asleep)
        with region.use(pages[:32]):
            assert held(space) >= 32


def test_an_idle_engine_shrinks_to_its_floor_when_others_are_there(home: Path) -> None:
    with engine(config("idle", floor=6, idle_s=0.3)) as (idle, region):
        pages = fill(region, 40)
        with engine(config("busy")) as (_, other):
            until(lambda: held(idle) <= 6)
            fill(other, PAGES - 6)
        verify(region, pages)


@pytest.mark.parametrize("why", ["idle", "asleep"])
def test_who_gives_up_what_nobody_asked_for_keeps_it_for_a_request(
    home: Path, monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    """It holds its whole budget until the first frames are parked, and may ask for no more."""
    real, parking, go = EmulatedDevice.park, threading.Event(), threading.Event()

    def park(device: EmulatedDevice, frames: Slots) -> None:
        parking.set()
        assert go.wait(LONG_S)
        real(device, frames)

    given = config("one", total=2 * PAGES, idle_s=0.3 if why == "idle" else 60.0)
    with engine(given) as (_, region), engine(config("other", total=2 * PAGES)):
        pages = fill(region, PAGES)
        monkeypatch.setattr(EmulatedDevice, "park", park)
        if why == "asleep":
            (ledger,) = Ledger.found(home)
            with ledger:
                ledger.change(members(home)["one"], asleep=True)
        assert parking.wait(LONG_S)
        threading.Timer(0.2, go.set).start()
        verify(region, pages + fill(region, 8))


def test_an_engine_that_is_alone_keeps_its_pages(home: Path) -> None:
    with engine(config("alone", idle_s=0.05)) as (space, region):
        fill(region, 40)
        (ledger,) = Ledger.found(home)
        with ledger:
            until(lambda: ledger.snapshot().members[0].wanted < 10 * PAGE)
        assert held(space) >= 40


def test_the_limit_of_a_space_holds_under_a_lease(home: Path) -> None:
    with engine(config("one")) as (space, region):
        pages = fill(region, 40)
        space.limit(8 * PAGE)
        until(lambda: held(space) <= 8)
        verify(region, pages)
        assert held(space) <= 8
        with pytest.raises(ConfigError, match="1 to 64"):
            space.limit((PAGES + 1) * PAGE)


def test_a_second_total_is_refused(home: Path) -> None:
    with engine(config("one")):
        with pytest.raises(ConfigError, match=r"share\.total"):
            Space.open(config("two", total=PAGES // 2))
        assert members(home).keys() == {"one"}


def test_a_card_that_is_pinned_full_is_an_error_with_names(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tiermem.sharing.FIRST_S", 0.3)
    with engine(config("old")) as (_, kept):
        pages = fill(kept, PAGES)
        with kept.use(pages), pytest.raises(TierFull, match=r"old holds 4194304.*tiermem limit"):
            Space.open(config("new"))
        assert members(home).keys() == {"old"}


def test_a_ledger_that_was_removed_freezes_the_lease_and_nothing_else(
    home: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("tiermem.sharing.PLACE_EVERY_S", 0.0)
    with engine(config("one")) as (space, region):
        pages = fill(region, 20)
        for file in home.iterdir():
            file.unlink()
        until(lambda: "lease frozen" in caplog.text)
        before = held(space)
        more = fill(region, 10)
        more += fill(region, 10)
        assert held(space) == before
        verify(region, pages + more)


def test_a_space_that_cannot_open_leaves_the_ledger(home: Path) -> None:
    bad = config("one", host=1 << 40)
    with pytest.raises(ConfigError):
        Space.open(bad)
    assert not home.exists() or Ledger.found(home) == []


def test_a_forked_child_leaves_the_ledger_alone(home: Path) -> None:
    with engine(config("one")) as (_, region):
        pages = fill(region, 4)
        (ledger,) = Ledger.found(home)
        with ledger:
            pid = os.fork()
            if not pid:
                try:
                    ledger.snapshot()
                except LedgerError:
                    os._exit(0)
                os._exit(1)
            assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
            assert len(ledger.snapshot().members) == 1
        verify(region, pages)


class Growing:
    """Frames that are backed little by little, as those of a GPU are; see `Tier`."""

    place = Place.GPU

    def __init__(self, frames: Memory, ready: int) -> None:
        self.slot_bytes = frames.slot_bytes
        self.capacity = frames.capacity
        self.ready = ready
        self.growing = True
        self.resize = frames.resize
        self.close = frames.close


@pytest.mark.parametrize("backed", [8, 5])
def test_a_space_whose_first_frames_come_slowly_stays_charged_for_them(
    home: Path, backed: int
) -> None:
    """In the end all 8 are there, or the device had memory for 5 only."""
    given = config("slow", floor=8)
    sharing = Sharing.open(given)
    parts = assemble(given, sharing.terms.first)
    frames = Growing(parts.device.frames, 1)
    parts.tiers[Place.GPU] = frames
    with Space(given, parts, Leases(sharing)) as space, space.reserve(8 * PAGE) as region:
        fill(region, 1)
        assert members(home)["slow"].held == 8 * PAGE
        frames.ready, frames.growing = backed, False
        until(lambda: held(space) >= backed)
        until(lambda: members(home)["slow"].held == held(space) * PAGE)
        space.check()


def test_engines_that_burst_and_are_killed_harm_nobody() -> None:
    outcome = sharing_soak.soak(seconds=6, engines=3, seed=7, every_s=1.5)
    assert outcome.faults == []
    assert outcome.kills > 0
    assert outcome.samples > 50
    assert outcome.changes > 50
    assert outcome.most_host > 0
    assert max(outcome.freed_s) < 1.0
    assert sum(seen["verified"] for seen in outcome.engines) > 0


def test_what_was_asked_for_in_an_earlier_wait_is_not_asked_for_again() -> None:
    sharing = Sharing.open(config("one", total=4 * PAGES, budget=4 * PAGES, floor=4))
    try:
        sharing._waits_since, sharing._asked_bytes = 0, 3 * PAGES * PAGE  # long over
        sharing._lease.want(20 * PAGE)
        for _ in range(3):  # the first is granted some, so that more may come
            sharing._get_ahead(Demand(capacity=4, used=4, kept=0, clock=0, short=16))
        assert sharing.expects
        charged = sharing._lease.held + sharing._lease.reserved
        assert charged < PAGES * PAGE, f"{charged // PAGE} pages"
    finally:
        sharing.close()


@pytest.mark.parametrize("short", [1, 60, 100])
def test_what_is_taken_ahead_of_need_stays_below_the_own_budget(short: int) -> None:
    """A part of it is the space's own share, the rest is borrowed; the card has more than both."""
    sharing = Sharing.open(config("one", total=4 * PAGES, budget=PAGES, floor=4))
    try:
        for wanted in (20, 40):
            sharing._lease.want(wanted * PAGE)
            sharing._get_ahead(Demand(capacity=4, used=4, kept=0, clock=0, short=short))
            charged = sharing._lease.held + sharing._lease.reserved
            assert charged <= PAGES * PAGE, f"{charged // PAGE} of {PAGES} pages"
    finally:
        sharing.close()
