"""The sections of a configuration: their keys, readers, defaults and lines of help."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import ClassVar, Literal

from tiermem.settings import (
    BadValue,
    Key,
    Section,
    Setting,
    Size,
    arguments,
    at_least,
    choice,
    default,
    flag,
    mark,
    optional,
    page,
    path,
    port,
    positive,
    rate,
    rated,
    seconds,
    size,
    sized,
    text,
    texts,
)

CUDA_PAGE = 2 * 2**20
SMALLEST_PAGE = 4096
_POLICY = text(r"\S+", '"lru" or "my_module:MyPolicy"')


class Gpu(Section, frozen=True, kw_only=True):
    """GPU memory: how much of it, in pages of what size, and when to make room."""

    keys: ClassVar[dict[str, Key]] = {
        "device": Key(text(r"auto|cpu|cuda(:\d+)?", "auto, cpu, cuda:0"), "auto | cpu | cuda:0"),
        "budget": Key(
            at_least(SMALLEST_PAGE), "most bytes held on the GPU, or a part of it", sized
        ),
        "page": Key(page, "unit of mapping, or auto; on CUDA a multiple of 2MiB", sized),
        "high": Key(mark, "make room once this part of the budget is in use ..."),
        "low": Key(mark, "... until this part is"),
        "hide": Key(
            choice("lazy", "eager"), "lazy: unmap a page when its frame is needed; eager: at once"
        ),
        "guard": Key(flag, "show a guard page where no page is"),
    }
    device: str = "auto"
    budget: Setting[Size] = default(0.9)
    page: Setting[int | Literal["auto"]] = default("auto")
    high: float = 0.95
    low: float = 0.90
    hide: Literal["lazy", "eager"] = "lazy"
    guard: bool = False

    def agree(self) -> None:
        self.ordered("low", "high")
        if self.page == "auto":
            return
        if self.device.startswith("cuda") and self.page % CUDA_PAGE:
            raise BadValue("gpu.page", self.page, "on CUDA a page is a multiple of 2MiB")
        if isinstance(self.budget, int) and self.budget < self.page:
            raise BadValue("gpu.budget", self.budget, f"less than gpu.page = {self.page}")


class Host(Section, frozen=True, kw_only=True):
    """Pinned host memory."""

    keys: ClassVar[dict[str, Key]] = {
        "capacity": Key(
            size, "pinned bytes, or a part of what this process may use; 0 = off", sized
        ),
        "high": Key(mark, "make room once this part is in use ..."),
        "low": Key(mark, "... until this part is"),
        "read_in_place": Key(flag, "let kernels read large, rarely read pages where they are"),
    }
    capacity: Setting[Size] = default(0.25)
    high: float = 0.95
    low: float = 0.90
    read_in_place: bool = False

    @property
    def enabled(self) -> bool:
        return self.capacity != 0

    def agree(self) -> None:
        self.ordered("low", "high")


class Nvme(Section, frozen=True, kw_only=True):
    """A slab file on a local drive; off unless a path is given."""

    keys: ClassVar[dict[str, Key]] = {
        "path": Key(optional(path), "directory on a local drive, made 0700; off = no NVMe tier"),
        "capacity": Key(size, "bytes on disk, metadata included, or a part of what is free", sized),
        "mode": Key(
            choice("auto", "kvikio", "posix", "off"), "auto (probed) | kvikio | posix | off"
        ),
        "persist": Key(flag, "keep the pages for the next start"),
        "save_s": Key(seconds, "most seconds for saving labelled pages when closing; 0: do not"),
        "encrypt": Key(flag, "AES-256-GCM; the key ends with the process, or is in key_file"),
        "key_file": Key(optional(path), "the key; off = beside the slab, if that is kept"),
        "write_budget": Key(optional(rate), "most bytes written per second; off = no limit", rated),
        "admit": Key(
            choice("all", "second", "reuse"), "what is written: all | second use | likely reuse"
        ),
        "high": Key(mark, "make room once this part is in use ..."),
        "low": Key(mark, "... until this part is"),
        "verify": Key(flag, "check every read against its checksum; cannot be turned off"),
    }
    path: Setting[Path | None] = default(None)
    capacity: Setting[Size] = default(0.5)
    mode: Literal["auto", "kvikio", "posix", "off"] = "auto"
    persist: bool = False
    save_s: float = 30.0
    encrypt: bool = False
    key_file: Setting[Path | None] = default(None)
    write_budget: Setting[int | None] = default(None)
    admit: Literal["all", "second", "reuse"] = "all"
    high: float = 0.98
    low: float = 0.95
    verify: bool = True

    @property
    def enabled(self) -> bool:
        return self.path is not None and self.mode != "off" and self.capacity != 0

    def agree(self) -> None:
        self.ordered("low", "high")
        if not self.verify:
            raise BadValue("nvme.verify", False, "bytes read from a disk are always verified")
        if self.key_file is not None and not self.encrypt:
            raise BadValue("nvme.key_file", self.key_file, "needs nvme.encrypt = true as well")
        if self.path is None and self.mode != "off" and self.capacity != 0:
            for key in ("mode", "persist", "encrypt", "capacity"):
                if getattr(self, key) != self.default_of(key):
                    raise BadValue(self.dotted(key), getattr(self, key), "needs nvme.path as well")


class Evict(Section, frozen=True, kw_only=True):
    """Which policy ranks the units of each tier: a name, or "my_module:MyPolicy"."""

    keys: ClassVar[dict[str, Key]] = {
        "gpu": Key(_POLICY, 'a policy by name, or "my_module:MyPolicy"'),
        "host": Key(_POLICY, "the same for pinned host memory"),
        "nvme": Key(_POLICY, "the same for the drive"),
        "gpu_params": Key(arguments, "further arguments of the GPU tier's policy"),
        "host_params": Key(arguments, "the same for pinned host memory"),
        "nvme_params": Key(arguments, "the same for the drive"),
    }
    gpu: str = "classq"
    host: str = "classq"
    nvme: str = "lru"
    gpu_params: Mapping[str, object] = {}
    host_params: Mapping[str, object] = {}
    nvme_params: Mapping[str, object] = {}


class Prefetch(Section, frozen=True, kw_only=True):
    """What is loaded before it is asked for."""

    keys: ClassVar[dict[str, Key]] = {
        "name": Key(_POLICY, 'none / queue / hint, or "my_module:MyPrefetch"; off = none'),
        "budget": Key(
            at_least(SMALLEST_PAGE),
            "most bytes loaded ahead and not used yet, or a part of gpu.budget",
            sized,
        ),
        "params": Key(arguments, "arguments of the policy"),
    }
    name: str = "off"
    budget: Setting[Size] = default(0.1)
    params: Mapping[str, object] = {}

    @property
    def enabled(self) -> bool:
        return self.name not in ("off", "none")


class Shadow(Section, frozen=True, kw_only=True):
    """Policies on trial beside the one that runs: they rank a sample, and move nothing."""

    keys: ClassVar[dict[str, Key]] = {
        "policies": Key(texts(r"\S.*", '"lru", "s3fifo(small=0.2)"'), "candidates; [] = no trial"),
        "sample": Key(mark, "part of the sessions that they see, and of the capacity"),
        "tier": Key(
            choice("gpu", "host", "nvme"),
            "gpu | host | nvme: they hold what the tiers down to this one hold together",
        ),
    }
    policies: Setting[tuple[str, ...]] = default(())
    sample: float = 0.0625
    tier: Literal["gpu", "host", "nvme"] = "gpu"


class Share(Section, frozen=True, kw_only=True):
    """What this process may claim of a GPU that several engines share."""

    keys: ClassVar[dict[str, Key]] = {
        "floor": Key(size, "bytes that nobody takes away, or a part of the GPU's memory", sized),
        "cap": Key(
            optional(at_least(SMALLEST_PAGE)), "most bytes by lease; off = gpu.budget", sized
        ),
        "weight": Key(positive, "share of what is free, against the others' weights"),
        "group": Key(
            optional(text(r"[A-Za-z0-9_.-]{1,32}", '"team-a"')),
            "engines of one group share; off = no sharing, unless a key below or above is set",
        ),
        "name": Key(optional(text(r"[ -~]{1,48}", '"chat-8b"')), "what `tiermem top` calls it"),
        "total": Key(
            at_least(SMALLEST_PAGE), "most bytes of the whole group, or a part of the GPU", sized
        ),
        "host": Key(
            optional(at_least(SMALLEST_PAGE)),
            "pinned host memory of all engines together; off = each has host.capacity of its own",
            sized,
        ),
        "idle_s": Key(positive, "after so many seconds without use, pages count as cold"),
    }
    floor: Setting[Size] = default(0)
    cap: Setting[Size | None] = default(None)
    weight: float = 1.0
    group: str | None = None
    name: str | None = None
    total: Setting[Size] = default(0.9)
    host: Setting[Size | None] = default(None)
    idle_s: float = 60.0

    @property
    def enabled(self) -> bool:
        """Whether anything was asked for."""
        return any(getattr(self, key) != self.default_of(key) for key in self.keys)

    @property
    def group_name(self) -> str:
        return self.group or "default"


class Trace(Section, frozen=True, kw_only=True):
    """The event log, for replay and tuning."""

    keys: ClassVar[dict[str, Key]] = {"path": Key(optional(path), "file for events; off = none")}
    path: Setting[Path | None] = default(None)


class Metrics(Section, frozen=True, kw_only=True):
    """Prometheus metrics over HTTP."""

    keys: ClassVar[dict[str, Key]] = {"port": Key(optional(port), "TCP port; off = none")}
    port: Setting[int | None] = default(None)


class Log(Section, frozen=True, kw_only=True):
    """What is logged; the variable TIERMEM_LOG goes before the file."""

    keys: ClassVar[dict[str, Key]] = {
        "level": Key(choice("debug", "info", "warning", "error"), "debug | info | warning | error")
    }
    level: Literal["debug", "info", "warning", "error"] = "warning"


SECTIONS: Mapping[str, type[Section]] = MappingProxyType(
    {
        cls.__name__.lower(): cls
        for cls in (Gpu, Host, Nvme, Evict, Prefetch, Shadow, Share, Trace, Metrics, Log)
    }
)
KEYS = tuple(f"{name}.{key}" for name, cls in SECTIONS.items() for key in cls.keys)
RUNNING = frozenset(
    [f"{tier}.{mark}" for tier in ("gpu", "host", "nvme") for mark in ("high", "low")]
    + [f"evict.{key}" for key in Evict.keys]
    + [f"prefetch.{key}" for key in Prefetch.keys]
    + [f"shadow.{key}" for key in Shadow.keys]
    + ["nvme.admit", "nvme.save_s", "nvme.write_budget", "log.level"]
)
"""Keys that may change while a space is open."""
