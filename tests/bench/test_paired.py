"""Ratios of rates that were measured turn about."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from tests.bench.fixtures.results import result, row
from tiermem.bench.paired import Ratio, ratio
from tiermem.bench.result import Check, read, write


def test_what_moves_both_rates_alike_does_not_move_their_ratio() -> None:
    drive = [1.0, 4.0, 0.2, 3.0, 2.0, 7.0, 1.5]
    found = ratio([0.9 * rate for rate in drive], drive)
    assert found.n == 7
    assert [found.median, found.low, found.high] == pytest.approx([0.9, 0.9, 0.9])
    # The medians of the same rates, out of step by one round, are as far apart as the drive moved.
    apart = ratio([0.9 * rate for rate in drive], drive[1:] + drive[:1])
    assert apart.low is not None
    assert apart.low < 0.5


@pytest.mark.parametrize(("n", "left_out"), [(6, 0), (8, 0), (9, 1), (12, 2), (20, 5)])
def test_the_interval_leaves_out_as_many_rounds_as_the_sign_test_allows(
    n: int, left_out: int
) -> None:
    ours = np.random.default_rng(n).permutation(np.arange(1.0, n + 1))
    found = ratio(ours.tolist(), [1.0] * n)
    assert (found.low, found.high) == (1.0 + left_out, n - left_out)
    inside = sum(math.comb(n, k) for k in range(left_out + 1, n - left_out)) / 2**n
    assert inside >= 0.95
    assert inside - 2 * math.comb(n, left_out + 1) / 2**n < 0.95


def test_the_interval_holds_the_true_ratio_in_19_of_20_runs_or_more() -> None:
    rng = np.random.default_rng(5)
    held = 0
    for _ in range(2000):
        found = ratio(rng.lognormal(0.1, 0.3, 9).tolist(), rng.lognormal(0.1, 0.3, 9).tolist())
        assert found.low is not None
        assert found.high is not None
        held += found.low <= 1.0 <= found.high
    assert 0.94 < held / 2000 < 0.985  # 96.1 % by the binomial distribution


def test_few_rounds_have_no_interval_and_unequal_ones_are_refused() -> None:
    assert ratio([1.0, 3.0, 2.0], [1.0, 1.0, 1.0]) == Ratio(3, 2.0)
    with pytest.raises(ValueError, match="shorter"):
        ratio([1.0, 2.0], [1.0])


@pytest.mark.parametrize(
    ("factors", "verdict"),
    [
        ([0.99] * 9, "agree"),
        ([0.8, 0.9, 0.9, 0.9, 0.9, 0.9, 0.9, 1.0, 1.0], "unsure"),
        ([0.89, 0.9, 0.9, 0.9, 0.9, 0.9, 0.9, 0.91, 1.0], "differ"),
        ([1.06, 1.2, 1.2, 1.2, 1.2, 1.2, 1.2, 1.2, 1.2], "differ"),
        ([0.9] * 5, "differ"),  # no interval to be unsure by
    ],
)
def test_a_check_differs_only_if_its_whole_interval_does(
    factors: list[float], verdict: str
) -> None:
    check = Check.of("disk", "fio", [2.0 * factor for factor in factors], [2.0] * len(factors))
    assert check.verdict == verdict
    assert check.agrees == (verdict == "agree")


def test_the_rounds_of_a_check_are_in_the_file(tmp_path: Path) -> None:
    check = Check.of("disk", "fio", [2.0, 2.1, 1.9], [2.0, 2.0, 2.2])
    made = result([row("host-gpu", "host", "gpu:0", [50.0])], checks=(check,))
    path = tmp_path / "a.json"
    write(made, path)
    assert read(path).checks[0].ours_rounds == (2.0, 2.1, 1.9)
    assert read(path).checks == (check,)
