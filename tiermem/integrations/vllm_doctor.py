"""What `tiermem doctor --engine vllm` says: release, seams, and what the configuration means."""

from __future__ import annotations

from collections.abc import Iterator

from tiermem.bench.findings import Line, note, ok, problem
from tiermem.config import Config, enabled
from tiermem.integrations import vllm_seams
from tiermem.integrations.vllm_seams import TESTED, Unsupported


def lines(config: Config) -> Iterator[Line]:
    """The hook of `tiermem.bench.doctor_engine`."""
    try:
        release = vllm_seams.installed()
    except Unsupported as error:
        yield problem("vllm", str(error), "pip install 'vllm>=0.27,<0.34'")
        return
    name = f"{release[0]}.{release[1]}"
    if release in TESTED:
        yield ok("vllm", f"{name} is a tested release")
    else:
        tested = ", ".join(f"{a}.{b}" for a, b in TESTED)
        yield note("vllm", f"{name} is supported, but not one of the tested: {tested}")
    for seam, is_there in vllm_seams.live(release):
        if is_there:
            yield ok("vllm seams", seam.name)
        else:
            yield problem("vllm seams", f"{seam.name} is gone", "install a tested release")
    if release < (0, 31):
        yield note(
            "vllm seams",
            "no get_mem_pool_context before 0.31: the KV cache's allocation is answered between "
            "the connector's constructor and register_kv_caches",
        )
    yield from _meaning(config)


def _meaning(config: Config) -> Iterator[Line]:
    if enabled():
        yield ok("vllm", "TIERMEM is on: `vllm serve` here spans GPU memory and the tiers below")
    else:
        yield note("vllm", "TIERMEM is off", "TIERMEM=1 vllm serve ...")
    if not config.host.enabled and not config.nvme.enabled:
        yield problem(
            "vllm", "no tier below the GPU: nothing can move", "set host.capacity or nvme.path"
        )
    if config.nvme.enabled and not config.nvme.persist:
        yield note("vllm", "prefixes do not outlive the engine", "nvme.persist = true keeps them")
