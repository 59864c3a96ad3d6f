"""The machine and software that a measurement was made on: no host names, addresses or users."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path

import msgspec
import psutil

from tiermem.bench import nvml

PACKAGES = ("tiermem", "numpy", "torch", "kvikio", "cuda-python", "vllm", "sglang")


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
    """Installed versions of what figures depend on, read from package metadata without imports."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


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
