"""Candidates in shadow mode see whole sessions and report what they would have hit."""

import numpy as np
import pytest

from tiermem.bench.replay import Facts
from tiermem.errors import BadPolicy
from tiermem.policies.base import Candidates, Ids
from tiermem.policies.lru import LRU
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
    shadow = Shadow(["lru", "fifo", "s3fifo(small=0.2)"], 2000, sample=0.5)
    drive(shadow)
    rows = shadow.report(unit_bytes=100, miss_s=0.01)
    assert [row.policy for row in rows] == ["lru", "fifo", "s3fifo(small=0.2)"]
    for row in rows:
        assert 0 < row.prefix_hits <= row.hits < row.accesses
        assert row.stall_s == pytest.approx(0.01 * (row.accesses - row.prefix_hits))
        assert row.requests == rows[0].requests
        assert row.written_bytes == 100 * row.written


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


class Breaking(LRU):
    """Names a unit twice after a while."""

    def victims(self, candidates: Candidates, n: int, now: int) -> Ids:
        units = super().victims(candidates, n, now)
        return units if now < 1_000_000 else np.repeat(units[:1], 2)[:n]


def test_a_candidate_that_breaks_the_rules_ends_its_own_trial_only() -> None:
    shadow = Shadow(["lru", f"{__name__}:Breaking"], 100, sample=1.0)
    drive(shadow)
    good, bad = shadow.report()
    assert not good.failed
    assert "twice" in bad.failed or "named" in bad.failed
    assert bad.accesses < good.accesses


def test_numbers_of_forgotten_contents_are_used_again_and_nothing_is_mixed_up() -> None:
    """The same requests, with and without a bound on what is remembered."""

    class Boundless(Shadow):
        def _forget(self) -> None:
            pass

    random = np.random.default_rng(1)
    sessions = random.zipf(1.1, 6_000) % 5_000
    shadows = [
        kind(["lru", "s3fifo", "arc", "2q", "wtinylfu"], 200, sample=1.0)
        for kind in (Shadow, Boundless)
    ]
    for now, session in enumerate(sessions.tolist()):
        names = np.uint64(session * 1000 + 7) + np.arange(3, dtype=np.uint64)
        for shadow in shadows:
            shadow.request(session, names, Facts(session, 1), 1000 * now)
    bounded, boundless = shadows
    assert bounded.remembered <= 4096 < boundless.remembered
    for some, all_ in zip(bounded.report(), boundless.report(), strict=True):
        assert not some.failed
        assert (some.hits, some.written) == (all_.hits, all_.written)


def test_units_are_known_by_their_content_and_sessions_by_their_first_block() -> None:
    shadow = Shadow(["lru"], 100, sample=1.0)
    chain = np.array([2, 1, 0], np.int32)  # deepest first
    keys = np.array([30, 20, 10], np.uint64)
    shadow.named(chain, keys)
    shadow.finished(chain, Facts(None, None), 1)
    elsewhere = chain + 7
    shadow.named(elsewhere, keys)
    shadow.finished(elsewhere, Facts(None, None), 2)
    (row,) = shadow.report()
    assert (row.accesses, row.hits) == (6, 3)
    shadow.named(chain, None)  # other content, without a name
    shadow.finished(chain, Facts(None, None), 3)
    shadow.finished(chain, Facts(None, None), 4)
    for never_named in (99, 89):
        shadow.finished(np.array([never_named], np.int32), Facts(None, None), 5)
    (row,) = shadow.report()
    assert (row.accesses, row.hits) == (14, 6)
