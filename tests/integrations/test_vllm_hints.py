"""What requests say: where it is read, what is refused, and that nothing of it fails a request."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest

from tiermem.integrations import vllm_hints
from tiermem.integrations.vllm_hints import CHECKS, MOST_WARNINGS, NO_HINTS, Hints, hints_of


@pytest.fixture(autouse=True)
def _fresh_warnings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_hints, "_warned", set())


def request(tiermem: object = None, flat: object = None, session_id: str | None = None) -> Any:
    params = None if tiermem is None else {"tiermem": tiermem, "do_remote_prefill": False}
    return SimpleNamespace(
        kv_transfer_params=params,
        sampling_params=SimpleNamespace(extra_args=flat),
        session_id=session_id,
    )


def test_a_request_that_says_nothing_has_no_hints() -> None:
    assert hints_of(request()) is NO_HINTS
    assert hints_of(SimpleNamespace()) is NO_HINTS, "a pooling request of an older release"


def test_all_hints_are_read_from_the_field_for_connectors() -> None:
    given = {
        "priority": 70, "retain_s": 600, "session": "chat-1", "expected_s": 12.5,
        "probability": 0.8, "closed": False, "keep": True,
    }  # fmt: skip
    assert set(given) == set(CHECKS)
    assert hints_of(request(given)) == Hints(70, 600.0, "chat-1", 12.5, 0.8, False, True)


def test_flat_arguments_mean_the_same_and_the_field_for_connectors_wins() -> None:
    flat = {"tiermem_priority": 3, "tiermem_keep": 0, "tiermem_session": 17, "top_k_is_not_ours": 1}
    assert hints_of(request(flat=flat)) == Hints(priority=3, session="17", keep=False)
    assert hints_of(request({"priority": 4}, flat)).priority == 4


def test_the_session_may_be_the_one_that_vllm_knows() -> None:
    assert hints_of(request(session_id="header")) == Hints(session="header")
    assert hints_of(request({"session": "own"}, session_id="header")).session == "own"


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("priority", 101, "a whole number from 0 to 100"),
        ("priority", -1, "a whole number from 0 to 100"),
        ("priority", 1.5, "a whole number from 0 to 100"),
        ("priority", True, "a number"),
        ("priority", "7", "a number"),
        ("retain_s", -0.1, "seconds, 0 or more"),
        ("retain_s", float("inf"), "seconds, 0 or more"),
        ("expected_s", float("nan"), "seconds, 0 or more"),
        ("expected_s", None, "a number"),
        ("probability", 1.01, "a number from 0 to 1"),
        ("session", "", "a name"),
        ("session", ["a"], "a name"),
        ("closed", "yes", "true or false"),
        ("keep", 2, "true or false"),
        ("keep", [], "true or false"),
    ],
)
def test_a_value_that_makes_no_sense_is_left_out_with_one_warning(
    name: str, value: object, says: str, caplog: pytest.LogCaptureFixture
) -> None:
    left = NO_HINTS if name == "session" else Hints(session="s")
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert hints_of(request({"session": "s", name: value})) == left
    (record,) = caplog.records
    assert name in record.getMessage()
    assert says in record.getMessage()


def test_a_hint_that_there_is_not_names_the_nearest(caplog: pytest.LogCaptureFixture) -> None:
    assert hints_of(request({"priorty": 3})) is NO_HINTS
    assert "'priority'?" in caplog.text


def test_hints_that_are_no_object_are_left_out(caplog: pytest.LogCaptureFixture) -> None:
    assert hints_of(request([1, 2])) is NO_HINTS
    assert "an object with hints" in caplog.text


def test_closed_and_expected_want_a_session(caplog: pytest.LogCaptureFixture) -> None:
    assert hints_of(request({"closed": True})).session is None
    assert "none is named" in caplog.text


def test_clients_cannot_fill_the_log(caplog: pytest.LogCaptureFixture) -> None:
    for n in range(3 * MOST_WARNINGS):
        hints_of(request({f"unknown{n}": 1}))
    assert len(caplog.records) == MOST_WARNINGS
