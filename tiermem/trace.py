"""The event log: every fact and every answer that crossed the boundary to a policy, in order.

One JSON object a line; the first is a header. `simulate` replays it with the same policy classes
and must name the same victims in the same order. A path that ends in .gz is compressed.
"""

from __future__ import annotations

import gzip
import threading
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, cast

import msgspec

SCHEMA = "tiermem.log.v1"


class EventLog:
    """Writes events; buffered, so that an event costs microseconds. Close it to flush."""

    def __init__(self, path: Path, tiers: Mapping[str, Mapping[str, object]]) -> None:
        """tiers: for each tier by name its policy and its capacity in units."""
        self._lock = threading.Lock()
        self._encoder = msgspec.json.Encoder()
        opened = gzip.open if path.suffix == ".gz" else open
        self._file = cast(IO[bytes], opened(path, "wb"))
        self.events = 0
        self.write({"schema": SCHEMA, "tiers": tiers})

    def write(self, event: Mapping[str, object]) -> None:
        line = self._encoder.encode(event)
        with self._lock:
            if not self._file.closed:
                self._file.write(line)
                self._file.write(b"\n")
                self.events += 1

    def close(self) -> None:
        with self._lock:
            self._file.close()

    def __enter__(self) -> EventLog:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        self.close()
