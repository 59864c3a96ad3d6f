"""Chunks of one memory file that the processes of a machine lease from one another.

A chunk is ours as long as we hold the lock on its byte of the file: the kernel drops that with our
last descriptor, so the chunks of a process that dies are free at once, and no list can be wrong.
Each process opens the file anew, because locks belong to an opening and not to a descriptor.

Whoever takes a chunk punches it out of the file first, so its memory is new and reads as zeros:
nobody sees bytes of another process, and a copy that a dying process's device still has under way
ends in memory that is no longer the file's.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import stat
import struct
import threading
from typing import Final

from tiermem.errors import ConfigError, DriverError, TierFull

_SEALS: Final = 0x1 | 0x2 | 0x4  # F_SEAL_SEAL, F_SEAL_SHRINK, F_SEAL_GROW
_PUNCH: Final = 0x02 | 0x01  # FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE
_FLOCK: Final = struct.Struct("hhqqi4x")

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]


class SharedChunks:
    """One process's opening of the file. Thread-safe; a chunk is an index."""

    def __init__(self, fd: int, chunk_bytes: int, tail_bytes: int = 0) -> None:
        """fd: of the file, from `create` or from another process; the caller closes it. tail_bytes:
        behind the last chunk, for others to use.

        Raises ConfigError if it is not a file as `create` makes them, of our own user.
        """
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid():
            raise ConfigError("the shared host pool that was offered is not a file of this user")
        nbytes = found.st_size - tail_bytes
        if chunk_bytes <= 0 or nbytes % chunk_bytes or nbytes <= 0:
            raise ConfigError(f"a shared host pool of {nbytes} bytes, chunks {chunk_bytes}")
        if fcntl.fcntl(fd, fcntl.F_GET_SEALS) & _SEALS != _SEALS:
            raise ConfigError("the shared host pool that was offered could be made smaller")
        self.chunk_bytes = chunk_bytes
        self.chunks = nbytes // chunk_bytes
        self.fd = os.open(f"/proc/self/fd/{fd}", os.O_RDWR | os.O_CLOEXEC)
        self._mine: set[int] = set()
        self._lock = threading.Lock()

    @staticmethod
    def create(nbytes: int) -> int:
        """A file of so many bytes without memory behind them yet; its descriptor."""
        fd = os.memfd_create("tiermem-host-shared", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(fd, nbytes)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
        return fd

    def reopened(self) -> int:
        """A descriptor to be given to another process: none of our locks go with it."""
        return os.open(f"/proc/self/fd/{self.fd}", os.O_RDWR | os.O_CLOEXEC)

    @property
    def mine(self) -> int:
        return len(self._mine)

    def take(self) -> int:
        """A chunk that nobody has, now ours, full of zeros; TierFull if there is none."""
        with self._lock:
            for index in range(self.chunks):
                if index not in self._mine and self._try(index, fcntl.F_WRLCK):
                    self._mine.add(index)
                    self._punch(index)
                    return index
        raise TierFull(
            f"host: all {self.chunks} chunks of the shared pool are in use, {len(self._mine)} here"
        )

    def give(self, index: int) -> None:
        """Give a chunk's memory back to the system, and the chunk to whoever wants it."""
        with self._lock:
            self._punch(index)
            self._mine.discard(index)
            self._try(index, fcntl.F_UNLCK)

    def sweep(self) -> int:
        """Give back the memory of chunks that nobody has: a process has died. How many had some."""
        swept = 0
        with self._lock:
            for index in range(self.chunks):
                if index in self._mine or not self._has_memory(index):
                    continue
                if self._try(index, fcntl.F_WRLCK):
                    self._punch(index)
                    self._try(index, fcntl.F_UNLCK)
                    swept += 1
        return swept

    def close(self) -> None:
        """Let go of the file and of all chunks; a second call does nothing."""
        with self._lock:
            for index in self._mine:
                self._punch(index)
            self._mine.clear()
            if self.fd >= 0:
                os.close(self.fd)
                self.fd = -1

    def _try(self, index: int, kind: int) -> bool:
        try:
            fcntl.fcntl(self.fd, fcntl.F_OFD_SETLK, _FLOCK.pack(kind, os.SEEK_SET, index, 1, 0))
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                return False
            raise DriverError(f"host: lock of chunk {index}: {error.strerror}") from None
        return True

    def _has_memory(self, index: int) -> bool:
        start = index * self.chunk_bytes
        try:
            return os.lseek(self.fd, start, os.SEEK_DATA) < start + self.chunk_bytes
        except OSError:  # no data up to the end
            return False

    def _punch(self, index: int) -> None:
        if _libc.fallocate(self.fd, _PUNCH, index * self.chunk_bytes, self.chunk_bytes) != 0:
            number = ctypes.get_errno()
            raise DriverError(f"host: chunk {index} stays: {os.strerror(number)}")
