"""KV-cache memory at addresses that stay, over GPU memory, pinned host memory and NVMe.

Names are loaded when they are first used; importing the package touches neither CUDA nor torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tiermem.config import (
        Config,
        Evict,
        Gpu,
        Host,
        Log,
        Metrics,
        Nvme,
        Prefetch,
        Shadow,
        Share,
        Trace,
    )
    from tiermem.config import load as load
    from tiermem.errors import (
        BadPolicy,
        BadTrace,
        Closed,
        ConfigError,
        DriverError,
        NotOurs,
        PageInUse,
        PageLost,
        TierFailed,
        TierFull,
        TierMemError,
    )
    from tiermem.region import Hint, Region
    from tiermem.slices import Arriving
    from tiermem.space import Space

__version__ = "0.1.0"

__all__ = [
    "Arriving",
    "BadPolicy",
    "BadTrace",
    "Closed",
    "Config",
    "ConfigError",
    "DriverError",
    "Evict",
    "Gpu",
    "Hint",
    "Host",
    "Log",
    "Metrics",
    "NotOurs",
    "Nvme",
    "PageInUse",
    "PageLost",
    "Prefetch",
    "Region",
    "Shadow",
    "Share",
    "Space",
    "TierFailed",
    "TierFull",
    "TierMemError",
    "Trace",
    "__version__",
    "load",
]

if not TYPE_CHECKING:  # a checker must see that a misspelt name does not exist
    _HOMES = tuple(f"tiermem.{name}" for name in ("errors", "config", "region", "slices", "space"))

    def __getattr__(name: str) -> object:
        from importlib import import_module

        for home in _HOMES if name in __all__ else ():
            module = import_module(home)
            if hasattr(module, name):
                globals()[name] = getattr(module, name)
                return globals()[name]
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__() -> list[str]:
        return sorted(__all__)
