"""What the doctor says of software: compiler and native code, engines, configuration."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from importlib import metadata

from tiermem.bench.findings import Line, note, ok, problem
from tiermem.bench.machine import versions
from tiermem.config import Config, enabled
from tiermem.errors import ConfigError, DriverError

ENGINES = {
    "vllm": ("vllm.general_plugins", "0.27", "0.34"),
    "sglang": ("sglang.srt.plugins", "0.5.17", "0.5.24"),
}
"""Entry point group, first version that works, first that is not known to."""


def software_lines(config: Config, env: Mapping[str, str] | None = None) -> Iterator[Line]:
    found = versions()
    yield ok("versions", ", ".join(f"{name} {version}" for name, version in found.items()))
    yield native_line()
    yield from engine_lines(found)
    yield from configuration_lines(config, os.environ if env is None else env)


def native_line() -> Line:
    """Builds the native code if that was not done yet, and loads it."""
    from tiermem import toolchain
    from tiermem.native.library import library

    try:
        library()
        return ok("native code", f"built and loaded; compiler {' '.join(toolchain.compiler())}")
    except DriverError as error:
        return problem(
            "native code", str(error), "apt install gcc libc6-dev, or pip install ziglang"
        )
    except OSError as error:
        return problem(
            "native code", f"built, but not loaded: {error}", "clear the cache directory"
        )


def engine_lines(found: Mapping[str, str]) -> Iterator[Line]:
    """Engines installed here, and whether our plugin would be found by them."""
    for engine, (group, first, beyond) in ENGINES.items():
        version = found.get(engine)
        if version is None:
            continue
        seam = any(
            point.value.startswith("tiermem.") for point in metadata.entry_points(group=group)
        )
        if not _release(first) <= _release(version) < _release(beyond):
            text = f"{engine} {version} is outside {first} to {beyond}, where the seams are known"
            yield note("engine", text, f"pip install '{engine}>={first},<{beyond}'")
        elif not seam:
            text = f"{engine} {version}: no entry point of ours in {group}"
            yield problem("engine", text, "install tiermem as a package: pip install tiermem")
        else:
            yield ok("engine", f"{engine} {version}, loaded by {group}")
    if not set(ENGINES) & set(found):
        yield note("engine", "neither vLLM nor SGLang in this environment")


def _release(version: str) -> tuple[int, ...]:
    """The leading numbers of a version: 0.5.17.post1 is (0, 5, 17)."""
    numbers = []
    for part in version.split("+")[0].split("."):
        if not part.isdigit():
            break
        numbers.append(int(part))
    return tuple(numbers)


def configuration_lines(config: Config, env: Mapping[str, str]) -> Iterator[Line]:
    """What was set, and where; defaults are counted."""
    given = {
        key: config.source(key) for key in config.settings() if config.source(key) != "default"
    }
    settings = config.settings()
    for key, source in given.items():
        yield ok("configuration", f"{key} = {settings[key]} ({source})")
    yield ok("configuration", f"{len(settings) - len(given)} settings at their defaults")
    try:
        on = enabled(env)
    except ConfigError as error:
        yield problem("configuration", str(error), "TIERMEM=1 or TIERMEM=0")
        return
    if on:
        yield ok("configuration", "TIERMEM is on: engines started here use tiermem")
    else:
        yield note("configuration", "TIERMEM is off: engines started here do not use tiermem")
