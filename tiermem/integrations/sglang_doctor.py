"""What `tiermem doctor --engine sglang` says: are the seams there, and would they be used?"""

from __future__ import annotations

import inspect
import os
import pkgutil
from collections.abc import Iterator, Mapping

from tiermem.bench.findings import Line, note, ok, problem
from tiermem.config import Config, enabled
from tiermem.integrations.sglang_releases import (
    ALLOCATOR,
    RELEASES,
    Release,
    Unsupported,
    installed,
    seams,
)

PLUGINS = "SGLANG_PLUGINS"
_WAY_OUT = "install a release that is named in docs/sglang.md"


def lines(config: Config) -> Iterator[Line]:
    """The installed release, each of its seams, and what the configuration means for it."""
    try:
        release = installed()
    except Unsupported as error:
        yield problem("sglang", str(error), _WAY_OUT)
        return
    yield _tested(release)
    yield from seam_lines(release)
    yield from setting_lines(config, os.environ)


def _tested(release: Release) -> Line:
    version = ".".join(map(str, release.version))
    if release.tested:
        return ok("sglang", f"{version}: was run over tiermem and gave the same tokens as alone")
    known = ", ".join(".".join(map(str, each.version)) for each in RELEASES if each.tested)
    text = f"{version}: its names are those that are hooked, but it was not run; tested: {known}"
    return note("sglang", text, "run make test-engines-sglang")


def seam_lines(release: Release) -> Iterator[Line]:
    """A problem for each function that is gone, else one line that all are there."""
    targets = dict.fromkeys([ALLOCATOR, *(seam.target for seam in seams(release))])
    gone = [target for target in targets if not _is_there(target)]
    for target in gone:
        yield problem("sglang seams", f"{target} is not there", _WAY_OUT)
    if not gone:
        yield ok("sglang seams", f"all {len(targets)} that are hooked are there")


def _is_there(target: str) -> bool:
    try:
        found = pkgutil.resolve_name(target)
    except (ImportError, AttributeError):
        return False
    return inspect.isfunction(found) or inspect.isclass(found)


def setting_lines(config: Config, env: Mapping[str, str]) -> Iterator[Line]:
    """Whether SGLang would load the plugin, and which sizes are for a rank and which for all."""
    chosen = [name.strip() for name in env.get(PLUGINS, "").split(",") if name.strip()]
    if chosen and "tiermem" not in chosen:
        text = f"{PLUGINS}={env[PLUGINS]} leaves tiermem out: TIERMEM would have no effect"
        yield problem("sglang", text, f"add tiermem to {PLUGINS}, or unset it")
    if not enabled(env):
        yield note("sglang", "TIERMEM is off: SGLang serves without tiermem", "TIERMEM=1")
    if not config.host.enabled and not config.nvme.enabled:
        text = "host.capacity is 0 and there is no nvme.path: nothing can leave the GPU"
        yield problem("sglang", text, "set host.capacity")
    elif config.nvme.enabled and not config.nvme.persist:
        text = "nvme.persist is off: prefixes on the drive end with the engine"
        yield note("sglang", text, "nvme.persist = true")
