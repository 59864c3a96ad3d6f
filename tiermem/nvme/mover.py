"""How one thread moves slots between memory and the slab, and checks them.

Two steps: moving the bytes, then hashing what arrived or what left, which another thread may do
while the first goes back to the drive. Two ways that must agree: native programs for a whole group,
which leave the interpreter once a step; and plain calls, one slot at a time, which also serve
whatever the program could not finish (a short read, an error) and say what went wrong with it.
"""

from __future__ import annotations

import functools
import logging
import mmap
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tiermem.errors import DriverError, PageLost, TierFailed
from tiermem.native import Calls, Kind, Program, function, group
from tiermem.nvme.digest import digest, is_intact, native_digest
from tiermem.nvme.files import Buffer, PosixIo, memory_at, read_whole, write_whole
from tiermem.nvme.records import Algorithm
from tiermem.nvme.slab import GRAIN, Algorithms, Slab, Words
from tiermem.nvme.superblock import HEADER_BYTES
from tiermem.tier import Addresses, Mask, Slots

log = logging.getLogger(__name__)

Longs = npt.NDArray[np.int64]

_DIGEST = int(Algorithm.XXH3_64_PIECES)


@dataclass(slots=True, eq=False)
class Batch:
    """Entry i moves between addresses[i] and slot slots[i] of the slab.

    sequences uint64[n], checksums uint64[n, 1] (a tag is 2), algorithms uint8[n]: what a load must
    find, what a store leaves; a store fills the checksums in.
    """

    slots: Slots
    addresses: Addresses
    sequences: Words
    checksums: Words
    algorithms: Algorithms


@dataclass(frozen=True, slots=True)
class NativeCalls:
    """Addresses of the three functions that a program is made of; digest: and its argument."""

    pread: int
    pwrite: int
    digest: int
    digest_with: int


@functools.cache
def native_calls() -> NativeCalls | None:
    """None where there is no compiler for programs, or xxhash does not show its C functions."""
    try:
        found = native_digest()
    except (OSError, DriverError) as error:
        log.info("nvme moves slots one by one reason=%s", error)
        return None
    if found is None:
        log.info("nvme moves slots one by one reason=xxhash hides its functions")
        return None
    return NativeCalls(function("pread64"), function("pwrite64"), *found)


class _Rows:
    """One native program of n equal calls, laid out once and filled in for each group.

    Laying out two [wait, read, post, hash] took 78 us; all of a claim's Python now takes 16-20
    (2-core, 2026-11).
    """

    def __init__(self, calls: Calls) -> None:
        self._program = Program(calls)
        self._args, self._results = self._program.calls["args"], self._program.calls["result"]

    def run(self, columns: dict[int, Words]) -> Longs:
        """Fill arguments in and run without the interpreter lock; results, 0 where not run."""
        for i, values in columns.items():
            self._args[:, i] = values
        self._results[:] = 0
        self._program.run()
        return self._results


class Mover:
    """What one thread needs: the slab, and a buffer for what cannot move from where it is."""

    def __init__(self, slab: Slab, *, native: bool | None = None) -> None:
        """native: None: where it works and the slab makes its calls itself."""
        self.slab = slab
        self._scratch: mmap.mmap | None = None
        # An `io` that somebody put in wants to see every call.
        wanted = type(slab.io) is PosixIo if native is None else native
        wanted = wanted and slab.cipher is None
        self._native = native_calls() if wanted else None
        self._rows: dict[tuple[int, int], _Rows] = {}

    def transfer(self, batch: Batch, entries: slice, *, write: bool) -> Mask:
        """Read or write these entries and look at nothing: bool[n], those that moved whole.

        The others are left to `finish`, and all of them where native calls do not work.
        """
        n, slab = entries.stop - entries.start, self.slab
        ready = slab.failure is None if write else bool(batch.sequences[entries].all())
        if self._native is None or not ready or not self._fits(batch.addresses[entries]):
            return np.zeros(n, np.bool_)
        call = self._native.pwrite if write else self._native.pread
        offsets = batch.slots[entries].astype(np.uint64) * np.uint64(slab.slot_bytes)
        offsets += np.uint64(HEADER_BYTES)
        rows = self._rows_of(call, n)
        whole: Mask = rows.run({1: batch.addresses[entries], 3: offsets}) == slab.slot_bytes
        return whole

    def finish(
        self, batch: Batch, entries: slice, moved: Mask, *, write: bool
    ) -> dict[int, Exception]:
        """Compare what was loaded, or record what was stored: entry to error, where it failed.

        moved: what `transfer` said. What did not move whole is moved here, one by one.
        """
        hashes = self._digest(batch, entries) if moved.any() else batch.checksums[entries, 0]
        if write:
            batch.checksums[entries, 0] = np.where(moved, hashes, batch.checksums[entries, 0])
            good = moved
        else:
            good = moved & (hashes == batch.checksums[entries, 0])
            good &= batch.algorithms[entries] == _DIGEST  # others are looked at one by one
        one = self._store_one if write else self._load_one
        errors: dict[int, Exception] = {}
        for i in () if good.all() else np.flatnonzero(~good) + entries.start:
            try:
                one(batch, int(i))
                good[i - entries.start] = True
            except Exception as error:  # every transfer ends, whatever ended it
                errors[int(i)] = error
                if write and isinstance(error, OSError):
                    self.slab.fail(error)
        if write:
            slots, sequences = batch.slots[entries][good], batch.sequences[entries][good]
            self.slab.end_store(slots, sequences, batch.checksums[entries][good])
        return errors

    # -- a group as one program ------------------------------------------------------------

    def _digest(self, batch: Batch, entries: slice) -> Words:
        assert self._native is not None
        rows = self._rows_of(self._native.digest, entries.stop - entries.start)
        return rows.run({0: batch.addresses[entries]}).view(np.uint64)

    def _rows_of(self, call: int, n: int) -> _Rows:
        assert self._native is not None
        rows = self._rows.get((call, n))
        if rows is None:
            nothing, size = np.zeros(n, np.uint64), self.slab.slot_bytes
            if call == self._native.digest:
                calls = group(call, Kind.PLAIN, nothing, size, self._native.digest_with)
            else:
                calls = group(call, Kind.POINTER, self.slab.fd, nothing, size, nothing)
            rows = self._rows[call, n] = _Rows(calls)
        return rows

    def _fits(self, addresses: Addresses) -> bool:
        """Whether a file that bypasses the cache takes these addresses."""
        return not (self.slab.direct and (addresses % np.uint64(GRAIN)).any())

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
            batch.checksums[i] = digest(source)
        write_whole(slab.io, slab.fd, source, slab.offset(slot))

    def _load_one(self, batch: Batch, i: int) -> None:
        slab, slot, address = self.slab, int(batch.slots[i]), int(batch.addresses[i])
        if not batch.sequences[i]:
            raise PageLost(f"nvme: slot {slot} holds nothing; compute the page again")
        target = memory_at(address, slab.slot_bytes)
        bounced = slab.cipher is not None or (slab.direct and address % GRAIN > 0)
        landing = self._bounce()[: slab.slot_bytes] if bounced else target
        read_whole(slab.io, slab.fd, landing, slab.offset(slot))
        if slab.cipher is not None:
            first, second = (int(word) for word in batch.checksums[i])
            sequence, n = int(batch.sequences[i]), slab.slot_bytes
            slab.cipher.decrypt(
                self._bounce(), n, (first, second), target, slab.salt, sequence, slot
            )
            return
        if not is_intact(landing, int(batch.checksums[i, 0]), int(batch.algorithms[i])):
            raise PageLost(
                f"nvme: slot {slot} holds other bytes than were stored; compute the page again"
            )
        if bounced:
            target[:] = landing

    def _bounce(self) -> Buffer:
        if self._scratch is None:
            self._scratch = mmap.mmap(-1, self.slab.slot_bytes + GRAIN)
        return memoryview(self._scratch)
