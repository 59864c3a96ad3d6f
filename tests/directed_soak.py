"""Directors under one ledger, each beside its rank in a process; `sharing_soak` watches and kills.

    python tests/directed_soak.py [--seconds 60] [--engines 2] [--seed 1]

Steps are those of an engine: it looks at the room, enters units, has them written or read and
compared, and leaves them; now and then it makes no steps at all, and upkeep goes on by itself.
Some of the content has one of a few keys, and what another engine has under one of them is taken
from its host memory, and compared as well.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np

from tests import sharing_soak
from tests.directed_ranks import Ranks, ids
from tests.sharing_soak import FLOOR, GROUP, HOST_PAGES, PAGE, PAGES
from tiermem import Share
from tiermem.directed.director import NO_UNITS
from tiermem.directed.upkeep import Upkeep

UNITS = 300
KEYS = 60
PATIENCE_S = 10.0
"""So long a step waits for frames; what is within the floor is there long before."""
SHORT_S = 1.0
"""So long for more than that."""


class Steps:
    """One engine's steps, as a scheduler and its worker take them in one process."""

    def __init__(self, name: str, host_pages: int = 0, idle_s: float = 0.5) -> None:
        """host_pages: of one pool that all engines share; 0: each has a host tier of its own."""
        share = Share(
            group=GROUP, name=name, total=PAGES * PAGE, floor=FLOOR * PAGE, idle_s=idle_s,
            host=host_pages * PAGE or None,
        )  # fmt: skip
        self.ranks = Ranks(
            ranks=1, units=UNITS, page=PAGE, budget=PAGES, host=UNITS, share=share,
            scope=b"soak" if host_pages else None,
        )  # fmt: skip
        self._turns = self.ranks.ranks[0].turns
        self._upkeep = Upkeep(self.ranks.ranks[0])
        self.ranks.wake = self._upkeep.wake
        self.patience_s = PATIENCE_S
        self._upkeep.start(self.ranks.director)

    def take(self, write: Sequence[int] = (), read: Sequence[int] = ()) -> None:
        """A step with this work; what was looked at has not changed since."""
        self._turns.begin()
        self.ranks.step(write=ids(*write), read=ids(*read))
        self._turns.end()
        with self._turns.lock:
            self.ranks.hear()

    def until(self, ready: Callable[[], bool]) -> bool:
        """Steps without work until something is so; False if that takes long. A step has begun."""
        limit = time.monotonic() + self.patience_s
        while True:
            self._turns.begin()
            if ready():
                return True
            if time.monotonic() > limit:
                return False
            self.take()
            time.sleep(0.001)

    def has_room(self, units: int) -> bool:
        self.ranks.director.make_room(units)
        return self.ranks.director.room() >= units

    def write(self, units: list[int]) -> bool:
        """New content for units that nobody uses; False if there was no room."""
        if not self.until(lambda: self.has_room(len(units))):
            return False
        self.ranks.assign(*units)
        self.ranks.director.enter(ids(*units), "fresh")
        self.take(write=units)
        self.leave(units)
        return True

    def write_keyed(self, units: list[int], keys: list[int]) -> bool:
        """Content that these keys name, for units that nobody uses."""
        if not self.until(lambda: self.has_room(len(units))):
            return False
        self.ranks.model.update(zip(units, map(content, keys), strict=True))
        self.ranks.director.enter(ids(*units), "fresh")
        self.take(write=units)
        self._name(units, keys)
        self.leave(units)
        return True

    def adopt(self, unit: int, key: int) -> bool:
        """A unit that nobody uses gets the content of a key if another engine has it."""
        director, rank = self.ranks.director, self.ranks.ranks[0]
        named = np.array([[key, key]], np.uint64)

        def is_there() -> bool:
            return not len(director.find(named)) or self.has_room(1)

        if not self.until(is_there) or not len(director.find(named)):
            return False
        self.ranks.model.pop(unit, None)
        director.adopt(ids(unit), named, "one", parents=ids(-1), depths=ids(0))
        told: list[bool] = []

        def is_told() -> bool:
            with self._turns.lock:
                done, failed = rank.received()
            told.extend([not len(failed)] * ("one" in done))
            return bool(told)

        if not self.until(is_told):
            raise AssertionError(f"content does not come: {director.statistics()}")
        if told[0]:
            self.ranks.model[unit] = content(key)
            self.take(read=[unit])
            self._name([unit], [key])
        with self._turns.lock:
            director.leave(ids(unit), worthless=NO_UNITS if told[0] else ids(unit))
        return told[0]

    def _name(self, units: list[int], keys: list[int]) -> None:
        with self._turns.lock:
            self.ranks.director.label(ids(*units), np.array([keys, keys], np.uint64).T)

    def read(self, units: list[int]) -> int:
        """Fetch units and compare what they hold; how many, 0 if there was no room."""
        director, known = self.ranks.director, self.ranks.model
        fetched: list[int] = []

        def is_fetched() -> bool:
            fetched[:] = [unit for unit in units if unit in known]
            return self.has_room(len(fetched)) and director.fetch(ids(*fetched))

        if not self.until(is_fetched):
            return 0
        self.patience_s = PATIENCE_S
        if not self.until(lambda: bool(director.look(ids(*fetched)).here.all())):
            raise AssertionError(f"fetched units do not come: {director.statistics()}")
        self.take(read=fetched)
        self.leave(fetched)
        return len(fetched)

    def leave(self, units: list[int]) -> None:
        with self._turns.lock:
            self.ranks.director.leave(ids(*units), worthless=NO_UNITS)

    def check(self) -> None:
        with self._turns.lock:
            self.ranks.director.check()
        if self._upkeep.error is not None:
            raise self._upkeep.error

    def close(self) -> None:
        self._upkeep.close()
        self.ranks.close()


def engine(name: str, seed: int) -> None:
    """Run until standard input ends, then print what was seen."""
    os.set_blocking(0, False)
    rng = random.Random(seed)
    seen = {"wrong": 0, "verified": 0, "below_floor": 0, "refused": 0, "taken": 0, "missed": 0}
    steps = Steps(name, HOST_PAGES)
    print("ready", flush=True)
    while not (sharing_soak.is_told_to_end() and seen["verified"]):
        most = rng.choice((FLOOR - 1, 30, 100))
        for _ in range(rng.randrange(40)):
            n = rng.randint(1, most)
            steps.patience_s = PATIENCE_S if n < FLOOR else SHORT_S
            if rng.random() < 0.2:
                keys = rng.sample(range(1, KEYS), min(n, 20))
                done = steps.write_keyed(rng.sample(range(1, UNITS), len(keys)), keys)
            elif rng.random() < 0.4:
                taken = steps.adopt(rng.randrange(1, UNITS), rng.randrange(1, KEYS))
                seen["taken"] += taken
                done = True
            elif rng.random() < 0.4:
                done = steps.write(rng.sample(range(1, UNITS), n))
            else:
                there = sorted(steps.ranks.model)
                verified = steps.read(rng.sample(there, min(n, len(there))))
                seen["verified"] += verified
                done = bool(verified) or not there
            if not done:  # unit 0 is always in use
                seen["below_floor" if n < FLOOR else "refused"] += 1
        steps.check()
        if rng.random() < 0.4:
            time.sleep(2 * rng.random())
    seen["missed"] = steps.ranks.director.events().get("peers_missed", 0)
    steps.close()
    print(json.dumps(seen), flush=True)


def content(key: int) -> int:
    """What a key names: no number that `Ranks.assign` gives."""
    return (1 << 50) + key


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--engines", type=int, default=2)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--engine", help="be one engine of this name")
    given = parser.parse_args()
    if given.engine:
        engine(given.engine, given.seed)
        return
    outcome = sharing_soak.soak(given.seconds, given.engines, given.seed, program=__file__)
    sharing_soak.tell(outcome, given.seconds, given.engines, given.seed)
    sys.exit(bool(outcome.faults))


if __name__ == "__main__":
    main()
