"""Python threads beside an engine's own: how soon its thread gets the interpreter lock back."""

from __future__ import annotations

import sys

SWITCH_S = 0.0005
"""Instead of Python's 5 ms. In an engine's process threads of ours, and its own that talk to
clients, run Python beside the one that makes steps. Whenever that one gives the lock up, in a
driver call or for a large array, it waits for it so long. Beside a thread of pure Python the pager
came to 17-73 % of its quiet rate with 5 ms, and to 72 % and more with 0.2 (`python
bench/gpu_pager.py --only streams busy --device cpu`, 2 cores, 2026-11)."""


def switch_sooner() -> None:
    """Threads of this process keep the interpreter lock for SWITCH_S at most, or shorter as set."""
    sys.setswitchinterval(min(sys.getswitchinterval(), SWITCH_S))
