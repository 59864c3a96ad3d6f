"""The entry point `sglang.srt.plugins`: with TIERMEM=1 SGLang serves over tiermem, or not at all.

SGLang calls `register` in its main process and in every scheduler process, before CUDA starts. It
swallows what a plugin raises, and what goes wrong when a hook is applied; so the first ends the
process here, and the second is looked for by the hooks themselves.
"""

from __future__ import annotations

import sys

from tiermem.config import enabled
from tiermem.integrations.sglang_releases import ALLOCATOR, Release, installed, seams


def register() -> None:
    """Hook tiermem in if TIERMEM is on. Ends the process, with the reason, if that cannot be."""
    try:
        if enabled():
            _hook(installed())
    except Exception as error:  # whatever it is, SGLang would go on without us
        sys.exit(f"tiermem: SGLang cannot serve over tiermem: {type(error).__name__}: {error}")


def _hook(release: Release) -> None:
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    from tiermem.integrations import sglang_hooks
    from tiermem.integrations.sglang_allocator import PageMajorAllocator

    for seam in seams(release):
        HookRegistry.register(seam.target, getattr(sglang_hooks, seam.hook), HookType(seam.kind))
    HookRegistry.register(ALLOCATOR, PageMajorAllocator, HookType.REPLACE)
