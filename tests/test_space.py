"""Spaces end to end on the CPU device: limits, live changes, the log, closing, bad input."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

import msgspec
import numpy as np
import pytest

from tests.test_region import PAGE, config, filled, verify, write
from tests.waiting import until
from tiermem.config import Config, Evict, Gpu, Host, Nvme, Trace, load
from tiermem.errors import BadPolicy, Closed, ConfigError, NotOurs, PageInUse, TierFull
from tiermem.host import limits
from tiermem.policies import registry
from tiermem.policies.base import Ids
from tiermem.space import Space
from tiermem.tier import Place


def wait_for(space: Space, frames: int) -> None:
    """Until the GPU tier has so many slots; the mover gives them back in the background."""
    reached = threading.Event()
    for _ in range(2000):
        space.drain()
        if space.statistics().tier(Place.GPU).capacity == frames:
            return
        reached.wait(0.01)  # the mover's turn
    raise AssertionError(f"the limit of {frames} pages is not reached")


# ---------------------------------------------------------------- limits and live changes


def test_a_lower_limit_gives_memory_back_and_a_higher_one_takes_it_again(tmp_path: Path) -> None:
    with Space.open(config(tmp_path, gpu=8)) as space:
        region = space.reserve(40 * PAGE)
        pages = filled(region, 8)
        space.limit(3 * PAGE)
        wait_for(space, 3)
        assert space.statistics().tier(Place.GPU).used <= 3
        verify(region, pages)
        assert space.statistics().tier(Place.GPU).used <= 3
        with pytest.raises(TierFull), region.use(pages[:4]):
            pass
        space.limit(8 * PAGE)
        wait_for(space, 8)
        with region.use(pages):
            pass
        space.check()


def test_a_lower_limit_waits_until_nobody_counts_on_more(tmp_path: Path) -> None:
    with Space.open(config(tmp_path, gpu=8)) as space:
        region = space.reserve(40 * PAGE)
        pages = filled(region, 8)
        space.count_on(6)
        space.limit(3 * PAGE)
        assert space.budget() == 3
        wait_for(space, 6)
        with region.use(pages[:6]):
            pass
        space.count_on(space.budget())
        wait_for(space, 3)
        with pytest.raises(TierFull), region.use(pages[:4]):
            pass
        space.count_on(8)  # more than there is: nothing is taken back for it
        verify(region, pages)
        assert space.statistics().tier(Place.GPU).capacity == 3
        space.check()


def test_a_limit_below_what_is_pinned_is_reached_once_the_pins_are_gone(tmp_path: Path) -> None:
    with Space.open(config(tmp_path, gpu=8)) as space:
        region = space.reserve(40 * PAGE)
        pages = filled(region, 8)
        with region.use(pages[:6]):
            space.limit(2 * PAGE)
            space.drain()
            assert space.statistics().tier(Place.GPU).capacity >= 6
            assert (region.where(pages[:6]) == Place.GPU).all()
        wait_for(space, 2)
        verify(region, pages)
        space.check()


@pytest.mark.parametrize("limit", [0, PAGE - 1, 9 * PAGE, "1TiB"])
def test_a_limit_that_cannot_be_is_refused_with_the_range(tmp_path: Path, limit: int | str) -> None:
    refusal = pytest.raises(ConfigError, match=f"pages of {PAGE}; 1 to 8 can be")
    with Space.open(config(tmp_path, gpu=8)) as space, refusal:
        space.limit(limit)


def test_policies_and_marks_change_while_running_and_a_bad_one_changes_nothing(
    tmp_path: Path,
) -> None:
    given = config(tmp_path)
    with Space.open(given) as space:
        region = space.reserve(40 * PAGE)
        pages = filled(region, 12)
        changed = msgspec.structs.replace(given, evict=Evict(gpu="fifo", host="clock"))
        assert "evict.host" in space.apply(changed)
        assert space.statistics().tier(Place.HOST).policy == "clock"
        verify(region, pages)
        bad = msgspec.structs.replace(changed, evict=Evict(gpu="lry", host="lru"))
        with pytest.raises(BadPolicy, match="lru"):
            space.apply(bad)
        fixed = msgspec.structs.replace(changed, host=Host(capacity=64 * PAGE))
        with pytest.raises(ConfigError, match=r"host\.capacity.*cannot change while"):
            space.apply(fixed)
        assert space.config is changed
        assert space.statistics().tier(Place.HOST).policy == "clock"
        verify(region, pages)
        space.check()


def test_marks_keep_frames_free_ahead_of_need(tmp_path: Path) -> None:
    given = msgspec.structs.replace(
        config(tmp_path, gpu=10),
        gpu=Gpu(device="cpu", budget=10 * PAGE, page=PAGE, high=0.8, low=0.5),
    )
    with Space.open(given) as space:
        region = space.reserve(20 * PAGE)
        filled(region, 9)
        until(lambda: space.statistics().tier(Place.GPU).used <= 8)  # the mover's turn
        space.check()


def test_a_headroom_below_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="headroom -1"):
        Space.open(config(tmp_path), headroom=-1)


def test_headroom_keeps_frames_free_whatever_the_marks(tmp_path: Path) -> None:
    with Space.open(config(tmp_path, gpu=10), headroom=4) as space:
        region = space.reserve(20 * PAGE)
        pages = filled(region, 9)
        until(lambda: space.statistics().tier(Place.GPU).used == 6)  # the mover's turn
        verify(region, pages)
        space.check()


# ---------------------------------------------------------------- statistics and the log


def test_statistics_count_what_moved_and_do_not_change_afterwards(tmp_path: Path) -> None:
    with Space.open(config(tmp_path)) as space:
        region = space.reserve(40 * PAGE)
        before = space.statistics()
        pages = filled(region, 12)
        verify(region, pages)
        after = space.statistics()
        assert before.tier(Place.GPU).used == 0
        assert sum(r.pages for r in before.routes) == 0
        assert after.page_bytes == PAGE
        assert after.pages == 40
        assert sum(r.nbytes for r in after.routes) == PAGE * sum(r.pages for r in after.routes)
        assert after.fault.n > 0
        assert 0 < after.fault.p50_s <= after.fault.p99_s
        for tier in after.tiers:
            assert tier.used + tier.kept + tier.free == tier.capacity <= tier.configured
            assert tier.bytes_used == tier.used * PAGE
        for route in after.routes:
            assert route.path
            assert route.failed == 0
            assert (route.gbps > 0) == (route.pages > 0)
        with pytest.raises(AttributeError):
            after.pages = 1  # type: ignore[misc]


def test_the_event_log_replays_to_the_same_victims(tmp_path: Path) -> None:
    log = tmp_path / "events.jsonl"
    given = msgspec.structs.replace(
        config(tmp_path), trace=Trace(path=log), evict=Evict(gpu="lru", host="fifo", nvme="lru")
    )
    with Space.open(given) as space:
        region = space.reserve(40 * PAGE)
        pages = filled(region, 14)
        verify(region, pages[::-1])
        region.free(pages[:3])
    header, *events = [msgspec.json.decode(line) for line in log.read_bytes().splitlines()]
    assert header["schema"] == "tiermem.log.v1"
    assert header["tiers"]["host"]["policy"] == "fifo"
    assert header["tiers"]["host"]["capacity"] == 4
    assert {e["e"] for e in events} >= {"inserted", "accessed", "victims", "removed"}
    assert replay(header, events) > 10


def replay(header: dict[str, dict[str, dict[str, object]]], events: list[dict[str, object]]) -> int:
    """Ask fresh policies again; how many questions were answered as before."""
    policies = {
        name: registry.load(str(tier["policy"]), int(str(tier["capacity"])))
        for name, tier in header["tiers"].items()
    }
    held: dict[str, set[int]] = {name: set() for name in policies}
    same = 0
    for event in events:
        tier = str(event["tier"])
        policy, now = policies[tier], int(str(event["now"]))
        units = np.array(event["units"], np.int32)
        if event["e"] == "inserted":
            links = [np.array(event[k], np.int32) for k in ("parents", "depths")]
            policy.inserted(units, links[0], links[1], None, now)
            held[tier] |= set(units.tolist())
        elif event["e"] == "accessed":
            policy.accessed(units, now)
        elif event["e"] == "removed":
            policy.removed(units, now)
            held[tier] -= set(units.tolist())
        elif event["e"] == "victims":
            refused = {int(u) for u in event["refused"]}  # type: ignore[attr-defined]
            candidates = Refusing(held[tier], refused)
            answer = policy.victims(candidates, int(str(event["n"])), now)
            assert answer.tolist() == units.tolist()
            same += 1
    return same


class Refusing:
    """The candidates as they were: all that the tier held, but those that were refused."""

    def __init__(self, held: set[int], refused: set[int]) -> None:
        self._may = held - refused

    def keep(self, units: Ids) -> np.ndarray:
        return np.array([u in self._may for u in units.tolist()], np.bool_)

    def all(self) -> Ids:
        return np.array(sorted(self._may), np.int32)


# ---------------------------------------------------------------- closing


def test_a_closed_space_refuses_everything_and_closes_twice(tmp_path: Path) -> None:
    space = Space.open(config(tmp_path))
    region = space.reserve(8 * PAGE)
    pages = filled(region, 6)
    space.close()
    space.close()
    with pytest.raises(Closed):
        space.reserve(PAGE)
    with pytest.raises(Closed):
        region.allocate(1)
    with pytest.raises(Closed), region.use(pages):
        pass
    region.close()


def test_a_space_with_pinned_pages_does_not_close_and_goes_on(tmp_path: Path) -> None:
    """Once it was half closed for ever after: no mover, and a second close did nothing."""
    space = Space.open(config(tmp_path))
    idle, region = space.reserve(8 * PAGE, name="idle"), space.reserve(8 * PAGE, name="used")
    pages = filled(region, 6)
    with region.use(pages[:2]):
        with pytest.raises(PageInUse, match="region used: 2 pages are pinned"):
            space.close()
        verify(region, pages)
        assert len(idle.allocate(1)) == 1
        assert space.reserve(PAGE).pages == 1
    verify(region, pages)
    space.close()
    with pytest.raises(Closed):
        idle.allocate(1)


def test_a_space_gives_everything_back(tmp_path: Path) -> None:
    fds = len(os.listdir("/proc/self/fd"))
    threads = threading.active_count()
    for _ in range(3):
        with Space.open(config(tmp_path)) as space:
            filled(space.reserve(40 * PAGE), 12)
    assert len(os.listdir("/proc/self/fd")) <= fds + 1
    assert threading.active_count() == threads


# ---------------------------------------------------------------- bad input, end to end


def test_a_misspelt_key_names_the_nearest_one_and_the_line(tmp_path: Path) -> None:
    file = tmp_path / "tiermem.toml"
    file.write_text('[gpu]\nbudget = "1MiB"\npgae = "64KiB"\n')
    with pytest.raises(ConfigError, match=r"tiermem\.toml:3.*pgae.*page"):
        Space.open(load(file))


def test_a_directory_without_write_permission_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: object, *arguments: object, **named: object) -> int:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(ConfigError, match=r"slab.*[Pp]ermission denied"):
        Space.open(config(tmp_path))


def test_a_full_disk_is_tier_full_with_the_numbers(tmp_path: Path) -> None:
    free = os.statvfs(tmp_path).f_bavail * os.statvfs(tmp_path).f_frsize
    given = Config(
        gpu=Gpu(device="cpu", budget=4 * PAGE, page=PAGE),
        host=Host(capacity=4 * PAGE),
        nvme=Nvme(path=tmp_path / "slab", capacity=2 * free),
    )
    with pytest.raises((ConfigError, TierFull), match=r"nvme.*\d+"):
        Space.open(given)
    assert not any(p.is_file() for p in tmp_path.rglob("*"))


def test_a_host_pool_over_the_limit_of_this_process_is_refused(tmp_path: Path) -> None:
    over = 2 * limits.available_bytes() + (1 << 30)
    given = Config(gpu=Gpu(device="cpu", budget=4 * PAGE, page=PAGE), host=Host(capacity=over))
    with pytest.raises(ConfigError, match=r"host\.capacity.*\d+"):
        Space.open(given)


@pytest.mark.parametrize(
    ("nbytes", "unit_pages"), [(0, 1), (-1, 1), (PAGE, 0)], ids=["nothing", "negative", "no unit"]
)
def test_a_region_of_nothing_is_refused(tmp_path: Path, nbytes: int, unit_pages: int) -> None:
    with Space.open(config(tmp_path)) as space, pytest.raises(ConfigError):
        space.reserve(nbytes, unit_pages=unit_pages)


def test_pages_of_one_region_mean_nothing_in_another(tmp_path: Path) -> None:
    with Space.open(config(tmp_path)) as space:
        small, large = space.reserve(4 * PAGE, name="small"), space.reserve(8 * PAGE)
        pages = filled(large, 8)
        with pytest.raises(NotOurs, match=r"region small has pages 0\.\.3"):
            small.use(pages)
        with pytest.raises(NotOurs):
            small.free(pages[:1] % 4)
        verify(large, pages)


def test_many_threads_allocate_each_page_once(tmp_path: Path) -> None:
    with Space.open(config(tmp_path, gpu=16, host=16)) as space:
        region = space.reserve(24 * PAGE)
        taken: list[int] = []
        lock = threading.Lock()

        def work() -> None:
            for _ in range(3):
                page = region.allocate(1)
                write(region, page)
                with lock:
                    taken.append(int(page[0]))

        threads = [threading.Thread(target=work) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(taken) == list(range(24))
        verify(region, np.array(taken, np.int32))
        space.check()
