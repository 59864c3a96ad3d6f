"""On a GPU: two processes lease pinned chunks of one host pool, and their pages come back right."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.gpu

PAGE = 2 << 20
PAGES = 96
ROOT = Path(__file__).parents[2]


def engine(name: str) -> None:
    """Fill PAGES pages through a card of 16, twice, and read all back; for a process of its own."""
    import torch

    from tiermem import Config, Gpu, Host, Share, Space
    from tiermem.tier import Place

    config = Config(
        gpu=Gpu(device="cuda:0", budget=16 * PAGE, page=PAGE),
        host=Host(capacity=2 * PAGES * PAGE),
        share=Share(group="pool", name=name, total=64 * PAGE, host=3 * PAGES * PAGE),
    )
    wrong = torch.zeros((), dtype=torch.int64, device="cuda")
    with Space.open(config) as space:
        region = space.reserve(PAGES * PAGE)
        words = region.tensor(torch.int64, (PAGES, PAGE // 8))
        stream = torch.cuda.current_stream().cuda_stream
        pages: list[int] = []
        while len(pages) < PAGES:
            pages += region.allocate(8).tolist()
        for turn in (1, 2):
            for page in pages:
                with region.use(page, "fresh", stream=stream):
                    words[page] = page * 10 + turn
            for page in pages:
                with region.use(page, stream=stream):
                    wrong += (words[page] != page * 10 + turn).sum()
        torch.cuda.synchronize()
        space.drain()
        space.check()
        seen = space.statistics()
        print(
            json.dumps(
                {
                    "wrong": int(wrong.item()),
                    "host": seen.tier(Place.HOST).capacity,
                    "dropped": seen.counts.get("dropped", 0),
                }
            )
        )


def test_two_engines_grow_into_one_pinned_pool_and_no_page_is_wrong() -> None:
    pytest.importorskip("torch")
    with tempfile.TemporaryDirectory(prefix="tm-") as home:
        code = "import sys; from tests.gpu.test_cuda_pooling import engine; engine(sys.argv[1])"
        running = [
            subprocess.Popen(
                [sys.executable, "-c", code, name],
                stdout=subprocess.PIPE,
                text=True,
                cwd=ROOT,
                env={**os.environ, "XDG_RUNTIME_DIR": home},
            )
            for name in ("one", "two")
        ]
        found: list[dict[str, Any]] = []
        for each in running:
            out, _ = each.communicate(timeout=180)
            assert each.returncode == 0
            found.append(json.loads(out.splitlines()[-1]))
    for seen in found:
        assert seen["wrong"] == 0
        assert seen["dropped"] == 0
        assert seen["host"] >= PAGES - 16
