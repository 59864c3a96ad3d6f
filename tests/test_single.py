"""A verb's short way for one page leaves exactly the state that its long way leaves."""

from __future__ import annotations

from dataclasses import fields
from random import Random

import numpy as np
import pytest

from tests.harness import Harness
from tiermem.errors import TierMemError
from tiermem.plan import Copy, Hide, Plan, Request, Show, Step
from tiermem.planner import Access, Planner
from tiermem.table import Rows
from tiermem.tier import TIERS, Place

ACCESSES: tuple[Access, ...] = ("read", "write", "fresh")
COLUMNS = (
    "at", "to", "shown", "flags", "busy", "waiters", "pins", "reads", "gen", "fence", "move",
    "stamp", "parent", "depth",
)  # fmt: skip


class LongWay(Planner):
    """Declines every short way."""

    def _load_one(self, rows: Rows, request: Request, order: bool, now: int) -> bool:
        return False

    def _load_bare(self, rows: Rows, request: Request, order: bool) -> bool:
        return False

    def _land_one(self, step: Copy, plan_id: int, now: int) -> bool:
        return False

    def _allocate_one(self, rows: Rows, request: Request) -> bool:
        return False

    def _land_blank_one(self, step: Show, plan_id: int) -> bool:
        return False

    def _free_one(self, rows: Rows, now: int) -> list[Plan] | None:
        return None

    def _land_hidden_one(self, step: Hide) -> bool:
        return False

    def _touch_one(self, rows: Rows, now: int) -> None:
        self._touch(rows, now)

    def _unpin_one(self, rows: Rows, tick: tuple[int, int] | None) -> None:
        self._unpin(rows, tick)


class Taken(Planner):
    """Counts how often each short way was taken."""

    def _are_available(self, n: int, spare_us: Rows) -> bool:
        answer = super()._are_available(n, spare_us)
        assert answer is (self._available(spare_us) >= n)
        return answer

    def _load_one(self, rows: Rows, request: Request, order: bool, now: int) -> bool:
        retired = self.counts["taken_back"], self.counts["stolen"]
        taken = super()._load_one(rows, request, order, now)
        if taken:
            back, stolen = self.counts["taken_back"], self.counts["stolen"]
            which = "returned" if back > retired[0] else "stole" if stolen > retired[1] else "free"
            SHORT[which] = SHORT.get(which, 0) + 1
        return taken

    def _load_bare(self, rows: Rows, request: Request, order: bool) -> bool:
        taken = super()._load_bare(rows, request, order)
        if taken:
            SHORT["bare"] = SHORT.get("bare", 0) + 1
        return taken


SHORT: dict[str, int] = {}


class Logged(Harness):
    """Keeps what was planned, as text."""

    def __init__(self, planner: type[Planner], eager: bool, in_order: bool) -> None:
        self.log: list[str] = []
        super().__init__(
            gpu=4, host=5, nvme=7, regions=((16, 1, 0), (5, 1, 1)), eager=eager,
            in_order=in_order, planner=planner,
        )  # fmt: skip

    def carry(self, plans: list[Plan]) -> None:
        self.log += [f"{plan.id}: {[told(step) for step in plan.steps]}" for plan in plans]
        super().carry(plans)


def told(step: Step) -> str:
    parts = [(f.name, getattr(step, f.name)) for f in fields(step)]
    shown = [(n, p.tolist() if isinstance(p, np.ndarray) else str(p)) for n, p in parts]
    return f"{type(step).__name__}({shown})"


def state(h: Harness) -> dict[str, object]:
    """Everything that the planner keeps of pages, slots and order."""
    found: dict[str, object] = {name: getattr(h.table, name).tolist() for name in COLUMNS}
    for place in TIERS:
        pool = h.pools[place]
        found[f"slot {place}"] = h.table.slot(place).tolist()
        found[f"pool {place}"] = (pool.owner.tolist(), pool.tenant.tolist(), pool.used)
        found[f"kept {place}"] = pool.oldest_kept().tolist()
        found[f"ranked {place}"] = h.planner.rankings[place].victims(99, h.now).tolist()
    found["counts"] = +h.planner.counts
    return found


def act(h: Logged, random: Random) -> None:
    """One step of an engine, its drive or its mover."""
    verb = random.randrange(9)
    alive = sorted(h.alive)
    n = 1 if random.random() < 0.7 else random.randint(1, 3)
    some = random.sample(alive, min(n, len(alive)))
    stream = random.choice((None, 0, 1))
    if verb <= 1:
        vacant = sorted(h.vacant)
        if vacant:
            h.allocate(random.sample(vacant, min(n, len(vacant))))
    elif verb == 2 and some:
        idle = [row for row in some if not h.table.pins[row] and not h.table.waiters[row]]
        if idle:
            h.free(np.array(idle, np.int32))
    elif verb <= 4 and some:
        h.use(some, random.choice(ACCESSES), stream)
    elif verb == 5 and some:
        read_behind_a_load(h, some, stream or 0)
    elif verb == 6 and some:
        h.carry(h.planner.demote(np.array(some, np.int32), h.now))
    elif verb == 7:
        h.world.streams.advance(random.randrange(2), random.randint(1, 3))
        h.planner.limits[Place.GPU] = random.choice((4, 4, 3))
        h.carry(h.planner.relieve(h.now))
    for _ in range(random.randint(0, 3)):
        h.step()


def read_behind_a_load(h: Logged, units: list[int], stream: int) -> None:
    """What `Pager.use` does for a reader with a stream."""
    try:
        request = h.begin(units, "read", order=True)
    except TierMemError:
        return
    if not request.taken:
        return
    if request.pending and not h.order(request, stream):
        while request.pending:
            h.advance_for(request)
    if request.failed:
        h.planner.abandon(request)
        return
    h.launch(request.rows, stream, write=False)
    h.leave(request, stream)


@pytest.mark.parametrize("in_order", [False, True])
@pytest.mark.parametrize("eager", [False, True])
def test_one_page_goes_the_short_way_to_the_same_state(eager: bool, in_order: bool) -> None:
    SHORT.clear()
    for seed in range(12):
        short, long = (Logged(way, eager, in_order) for way in (Taken, LongWay))
        for turn in range(150):
            for h in (short, long):
                act(h, Random(1000 * seed + turn))
            assert short.log == long.log
            assert state(short) == state(long), f"seed {seed}, turn {turn}"
        for h in (short, long):
            h.drain()
            h.planner.check()
        assert state(short) == state(long)
    assert set(SHORT) == ({"free", "bare"} if eager else {"free", "returned", "stole", "bare"})
