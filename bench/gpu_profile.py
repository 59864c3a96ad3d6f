"""Where the time of a load goes: the parts of `Pager.use`, timed one by one, each by wall clock.

Waiting is a part of its own: what is left of a group's time besides is the interpreter's.
"""

from __future__ import annotations

import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).parents[1]))

from tiermem.bench import paging
from tiermem.bench.rig import Rig, Shape, rig
from tiermem.executor import Executor, Flight
from tiermem.pager import Pager
from tiermem.planner import Planner

GROUPED = (paging.load, paging.steal)


class Parts:
    """us of every call of the functions that it watches, by name."""

    def __init__(self) -> None:
        self.took: dict[str, list[float]] = defaultdict(list)

    @contextmanager
    def watch(self, *functions: tuple[type, str]) -> Iterator[None]:
        """Replace methods of classes by timed ones for the length of the block."""
        with ExitStack() as stack:
            for owner, name in functions:
                timed = self._timed(f"{owner.__name__}.{name}", getattr(owner, name))
                stack.enter_context(mock.patch.object(owner, name, timed))
            yield

    def _timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*given: Any, **named: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*given, **named)
            finally:
                self.took[name].append((time.perf_counter() - start) * 1e6)

        return timed


def parts_of(r: Rig) -> tuple[tuple[type, str], ...]:
    """What a load passes through, outermost first; the device's own by their classes."""
    routes = {type(route) for route in r.space.pager.executor._routes.values()}
    return (
        (Pager, "use"),
        (Planner, "fault"),
        (Executor, "start"),
        (type(r.space.device.window), "show"),
        (type(r.space.device.window), "hide"),
        *((route, "submit") for route in routes),
        (Flight, "order"),
        (Flight, "wait"),
        (Pager, "settle_ready"),
        (Pager, "unpin"),
    )


def profile(shapes: dict[str, Shape], rounds: int) -> dict[str, object]:
    """us of each call, per part, while groups are loaded and single pages are faulted in."""
    found: dict[str, object] = {}
    for name, shape in shapes.items():
        for scene in GROUPED:
            parts = Parts()
            eager = scene is paging.load
            with rig(shape, "eager" if eager else "lazy") as r:
                laps = scene(r)
                next(laps)
                with parts.watch(*parts_of(r)):
                    for _ in range(rounds):
                        next(laps)
                laps.close()
            found |= {f"{scene.__name__}_{name}_{k}_us": v for k, v in parts.took.items()}
        parts = Parts()
        with rig(shape, "eager") as r, parts.watch(*parts_of(r)):
            found[f"fault_{name}_us"] = paging.fault_us(r, 300, stealing=False)
        found |= {f"fault_{name}_{k}_us": v for k, v in parts.took.items()}
    return found
