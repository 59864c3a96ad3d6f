"""Faults planted into the planner one at a time; the pager machine must find every one of them.

    python -m tests.planted_faults [--runs 400]

prints which fault was caught, by which assertion, and after how many runs. A fault that is not
caught means that the machine looks away: strengthen the machine, not the fault.
"""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis.stateful import run_state_machine_as_test

from tests.test_compaction import CompactionMachine
from tests.test_contents_machine import ContentsMachine
from tests.test_pager_machine import PagerMachine, machine_settings
from tiermem.backup import Backup
from tiermem.books import Books
from tiermem.compaction import Compaction
from tiermem.descent import Descent
from tiermem.inplace import InPlace
from tiermem.plan import Copy, Outcome, Plan, Request, Step, Zero
from tiermem.planner import Planner
from tiermem.table import IS_IN_PLACE, PageTable, Rows
from tiermem.tier import PASSED, Mask, Place, Slots


@dataclass(frozen=True)
class Fault:
    """One fault: what goes wrong, and the method that is replaced to make it so."""

    name: str
    owner: type
    method: str
    make: Callable[[Callable[..., Any]], Callable[..., Any]]
    """From the right method to the wrong one."""
    machine: type[PagerMachine] = PagerMachine

    @contextmanager
    def planted(self) -> Iterator[None]:
        right = getattr(self.owner, self.method)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(self.owner, self.method, self.make(right))
            yield


@dataclass(frozen=True)
class Verdict:
    """Caught: by what (the assertion and where it stands), and in which run."""

    caught: bool
    by: str
    runs: int


def hunt(fault: Fault, runs: int) -> Verdict:
    """Run the machine with a fault in place until it is caught, `runs` times at most."""
    begun = 0
    first: tuple[int, str] | None = None

    class Machine(fault.machine):  # type: ignore[name-defined,misc]  # a class that is data
        def __init__(self) -> None:
            nonlocal begun
            begun += 1
            super().__init__()

    with fault.planted():
        try:
            run_state_machine_as_test(Machine, settings=machine_settings(runs, repeat=True))
        except Exception as error:  # whatever the fault leads to is how it shows
            first = (begun - 1, _where(error))  # the failing run is repeated once for the report
    return Verdict(True, first[1], first[0]) if first else Verdict(False, "", begun)


def _where(error: BaseException) -> str:
    last = traceback.extract_tb(error.__traceback__)[-1]
    said = " ".join(str(error).split("\n")[0].split())
    return f"{type(error).__name__} in {Path(last.filename).name} {last.name}: {said[:90]}"


# ---------------------------------------------------------------- the faults


def _skip_a_fence(right: Callable[..., Plan]) -> Callable[..., Plan]:
    """Copies begin although a kernel that writes their source is still queued."""

    def begin(self: Books, steps: list[Step]) -> Plan:
        unfenced = [replace(s, after=PASSED) if isinstance(s, Copy) else s for s in steps]
        return right(self, unfenced)

    return begin


def _reuse_a_busy_slot(right: Callable[..., None]) -> Callable[..., None]:
    """The destination of a cancelled copy is free at once, while the copy still fills it."""

    def cancel(self: Books, rows: Rows) -> None:
        for opened in self._open.values():
            for step in opened.plan.steps:
                if isinstance(step, Copy) and step.dst != Place.GPU:
                    mine = np.isin(step.pages, rows) & (
                        self.table.move[step.pages] == opened.plan.id
                    )
                    self.pools[step.dst].release(step.dst_slots[mine])
        right(self, rows)

    return cancel


def _keep_a_stale_spare(right: Callable[..., None]) -> Callable[..., None]:
    """A page with a copy below is written, and the copy still counts as one."""

    def wrote(self: Planner, rows: Rows) -> None:
        lower = np.maximum(self.table.slot(Place.HOST)[rows], self.table.slot(Place.NVME)[rows])
        self.table.gen[rows[lower >= 0]] += 1
        right(self, rows[lower < 0])

    return wrote


def _commit_twice(right: Callable[..., list[Plan]]) -> Callable[..., list[Plan]]:
    """A copy down is settled a second time."""

    def land(self: Descent, *arguments: Any) -> list[Plan]:
        return right(self, *arguments) + right(self, *arguments)

    return land


def _forget_a_doomed_page(right: Callable[..., list[Plan]]) -> Callable[..., list[Plan]]:
    """A freed page that is busy is left out of the list of those that wait."""

    def reap(self: Descent) -> list[Plan]:
        self._doomed = self._doomed[self.table.busy[self._doomed] == 0]
        return right(self)

    return reap


def _pin_a_leaving_page(right: Callable[..., None]) -> Callable[..., None]:
    """A page on its way down is pinned and goes on leaving."""
    return lambda self, rows: None


def _lose_a_page_on_a_failed_copy(right: Callable[..., list[Plan]]) -> Callable[..., list[Plan]]:
    """A copy down that failed counts as done."""

    def settle(self: Planner, outcome: Outcome, now: int) -> list[Plan]:
        steps = self._open[outcome.plan].plan.steps
        return right(self, _forgiven(outcome, [_goes(s, down=True) for s in steps]), now)

    return settle


def _swallow_a_failed_read(right: Callable[..., list[Plan]]) -> Callable[..., list[Plan]]:
    """A load that failed counts as done."""

    def settle(self: Planner, outcome: Outcome, now: int) -> list[Plan]:
        steps = self._open[outcome.plan].plan.steps
        return right(self, _forgiven(outcome, [_goes(s, down=False) for s in steps]), now)

    return settle


def _goes(step: Step, *, down: bool) -> bool:
    return isinstance(step, Copy) and (step.src < step.dst) is down


def _forgiven(outcome: Outcome, which: list[bool]) -> Outcome:
    pairs = zip(outcome.failed, which, strict=True)
    return Outcome(outcome.plan, tuple(None if f else bad for bad, f in pairs))


def _steal_a_frame_with_a_kernel_queued(right: Callable[..., Mask]) -> Callable[..., Mask]:
    """A retired frame is taken although queued work will still touch it."""

    def idle(self: Books, owners: Rows, place: Place) -> Mask:
        return np.ones(len(owners), np.bool_) if place == Place.GPU else right(self, owners, place)

    return idle


def _let_a_torn_copy_become_a_spare(right: Callable[..., list[Plan]]) -> Callable[..., list[Plan]]:
    """A cancelled copy counts as a valid one although its page was written meanwhile."""

    def land(
        self: Descent, step: Copy, plan_id: int, gens: np.ndarray, bad: Mask | None, now: int
    ) -> list[Plan]:
        return right(self, step, plan_id, self.table.gen[step.pages].copy(), bad, now)

    return land


def _reuse_another_tenants_slot_unzeroed(right: Callable[..., Any]) -> Callable[..., Any]:
    """A frame goes to another tenant as the last one left it."""

    def frames(self: Planner, rows: Rows) -> tuple[Slots, list[Step]]:
        taken, steps = right(self, rows)
        return taken, [s for s in steps if not isinstance(s, Zero)]

    return frames


def _free_at_once(right: Callable[..., list[Plan]]) -> Callable[..., list[Plan]]:
    """A page is freed and its frame given away while a kernel that uses it is queued."""

    def reap(self: Descent) -> list[Plan]:
        self.table.fence[self._doomed] = 0
        return right(self)

    return reap


def _drop_untold(right: Callable[..., list[Plan]]) -> Callable[..., list[Plan]]:
    """Pages leave the last tier and their owner does not hear of it."""

    def drop(self: Descent, rows: Rows, now: int, reason: str) -> list[Plan]:
        self._doom(rows, now)
        return self._reap()

    return drop


def _wake_without_a_pin(right: Callable[..., Any]) -> Callable[..., Any]:
    """Whoever waited for a load gets no pin when it commits."""

    def pin(self: Planner, rows: Rows) -> None:
        right(self, rows)
        self.table.waiters[rows] = 0

    return pin


def _save_a_page_in_use(right: Callable[..., Mask]) -> Callable[..., Mask]:
    """A page is copied to the drive while its user, who has said so before, writes it."""

    def movable(self: Backup, heads: Rows) -> Mask:
        table = self.table
        still: Mask = (table.to[heads] == 0) & (table.busy[heads] == 0)
        still &= table.at[heads] == Place.GPU
        return still

    return movable


def _save_behind_no_kernel(right: Callable[..., list[Plan]]) -> Callable[..., list[Plan]]:
    """A page is copied to the drive although a kernel that writes it is still queued."""

    def back_up(self: Backup, now: int, *, last: bool = False) -> list[Plan]:
        fences = self.table.fence.copy()
        self.table.fence[:] = 0
        plans = right(self, now, last=last)
        self.table.fence[:] = fences
        return plans

    return back_up


def _follow_a_saved_copy(right: Callable[..., Plan]) -> Callable[..., Plan]:
    """A page that is saved is claimed as if it left, and not taken out of its tier."""

    def copy_down(self: Descent, rows: Rows, *arguments: Any, stays: bool = False) -> Plan:
        plan = right(self, rows, *arguments, stays=stays)
        self.table.move[rows] = plan.id
        return plan

    return copy_down


def _hide_what_a_kernel_will_read(right: Callable[..., Any]) -> Callable[..., Any]:
    """A page read in place is hidden, to be loaded, while queued work will still read it there."""

    def end(self: InPlace, rows: Rows, request: Request) -> Plan | None:
        read = rows[self.table.shown[rows] == IS_IN_PLACE]
        self.table.fence[read] = 0
        plan: Plan | None = right(self, rows, request)
        return plan

    return end


def _evict_what_a_kernel_will_read(right: Callable[..., Mask]) -> Callable[..., Mask]:
    """A page read in place leaves the host tier while queued work will still read it there."""

    def movable(self: PageTable, units: Rows, place: Place) -> Mask:
        if place == Place.HOST:
            self.fence[units[self.shown[units] == IS_IN_PLACE]] = 0
        return right(self, units, place)

    return movable


def _vacate_what_is_shown_in_place(right: Callable[..., list[Plan]]) -> Callable[..., list[Plan]]:
    """A freed page gives its host slot back, and its address goes on showing it."""

    def reap(self: Descent) -> list[Plan]:
        placed = self._doomed[self.table.shown[self._doomed] == IS_IN_PLACE]
        self.table.shown[placed] = 0
        return right(self)

    return reap


def _write_in_place(right: Callable[..., Any]) -> Callable[..., Any]:
    """A page that is read in place is written there."""

    def fault(self: Planner, rows: Rows, access: str, now: int, **more: Any) -> Request:
        placed = rows[self.table.shown[rows] == IS_IN_PLACE]
        request: Request = right(self, rows, "read" if len(placed) else access, now, **more)
        return request

    return fault


def _take_a_move_that_failed(right: Callable[..., None]) -> Callable[..., None]:
    """A copy within the host tier that failed counts as one that did not."""

    def land_within(
        self: Compaction, step: Copy, gens: np.ndarray | None, bad: Mask | None
    ) -> None:
        right(self, step, gens, None)

    return land_within


FAULTS = (
    Fault("skip a fence", Books, "_begin", _skip_a_fence),
    Fault("reuse a busy slot", Books, "_cancel", _reuse_a_busy_slot),
    Fault("keep a stale spare", Planner, "wrote", _keep_a_stale_spare),
    Fault("commit twice", Descent, "_land_down", _commit_twice),
    Fault("forget a doomed page", Descent, "_reap", _forget_a_doomed_page),
    Fault("pin a leaving page", Planner, "_rescue", _pin_a_leaving_page),
    Fault("lose a page on a failed copy", Planner, "settle", _lose_a_page_on_a_failed_copy),
    Fault("swallow a failed read", Planner, "settle", _swallow_a_failed_read),
    Fault(
        "steal a frame with a kernel queued", Books, "_is_idle", _steal_a_frame_with_a_kernel_queued
    ),
    Fault(
        "let a torn landing copy become a spare", Descent, "_land_down",
        _let_a_torn_copy_become_a_spare,
    ),
    Fault(
        "reuse a slot of another tenant unzeroed", Planner, "_frames",
        _reuse_another_tenants_slot_unzeroed,
    ),
    Fault("free a page with a kernel queued", Descent, "_reap", _free_at_once),
    Fault(
        "take a move that failed", Compaction, "_land_within", _take_a_move_that_failed,
        CompactionMachine,
    ),
    Fault("drop pages untold", Descent, "_drop", _drop_untold),
    Fault("wake a waiter without its pin", Planner, "_pin", _wake_without_a_pin),
    Fault("save a page in use", Backup, "_is_movable", _save_a_page_in_use, ContentsMachine),
    Fault(
        "save a page with a kernel queued", Backup, "back_up", _save_behind_no_kernel,
        ContentsMachine,
    ),
    Fault("follow a saved copy", Descent, "_copy_down", _follow_a_saved_copy, ContentsMachine),
    Fault(
        "let a torn save become a spare", Descent, "_land_down",
        _let_a_torn_copy_become_a_spare, ContentsMachine,
    ),
    Fault(
        "hide a page that a kernel reads in place", InPlace, "_end_in_place",
        _hide_what_a_kernel_will_read,
    ),
    Fault(
        "evict a page that a kernel reads in place", PageTable, "movable",
        _evict_what_a_kernel_will_read,
    ),
    Fault(
        "vacate a page that is shown in place", Descent, "_reap", _vacate_what_is_shown_in_place
    ),
    Fault("write a page in place", Planner, "fault", _write_in_place),
)  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--runs", type=int, default=400, help="runs of the machine a fault")
    parser.add_argument("--only", default="", help="part of a fault's name")
    asked = parser.parse_args()
    missed = 0
    print(f"{'fault':<42}{'runs':>6}  caught by")
    for fault in FAULTS:
        if asked.only in fault.name:
            verdict = hunt(fault, asked.runs)
            missed += not verdict.caught
            by = verdict.by if verdict.caught else "NOT CAUGHT"
            print(f"{fault.name:<42}{verdict.runs:>6}  {by}", flush=True)
    return missed


if __name__ == "__main__":
    sys.exit(main())
