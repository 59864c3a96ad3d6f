"""tiermem: KV-cache memory at addresses that stay, over GPU memory, pinned host memory and NVMe.

    import tiermem

    with tiermem.Space.open(tiermem.load()) as space, space.reserve("1GiB", name="kv") as region:
        pages = region.allocate(16)
        ...

Names are loaded when they are first used; importing the package touches neither CUDA nor torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tiermem.config import Config, Evict, Gpu, Host, Log, Metrics, Nvme, Prefetch, Share, Trace
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

__version__ = "0.1.0"

_HOME = {
    "tiermem.config": (
        "Config",
        "Evict",
        "Gpu",
        "Host",
        "Log",
        "Metrics",
        "Nvme",
        "Prefetch",
        "Share",
        "Trace",
        "load",
    ),
    "tiermem.errors": (
        "BadPolicy",
        "BadTrace",
        "Closed",
        "ConfigError",
        "DriverError",
        "NotOurs",
        "PageInUse",
        "PageLost",
        "TierFailed",
        "TierFull",
        "TierMemError",
    ),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}

__all__ = [
    "BadPolicy",
    "BadTrace",
    "Closed",
    "Config",
    "ConfigError",
    "DriverError",
    "Evict",
    "Gpu",
    "Host",
    "Log",
    "Metrics",
    "NotOurs",
    "Nvme",
    "PageInUse",
    "PageLost",
    "Prefetch",
    "Share",
    "TierFailed",
    "TierFull",
    "TierMemError",
    "Trace",
    "__version__",
    "load",
]


def __getattr__(name: str) -> object:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(importlib.import_module(_MODULE_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
