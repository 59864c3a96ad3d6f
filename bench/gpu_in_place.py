"""Pages read in place against pages loaded, through the whole pager; sections of `gpu_pager.py`."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from tiermem.config import Config, Gpu, Host
from tiermem.gpu.tensor import tensor
from tiermem.region import Pages, Region
from tiermem.space import Space
from tiermem.tier import Fence

if TYPE_CHECKING:
    import torch

MIB = 1 << 20
SET = 256 * MIB  # what is read at a time
TOUCHES = (1, 4, 16)


class Reader:
    """Kernels that read whole pages; torch's on a GPU, numpy's on the CPU device."""

    def __init__(self, space: Space, region: Region) -> None:
        self.space = space
        self.region = region
        self.words = region.page_bytes // 8
        self.stream: int | None = None
        if space.device.torch_device == "cpu":
            self.view: Any = region.view(np.int64)
            return
        import torch

        self.torch = torch
        self.own = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self.stream = self.own.cuda_stream
        self.pages = region.tensor(torch.int64, (region.pages, self.words))
        self.into = torch.empty(SET // 8, dtype=torch.int64, device="cuda")

    def read(self, first: int, n: int) -> None:
        """Queue one read of n neighbouring pages: every byte once."""
        if self.stream is None:
            self.view[first : first + n].sum()
            return
        with self.torch.cuda.stream(self.own):
            self.torch.sum(self.pages[first : first + n])

    def kernels(self, first: int, n: int) -> dict[str, Callable[[], object]]:
        """Several ways to read n neighbouring pages."""
        if self.stream is None:
            return {"sum": lambda: self.read(first, n)}
        return self.kernels_over(self.pages[first : first + n].reshape(-1))

    def kernels_over(self, source: torch.Tensor) -> dict[str, Callable[[], object]]:
        """The same over any tensor int64[at most SET / 8]."""
        into = self.into[: source.numel()]
        as_bytes, into_bytes = source.view(self.torch.uint8), into.view(self.torch.uint8)
        halves, into_halves = source.view(self.torch.bfloat16), into.view(self.torch.bfloat16)
        return {
            "sum": lambda: self.torch.sum(source),
            "max": lambda: self.torch.max(source),
            "add int64": lambda: self.torch.add(source, 1, out=into),
            "add uint8": lambda: self.torch.add(as_bytes, 1, out=into_bytes),
            "scale bf16": lambda: self.torch.mul(halves, 1.0, out=into_halves),
        }

    def sync(self) -> None:
        tick = self.space.device.streams.tick(self.stream)
        if tick is not None:
            self.space.device.streams.wait(Fence((tick,)))


@contextmanager
def opened(device: str, page: int, frames: int, hide: Literal["lazy", "eager"]) -> Iterator[Space]:
    gpu = Gpu(device=device, budget=frames * page, page=page, high=1.0, low=1.0, hide=hide)
    host = Host(capacity=4 * SET + 64 * page, high=1.0, low=1.0, read_in_place=True)
    with Space.open(Config(gpu=gpu, host=host)) as space:
        while any(t.capacity < t.configured for t in space.statistics().tiers):
            time.sleep(0.01)
        yield space


def sizes(device: str) -> dict[str, int]:
    if device == "cpu":
        return {"64KiB": 65536, "1MiB": MIB}
    return {"2MiB": 2 * MIB, "8MiB": 8 * MIB, "32MiB": 32 * MIB}


def crossover(device: str) -> dict[str, object]:
    """us a page from cold to the last read done, in place and loaded, with room and without.

    Without room, loading drives dirty pages of another region out, which come back afterwards:
    that is counted. `rule`: up to how many touches the space itself would read in place.
    """
    found: dict[str, object] = {}
    for name, page in sizes(device).items():
        n = max(2, min(64, SET // page))
        with opened(device, page, 2 * n, "eager") as space:
            rule = space.pager.planner.crossover
            assert rule is not None
            found[f"rule_{name}"] = {"with_room": rule.with_room, "without": rule.without}
            for way, in_place in (("loaded", "never"), ("in_place", "always")):
                for touches in TOUCHES:
                    key = f"{way}_{name}_{touches}_us"
                    found[key] = _cold(space, n, in_place, touches, rounds=7)
        with opened(device, page, n + 2, "eager") as space:
            for way, in_place in (("loaded", "never"), ("in_place", "always")):
                for touches in TOUCHES:
                    key = f"{way}_full_{name}_{touches}_us"
                    found[key] = _full(space, n, in_place, touches, rounds=5)
    return found


def _region(space: Space, n: int, in_place: str) -> tuple[Region, Pages]:
    region = space.reserve(n * space.page_bytes, in_place=in_place)  # type: ignore[arg-type]
    pages = np.sort(region.allocate(n))
    with region.use(pages, "write"):
        pass
    return region, pages


def _down(space: Space, region: Region, pages: Pages) -> None:
    """Written anew, so that nothing is shown, and sent to the host tier."""
    with region.use(pages, "write"):
        pass
    region.hint(pages, "cold")
    space.drain()


def _cold(space: Space, n: int, in_place: str, touches: int, rounds: int) -> list[float]:
    region, pages = _region(space, n, in_place)
    reader, took = Reader(space, region), []
    for _ in range(rounds + 1):
        _down(space, region, pages)
        start = time.perf_counter()
        with region.use(pages, "read", reader.stream, touches):
            for _ in range(touches):
                reader.read(int(pages[0]), n)
        reader.sync()
        took.append((time.perf_counter() - start) / n * 1e6)
    region.close()
    return took[1:]


def _full(space: Space, n: int, in_place: str, touches: int, rounds: int) -> list[float]:
    region, pages = _region(space, n, in_place)
    region.hint(pages, "cold")
    space.drain()
    other, others = _region(space, n, "never")
    reader, took = Reader(space, region), []
    for _ in range(rounds + 1):
        other.hint(others, "cold")
        space.drain()
        _down(space, region, pages)
        with other.use(others, "write"):
            pass
        start = time.perf_counter()
        with region.use(pages, "read", reader.stream, touches):
            for _ in range(touches):
                reader.read(int(pages[0]), n)
        reader.sync()
        with other.use(others, "read", reader.stream):
            pass
        reader.sync()
        took.append((time.perf_counter() - start) / n * 1e6)
        space.drain()
    region.close()
    other.close()
    return took[1:]


def in_place_rate(device: str) -> dict[str, object]:
    """GB/s of several kernels that read pages in place, over memory that torch has pinned, and of
    one large copy on this link."""
    found: dict[str, object] = {}
    for name, page in sizes(device).items():
        n = max(2, min(64, SET // page))
        with opened(device, page, 2 * n, "eager") as space:
            region, pages = _region(space, n, "always")
            reader = Reader(space, region)
            _down(space, region, pages)
            with region.use(pages, "read", reader.stream):
                found |= _rates(reader, reader.kernels(int(pages[0]), n), n * page, name)
            if reader.stream is not None and "sum pinned gbps" not in found:
                pinned = reader.torch.empty(SET // 8, dtype=reader.torch.int64, pin_memory=True)
                source = tensor(pinned.data_ptr(), SET, "int64", (SET // 8,), device=device)
                found |= _rates(reader, reader.kernels_over(source), SET, "pinned")
            region.close()
    if device != "cpu":
        found["copy up gbps"] = _ceiling()
    return found


def _rates(
    reader: Reader, kernels: dict[str, Callable[[], object]], nbytes: int, over: str
) -> dict[str, object]:
    return {
        f"{kernel} {over} gbps": [_rate(reader, run, nbytes) for _ in range(6)][1:]
        for kernel, run in kernels.items()
    }


def _rate(reader: Reader, run: Callable[[], object], nbytes: int, repeats: int = 4) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        if reader.stream is None:
            run()
        else:
            with reader.torch.cuda.stream(reader.own):
                run()
    reader.sync()
    return repeats * nbytes / (time.perf_counter() - start) / 1e9


def _ceiling() -> list[float]:
    import torch

    source: torch.Tensor = torch.empty(1 << 30, dtype=torch.uint8, pin_memory=True)
    into = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    rates = []
    for _ in range(6):
        torch.cuda.synchronize()
        start = time.perf_counter()
        into.copy_(source, non_blocking=True)
        torch.cuda.synchronize()
        rates.append((1 << 30) / (time.perf_counter() - start) / 1e9)
    return rates[1:]
