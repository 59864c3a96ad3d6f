"""What the doctor says of nvme.path: file system, room, direct I/O (tried), and the way to GDS."""

from __future__ import annotations

import contextlib
import mmap
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import util
from pathlib import Path

from tiermem.bench.findings import Line, note, ok, problem
from tiermem.config import Config
from tiermem.nvme import kvikio
from tiermem.nvme.kvikio import Probe
from tiermem.units import format_bytes, format_exactly

IN_MEMORY = frozenset({"tmpfs", "ramfs", "devtmpfs"})
REMOTE = frozenset({"nfs", "nfs4", "cifs", "smb3", "9p", "virtiofs", "fuse", "fuseblk", "ceph"})
PROBE_S = 12.0
GDS_WAY_OUT = "pip install 'tiermem[gds]', or nvme.mode = auto"
COPYING = frozenset({"btrfs", "zfs", "overlay"})
"""File systems that write elsewhere instead of overwriting, so the slab's slots do not stay put."""


@dataclass(frozen=True, slots=True)
class Mount:
    point: Path
    kind: str
    options: frozenset[str]
    device: str
    """Major and minor number, as 259:0."""


def disk_lines(config: Config, root: Path = Path("/")) -> Iterator[Line]:
    """root: where /proc and /sys are, for captured machines; nvme.path itself is always real."""
    path = config.nvme.path
    if path is None or not config.nvme.enabled:
        yield note("NVMe", "no nvme.path: this tier is off", "name a folder on a local drive")
        return
    folder = _nearest(path)
    mount = mount_of(folder, root)
    yield _file_system(path, mount, root)
    yield _room(config, folder)
    yield _writable(path, folder)
    yield from _gds(config, root, folder)


def _nearest(path: Path) -> Path:
    """The path, or the nearest folder above it that exists: doctor creates nothing there."""
    path = path.expanduser().absolute()
    return next((p for p in (path, *path.parents) if p.is_dir()), Path("/"))


def mount_of(folder: Path, root: Path = Path("/")) -> Mount | None:
    """The mount that holds a folder, by proc/self/mountinfo; None where that cannot be read."""
    try:
        lines = (root / "proc/self/mountinfo").read_text().splitlines()
    except OSError:
        return None
    found: Mount | None = None
    real = folder.resolve()
    for line in lines:
        left, _, right = line.partition(" - ")
        fields, kind = left.split(), right.split()
        if len(fields) < 6 or len(kind) < 3:
            continue
        point = Path(fields[4].replace("\\040", " "))
        # a later mount on the same point hides the earlier one
        if real.is_relative_to(point) and (found is None or point.is_relative_to(found.point)):
            options = frozenset(fields[5].split(",") + kind[2].split(","))
            found = Mount(point, kind[0], options, fields[2])
    return found


def _file_system(path: Path, mount: Mount | None, root: Path) -> Line:
    if mount is None:
        return note("NVMe", f"{path}: the mount is not known")
    where = f"{path}: {mount.kind} at {mount.point}{_drive(mount, root)}"
    local = "choose a folder on ext4 or xfs of a local drive"
    if mount.kind in IN_MEMORY:
        return problem("NVMe", f"{where} is memory, not a drive", local)
    if mount.kind.partition(".")[0] in REMOTE:
        return problem("NVMe", f"{where} is not a local drive", local)
    if "ro" in mount.options:
        return problem("NVMe", f"{where} is mounted read-only", "mount it rw, or " + local)
    if mount.kind in COPYING:
        return note("NVMe", f"{where} copies on write, which direct I/O pays for", local)
    return ok("NVMe", where)


def _drive(mount: Mount, root: Path) -> str:
    """The block device behind a mount, and whether it turns."""
    block = root / "sys/dev/block" / mount.device
    if not block.exists():
        return ""
    real = block.resolve()
    disk = real if (real / "queue").is_dir() else real.parent
    with contextlib.suppress(OSError):
        if (disk / "queue/rotational").read_text().strip() == "1":
            return f" on {disk.name}, which says that it is a turning disk"
    return f" on {disk.name}"


def _room(config: Config, folder: Path) -> Line:
    total, _, free = shutil.disk_usage(folder)
    capacity = config.nvme.capacity
    text = f"{format_bytes(free)} free of {format_bytes(total)}"
    if isinstance(capacity, int) and capacity > free:
        return problem(
            "NVMe room",
            f"nvme.capacity is {format_exactly(capacity)}, {text}",
            "lower nvme.capacity, or make room",
        )
    wanted = capacity if isinstance(capacity, int) else int(capacity * free)
    return ok("NVMe room", f"{text}; nvme.capacity takes {format_bytes(wanted)}")


def _writable(path: Path, folder: Path) -> Line:
    """Write a block with O_DIRECT, read it back, compare; nothing stays behind."""
    if not os.access(folder, os.W_OK | os.X_OK):
        way_out = f"chown it, or create {path} for this user"
        return problem("O_DIRECT", f"{folder} cannot be written by this user", way_out)
    try:
        same = try_direct(folder)
    except OSError as error:
        return problem(
            "O_DIRECT",
            f"refused in {folder} ({error.strerror}): all I/O would pass the page cache",
            "choose a folder on ext4 or xfs of a local drive",
        )
    if not same:
        return problem("O_DIRECT", f"{folder} gave other bytes back", "do not use this drive")
    return ok("O_DIRECT", f"a block written to {folder} came back equal")


def try_direct(folder: Path) -> bool:
    """Whether 64 KiB written past the page cache read back equal; OSError where it is refused."""
    nbytes = 64 << 10
    handle, name = tempfile.mkstemp(dir=folder, prefix=".tiermem-doctor-")
    os.close(handle)
    try:
        fd = os.open(name, os.O_RDWR | os.O_DIRECT)
        try:
            # an anonymous mapping starts on a page, as direct I/O wants its buffers
            with mmap.mmap(-1, nbytes) as out, mmap.mmap(-1, nbytes) as back:
                out.write(os.urandom(nbytes))
                if os.pwrite(fd, out, 0) != nbytes or os.preadv(fd, [back], 0) != nbytes:
                    return False
                return out[:] == back[:]
        finally:
            os.close(fd)
    finally:
        os.unlink(name)


def _gds(config: Config, root: Path, folder: Path) -> Iterator[Line]:
    """The direct way between GPU and NVMe: what is there for it, and which way bytes take."""
    mode = config.nvme.mode
    absent = [name for name in ("kvikio", "cupy") if util.find_spec(name) is None]
    if absent:
        text = f"not probed: {' and '.join(absent)} not installed"
        if mode == "kvikio":
            yield problem("GDS", f"nvme.mode is kvikio, but {text}", GDS_WAY_OUT)
        else:
            yield ok("GDS", f"{text}; posix O_DIRECT carries the bytes")
        return
    loaded = (root / "proc/driver/nvidia-fs/version").exists()
    module = f"nvidia-fs is {'' if loaded else 'not '}loaded"
    yield probed(kvikio.probe(folder, timeout_s=PROBE_S), module, mode)
    if loaded and not (root / "run/udev").is_dir():
        yield note(
            "GDS",
            "/run/udev is missing: cuFile can spin for ever in this container",
            "mount /run/udev into it",
        )


def probed(found: Probe, module: str, mode: str) -> Line:
    """What a probe of kvikio in a child process says, against what nvme.mode asks for."""
    why = f" ({found.reason.rstrip('; ')})" if found.reason else ""
    if found.path == "none":
        text = f"kvikio carries nothing here{why}; {module}"
        if mode == "kvikio":
            return problem("GDS", text, "nvme.mode = auto")
        return ok("GDS", f"{text}; posix O_DIRECT carries the bytes")
    rates = f"{found.write_gbps:.1f} GB/s written, {found.read_gbps:.1f} read"
    way = "GPUDirect Storage works" if found.path == "gds" else "kvikio takes its compat path"
    taken = "takes it" if found.is_faster or mode == "kvikio" else "goes through the host"
    return ok("GDS", f"{way}: {rates}{why}; {module}; nvme.mode is {mode} and {taken}")
