"""Candidates in shadow mode see whole sessions and report what they would have hit."""

import numpy as np
import pytest

from tiermem.bench.replay import Facts
from tiermem.errors import BadPolicy
from tiermem.policies.shadow import Shadow


def drive(shadow: Shadow, sessions: int = 400, turns: int = 4) -> None:
    for turn in range(turns):
        for session in range(sessions):
            names = np.uint64(session * 1000) + np.arange(2 + turn, dtype=np.uint64)
            now = 1000 * (turn * sessions + session)
            shadow.request(session, names, Facts(session, turn + 1), now)


def test_a_sample_holds_about_its_part_of_the_sessions_and_always_the_same_ones() -> None:
    shadow = Shadow(["lru"], 100, sample=0.25)
    chosen = [session for session in range(4000) if shadow.sampled(session)]
    assert 800 < len(chosen) < 1200
    assert chosen == [session for session in range(4000) if shadow.sampled(session)]
    assert all(Shadow(["lru"], 100, sample=1.0).sampled(session) for session in range(100))


def test_candidates_report_would_be_hits_stall_and_writes() -> None:
    shadow = Shadow(["lru", "fifo", "s3fifo(small=0.2)"], 2000, sample=0.5, miss_s=0.01)
    drive(shadow)
    rows = shadow.report()
    assert [row.policy for row in rows] == ["lru", "fifo", "s3fifo(small=0.2)"]
    for row in rows:
        assert 0 < row.prefix_hits <= row.hits < row.accesses
        assert row.stall_s == pytest.approx(0.01 * (row.accesses - row.prefix_hits))
        assert row.requests == rows[0].requests


def test_a_sampled_tier_hits_about_as_often_as_the_whole_one() -> None:
    ratios = []
    for sample in (1.0, 0.25):
        shadow = Shadow(["lru"], 1300, sample=sample)
        drive(shadow, sessions=800)
        (row,) = shadow.report()
        ratios.append(row.prefix_hits / row.accesses)
    assert ratios[0] == pytest.approx(ratios[1], abs=0.1)


def test_a_sample_that_cannot_be_meant_is_refused() -> None:
    for sample in (0.0, 1.5):
        with pytest.raises(BadPolicy, match="sample"):
            Shadow(["lru"], 10, sample=sample)
    with pytest.raises(BadPolicy, match="did you mean"):
        Shadow(["lruu"], 10)
