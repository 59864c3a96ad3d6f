"""What the demo writes into pages: bytes that follow from a block's id, checked on every return.

A page is one random base pattern plus a number mixed from the id, word by word. So a page of
another block, a page shifted by a word, a torn page and a single wrong bit all differ.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt

from tiermem.region import Pages, Region

if TYPE_CHECKING:
    import torch

Ids = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]
Words = npt.NDArray[np.uint64]

SEED = 20
AT_ONCE = 64 << 20
"""Bytes of a temporary on the GPU while pages are filled or checked."""


class Content(Protocol):
    """Fills and checks pages that are in use."""

    @property
    def stream(self) -> int | None:
        """The stream that the work is queued on; None: it has ended when a call returns."""

    def fill(self, pages: Pages, ids: Ids) -> None:
        """Write the bytes of block ids[i] into pages[i]."""

    def wrong(self, pages: Pages, ids: Ids) -> Mask:
        """bool[n]: which pages do not hold exactly the bytes of their block."""


def content_of(region: Region, torch_device: str) -> Content:
    """numpy on the CPU device, torch on a GPU."""
    return HostContent(region) if torch_device == "cpu" else TorchContent(region)


def base_words(page_bytes: int) -> Words:
    """uint64[page_bytes // 8]: what all pages have in common."""
    words = np.random.default_rng(SEED).integers(0, 2**64, page_bytes // 8, np.uint64)
    return words


def mixed(ids: Ids) -> Words:
    """uint64[n]: ids spread over all bits (splitmix64, Steele et al. 2014); distinct ids differ."""
    x = ids.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class HostContent:
    """Pages that the processor touches. 3 us to fill, 7 us to check 64 KiB (2 cores, 2026-11)."""

    stream: int | None = None

    def __init__(self, region: Region) -> None:
        self._pages = region.view(np.uint64)
        self._base = base_words(region.page_bytes)
        self._scratch = np.empty_like(self._base)

    def fill(self, pages: Pages, ids: Ids) -> None:
        base, memory = self._base, self._pages
        for page, mix in zip(pages.tolist(), mixed(ids), strict=True):
            np.add(base, mix, out=memory[page])

    def wrong(self, pages: Pages, ids: Ids) -> Mask:
        base, memory, scratch = self._base, self._pages, self._scratch
        bad = np.zeros(len(pages), np.bool_)
        for i, (page, mix) in enumerate(zip(pages.tolist(), mixed(ids), strict=True)):
            np.subtract(memory[page], base, out=scratch)
            bad[i] = not (scratch == mix).all()
        return bad


class TorchContent:
    """Pages that kernels touch, on torch's current stream."""

    def __init__(self, region: Region) -> None:
        import torch

        words = region.page_bytes // 8
        self._pages = region.tensor(torch.int64, (region.pages, words))
        self._base = self._sent(base_words(region.page_bytes))
        self._group = max(1, AT_ONCE // region.page_bytes)

    @property
    def stream(self) -> int | None:
        import torch

        return int(torch.cuda.current_stream(self._pages.device).cuda_stream)

    def fill(self, pages: Pages, ids: Ids) -> None:
        for some in self._groups(len(pages)):
            at, mix = self._at(pages[some]), self._sent(mixed(ids[some]))
            self._pages[at] = self._base + mix[:, None]

    def wrong(self, pages: Pages, ids: Ids) -> Mask:
        bad = np.zeros(len(pages), np.bool_)
        for some in self._groups(len(pages)):
            at, mix = self._at(pages[some]), self._sent(mixed(ids[some]))
            differs = (self._pages[at] - self._base != mix[:, None]).any(dim=1)
            bad[some] = differs.cpu().numpy()
        return bad

    def _groups(self, n: int) -> list[slice]:
        return [slice(i, i + self._group) for i in range(0, n, self._group)]

    def _at(self, pages: Pages) -> torch.Tensor:
        import torch

        return torch.from_numpy(pages.astype(np.int64)).to(self._pages.device)

    def _sent(self, words: Words) -> torch.Tensor:
        import torch

        return torch.from_numpy(words.view(np.int64)).to(self._pages.device)
