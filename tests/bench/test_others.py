"""Processors that other programs took."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from typing import NamedTuple

import psutil
import pytest

from tiermem.bench.others import Others


class Everybody(NamedTuple):
    user: float
    nice: float
    system: float
    idle: float
    iowait: float
    guest: float
    guest_nice: float


@dataclass
class Clocks:
    """What the system says of everybody and of us, and what time it is."""

    everybody: Everybody
    ours: os.times_result
    now: float


def test_what_we_and_our_children_used_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    clocks = Clocks(
        Everybody(100.0, 50.0, 20.0, 400.0, 7.0, 30.0, 2.0),
        os.times_result((5.0, 1.0, 2.0, 0.5, 0.0)),
        10.0,
    )
    monkeypatch.setattr(psutil, "cpu_times", lambda: clocks.everybody)
    monkeypatch.setattr(os, "times", lambda: clocks.ours)
    monkeypatch.setattr(time, "perf_counter", lambda: clocks.now)
    others = Others()
    # In 4 s: 3 + 1 + 1 s of user, nice and system time, of which 1 s guests, 2 s ours.
    clocks.everybody = Everybody(103.0, 51.0, 21.0, 402.0, 8.0, 31.0, 2.0)
    clocks.ours = os.times_result((5.5, 1.25, 3.0, 0.75, 4.0))
    clocks.now = 14.0
    assert others.cores() == pytest.approx((5 - 2) / 4)
