"""How a device that cannot reach the drive itself gets there."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tiermem.assemble import assemble, near
from tiermem.config import Config, Gpu, Host, Nvme
from tiermem.errors import ConfigError
from tiermem.gpu.emulated import EmulatedDevice
from tiermem.nvme.cap import bytes_for
from tiermem.space import Space
from tiermem.tier import Place


def config(tmp_path: Path, host: int) -> Config:
    return Config(
        gpu=Gpu(device="cpu", budget=4 * 4096, page=4096),
        host=Host(capacity=host * 4096),
        nvme=Nvme(path=tmp_path / "slab", capacity=bytes_for(64, 4096)),
    )


@pytest.fixture
def no_direct_access(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU device is taken for one whose frames the drive cannot read or write."""
    monkeypatch.setattr(EmulatedDevice, "torch_device", "cuda:0")


@pytest.mark.usefixtures("no_direct_access")
def test_bytes_cross_between_gpu_and_drive_through_a_part_of_the_host_tier(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = config(tmp_path, host=16)
    parts = assemble(given)
    assert parts.capacities[Place.HOST] == 12
    assert "ring" in parts.paths[Place.NVME, Place.GPU]
    monkeypatch.undo()
    with Space(given, parts) as space, space.reserve(48 * 4096) as region:
        words = region.view(np.int64)
        pages = [int(region.allocate(1)[0]) for _ in range(48)]
        for page in pages:
            with region.use(page, "fresh"):
                words[page] = page
        for page in pages:
            with region.use(page):
                assert (words[page] == page).all()
        space.check()
        loaded = {(r.src, r.dst): r.pages for r in space.statistics().routes}
        assert loaded[Place.NVME, Place.GPU] > 0


@pytest.mark.usefixtures("no_direct_access")
def test_a_host_tier_too_small_for_the_way_to_the_drive_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"host\.capacity.*7 pages.*at least 8"):
        assemble(config(tmp_path, host=7))


class OnNode:
    """A device that says which node of host memory is nearest to it."""

    def __init__(self, numa_node: int | None) -> None:
        self.numa_node = numa_node


def test_host_memory_is_populated_from_the_node_of_the_gpu(tmp_path: Path) -> None:
    base = tmp_path / "sys/devices/system/node"
    for node, cpus in ((0, "0-3"), (1, "4-7")):
        (base / f"node{node}").mkdir(parents=True)
        (base / f"node{node}/cpulist").write_text(cpus)
    (base / "has_memory").write_text("0-1\n")
    assert near(OnNode(1), tmp_path) == (4, 5, 6, 7)  # type: ignore[arg-type]
    assert near(OnNode(None), tmp_path) == ()  # type: ignore[arg-type]
    (base / "has_memory").write_text("0\n")
    assert near(OnNode(0), tmp_path) == ()  # type: ignore[arg-type]
