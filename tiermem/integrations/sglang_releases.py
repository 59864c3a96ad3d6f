"""Which releases of SGLang are supported, and the seams of each that tiermem hooks into."""

from __future__ import annotations

import pkgutil
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata

from tiermem.errors import TierMemError

_SRT = "sglang.srt"
_POOL = f"{_SRT}.mem_cache.memory_pool"
_SCHEDULER = f"{_SRT}.managers.scheduler.Scheduler"
_BATCH = f"{_SRT}.managers.schedule_batch"
_CONFIGURATOR = f"{_SRT}.mem_cache.kv_cache_configurator.KVCacheConfigurator"
_ALLOCATION = f"{_SRT}.mem_cache.allocation"

ALLOCATOR = f"{_SRT}.mem_cache.allocator.paged.PagedTokenToKVPoolAllocator"
"""A class, which ours replaces."""


class Unsupported(TierMemError):
    """A release of SGLang whose seams are not known, or not as expected."""


@dataclass(frozen=True, slots=True)
class Release:
    """One release of SGLang. tested: it gave the same tokens as alone; else its names are right.

    has_plain_tree: its prefix cache is the plain radix tree; the unified one else.
    """

    version: tuple[int, ...]
    tested: bool
    has_plain_tree: bool = False
    shares: str = f"{_SRT}.mem_cache.common.maybe_cache_unfinished_req"
    counts: str = f"{_SRT}.managers.schedule_policy.PrefillAdder.__init__"


_CHECKPOINT = f"{_SRT}.mem_cache.common.checkpoint_kv_cache"
_BUDGET = f"{_SRT}.mem_cache.prefill_budget.PrefillBudget.__init__"
RELEASES = (
    Release((0, 5, 17), tested=True, has_plain_tree=True),
    Release((0, 5, 18), tested=False, has_plain_tree=True),
    Release((0, 5, 19), tested=False),
    Release((0, 5, 20), tested=False),
    Release((0, 5, 21), tested=True, counts=_BUDGET),
    Release((0, 5, 22), tested=False, shares=_CHECKPOINT, counts=_BUDGET),
    Release((0, 5, 23), tested=True, shares=_CHECKPOINT, counts=_BUDGET),
)
"""What is supported. 0.5.16 and before free pages in another way, so they are not."""


@dataclass(frozen=True, slots=True)
class Seam:
    """A function of SGLang, and the one in `sglang_hooks` that runs before, after or around it."""

    target: str
    kind: str
    hook: str


def seams(release: Release) -> Iterator[Seam]:
    """All that are hooked, beside ALLOCATOR."""
    yield Seam(f"{_SRT}.arg_groups.overrides._page_size_default", "after", "default_page_size")
    yield Seam(f"{_CONFIGURATOR}._profile_available_bytes", "around", "profile")
    yield Seam(f"{_POOL}.MHATokenToKVPool._create_buffers_normal", "around", "make_mha_buffers")
    yield Seam(f"{_POOL}.MHATokenToKVPool._build_kv_buffer_descs", "around", "describe_none")
    yield Seam(f"{_POOL}.MHATokenToKVPool.get_kv_size_bytes", "after", "tell_size")
    yield Seam(f"{_POOL}.MLATokenToKVPool._create_buffers", "around", "make_mla_buffers")
    yield Seam(f"{_POOL}.MLATokenToKVPool.get_kv_size_bytes", "after", "tell_size")
    yield Seam(f"{_SCHEDULER}.__init__", "after", "ready")
    yield Seam(f"{_SCHEDULER}.get_next_batch_to_run", "before", "look")
    yield Seam(f"{_SCHEDULER}.run_batch", "before", "step")
    yield Seam(f"{_SCHEDULER}.run_batch", "after", "launched")
    yield Seam(f"{_SCHEDULER}.process_batch_result", "after", "computed")
    yield Seam(f"{_SCHEDULER}.init_req_max_new_tokens", "after", "clip")
    yield Seam(f"{_SCHEDULER}._add_request_to_queue", "after", "queued")
    yield Seam(f"{_BATCH}.ScheduleBatch.check_decode_mem", "around", "fits_decode")
    yield Seam(f"{_BATCH}.Req.init_next_round_input", "around", "matched")
    yield Seam(f"{_BATCH}.Req._compute_max_prefix_len", "after", "capped")
    yield Seam(f"{_ALLOCATION}.alloc_for_extend", "after", "extended")
    yield Seam(f"{_ALLOCATION}.alloc_for_decode", "after", "decoded")
    yield Seam(f"{_SRT}.mem_cache.common.release_kv_cache", "around", "released")
    yield Seam(release.shares, "around", "shared")
    yield Seam(release.counts, "after", "withhold")
    if release.has_plain_tree:
        yield Seam(f"{_SRT}.mem_cache.radix_cache.RadixCache._split_node", "around", "split")


def release_of(version: str) -> Release:
    """The release with this version ("0.5.17", "0.5.17.post1"). Raises Unsupported."""
    numbers = tuple(int(part) for part in version.split("+")[0].split(".")[:3] if part.isdigit())
    for release in RELEASES:
        if release.version == numbers:
            return release
    known = ", ".join(".".join(map(str, release.version)) for release in RELEASES)
    raise Unsupported(
        f"sglang {version} is not supported; supported are {known}. Install one of these, or set "
        "TIERMEM=0 to serve without tiermem"
    )


def installed() -> Release:
    """The release that is installed here. Raises Unsupported."""
    return release_of(metadata.version("sglang"))


def refuse_dead_hooks() -> None:
    """Raise Unsupported if SGLang has not applied one of our hooks (it only logs that)."""
    dead = [
        seam.target
        for seam in seams(installed())
        if not hasattr(pkgutil.resolve_name(seam.target), "__wrapped__")
    ]
    if not pkgutil.resolve_name(ALLOCATOR).__module__.startswith("tiermem."):
        dead.append(ALLOCATOR)
    if dead:
        raise Unsupported(f"SGLang has not applied {len(dead)} hooks: {', '.join(dead)}")
