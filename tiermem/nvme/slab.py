"""The NVMe tier: one preallocated file of equal slots, and what is known of each slot.

    [ superblock A | superblock B | slot 0 | slot 1 | ... ]    slots of exactly `slot_bytes`

The slab moves nothing: routes read and write its file and report here. Two columns say what a
slot should hold: the checksum of its bytes and a slab-wide sequence number, 0 while a store is
under way and before the first. A load is believed only if both are as they were recorded.

A slab that persists keeps its file, and a catalog says which content is in which slot. A sequence
number is the epoch of this opening (24 bits) and a count (40 bits), so that no number is ever
drawn twice for one file, also not after a kill.
"""

from __future__ import annotations

import logging
import os
import threading
import weakref
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from tiermem.errors import Closed, ConfigError, TierFailed, TierFull
from tiermem.keyindex import Keys
from tiermem.nvme import cap
from tiermem.nvme.budget import WriteBudget
from tiermem.nvme.catalog import Catalog, Numbers
from tiermem.nvme.crypt import Cipher
from tiermem.nvme.extent import Extent, SlabFile
from tiermem.nvme.files import FileIo, PosixIo, open_nameless, private_directory
from tiermem.nvme.kept import Kept, Persist, Recovered, none_recovered, open_kept
from tiermem.nvme.records import RECORD, Algorithm, Kind, Records
from tiermem.nvme.superblock import HEADER_BYTES
from tiermem.tier import Mask, Place, Slots

log = logging.getLogger(__name__)

GRAIN = 4096
EPOCH_SHIFT = 40

Words = npt.NDArray[np.uint64]
Algorithms = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class SlabStatistics:
    """Sizes of a slab. bytes_held is what the file system charges for it, index files included.

    written: bytes stored since it was opened; prewritten: bytes of zeros written before that.
    """

    capacity: int
    ready: int
    stored: int
    keyed: int
    bytes_held: int
    byte_cap: int
    written: int
    prewritten: int
    direct: bool
    failure: str | None
    persistence: str


class Slab:
    """Slots of `slot_bytes` in a file under `path`; a `Tier` whose place is NVME."""

    place = Place.NVME

    def __init__(
        self,
        path: str | os.PathLike[str],
        slot_bytes: int,
        capacity: int,
        *,
        byte_cap: int | None = None,
        floor_bytes: int = 0,
        prewrite: bool = True,
        write_budget: int | None = None,
        persist: Persist | None = None,
        cipher: Cipher | None = None,
        io: FileIo | None = None,
    ) -> None:
        """Allocate a file for `capacity` slots in the directory `path`, or open the one kept there.

        byte_cap: bytes that may be on disk at most, index files included; by default what
        `capacity` slots need. floor_bytes: space that must stay free for others. prewrite: write
        every slot once in the background and count it ready only then, because a first write
        into space that was only allocated is about 10 times slower than a later one (FACTS,
        ext4). write_budget: bytes per second that stores may write. cipher: encrypt slots;
        its tags then replace the checksums. io: the data calls.
        Raises ConfigError (path, sizes, cap, another's slab), TierFull (disk).
        """
        if slot_bytes <= 0 or slot_bytes % GRAIN:
            raise ConfigError(f"nvme: slot_bytes {slot_bytes} is not a positive multiple of 4096")
        if capacity < 0:
            raise ConfigError(f"nvme: capacity {capacity} slots")
        self.slot_bytes = slot_bytes
        self.io: FileIo = io if io is not None else PosixIo()
        self.budget = WriteBudget(write_budget)
        if cipher is not None and persist is None:
            cipher = cipher.of_slab(os.urandom(32))
        self.cipher = cipher
        self.salt = os.urandom(4)
        """Tells slabs under one key apart (crypt.py)."""
        self.checksum_words = 1 if cipher is None else 2
        self.algorithm = Algorithm.XXH3_64_PIECES if cipher is None else Algorithm.AES_256_GCM
        """Of the checksums of what is stored from now on."""
        self._path = private_directory(path)
        self._byte_cap = cap.bytes_for(capacity, slot_bytes) if byte_cap is None else byte_cap
        self._lock = threading.Condition()
        self._count = 1
        self._closed = False
        self._failure: OSError | None = None
        self._checksum: Words = np.zeros((0, self.checksum_words), np.uint64)
        self._sequence: Words = np.zeros(0, np.uint64)
        self._algorithm: Algorithms = np.zeros(0, np.uint8)
        self._kept: Kept | None = None
        if persist is None:
            self.fd, self.direct = open_nameless(self._path)
        else:
            self.fd, self.direct = open_kept(self._path, persist.name)
        self._finalizer = weakref.finalize(self, os.close, self.fd)
        file = SlabFile(self.fd, self.io, self._path, slot_bytes, self.offset, floor_bytes)
        self._extent = Extent(file, self._lock, self.fail, prewrite=prewrite)
        try:
            cap.check(self._byte_cap, capacity, slot_bytes)
            if persist is not None:
                self._open(persist)
            self.resize(capacity)
        except BaseException:
            self.close()
            raise

    # -- the tier --------------------------------------------------------------------------

    @property
    def capacity(self) -> int:
        return self._extent.capacity

    @property
    def ready(self) -> int:
        return self._extent.ready

    @property
    def growing(self) -> bool:
        return self._extent.growing

    def resize(self, capacity: int) -> None:
        """Grow (TierFull, ConfigError over the byte cap: nothing changed) or cut the file's end.

        Slots at or above a smaller capacity are unused when this is called.
        """
        with self._lock:
            if self._closed:
                raise Closed("nvme: resize after close")
            cap.check(self._byte_cap, capacity, self.slot_bytes)
            if capacity > self._extent.capacity:
                self._grow(capacity)
            elif capacity < self._extent.capacity:
                self._shrink(capacity)
            self._extent.start()
            self._lock.notify_all()

    def wait_ready(self, slots: int, timeout_s: float | None = None) -> bool:
        """Block until `slots` slots are ready; False on timeout, failure or close."""
        with self._lock:
            return self._extent.wait_ready(slots, timeout_s)

    def statistics(self) -> SlabStatistics:
        with self._lock:
            held = 0 if self._closed else os.fstat(self.fd).st_blocks * 512
            catalog = self._catalog
            return SlabStatistics(
                capacity=self._extent.capacity,
                ready=self._extent.ready,
                stored=int(np.count_nonzero(self._sequence)),
                keyed=0 if catalog is None else len(catalog.held()),
                bytes_held=held + (0 if catalog is None else catalog.files_bytes()),
                byte_cap=self._byte_cap,
                written=self.budget.spent,
                prewritten=self._extent.prewritten,
                direct=self.direct,
                failure=None if self._failure is None else str(self._failure),
                persistence=self._persistence(),
            )

    def close(self) -> None:
        """Close the file, in order if it is kept; routes over this slab are closed before."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._extent.stop()
        self._extent.join()
        with self._lock:
            if self._kept is not None:
                held = self._extent
                self._kept.close(held.capacity, held.ready, clean=self._failure is None)
        self._finalizer()

    def __enter__(self) -> Slab:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # -- what routes ask and report --------------------------------------------------------

    @property
    def failure(self) -> OSError | None:
        """The write error that ended stores, if there was one; loads are still tried."""
        return self._failure

    def offset(self, slot: int) -> int:
        """Where a slot begins in the file."""
        return HEADER_BYTES + slot * self.slot_bytes

    def begin_store(self, slots: Slots) -> Words:
        """Forget what these slots held, on disk too, and draw a sequence number for each.

        Raises TierFailed if stores have failed, Closed after close, TierFull beyond `ready`.
        """
        with self._lock:
            if self._closed:
                raise Closed("nvme: store after close")
            if self._failure is not None:
                raise TierFailed(
                    f"nvme: no more stores in {self._path} after: {self._failure}; reopen the tier"
                )
            if len(slots) and int(slots.max()) >= self._extent.ready:
                raise TierFull(
                    f"nvme: slot {int(slots.max())} is not ready: {self._extent.ready} of "
                    f"{self._extent.capacity} slots are; wait_ready()"
                )
            self._forget(slots)
            first = self._count
            self._count += len(slots)
            epoch = 1 if self._kept is None else self._kept.superblock.epoch
            base = (epoch << EPOCH_SHIFT) + first
            return np.arange(base, base + len(slots), dtype=np.uint64)

    def end_store(self, slots: Slots, sequences: Words, checksums: Words) -> None:
        """Record what was written whole. The Done of the store is not ready before this.

        slots int32[n], sequences uint64[n], checksums uint64[n, checksum_words].
        """
        with self._lock:
            self._checksum[slots] = checksums
            self._algorithm[slots] = self.algorithm
            self._sequence[slots] = sequences

    def expected(self, slots: Slots) -> tuple[Words, Words]:
        """(sequences, checksums) that these slots should hold; sequence 0: nothing to be read."""
        with self._lock:
            return self._sequence[slots], self._checksum[slots]

    def algorithms(self, slots: Slots) -> Algorithms:
        """uint8[n]: the `Algorithm` of the checksum of each slot that holds anything."""
        with self._lock:
            found: Algorithms = self._algorithm[slots]
            return found

    def forget(self, slots: Slots) -> None:
        """These slots hold nothing any more; on disk too before this returns."""
        with self._lock:
            self._forget(slots)

    def fail(self, error: OSError) -> None:
        """A write failed: latch the tier for stores. What was stored before can still be read."""
        with self._lock:
            if self._failure is not None:
                return
            self._failure = error
            self._extent.stop()
        log.warning("nvme stores=off path=%s reason=%s", self._path, error)

    # -- content keys ----------------------------------------------------------------------

    def sequences(self, slots: Slots) -> Words:
        """uint64[n]: what `record` is given back; of slots on which no store is under way.

        Takes no lock: whoever owns the slots may be holding one of its own.
        """
        found: Words = self._sequence[slots]
        return found

    def record(
        self,
        slots: Slots,
        keys: Keys,
        depths: Numbers,
        tenants: Numbers,
        sequences: Words | None = None,
    ) -> Mask:
        """These slots, whose stores are done, hold the content of these keys.

        slots int32[n], each once; keys uint64[n, 2], not zero; depths, tenants uint32[n];
        sequences: those that the slots had when this was known, for slots that others may reuse
        meanwhile. bool[n]: which are kept for the next start; not those whose store failed, and
        none if the slab is ephemeral or its index could not be written.
        """
        with self._lock:
            if self._catalog is None or self._closed:
                return np.zeros(len(slots), np.bool_)
            now = self._sequence[slots]
            good: Mask = (now != 0) & keys.any(axis=1)
            if sequences is not None:
                good &= now == sequences
            self._catalog.drop(slots[good])
            self._catalog.put(slots[good], keys[good], depths[good], tenants[good])
            return good & (self._catalog.failure is None)

    def find(self, keys: Keys) -> Slots:
        """int32[n]: a slot that holds the content keys[i] (uint64[n, 2]), or -1."""
        with self._lock:
            if self._catalog is None:
                return np.full(len(keys), -1, np.int32)
            return self._catalog.find(keys)

    def recovered(self) -> Recovered:
        """What the slab held when it was opened; the owner of the slots reserves these first.

        Whoever does not want a slot calls `forget` on it before it is used for anything else.
        """
        with self._lock:
            kept, catalog = self._kept, self._catalog
            if kept is None or catalog is None:
                return none_recovered()
            slots = catalog.held()
            old = self._sequence[slots] < np.uint64(kept.first_epoch << EPOCH_SHIFT)
            slots = slots[old]
            slots = slots[np.argsort(self._sequence[slots])[::-1]]
            return Recovered(
                slots,
                catalog.keys[slots],
                catalog.depths[slots],
                catalog.tenants[slots],
                kept.was_clean,
                catalog.damaged,
            )

    @property
    def _catalog(self) -> Catalog | None:
        return None if self._kept is None else self._kept.catalog

    # -- the file --------------------------------------------------------------------------

    def _forget(self, slots: Slots) -> None:
        self._sequence[slots] = 0
        if self._catalog is not None:
            self._catalog.drop(slots)

    def _grow(self, capacity: int) -> None:
        self._extent.grow(capacity)
        self._set_columns(capacity)
        self._mark()

    def _shrink(self, capacity: int) -> None:
        gone = np.arange(capacity, self._extent.capacity, dtype=np.int32)
        self._extent.withdraw(capacity)
        self._forget(gone)
        self._set_columns(capacity)
        self._mark()
        self._extent.cut()

    def _set_columns(self, capacity: int) -> None:
        for name in ("_checksum", "_sequence", "_algorithm"):
            old = getattr(self, name)
            new = np.zeros((capacity, *old.shape[1:]), old.dtype)
            n = min(capacity, len(old))
            new[:n] = old[:n]
            setattr(self, name, new)
        if self._catalog is not None:
            self._catalog.resize(capacity)

    # -- what is kept ----------------------------------------------------------------------

    def _open(self, persist: Persist) -> None:
        """Take over the file that is there, or begin one."""
        if self.cipher is not None:
            marks = {"cipher": "AES-256-GCM", "key": self.cipher.key_id}
            persist = replace(persist, fingerprint={**persist.fingerprint, **marks})
        kept = Kept(self._path, persist, self.slot_bytes, self.io, self.fd)
        self.salt = kept.superblock.uuid[:4]
        self._kept = kept
        self._set_columns(kept.slots)
        journals = cap.journal_bytes(self._byte_cap, self.slot_bytes)
        found = kept.attach(journals, self._lock, self._records)
        slots = found["slot"].astype(np.int32)
        self._sequence[slots] = found["sequence"]
        self._checksum[slots] = found["checksum"][:, : self.checksum_words]
        self._algorithm[slots] = found["algorithm"]
        highest = int(slots.max()) + 1 if len(slots) else 0
        self._extent.take_over(kept.slots, max(kept.superblock.ready, highest))
        with self._lock:
            assert kept.catalog is not None
            kept.catalog.begin()

    def _records(self, slots: Slots) -> Records:
        """PUT records of slots that are held, as they are now."""
        catalog = self._catalog
        assert catalog is not None
        made = np.zeros(len(slots), RECORD)
        made["kind"] = Kind.PUT
        made["algorithm"] = self._algorithm[slots]
        made["slot"], made["length"] = slots, self.slot_bytes
        made["sequence"] = self._sequence[slots]
        made["checksum"][:, : self.checksum_words] = self._checksum[slots]
        made["key"] = catalog.keys[slots]
        made["depth"] = catalog.depths[slots]
        made["tenant"] = catalog.tenants[slots]
        return made

    def _mark(self) -> None:
        """Say in the superblock how large the file is; a refusal latches the tier."""
        try:
            if self._kept is not None:
                self._kept.mark(self._extent.capacity, self._extent.ready, clean=False)
        except OSError as error:
            self.fail(error)

    def _persistence(self) -> str:
        if self._catalog is None:
            return "off"
        return "on" if self._catalog.failure is None else f"off: {self._catalog.failure}"
