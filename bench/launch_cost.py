"""What memory of ours costs the kernels that use it, beside memory of torch. Needs a GPU.

    python bench/launch_cost.py [OUT.json]

Two things that an engine does many times in an eager prefill: it launches a Triton kernel (whose
launcher asks the driver about each pointer), and a kernel reads rows of KV by their indices. Each
over a tensor of torch, and over a region of 2,160 pages of 8 MiB of which 1, 64 or 600 are shown,
in SGLang's page-major order: 128 KiB of each page for one part of a layer. Microseconds, medians.
"""

from __future__ import annotations

import ctypes
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tiermem.config import Config, Gpu, Host
from tiermem.space import Space

PAGE = 8 << 20
PAGES, PARTS, TOKENS, HEADS, DIM = 2160, 64, 64, 8, 128
LAUNCHES, ROUNDS = 500, 7


@triton.jit
def _nothing(a, b, c, d, n: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.arange(0, n)
    tl.store(d + at, tl.load(a + at) + tl.load(b + at) + tl.load(c + at))


def launches_us(a: torch.Tensor, b: torch.Tensor) -> float:
    """Of one launch with two tensors like these and two of torch."""
    mine = torch.zeros(128, dtype=torch.bfloat16, device="cuda")

    def run() -> None:
        for _ in range(LAUNCHES):
            _nothing[(1,)](a, b, mine, mine, 128)

    return _median(run) / LAUNCHES


def attribute_us(address: int) -> float:
    """Of what Triton's launcher asks about each pointer."""
    ask = ctypes.CDLL("libcuda.so.1").cuPointerGetAttribute
    found, where = ctypes.c_uint64(), ctypes.c_uint64(address)

    def run() -> None:
        for _ in range(LAUNCHES):
            assert not ask(ctypes.byref(found), 3, where)

    return _median(run) / LAUNCHES


def gather_us(parts: list[torch.Tensor], rows: torch.Tensor) -> float:
    """Of reading these rows of one part: GPU time, a part after the other."""
    out = torch.empty((len(rows), HEADS, DIM), dtype=torch.bfloat16, device="cuda")
    took = []
    for _ in range(ROUNDS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for part in parts:
            torch.index_select(part, 0, rows, out=out)
        end.record()
        end.synchronize()
        took.append(start.elapsed_time(end) * 1e3 / len(parts))
    return statistics.median(took)


def _median(run: Callable[[], None]) -> float:
    took = []
    for _ in range(ROUNDS):
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        took.append((time.perf_counter() - start) * 1e6)
    return statistics.median(took)


def rows_of(pages: int, stride: int) -> torch.Tensor:
    """Indices of all tokens of pages 0, 1, ... whose numbers are multiples of `stride`."""
    first = np.arange(pages)[:, None] * stride * TOKENS
    return torch.from_numpy((first + np.arange(TOKENS)).reshape(-1)).cuda()


def main() -> None:
    result: dict[str, Any] = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
    plain = [
        torch.zeros((600 * TOKENS, HEADS, DIM), dtype=torch.bfloat16, device="cuda")
        for _ in range(16)
    ]
    result["torch"] = {
        "launch_us": launches_us(plain[0], plain[1]),
        "attribute_us": attribute_us(plain[0].data_ptr()),
        "gather_us": {str(n): gather_us(plain, rows_of(n, 1)) for n in (63, 255)},
    }
    print("torch", result["torch"], flush=True)
    del plain
    with Space.open(
        Config(gpu=Gpu(device="cuda:0", budget=610 * PAGE, page=PAGE), host=Host(capacity=0))
    ) as space:
        region = space.reserve(PAGES * PAGE, numbered=True)
        rows = (PAGES - 1) * PARTS * TOKENS
        block = TOKENS * HEADS * DIM * 2
        shown = 0
        for n in (1, 64, 600):
            fresh = np.arange(shown, n, dtype=np.int32)
            region.allocate(len(fresh), pages=fresh)
            region.pin(fresh, "write")
            shown = n
            parts = [
                region.tensor(torch.bfloat16, (rows, HEADS, DIM), offset=part * block)
                for part in range(16)
            ]
            found: dict[str, Any] = {
                "launch_us": launches_us(parts[0], parts[1]),
                "attribute_us": attribute_us(parts[0].data_ptr()),
                "gather_us": {
                    str(m): gather_us(parts, rows_of(m, PARTS)) for m in (63, 255) if m <= n
                },
            }
            result[f"shown_{n}"] = found
            print("shown", n, found, flush=True)
        torch.cuda.synchronize()
        region.unpin(np.arange(shown, dtype=np.int32))
    if len(sys.argv) > 1:
        Path(sys.argv[1]).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
