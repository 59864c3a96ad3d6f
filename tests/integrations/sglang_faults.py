"""Faults that are planted in a scheduler's process before SGLang hooks tiermem in, by name.

Imported by the child, in an environment with SGLang.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tiermem.assemble import Parts
from tiermem.integrations import sglang_hooks, sglang_state
from tiermem.integrations.sglang_engine import Engine
from tiermem.integrations.sglang_layers import LayerWaits
from tiermem.slices import Arriving
from tiermem.testing import LateRoute
from tiermem.tier import Place

Step = Callable[..., None]


def install(name: str) -> None:
    FAULTS[name]()


def without_residency() -> None:
    """Pages are not made resident."""
    sglang_hooks.step = lambda *args, **kwargs: None


def spoil_running() -> None:
    """In the fourth decode step of three requests the first has gone to a drive that goes bad."""
    seen = []

    def spoil(scheduler: Any, batch: Any) -> None:
        if not batch.forward_mode.is_decode() or len(batch.reqs) < 3:
            return
        seen.append(batch)
        if len(seen) != 4:
            return
        engine = sglang_state.engine()
        pages = engine.residence.pages(batch.reqs[0])
        assert pages is not None
        engine.residence.release(batch.reqs[0])
        engine.region.hint(pages, "cold")
        engine.space.drain()
        _take_the_frames(engine)
        [slab] = Path(os.environ["SLAB"]).glob("*.slab")
        os.truncate(slab, 4096)

    _before_step(spoil)


def _take_the_frames(engine: Engine) -> None:
    """Pages that have left come back for nothing as long as nobody has had their frames."""
    region = engine.region
    free = engine.space.budget() - int((region.where() == Place.GPU).sum())
    unused = np.arange(region.pages - free, region.pages, dtype=np.int32)
    region.allocate(free, pages=unused)
    region.free(unused)
    engine.space.drain()


def abort_a_chunk() -> None:
    """A request is aborted in its third chunk."""
    from sglang.srt.managers.io_struct import AbortReq

    seen = []

    def abort(scheduler: Any, batch: Any) -> None:
        if scheduler.chunked_req is None:
            return
        seen.append(batch)
        if len(seen) == 3:
            scheduler.abort_request(AbortReq(rid=scheduler.chunked_req.rid))

    _before_step(abort)


def two_are_worth_it() -> None:
    """A load of more than two pages of a prefix always takes longer than to compute them."""
    Engine._worth = lambda self, pages: min(len(pages), 2)  # type: ignore[method-assign]


def all_are_worth_it() -> None:
    """No load is declined, however slow this machine's drive is beside its processors."""
    Engine._worth = lambda self, pages: len(pages)  # type: ignore[method-assign]


def late_loads() -> None:
    """A slice of a load arrives when somebody waits for it; how many batches such loads ran beside
    stands in the file SEEN."""
    space: Any = importlib.import_module("tiermem.space")
    assemble = space.assemble

    def late(*args: Any) -> Parts:
        parts: Parts = assemble(*args)
        host: Any = parts.tiers[Place.HOST]
        parts.routes[Place.HOST, Place.GPU] = LateRoute(host, parts.device.frames)
        return parts

    space.assemble = late
    end = LayerWaits.end

    def noted(self: LayerWaits) -> bool:
        Path(os.environ["SEEN"]).write_text(str(self.overlapped))
        return end(self)

    LayerWaits.end = noted  # type: ignore[method-assign]


def late_loads_that_nobody_waits_for() -> None:
    """As above, and what SGLang asks for before it reads a layer is forgotten."""
    late_loads()
    wait = LayerWaits.wait_until
    noted = LayerWaits.end

    def forget(self: LayerWaits, layer: int) -> None:
        arriving, self._arriving = self._arriving, Arriving()
        wait(self, layer)
        self._arriving = arriving

    def hide(self: LayerWaits) -> bool:
        noted(self)
        return True

    LayerWaits.wait_until = forget  # type: ignore[method-assign]
    LayerWaits.end = hide  # type: ignore[method-assign]


def _before_step(do: Callable[[Any, Any], None]) -> None:
    step: Step = sglang_hooks.step

    def both(scheduler: Any, batch: Any, *args: Any, **kwargs: Any) -> None:
        do(scheduler, batch)
        step(scheduler, batch, *args, **kwargs)

    sglang_hooks.step = both


_ALL = (
    without_residency, spoil_running, abort_a_chunk, two_are_worth_it, all_are_worth_it, late_loads,
    late_loads_that_nobody_waits_for,
)  # fmt: skip
FAULTS = {each.__name__: each for each in _ALL}
