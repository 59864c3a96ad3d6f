"""GPU memory to the slab and back without host slots in between, through kvikio.

With GPUDirect Storage the drive and the GPU exchange bytes directly; without it kvikio copies
through bounce buffers of its own ("compat"). Which of the two really carries bytes is found by a
probe in a child process, for cuFile can hang in a machine that is not set up for it (FACTS).

Such a route never sees the bytes on the host, so the device computes the slab's checksum where they
are: before a store is recorded, and before a load counts.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from tiermem.errors import Closed, ConfigError, DriverError, PageLost
from tiermem.nvme.digest import digest as digest_of
from tiermem.nvme.files import memory_at
from tiermem.nvme.slab import Slab, Words
from tiermem.tier import (
    Addresses,
    Digest,
    Done,
    Fence,
    Mask,
    Memory,
    Place,
    Route,
    Slots,
    Streams,
)

THREADS = 8
PROBE_S = 60.0
"""A machine without /run/udev makes cuFile spin for ever: then the child is ended."""

MARGIN = 1.05
"""How much faster than the host's own calls a direct path must be for `auto` to take it."""


class Pending(Protocol):
    """One read or write under way."""

    def get(self) -> int:
        """Block until it has ended; bytes moved. Raises RuntimeError, without an errno."""


class DirectFile(Protocol):
    """A file that device memory is read into and written from."""

    def pread(self, address: int, nbytes: int, offset: int) -> Pending: ...
    def pwrite(self, address: int, nbytes: int, offset: int) -> Pending: ...
    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Probe:
    """What a child process found. path: gds, compat, or none with the reason.

    posix_...: the same file and sizes through O_DIRECT calls to host memory, 0 where refused.
    """

    path: str
    write_gbps: float = 0.0
    read_gbps: float = 0.0
    reason: str = ""
    posix_write_gbps: float = 0.0
    posix_read_gbps: float = 0.0

    @property
    def is_faster(self) -> bool:
        """Whether a page goes there and back sooner than through the host, by a margin."""
        if not (self.write_gbps and self.read_gbps):
            return False
        if not (self.posix_write_gbps and self.posix_read_gbps):
            return True
        took = 1 / self.write_gbps + 1 / self.read_gbps
        return took * MARGIN < 1 / self.posix_write_gbps + 1 / self.posix_read_gbps

    def __str__(self) -> str:
        """For people."""
        rates = f"{self.write_gbps:.2f} GB/s out, {self.read_gbps:.2f} back"
        other = f"{self.posix_write_gbps:.2f} and {self.posix_read_gbps:.2f}"
        if self.path == "none":
            return f"kvikio does not work here ({self.reason})"
        return f"kvikio {self.path} {rates}; O_DIRECT {other}"


@dataclass(frozen=True, slots=True)
class _Frame:
    """Device memory as kvikio wants it; the address is an alias, which is never unmapped."""

    address: int
    nbytes: int

    @property
    def __cuda_array_interface__(self) -> dict[str, object]:
        return {
            "shape": (self.nbytes,),
            "typestr": "|u1",
            "data": (self.address, False),
            "version": 3,
            "strides": None,
        }


class KvikioFile:
    """The slab's file, opened by kvikio, with every setting said and none left at its default."""

    def __init__(self, slab: Slab, threads: int = THREADS) -> None:
        """ConfigError where kvikio cannot be imported, DriverError where it cannot open."""
        try:
            import kvikio
        except ImportError as error:
            raise ConfigError(
                "nvme.mode = kvikio needs the package: pip install 'tiermem[gds]'"
            ) from error
        configure(threads)
        try:
            # A nameless file has a name here as long as our descriptor is open.
            self._file = kvikio.CuFile(f"/proc/self/fd/{slab.fd}", "r+")
        except RuntimeError as error:
            raise DriverError(f"nvme: kvikio cannot open the slab: {error}") from error

    def pread(self, address: int, nbytes: int, offset: int) -> Pending:
        pending: Pending = self._file.pread(_Frame(address, nbytes), nbytes, offset, nbytes)
        return pending

    def pwrite(self, address: int, nbytes: int, offset: int) -> Pending:
        pending: Pending = self._file.pwrite(_Frame(address, nbytes), nbytes, offset, nbytes)
        return pending

    def close(self) -> None:
        self._file.close()


def configure(threads: int) -> None:
    """kvikio's settings are the process's; its own defaults read through the page cache."""
    import kvikio.defaults

    kvikio.defaults.set(
        {
            "compat_mode": kvikio.CompatMode.AUTO,  # OFF can hang: only ever in a probe's child
            "num_threads": threads,
            "auto_direct_io_read": True,
            "auto_direct_io_write": True,
        }
    )


class DirectTransfer:
    """The Done of one direct submission."""

    def __init__(self) -> None:
        self._failed: Mask | None = None
        self._error: Exception | None = None
        self._ended = threading.Event()

    @property
    def error(self) -> Exception | None:
        return self._error if self._ended.is_set() else None

    @property
    def failed(self) -> Mask | None:
        return self._failed if self._ended.is_set() else None

    def ready(self) -> bool:
        return self._ended.is_set()

    def wait(self, timeout_s: float | None = None) -> bool:
        return self._ended.wait(timeout_s)

    def end(self, bad: Mask, error: Exception | None) -> None:
        self._failed = bad if bad.any() else None
        self._error = error
        self._ended.set()


class KvikioRoute:
    """Moves whole slots between GPU frames and the slab, in one direction, in order."""

    def __init__(
        self,
        file: DirectFile,
        slab: Slab,
        memory: Memory,
        src: Place,
        dst: Place,
        digest: Digest,
        streams: Streams | None = None,
        other: Route | None = None,
    ) -> None:
        """digest: of pages in `memory`. other: the same way through the host, for slots whose
        checksum is of another kind; without it they cannot be loaded.

        Raises ConfigError for an encrypted slab: what the drive writes is what the GPU holds.
        """
        if slab.cipher is not None:
            raise ConfigError("nvme: a direct route cannot encrypt; use mode = posix")
        self.src = src
        self.dst = dst
        self._file, self._slab, self._memory = file, slab, memory
        self._digest, self._streams, self._other = digest, streams, other
        self._closed = False
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="tiermem-kvikio")

    def submit(self, src: Slots, dst: Slots, after: Fence) -> Done:
        """Copy whole slots once `after` has passed; see `Route.submit`."""
        if self._closed:
            raise Closed("nvme: submit on a closed route")
        if after.ticks and self._streams is None:
            raise ValueError("a fence was given to a route that knows no streams")
        storing = self.dst is Place.NVME
        if not storing and self._other is not None:
            algorithms, stored = self._slab.algorithms(src), self._slab.expected(src)[0] != 0
            if (stored & (algorithms != self._slab.algorithm)).any():
                return self._other.submit(src, dst, after)
        done = DirectTransfer()
        frames, disk = (src, dst) if storing else (dst, src)
        addresses, disk = self._memory.addresses(frames), disk.copy()
        if storing:
            sequences = self._slab.begin_store(disk)
            self._thread.submit(self._run, done, after, self._store, addresses, disk, sequences)
        else:
            self._thread.submit(self._run, done, after, self._load, addresses, disk, None)
        return done

    def close(self) -> None:
        """Refuse new work and wait until what was submitted has ended."""
        self._closed = True
        self._thread.shutdown(wait=True)

    def _run(
        self,
        done: DirectTransfer,
        after: Fence,
        work: Callable[[Addresses, Slots, Words | None], tuple[Mask, Exception | None]],
        addresses: Addresses,
        disk: Slots,
        sequences: Words | None,
    ) -> None:
        try:
            if after.ticks and self._streams is not None:
                self._streams.wait(after)
            bad, error = work(addresses, disk, sequences)
        except Exception as caught:  # every transfer ends, whatever ended it
            bad, error = np.ones(len(disk), np.bool_), caught
        done.end(bad, error)

    def _store(
        self, addresses: Addresses, disk: Slots, sequences: Words | None
    ) -> tuple[Mask, Exception | None]:
        assert sequences is not None
        while wait_s := self._slab.budget.take(len(disk) * self._slab.slot_bytes):
            time.sleep(wait_s)  # the write budget's pace
        checksums = self._digest(addresses)
        bad, error = self._move(self._file.pwrite, addresses, disk)
        if error is not None:
            self._slab.fail(error)
        good = ~bad
        self._slab.end_store(disk[good], sequences[good], checksums[good, None])
        return bad, error

    def _load(
        self, addresses: Addresses, disk: Slots, sequences: Words | None
    ) -> tuple[Mask, Exception | None]:
        known, checksums = self._slab.expected(disk)
        bad, error = self._move(self._file.pread, addresses, disk)
        known[self._slab.algorithms(disk) != self._slab.algorithm] = 0
        other = ~bad & ((known == 0) | (self._digest(addresses) != checksums[:, 0]))
        if not other.any():
            return bad, error
        slot = int(disk[other][0])
        lost = PageLost(f"nvme: slot {slot} holds other bytes than were stored; compute it again")
        return bad | other, error or lost

    def _move(
        self, call: Callable[[int, int, int], Pending], addresses: Addresses, disk: Slots
    ) -> tuple[Mask, OSError | None]:
        """Start all, then wait for each: the whole submission is in flight at once."""
        n, bad, error = self._slab.slot_bytes, np.zeros(len(disk), np.bool_), None
        pending: list[Pending | None] = []
        for address, slot in zip(addresses.tolist(), disk.tolist(), strict=True):
            try:
                pending.append(call(address, n, self._slab.offset(slot)))
            except RuntimeError as caught:
                pending.append(None)
                error = error or OSError(f"kvikio: {caught}")
        for i, one in enumerate(pending):
            try:
                moved = 0 if one is None else one.get()
                bad[i] = moved != n
                if bad[i]:
                    error = error or OSError(f"kvikio moved {moved} of {n} bytes")
            except RuntimeError as caught:
                bad[i], error = True, error or OSError(f"kvikio: {caught}")
        return bad, error


def check_digest(digest: Digest, address: int, nbytes: int) -> bool:
    """Whether a device computes what processors do, tried on host memory that it can read too.

    Overwrites that memory.
    """
    page = np.frombuffer(memory_at(address, nbytes), np.uint8)
    rng = np.random.default_rng(nbytes)
    where = np.array([address], np.uint64)
    for _ in range(4):
        page[:] = rng.integers(0, 256, nbytes, np.uint8)
        if int(digest(where)[0]) != digest_of(page.data):
            return False
    page[rng.integers(nbytes)] ^= 1
    return int(digest(where)[0]) == digest_of(page.data)


def probe(directory: Path, *, timeout_s: float = PROBE_S, python: str = sys.executable) -> Probe:
    """Write a pattern from the GPU, read it back and time both, in a child that may hang.

    First with GDS forced, then in compat mode; the first that gives the pattern back counts.
    """
    reason = ""
    # The parent removes what a child leaves that had to be ended.
    with tempfile.TemporaryDirectory(prefix="tiermem-probe-", dir=directory) as place:
        for mode, path in (("OFF", "gds"), ("ON", "compat")):
            told = _ask(python, place, mode, timeout_s)
            if isinstance(told, str):
                reason += f"{path}: {told}; "
                continue
            return Probe(
                path, told["write"], told["read"], reason,
                told.get("posix_write", 0.0), told.get("posix_read", 0.0),
            )  # fmt: skip
    return Probe("none", reason=reason.rstrip("; "))


def _ask(python: str, place: str, mode: str, timeout_s: float) -> dict[str, float] | str:
    """The child's rates, or why there are none."""
    env = {**os.environ, "KVIKIO_COMPAT_MODE": mode}
    command = [python, "-c", _CHILD, place]
    try:
        told = subprocess.run(
            command, env=env, capture_output=True, text=True, timeout=timeout_s, check=False
        )
    except subprocess.TimeoutExpired:
        return f"no answer in {timeout_s:.0f} s"
    try:
        answer = json.loads(told.stdout.splitlines()[-1])
        rates = {name: float(rate) for name, rate in answer.items()}
        if not (rates["write"] > 0 and rates["read"] > 0):
            return f"moved nothing: {rates}"
        return rates
    except (IndexError, ValueError, KeyError, TypeError, AttributeError):
        return (told.stderr.strip().splitlines() or ["no answer"])[-1]


_CHILD = """
import json, mmap, os, sys, tempfile, time
from concurrent.futures import ThreadPoolExecutor
import cupy, kvikio, kvikio.defaults
kvikio.defaults.set({"num_threads": 8, "auto_direct_io_read": True, "auto_direct_io_write": True})
n = 256 << 20
fd, path = tempfile.mkstemp(dir=sys.argv[1])
try:
    page = cupy.random.randint(0, 256, n, dtype=cupy.uint8)
    back = cupy.zeros(n, dtype=cupy.uint8)
    with kvikio.CuFile(path, "r+") as file:
        file.pwrite(page, n, 0, 2 << 20).get()
        began = time.perf_counter()
        file.pwrite(page, n, 0, 2 << 20).get()
        wrote = time.perf_counter()
        file.pread(back, n, 0, 2 << 20).get()
        read = time.perf_counter()
    assert bool((page == back).all()), "the pattern came back changed"
    told = {"write": n / (wrote - began) / 1e9, "read": n / (read - wrote) / 1e9}
    memory = mmap.mmap(-1, n)
    view = memoryview(memory)
    view[::4096] = bytes(n // 4096)
    def each(call, direct):
        began = time.perf_counter()
        with ThreadPoolExecutor(8) as pool:
            move = lambda at: call(direct, [view[at : at + (2 << 20)]], at)
            list(pool.map(move, range(0, n, 2 << 20)))
        return n / (time.perf_counter() - began) / 1e9
    try:
        direct = os.open(path, os.O_RDWR | os.O_DIRECT)
        told["posix_write"], told["posix_read"] = each(os.pwritev, direct), each(os.preadv, direct)
        os.close(direct)
    except OSError:
        pass
    print(json.dumps(told))
finally:
    os.close(fd)
    os.unlink(path)
"""
