"""What travels between a director and its ranks: numbers and arrays, so that all of it pickles."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from tiermem.attic import Stored
from tiermem.plan import Copy, Outcome, Plan
from tiermem.table import Rows
from tiermem.tier import Place, Slots

NO_SLOTS: Slots = np.empty(0, np.int32)


@dataclass(frozen=True, slots=True)
class Hello:
    """What a rank has. Its frames 0..shown-1 show the first pages of the range already.

    capacities: slots that each tier will have at most; ready: slots that it has now. held: what
    its kept slab holds, oldest first, or None where nothing is kept.
    """

    rank: int
    page_bytes: int
    shown: int
    capacities: Mapping[Place, int]
    ready: Mapping[Place, int]
    routes: frozenset[tuple[Place, Place]]
    held: Stored | None = None


@dataclass(frozen=True, slots=True)
class Receive:
    """What a request that is told back waits for, and pages whose content could not be had."""

    plans: tuple[int, ...]
    missing: Rows


@dataclass(frozen=True, slots=True)
class Orders:
    """What every rank does before its next work, in this order.

    step       grows by one with each; the fences in plans name steps
    record     content that has come to the drive, for the slab's index
    forget     slots of the drive whose content counts no more
    back, park frames that get memory again; that give theirs back once these plans have hidden
               them: in this order, in a thread beside the step
    plans      to be started in this order
    needs      plans, of these or earlier orders, that the work of this step waits for
    receives   requests that wait for plans: told back once those have ended
    """

    step: int
    plans: tuple[Plan, ...] = ()
    needs: tuple[int, ...] = ()
    record: Stored | None = None
    forget: Slots = field(default_factory=lambda: NO_SLOTS)
    park: Slots = field(default_factory=lambda: NO_SLOTS)
    back: Slots = field(default_factory=lambda: NO_SLOTS)
    receives: Mapping[str, Receive] = field(default_factory=dict)

    def awaits_loads(self) -> bool:
        """Whether the work of this step waits for bytes that these orders bring up."""
        return any(
            isinstance(step, Copy) and step.dst == Place.GPU
            for plan in self.plans
            if plan.id in self.needs
            for step in plan.steps
        )


@dataclass(frozen=True, slots=True)
class Moved:
    """What one route of a rank has moved so far: pages, and seconds during which it was busy.

    A rank looks at its copies when a step ends, so busy_s is too long by up to a step for each;
    surely_s is the time until the last look that found a copy under way.
    """

    pages: int
    busy_s: float
    surely_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Report:
    """What has become of orders since a rank's last report.

    passed: the last step whose work has ended. ready: slots of each tier by now. backed: frames
    that have memory again; unbacked: for which the device had none; parked: that gave theirs back.
    growing: lower tiers that will have more slots.
    """

    rank: int
    passed: int
    outcomes: tuple[Outcome, ...]
    ready: Mapping[Place, int]
    moved: Mapping[tuple[Place, Place], Moved]
    backed: Slots = field(default_factory=lambda: NO_SLOTS)
    unbacked: Slots = field(default_factory=lambda: NO_SLOTS)
    parked: Slots = field(default_factory=lambda: NO_SLOTS)
    growing: frozenset[Place] = frozenset()
