"""Who may hold how much: fair shares by weight above the floors. Pure arithmetic in bytes.

fair      what a member may hold now: its floor, and of the rest a part by weight, never more
          than it wants; all fair shares together never exceed the budget
need      what a member may still take: fair less charged
excess    what a member holds above its share; it keeps that until others need it
owed      the part of its excess that a member must give back now
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Claim(NamedTuple):
    """What one member may ask for. In bytes, but for the weight, which is above 0."""

    low: int  # kept for it, wanted or not
    high: int  # more it does not want, or may not have
    weight: float
    charged: int  # it holds this, or has it reserved


def claim(
    floor: int, cap: int, weight: float, charged: int, wanted: int, asleep: bool = False
) -> Claim:
    """The claim that a member's terms make. One that is asleep lends its floor out."""
    low = 0 if asleep else min(floor, cap)
    return Claim(low, max(low, min(cap, wanted)), weight, charged)


def fair_shares(budget: int, claims: Sequence[Claim]) -> list[int]:
    """What each may hold: low + level x weight, at most high; sums to at most the budget.

    The lows together are at most the budget (`Ledger` refuses other floors). Ties are broken by
    the order of the claims, so that every process computes the same.
    """
    shares = [low for low, _, _, _ in claims]
    rest = max(0, budget - sum(shares))
    steps = sorted(
        [
            ((high - low) / weight, i, high - low, weight)
            for i, (low, high, weight, _) in enumerate(claims)
            if high > low
        ]
    )
    ahead = 0.0
    weights = [ahead := ahead + weight for _, _, _, weight in reversed(steps)]
    for _, i, most, weight in steps:
        part = min(most, int(rest * (weight / weights.pop())))
        shares[i] += part
        rest -= part
    return shares


def grant(
    budget: int, claims: Sequence[Claim], shares: Sequence[int], mine: int, nbytes: int
) -> int:
    """How many of nbytes claim `mine` may take now.

    Up to its fair share, of what is free; above its own floor it leaves free what others lack of
    theirs. Its wanted bytes count nbytes in already.
    """
    low, _, _, charged = claims[mine]
    free = budget - sum([each.charged for each in claims])
    room = min(nbytes, shares[mine] - charged, free)
    lacking = sum([each.low - each.charged for each in claims if each.low > each.charged])
    below_floor = max(0, low - charged)
    return max(0, min(room, below_floor), min(room, free - lacking + below_floor))


def spare(budget: int, claims: Sequence[Claim], shares: Sequence[int], mine: int) -> int:
    """Bytes that claim `mine` may borrow: free ones that no share of the others covers."""
    others = sum(
        [
            max(c.charged, s)
            for i, (c, s) in enumerate(zip(claims, shares, strict=True))
            if i != mine
        ]
    )
    return max(0, budget - others - claims[mine].charged)


def owed(budget: int, claims: Sequence[Claim], shares: Sequence[int], band: int = 0) -> list[int]:
    """What each must give back now, so that all who are below their fair share can reach it.

    Nobody owes while the free bytes are enough. Excess up to `band` is not asked for, unless
    somebody is below his floor: two busy members at their shares do not fight over a few pages.
    """
    over = [each.charged - share for each, share in zip(claims, shares, strict=True)]
    need = -sum([each for each in over if each < 0])
    short = need - (budget - sum([each.charged for each in claims]))
    if short <= 0:
        return [0] * len(claims)
    if any(each.charged < each.low for each in claims):
        band = 0
    excess = [each if each > band else 0 for each in over]
    total = sum(excess)
    if total <= short:
        return [max(0, each) for each in excess]
    return [-(-each * short // total) for each in excess]
