"""Opening what the NVMe tier keeps on disk: whose it is, how it is read, how much room there is."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import logging
import os
import stat
import struct
from pathlib import Path
from typing import Protocol

from tiermem.errors import ConfigError, TierFull

log = logging.getLogger(__name__)

GIB = 1 << 30
Buffer = memoryview


class FileIo(Protocol):
    """The two calls that move data; tests put one in that tears, fails and dawdles.

    Both may move fewer bytes than asked for, and raise OSError with its errno.
    """

    def pread(self, fd: int, buffer: Buffer, offset: int) -> int:
        """Read into the buffer from `offset`; bytes read, 0 at the end of the file."""

    def pwrite(self, fd: int, buffer: Buffer, offset: int) -> int:
        """Write the buffer at `offset`; bytes written."""


class PosixIo:
    """The real calls. Both run without the interpreter lock; Python itself retries EINTR."""

    def pread(self, fd: int, buffer: Buffer, offset: int) -> int:
        return os.preadv(fd, [buffer], offset)

    def pwrite(self, fd: int, buffer: Buffer, offset: int) -> int:
        return os.pwritev(fd, [buffer], offset)


def read_whole(io: FileIo, fd: int, buffer: Buffer, offset: int) -> None:
    """Fill the buffer, over short reads and interruptions; OSError(ENODATA) at the file's end."""
    done = 0
    while done < len(buffer):
        try:
            n = io.pread(fd, buffer[done:] if done else buffer, offset + done)
        except InterruptedError:
            continue
        if n <= 0:
            text = f"file ends at byte {offset + done}, {len(buffer) - done} bytes short"
            raise OSError(errno.ENODATA, text)
        done += n


def write_whole(io: FileIo, fd: int, buffer: Buffer, offset: int) -> None:
    """Write the buffer whole, over short writes and interruptions."""
    done = 0
    while done < len(buffer):
        try:
            n = io.pwrite(fd, buffer[done:] if done else buffer, offset + done)
        except InterruptedError:
            continue
        if n <= 0:
            raise OSError(errno.EIO, f"write of {len(buffer) - done} bytes moved none")
        done += n


def memory_at(address: int, nbytes: int) -> Buffer:
    """A view of raw memory; the caller keeps it alive and mapped while the view is used."""
    return memoryview((ctypes.c_uint8 * nbytes).from_address(address)).cast("B")


def private_directory(path: str | os.PathLike[str]) -> Path:
    """Make, or check, a directory that only its owner, this user, can enter.

    Raises ConfigError: not a directory, another's, open to others, or not writable.
    """
    directory = Path(path)
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        facts = directory.stat()
    except OSError as error:
        raise ConfigError(f"nvme.path: {directory}: {error.strerror}") from error
    if not stat.S_ISDIR(facts.st_mode):
        raise ConfigError(f"nvme.path: {directory} is not a directory")
    if facts.st_uid != os.geteuid():
        raise ConfigError(
            f"nvme.path: {directory} belongs to uid {facts.st_uid}, we run as {os.geteuid()}; "
            "name a directory of this user's own"
        )
    if facts.st_mode & 0o077:
        raise ConfigError(
            f"nvme.path: {directory} has mode {facts.st_mode & 0o777:04o} and would show cached "
            f"text to others; chmod 700 it, or name a directory inside it"
        )
    if not os.access(directory, os.W_OK | os.X_OK):
        raise ConfigError(f"nvme.path: {directory} is not writable by uid {os.geteuid()}")
    return directory


def open_nameless(directory: Path) -> tuple[int, bool]:
    """An unnamed file that goes when its descriptor does: (fd, whether it bypasses the cache)."""
    flags = os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC
    try:
        return os.open(directory, flags | os.O_DIRECT, 0o600), True
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP, errno.EISDIR, errno.ENOENT):
            raise _cannot_open(directory, error) from error
    name = directory / f".tiermem-{os.getpid()}-{os.urandom(4).hex()}"
    fd, direct = open_named(name, create=True)
    os.unlink(name)
    return fd, direct


def open_named(path: Path, *, create: bool) -> tuple[int, bool]:
    """Open a regular file of ours, with O_DIRECT where the file system has it: (fd, direct).

    Raises ConfigError for a link, another's file, one open to others, or what the system refuses.
    """
    flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | (os.O_CREAT | os.O_EXCL if create else 0)
    direct = True
    try:
        fd = os.open(path, flags | os.O_DIRECT, 0o600)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise _cannot_open(path, error) from error
        direct = False
        with contextlib.suppress(FileNotFoundError):
            # The refusal may have come after the file was made.
            if create:
                os.unlink(path)
        try:
            fd = os.open(path, flags, 0o600)
        except OSError as again:
            raise _cannot_open(path, again) from again
    facts = os.fstat(fd)
    if not stat.S_ISREG(facts.st_mode) or facts.st_uid != os.geteuid() or facts.st_mode & 0o077:
        os.close(fd)
        raise ConfigError(
            f"nvme.path: {path} must be a regular file of uid {os.geteuid()} with mode 0600; it "
            f"has uid {facts.st_uid} and mode {facts.st_mode:o}; remove it, or use another path"
        )
    return fd, direct


def take_room(fd: int, offset: int, nbytes: int, floor: int, where: Path) -> None:
    """Allocate [offset, offset + nbytes) of the file now, so that no later write can run out.

    Raises TierFull with numbers if that would leave less than `floor` bytes free; nothing is then
    taken. A file system that cannot allocate ahead gets a sparse file and finds out on writing.
    """
    facts = os.fstatvfs(fd)
    free = facts.f_bavail * facts.f_frsize
    missing = offset + nbytes - os.fstat(fd).st_blocks * 512
    if missing > free - floor:
        raise TierFull(
            f"nvme: {where} needs {missing / GIB:.2f} GiB more, {free / GIB:.2f} GiB are free and "
            f"{floor / GIB:.2f} GiB stay free; lower nvme.capacity or the free-space floor"
        )
    try:
        os.posix_fallocate(fd, offset, nbytes)
    except OSError as error:
        if error.errno in (errno.EOPNOTSUPP, errno.EINVAL):
            os.ftruncate(fd, max(os.fstat(fd).st_size, offset + nbytes))
            return
        if error.errno != errno.ENOSPC:
            raise
        raise TierFull(
            f"nvme: {where} is full: {nbytes / GIB:.2f} GiB asked for, {free / GIB:.2f} GiB free; "
            "lower nvme.capacity or name another disk"
        ) from error


def _cannot_open(path: Path, error: OSError) -> ConfigError:
    return ConfigError(f"nvme.path: cannot open {path}: {error.strerror}")


def open_index(path: Path, *, truncate: bool) -> int:
    """Open a small metadata file of ours for appending, 0600; OSError if the system refuses."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW
    return os.open(path, flags | (os.O_TRUNC if truncate else 0), 0o600)


def write_all(fd: int, data: bytes) -> None:
    """Append the data whole."""
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def lock(fd: int) -> bool:
    """Own the file until its descriptor is closed (OFD lock); False if somebody else does."""
    request = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
    try:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, request)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            return False
        raise
    return True
