"""How one thread moves slots between memory and the slab, and checks them.

Two ways that must agree: a native program of [read, hash] or [hash, write] calls for a whole group,
which leaves the interpreter once; and plain calls, one slot at a time, which also serve whatever
the program could not finish (a short read, an error) and say what went wrong with it.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import logging
import mmap
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import xxhash

from tiermem.errors import DriverError, PageLost, TierFailed
from tiermem.native import Calls, Kind, Program, function, group, interleave, pointer
from tiermem.nvme.files import Buffer, PosixIo, memory_at, read_whole, write_whole
from tiermem.nvme.slab import GRAIN, Slab, Words
from tiermem.nvme.superblock import HEADER_BYTES
from tiermem.tier import Addresses, Mask, Slots

log = logging.getLogger(__name__)

Longs = npt.NDArray[np.int64]


@dataclass(slots=True, eq=False)
class Batch:
    """Entry i moves between addresses[i] and slot slots[i] of the slab.

    sequences uint64[n], checksums uint64[n, 1] (a tag is 2): what a load must find, what a store
    leaves; a store fills the checksums in.
    """

    slots: Slots
    addresses: Addresses
    sequences: Words
    checksums: Words


@dataclass(frozen=True, slots=True)
class NativeCalls:
    """Addresses of the three functions that a program is made of."""

    pread: int
    pwrite: int
    hash64: int


@functools.cache
def native_calls() -> NativeCalls | None:
    """None where there is no compiler for programs, or xxhash does not show its C functions."""
    sample = bytes(range(256)) * 16
    try:
        spec = importlib.util.find_spec("xxhash._xxhash")
        library = ctypes.CDLL("" if spec is None else spec.origin)
        # The dispatching one picks AVX: 22 us a 2 MiB page against 58 (2-core, 2026-11).
        found = getattr(library, "XXH3_64bits_dispatch", None) or library.XXH3_64bits
        found.restype, found.argtypes = ctypes.c_uint64, [ctypes.c_char_p, ctypes.c_size_t]
        if found(sample, len(sample)) != xxhash.xxh3_64_intdigest(sample):
            return None
        calls = NativeCalls(function("pread64"), function("pwrite64"), pointer(found))
        Program(group(function("getpid"), Kind.PLAIN)).run_holding()
    except (AttributeError, OSError, DriverError) as error:
        log.info("nvme moves slots one by one reason=%s", error)
        return None
    return calls


class Gate:
    """At most `limit` reads and writes at the drive, while more threads hash what they moved."""

    def __init__(self, limit: int) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        self._semaphore = ctypes.create_string_buffer(64)  # sem_t has 32 bytes on x86-64 and arm64
        self.address = ctypes.addressof(self._semaphore)
        self._libc = libc
        if libc.sem_init(self._semaphore, 0, ctypes.c_uint(limit)) != 0:
            raise DriverError(f"nvme: sem_init({limit}) failed")
        self.wait, self.post = function("sem_wait"), function("sem_post")

    def __enter__(self) -> None:
        while self._libc.sem_wait(self._semaphore) != 0:
            pass  # interrupted by a signal

    def __exit__(self, *exc: object) -> None:
        self._libc.sem_post(self._semaphore)


class Mover:
    """What one thread needs: the slab, and a buffer for what cannot move from where it is."""

    def __init__(self, slab: Slab, *, native: bool | None = None, gate: Gate | None = None) -> None:
        """native: None: where it works and the slab makes its calls itself. gate: shared by the
        threads of one slab; None: as many calls in flight as there are threads.
        """
        self._slab = slab
        self._gate = gate
        self._scratch: mmap.mmap | None = None
        # An `io` that somebody put in wants to see every call.
        wanted = type(slab.io) is PosixIo if native is None else native
        wanted = wanted and slab.cipher is None
        self._native = native_calls() if wanted else None

    def load(self, batch: Batch, entries: slice) -> dict[int, Exception]:
        """Read these entries and compare what arrived: entry to error, for those that failed."""
        done = self._load_group(batch, entries)
        errors: dict[int, Exception] = {}
        for i in np.flatnonzero(~done) + entries.start:
            try:
                self._load_one(batch, int(i))
            except Exception as error:  # every transfer ends, whatever ended it
                errors[int(i)] = error
        return errors

    def store(self, batch: Batch, entries: slice) -> dict[int, Exception]:
        """Hash and write these entries and record them: entry to error, for those that failed."""
        done = self._store_group(batch, entries)
        errors: dict[int, Exception] = {}
        for i in np.flatnonzero(~done) + entries.start:
            try:
                self._store_one(batch, int(i))
            except Exception as error:  # every transfer ends, whatever ended it
                errors[int(i)] = error
                if isinstance(error, OSError):
                    self._slab.fail(error)
        good = np.setdiff1d(np.arange(entries.start, entries.stop), list(errors))
        self._slab.end_store(batch.slots[good], batch.sequences[good], batch.checksums[good])
        return errors

    # -- a group as one program ------------------------------------------------------------

    def _load_group(self, batch: Batch, entries: slice) -> Mask:
        n, native = entries.stop - entries.start, self._native
        addresses = batch.addresses[entries]
        if native is None or not self._fits(addresses) or not batch.sequences[entries].all():
            return np.zeros(n, np.bool_)
        reads = self.io_calls(batch, entries, write=False)
        hashes = group(native.hash64, Kind.PLAIN, addresses, self._slab.slot_bytes)
        moved, found = self._run(reads, hashes, hash_first=False)
        good: Mask = (moved == self._slab.slot_bytes) & (found == batch.checksums[entries, 0])
        return good

    def _store_group(self, batch: Batch, entries: slice) -> Mask:
        n, native = entries.stop - entries.start, self._native
        addresses = batch.addresses[entries]
        if native is None or not self._fits(addresses) or self._slab.failure is not None:
            return np.zeros(n, np.bool_)
        hashes = group(native.hash64, Kind.PLAIN, addresses, self._slab.slot_bytes)
        writes = self.io_calls(batch, entries, write=True)
        moved, batch.checksums[entries, 0] = self._run(writes, hashes, hash_first=True)
        whole: Mask = moved == self._slab.slot_bytes
        return whole

    def io_calls(self, batch: Batch, entries: slice, *, write: bool) -> Calls:
        """One pread or pwrite of a whole slot for each entry; only where native calls work."""
        assert self._native is not None
        slab = self._slab
        offsets = batch.slots[entries].astype(np.uint64) * np.uint64(slab.slot_bytes)
        offsets += np.uint64(HEADER_BYTES)
        call = self._native.pwrite if write else self._native.pread
        addresses = batch.addresses[entries]
        return group(call, Kind.POINTER, slab.fd, addresses, slab.slot_bytes, offsets)

    def _run(self, moves: Calls, hashes: Calls, *, hash_first: bool) -> tuple[Longs, Words]:
        """Run all without the interpreter lock: (bytes moved, hashes), 0 for what did not run."""
        guarded = [moves]
        if self._gate is not None:
            n, at = len(moves), self._gate.address
            waits = np.repeat(group(self._gate.wait, Kind.INT, at), n)
            posts = np.repeat(group(self._gate.post, Kind.PLAIN, at), n)
            guarded = [waits, moves, posts]
        order = [hashes, *guarded] if hash_first else [*guarded, hashes]
        place = next(i for i, one in enumerate(order) if one is moves)
        program = Program(interleave(*order))
        failure = program.run()
        if failure is not None and failure.index % len(order) == place and self._gate is not None:
            self._gate.__exit__()  # the program ended between its wait and its post
        results = program.calls["result"].reshape(-1, len(order))
        found = results[:, 0 if hash_first else -1].copy()
        return results[:, place], found.view(np.uint64)

    def _fits(self, addresses: Addresses) -> bool:
        return not (self._slab.direct and (addresses % np.uint64(GRAIN)).any())

    # -- one slot --------------------------------------------------------------------------

    def _store_one(self, batch: Batch, i: int) -> None:
        slab, slot, address = self._slab, int(batch.slots[i]), int(batch.addresses[i])
        if slab.failure is not None:
            raise TierFailed(f"nvme: slot {slot} not stored after: {slab.failure}")
        source = memory_at(address, slab.slot_bytes)
        if slab.cipher is not None:
            sealed, sequence = self._bounce(), int(batch.sequences[i])
            tag = slab.cipher.encrypt(source, sealed, slab.salt, sequence, slot)
            batch.checksums[i] = tag
            source = sealed[: slab.slot_bytes]
        else:
            if slab.direct and address % GRAIN:
                bounce = self._bounce()[: slab.slot_bytes]
                bounce[:] = source
                source = bounce
            batch.checksums[i] = xxhash.xxh3_64_intdigest(source)
        with self._gate or nullcontext():
            write_whole(slab.io, slab.fd, source, slab.offset(slot))

    def _load_one(self, batch: Batch, i: int) -> None:
        slab, slot, address = self._slab, int(batch.slots[i]), int(batch.addresses[i])
        if not batch.sequences[i]:
            raise PageLost(f"nvme: slot {slot} holds nothing; compute the page again")
        target = memory_at(address, slab.slot_bytes)
        bounced = slab.cipher is not None or (slab.direct and address % GRAIN > 0)
        landing = self._bounce()[: slab.slot_bytes] if bounced else target
        with self._gate or nullcontext():
            read_whole(slab.io, slab.fd, landing, slab.offset(slot))
        if slab.cipher is not None:
            first, second = (int(word) for word in batch.checksums[i])
            sequence, n = int(batch.sequences[i]), slab.slot_bytes
            slab.cipher.decrypt(
                self._bounce(), n, (first, second), target, slab.salt, sequence, slot
            )
            return
        if xxhash.xxh3_64_intdigest(landing) != int(batch.checksums[i, 0]):
            raise PageLost(
                f"nvme: slot {slot} holds other bytes than were stored; compute the page again"
            )
        if bounced:
            target[:] = landing

    def _bounce(self) -> Buffer:
        if self._scratch is None:
            self._scratch = mmap.mmap(-1, self._slab.slot_bytes + GRAIN)
        return memoryview(self._scratch)
