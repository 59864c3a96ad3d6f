"""What a user may set: frozen sections, read from TOML, overrides and three variables.

    cfg = load("tiermem.toml")                       # else $TIERMEM_CONFIG, else the defaults
    cfg = load(overrides={"gpu.budget": "8GiB"})     # dotted keys, values or text
    cfg = Config(gpu=Gpu(budget="64MiB", page="64KiB"), host=Host(capacity="128MiB"))

All three go through the same readers. Sizes may be text ("40GiB", "25%"), int bytes or a float
fraction; they are kept as int bytes or as a float fraction, and `Config.resolve` turns fractions
into bytes once the totals are known. What cannot be meant raises ConfigError with key, value,
source (file and line where there is one) and the way out.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import msgspec

from tiermem import units
from tiermem.errors import ConfigError
from tiermem.sections import (
    KEYS,
    RUNNING,
    SECTIONS,
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
from tiermem.settings import BadValue, Section, Size, find_lines, nearest

__all__ = [
    "KEYS",
    "RUNNING",
    "SECTIONS",
    "VARIABLES",
    "Capacities",
    "Config",
    "Evict",
    "Gpu",
    "Host",
    "Log",
    "Metrics",
    "Nvme",
    "Prefetch",
    "Shadow",
    "Share",
    "Trace",
    "changed",
    "enabled",
    "load",
    "reload",
]

VARIABLES = ("TIERMEM", "TIERMEM_CONFIG", "TIERMEM_LOG")


@dataclass(frozen=True, slots=True)
class Capacities:
    """The sizes of a configuration in bytes, whole pages each; 0 = the tier is off."""

    gpu: int
    host: int
    nvme: int
    floor: int
    cap: int


class Config(msgspec.Struct, frozen=True, kw_only=True):
    """All settings; `sources` holds where `load` found those that it did not leave at default.

    file: the one that `load` read, if any; a space that is open follows it.
    """

    gpu: Gpu = Gpu()
    host: Host = Host()
    nvme: Nvme = Nvme()
    evict: Evict = Evict()
    prefetch: Prefetch = Prefetch()
    shadow: Shadow = Shadow()
    share: Share = Share()
    trace: Trace = Trace()
    metrics: Metrics = Metrics()
    log: Log = Log()
    sources: tuple[tuple[str, str], ...] = ()
    file: Path | None = None

    def __post_init__(self) -> None:
        floor, cap, budget = self.share.floor, self.share.cap, self.gpu.budget
        _not_above("share.cap", cap, "gpu.budget", budget)
        _not_above("share.floor", floor, "gpu.budget", budget)
        _not_above("share.floor", floor, "share.cap", cap)

    def resolve(
        self, *, page_bytes: int, gpu_total: int, host_total: int = 0, nvme_total: int = 0
    ) -> Capacities:
        """Sizes in bytes, rounded down to whole pages.

        gpu_total: bytes of the device; host_total: bytes that this process may use, cgroup limits
        counted in; nvme_total: bytes free under nvme.path. A tier that is off needs no total.
        Raises ConfigError for a size above its total or, in a tier that is on, below one page.
        """
        gpu = _whole_pages("gpu.budget", self.gpu.budget, gpu_total, page_bytes)
        host = nvme = 0
        if self.host.enabled:
            host = _whole_pages("host.capacity", self.host.capacity, host_total, page_bytes)
        if self.nvme.enabled:
            nvme = _whole_pages("nvme.capacity", self.nvme.capacity, nvme_total, page_bytes)
        cap = _bytes(self.share.cap, gpu_total) if self.share.cap is not None else gpu
        floor = _bytes(self.share.floor, gpu_total)
        _not_above("share.cap", cap // page_bytes * page_bytes, "gpu.budget", gpu)
        _not_above("share.floor", floor, "share.cap", cap)
        return Capacities(gpu, host, nvme, floor, cap)

    def settings(self) -> dict[str, object]:
        """Every value under its dotted key, in the order in which files are written."""
        return {
            f"{name}.{key}": getattr(section, key)
            for name, section in self.sections()
            for key in section.keys
        }

    def sections(self) -> Iterator[tuple[str, Section]]:
        for name in SECTIONS:
            yield name, getattr(self, name)

    def source(self, key: str) -> str:
        """Where a value is from: "file:line", "override", "$VARIABLE", "code" or "default"."""
        known = dict(self.sources)
        if key in known:
            return known[key]
        section, _, leaf = key.partition(".")
        value = getattr(getattr(self, section), leaf)
        return "default" if value == SECTIONS[section].default_of(leaf) else "code"

    def describe(self) -> list[str]:
        """The effective plan: one line a setting, with its source."""
        lines = [
            (f"{name}.{section.written(key)}", self.source(f"{name}.{key}"))
            for name, section in self.sections()
            for key in section.keys
        ]
        width = max(len(line) for line, _ in lines)
        return [f"{line:<{width}}  # {source}" for line, source in lines]

    def toml(self) -> str:
        """The configuration as commented TOML; what is at its default is commented out."""
        lines = ["# tiermem configuration; `tiermem config` shows what is in force and why."]
        for name, section in self.sections():
            lines += ["", f"# {(section.__doc__ or '').strip()}", f"[{name}]"]
            for key, kind in section.keys.items():
                mute = "# " if getattr(section, key) == section.default_of(key) else ""
                lines += [f"# {kind.help}", f"{mute}{section.written(key)}"]
        return "\n".join(lines) + "\n"


def load(
    path: str | os.PathLike[str] | None = None,
    env: Mapping[str, str] | None = None,
    overrides: Mapping[str, object] = MappingProxyType({}),
) -> Config:
    """The configuration of a file (else the one that $TIERMEM_CONFIG names, else the defaults).

    env: os.environ unless given. overrides: dotted keys, which go before file and variables.
    Raises ConfigError for a file that cannot be read, an unknown key or variable (with the nearest
    known one), and a value that cannot be meant; always with the source.
    """
    env = os.environ if env is None else env
    _refuse_unknown_variables(env)
    given: dict[str, object] = {}
    sources: dict[str, str] = {}
    file: Path | None = None
    if chosen := path or env.get("TIERMEM_CONFIG"):
        file = Path(chosen).expanduser().absolute()
        _read_file(
            Path(chosen).expanduser(), "argument" if path else "$TIERMEM_CONFIG", given, sources
        )
    if level := env.get("TIERMEM_LOG"):
        given["log.level"], sources["log.level"] = level.lower(), "$TIERMEM_LOG"
    for key, value in overrides.items():
        given[key], sources[key] = value, "override"
    for key in given:
        if key not in KEYS:
            raise ConfigError(f"{sources[key]}: unknown key {key}{nearest(key, KEYS)}")
    try:
        return _build(given, tuple(sources.items()), file)
    except BadValue as bad:
        source = sources.get(bad.key, "default")
        raise BadValue(bad.key, bad.value, bad.reason, source) from None


def enabled(env: Mapping[str, str] | None = None) -> bool:
    """Whether $TIERMEM turns tiermem on: 1, true, on, yes; unset, empty, 0, false, off, no."""
    given = (os.environ if env is None else env).get("TIERMEM", "")
    if given.lower() in ("1", "true", "on", "yes"):
        return True
    if given.lower() in ("", "0", "false", "off", "no"):
        return False
    raise ConfigError(f"TIERMEM={given!r}: write 1 to turn tiermem on, 0 to leave it off")


def changed(old: Config, new: Config) -> tuple[str, ...]:
    """The keys that differ, all of which may change while running; ConfigError if one may not."""
    before, after = old.settings(), new.settings()
    keys = tuple(key for key in KEYS if before[key] != after[key])
    if fixed := [key for key in keys if key not in RUNNING]:
        named = ", ".join(f"{key} ({new.source(key)})" for key in fixed)
        raise ConfigError(
            f"{named} cannot change while a space is open; close it, or leave the old value"
        )
    return keys


def _read_file(
    file: Path, chosen_by: str, given: dict[str, object], sources: dict[str, str]
) -> None:
    try:
        toml = file.read_text(encoding="utf-8")
        tables = msgspec.toml.decode(toml)
    except OSError as error:
        raise ConfigError(f"{file} ({chosen_by}) cannot be read: {error.strerror}") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} ({chosen_by}) is not TOML: {error}") from None
    lines = find_lines(toml)
    for name, table in tables.items():
        entries = table if isinstance(table, dict) else {"": table}
        for key, value in entries.items():
            dotted = f"{name}.{key}" if key else name
            line = lines.get(dotted) or lines.get(name)
            given[dotted] = value
            sources[dotted] = f"{file}:{line}" if line else str(file)
        if name not in SECTIONS and not entries:
            at = f"{file}:{lines.get(name)}"
            raise ConfigError(f"{at}: unknown section [{name}]{nearest(name, SECTIONS)}")


def reload(config: Config) -> Config:
    """The file of a configuration as it is now, under the same overrides. Raises as `load` does."""
    kept = config.settings()
    overrides = {key: kept[key] for key, source in config.sources if source == "override"}
    return load(config.file, overrides=overrides)


def _build(
    given: Mapping[str, object], sources: tuple[tuple[str, str], ...], file: Path | None
) -> Config:
    parts: dict[str, dict[str, object]] = {}
    for key, value in given.items():
        section, _, leaf = key.partition(".")
        parts.setdefault(section, {})[leaf] = value
    made = {name: SECTIONS[name](**values) for name, values in parts.items()}
    return Config(**made, sources=sources, file=file)  # type: ignore[arg-type]  # each under its own name


def _refuse_unknown_variables(env: Mapping[str, str]) -> None:
    for name in env:
        if name.startswith("TIERMEM") and name not in VARIABLES:
            raise ConfigError(
                f"${name} is unknown{nearest(name, VARIABLES)}; the variables are "
                f"{', '.join(VARIABLES)}, everything else belongs into the file"
            )


def _bytes(size: Size, total: int) -> int:
    return size if isinstance(size, int) else int(size * total)


def _whole_pages(key: str, size: Size, total: int, page_bytes: int) -> int:
    nbytes = _bytes(size, total)
    if nbytes > total:
        raise BadValue(key, units.format_exactly(size), f"{nbytes} bytes of {total} that there are")
    if nbytes < page_bytes:
        raise BadValue(
            key, units.format_exactly(size), f"{nbytes} bytes, less than one page of {page_bytes}"
        )
    return nbytes // page_bytes * page_bytes


def _not_above(key: str, size: Size | None, limit: str, most: Size | None) -> None:
    """Refuse what is larger, where the two are of one kind (bytes, or parts of the same whole)."""
    if size is not None and most is not None and type(size) is type(most) and size > most:
        raise BadValue(
            key, units.format_exactly(size), f"above {limit} = {units.format_exactly(most)}"
        )
