"""How much faster or slower, and how sure: a bootstrap over rounds, and the verdict in words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import msgspec
import numpy as np
import numpy.typing as npt

from tiermem.bench import words
from tiermem.bench.result import Row
from tiermem.units import format_exactly

RESAMPLES = 4000
LEVEL = 95
MIN_ROUNDS = 3
"""Fewer rounds than this carry no interval worth printing."""
MIN_EFFECT = 0.03
"""A smaller difference is called none, however sure it is: it would not change a decision."""

Samples = npt.NDArray[np.float64]
Verdict = Literal["faster", "slower", "no difference", "not certain", "too few rounds"]


class Compared(msgspec.Struct, frozen=True, kw_only=True):
    """One pair of rows, or several of one kind: B's rate relative to A's."""

    what: str
    pairs: int
    a_gbps: float
    b_gbps: float
    ratio: float
    """Median of B over median of A; of several pairs the geometric mean."""
    low: float
    high: float
    """The bootstrap interval of the ratio; equal to it when there are too few rounds."""
    p99_ratio: float | None
    verdict: Verdict
    because: str


@dataclass(frozen=True, slots=True)
class Pair:
    a: Row
    b: Row
    log_ratios: Samples | None
    """float64[RESAMPLES], or None with too few rounds."""


def resample(a: Row, b: Row, rng: np.random.Generator) -> Samples | None:
    """log(median of B / median of A) over rounds drawn with replacement."""
    if min(a.gbps.n, b.gbps.n) < MIN_ROUNDS:
        return None
    medians = []
    for row in (a, b):
        rounds = np.asarray(row.gbps.rounds, dtype=np.float64)
        drawn = rounds[rng.integers(0, rounds.size, (RESAMPLES, rounds.size))]
        medians.append(np.median(drawn, axis=1))
    ratios: Samples = np.log(medians[1] / medians[0])
    return ratios


def judge(pairs: Sequence[Pair], what: str) -> Compared:
    """A verdict over pairs of one kind: the interval of the mean of their log ratios."""
    logs = [float(np.log(pair.b.gbps.median / pair.a.gbps.median)) for pair in pairs]
    ratio = float(np.exp(np.mean(logs)))
    drawn = [pair.log_ratios for pair in pairs if pair.log_ratios is not None]
    low = high = ratio
    if drawn:
        tails = (50 - LEVEL / 2, 50 + LEVEL / 2)
        low, high = (float(x) for x in np.exp(np.percentile(np.mean(drawn, axis=0), tails)))
    p99 = [
        pair.b.page_us.p99 / pair.a.page_us.p99
        for pair in pairs
        if pair.a.page_us and pair.b.page_us and pair.a.page_us.p99 > 0
    ]
    return Compared(
        what=what,
        pairs=len(pairs),
        a_gbps=float(np.median([pair.a.gbps.median for pair in pairs])),
        b_gbps=float(np.median([pair.b.gbps.median for pair in pairs])),
        ratio=ratio,
        low=low,
        high=high,
        p99_ratio=float(np.exp(np.mean(np.log(p99)))) if p99 else None,
        verdict=_verdict(ratio, low, high) if len(drawn) == len(pairs) else "too few rounds",
        because=_because(pairs[0].a, pairs[0].b),
    )


def _verdict(ratio: float, low: float, high: float) -> Verdict:
    if low >= 1 - MIN_EFFECT and high <= 1 + MIN_EFFECT:
        return "no difference"
    if high < 1 and ratio <= 1 - MIN_EFFECT:
        return "slower"
    if low > 1 and ratio >= 1 + MIN_EFFECT:
        return "faster"
    return "no difference" if abs(ratio - 1) < MIN_EFFECT else "not certain"


SITS = {
    "PIX": "below the same switch",
    "PXB": "behind several switches",
    "PHB": "behind the host bridge",
    "NODE": "behind another host bridge",
    "SYS": "behind the other socket",
}


def _because(a: Row, b: Row) -> str:
    """What differs between the two rows, worst first; empty when nothing that we know does."""
    if a.relation != b.relation and b.relation in SITS:
        end = b.src if words.kind(b.src) == "nvme" or words.kind(b.dst) == "gpu" else b.dst
        return f"{end} sits {SITS[b.relation]}" + (
            f", in A {SITS[a.relation]}" if a.relation in SITS else ""
        )
    if a.page_bytes != b.page_bytes:
        return f"pages of {format_exactly(b.page_bytes)} instead of {format_exactly(a.page_bytes)}"
    if a.path != b.path:
        return f"path {b.path or 'unknown'} instead of {a.path or 'unknown'}"
    if (a.src, a.dst) != (b.src, b.dst):
        return f"{b.src} to {b.dst} instead of {a.src} to {a.dst}"
    return ""


def sentence(compared: Compared) -> str:
    """nvme:nvme1n1 sits behind the other socket: loads from nvme 41 % slower (39 to 43), ..."""
    change = _percent(compared.ratio)
    if compared.verdict in ("slower", "faster"):
        ends = sorted((abs(compared.low - 1) * 100, abs(compared.high - 1) * 100))
        text = f"{change} {compared.verdict} ({LEVEL} %: {ends[0]:.0f} to {ends[1]:.0f})"
    elif compared.verdict == "no difference":
        text = "no difference"
    elif compared.verdict == "not certain":
        text = f"not certain ({compared.low:.2f} to {compared.high:.2f} times A's rate)"
    else:
        text = f"{compared.ratio:.2f} times A's rate, too few rounds to be sure"
    p99 = words.times(compared.p99_ratio) if compared.p99_ratio is not None else ""
    because = f"{compared.because}: " if compared.because else ""
    return f"{because}{compared.what} {text}" + (f", p99 {p99}" if p99 else "")


def _percent(ratio: float) -> str:
    return f"{abs(ratio - 1) * 100:.0f} %"
