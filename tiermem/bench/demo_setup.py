"""What the demo replays, and on what configuration: options before a file before its own sizes."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import psutil

from tiermem import units
from tiermem.assemble import on_gpu
from tiermem.bench import traces
from tiermem.bench.workload import Workload, collect
from tiermem.config import Config, load
from tiermem.errors import ConfigError
from tiermem.nvme.cap import bytes_for
from tiermem.settings import BadValue

SIZES = {"gpu.budget": "1%", "host.capacity": "5%", "nvme.capacity": "50%"}
"""Of the distinct blocks, where neither an option nor a configuration says how much."""

CPU_PAGE = "64KiB"
CUDA_PAGE = "2MiB"
IN_MEMORY = ("tmpfs", "ramfs")


def requests(trace: Path | None, on_bad: traces.OnBad, limit: int | None) -> tuple[str, Workload]:
    """A name and the requests: of a file, or generated. Raises BadTrace with line and reason."""
    if trace is None:
        from tiermem.bench.generate import generate

        return "generated chats and agents", collect(islice(generate(), limit))
    return trace.name, collect(islice(traces.read(trace, on_bad), limit))


def configuration(
    file: Path | None, options: Mapping[str, object], workload: Workload, slab: Path
) -> Config:
    """The configuration of a run.

    options: dotted keys; sizes of tiers may be parts of the workload's distinct blocks. slab: the
    directory of the NVMe tier where none is named. Raises ConfigError.
    """
    given = dict(options)
    base = load(file)
    if file is None and not os.environ.get("TIERMEM_CONFIG"):
        given = {"gpu.device": "cpu", **SIZES, **given}
    page = _page(file, base, given)
    given["gpu.page"] = page
    for key in SIZES.keys() & given.keys():
        given[key] = _bytes(key, str(given[key]), workload, page)
    if given.get("nvme.capacity") == 0:
        del given["nvme.capacity"]
        given.pop("nvme.path", None)
        given["nvme.mode"] = "off"
    elif "nvme.capacity" in given and base.nvme.path is None:
        given.setdefault("nvme.path", slab)
    return load(file, overrides=given)


def tier_policies(policy: str | None) -> dict[str, object]:
    """One policy for all tiers."""
    return {} if policy is None else {f"evict.{tier}": policy for tier in ("gpu", "host", "nvme")}


def tier_marks(marks: str | None) -> dict[str, object]:
    """HIGH,LOW for all tiers."""
    if marks is None:
        return {}
    high, comma, low = marks.partition(",")
    if not comma:
        raise ConfigError(f"--marks {marks}: write HIGH,LOW, such as 0.95,0.9")
    return {
        f"{tier}.{name}": value.strip()
        for tier in ("gpu", "host", "nvme")
        for name, value in (("high", high), ("low", low))
    }


@contextmanager
def slab_directory(named: Path | None) -> Iterator[Path]:
    """The directory that was named, or one on a disk that is removed in the end."""
    if named is not None:
        yield named
        return
    with tempfile.TemporaryDirectory(prefix="tiermem-demo-", dir=_on_disk()) as made:
        yield Path(made)


def _on_disk() -> str:
    """A directory for temporary files that is not in memory, where there is one."""
    wanted = [tempfile.gettempdir(), "/var/tmp", os.getcwd()]
    usable = [path for path in wanted if os.access(path, os.W_OK) and _kind(path) not in IN_MEMORY]
    return usable[0] if usable else wanted[0]


def _kind(path: str) -> str:
    """The type of the file system that holds a path."""
    real = os.path.realpath(path)
    holding = [
        part
        for part in psutil.disk_partitions(all=True)
        if os.path.commonpath([real, part.mountpoint]) == part.mountpoint
    ]
    return max(holding, key=lambda part: len(part.mountpoint)).fstype if holding else ""


def _page(file: Path | None, base: Config, given: Mapping[str, object]) -> int:
    known = {key: given[key] for key in ("gpu.device", "gpu.page") if key in given}
    if base.gpu.page == "auto" and "gpu.page" not in known:
        known["gpu.page"] = CUDA_PAGE if on_gpu(load(file, overrides=known)) else CPU_PAGE
    page = load(file, overrides=known).gpu.page
    if page == "auto":
        raise ConfigError("--page auto: name a size, since sizes of tiers are counted in pages")
    return page


def _bytes(key: str, text: str, workload: Workload, page: int) -> int:
    try:
        size = units.parse_size(text)
    except ValueError as error:
        raise BadValue(key, text, str(error), "option") from None
    if isinstance(size, int):
        return size
    blocks = workload.capacity(100 * size) if size else 0
    if key == "nvme.capacity" and blocks:  # bytes on disk, metadata included
        return bytes_for(blocks, page)
    return blocks * page
