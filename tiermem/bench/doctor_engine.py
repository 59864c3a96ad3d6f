"""`tiermem doctor --engine NAME`: what the integration with an engine says of itself.

The hook is a module `tiermem.integrations.NAME_doctor` (vllm_doctor, sglang_doctor) with

    def lines(config: Config) -> Iterable[Line]: ...

It is imported only when that engine is asked for. No engine runs then, and none is started by it;
it does no CUDA work. It may import the engine, and looks for the names that the integration hooks:
a line for each seam that is there (ok) or gone (problem, with the version to install), and for what
the configuration means for that engine. Whatever it raises becomes a problem. The names of its
areas are its own: "vllm", "vllm seams".
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterable, Iterator, Mapping

from tiermem.bench.doctor_software import ENGINES, engine_lines
from tiermem.bench.findings import Line, problem
from tiermem.bench.machine import versions
from tiermem.config import Config
from tiermem.errors import ConfigError

Hook = Callable[[Config], Iterable[Line]]


def seam_lines(
    engine: str,
    config: Config,
    hook: Hook | None = None,
    installed: Mapping[str, str] | None = None,
) -> Iterator[Line]:
    """The version and entry point, then what the integration says.

    hook: instead of the integration's; installed: instead of this environment's versions.

    Raises ConfigError for an engine that has no integration at all.
    """
    if engine not in ENGINES:
        raise ConfigError(f"--engine {engine}: write {' or '.join(ENGINES)}")
    found = versions() if installed is None else installed
    if engine not in found:
        yield problem(engine, "is not installed in this environment", f"pip install {engine}")
        return
    yield from engine_lines({engine: found[engine]})
    say = hook or _hook(engine)
    if say is None:
        text = "this installation of tiermem has no integration with it"
        yield problem(engine, text, "install a release of tiermem that has it")
        return
    try:
        yield from say(config)
    except Exception as error:  # a finding, like all the rest that does not work
        text = f"its integration cannot be examined: {type(error).__name__}: {error}"
        yield problem(engine, text, f"install a version of {engine} that is named above")


def _hook(engine: str) -> Hook | None:
    name = f"tiermem.integrations.{engine}_doctor"
    if importlib.util.find_spec(name) is None:
        return None
    hook: Hook = importlib.import_module(name).lines
    return hook
