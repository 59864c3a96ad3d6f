"""Plans carried out in order; what cannot be submitted is an outcome like any other."""

from __future__ import annotations

import numpy as np
import pytest

from tests.harness import Harness
from tiermem.errors import DriverError
from tiermem.executor import Executor
from tiermem.plan import Copy, Drop, Hide, Plan, Show, Zero
from tiermem.table import Rows
from tiermem.testing import GARBAGE
from tiermem.tier import PASSED, Done, Finished, Place, Slots


def ids(*values: int) -> Rows:
    return np.array(values, np.int32)


def copy(src: Place, dst: Place, *pages: int) -> Copy:
    rows = ids(*pages)
    return Copy(src, dst, rows, np.arange(len(rows), dtype=np.int32), rows, PASSED)


def test_steps_take_effect_and_the_outcome_says_so() -> None:
    h = Harness()
    h.memories[Place.HOST].words[0] = 5
    plan = Plan(7, (Zero(ids(2)), copy(Place.HOST, Place.GPU, 2), Show(ids(2), ids(2))))
    flight = h.executor.start(plan)
    assert not flight.ready()
    assert flight.wait()
    outcome = flight.outcome()
    assert (outcome.plan, outcome.failed, outcome.error) == (7, (None, None, None), None)
    assert h.window.shown == {200: 2}
    assert h.memories[Place.GPU].words[2].tolist() == [5, 5]


def test_a_failed_entry_is_named_and_the_others_counted() -> None:
    h = Harness()
    h.memories[Place.HOST].words[:] = 5
    h.routes[Place.HOST, Place.GPU].fail(1)
    flight = h.executor.start(Plan(1, (copy(Place.HOST, Place.GPU, 2, 3),)))
    flight.wait()
    outcome = flight.outcome()
    assert outcome.failed[0] is not None
    assert outcome.failed[0].tolist() == [True, False]
    assert isinstance(outcome.error, DriverError)
    assert h.memories[Place.GPU].words[2].tolist() == [GARBAGE] * 2
    counts = h.executor.counts()[Place.HOST, Place.GPU]
    assert (counts.pages, counts.failed) == (1, 1)
    assert counts.busy_s > 0


def test_a_step_that_cannot_be_submitted_has_failed_whole() -> None:
    h = Harness()
    h.routes[Place.GPU, Place.HOST].close()
    plan = Plan(1, (copy(Place.GPU, Place.HOST, 0, 1), Drop(ids(5), "evicted")))
    flight = h.executor.start(plan)
    assert flight.ready()
    outcome = flight.outcome()
    assert outcome.failed[0] is not None
    assert outcome.failed[0].all()
    assert outcome.failed[1] is None
    assert "is closed" in str(outcome.error)
    assert h.gone == []


def test_a_window_that_refuses_fails_all_pages_of_the_step() -> None:
    h = Harness()
    flight = h.executor.start(Plan(1, (Hide(ids(3, 4), ids()),)))
    flight.wait()
    failed = flight.outcome().failed[0]
    assert failed is not None
    assert failed.tolist() == [True, True]


def test_an_owner_whose_callback_fails_holds_nothing_up(caplog: pytest.LogCaptureFixture) -> None:
    def angry(units: Rows, reason: str) -> None:
        raise RuntimeError("no")

    executor = _executor(on_gone=angry)
    flight = executor.start(Plan(1, (Drop(ids(1, 2), "evicted"),)))
    assert flight.ready()
    assert flight.outcome().failed == (None,)
    assert executor.failed_callbacks == 1
    assert "on_gone failed units=2 reason=evicted" in caplog.text


def test_frames_are_zeroed_before_the_steps_that_follow_are_submitted() -> None:
    order: list[str] = []

    class Slow(Finished):
        def wait(self, timeout_s: float | None = None) -> bool:
            order.append("zeroed")
            return True

    class Window:
        def show(self, addresses: object, frames: Slots) -> Done:
            order.append("shown")
            return Finished()

        def hide(self, addresses: object) -> Done:
            return Finished()

    executor = _executor(zero=lambda frames: Slow(), window=Window())
    executor.start(Plan(1, (Zero(ids(0)), Show(ids(0), ids(0)))))
    assert order == ["zeroed", "shown"]


@pytest.mark.parametrize("kernels_only", [False, True])
def test_a_stream_may_wait_for_loads_and_for_the_window_if_it_runs_kernels_only(
    kernels_only: bool,
) -> None:
    h = Harness()
    h.memories[Place.HOST].words[:] = 5
    plan = Plan(1, (copy(Place.HOST, Place.GPU, 2), Show(ids(2), ids(2))))
    flight = h.executor.start(plan)
    assert flight.order(0, kernels_only)
    assert (200 in h.window.shown) is not kernels_only
    h.world.streams.advance(0, 5)
    assert 200 in h.window.shown
    assert h.memories[Place.GPU].words[2].tolist() == [5, 5]
    assert flight.ready()


def test_a_stream_is_not_made_to_wait_for_what_has_failed() -> None:
    h = Harness()
    h.window.failing = True
    flight = h.executor.start(Plan(1, (copy(Place.HOST, Place.GPU, 2), Show(ids(2), ids(2)))))
    h.world.finish_all()
    assert not flight.order(0, kernels_only=True)


def _executor(**given: object) -> Executor:
    h = Harness()
    parts: dict[str, object] = {
        "window": h.window,
        "routes": h.routes,
        "zero": lambda frames: Finished(),
        "addresses": lambda rows: rows.astype(np.uint64) * 100,
        "region_of": lambda rows: h.table.region[rows],
        "on_gone": lambda units, reason: None,
    }
    return Executor(**{**parts, **given})  # type: ignore[arg-type]
