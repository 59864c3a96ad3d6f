"""Pages of the pool's file, whoever they belong to, read into our memory with their checksums.

Read, and not mapped: the file's owner may punch any part of it out at any moment, and a read of
that gives zeros, takes no memory, and ends nobody. What is read may be anything; the checksum says
whether it is what was promised.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from tiermem.native import Kind, Program, Queue, Ticket, address, function, group, interleave
from tiermem.tier import Addresses, Fence, Mask, Memory, Place, Slots

Words = npt.NDArray[np.uint64]
READERS = 4
"""Threads: each copies and hashes a page by itself."""
Digest = tuple[int, int]
"""(address of a function (page, bytes, second) that returns its checksum, that second)"""


class Reading:
    """A read under way: a `Done`. An entry failed if it is short, or not what was expected."""

    def __init__(self, ticket: Ticket, page_bytes: int, expected: Words | None) -> None:
        self._ticket = ticket
        self._page_bytes = page_bytes
        self._expected = expected

    @property
    def error(self) -> Exception | None:
        return self._ticket.error

    @property
    def failed(self) -> Mask | None:
        if not self._ticket.ready():
            return None
        bad: Mask = self._ticket.program.calls["result"][0::2] != self._page_bytes
        if self._expected is not None:
            bad |= self.checksums() != self._expected
        return bad if bad.any() else None

    def checksums(self) -> Words:
        """uint64[n], once it is ready; of an entry that failed, nothing."""
        found: Words = self._ticket.program.calls["result"][1::2].astype(np.uint64)
        return found

    def ready(self) -> bool:
        return self._ticket.ready()

    def wait(self, timeout_s: float | None = None) -> bool:
        return self._ticket.wait(timeout_s)


class Reader:
    """Native threads that read whole pages of one file."""

    def __init__(self, fd: int, page_bytes: int, digest: Digest) -> None:
        """fd: the caller keeps it open until `close`."""
        self._fd = fd
        self._page_bytes = page_bytes
        self._digest = digest
        self._pread = function("pread")
        self._scratch = np.empty(page_bytes, np.uint8)
        self._reads = Queue("tm-read-pool", threads=READERS)
        self._looks = Queue("tm-look-pool")  # one thread, because all of them read into one page

    def read(self, offsets: Words, into: Addresses, expected: Words | None = None) -> Reading:
        """Read the pages at these offsets to these addresses, and compare their checksums."""
        return self._submit(self._reads, offsets, into, expected)

    def look(self, offsets: Words) -> Reading:
        """Only their checksums."""
        into = np.full(len(offsets), address(self._scratch), np.uint64)
        return self._submit(self._looks, offsets, into, None)

    def close(self) -> None:
        self._reads.close()
        self._looks.close()

    def _submit(
        self, queue: Queue, offsets: Words, into: Addresses, expected: Words | None
    ) -> Reading:
        size, (digest, second) = self._page_bytes, self._digest
        calls = interleave(
            group(self._pread, Kind.INT, self._fd, into, size, offsets),
            group(digest, Kind.PLAIN, into, size, second),
        )
        return Reading(queue.submit(Program(calls, entries=len(offsets))), size, expected)


class FromPool:
    """Others' pages to slots of ours, verified: a `Route` within the host, one way.

    What is copied was offered before: src are numbers that `offer` gave, each for one submission.
    """

    src = Place.HOST
    dst = Place.HOST

    def __init__(self, reader: Reader, slots: Memory) -> None:
        """slots: of ours. The reader is closed by whoever made it."""
        self._reader = reader
        self._slots = slots
        self._offered: dict[int, tuple[int, int]] = {}
        self._next = 0

    def offer(self, offsets: Words, checksums: Words) -> Slots:
        """int32[n]: numbers for pages at these offsets that should have these checksums."""
        numbers = (self._next + np.arange(len(offsets))) % (1 << 31)
        self._next = (self._next + len(offsets)) % (1 << 31)
        pages = zip(offsets.tolist(), checksums.tolist(), strict=True)
        self._offered.update(zip(numbers.tolist(), pages, strict=True))
        return numbers.astype(np.int32)

    def submit(self, src: Slots, dst: Slots, after: Fence) -> Reading:
        pages = np.array([self._offered.pop(number) for number in src.tolist()], np.uint64)
        return self._reader.read(pages[:, 0], self._slots.addresses(dst), pages[:, 1])

    def close(self) -> None:
        """Nothing is kept here."""
