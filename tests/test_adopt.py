"""A persisted slab under a space: written, named, closed or killed, opened again, adopted."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.waiting import until
from tiermem.assemble import assemble
from tiermem.config import Config, Gpu, Host, Nvme, Trace
from tiermem.errors import ConfigError, NotOurs, PageInUse, PageLost, TierFull
from tiermem.keyindex import Keys
from tiermem.nvme.cap import bytes_for
from tiermem.nvme.superblock import HEADER_BYTES
from tiermem.region import NEXT, Pages, Region
from tiermem.space import Space
from tiermem.tier import AT_GPU, AT_NONE, AT_NVME, Place

PAGE = 4096
FRAMES, SLOTS = 4, 64


def config(where: Path, *, host: int = 0, slots: int = SLOTS, **nvme: object) -> Config:
    given: dict[str, object] = {"persist": True, "high": 1.0, "low": 1.0, **nvme}
    return Config(
        gpu=Gpu(device="cpu", budget=FRAMES * PAGE, page=PAGE, high=1.0, low=1.0),
        host=Host(capacity=host * PAGE),
        nvme=Nvme(path=where, capacity=bytes_for(slots, PAGE), **given),  # type: ignore[arg-type]
    )


def keys_of(numbers: range | list[int]) -> Keys:
    return np.array([(n, 99) for n in numbers], np.uint64).reshape(-1, 2)


def words_of(key: int) -> np.ndarray:
    """The page that a key names."""
    return np.arange(PAGE // 8, dtype=np.uint64) * np.uint64(2 * key + 1)


def fill(region: Region, numbers: range | list[int]) -> Pages:
    """A labelled page for each number; those that do not fit on the GPU go down."""
    words = region.view(np.uint64)
    pages = []
    for number in numbers:
        page = int(region.allocate(1)[0])
        with region.use(page, "fresh"):
            words[page] = words_of(number)
            region.label([page], keys_of([number]))
        pages.append(page)
    return np.array(pages, np.int32)


def right(region: Region, pages: Pages, numbers: range | list[int]) -> bool:
    words = region.view(np.uint64)
    for page, number in zip(pages.tolist(), numbers, strict=True):
        with region.use(page):
            if not (words[page] == words_of(number)).all():
                return False
    return True


def leave(where: Path, numbers: range | list[int], tenant: int = 0, **given: object) -> None:
    """A run that writes these pages, with the GPU's last ones left behind on the GPU."""
    with Space.open(config(where, **given)) as space:  # type: ignore[arg-type]
        region = space.reserve(64 * PAGE, tenant=tenant)
        fill(region, numbers)
        space.drain()
        space.check()


@pytest.fixture
def where(tmp_path: Path) -> Path:
    return tmp_path / "slab"


@pytest.fixture
def reopen(where: Path) -> Iterator[Callable[..., Space]]:
    opened: list[Space] = []

    def one(**given: object) -> Space:
        opened.append(Space.open(config(where, **given)))  # type: ignore[arg-type]
        return opened[-1]

    yield one
    for space in opened:
        space.check()
        space.close()


# ---------------------------------------------------------------- a restarted process is warm


def test_pages_of_an_earlier_run_are_found_adopted_and_equal(
    where: Path, reopen: Callable[..., Space]
) -> None:
    leave(where, range(1, 25))
    space = reopen()
    places = space.find(keys_of(range(1, 30)))
    held = [n for n in range(1, 25) if places[n - 1] == AT_NVME]
    assert held == list(range(1, 25))
    assert (places[24:] == AT_NONE).all()
    region = space.reserve(64 * PAGE)
    pages = region.adopt(keys_of(range(1, 30)))
    assert (pages[24:] == -1).all()
    got = [n for n in range(1, 30) if pages[n - 1] >= 0]
    assert got == held
    assert (region.where(pages[pages >= 0]) == AT_NVME).all()
    assert right(region, pages[pages >= 0], got)
    assert space.statistics().counts["adopted"] == len(held)


def test_what_was_adopted_is_there_again_after_another_restart(where: Path) -> None:
    leave(where, range(1, 13))
    held: list[int] = []
    for _ in range(3):
        with Space.open(config(where)) as space:
            region = space.reserve(64 * PAGE)
            pages = region.adopt(keys_of(range(1, 13)))
            got = [n for n in range(1, 13) if pages[n - 1] >= 0]
            held = held or got
            assert got == held
            assert right(region, pages[pages >= 0], got)
            space.check()
    assert len(held) >= 8


def test_a_new_region_of_the_same_process_adopts_what_a_closed_one_left(
    reopen: Callable[..., Space],
) -> None:
    space = reopen()
    first = space.reserve(32 * PAGE)
    fill(first, range(1, 13))
    space.drain()
    first.close()
    second = space.reserve(32 * PAGE)
    pages = second.adopt(keys_of(range(1, 13)))
    got = [n for n in range(1, 13) if pages[n - 1] >= 0]
    assert len(got) >= 8
    assert right(second, pages[pages >= 0], got)


def test_pages_of_a_region_that_lives_are_found_and_not_adopted(
    reopen: Callable[..., Space],
) -> None:
    space = reopen()
    region = space.reserve(32 * PAGE)
    fill(region, range(1, 9))
    space.drain()
    assert (space.find(keys_of(range(1, 9))) != AT_NONE).all()
    assert (space.reserve(32 * PAGE).adopt(keys_of(range(1, 9))) == -1).all()


def test_without_persist_nothing_is_left_and_labels_still_work(where: Path) -> None:
    with Space.open(config(where, persist=False)) as space:
        region = space.reserve(32 * PAGE)
        fill(region, range(1, 9))
        assert (space.find(keys_of(range(1, 9))) != AT_NONE).all()
        region.close()
        assert (space.find(keys_of(range(1, 9))) == AT_NONE).all()
        assert (space.reserve(32 * PAGE).adopt(keys_of(range(1, 9))) == -1).all()
        space.check()
    assert not list(where.iterdir())


def test_a_page_is_not_adopted_by_another_tenant(where: Path, reopen: Callable[..., Space]) -> None:
    leave(where, range(1, 13), tenant=3)
    space = reopen()
    numbers = keys_of(range(1, 13))
    assert (space.find(numbers) == AT_NONE).all()
    assert (space.reserve(32 * PAGE, tenant=4).adopt(numbers) == -1).all()
    ours = space.reserve(32 * PAGE, tenant=3)
    pages = ours.adopt(numbers)
    assert (pages >= 0).sum() >= 8


def test_units_of_several_pages_come_back_whole(where: Path, reopen: Callable[..., Space]) -> None:
    with Space.open(config(where)) as space:
        region = space.reserve(32 * PAGE, unit_pages=2)
        words = region.view(np.uint64)
        for number in range(1, 9):
            page = int(region.allocate(2)[0])
            with region.use([page], "fresh"):
                words[page], words[page + 1] = words_of(number), words_of(1000 + number)
                region.label([page], keys_of([number]))
        space.drain()
    space = reopen()
    assert (space.reserve(32 * PAGE).adopt(keys_of([1])) >= 0).all()  # its first page alone
    region = space.reserve(32 * PAGE, unit_pages=2)
    words = region.view(np.uint64)
    pages = region.adopt(keys_of(range(1, 9)))
    assert pages[0] == -1
    assert (pages >= 0).sum() >= 4
    for number, page in zip(range(1, 9), pages.tolist(), strict=True):
        if page >= 0:
            with region.use([page]):
                assert (words[page] == words_of(number)).all()
                assert (words[page + 1] == words_of(1000 + number)).all()


# ---------------------------------------------------------------- what ends a name


def test_a_page_that_was_written_again_is_not_found_under_its_old_name(
    where: Path, reopen: Callable[..., Space]
) -> None:
    with Space.open(config(where)) as space:
        region = space.reserve(32 * PAGE)
        pages = fill(region, range(1, 13))
        space.drain()
        words = region.view(np.uint64)
        for page in pages.tolist():
            with region.use(page, "write"):
                words[page] = 5
        assert (space.find(keys_of(range(1, 13))) == AT_NONE).all()
        space.drain()
    space = reopen()
    region = space.reserve(32 * PAGE)
    # A slot that was left as it was still holds what its name says, and nothing else.
    adopted = region.adopt(keys_of(range(1, 13)))
    got = [n for n in range(1, 13) if adopted[n - 1] >= 0]
    assert right(region, adopted[adopted >= 0], got)


def test_an_adopted_page_that_is_written_is_an_ordinary_page(
    where: Path, reopen: Callable[..., Space]
) -> None:
    leave(where, range(1, 13))
    space = reopen()
    region = space.reserve(32 * PAGE)
    pages = region.adopt(keys_of(range(1, 13)))
    page = int(pages[pages >= 0][0])
    words = region.view(np.uint64)
    with region.use(page, "write"):
        words[page] += 1
    number = int(np.flatnonzero(pages == page)[0]) + 1
    assert space.find(keys_of([number])).tolist() == [AT_NONE]
    fill(region, range(100, 110))
    with region.use(page):
        assert (words[page] == words_of(number) + 1).all()


# ---------------------------------------------------------------- full tiers, refusals


def test_adopting_under_full_tiers_costs_other_content_and_no_bytes(
    where: Path, reopen: Callable[..., Space]
) -> None:
    leave(where, range(1, 31), slots=32)
    space = reopen(slots=32)
    region = space.reserve(64 * PAGE)
    gone: list[int] = []
    other = space.reserve(64 * PAGE, on_gone=lambda pages, _: gone.extend(pages.tolist()))
    mine = fill(other, range(200, 224))  # these push content out of the attic
    assert not gone, "pages of a region left although content of nobody was there"
    pages = region.adopt(keys_of(range(1, 31)))
    got = [n for n in range(1, 31) if pages[n - 1] >= 0]
    assert 0 < len(got) < 20
    assert right(region, pages[pages >= 0], got)
    refused = []  # a read takes a frame, and with every slot taken that may cost another page
    for page, number in zip(mine.tolist(), range(200, 224), strict=True):
        try:
            assert right(other, np.array([page]), [number])
        except NotOurs:
            refused.append(page)
    assert len(refused) < 8
    until(lambda: set(refused) <= set(gone))


def test_content_goes_oldest_first(where: Path, reopen: Callable[..., Space]) -> None:
    leave(where, range(1, 31), slots=32)
    space = reopen(slots=32)
    fill(space.reserve(64 * PAGE), range(200, 216))
    space.drain()
    held = np.flatnonzero(space.find(keys_of(range(1, 27))))
    assert 0 < len(held) < 26
    assert held.max() == 25
    # Stores that are under way at once have no order among themselves: one for each frame.
    assert held.min() >= 26 - len(held) - FRAMES


def test_a_region_without_room_adopts_nothing(where: Path, reopen: Callable[..., Space]) -> None:
    leave(where, range(1, 13))
    space = reopen()
    region = space.reserve(4 * PAGE)
    with pytest.raises(TierFull, match=r"8 units wanted, 4 of 4 are vacant"):
        region.adopt(keys_of(range(1, 9)))
    assert (space.find(keys_of(range(1, 9))) == AT_NVME).all()
    assert (region.adopt(keys_of(range(1, 5))) >= 0).all()


def test_pages_to_adopt_into_may_be_named(where: Path, reopen: Callable[..., Space]) -> None:
    leave(where, range(1, 13))
    space = reopen()
    region = space.reserve(16 * PAGE)
    pages = region.adopt(keys_of([900, 2, 1]), [3, 9, 5])
    assert pages.tolist() == [-1, 9, 5]
    assert right(region, pages[1:], [2, 1])
    with pytest.raises(NotOurs, match="not all of them vacant"):
        region.adopt(keys_of([3]), [9])
    assert len(region.allocate(2)) == 2
    region.free([9])
    assert region.adopt(keys_of([3]), [9]).tolist() == [9]
    with pytest.raises(ConfigError, match="1 units to adopt into, 2 keys"):
        region.adopt(keys_of([3, 4]), [12])


def test_the_policy_learns_parents_and_one_that_was_not_adopted_counts_as_none(
    where: Path, tmp_path: Path
) -> None:
    leave(where, range(1, 13))
    given, log = config(where), tmp_path / "events"
    traced = Config(gpu=given.gpu, host=given.host, nvme=given.nvme, trace=Trace(path=log))
    with Space.open(traced) as space:
        region = space.reserve(16 * PAGE)
        pages = region.adopt(keys_of([1, 900, 2, 3]), parents=[NEXT, NEXT, NEXT, -1])
        assert (pages >= 0).tolist() == [True, False, True, True]
    events = [json.loads(line) for line in log.read_text().splitlines()]
    told = [e for e in events if e.get("e") == "inserted" and e["tier"] == "nvme"]
    units = told[1]["units"]  # after those that the attic got
    assert told[1]["parents"] == [-1, units[2], -1]
    assert told[1]["keys"] == [1, 2, 3]


@pytest.mark.parametrize(
    "keys",
    [np.zeros((1, 2), np.uint64), np.ones(1, np.uint64), np.ones((1, 2), np.int64)],
    ids=["zero", "flat", "signed"],
)
def test_keys_that_name_nothing_are_refused(keys: Keys, reopen: Callable[..., Space]) -> None:
    region = reopen().reserve(4 * PAGE)
    with pytest.raises(ConfigError, match=r"uint64\[1, 2\] wanted"):
        region.adopt(keys)
    with pytest.raises(ConfigError, match=r"uint64\[1, 2\] wanted"):
        region.label(region.allocate(1), keys)


@pytest.mark.parametrize(
    ("model", "page", "says"),
    [("other", PAGE, "another model"), ("one", 2 * PAGE, "another page size")],
)
def test_a_slab_of_another_kind_is_refused_with_what_differs(
    where: Path, model: str, page: int, says: str
) -> None:
    Space.open(config(where), fingerprint={"model": "one"}).close()
    second = Config(
        gpu=Gpu(device="cpu", budget=FRAMES * page, page=page),
        host=Host(capacity=0),
        nvme=Nvme(path=where, capacity=bytes_for(SLOTS, page), persist=True),
    )
    with pytest.raises(ConfigError, match=says):
        Space.open(second, fingerprint={"model": model})
    Space.open(config(where), fingerprint={"model": "one"}).close()


def test_a_rank_has_a_slab_of_its_own(where: Path) -> None:
    with (
        Space.open(config(where), rank="rank0"),
        Space.open(config(where), rank="rank1"),
        pytest.raises(ConfigError, match="in use"),
    ):
        Space.open(config(where), rank="rank1")


# ---------------------------------------------------------------- damage


def test_a_slot_that_was_changed_on_disk_is_a_lost_page(
    where: Path, reopen: Callable[..., Space]
) -> None:
    leave(where, range(1, 13))
    file = where / "rank0.slab"
    with file.open("r+b") as slab:
        for slot in range(SLOTS):
            slab.seek(HEADER_BYTES + slot * PAGE + 100)
            slab.write(b"\x55")
    space = reopen()
    lost: list[int] = []
    region = space.reserve(32 * PAGE, on_gone=lambda pages, _: lost.extend(pages.tolist()))
    pages = region.adopt(keys_of(range(1, 9)))
    assert (pages >= 0).all()
    for page in pages.tolist():
        with pytest.raises(PageLost), region.use(page):
            pass
    until(lambda: sorted(lost) == sorted(pages.tolist()))
    assert space.statistics().counts["lost"] == 8
    assert (space.find(keys_of(range(1, 9))) == AT_NONE).all()
    words = region.view(np.uint64)
    with region.use(int(pages[0]), "fresh"):
        words[pages[0]] = words_of(1)
        region.label([int(pages[0])], keys_of([1]))
    assert space.find(keys_of([1])).tolist() == [AT_GPU]


WORK = """
import sys
from pathlib import Path
from tests.test_adopt import config, fill, keys_of
from tiermem.space import Space
space = Space.open(config(Path(sys.argv[1])))
region = space.reserve(128 * 4096)
number = int(sys.argv[2])
while True:
    fill(region, range(number, number + 8))  # the oldest pages are dropped and vacant again
    number += 8
    print(space.statistics().counts.get("recorded", 0), flush=True)
"""


def test_after_kills_every_adopted_page_verifies_or_is_a_miss(where: Path) -> None:
    found = 0
    path = os.pathsep.join([os.getcwd(), *filter(None, [os.environ.get("PYTHONPATH")])])
    for round_ in range(5):
        first = 1 + 10_000 * round_
        command = [sys.executable, "-c", WORK, str(where), str(first)]
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": path}
        ) as child:
            assert child.stdout is not None
            while int(child.stdout.readline()) < 100 * (1 + round_):
                pass
            child.send_signal(signal.SIGKILL)
        last = first + 10_000
        with Space.open(config(where)) as space:
            region = space.reserve(64 * PAGE)
            keys = keys_of(range(first, last))
            held = np.flatnonzero(space.find(keys))
            pages = region.adopt(keys[held])
            assert (pages >= 0).all()
            for index, page in zip(held.tolist(), pages.tolist(), strict=True):
                try:
                    assert right(region, np.array([page]), [first + index])
                except PageLost:
                    continue
                found += 1
            space.check()
    assert found > 20


# ---------------------------------------------------------------- the section, in force


def test_the_capacity_counts_metadata_and_is_never_exceeded(where: Path) -> None:
    cap = 1 << 20
    given = config(where)
    given = Config(
        gpu=given.gpu, host=given.host, nvme=Nvme(path=where, capacity=cap, persist=True)
    )
    with Space.open(given) as space:
        slots = space.statistics().tier(Place.NVME).configured
        assert bytes_for(slots, PAGE) <= cap < bytes_for(slots + 1, PAGE)
        region = space.reserve(2 * slots * PAGE)
        fill(region, range(1, slots))
        held = sum(file.stat().st_blocks * 512 for file in where.iterdir())
        assert held <= cap


def test_a_capacity_below_one_page_and_its_metadata_is_refused(where: Path) -> None:
    given = config(where)
    small = Nvme(path=where, capacity=20 * PAGE)
    with pytest.raises(ConfigError, match=r"nvme\.capacity = .*at least"):
        Space.open(Config(gpu=given.gpu, host=given.host, nvme=small))


def test_what_our_own_slab_holds_counts_as_room_for_it(where: Path) -> None:
    from tiermem import drive

    Space.open(config(where)).close()
    held = sum(file.stat().st_blocks * 512 for file in where.iterdir())
    with_ours, without = drive.room(config(where)), drive.room(config(where, persist=False))
    assert held > 0
    assert with_ours - without == pytest.approx(held, abs=16 << 20)  # others use the disk too


def test_the_slab_gets_the_write_budget_and_the_rank(where: Path) -> None:
    parts = assemble(config(where, write_budget=7 << 20))
    assert parts.slab is not None
    assert parts.slab.budget.bytes_per_s == 7 << 20
    parts.close()
    assert (where / "rank0.slab").exists()


def test_the_write_budget_changes_while_pages_are_written(
    where: Path, reopen: Callable[..., Space]
) -> None:
    space = reopen(write_budget=64 << 20)
    region = space.reserve(64 * PAGE)
    fill(region, range(1, 9))
    changed = space.apply(config(where, write_budget=32 << 20))
    assert changed == ("nvme.write_budget",)
    fill(region, range(9, 17))
    assert space.apply(config(where, write_budget=None)) == ("nvme.write_budget",)
    fill(region, range(17, 25))


@pytest.mark.parametrize("own_file", [False, True])
def test_an_encrypted_slab_is_warm_under_its_key_only(
    where: Path, tmp_path: Path, own_file: bool
) -> None:
    pytest.importorskip("cryptography")
    more: dict[str, Any] = {"key_file": tmp_path / "key"} if own_file else {}
    leave(where, range(1, 13), encrypt=True, **more)
    plain = (where / "rank0.slab").read_bytes()
    assert not any(words_of(n).tobytes()[8:64] in plain for n in range(1, 13))
    with Space.open(config(where, encrypt=True, **more)) as space:
        region = space.reserve(32 * PAGE)
        pages = region.adopt(keys_of(range(1, 9)))
        assert right(region, pages, range(1, 9))
        routes = space.statistics().routes
        assert any("AES-256-GCM" in route.path for route in routes if route.src == Place.NVME)
    key = tmp_path / "key" if own_file else where / "rank0.key"
    key.unlink()
    with pytest.raises(ConfigError, match="another key"):
        Space.open(config(where, encrypt=True, **more))
    with pytest.raises(ConfigError, match="another cipher"):
        Space.open(config(where))


def test_a_mode_that_cannot_be_had_is_refused_with_the_reason(where: Path) -> None:
    with pytest.raises(ConfigError, match=r"nvme\.mode = kvikio: .*use auto or posix"):
        Space.open(config(where, mode="kvikio"))


def test_pages_that_are_shelved_leave_their_content_on_the_drive(
    reopen: Callable[..., Space],
) -> None:
    space = reopen()
    region = space.reserve(64 * PAGE)
    pages = fill(region, range(1, 25))
    space.drain()
    places = region.where(pages)
    region.shelve(pages)
    space.drain()
    assert (region.where(pages) == AT_NONE).all()
    found = region.adopt(keys_of(range(1, 25)))
    back = np.flatnonzero(found >= 0)
    assert (places[back] != AT_NONE).all()
    assert set(np.flatnonzero(places == AT_NVME)) <= set(back)
    assert len(back) >= 20  # the others were on the GPU alone
    assert right(region, found[back], [int(n) + 1 for n in back])


def test_pages_that_are_pinned_are_not_shelved(reopen: Callable[..., Space]) -> None:
    space = reopen()
    region = space.reserve(64 * PAGE)
    pages = fill(region, range(1, 9))
    with region.use(pages[:1]):
        with pytest.raises(PageInUse):
            region.shelve(pages)
        space.drain()
        assert (region.where(pages) != AT_NONE).all()
    with pytest.raises(NotOurs):
        region.shelve([60])
