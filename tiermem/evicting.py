"""From the sections of a configuration to the policies, rules and trials of a planner."""

from __future__ import annotations

import time
from collections.abc import Mapping

from tiermem.books import Marks
from tiermem.config import Config
from tiermem.policies.admission import Budgeted
from tiermem.policies.base import Admission, Eviction
from tiermem.policies.registry import load
from tiermem.policies.shadow import Shadow
from tiermem.ranking import Ranking
from tiermem.table import PageTable
from tiermem.tier import TIERS, Place
from tiermem.trace import EventLog


def policy(place: Place, config: Config, slots: int) -> Eviction:
    """The policy that a tier of so many slots is configured to have. Raises BadPolicy."""
    tier = place.name.lower()
    params = getattr(config.evict, f"{tier}_params")
    return load(getattr(config.evict, tier), max(1, slots), params=params)


def named(place: Place, config: Config, slots: int) -> dict[str, object]:
    """What the event log says of a tier's policy, so that a replay can make it again."""
    tier = place.name.lower()
    return {
        "policy": getattr(config.evict, tier),
        "capacity": max(1, slots),
        "params": dict(getattr(config.evict, f"{tier}_params")),
    }


def event_log(config: Config, slots: Mapping[Place, int]) -> EventLog | None:
    """The event log, if the configuration has one."""
    if config.trace.path is None:
        return None
    tiers = {place.name.lower(): named(place, config, slots[place]) for place in TIERS}
    return EventLog(config.trace.path, tiers)


def rankings(
    config: Config, slots: Mapping[Place, int], table: PageTable, log: EventLog | None
) -> dict[Place, Ranking]:
    """Each tier's policy, guarded, over this table. slots: that each tier has at most."""
    record = log.write if log else None
    return {
        place: Ranking(place, policy(place, config, slots[place]), table, record, time.thread_time)
        for place in TIERS
    }


def marks(config: Config) -> dict[Place, Marks]:
    """When each tier makes room."""
    return {
        Place.GPU: Marks(config.gpu.high, config.gpu.low),
        Place.HOST: Marks(config.host.high, config.host.low),
        Place.NVME: Marks(config.nvme.high, config.nvme.low),
    }


def asked(rule: Admission, config: Config, unit_bytes: int) -> Admission | None:
    """Who is asked before writes to NVMe; None where everything is written at once."""
    budget = config.nvme.write_budget
    if budget is None:
        return None if config.nvme.admit == "all" else rule
    return Budgeted(rule, float(budget), unit_bytes)


def shadow(config: Config, slots: Mapping[Place, int], unit_pages: int) -> Shadow | None:
    """The policies on trial beside the GPU's, which is the first of them; None: there are none.

    slots: that each tier has; unit_pages: of the largest unit. Raises BadPolicy.
    """
    if not config.shadow.policies:
        return None
    running = config.evict.gpu
    if config.evict.gpu_params:
        given = ", ".join(f"{name}={value!r}" for name, value in config.evict.gpu_params.items())
        running = (
            f"{running.removesuffix(')')}, {given})" if "(" in running else f"{running}({given})"
        )
    held = sum(slots[place] for place in shadow_tiers(config)) // unit_pages
    return Shadow([running, *config.shadow.policies], held, config.shadow.sample, running)


def shadow_tiers(config: Config) -> tuple[Place, ...]:
    """The tiers that policies on trial hold together."""
    return TIERS[: TIERS.index(Place[config.shadow.tier.upper()]) + 1]
