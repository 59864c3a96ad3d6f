from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import pytest

from tiermem.bench import nvml


class FakeNvml(ModuleType):
    """Two GPUs behind NVSwitch, as nvidia-ml-py answers; `refused` names what the driver denies."""

    NVML_NVLINK_MAX_LINKS = 3
    NVML_P2P_CAPS_INDEX_READ = (0,)

    class NVMLError(Exception):
        pass

    def __init__(self, refused: tuple[str, ...] = (), peers: tuple[int, ...] = (2, 2)) -> None:
        super().__init__("pynvml")
        self.refused = refused
        self.peers = peers
        self.open = 0

    def answer(self, name: str, value: object) -> object:
        if name in self.refused:
            raise self.NVMLError(f"{name}: Not Supported")
        return value

    def nvmlInit(self) -> None:
        self.answer("nvmlInit", None)
        self.open += 1

    def nvmlShutdown(self) -> None:
        self.open -= 1

    def nvmlSystemGetDriverVersion(self) -> object:
        return self.answer("nvmlSystemGetDriverVersion", b"580.1")

    def nvmlSystemGetCudaDriverVersion_v2(self) -> int:
        return 13010

    def nvmlDeviceGetCount(self) -> int:
        return 2

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetName(self, handle: int) -> str:
        return "Made GPU"

    def nvmlDeviceGetPciInfo(self, handle: int) -> SimpleNamespace:
        return SimpleNamespace(busId=f"00000000:{0xA0 + handle:02X}:00.0")

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> object:
        return self.answer("nvmlDeviceGetMemoryInfo", SimpleNamespace(total=80 << 30))

    def nvmlDeviceGetCurrPcieLinkGeneration(self, handle: int) -> object:
        return self.answer("nvmlDeviceGetCurrPcieLinkGeneration", 5)

    def nvmlDeviceGetMaxPcieLinkGeneration(self, handle: int) -> int:
        return 5

    def nvmlDeviceGetCurrPcieLinkWidth(self, handle: int) -> int:
        return 16

    def nvmlDeviceGetMaxPcieLinkWidth(self, handle: int) -> int:
        return 16

    def nvmlDeviceGetPerformanceState(self, handle: int) -> int:
        return 0

    def nvmlDeviceGetP2PStatus(self, a: int, b: int, index: int) -> object:
        if not isinstance(index, int):
            raise TypeError("Don't know how to convert parameter 3")
        return self.answer("nvmlDeviceGetP2PStatus", 0)

    def nvmlDeviceGetNvLinkState(self, handle: int, link: int) -> object:
        return self.answer("nvmlDeviceGetNvLinkState", int(link < self.peers[handle]))

    def nvmlDeviceGetNvLinkRemotePciInfo(self, handle: int, link: int) -> object:
        return self.answer("remote", SimpleNamespace(busId="00000000:C0:00.0"))

    def nvmlDeviceGetNvLinkRemoteDeviceType(self, handle: int, link: int) -> int:
        return 2

    def nvmlDeviceGetNvLinkVersion(self, handle: int, link: int) -> object:
        return self.answer("nvmlDeviceGetNvLinkVersion", 6)


def ask(monkeypatch: pytest.MonkeyPatch, fake: FakeNvml) -> nvml.Nvml | str:
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    found = nvml.read()
    assert fake.open == 0
    return found


def test_gpus_and_their_links_are_read_in_sysfs_spelling(monkeypatch: pytest.MonkeyPatch) -> None:
    found = ask(monkeypatch, FakeNvml())
    assert isinstance(found, nvml.Nvml)
    assert (found.driver, found.cuda) == ("580.1", "13.1")
    assert [gpu.bus_id for gpu in found.gpus] == ["0000:a0:00.0", "0000:a1:00.0"]
    assert found.pairs == (nvml.Pair(0, 1, nvlinks=2, nvlink_gbps=50.0, p2p="ok"),)


def test_what_the_driver_denies_is_unknown_and_the_rest_is_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    denied = (
        "nvmlDeviceGetMemoryInfo",
        "nvmlDeviceGetCurrPcieLinkGeneration",
        "nvmlDeviceGetP2PStatus",
        "nvmlDeviceGetNvLinkState",
    )
    found = ask(monkeypatch, FakeNvml(denied))
    assert isinstance(found, nvml.Nvml)
    assert (found.gpus[0].memory_bytes, found.gpus[0].gen_now) == (None, None)
    assert found.gpus[0].width_now == 16
    assert found.pairs == (nvml.Pair(0, 1),)


def test_an_nvlink_of_unknown_version_has_links_without_a_rate(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = ask(monkeypatch, FakeNvml(("nvmlDeviceGetNvLinkVersion", "remote")))
    assert isinstance(found, nvml.Nvml)
    assert (found.pairs[0].nvlinks, found.pairs[0].nvlink_gbps) == (2, None)


def test_a_gpu_outside_the_fabric_has_no_nvlink_to_those_inside(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = ask(monkeypatch, FakeNvml(peers=(2, 0)))
    assert isinstance(found, nvml.Nvml)
    assert found.pairs[0].nvlinks == 0


@pytest.mark.parametrize("call", ["nvmlInit", "nvmlSystemGetDriverVersion"])
def test_a_driver_that_does_not_answer_is_a_sentence(
    monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    found = ask(monkeypatch, FakeNvml((call,)))
    assert isinstance(found, str)
    assert "Not Supported" in found


def test_without_the_package_the_sentence_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    found = nvml.read()
    assert isinstance(found, str)
    assert "pip install nvidia-ml-py" in found
