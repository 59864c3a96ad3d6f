"""SGLang's paged allocator over pages that are numbered in blocks, with its free list on the CPU.

It is imported where SGLang is installed, by the plugin. SGLang's own kernels write the token
indices; they are handed just the pages that are taken, and no others.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from sglang.srt.mem_cache.allocator.paged import PagedTokenToKVPoolAllocator

from tiermem.integrations import sglang_state
from tiermem.integrations.sglang_pages import Arrived, FreePages, Pages

_END = torch.zeros(1, dtype=torch.int64)
"""Kernels may look one entry past the pages that they need."""


class PageMajorAllocator(PagedTokenToKVPoolAllocator):  # type: ignore[misc]  # SGLang is untyped
    """Hands out pages whose SGLang number is page * stride. Page 0 is never handed out.

    taken: the pages of the last alloc_extend or alloc_decode, one array a request.
    freed: grows whenever tokens are freed, also those of a group that is not closed yet.
    """

    pages: FreePages
    taken: list[Pages]
    freed = 0

    def clear(self) -> None:
        super().clear()
        self.freed += 1
        engine = sglang_state.engine()
        self._stride = engine.layout.stride
        self.pages = engine.free_pages()
        self.taken = []
        self._nothing = _END.to(self.device)
        self.free_pages = self._nothing

    def available_size(self) -> int:
        return len(self.pages) * int(self.page_size)

    def alloc(self, need_size: int) -> torch.Tensor | None:
        pages = self.pages.take(need_size // self.page_size)
        if pages is None:
            return None
        self._hand_out(pages)
        indices: torch.Tensor = super().alloc(need_size)
        self.free_pages = self._nothing
        return indices

    def alloc_extend(
        self,
        prefix_lens: torch.Tensor,
        prefix_lens_cpu: torch.Tensor,
        seq_lens: torch.Tensor,
        seq_lens_cpu: torch.Tensor,
        last_loc: torch.Tensor,
        extend_num_tokens: int,
        num_new_pages: int | None = None,
    ) -> torch.Tensor | None:
        size = self.page_size
        counts = -(-seq_lens_cpu.numpy() // size) - -(-prefix_lens_cpu.numpy() // size)
        if not self._take(counts):
            return None
        indices: torch.Tensor = super().alloc_extend(
            prefix_lens,
            prefix_lens_cpu,
            seq_lens,
            seq_lens_cpu,
            last_loc,
            extend_num_tokens,
            int(counts.sum()),
        )
        self.free_pages = self._nothing
        return indices

    def alloc_decode(
        self, seq_lens: torch.Tensor, seq_lens_cpu: torch.Tensor, last_loc: torch.Tensor
    ) -> torch.Tensor | None:
        if not self._take((seq_lens_cpu.numpy() - 1) % self.page_size == 0):
            return None
        indices: torch.Tensor = super().alloc_decode(seq_lens, seq_lens_cpu, last_loc)
        self.free_pages = self._nothing
        return indices

    def free(self, free_index: torch.Tensor) -> None:
        self.freed += len(free_index)
        super().free(free_index)

    def free_segment(self, free_index: torch.Tensor, *, start_pos: int) -> None:
        self.freed += len(free_index)
        super().free_segment(free_index, start_pos=start_pos)

    def merge_and_sort_free(self) -> None:
        """Nothing waits to be sorted: first freed, first taken."""

    def take_pages(self, count: int) -> Pages | None:
        """Pages for content that is not computed here; None if there are fewer."""
        return self.pages.take(count)

    def give_pages(self, pages: Pages) -> None:
        """Pages that were taken and not used."""
        self.pages.give(Arrived(pages))

    def _take(self, counts: np.ndarray) -> bool:
        pages = self.pages.take(int(counts.sum()))
        if pages is None:
            return False
        ends = np.cumsum(counts)
        self.taken = np.split(pages, ends[:-1])
        if len(pages):
            self._hand_out(pages)
        return True

    def _hand_out(self, pages: Pages) -> None:
        numbers = torch.from_numpy(pages.astype(np.int64) * self._stride)
        self.free_pages = torch.cat((numbers, _END)).to(self.device, non_blocking=True)

    def _release_page_ids(self, *page_ids: torch.Tensor) -> None:
        numbers = torch.cat(page_ids)
        self.freed += len(numbers)
        if numbers.device.type == "cpu":
            self.pages.give(Arrived((numbers.numpy() // self._stride).astype(np.int32)))
        else:
            self.pages.give(_Coming(numbers, self._stride))


class _Coming:
    """Numbers that the GPU copies to pinned memory behind what is queued there."""

    def __init__(self, numbers: torch.Tensor, stride: int) -> None:
        self.count = len(numbers)
        self._stride = stride
        self._numbers = torch.empty(self.count, dtype=numbers.dtype, pin_memory=True)
        self._numbers.copy_(numbers, non_blocking=True)
        cuda: Any = torch.cuda  # whose events have no types
        self._event = cuda.Event()
        self._event.record()

    def ready(self) -> bool:
        return bool(self._event.query())

    def pages(self) -> Pages:
        self._event.synchronize()
        pages: Pages = (self._numbers.numpy() // self._stride).astype(np.int32)
        return pages
