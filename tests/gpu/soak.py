"""Random use, write, free, hint and budget changes on a GPU; a kernel verifies every page read.

    python -m tests.gpu.soak [--seconds 120] [--device cuda:0] [--threads 4] [--in-place]
                             [--out soak.json]

Exits with 1 if a page held anything but what was written. Pages are filled and compared by
kernels on the thread's own stream, through tensors over the region's addresses; results are
fetched in batches, so that copies, kernels and paging overlap. Needs torch; with --device cpu the
comparison is numpy's. --in-place: half of the regions are read in host memory.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import numpy as np

from tiermem.config import Config, Gpu, Host
from tiermem.errors import TierFull
from tiermem.region import ReadInPlace, Region
from tiermem.space import Space

FRAMES, HOST_PAGES, PAGES = 96, 160, 220


class Bytes(Protocol):
    """Fills and compares pages, on a stream of its own."""

    @property
    def stream(self) -> int | None: ...

    def fill(self, page: int, value: int) -> None: ...

    def compare(self, page: int, value: int) -> None: ...

    def wrong(self) -> int:
        """How many comparisons since the last call failed."""


class OnCpu:
    stream = None

    def __init__(self, region: Region) -> None:
        self._view = region.view(np.int64)
        self._wrong = 0

    def fill(self, page: int, value: int) -> None:
        self._view[page] = value

    def compare(self, page: int, value: int) -> None:
        self._wrong += not (self._view[page] == value).all()

    def wrong(self) -> int:
        wrong, self._wrong = self._wrong, 0
        return wrong


class OnGpu:
    def __init__(self, region: Region) -> None:
        import torch

        self._torch = torch
        self._own = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self.stream: int | None = self._own.cuda_stream
        words = region.page_bytes // 8
        self._pages = region.tensor(torch.int64, (region.pages, words))
        self._count = torch.zeros((), dtype=torch.int64, device=self._pages.device)
        torch.cuda.synchronize()

    def fill(self, page: int, value: int) -> None:
        with self._torch.cuda.stream(self._own):
            self._pages[page].fill_(value)

    def compare(self, page: int, value: int) -> None:
        with self._torch.cuda.stream(self._own):
            self._count += (self._pages[page] != value).any()

    def wrong(self) -> int:
        with self._torch.cuda.stream(self._own):
            wrong = int(self._count.item())
            self._count.zero_()
        return wrong


class Worker:
    """One thread with pages of its own."""

    def __init__(self, space: Space, seed: int, make: Callable[[Region], Bytes]) -> None:
        self.space = space
        in_place: ReadInPlace = "never"
        if space.config.host.read_in_place and seed % 2:
            in_place = "always"
        nbytes = PAGES * space.page_bytes
        self.region = space.reserve(nbytes, tenant=seed // 2 % 2, in_place=in_place)
        self.bytes = make(self.region)
        self.random = random.Random(seed)
        self.values: dict[int, int] = {}
        self.verified = self.wrong = self.refused = 0
        self.error: BaseException | None = None

    def run(self, until: float, share: int) -> None:
        try:
            steps = 0
            while time.monotonic() < until:
                try:
                    self.step(share)
                except TierFull:
                    self.refused += 1
                steps += 1
                if steps % 64 == 0:
                    self.wrong += self.bytes.wrong()
            self.wrong += self.bytes.wrong()
        except BaseException as error:
            self.error = error

    def step(self, share: int) -> None:
        draw, value = self.random.random(), self.random.getrandbits(40)
        if len(self.values) < share and draw < 0.4:
            page = int(self.region.allocate(1)[0])
            self.values[page] = -1
            self.write([page], "fresh", value)
        elif not self.values:
            return
        elif draw < 0.7:
            self.read(self.some(6))
        elif draw < 0.85:
            self.write(self.some(3), self.random.choice(["write", "fresh"]), value)
        elif draw < 0.93:
            hint = self.random.choice(["cold", "soon"])
            self.region.hint(self.some(8), hint)
        elif draw < 0.97:
            gone = self.some(2)
            self.region.free(gone)
            for page in gone:
                del self.values[page]
        else:
            frames = self.random.randint(FRAMES // 2, FRAMES)
            self.space.limit(frames * self.space.page_bytes)

    def some(self, most: int) -> list[int]:
        pages = list(self.values)
        return self.random.sample(pages, min(len(pages), self.random.randint(1, most)))

    def read(self, pages: list[int]) -> None:
        kernels_only = self.random.random() < 0.5
        with self.region.use(pages, "read", self.bytes.stream, kernels_only=kernels_only):
            for page in pages:
                if self.values[page] >= 0:
                    self.bytes.compare(page, self.values[page])
                    self.verified += 1

    def write(self, pages: list[int], access: str, value: int) -> None:
        with self.region.use(pages, access, self.bytes.stream):  # type: ignore[arg-type]
            for page in pages:
                self.bytes.fill(page, value + page)
                self.values[page] = value + page


def soak(
    device: str, seconds: float, threads: int, in_place: bool
) -> tuple[list[Worker], dict[str, int]]:
    """The workers, and what the space counted."""
    page = 64 << 10 if device == "cpu" else 2 << 20
    config = Config(
        gpu=Gpu(device=device, budget=FRAMES * page, page=page),
        host=Host(capacity=HOST_PAGES * page, read_in_place=in_place),
    )
    share = (FRAMES // 2 + HOST_PAGES) * 3 // 4 // threads  # nothing need be dropped
    with Space.open(config) as space:
        make: Callable[[Region], Bytes] = OnCpu if device == "cpu" else OnGpu
        workers = [Worker(space, seed, make) for seed in range(threads)]
        until = time.monotonic() + seconds
        running = [threading.Thread(target=w.run, args=(until, share)) for w in workers]
        for thread in running:
            thread.start()
        for thread in running:
            thread.join()
        for worker in workers:
            if worker.error is not None:
                raise worker.error
        space.drain()
        space.check()
        counts = dict(space.statistics().counts)
    return workers, counts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--threads", type=int, default=4)
    parser.add_argument("--in-place", action="store_true")
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    workers, counts = soak(asked.device, asked.seconds, asked.threads, asked.in_place)
    verified, wrong = sum(w.verified for w in workers), sum(w.wrong for w in workers)
    refused = sum(w.refused for w in workers)
    found = {
        "device": asked.device,
        "seconds": asked.seconds,
        "in_place": asked.in_place,
        "verified": verified,
        "wrong": wrong,
        "refused": refused,
        "counts": counts,
    }
    print(found)
    if asked.out:
        asked.out.write_text(json.dumps(found, indent=1))
    return 1 if wrong or not verified else 0


if __name__ == "__main__":
    sys.exit(main())
