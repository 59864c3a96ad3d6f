"""What other programs took of the processors while something was measured."""

from __future__ import annotations

import os
import time

import psutil


class Others:
    """Counts from its making on; child processes of ours are ours once they have been waited for.

    Processors are those that the system shows: in a container, the whole machine's.
    """

    def __init__(self) -> None:
        self._busy_s, self._at = _busy_s(), time.perf_counter()

    def cores(self) -> float:
        """Processors in use by others, on average."""
        took_s = time.perf_counter() - self._at
        return max(0.0, _busy_s() - self._busy_s) / took_s


def _busy_s() -> float:
    """Processor seconds of everybody but us, since some time in the past."""
    everybody, ours = psutil.cpu_times(), os.times()
    idle = everybody.idle + getattr(everybody, "iowait", 0.0)
    guests = getattr(everybody, "guest", 0.0) + getattr(everybody, "guest_nice", 0.0)
    mine = ours.user + ours.system + ours.children_user + ours.children_system
    return float(sum(everybody) - idle - guests - mine)  # a guest's time is user time too
