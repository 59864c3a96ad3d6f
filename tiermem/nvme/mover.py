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
from tiermem.native import Kind, Program, function, group, pointer
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
    """At most `limit` threads at the drive, while others hash what they moved."""

    def __init__(self, limit: int) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        self._semaphore = ctypes.create_string_buffer(64)  # sem_t has 32 bytes on x86-64 and arm64
        self.address = ctypes.addressof(self._semaphore)
        self._libc = libc
        if libc.sem_init(self._semaphore, 0, ctypes.c_uint(limit)) != 0:
            raise DriverError(f"nvme: sem_init({limit}) failed")
        self._passes = limit
        self.wait, self.post = function("sem_wait"), function("sem_post")

    def resize(self, limit: int) -> None:
        """Let more threads through at once, or fewer as soon as there are passes to take back.

        Calls do not overlap. What could not be taken back is tried again at the next call.
        """
        while self._passes < limit:
            self._libc.sem_post(self._semaphore)
            self._passes += 1
        while self._passes > limit and self._libc.sem_trywait(self._semaphore) == 0:
            self._passes -= 1

    def __enter__(self) -> None:
        while self._libc.sem_wait(self._semaphore) != 0:
            pass  # interrupted by a signal

    def __exit__(self, *exc: object) -> None:
        self._libc.sem_post(self._semaphore)


class _Rows:
    """One native program for n slots in one direction, laid out once and filled in for each group.

        load:   [wait] read ... read [post] hash ... hash
        store:  hash ... hash [wait] write ... write [post]

    The gate is passed once a group, for handing it to a thread that sleeps idles the drive. Laying
    a program of two slots out takes 78 us, all of a claim's Python then 16-20 (2-core, 2026-11).
    """

    def __init__(
        self,
        calls: NativeCalls,
        gate: Gate | None,
        n: int,
        slab: Slab,
        *,
        write: bool,
        hashed: bool,
    ) -> None:
        zeros = np.zeros(n, np.uint64)
        call = calls.pwrite if write else calls.pread
        moves = group(call, Kind.POINTER, slab.fd, zeros, slab.slot_bytes, zeros)
        before, after = [], []
        if gate is not None:
            before = [group(gate.wait, Kind.INT, gate.address)]
            after = [group(gate.post, Kind.PLAIN, gate.address)]
        hashes = group(calls.hash64, Kind.PLAIN, zeros, slab.slot_bytes)[: n if hashed else 0]
        parts = [hashes, *before, moves, *after] if write else [*before, moves, *after, hashes]
        self._program = Program(np.concatenate(parts))
        self._gate = gate
        self._first = len(before) + (len(hashes) if write else 0)
        self._last = self._first + n
        start = 0 if write else len(moves) + len(before) + len(after)
        args, result = self._program.calls["args"], self._program.calls["result"]
        self._moves, self._moved = args[self._first : self._last], result[self._first : self._last]
        self._hashes = args[start : start + len(hashes)]
        self._found = result[start : start + len(hashes)]

    def run(self, addresses: Addresses, offsets: Words) -> tuple[Longs, Words]:
        """Without the interpreter lock: (bytes moved, hashes), 0 for what did not run."""
        self._moves[:, 1] = addresses
        self._moves[:, 3] = offsets
        self._hashes[:, 0] = addresses[: len(self._hashes)]
        self._moved[:] = 0
        self._found[:] = 0
        failure = self._program.run()
        inside = failure is not None and self._first <= failure.index < self._last
        if inside and self._gate is not None:
            self._gate.__exit__()  # the program ended between its wait and its post
        return self._moved, self._found.view(np.uint64)


class Mover:
    """What one thread needs: the slab, and a buffer for what cannot move from where it is."""

    def __init__(
        self,
        slab: Slab,
        *,
        native: bool | None = None,
        read_gate: Gate | None = None,
        write_gate: Gate | None = None,
    ) -> None:
        """native: None: where it works and the slab makes its calls itself. Gates: shared by the
        threads of one slab; None: as many calls in flight as there are threads.
        """
        self.slab = slab
        self._gates = {False: read_gate, True: write_gate}
        self._scratch: mmap.mmap | None = None
        # An `io` that somebody put in wants to see every call.
        wanted = type(slab.io) is PosixIo if native is None else native
        wanted = wanted and slab.cipher is None
        self._native = native_calls() if wanted else None
        self._rows: dict[tuple[int, bool, bool], _Rows] = {}

    def load(self, batch: Batch, entries: slice) -> dict[int, Exception]:
        """Read these entries and compare what arrived: entry to error, for those that failed."""
        done = self._load_group(batch, entries)
        errors: dict[int, Exception] = {}
        for i in () if done.all() else np.flatnonzero(~done) + entries.start:
            try:
                self._load_one(batch, int(i))
            except Exception as error:  # every transfer ends, whatever ended it
                errors[int(i)] = error
        return errors

    def store(self, batch: Batch, entries: slice) -> dict[int, Exception]:
        """Hash and write these entries and record them: entry to error, for those that failed."""
        done = self._store_group(batch, entries)
        errors: dict[int, Exception] = {}
        for i in () if done.all() else np.flatnonzero(~done) + entries.start:
            try:
                self._store_one(batch, int(i))
                done[i - entries.start] = True
            except Exception as error:  # every transfer ends, whatever ended it
                errors[int(i)] = error
                if isinstance(error, OSError):
                    self.slab.fail(error)
        slots, sequences = batch.slots[entries][done], batch.sequences[entries][done]
        self.slab.end_store(slots, sequences, batch.checksums[entries][done])
        return errors

    # -- a group as one program ------------------------------------------------------------

    def _load_group(self, batch: Batch, entries: slice) -> Mask:
        n = entries.stop - entries.start
        if not self._fits(batch, entries) or not batch.sequences[entries].all():
            return np.zeros(n, np.bool_)
        moved, found = self.run(batch, entries, write=False)
        good: Mask = (moved == self.slab.slot_bytes) & (found == batch.checksums[entries, 0])
        return good

    def _store_group(self, batch: Batch, entries: slice) -> Mask:
        n = entries.stop - entries.start
        if not self._fits(batch, entries) or self.slab.failure is not None:
            return np.zeros(n, np.bool_)
        moved, batch.checksums[entries, 0] = self.run(batch, entries, write=True)
        whole: Mask = moved == self.slab.slot_bytes
        return whole

    def run(
        self, batch: Batch, entries: slice, *, write: bool, hashed: bool = True
    ) -> tuple[Longs, Words]:
        """Move these entries natively: (int64[n] bytes moved, uint64[n] hashes; none without).

        Both are overwritten by the next run. Only where native calls work.
        """
        assert self._native is not None
        slab, n = self.slab, entries.stop - entries.start
        rows = self._rows.get((n, write, hashed))
        if rows is None:
            gate = self._gates[write]
            rows = _Rows(self._native, gate, n, slab, write=write, hashed=hashed)
            self._rows[n, write, hashed] = rows
        offsets = batch.slots[entries].astype(np.uint64) * np.uint64(slab.slot_bytes)
        return rows.run(batch.addresses[entries], offsets + np.uint64(HEADER_BYTES))

    def _fits(self, batch: Batch, entries: slice) -> bool:
        """Whether these entries can move natively: from where they are, if the file is direct."""
        if self._native is None:
            return False
        unaligned = self.slab.direct and (batch.addresses[entries] % np.uint64(GRAIN)).any()
        return not unaligned

    # -- one slot --------------------------------------------------------------------------

    def _store_one(self, batch: Batch, i: int) -> None:
        slab, slot, address = self.slab, int(batch.slots[i]), int(batch.addresses[i])
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
        with self._gates[True] or nullcontext():
            write_whole(slab.io, slab.fd, source, slab.offset(slot))

    def _load_one(self, batch: Batch, i: int) -> None:
        slab, slot, address = self.slab, int(batch.slots[i]), int(batch.addresses[i])
        if not batch.sequences[i]:
            raise PageLost(f"nvme: slot {slot} holds nothing; compute the page again")
        target = memory_at(address, slab.slot_bytes)
        bounced = slab.cipher is not None or (slab.direct and address % GRAIN > 0)
        landing = self._bounce()[: slab.slot_bytes] if bounced else target
        with self._gates[False] or nullcontext():
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
            self._scratch = mmap.mmap(-1, self.slab.slot_bytes + GRAIN)
        return memoryview(self._scratch)
