"""Copies from one slot of a host tier to another, on a thread of its own."""

from __future__ import annotations

import numpy as np

from tiermem.errors import DriverError
from tiermem.native import Kind, Program, Queue, Ticket, function, group
from tiermem.tier import Fence, Memory, Place, Slots


class WithinRoute:
    """Moves whole slots of one host tier: a `Route` from HOST to HOST. See `Planner.confine`."""

    src = Place.HOST
    dst = Place.HOST

    def __init__(self, host: Memory) -> None:
        self._host = host
        self._memcpy = function("memcpy")
        self._queue = Queue("tm-within-host")

    def submit(self, src: Slots, dst: Slots, after: Fence) -> Ticket:
        if len(src) != len(dst) or not len(src) or np.isin(src, dst).any():
            raise DriverError(
                f"{self._queue.name}: {len(src)} slots into {len(dst)}, or into itself"
            )
        if after.ticks:
            raise DriverError(f"{self._queue.name}: no stream writes host slots, a fence was given")
        host = self._host
        to, start = host.addresses(dst), host.addresses(src)
        copies = group(self._memcpy, Kind.PLAIN, to, start, host.slot_bytes)
        return self._queue.submit(Program(copies, entries=len(src)))

    def close(self) -> None:
        self._queue.close()
