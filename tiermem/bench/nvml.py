"""What NVML knows of the GPUs, as plain records; everything optional, nothing kept open.

`read()` asks the driver through nvidia-ml-py. A captured record (nvml.json beside a captured sysfs
tree) decodes into the same types, so that machines we do not own can be looked at.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable
from types import ModuleType

import msgspec


class Gpu(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One GPU. None: the driver would not say (usual in virtual machines)."""

    index: int
    name: str
    bus_id: str
    """As sysfs writes it: 0000:17:00.0."""
    memory_bytes: int | None = None
    gen_now: int | None = None
    gen_max: int | None = None
    """Highest PCIe generation that the GPU and the slot both support."""
    width_now: int | None = None
    width_max: int | None = None
    pstate: int | None = None
    """0 = full clocks. A GPU that idles may lower its link speed to save power."""


class Pair(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How two GPUs (a < b, indices) reach each other."""

    a: int
    b: int
    nvlinks: int = 0
    """Active links from a to b, directly or through NVSwitch."""
    nvlink_gbps: float | None = None
    """Theoretical GB/s one way, all links together."""
    p2p: str = "unknown"
    """ok, or the driver's reason why reads between the two are not possible."""


class Nvml(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    driver: str
    cuda: str
    """Highest CUDA version that this driver supports, like 13.0."""
    gpus: tuple[Gpu, ...] = ()
    pairs: tuple[Pair, ...] = ()


P2P_READ, SWITCH = 0, 2
"""Of nvml.h: the index of reads between peers, the device type of an NVSwitch. nvidia-ml-py 13.615
makes a tuple of the first by a stray comma."""

NVLINK_GBPS = {1: 20.0, 2: 25.0, 3: 25.0, 4: 25.0, 5: 25.0, 6: 25.0, 7: 50.0}
"""GB/s one way of one link, by nvmlNvlinkVersion_t: 1.0, 2.0, 2.2, 3.0, 3.1, 4.0, 5.0 (NVIDIA's
data sheets: 18 links of version 4.0 make 450). The driver's own speed field reads 0 on an H200."""

P2P_STATUS = {
    0: "ok",
    1: "chipset not supported",
    2: "GPU not supported",
    3: "no route through the I/O hub",
    4: "disabled by the driver's registry key",
    5: "not supported",
}


def read() -> Nvml | str:
    """Ask the driver; a sentence that says why when it cannot be asked. Never raises."""
    try:
        nv = importlib.import_module("pynvml")
    except ImportError:
        return "nvidia-ml-py is not installed (pip install nvidia-ml-py)"
    try:
        nv.nvmlInit()
    except nv.NVMLError as error:
        return f"the NVIDIA driver does not answer ({error})"
    try:
        return _read(nv)
    except nv.NVMLError as error:
        return f"NVML failed half way ({error})"
    finally:
        with contextlib.suppress(nv.NVMLError):
            nv.nvmlShutdown()


def bus_id(nvml_id: str) -> str:
    """sysfs's spelling of NVML's bus id: 00000000:17:00.0 becomes 0000:17:00.0."""
    domain, _, rest = nvml_id.partition(":")
    return f"{int(domain, 16):04x}:{rest.lower()}"


def _read(nv: ModuleType) -> Nvml:
    version = int(nv.nvmlSystemGetCudaDriverVersion_v2())
    handles = [nv.nvmlDeviceGetHandleByIndex(i) for i in range(int(nv.nvmlDeviceGetCount()))]
    gpus = tuple(_gpu(nv, i, handle) for i, handle in enumerate(handles))
    pairs = tuple(
        _pair(nv, a, b, handles, gpus)
        for a in range(len(handles))
        for b in range(a + 1, len(handles))
    )
    cuda = f"{version // 1000}.{version % 1000 // 10}"
    return Nvml(_text(nv.nvmlSystemGetDriverVersion()), cuda, gpus, pairs)


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


def _ask(nv: ModuleType, name: str, *args: object) -> int | None:
    """An NVML query that many machines refuse; None then."""
    query: Callable[..., int] | None = getattr(nv, name, None)
    if query is None:
        return None
    try:
        return int(query(*args))
    except nv.NVMLError:
        return None


def _gpu(nv: ModuleType, index: int, handle: object) -> Gpu:
    try:
        memory = int(nv.nvmlDeviceGetMemoryInfo(handle).total)
    except nv.NVMLError:
        memory = None
    return Gpu(
        index=index,
        name=_text(nv.nvmlDeviceGetName(handle)),
        bus_id=bus_id(_text(nv.nvmlDeviceGetPciInfo(handle).busId)),
        memory_bytes=memory,
        gen_now=_ask(nv, "nvmlDeviceGetCurrPcieLinkGeneration", handle),
        gen_max=_ask(nv, "nvmlDeviceGetMaxPcieLinkGeneration", handle),
        width_now=_ask(nv, "nvmlDeviceGetCurrPcieLinkWidth", handle),
        width_max=_ask(nv, "nvmlDeviceGetMaxPcieLinkWidth", handle),
        pstate=_ask(nv, "nvmlDeviceGetPerformanceState", handle),
    )


def _pair(nv: ModuleType, a: int, b: int, handles: list[object], gpus: tuple[Gpu, ...]) -> Pair:
    status = _ask(nv, "nvmlDeviceGetP2PStatus", handles[a], handles[b], P2P_READ)
    links = _nvlinks(nv, handles[a], gpus[b].bus_id)
    if not _nvlinks(nv, handles[b], gpus[a].bus_id):
        links = 0  # a switch is on one side only: the two share no fabric
    version = _ask(nv, "nvmlDeviceGetNvLinkVersion", handles[a], 0) if links else None
    speed = NVLINK_GBPS.get(version or 0)
    return Pair(
        a=a,
        b=b,
        nvlinks=links,
        nvlink_gbps=None if speed is None else speed * links,
        p2p="unknown" if status is None else P2P_STATUS.get(status, "unknown"),
    )


def _nvlinks(nv: ModuleType, handle: object, peer: str) -> int:
    """Active links that end at `peer` or at a switch."""
    links = 0
    for link in range(int(nv.NVML_NVLINK_MAX_LINKS)):
        if _ask(nv, "nvmlDeviceGetNvLinkState", handle, link) != 1:
            continue
        try:
            remote = bus_id(_text(nv.nvmlDeviceGetNvLinkRemotePciInfo(handle, link).busId))
        except nv.NVMLError:
            remote = ""
        kind = _ask(nv, "nvmlDeviceGetNvLinkRemoteDeviceType", handle, link)
        links += remote == peer or kind == SWITCH
    return links
