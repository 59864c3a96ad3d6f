"""How long SGLang's scheduler and tiermem's part of it take, written down by its process.

SGLang's own (`THEIRS`) are without hooks before and after them, and with what runs inside them;
hooks around a function of SGLang are without that function. `mover` is processor time of the thread
that tidies up beside the scheduler, and has the interpreter lock for most of it.
"""

from __future__ import annotations

import json
import os
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

PATH = "SGLANG_GPU_HOOKS"
THEIRS = (
    "process_input_requests", "get_next_batch_to_run", "run_batch", "process_batch_result",
)  # fmt: skip
AROUND = ("fits_decode", "shared", "released", "matched")
PLAIN = ("look", "step", "computed", "queued", "capped", "extended", "decoded", "withhold")
PARTS = (
    ("tiermem.integrations.sglang_compat", "probe"),
    ("tiermem.integrations.sglang_compat", "matched_pages"),
    ("tiermem.integrations.sglang_engine.Engine", "usable"),
    ("tiermem.integrations.sglang_engine.Engine", "promote"),
    ("tiermem.integrations.sglang_engine.Engine", "bring"),
    ("tiermem.integrations.sglang_engine.Engine", "release"),
    ("tiermem.integrations.sglang_residence.Residence", "ensure"),
    ("tiermem.integrations.sglang_residence.Residence", "unprepare"),
    ("tiermem.integrations.sglang_layers.LayerWaits", "wait_until"),
    ("tiermem.slices.Arriving", "order"),
    ("tiermem.integrations.sglang_residence.Residence", "forget"),
    ("tiermem.pager.Pager", "use"),
    ("tiermem.pager.Pager", "allocate"),
    ("tiermem.pager.Pager", "_start"),
    ("tiermem.pager.Pager", "_await_any"),
    ("tiermem.pager.Pager", "_await_all"),
)
"""Of hooks, from the outside in: each is in the time of the one that calls it."""


class Times:
    """Seconds and calls of everything so far."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._spent: dict[str, list[float]] = defaultdict(lambda: [0, 0.0])

    def watch(self) -> None:
        """Time what runs from now on; called before SGLang loads its plugins."""
        from sglang.srt.managers.scheduler import Scheduler

        for name in THEIRS:
            setattr(Scheduler, name, self._timed(name, getattr(Scheduler, name)))
        Scheduler.process_batch_result = self._telling(Scheduler.process_batch_result)
        if os.environ.get("TIERMEM") == "1":
            self._watch_hooks()

    def _watch_hooks(self) -> None:
        from tiermem import space
        from tiermem.integrations import sglang_hooks as hooks

        for name in PLAIN:
            setattr(hooks, name, self._timed(name, getattr(hooks, name)))
        for name in AROUND:
            setattr(hooks, name, self._timed_around(name, getattr(hooks, name)))
        for owner, name in PARTS:
            _replace(owner, name, self._timed)
        space.Space._turn = self._timed("mover", space.Space._turn, time.thread_time)  # type: ignore[method-assign]

    def _timed(self, name: str, right: Any, clock: Callable[[], float] = time.perf_counter) -> Any:
        def timing(*args: Any, **more: Any) -> Any:
            start = clock()
            try:
                return right(*args, **more)
            finally:
                self._add(name, clock() - start)

        return timing

    def _timed_around(self, name: str, right: Any) -> Any:
        def timing(original: Callable[..., Any], *args: Any, **more: Any) -> Any:
            theirs_s = 0.0

            def inner(*given: Any, **named: Any) -> Any:
                nonlocal theirs_s
                start = time.perf_counter()
                try:
                    return original(*given, **named)
                finally:
                    theirs_s += time.perf_counter() - start

            start = time.perf_counter()
            try:
                return right(inner, *args, **more)
            finally:
                self._add(name, time.perf_counter() - start - theirs_s)

        return timing

    def _telling(self, right: Any) -> Any:
        """Around what ends a batch: after a prefill all that was spent so far is written down."""

        def telling(scheduler: Any, batch: Any, *args: Any, **more: Any) -> Any:
            is_prefill = batch.forward_mode.is_extend()
            answer = right(scheduler, batch, *args, **more)
            if is_prefill:
                self._write()
            return answer

        return telling

    def _add(self, name: str, seconds: float) -> None:
        spent = self._spent[name]
        spent[0] += 1
        spent[1] += seconds

    def _write(self) -> None:
        fresh = self._path.with_suffix(".tmp")
        fresh.write_text(json.dumps(self._spent))
        fresh.rename(self._path)


def _replace(owner: str, name: str, timed: Callable[[str, Any], Any]) -> None:
    import pkgutil

    found = pkgutil.resolve_name(owner)
    setattr(found, name, timed(f"{owner.rpartition('.')[2]}.{name}", getattr(found, name)))


def watch() -> None:
    """In a process of SGLang: begin, if the bench asks for it."""
    path = os.environ.get(PATH)
    if path is not None:
        Times(Path(path)).watch()


def told() -> dict[str, list[float]]:
    """In the process that asks: {name: [calls, seconds]} until the last request that ended."""
    path = os.environ.get(PATH)
    if path is None or not Path(path).exists():
        return {}
    found: dict[str, list[float]] = json.loads(Path(path).read_text())
    return found


def between(
    before: dict[str, list[float]], after: dict[str, list[float]], requests: int
) -> dict[str, dict[str, float]]:
    """Calls and milliseconds a request."""
    nothing = [0, 0.0]
    return {
        name: {
            "calls": (calls - before.get(name, nothing)[0]) / requests,
            "ms": (seconds - before.get(name, nothing)[1]) / requests * 1e3,
        }
        for name, (calls, seconds) in after.items()
    }


def mean(
    requests: list[dict[str, dict[str, float]]],
) -> dict[str, dict[str, float]]:
    """Of what `between` says of single requests."""
    names = sorted({name for request in requests for name in request})
    nothing = {"calls": 0.0, "ms": 0.0}
    return {
        name: {
            what: sum(request.get(name, nothing)[what] for request in requests) / len(requests)
            for what in nothing
        }
        for name in names
    }
