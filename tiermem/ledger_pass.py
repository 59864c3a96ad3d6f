"""Processes of one user pass a file on to newcomers, so it lives as long as any of them does.

Each holder listens on a socket in the owner-only directory of the ledger and answers whoever
connects with one packet: a line that says what the file is, and a descriptor. Both sides have the
kernel tell them the other's user, and count nobody but their own. Nothing that is sent is parsed.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from tiermem.ledger_wake import is_from_us

log = logging.getLogger(__name__)

ANSWER_S = 5.0
"""How long a newcomer waits for one holder, which may be stopped. Or busy: after 0.5 s it made a
pool of its own in one run of four of tests/sharing_soak.py beside other work (2-core, 2026-11)."""
_CREDENTIALS = struct.Struct("3i")  # pid, uid, gid
_SUFFIX = ".pool"


class Porter:
    """A thread that gives everybody who asks a descriptor of our file."""

    def __init__(self, ledger: Path, label: bytes, reopened: Callable[[], int]) -> None:
        """label: what the file is; who expects another is not served by us. reopened: a fresh
        descriptor for each, which is closed here once it has been sent.

        Without a socket (the directory is full) newcomers make do with others; that is logged.
        """
        self._label = label
        self._reopened = reopened
        self._path = ledger.with_name(f"{ledger.stem}.{os.getpid()}{_SUFFIX}")
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._closed = False
        try:
            with _near(self._path) as near:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(near)
                self._socket.bind(near)
            self._socket.listen(16)
        except OSError as error:
            log.warning("host pool not offered path=%s reason=%s", self._path, error)
        self._thread = threading.Thread(target=self._run, name="tiermem-porter", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop listening; a second call does nothing."""
        if self._closed:
            return
        self._closed = True
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._socket.close()
        with contextlib.suppress(OSError):
            os.unlink(self._path)

    def _run(self) -> None:
        while not self._closed:
            try:
                peer, _ = self._socket.accept()
            except OSError:  # shut down, or never bound
                return
            with peer, contextlib.suppress(OSError):
                if is_from_us(_uid_of(peer)):
                    self._serve(peer)

    def _serve(self, peer: socket.socket) -> None:
        fd = self._reopened()
        try:
            peer.settimeout(ANSWER_S)
            socket.send_fds(peer, [self._label], [fd])
        finally:
            os.close(fd)


def receive(ledger: Path, label: bytes) -> int | None:
    """A descriptor of the file with this label from any process that has it; None if none has.

    Called by one process at a time (`ledger_file.exclusive`), which also removes sockets that
    dead processes have left.
    """
    for path in sorted(ledger.parent.glob(f"{ledger.stem}.*{_SUFFIX}")):
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as asking, _near(path) as near:
            asking.settimeout(ANSWER_S)
            try:
                asking.connect(near)
                if not is_from_us(_uid_of(asking)):
                    continue
                said, fds, _, _ = socket.recv_fds(asking, 64, 1)
            except ConnectionRefusedError:
                with contextlib.suppress(OSError):
                    os.unlink(near)
                continue
            except ConnectionError:  # it ends just now
                continue
            except OSError as error:
                log.warning("host pool not received path=%s reason=%s", path, error)
                continue
            if said == label and len(fds) == 1:
                return fds[0]
            for fd in fds:
                os.close(fd)
    return None


@contextlib.contextmanager
def _near(path: Path) -> Iterator[str]:
    """A short path to a socket, which may have 107 bytes and no more."""
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{directory}/{path.name}"
    finally:
        os.close(directory)


def _uid_of(peer: socket.socket) -> int:
    raw = peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    return int(_CREDENTIALS.unpack(raw)[1])
