"""The file that an open space was configured from: has it been rewritten?"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

EVERY_S = 0.5


class WatchedFile:
    """Looks at a file's time, size and number, not at its bytes. Used by one thread."""

    def __init__(
        self,
        file: Path,
        every_s: float = EVERY_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """every_s: a look that comes earlier after the last one is not taken."""
        self._file = file
        self._every_s = every_s
        self._clock = clock
        self._looked_s = clock()
        self._taken = self._before = self._stamp()

    def rewritten(self) -> bool:
        """True once after each change, when two looks in a row have found the same file.

        So a file that is being written is not taken at half its length.
        """
        now_s = self._clock()
        if now_s - self._looked_s < self._every_s:
            return False
        self._looked_s = now_s
        stamp = self._stamp()
        settled = stamp is not None and stamp == self._before and stamp != self._taken
        self._before = stamp
        if settled:
            self._taken = stamp
        return settled

    def _stamp(self) -> tuple[int, int, int] | None:
        try:
            found = self._file.stat()
        except OSError:
            return None  # being replaced, or removed: the old plan stays
        return found.st_mtime_ns, found.st_size, found.st_ino
