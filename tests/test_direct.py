"""From nvme.mode to the route that bytes really take, with a CPU device in the GPU's place."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.nvme.test_kvikio import PlainFile
from tiermem import assemble, drive
from tiermem.assemble import Ground, Parts
from tiermem.config import Config, Gpu, Host, Nvme
from tiermem.errors import ConfigError
from tiermem.gpu.digest import ProcessorDigest
from tiermem.gpu.emulated import EmulatedDevice
from tiermem.nvme import kvikio
from tiermem.nvme.cap import bytes_for
from tiermem.nvme.kvikio import Probe
from tiermem.space import Space
from tiermem.tier import Addresses, Place

PAGE = 64 << 10
SLOTS = 32
FAST = Probe("gds", 6.0, 6.0, "", 3.0, 3.0)
SLOW = Probe("compat", 2.0, 2.0, "gds: no nvidia-fs; ", 3.0, 3.0)
NONE = Probe("none", reason="gds: no answer; compat: no answer")


class OddDigest(ProcessorDigest):
    """Of a GPU that computes other checksums."""

    def __call__(self, addresses: Addresses) -> np.ndarray:
        return super().__call__(addresses) + np.uint64(1)


class GpuLike(EmulatedDevice):
    """Memory that the drive is not told to reach by itself."""

    torch_device = "cuda:0"
    odd = False

    def digest(self) -> ProcessorDigest:
        return OddDigest(self.page_bytes) if self.odd else super().digest()


def config(where: Path, mode: str, **nvme: object) -> Config:
    return Config(
        gpu=Gpu(device="cpu", budget=4 * PAGE, page=PAGE),
        host=Host(capacity=64 * PAGE),
        nvme=Nvme(path=where, capacity=bytes_for(SLOTS, PAGE), mode=mode, **nvme),  # type: ignore[arg-type]
    )


Plant = Callable[..., None]


@pytest.fixture
def plant(monkeypatch: pytest.MonkeyPatch) -> Plant:
    """A machine on which the probe finds this; odd: whose GPU miscalculates."""

    def made(found: Probe, *, odd: bool = False, installed: bool = True) -> None:
        def opened(config: Config, ground: Ground, first: int | None) -> Parts:
            device = GpuLike(PAGE, 4, 4)
            device.odd = odd
            slots = {Place.GPU: 4, Place.HOST: 64, Place.NVME: SLOTS}
            return Parts(device, slots, closers=[device.close])

        monkeypatch.setattr(assemble, "_open", opened)
        monkeypatch.setattr(kvikio, "probe", lambda where: found)
        monkeypatch.setattr(kvikio, "KvikioFile", PlainFile)
        monkeypatch.setattr(drive, "find_spec", lambda name: object() if installed else None)

    return made


def path_taken(where: Path, mode: str, **nvme: object) -> str:
    """Pages go down past a host tier that is kept empty, come back equal; by which way."""
    with Space.open(config(where, mode, **nvme)) as space:
        assert space.pager.drain(10)
        region = space.reserve(16 * PAGE)
        words = region.view(np.uint64)
        pages = region.allocate(3)
        for page in pages.tolist():
            with region.use(page, "write"):
                words[page] = np.arange(PAGE // 8, dtype=np.uint64) * np.uint64(page + 1)
                region.label([page], np.array([[page + 1, 3]], np.uint64))
        if nvme.get("persist"):
            assert space.save() == 0
            region.close()
            region = space.reserve(16 * PAGE)
            words = region.view(np.uint64)
            got = region.adopt(np.array([[p + 1, 3] for p in pages.tolist()], np.uint64))
            for page, old in zip(got.tolist(), pages.tolist(), strict=True):
                with region.use(page):
                    expected = np.arange(PAGE // 8, dtype=np.uint64) * np.uint64(old + 1)
                    assert (words[page] == expected).all()
        routes = {(r.src, r.dst): r for r in space.statistics().routes}
        there, back = routes[Place.GPU, Place.NVME], routes[Place.NVME, Place.GPU]
        assert there.path == back.path
        if nvme.get("persist"):
            assert (there.pages, back.pages) == (3, 3)
        space.check()
        return there.path


@pytest.mark.parametrize("mode", ["auto", "kvikio"])
def test_a_faster_direct_path_that_verifies_carries_the_bytes(
    tmp_path: Path, plant: Plant, mode: str
) -> None:
    plant(FAST)
    assert path_taken(tmp_path / "slab", mode, persist=True) == "kvikio"


@pytest.mark.parametrize(("mode", "direct"), [("auto", False), ("kvikio", True)])
def test_a_slower_direct_path_is_taken_only_on_demand(
    tmp_path: Path, plant: Plant, mode: str, direct: bool
) -> None:
    plant(SLOW)
    assert (path_taken(tmp_path / "slab", mode, persist=True) == "kvikio") is direct


@pytest.mark.parametrize(
    ("found", "given", "says"),
    [
        (NONE, {}, "kvikio does not work here .gds: no answer"),
        (FAST, {"odd": True}, "computes other checksums than the processor"),
        (FAST, {"installed": False}, "the package is missing"),
    ],
    ids=["no path", "odd checksums", "not installed"],
)
def test_what_cannot_be_trusted_is_not_taken(
    tmp_path: Path, plant: Plant, found: Probe, given: dict[str, bool], says: str
) -> None:
    plant(found, **given)
    assert "pinned ring" in path_taken(tmp_path / "slab", "auto", persist=True)
    with pytest.raises(ConfigError, match=rf"nvme\.mode = kvikio: .*{says}.*use auto or posix"):
        path_taken(tmp_path / "slab", "kvikio")


def test_an_encrypted_slab_goes_through_the_host(tmp_path: Path, plant: Plant) -> None:
    pytest.importorskip("cryptography")
    plant(FAST)
    assert "AES-256-GCM" in path_taken(tmp_path / "slab", "auto", encrypt=True)
    with pytest.raises(ConfigError, match="cannot be encrypted"):
        path_taken(tmp_path / "slab", "kvikio", encrypt=True)


def test_posix_asks_nobody(tmp_path: Path, plant: Plant, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(FAST)
    monkeypatch.setattr(kvikio, "probe", lambda where: pytest.fail("a probe was started"))
    assert "pinned ring" in path_taken(tmp_path / "slab", "posix")
