"""How large SGLang's pool is: frames on the GPU and pages with an address, from a configuration."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tiermem import drive, units
from tiermem.assemble import RING_SLOTS, survey
from tiermem.config import Config, load
from tiermem.errors import ConfigError
from tiermem.integrations.sglang_gates import RESERVED

LEAST_FRAMES = 3
"""Padding, a page to read and a page to write."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """Pages of one rank in each tier."""

    gpu: int
    host: int
    nvme: int
    rings: int = 0
    """Of the host pages, those that bytes cross through between a GPU and its drive."""

    @property
    def virtual(self) -> int:
        """Pages that SGLang may hand out.

        Each has a place below the GPU, so that a whole batch can give way to another one; with
        small tiers below, those that are on the GPU at once.
        """
        return max(self.gpu - RESERVED, self.host - self.rings + self.nvme)


def rank_config(config: Config, page_bytes: int, device: str, ranks: int, rank: int = 0) -> Config:
    """The configuration of one of `ranks` processes on this machine that serve one model.

    gpu.budget is each one's; host memory and drive are shared out equally. Metrics come on the
    port of rank 0 and those behind it. device: "cpu", "cuda:0".
    """
    given = config.settings()
    overrides: dict[str, object] = {"gpu.page": page_bytes, "gpu.device": device}
    for key in ("host.capacity", "nvme.capacity"):
        size = given[key]
        assert isinstance(size, int | float), "capacities are sizes"
        overrides[key] = size // ranks if isinstance(size, int) else size / ranks
    if config.metrics.port is not None:
        overrides["metrics.port"] = config.metrics.port + rank
    if config.trace.path is not None and rank:
        overrides["trace.path"] = str(config.trace.path.with_suffix(f".rank{rank}"))
    if config.nvme.path is None:
        del overrides["nvme.capacity"]
    return _overridden(config, overrides)


def plan(
    config: Config, page_bytes: int, stock_bytes: int, agree: Callable[[list[int]], list[int]]
) -> Sizes:
    """What fits on this machine: at most what SGLang itself found free, the same on all ranks.

    config: of one rank. agree: the least of each number over all ranks.
    """
    ground = survey(config)
    gpu = min(ground.sizes.gpu, stock_bytes) // page_bytes
    host = ground.sizes.host // page_bytes
    nvme = drive.slots_in(config, ground.sizes.nvme, page_bytes)
    gpu, host, nvme = agree([gpu, host, nvme])
    bounced = nvme and config.gpu.device != "cpu"
    sizes = Sizes(gpu, host, nvme, 2 * min(RING_SLOTS, host // 8) if bounced else 0)
    if sizes.gpu < LEAST_FRAMES:
        raise ConfigError(
            f"sglang: {sizes.gpu} pages of {units.format_bytes(page_bytes)} fit on the GPU, at "
            f"least {LEAST_FRAMES} are needed (gpu.budget = {ground.sizes.gpu} bytes, SGLang found "
            f"{stock_bytes} free); raise gpu.budget or --mem-fraction-static"
        )
    return sizes


def opened(config: Config, sizes: Sizes, page_bytes: int) -> Config:
    """The configuration that a rank's space is opened with: sizes that all ranks agreed on."""
    from tiermem.nvme.cap import bytes_for

    overrides: dict[str, object] = {
        "gpu.budget": sizes.gpu * page_bytes,
        "host.capacity": sizes.host * page_bytes,
    }
    if sizes.nvme:
        overrides["nvme.capacity"] = bytes_for(sizes.nvme, page_bytes)
    return _overridden(config, overrides)


def staged(config: Config, nbytes: int) -> Config:
    """A configuration whose GPU tier is `nbytes` of staging memory, and given away at once."""
    return _overridden(config, {"gpu.budget": nbytes, "gpu.high": 1.0, "gpu.low": 1.0})


def _overridden(config: Config, overrides: dict[str, object]) -> Config:
    """A configuration whose file is still followed while it runs, with other values."""
    given = config.settings()
    kept = {key: given[key] for key in given if config.source(key) in ("code", "override")}
    return load(config.file, overrides={**kept, **overrides})
