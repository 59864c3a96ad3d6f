"""From the [nvme] section to an open slab: whose file, how large, under what key, how reached."""

from __future__ import annotations

import logging
import shutil
from importlib.util import find_spec
from typing import TYPE_CHECKING

import numpy as np

from tiermem import units
from tiermem.config import Config
from tiermem.errors import ConfigError
from tiermem.tier import Device, Memory

if TYPE_CHECKING:
    from tiermem.nvme.crypt import Cipher
    from tiermem.nvme.kept import Persist
    from tiermem.nvme.slab import Slab

log = logging.getLogger(__name__)

_FIRST = np.zeros(1, np.int32)

RANK = "rank0"
"""The name of a persisted slab where none is given."""
BACKLOG_BYTES = 512 << 20
"""Under an engine, on their way to the drive at most: what it takes during the longest step. What
must leave beyond that is dropped: an engine that computes faster than the drive writes would wait
for it with each prompt, and for longer than the content takes to be computed again
(docs/design.md)."""


def room(config: Config, name: str = RANK) -> int:
    """Bytes that the slab may take of the drive under nvme.path: free ones, and those it holds."""
    from tiermem.nvme.journal import files_of

    if not config.nvme.enabled or config.nvme.path is None:
        return 0
    existing = config.nvme.path
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    if not config.nvme.persist:
        return free
    ours = [config.nvme.path / f"{name}.slab", *files_of(config.nvme.path, name)]
    return free + sum(file.stat().st_blocks * 512 for file in ours if file.exists())


def slots_in(config: Config, nbytes: int, page_bytes: int) -> int:
    """Slots of a page each that fit into so many bytes on disk, metadata included."""
    from tiermem.nvme.cap import bytes_for, slots_for

    slots = slots_for(nbytes, page_bytes)
    if nbytes and not slots:
        least = units.format_exactly(bytes_for(1, page_bytes))
        raise ConfigError(
            f"nvme.capacity = {units.format_exactly(config.nvme.capacity)}: {nbytes} bytes hold "
            f"no page of {page_bytes} beside the metadata; at least {least}"
        )
    return slots


def open_slab(config: Config, page_bytes: int, slots: int, persist: Persist) -> Slab:
    """The slab of this configuration; `persist` counts only with nvme.persist.

    Raises ConfigError (path, key, another's slab, a mode that this build has not), TierFull.
    """
    from tiermem.nvme.slab import Slab

    nvme = config.nvme
    assert nvme.path is not None, "a tier that is on has a path"
    return Slab(
        nvme.path,
        page_bytes,
        slots,
        write_budget=nvme.write_budget,
        persist=persist if nvme.persist else None,
        cipher=_cipher(config, persist.name) if nvme.encrypt else None,
    )


def path_of(slab: Slab) -> str:
    """How the disk threads reach the drive, in words."""
    access = "O_DIRECT threads" if slab.direct else "threads through the page cache"
    return access if slab.cipher is None else f"{access}, AES-256-GCM"


def _cipher(config: Config, name: str) -> Cipher:
    """A kept slab's key is in a file; else it ends with the process unless a file is named."""
    from tiermem.nvme.crypt import Cipher
    from tiermem.nvme.files import private_directory

    nvme = config.nvme
    assert nvme.path is not None, "a tier that is on has a path"
    if nvme.key_file is not None:
        return Cipher.of_file(nvme.key_file)
    if nvme.persist:
        return Cipher.of_file(private_directory(nvme.path) / f"{name}.key")
    return Cipher.of_process()


def why_not_direct(config: Config, device: Device, ring: Memory) -> str | None:
    """Why GPU and drive are not to exchange bytes directly, through kvikio; None: they are.

    ring: host memory that the device reads, of which a slot is overwritten. Raises ConfigError if
    nvme.mode = kvikio cannot be had. Takes seconds where kvikio is installed and mode is not posix.
    """
    from tiermem.nvme.kvikio import check_digest, probe

    nvme = config.nvme
    reason = _forbids_direct(config, device)
    if reason is None:
        assert nvme.path is not None, "a tier that is on has a path"
        found = probe(nvme.path)
        log.info("nvme probe %s", found)
        if found.path == "none" or (nvme.mode == "auto" and not found.is_faster):
            reason = str(found)
    if reason is None:
        digest = device.digest()
        try:
            if not check_digest(digest, int(ring.addresses(_FIRST)[0]), device.page_bytes):
                reason = f"{device.name} computes other checksums than the processor"
                log.warning("nvme %s: bytes take the way through the host", reason)
        finally:
            digest.close()
    if reason is not None and nvme.mode == "kvikio":
        raise ConfigError(f"nvme.mode = kvikio: {reason}; use auto or posix")
    return reason


def _forbids_direct(config: Config, device: Device) -> str | None:
    """What rules a direct route out before anything is tried."""
    if config.nvme.mode == "posix":
        return "nvme.mode = posix"
    if device.torch_device == "cpu":
        return "it moves GPU memory, and gpu.device is the CPU"
    if config.nvme.encrypt:
        return "what it moves cannot be encrypted (nvme.encrypt)"
    return None if find_spec("kvikio") else "the package is missing: pip install 'tiermem[gds]'"
