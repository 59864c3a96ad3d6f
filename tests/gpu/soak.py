"""Random use, write, free, hint and budget changes on a GPU; a kernel verifies every page read.

    python -m tests.gpu.soak [--seconds 120] [--device cuda:0] [--threads 4]

Exits with 1 if a page held anything but what was written. Pages are filled and compared by
kernels on the thread's own stream, through tensors over the region's addresses; results are
fetched in batches, so that copies, kernels and paging overlap. Needs torch; with --device cpu the
comparison is numpy's.
"""

from __future__ import annotations

import argparse
import random
import sys
import threading
import time
from collections.abc import Callable
from typing import Protocol

import numpy as np

from tiermem.config import Config, Gpu, Host
from tiermem.errors import TierFull
from tiermem.region import Region
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
        self.region = space.reserve(PAGES * space.page_bytes, tenant=seed % 2)
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
        with self.region.use(pages, "read", self.bytes.stream):
            for page in pages:
                if self.values[page] >= 0:
                    self.bytes.compare(page, self.values[page])
                    self.verified += 1

    def write(self, pages: list[int], access: str, value: int) -> None:
        with self.region.use(pages, access, self.bytes.stream):  # type: ignore[arg-type]
            for page in pages:
                self.bytes.fill(page, value + page)
                self.values[page] = value + page


def soak(device: str, seconds: float, threads: int) -> list[Worker]:
    page = 64 << 10 if device == "cpu" else 2 << 20
    config = Config(
        gpu=Gpu(device=device, budget=FRAMES * page, page=page),
        host=Host(capacity=HOST_PAGES * page),
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
        print(dict(space.statistics().counts))
    return workers


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--threads", type=int, default=4)
    arguments = parser.parse_args()
    workers = soak(arguments.device, arguments.seconds, arguments.threads)
    verified, wrong = sum(w.verified for w in workers), sum(w.wrong for w in workers)
    print(f"verified={verified} wrong={wrong} refused={sum(w.refused for w in workers)}")
    return 1 if wrong or not verified else 0


if __name__ == "__main__":
    sys.exit(main())
