"""Ctrl-C held back for the moment in which work is handed to the device.

An interrupt between a driver call and the note that it was made would leave a copy or a mapping
that nobody knows of, and the plan would be handed over a second time.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from types import FrameType, TracebackType

Handler = Callable[[int, FrameType | None], object]

# What `signal` wraps: its own functions look every handler up in an enum, which takes 5 us a call.
_plain = import_module("_signal") if find_spec("_signal") else signal
_get: Callable[[int], object] = _plain.getsignal
_set: Callable[[int, Handler], object] = _plain.signal
_SIGINT = int(signal.SIGINT)


class Uninterrupted:
    """While it is entered in the main thread, SIGINT waits; its handler runs on leaving.

    Python runs handlers in the main thread alone, so elsewhere this does nothing.
    """

    __slots__ = ("_caught", "_handler")

    def __enter__(self) -> Uninterrupted:
        self._caught: tuple[int, FrameType | None] | None = None
        self._handler: Handler | None = None
        if threading.current_thread() is threading.main_thread():
            handler = _get(_SIGINT)
            if callable(handler):
                self._handler = handler
                _set(_SIGINT, self._hold)
        return self

    def _hold(self, number: int, frame: FrameType | None) -> None:
        self._caught = (number, frame)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        if self._handler is not None:
            _set(_SIGINT, self._handler)
            if self._caught is not None:
                self._handler(*self._caught)
