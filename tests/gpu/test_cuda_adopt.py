"""On a GPU: pages named by their content cross to the drive, and a second space adopts them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.test_adopt import keys_of
from tiermem.config import Config, Gpu, Host, Nvme
from tiermem.space import Space
from tiermem.tier import AT_NVME, Place

pytestmark = pytest.mark.gpu

PAGE = 2 << 20
PAGES = 48


def test_pages_that_a_kernel_wrote_are_adopted_after_a_restart(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    config = Config(
        gpu=Gpu(device="cuda:0", budget=8 * PAGE, page=PAGE),
        host=Host(capacity=16 * PAGE),
        nvme=Nvme(path=tmp_path / "slab", capacity=128 * PAGE, persist=True),
    )
    numbers = range(1, PAGES + 1)
    keys = keys_of(numbers)
    with Space.open(config) as space:
        region = space.reserve(PAGES * PAGE)
        words = region.tensor(torch.int64, (PAGES, PAGE // 8))
        stream = torch.cuda.current_stream()
        for number in numbers:
            page = int(region.allocate(1)[0])
            with region.use(page, "fresh", stream=stream.cuda_stream):
                words[page] = torch.arange(PAGE // 8, device="cuda") * number
                region.label([page], keys[number - 1 : number])
        space.drain()
        space.check()
    with Space.open(config) as space:
        found = space.find(keys)
        region = space.reserve(PAGES * PAGE)
        words = region.tensor(torch.int64, (PAGES, PAGE // 8))
        pages = region.adopt(keys)
        assert ((pages >= 0) == (found == AT_NVME)).all()
        assert (pages >= 0).sum() > PAGES // 4
        wrong = torch.zeros((), dtype=torch.int64, device="cuda")
        stream = torch.cuda.current_stream()
        for number, page in zip(numbers, pages.tolist(), strict=True):
            if page >= 0:
                with region.use(page, stream=stream.cuda_stream):
                    wrong += (words[page] != torch.arange(PAGE // 8, device="cuda") * number).sum()
        assert int(wrong.item()) == 0
        loaded = [r for r in space.statistics().routes if (r.src, r.dst) == (Place.NVME, Place.GPU)]
        assert loaded[0].pages >= int(np.count_nonzero(pages >= 0))
        assert "pinned ring" in loaded[0].path
        space.check()
