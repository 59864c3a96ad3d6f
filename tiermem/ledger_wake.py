"""Processes that share a ledger wake one another, and hear at once when one of them ends.

A datagram means "look at the ledger" and carries nothing else, so there is nothing to parse; it
counts only if the kernel says that it came from our own user. The end of a process is heard
through its pidfd; where there is none, the listener looks twice a second.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import socket
import struct
import threading
from collections.abc import Callable, Iterable
from pathlib import Path

from tiermem.errors import TierMemError
from tiermem.ledger_file import LedgerError

log = logging.getLogger(__name__)

Owner = tuple[int, int]
"""(pid, start time in clock ticks since boot): a pid that is used again has another start."""

_TICK_MS = 500
_CREDENTIALS = struct.Struct("3i")  # pid, uid, gid
_SOCKET = ".sock"


def start_time(pid: int) -> int:
    """When a process started, in clock ticks since boot; 0 if it is gone, or only waits to be."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return 0
    fields = stat[stat.rindex(b")") + 2 :].split()
    return 0 if fields[0] in (b"Z", b"X", b"x") else int(fields[19])


def myself() -> Owner:
    return os.getpid(), start_time(os.getpid())


def is_alive(owner: Owner) -> bool:
    pid, start = owner
    return pid > 0 and start > 0 and start_time(pid) == start


class Bell:
    """Rings the members of one ledger; with a slot, it is rung itself. Sending never blocks."""

    def __init__(self, ledger: Path, slot: int | None = None) -> None:
        """ledger: the file; its members' sockets lie beside it, one a slot."""
        self._stem = ledger.stem
        self._slot = slot
        # Through the descriptor, because a socket's path may have 107 bytes and no more.
        self._directory = os.open(ledger.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        if slot is None:
            return
        self.sweep(slot)  # left there by a dead member
        try:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
            self.socket.bind(self._path(slot))
        except OSError as error:
            self.close()
            raise LedgerError(f"{ledger}: no socket to be woken by: {error}") from None

    def ring(self, slots: Iterable[int]) -> None:
        """Wake these members. One that is gone, or has a full queue, needs no more."""
        for slot in slots:
            with contextlib.suppress(OSError):
                self.socket.sendto(b"\0", self._path(slot))

    def heard(self) -> bool:
        """Take what has arrived; True if any of it came from our own user."""
        heard = False
        while True:
            try:
                _, ancillary, _, _ = self.socket.recvmsg(16, socket.CMSG_SPACE(_CREDENTIALS.size))
            except BlockingIOError:
                return heard
            for level, kind, data in ancillary:
                if (level, kind) == (socket.SOL_SOCKET, socket.SCM_CREDENTIALS):
                    heard |= is_from_us(_CREDENTIALS.unpack(data[: _CREDENTIALS.size])[1])

    def sweep(self, slot: int) -> None:
        """Remove the socket of a member that is gone."""
        with contextlib.suppress(OSError):
            os.unlink(f"{self._stem}.{slot}{_SOCKET}", dir_fd=self._directory)

    def close(self) -> None:
        """A second call does nothing."""
        if self._directory < 0:
            return
        if self._slot is not None:
            self.sweep(self._slot)
        self.socket.close()
        os.close(self._directory)
        self._directory = -1

    def _path(self, slot: int) -> str:
        return f"/proc/self/fd/{self._directory}/{self._stem}.{slot}{_SOCKET}"


def is_from_us(uid: int) -> bool:
    """Whether a datagram of this user counts: only our own, not even root's by mistake."""
    return uid == os.geteuid()


class Listener:
    """A thread that calls `woken` for every ring and `ended` when one of the others is gone."""

    def __init__(
        self,
        bell: Bell,
        others: Callable[[], set[Owner]],
        woken: Callable[[], None],
        ended: Callable[[], None],
    ) -> None:
        """others: whose end is waited for; asked again after every ring and every half second.

        None of the three may raise anything but TierMemError, which is logged once.
        """
        self._bell = bell
        self._others = others
        self._woken = woken
        self._ended = ended
        self._watched: dict[Owner, int] = {}  # pidfds
        self._stop = False
        self._stopper = os.eventfd(0, os.EFD_CLOEXEC)
        self._warned = False
        self._thread = threading.Thread(target=self._run, name="tiermem-ledger", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread; a second call does nothing."""
        if self._stop:
            return
        self._stop = True
        os.eventfd_write(self._stopper, 1)
        self._thread.join()
        for pidfd in self._watched.values():
            os.close(pidfd)
        os.close(self._stopper)

    def _run(self) -> None:
        while not self._stop:
            try:
                gone = self._watch(self._others())
                poll = select.poll()
                for fd in (self._bell.socket.fileno(), self._stopper, *self._watched.values()):
                    poll.register(fd, select.POLLIN)
                ready = {fd for fd, _ in poll.poll(0 if gone else _TICK_MS)}
                if gone or ready & set(self._watched.values()):
                    self._ended()
                    self._woken()
                if self._bell.heard():
                    self._woken()
            except TierMemError as error:
                if not self._warned:
                    log.warning("ledger not followed reason=%s", error)
                self._warned = True
                select.select([self._stopper], [], [], _TICK_MS / 1000)

    def _watch(self, owners: set[Owner]) -> bool:
        """Open a pidfd for each; True if one of them is gone already."""
        for owner in [owner for owner in self._watched if owner not in owners]:
            os.close(self._watched.pop(owner))
        gone = False
        for owner in owners - set(self._watched):
            try:
                self._watched[owner] = os.pidfd_open(owner[0])
            except ProcessLookupError:
                gone = True
                continue
            except OSError:  # an old kernel: looked at on every tick
                pass
            gone |= not is_alive(owner)  # also if the pid is another process's by now
        return gone
