"""What the doctor says of host memory: limits, pinning, huge pages, shared memory, mappings."""

from __future__ import annotations

import re
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from tiermem.bench.findings import Line, note, ok, problem
from tiermem.config import Config
from tiermem.errors import ConfigError
from tiermem.host import limits
from tiermem.host.pinned import HUGE, HostPool
from tiermem.units import format_bytes

GIB = 1 << 30
POOL_S = 10.0
SMALL_SHM = GIB
"""Docker gives 64 MiB unless told otherwise; engines with several ranks fail below about this."""
MAPS = 262_144
"""vm.max_map_count: the default 65,530 ends at about 32,000 isolated pages (2-core machine,
emulated device, 2026-11)."""


def host_lines(config: Config, root: Path = Path("/")) -> Iterator[Line]:
    """root: where /proc and /sys are, for captured machines."""
    yield _memory(config, root)
    yield _cgroup(root)
    yield _memlock()
    yield _huge_pages(root, pool_huge_bytes() if root == Path("/") else None)
    yield _shared_memory(root)
    yield _mappings(config, root)


def _memory(config: Config, root: Path) -> Line:
    tightest = limits.limits(root)[0]
    room = format_bytes(max(0, tightest.room))
    text = f"{room} may be taken under {tightest.source}"
    capacity = config.host.capacity
    if not config.host.enabled:
        return ok("host memory", f"{text}; the host tier is off")
    if isinstance(capacity, int):
        try:
            limits.check(capacity, root)
        except ConfigError as error:
            return problem("host memory", str(error), "lower host.capacity, or raise that limit")
        return ok("host memory", f"{text}; host.capacity is {format_bytes(capacity)}")
    wanted = format_bytes(max(0.0, capacity * tightest.room))
    return ok("host memory", f"{text}; host.capacity takes {capacity:.0%} of it, {wanted}")


def _cgroup(root: Path) -> Line:
    """The tightest memory limit of a cgroup above us, whether or not it is what binds first."""
    found = min(limits.cgroup_limits(root), key=lambda limit: limit.room, default=None)
    if found is None:
        return ok("cgroup", "no memory limit above this process is shown")
    room = format_bytes(max(0, found.room))
    return ok("cgroup", f"{found.source}: {format_bytes(found.total)}, {room} of it left")


def _memlock() -> Line:
    soft, hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if soft == resource.RLIM_INFINITY:
        return ok("memlock", "unlimited")
    raised = "" if hard != resource.RLIM_INFINITY else " (ulimit -l unlimited is allowed)"
    return note(
        "memlock",
        f"{format_bytes(soft)}; the CUDA driver pins without it, RDMA libraries need it{raised}",
        "ulimit -l unlimited, or --ulimit memlock=-1 for a container",
    )


def _huge_pages(root: Path, tried: tuple[int, int] | None) -> Line:
    """tried: what the pinned pool, a memfd, was given, which decides; else the system's setting."""
    setting = root / "sys/kernel/mm/transparent_hugepage/shmem_enabled"
    chosen = re.search(r"\[(\w+)\]", _text(setting))
    says = "the kernel does not say" if chosen is None else f"the setting says {chosen[1]}"
    if tried is not None:
        got, wanted = tried
        if got == wanted:
            return ok("huge pages", f"the pinned pool gets them ({says}; tried)")
        text = f"the pinned pool got {format_bytes(got)} of {format_bytes(wanted)} in them ({says})"
    elif chosen is not None and chosen[1] in ("always", "advise", "within_size", "force"):
        return ok("huge pages", f"shared memory: {says}")
    else:
        text = f"shared memory: {says}"
    return note(
        "huge pages",
        f"{text}; disk I/O into 4 KiB pages reached 1.0 GiB/s where huge pages reached 3.0 "
        "(2-core machine, 2026-11)",
        f"echo advise > /{setting.relative_to(root)}",
    )


def pool_huge_bytes(slots: int = 4) -> tuple[int, int] | None:
    """(bytes in huge pages, bytes) of a small pool made as the host tier's is; None if not told."""
    with HostPool(HUGE, slots) as pool:
        if not pool.wait_ready(slots, POOL_S):
            return None
        start = int(pool.addresses(np.zeros(1, np.int32))[0])
        end = start + slots * HUGE
        found = huge_bytes(_text(Path("/proc/self/smaps")), start, end)
    return None if found is None else (found, slots * HUGE)


def huge_bytes(smaps: str, start: int, end: int) -> int | None:
    """Bytes of shared huge pages in the mappings within [start, end), by a smaps file."""
    total, inside, seen = 0, False, False
    for line in smaps.splitlines():
        mapping = re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line)
        if mapping:
            inside = start <= int(mapping[1], 16) and int(mapping[2], 16) <= end
        elif inside and line.startswith("ShmemPmdMapped:"):
            seen, total = True, total + int(line.split()[1]) * 1024
    return total if seen else None


def _shared_memory(root: Path) -> Line:
    path = root / "dev/shm"
    try:
        total, _, free = shutil.disk_usage(path)
    except OSError:
        return note("/dev/shm", "is not there", "mount a tmpfs on it; engines with ranks need it")
    text = f"{format_bytes(free)} free of {format_bytes(total)}"
    if free < SMALL_SHM:
        return note(
            "/dev/shm",
            f"{text}: engines with several ranks may fail to start",
            "--shm-size=8g or --ipc=host for a container",
        )
    return ok("/dev/shm", text)


def _mappings(config: Config, root: Path) -> Line:
    count = _text(root / "proc/sys/vm/max_map_count").strip()
    if not count.isdigit():
        return note("mappings", "vm.max_map_count is not shown")
    if config.gpu.device == "cpu" and int(count) < MAPS:
        return note(
            "mappings",
            f"vm.max_map_count is {int(count):,}: the CPU device needs two mappings for each "
            "isolated page",
            f"sysctl vm.max_map_count={MAPS}",
        )
    return ok("mappings", f"vm.max_map_count is {int(count):,}")


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
