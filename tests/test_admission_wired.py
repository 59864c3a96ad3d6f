"""The planner asks before it writes to NVMe; what is refused leaves, and its owner is told."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
import pytest

from tests.harness import Harness
from tiermem import Config, Gpu, Host, Nvme, Space
from tiermem.books import Marks
from tiermem.plan import Copy
from tiermem.policies.admission import Budgeted, SecondTouch, admission
from tiermem.policies.base import Admission
from tiermem.tier import Done, Place

PAGE = 64 << 10


def pressed(rule: Admission | None, twice: int, host: int = 2) -> Harness:
    """Ten pages through 2 frames and the host's slots; the first `twice` were used once more."""
    harness = Harness(gpu=2, host=host, nvme=10)
    harness.planner.admission = rule
    for unit in range(10):
        assert harness.allocate([unit])
        assert harness.use([unit], "write")
        if unit < twice:
            assert harness.use([unit], "read")
    harness.drain()
    harness.check_idle()
    return harness


def test_without_a_rule_everything_is_written() -> None:
    harness = pressed(None, 0)
    assert harness.gone == []
    assert harness.planner.counts["not_admitted"] == 0


@pytest.mark.parametrize("host", [0, 2])
def test_what_was_used_once_leaves_and_what_was_used_twice_is_written(host: int) -> None:
    harness = pressed(SecondTouch(), twice=4, host=host)
    assert {reason for _, reason in harness.gone} == {"not-admitted"}
    assert not {row for row, _ in harness.gone} & set(range(4))
    assert (harness.table.at[:4] == Place.NVME).all()
    assert harness.planner.counts["not_admitted"] >= len(harness.gone) > 0


def test_a_budget_bounds_what_is_written() -> None:
    rule = Budgeted(admission("all"), bytes_per_s=1e-3, unit_bytes=PAGE)
    harness = pressed(rule, 0)
    assert int((harness.table.at == Place.NVME).sum()) == 1  # a bucket holds one unit at least
    assert rule.refused > 0


def test_a_unit_that_was_admitted_is_not_charged_again_while_it_waits_for_a_slot() -> None:
    harness = Harness(gpu=2, host=2, nvme=10)
    asked: list[int] = []

    class Counting(SecondTouch):
        def admit(self, units: np.ndarray, now: int) -> np.ndarray:
            asked.extend(units.tolist())
            return np.ones(len(units), np.bool_)

    harness.planner.admission = Counting()
    for unit in range(8):
        assert harness.allocate([unit])
        assert harness.use([unit], "write")
    harness.drain()
    harness.check_idle()
    assert sorted(asked) == sorted(set(asked))
    assert asked


def test_content_that_was_freed_has_its_uses_forgotten() -> None:
    harness = pressed(SecondTouch(), twice=10)
    rule = harness.planner.admission
    assert rule is not None
    rows = np.flatnonzero(harness.table.at == Place.NVME)[:1].astype(np.int32)
    assert rule.admit(rows, 99).all()
    harness.free(rows)
    harness.drain()
    assert not rule.admit(rows, 99).any()


def test_a_space_admits_as_configured_and_may_be_told_otherwise(tmp_path: Path) -> None:
    def config(admit: Literal["all", "second"]) -> Config:
        return Config(
            gpu=Gpu(device="cpu", page=PAGE, budget=2 * PAGE),
            host=Host(capacity=2 * PAGE),
            nvme=Nvme(path=tmp_path / "slab", capacity="2MiB", mode="posix", admit=admit),
        )

    gone: list[str] = []
    with Space.open(config("second")) as space:
        region = space.reserve(64 * PAGE, on_gone=lambda pages, reason: gone.append(reason))
        for _ in range(12):
            region.allocate(1)
        space.drain()
        assert set(gone) == {"not-admitted"}
        assert space.apply(config("all")) == ("nvme.admit",)
        refused = space.statistics().counts["not_admitted"]  # upkeep makes room until then
        assert refused > 0
        for _ in range(4):
            region.allocate(1)
        space.drain()
        assert space.statistics().counts["not_admitted"] == refused
        space.check()


def make_room(harness: Harness) -> None:
    """Turns of an engine in which everything ends but writes to the drive."""
    for _ in range(6):
        harness.carry(harness.planner.relieve(harness.now))
        harness.settle_ready()
        while quick := [done for done in harness.world.pending if done not in stores(harness)]:
            harness.world.end(quick[0])
            harness.settle_ready()


def ask_for(harness: Harness, frames: int) -> None:
    """Turns of an engine that needs frames: half of the host leaves, half of the GPU follows."""
    for _ in range(4):
        harness.carry(harness.planner.make_room(frames, harness.now))
        make_room(harness)


def comes(harness: Harness, unit: int) -> bool:
    """A new unit, if it can be had at once."""
    request = harness.planner.allocate(np.array([unit], np.int32), harness.now)
    harness.carry(request.plans)
    if request.taken:
        harness.vacant.remove(unit)
        harness.alive.add(unit)
    return request.taken


def stores(harness: Harness) -> list[Done]:
    return [
        done
        for flight in harness.flights.values()
        for step, done in zip(flight.plan.steps, flight._dones, strict=True)
        if isinstance(step, Copy) and step.dst == Place.NVME
    ]


@pytest.mark.parametrize("host", [0, 4])
@pytest.mark.parametrize("backlog", [None, 2])
def test_what_a_drive_that_is_behind_cannot_take_leaves_and_nobody_waits(
    host: int, backlog: int | None
) -> None:
    harness = Harness(gpu=8, host=host, nvme=18, in_order=True, marks=Marks(0.5, 0.25))
    planner = harness.planner
    planner.backlog = backlog
    came = 0
    for unit in range(18):
        make_room(harness)
        assert backlog is None or len(stores(harness)) <= backlog
        if not comes(harness, unit):
            break
        came += 1
    assert (came == 18) is (backlog is not None)
    harness.drain()
    planner.check()
    gone = {reason for _, reason in harness.gone}
    assert gone == ({"not-admitted"} if backlog else set())
    assert (planner.counts["outpaced"] > 0) is (backlog is not None)
    assert (harness.table.at[:18] == Place.NVME).any(), "the drive takes what it can"


def filled(units: int) -> Harness:
    """So many units one after another, with a drive that ends no write and takes four at most."""
    harness = Harness(gpu=8, host=8, nvme=32, regions=((32, 1, 0),), in_order=True)
    harness.planner.backlog = 4
    for unit in range(units):
        ask_for(harness, 1)
        assert comes(harness, unit)
    return harness


def test_frames_for_a_whole_prompt_wait_for_none_of_what_the_drive_has_to_write() -> None:
    """What is on its way from the host to a drive that is behind is no room that comes soon."""
    harness = filled(units=24)
    planner = harness.planner
    assert planner._storing() == 4, "the drive is behind"
    ask_for(harness, 8)
    assert planner.ready() == 8
    assert planner._storing() == 4
    harness.drain()
    planner.check()


def test_what_leaves_ahead_of_need_is_given_the_time_that_the_drive_takes() -> None:
    harness = filled(units=16)
    planner = harness.planner
    assert not harness.gone
    planner.marks[Place.GPU] = Marks(0.5, 0.25)
    make_room(harness)
    assert planner._storing() == 4
    assert len(harness.gone) == 2, "six should leave, and four can"
    harness.drain()
    planner.check()


def test_units_that_host_memory_can_never_hold_go_straight_to_the_drive() -> None:
    harness = Harness(gpu=8, host=1, nvme=12, regions=((12, 2, 0),), in_order=True)
    harness.planner.marks[Place.GPU] = Marks(0.5, 0.25)
    harness.planner.backlog = 4
    for unit in range(0, 12, 2):
        assert harness.allocate([unit])
        harness.carry(harness.planner.relieve(harness.now))
        harness.drain()
    assert not harness.gone
    assert (harness.table.at[:12] == Place.NVME).sum() >= 6
