"""On a GPU: pages named by their content reach the drive, and a second space adopts them."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import numpy as np
import pytest

from tests.test_adopt import keys_of
from tiermem.config import Config, Gpu, Host, Nvme
from tiermem.space import Space
from tiermem.tier import AT_NVME, Place

pytestmark = pytest.mark.gpu

PAGE = 2 << 20
PAGES = 48
NUMBERS = range(1, PAGES + 1)
Mode = Literal["posix", "kvikio"]


def config(where: Path, mode: Mode, frames: int) -> Config:
    return Config(
        gpu=Gpu(device="cuda:0", budget=frames * PAGE, page=PAGE),
        host=Host(capacity=16 * PAGE),
        nvme=Nvme(path=where, capacity=128 * PAGE, persist=True, mode=mode),
    )


def path_of(space: Space, src: Place, dst: Place) -> str:
    return next(r.path for r in space.statistics().routes if (r.src, r.dst) == (src, dst))


def leave(where: Path, mode: Mode, frames: int) -> None:
    """A run whose kernels write every page; some of them never had to leave the GPU."""
    import torch

    with Space.open(config(where, mode, frames)) as space:
        region = space.reserve(PAGES * PAGE)
        words = region.tensor(torch.int64, (PAGES, PAGE // 8))
        stream = torch.cuda.current_stream()
        for number in NUMBERS:
            page = int(region.allocate(1)[0])
            with region.use(page, "fresh", stream=stream.cuda_stream):
                words[page] = torch.arange(PAGE // 8, device="cuda") * number
                region.label([page], keys_of([number]))
        assert ("kvikio" in path_of(space, Place.GPU, Place.NVME)) is (mode == "kvikio")
        assert space.save() == 0
        space.check()


def find_all(where: Path, mode: Mode) -> None:
    """Every page is found, adopted and, by a kernel, compared."""
    import torch

    with Space.open(config(where, mode, 8)) as space:
        assert (space.find(keys_of(NUMBERS)) == AT_NVME).all()
        region = space.reserve(PAGES * PAGE)
        words = region.tensor(torch.int64, (PAGES, PAGE // 8))
        pages = region.adopt(keys_of(NUMBERS))
        assert (pages >= 0).all()
        wrong = torch.zeros((), dtype=torch.int64, device="cuda")
        stream = torch.cuda.current_stream()
        for number, page in zip(NUMBERS, pages.tolist(), strict=True):
            with region.use(page, stream=stream.cuda_stream):
                wrong += (words[page] != torch.arange(PAGE // 8, device="cuda") * number).sum()
        assert int(wrong.item()) == 0
        loaded = [r for r in space.statistics().routes if (r.src, r.dst) == (Place.NVME, Place.GPU)]
        assert loaded[0].pages >= np.count_nonzero(pages >= 0)
        assert ("kvikio" if mode == "kvikio" else "pinned ring") in loaded[0].path
        space.check()


@pytest.mark.parametrize("frames", [8, 64], ids=["pages leave", "all stay"])
@pytest.mark.parametrize(
    ("stored", "loaded"),
    [("posix", "posix"), ("kvikio", "kvikio"), ("kvikio", "posix"), ("posix", "kvikio")],
)
def test_pages_that_a_kernel_wrote_are_adopted_after_a_restart(
    tmp_path: Path, stored: Mode, loaded: Mode, frames: int
) -> None:
    """Either way writes what the other way verifies, and nothing has to leave to be kept."""
    pytest.importorskip("torch")
    if "kvikio" in (stored, loaded) and not (find_spec("kvikio") and find_spec("cupy")):
        pytest.skip("kvikio and cupy are not installed")
    leave(tmp_path / "slab", stored, frames)
    find_all(tmp_path / "slab", loaded)
