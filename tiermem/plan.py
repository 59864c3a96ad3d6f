"""What travels between planner and executors: plans with explicit pages and slots, and outcomes.

Plans hold no addresses and no objects of a process, so one plan can be carried out by the
executors of several ranks; its outcome counts once all of them have reported (`merge`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from tiermem.table import Rows
from tiermem.tier import PASSED, Fence, Mask, Place, Slots

Access = Literal["read", "write", "fresh"]
"""What a user does with pages: reads, reads and writes, or writes without asking for old bytes."""


@dataclass(frozen=True, slots=True)
class Drop:
    """Tell the owner that these units are gone, before any slot of theirs is reused."""

    units: Rows
    reason: str


@dataclass(frozen=True, slots=True)
class Hide:
    """Show nothing at these pages. `frees`: frames that become free once it is done."""

    pages: Rows
    frees: Slots


@dataclass(frozen=True, slots=True)
class Zero:
    """Fill frames that last held another tenant's bytes with zeros."""

    frames: Slots


@dataclass(frozen=True, slots=True)
class Copy:
    """Copy src_slots[i] of tier `src` to dst_slots[i] of `dst`, for pages[i], after a fence.

    stays: the pages keep their place; the copy is to be a spare (or, within one tier, their slot).
    """

    src: Place
    dst: Place
    pages: Rows
    src_slots: Slots
    dst_slots: Slots
    after: Fence
    stays: bool = False


@dataclass(frozen=True, slots=True)
class Show:
    """Show frames[i] at pages[i]."""

    pages: Rows
    frames: Slots


@dataclass(frozen=True, slots=True)
class ShowInPlace:
    """Show slots[i] of the host tier at pages[i], to be read there."""

    pages: Rows
    slots: Slots


Step = Drop | Hide | Zero | Copy | Show | ShowInPlace


@dataclass(frozen=True, slots=True)
class Plan:
    """Steps in order; settled as a whole. No plan depends on another that is not settled."""

    id: int
    steps: tuple[Step, ...]


@dataclass(eq=False, slots=True)
class Request:
    """What a fault or an allocation came to.

    taken    the pages are pinned, or will be when their plans settle; else: carry out `plans`,
             wait for any of `pending` or for `fence`, and ask again
    plans    to be carried out by the caller, at once
    pending  ids of open plans to wait for; shrinks as they settle
    failed   pages whose load failed; they are not pinned
    ahead    the caller has gone on, a stream waits for the loads
    """

    rows: Rows
    taken: bool = False
    plans: list[Plan] = field(default_factory=list)
    pending: set[int] = field(default_factory=set)
    fence: Fence = PASSED
    failed: list[int] = field(default_factory=list)
    pins: bool = True
    ahead: bool = False


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a plan: for each step, which entries failed (None: none did)."""

    plan: int
    failed: tuple[Mask | None, ...]
    error: Exception | None = None


def merge(outcomes: Sequence[Outcome]) -> Outcome:
    """The outcome of one plan over several ranks: an entry failed if it failed anywhere."""
    first, *others = outcomes
    failed = list(first.failed)
    for other in others:
        assert other.plan == first.plan, "outcomes of different plans"
        for i, mask in enumerate(other.failed):
            mine = failed[i]
            if mask is not None:
                failed[i] = mask if mine is None else np.logical_or(mine, mask)
    error = next((o.error for o in outcomes if o.error is not None), None)
    return Outcome(first.plan, tuple(failed), error)
