"""What Linux tells about PCIe devices and NUMA nodes, read from a sysfs tree, live or captured.

Nothing is required to be there: virtual machines and containers hide most of it, and a field that
cannot be read is None. No decision is made here; `paths` draws the conclusions.
"""

from __future__ import annotations

import re
import struct
from pathlib import Path

import msgspec

from tiermem.bench import links
from tiermem.bench.links import Link

NVIDIA = "0x10de"
HYPERVISORS = {"0x1af4": "virtio", "0x1b36": "QEMU", "0x15ad": "VMware", "0x1414": "Hyper-V"}
"""PCI vendors whose devices exist in virtual machines only."""


class Device(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One PCI function."""

    bdf: str
    kind: str
    """gpu, nvme, disk, nic, bridge, other."""
    name: str
    """Block devices, network interfaces, or vendor:device in hex."""
    model: str | None = None
    root: str
    """Host bridge, as pci0000:00."""
    above: tuple[str, ...] = ()
    """Bridges between the host bridge and this device, the nearest to the host bridge first."""
    now: Link = Link()
    most: Link = Link()
    node: int | None = None
    """NUMA node, None where the firmware does not say."""
    iommu_group: int | None = None
    acs_redirect: bool | None = None
    """Bridges: peer traffic is sent up to the root complex. None without the right to read it."""
    peer_memory_bytes: int | None = None
    """Memory of the device that other devices may read and write (p2pdma, an NVMe's CMB)."""


class Node(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One NUMA node."""

    index: int
    cpus: str
    memory_bytes: int | None
    socket: int | None
    distances: tuple[int, ...] = ()


class Sysfs(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    devices: tuple[Device, ...]
    nodes: tuple[Node, ...]
    iommu: str
    """off, translating, identity, or unknown."""
    virtual: str | None
    """What gives the virtual machine away; None where nothing does."""


def read(root: Path) -> Sysfs:
    """Read root/sys and root/proc/meminfo. A foreign tree gives no devices and no nodes."""
    sys = root / "sys"
    links_in = sys / "bus/pci/devices"
    found = [_device(path) for path in _listed(links_in)]
    devices = tuple(device for device in found if device is not None)
    return Sysfs(devices, _nodes(root), _iommu(sys), _virtual(sys))


def _listed(folder: Path, pattern: str = "*") -> list[Path]:
    return sorted(folder.glob(pattern)) if folder.is_dir() else []


def _text(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except (OSError, UnicodeDecodeError):
        return None


def _number(path: Path) -> int | None:
    text = _text(path)
    try:
        return None if text is None else int(text, 0)
    except ValueError:
        return None


BDF = re.compile(r"[0-9a-f]{4,}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]")
ROOT = re.compile(r"pci[0-9a-f]{4,}:[0-9a-f]{2}")


def _device(path: Path) -> Device | None:
    real = path.resolve()
    root = next((part for part in real.parts if ROOT.fullmatch(part)), None)
    chain = tuple(part for part in real.parts if BDF.fullmatch(part))
    if root is None or not chain:
        return None
    code = _number(real / "class") or 0
    vendor, product = _text(real / "vendor") or "?", _text(real / "device") or "?"
    blocks, nics = _blocks(real), _names(real, ("net/*", "infiniband/*"))
    kind = _kind(code, vendor, bool(blocks))
    node = _number(real / "numa_node")
    group = real / "iommu_group"
    return Device(
        bdf=chain[-1],
        kind=kind,
        name=", ".join(blocks or nics) or f"{vendor[2:]}:{product[2:]}",
        model=_model(real),
        root=root,
        above=chain[:-1],
        now=links.parse(_text(real / "current_link_speed"), _text(real / "current_link_width")),
        most=links.parse(_text(real / "max_link_speed"), _text(real / "max_link_width")),
        node=node if node is not None and node >= 0 else None,
        iommu_group=int(group.readlink().name) if group.is_symlink() else None,
        acs_redirect=_acs_redirect(real / "config") if kind == "bridge" else None,
        peer_memory_bytes=_number(real / "p2pmem/size"),
    )


def _kind(code: int, vendor: str, has_blocks: bool) -> str:
    base, sub = code >> 16, code >> 8
    if base == 0x03 and vendor == NVIDIA:
        return "gpu"
    if sub == 0x0108:
        return "nvme"
    if has_blocks:
        return "disk"
    if base == 0x02:
        return "nic"
    return "bridge" if sub == 0x0604 else "other"


def _names(real: Path, patterns: tuple[str, ...]) -> list[str]:
    return sorted(path.name for pattern in patterns for path in real.glob(pattern))


def _blocks(real: Path) -> list[str]:
    namespaces = [path.name for path in real.glob("nvme/nvme*/nvme*n*")]
    # nvme0c0n1 is one path to a namespace, not a block device
    plain = [name for name in namespaces if re.fullmatch(r"nvme\d+n\d+", name)]
    controllers = [path.name for path in real.glob("nvme/nvme*")]
    return sorted(plain or controllers) or _names(
        real, ("virtio*/block/*", "ata*/host*/*/*/block/*")
    )


def _model(real: Path) -> str | None:
    models = [_text(path) for path in sorted(real.glob("nvme/nvme*/model"))]
    return models[0] if models else None


ACS_CAPABILITY = 0x0D
ACS_REDIRECT = 0b1100
"""Request redirect and completion redirect in the ACS control register."""


def _acs_redirect(config: Path) -> bool | None:
    """Walk the extended capabilities of a configuration space; whole only for the superuser."""
    try:
        data = config.read_bytes()
    except OSError:
        return None
    if len(data) < 4096:
        return None
    offset, steps = 0x100, 0
    while 0x100 <= offset <= 4096 - 8 and steps < 64:
        (header,) = struct.unpack_from("<I", data, offset)
        if header & 0xFFFF == ACS_CAPABILITY:
            (control,) = struct.unpack_from("<H", data, offset + 6)
            return bool(control & ACS_REDIRECT)
        offset, steps = header >> 20, steps + 1
    return False


def _nodes(root: Path) -> tuple[Node, ...]:
    sys = root / "sys"
    paths = _listed(sys / "devices/system/node", "node[0-9]*")
    # with one node the machine's own figure is the better one: seen in virtual machines whose
    # memory is plugged in later, where node0/meminfo said 5 GiB of 252
    whole = _text(root / "proc/meminfo") if len(paths) == 1 else None
    found = []
    for path in paths:
        cpus = _text(path / "cpulist") or ""
        first = re.match(r"\d+", cpus)
        cpu = sys / f"devices/system/cpu/cpu{first.group() if first else 0}"
        total = re.search(r"MemTotal:\s+(\d+) kB", whole or _text(path / "meminfo") or "")
        distances = (_text(path / "distance") or "").split()
        found.append(
            Node(
                index=int(path.name.removeprefix("node")),
                cpus=cpus,
                memory_bytes=int(total.group(1)) * 1024 if total else None,
                socket=_number(cpu / "topology/physical_package_id") if first else None,
                distances=tuple(int(distance) for distance in distances),
            )
        )
    return tuple(sorted(found, key=lambda node: node.index))


def _iommu(sys: Path) -> str:
    types = {_text(path) for path in _listed(sys / "kernel/iommu_groups", "*/type")}
    if types & {"DMA", "DMA-FQ"}:
        return "translating"
    if "identity" in types:
        return "identity"
    if (sys / "class/iommu").is_dir():
        return "unknown" if _listed(sys / "class/iommu") else "off"
    return "unknown"


def _virtual(sys: Path) -> str | None:
    hypervisor = _text(sys / "hypervisor/type")
    if hypervisor:
        return hypervisor
    for path in _listed(sys / "bus/pci/devices"):
        vendor = _text(path / "vendor")
        if vendor in HYPERVISORS:
            return f"a {HYPERVISORS[vendor]} device at {path.name}"
    return None
