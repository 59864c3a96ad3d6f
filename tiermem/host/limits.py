"""How much host memory may be used: what is available, less what any cgroup above us forbids.

cgroups may be v1, v2 or a mix (a v2 tree without the memory controller beside a v1 tree with it),
and every level up to the root of the hierarchy can hold the limit that binds. Everything is read
below a root path, so that tests bring trees captured from real machines.
"""

from __future__ import annotations

import os
import resource
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import psutil

from tiermem.errors import ConfigError

GIB = 1 << 30
UNLIMITED_V1 = 1 << 60
"""v1 writes "no limit" as the largest multiple of a page below 2^63."""


@dataclass(frozen=True, slots=True)
class Limit:
    """`room` bytes may still be taken because of `source`, which allows `total` in all."""

    room: int
    total: int
    source: str


@dataclass(frozen=True, slots=True)
class _Mount:
    """A cgroup file system: where it is mounted and which cgroup its top shows."""

    point: str
    top: str
    version: int
    controllers: frozenset[str]


def limits(
    root: str | os.PathLike[str] = "/",
    *,
    available: int | None = None,
    locked: bool = False,
) -> tuple[Limit, ...]:
    """Every limit on more host memory, tightest first.

    available: bytes that the machine could still give; by default psutil's figure.
    locked: count RLIMIT_MEMLOCK too, for memory that will be mlock()ed. The CUDA driver pins
    without it, so a pinned pool does not set this.
    """
    total = psutil.virtual_memory().total
    if available is None:
        available = psutil.virtual_memory().available
    found = [Limit(available, total, "memory available on the machine")]
    found += cgroup_limits(root)
    if locked:
        soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
        if soft != resource.RLIM_INFINITY:
            found.append(Limit(soft, soft, "RLIMIT_MEMLOCK (ulimit -l)"))
    return tuple(sorted(found, key=lambda limit: limit.room))


def available_bytes(root: str | os.PathLike[str] = "/") -> int:
    """Bytes of host memory that may still be used; never negative."""
    return max(0, limits(root)[0].room)


def check(
    capacity: int,
    root: str | os.PathLike[str] = "/",
    *,
    available: int | None = None,
    locked: bool = False,
    key: str = "host.capacity",
) -> Limit:
    """The limit that binds first; ConfigError if `capacity` bytes do not fit under it."""
    tightest = limits(root, available=available, locked=locked)[0]
    if capacity > tightest.room:
        raise ConfigError(
            f"{key}: {capacity / GIB:.2f} GiB asked for, {max(0, tightest.room) / GIB:.2f} GiB may "
            f"be taken under {tightest.source} ({tightest.total / GIB:.2f} GiB in all); "
            f"lower {key} or raise that limit"
        )
    return tightest


def cgroup_limits(root: str | os.PathLike[str] = "/") -> list[Limit]:
    """The memory limits of our cgroup and of every one above it that we can see."""
    base = Path(root)
    try:
        lines = (base / "proc/self/cgroup").read_text().splitlines()
        mounts = _cgroup_mounts((base / "proc/self/mountinfo").read_text())
    except OSError:
        return []
    found: list[Limit] = []
    for line in lines:
        number, _, rest = line.partition(":")
        names, _, path = rest.partition(":")
        if number == "0" and not names:
            mount = next((m for m in mounts if m.version == 2), None)
        elif "memory" in names.split(","):
            mount = next((m for m in mounts if "memory" in m.controllers), None)
        else:
            continue
        if mount is not None:
            found += _walk(base, mount, path)
    return found


def _cgroup_mounts(text: str) -> list[_Mount]:
    """The cgroup lines of a mountinfo file: `id parent dev root point options - type src super`."""
    mounts = []
    for line in text.splitlines():
        left, separator, right = line.partition(" - ")
        fields, kind = left.split(), right.split()
        if not separator or len(fields) < 5 or len(kind) < 3:
            continue
        if kind[0] in ("cgroup", "cgroup2"):
            version = 2 if kind[0] == "cgroup2" else 1
            mounts.append(_Mount(fields[4], fields[3], version, frozenset(kind[2].split(","))))
    return mounts


def _walk(base: Path, mount: _Mount, path: str) -> list[Limit]:
    """Limits from our cgroup up to the top of the mount.

    Inside a container the mount may show only a part of the tree (`top`), or /proc may name a path
    that is not mounted here at all; then the top of the mount is the nearest that we can see.
    """
    point = base / mount.point.lstrip("/")
    try:
        inside = PurePosixPath(path).relative_to(mount.top)
    except ValueError:
        inside = PurePosixPath(path.lstrip("/"))
    here = point / inside
    if ".." in inside.parts or not here.is_dir():
        here = point
    found = []
    while True:
        limit = _limit_v2(here) if mount.version == 2 else _limit_v1(here)
        if limit is not None:
            found.append(limit)
        if here == point:
            return found
        here = here.parent


def _limit_v2(directory: Path) -> Limit | None:
    """The tighter of memory.max and memory.high, less what is in use and cannot be reclaimed."""
    tightest: Limit | None = None
    used = _number(directory / "memory.current") or 0
    used -= _cache(directory / "memory.stat", ("inactive_file", "active_file"))
    for name in ("memory.max", "memory.high"):
        total = _number(directory / name)
        if total is not None and (tightest is None or total - used < tightest.room):
            tightest = Limit(total - used, total, str(directory / name))
    return tightest


def _limit_v1(directory: Path) -> Limit | None:
    total = _number(directory / "memory.limit_in_bytes")
    if total is None or total >= UNLIMITED_V1:
        return None
    used = _number(directory / "memory.usage_in_bytes") or 0
    used -= _cache(directory / "memory.stat", ("total_inactive_file", "total_active_file"))
    return Limit(total - used, total, str(directory / "memory.limit_in_bytes"))


def _number(path: Path) -> int | None:
    """The integer in a one-line file; None for "max" or where the file does not exist."""
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def _cache(path: Path, names: tuple[str, ...]) -> int:
    """Bytes of file cache in a memory.stat, which the kernel gives back under pressure."""
    try:
        rows = (line.split() for line in path.read_text().splitlines())
        return sum(int(row[1]) for row in rows if len(row) == 2 and row[0] in names)
    except (OSError, ValueError):
        return 0
