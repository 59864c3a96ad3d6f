"""Which content is in which slot: keys in memory, an index over them, and the journal on disk.

The slab owns sequence and checksum of a slot; the catalog knows the slots that carry a content
key and keeps both sides alike across a restart. Every method is called under the slab's lock,
which is also the condition on which snapshots are waited for.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import numpy.typing as npt

from tiermem.keyindex import KeyIndex, Keys
from tiermem.nvme.journal import Journal, files_of, replay
from tiermem.nvme.records import RECORD, Kind, Records
from tiermem.tier import Mask, Slots

log = logging.getLogger(__name__)

Numbers = npt.NDArray[np.uint32]


class Catalog:
    """Keys, depths and tenants of slots, in memory and on disk."""

    def __init__(
        self,
        directory: Path,
        name: str,
        uuid: bytes,
        capacity: int,
        limit: int,
        lock: threading.Condition,
        records: Callable[[Slots], Records],
    ) -> None:
        """Read what the index files say and start a journal of our own.

        limit: bytes that all journals may come to. records: PUT records of slots that are held,
        as they are now (the slab's side filled in). Raises OSError if no journal can be begun.
        """
        self._lock = lock
        self._records = records
        self.keys: Keys = np.zeros((capacity, 2), np.uint64)
        self.depths: Numbers = np.zeros(capacity, np.uint32)
        self.tenants: Numbers = np.zeros(capacity, np.uint32)
        self.failure: OSError | None = None
        self._directory, self._name = directory, name
        replayed = replay(directory, name, uuid, capacity)
        self.damaged = replayed.damaged
        self._journals = replayed.read
        self._found: Records | None = newest_of_each_key(replayed.records)
        slots = self._found["slot"].astype(np.int32)
        self.keys[slots] = self._found["key"]
        self.depths[slots] = self._found["depth"]
        self.tenants[slots] = self._found["tenant"]
        self._index = KeyIndex(self.keys)
        self._journal = Journal(directory, name, uuid, replayed.number + 1, limit)
        self._thread: threading.Thread | None = None

    def take_found(self) -> Records:
        """The records of what was found, for the slab's side; given away once."""
        assert self._found is not None
        found, self._found = self._found, None
        return found

    def begin(self) -> None:
        """Fold what was replayed into one snapshot, in the background."""
        if self._journals:
            self._start_snapshot()

    def keyed(self, slots: Slots) -> Mask:
        """bool[n]: which of these slots carry a key."""
        return np.asarray(self.keys[slots].any(axis=1))

    def held(self) -> Slots:
        """Every slot that carries a key."""
        return np.flatnonzero(self.keys.any(axis=1)).astype(np.int32)

    def put(self, slots: Slots, keys: Keys, depths: Numbers, tenants: Numbers) -> None:
        """These slots hold this content: remembered, indexed, journalled."""
        self.keys[slots] = keys
        self.depths[slots] = depths
        self.tenants[slots] = tenants
        self._index.add(slots)
        self._append(self._records(slots))

    def drop(self, slots: Slots) -> None:
        """What these slots held is gone; on disk before this returns."""
        slots = slots[self.keyed(slots)]
        if not len(slots):
            return
        self.keys[slots] = 0
        gone = np.zeros(len(slots), RECORD)
        gone["kind"], gone["slot"] = Kind.DROP, slots
        self._append(gone)

    def find(self, keys: Keys) -> Slots:
        """int32[n]: a slot that holds keys[i], or -1."""
        return self._index.find(keys)

    def resize(self, capacity: int) -> None:
        """Columns for another capacity; slots above a smaller one have been dropped."""
        n = min(capacity, len(self.keys))
        for name in ("keys", "depths", "tenants"):
            old = getattr(self, name)
            new = np.zeros((capacity, *old.shape[1:]), old.dtype)
            new[:n] = old[:n]
            setattr(self, name, new)
        self._index.rebuild(self.keys)

    def close(self) -> None:
        """Publish one last snapshot and close the journal; a failed index is gone already."""
        self._lock.wait_for(lambda: self._thread is None)
        if self.failure is None:
            try:
                number = self._journal.rotate()
                self._journal.publish(number, self._records(self.held()))
                self._journal.sync()
            except OSError as error:
                self._fail(error)
        self._journal.close()

    # -- writing ---------------------------------------------------------------------------

    def _append(self, records: Records) -> None:
        if self.failure is not None or not len(records):
            return
        if not self._journal.room_for(len(records)):
            # The cap is hard: wait for the snapshot that frees the older journals.
            if self._thread is None:
                self._start_snapshot()
            self._lock.wait_for(lambda: self._thread is None)
        try:
            if self.failure is None:
                self._journal.append(records)
        except OSError as error:
            self._fail(error)
        if self._journal.wants_snapshot and self._thread is None and self.failure is None:
            self._start_snapshot()

    def _start_snapshot(self) -> None:
        """Rotate now, publish in the background; appends go on in the new journal meanwhile."""
        try:
            number = self._journal.rotate()
        except OSError as error:
            self._fail(error)
            return
        records = self._records(self.held())
        self._thread = threading.Thread(
            target=self._publish, args=(number, records), name="tiermem-snapshot", daemon=True
        )
        self._thread.start()

    def _publish(self, number: int, records: Records) -> None:
        error: OSError | None = None
        freed = 0
        try:
            freed = self._journal.publish(number, records)
        except OSError as caught:
            error = caught
        with self._lock:
            self._journal.released(freed)
            if error is not None:
                self._fail(error)
            elif self.failure is not None:
                self._journal.remove()  # the snapshot may have come after the index was given up
            self._thread = None
            self._lock.notify_all()

    def _fail(self, error: OSError) -> None:
        if self.failure is None:
            self.failure = error
            self._journal.remove()
            log.warning("nvme persistence=off path=%s reason=%s", self._directory, error)

    def files_bytes(self) -> int:
        """Bytes on disk of all index files; one that is renamed meanwhile counts for nothing."""
        total = 0
        for path in files_of(self._directory, self._name):
            with suppress(FileNotFoundError):
                total += path.stat().st_blocks * 512
        return total


def newest_of_each_key(records: Records) -> Records:
    """Of records with equal keys only the one with the highest sequence."""
    order = np.argsort(records["sequence"], kind="stable")[::-1]
    newest = records[order]
    if not len(newest):
        return newest
    keys = np.ascontiguousarray(newest["key"])
    _, first = np.unique(keys.view("V16").reshape(-1), return_index=True)
    return newest[np.sort(first)]
