"""What hints come to: marks, facts, expectations, and whose blocks are given up."""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tiermem.directed.director import Units
from tiermem.facts import Ended, Expected, Fact
from tiermem.integrations import vllm_sessions
from tiermem.integrations.vllm_hints import NO_HINTS, Hints
from tiermem.integrations.vllm_sessions import Facts, Sessions


class Reason(IntEnum):
    STOP = 0
    ABORT = 2


class Heard:
    """Stands for a director: what it is told."""

    def __init__(self) -> None:
        self.retained: list[tuple[list[int], int, float]] = []
        self.ends: list[tuple[list[int], Facts]] = []
        self.facts: list[tuple[Fact, list[int]]] = []

    def retain(self, units: Units, priority: int, seconds: float) -> None:
        self.retained.append((units.tolist(), priority, seconds))

    def finished(self, units: Units, facts: Facts) -> None:
        self.ends.append((units.tolist(), facts))

    def foresee(self, fact: Fact, units: Units) -> None:
        self.facts.append((fact, units.tolist()))


def ended(
    reason: Reason | None = Reason.STOP, tokens: int = 5, hashes: Sequence[bytes] = ()
) -> Any:
    return SimpleNamespace(
        get_finished_reason=lambda: reason, num_output_tokens=tokens, block_hashes=hashes
    )


def units(*numbers: int) -> Units:
    return np.array(numbers, np.int32)


def end(sessions: Sessions, hints: Hints, heard: Any, now_s: float = 0.0, **more: Any) -> None:
    sessions.end(ended(**more), hints, units(3, 2, 1), heard, now_s)


# ---------------------------------------------------------------- whose blocks


def test_a_session_that_is_closed_gives_up_what_it_computed_in_all_its_turns() -> None:
    sessions, a = Sessions(), Hints(session="a")
    sessions.computes(a, [1, 2])
    sessions.used(a, [1, 2])
    sessions.computes(a, [3])
    closing = Hints(session="a", closed=True)
    assert sessions.given_up(closing, [1, 2, 3], 2) == [1, 2, 3]


def test_what_others_have_used_stays_when_a_session_is_closed() -> None:
    sessions, a = Sessions(), Hints(session="a")
    sessions.computes(a, [1, 2, 3])
    sessions.used(Hints(session="b"), [1])
    sessions.used(NO_HINTS, [2])
    assert sessions.given_up(Hints(session="a", closed=True), [1, 2, 3], 0) == [3]


def test_a_block_that_others_compute_anew_is_theirs() -> None:
    sessions, a = Sessions(), Hints(session="a")
    sessions.computes(a, [1, 2])
    sessions.computes(NO_HINTS, [1])
    assert sessions.given_up(Hints(session="a", closed=True), [1, 2], 0) == [2]


def test_a_request_that_is_not_to_be_kept_gives_up_what_it_computed_itself() -> None:
    sessions = Sessions()
    assert sessions.given_up(Hints(keep=False), [1, 2, 3, 4], 2) == [3, 4]
    assert sessions.given_up(NO_HINTS, [1, 2, 3, 4], 2) == []
    assert sessions.given_up(Hints(session="a"), [1, 2, 3, 4], 2) == []


# ---------------------------------------------------------------- facts


def test_policies_hear_how_a_request_ended() -> None:
    sessions, heard = Sessions(), Heard()
    end(sessions, NO_HINTS, heard)
    end(sessions, NO_HINTS, heard, reason=None, tokens=0)
    assert heard.ends == [
        ([3, 2, 1], Facts(None, None, "stop", 5)),
        ([3, 2, 1], Facts(None, None, None, 0)),
    ]
    assert heard.retained == []
    assert heard.facts == []


def test_turns_are_counted_by_session() -> None:
    sessions, heard = Sessions(), Heard()
    for name in ("a", "b", "a", "a"):
        end(sessions, Hints(session=name), heard, reason=Reason.ABORT)
    facts = [facts for _, facts in heard.ends]
    assert [f.turn for f in facts] == [1, 1, 2, 3]
    assert [f.session == facts[0].session for f in facts] == [True, False, True, True]
    assert {f.reason for f in facts} == {"abort"}


def test_priority_and_retention_are_marks_on_all_units() -> None:
    sessions, heard = Sessions(), Heard()
    end(sessions, Hints(priority=9), heard)
    end(sessions, Hints(retain_s=60.0), heard)
    assert heard.retained == [([3, 2, 1], 9, 0.0), ([3, 2, 1], 0, 60.0)]


def test_old_sessions_are_forgotten_when_there_are_too_many(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(vllm_sessions, "MOST", 3)
    sessions, heard = Sessions(), Heard()
    for name in ("a", "b", "c", "a", "d", "a", "b"):
        end(sessions, Hints(session=name), heard)
    assert [facts.turn for _, facts in heard.ends] == [1, 1, 1, 2, 1, 3, 1]


# ---------------------------------------------------------------- expectations


def expect(sessions: Sessions, heard: Any, in_s: float, now_s: float = 0.0, **more: Any) -> None:
    hints = Hints(session="a", expected_s=in_s, **more)
    end(sessions, hints, heard, now_s, hashes=[b"x", b"y"])


def look(sessions: Sessions, heard: Any, now_s: float) -> None:
    def kept(hashes: Sequence[bytes]) -> Units:
        assert list(hashes) == [b"x", b"y"]
        return units(7, 8)

    sessions.look_ahead(heard, kept, now_s)


def test_the_prefetch_policy_hears_of_a_session_shortly_before_it_is_due() -> None:
    sessions, heard = Sessions(ahead_s=2.0), Heard()
    expect(sessions, heard, in_s=30.0, now_s=100.0, probability=0.7)
    look(sessions, heard, 127.0)
    assert heard.facts == []
    look(sessions, heard, 128.5)
    look(sessions, heard, 129.0)
    ((fact, chain),) = heard.facts
    assert isinstance(fact, Expected)
    assert (fact.in_s, fact.probability, chain) == (1.5, 0.7, [7, 8])


def test_a_session_that_came_back_or_was_closed_is_not_expected() -> None:
    sessions, heard = Sessions(), Heard()
    expect(sessions, heard, in_s=30.0)
    sessions.came(Hints(session="a"))
    look(sessions, heard, 100.0)
    assert heard.facts == []
    expect(sessions, heard, in_s=30.0)
    end(sessions, Hints(session="a", closed=True), heard)
    look(sessions, heard, 100.0)
    ((fact, _),) = heard.facts
    assert isinstance(fact, Ended)


def test_a_later_expectation_takes_the_place_of_an_earlier_one() -> None:
    sessions, heard = Sessions(ahead_s=0.0), Heard()
    expect(sessions, heard, in_s=10.0)
    expect(sessions, heard, in_s=50.0)
    look(sessions, heard, 20.0)
    assert heard.facts == []
    look(sessions, heard, 50.0)
    assert len(heard.facts) == 1
