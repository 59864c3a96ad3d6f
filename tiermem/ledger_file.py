"""The ledger's file: who may open it, its words, and the lock that dies with its holder.

One file per device, group and user in the runtime directory. It is an array of 64-bit words: a
header, then RECORDS records of RECORD_WORDS words. A word is stored at once, so a process that is
killed between two stores leaves a record that is wrong only about itself, and that is reaped.

Two bytes of the file serve as open-file-description locks, which the kernel drops with their last
holder: GRANT is taken for every change; PRESENT is held, shared, as long as a process has the
file open. Whoever can take PRESENT for itself alone is the only user, and starts a fresh file:
that is how damage, other versions and leftovers of a reboot are healed.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import logging
import mmap
import os
import re
import stat
import threading
import time
import weakref
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from enum import IntEnum
from itertools import compress
from pathlib import Path

from tiermem.errors import ConfigError, TierMemError

log = logging.getLogger(__name__)

MAGIC = int.from_bytes(b"TIERLEDG", "little")
VERSION = 1
HEADER_WORDS = 512
RECORD_WORDS = 32
RECORDS = 64
SIZE = 8 * (HEADER_WORDS + RECORD_WORDS * RECORDS)
SUFFIX = ".ledger"


class LedgerError(TierMemError):
    """A ledger that cannot be used, or that does not answer; the message says what to do."""


class LedgerBusy(LedgerError):
    """The lock could not be had in time; trying again later is right."""


class Head(IntEnum):
    """Words of the header. Those before CRC never change while the file is in use."""

    MAGIC = 0
    VERSION = 1
    SIZE = 2
    UID = 3
    PID_SPACE = 4  # processes that see one another's pids
    CRC = 5
    BUDGET = 6
    EPOCH = 7  # counts every change
    MEMBERSHIP = 8  # counts who came and went
    DEVICE = 16  # text of up to 128 bytes


class Word(IntEnum):
    """Words of a record. STATE is stored last when a record is made."""

    STATE = 0
    PID = 1
    START = 2
    UID = 3
    FLOOR = 4
    CAP = 5
    WEIGHT = 6  # in millionths
    HELD = 7
    RESERVED = 8
    WANTED = 9
    ASLEEP = 10
    KIND = 11
    PAGE_BYTES = 12
    SEQ = 13  # counts the record's changes
    BEAT = 14  # monotonic milliseconds of the owner's last turn
    MOVABLE = 15
    PINNED = 16
    HOST = 17
    NVME = 18
    HITS_GPU = 19
    HITS_HOST = 20
    HITS_NVME = 21
    MOVED_DOWN = 22
    MOVED_UP = 23
    STALLS = 24
    TARGET = 25  # what the owner is moving towards
    NAME = 26  # text of up to 48 bytes


FREE, LIVE = 0, 1
MILLION = 1_000_000
NAME_BYTES = 8 * (RECORD_WORDS - Word.NAME)
DEVICE_BYTES = 128

_FIRSTS = range(HEADER_WORDS, HEADER_WORDS + RECORDS * RECORD_WORDS, RECORD_WORDS)
GRANT, PRESENT = 0, 1  # bytes of the file that stand for the locks
_WAY_OUT = "end the engines that use it, or choose another share.group"
_SPINS = 64
_NAP_S = 0.00005


def runtime_directory(env: Mapping[str, str] | None = None) -> Path:
    """The directory for ledgers, owner-only, made if it is not there.

    $XDG_RUNTIME_DIR/tiermem, else /tmp/tiermem-UID. LedgerError if it is somebody else's, a link,
    or open to others.
    """
    given = (os.environ if env is None else env).get("XDG_RUNTIME_DIR", "")
    uid = os.geteuid()
    return private_directory(Path(given) / "tiermem" if given else Path(f"/tmp/tiermem-{uid}"))


def private_directory(path: Path) -> Path:
    """An owner-only directory, made if it is not there. LedgerError as of `runtime_directory`."""
    try:
        path.mkdir(mode=0o700, exist_ok=True)
        found = path.lstat()
    except OSError as error:
        raise LedgerError(f"{path} cannot be made: {error.strerror}; set XDG_RUNTIME_DIR") from None
    _refuse_foreign(path, found, stat.S_ISDIR(found.st_mode), "directory")
    return path


def ledger_path(directory: Path, device: str, group: str) -> Path:
    """The file of a device and a group of engines."""
    plain = re.sub(r"[^A-Za-z0-9_.-]", "_", f"{device}-{group}")
    if len(plain) > 100:
        plain = f"{plain[:90]}-{zlib.crc32(plain.encode()):08x}"
    return directory / f"{plain}{SUFFIX}"


def _refuse_foreign(path: Path, found: os.stat_result, kind_fits: bool, kind: str) -> None:
    if not kind_fits:
        raise LedgerError(f"{path} is no plain {kind}; remove it")
    if found.st_uid != os.geteuid():
        raise LedgerError(
            f"{path} belongs to uid {found.st_uid}, this process is uid {os.geteuid()}: a ledger "
            "is not shared between users"
        )
    if found.st_mode & 0o077:
        raise LedgerError(
            f"{path} is open to others (mode {stat.S_IMODE(found.st_mode):04o}); "
            f"chmod go-rwx {path}"
        )


class _Flock(ctypes.Structure):
    _fields_ = (
        ("kind", ctypes.c_short),
        ("whence", ctypes.c_short),
        ("start", ctypes.c_int64),
        ("length", ctypes.c_int64),
        ("pid", ctypes.c_int),
    )


# PyDLL keeps the interpreter lock: the calls never block, and giving it up costs 5 ms beside one
# busy thread (FACTS "interpreter lock").
_LIBC = ctypes.PyDLL(None, use_errno=True)
_fcntl = _LIBC.fcntl
_fcntl.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.POINTER(_Flock))


class Lock:
    """An open-file-description lock on one byte; every call returns at once."""

    def __init__(self, fd: int, byte: int) -> None:
        self._fd = fd
        self._ask = {
            kind: ctypes.pointer(_Flock(kind, os.SEEK_SET, byte, 1, 0))
            for kind in (fcntl.F_RDLCK, fcntl.F_WRLCK, fcntl.F_UNLCK)
        }

    def take(self, *, shared: bool = False) -> bool:
        """True if it is ours now; False while another file description has it."""
        kind = fcntl.F_RDLCK if shared else fcntl.F_WRLCK
        if _fcntl(self._fd, fcntl.F_OFD_SETLK, self._ask[kind]) == 0:
            return True
        code = ctypes.get_errno()
        if code in (errno.EAGAIN, errno.EACCES, errno.EINTR):
            return False
        raise LedgerError(f"lock of the ledger: {os.strerror(code)}")

    def give(self) -> None:
        _fcntl(self._fd, fcntl.F_OFD_SETLK, self._ask[fcntl.F_UNLCK])


class Locked:
    """A ledger's words while its lock is ours: a context, entered once for every change.

    Entered and left in 1 us less than one that `contextmanager` makes, of 20 that a verb may take.
    """

    __slots__ = ("_file", "_timeout_s")

    def __init__(self, file: LedgerFile, timeout_s: float) -> None:
        """Made by `LedgerFile.locked`."""
        self._file = file
        self._timeout_s = timeout_s

    def __enter__(self) -> memoryview:
        self._file.acquire(self._timeout_s)
        return self._file.words

    def __exit__(self, *exc: object) -> None:
        self._file.give()


class LedgerFile:
    """An open ledger: its words, and the lock around every change. Thread-safe."""

    def __init__(self, path: Path, device: str, budget: int | None, *, exact: bool = True) -> None:
        """Open the ledger of a device, or make it. Most callers use `Ledger.open`.

        budget: bytes that all members may hold together; None, or one that is not exact, takes
        over what is in force.
        Raises LedgerError for what is damaged or foreign while others use it, ConfigError for a
        budget that differs from theirs.
        """
        self.path = path
        self._fd = -1
        self._threads = threading.Lock()
        self._states: list[int] = []  # as of the last look, and the records that they mean
        self._live: tuple[int, ...] = ()
        with exclusive(path.parent):
            self._fd = self._open()
            try:
                self._grant = Lock(self._fd, GRANT)
                self._present = Lock(self._fd, PRESENT)
                alone = self._present.take()
                if alone:
                    self._renew(device, budget)
                else:
                    self._refuse_damage()
                self._map = mmap.mmap(self._fd, SIZE)
                self.words = memoryview(self._map).cast("q")
                if not alone:
                    self._refuse_other(device, budget if exact else None)
                self._present.take(shared=True)
            except BaseException:
                os.close(self._fd)
                raise
        self._events = self._open_events()
        _OPEN.add(self)

    # ---------------------------------------------------------------- words

    def text(self, first: int, nbytes: int) -> str:
        raw = bytes(self.words[first : first + nbytes // 8])
        return raw.rstrip(b"\0").decode("utf-8", "replace")

    def set_text(self, first: int, nbytes: int, text: str) -> None:
        raw = text.encode()[:nbytes].decode("utf-8", "ignore").encode()
        self.words[first : first + nbytes // 8] = memoryview(raw.ljust(nbytes, b"\0")).cast("q")

    def live(self) -> tuple[int, ...]:
        """First words of the records in use, in the order of their slots. Under the lock."""
        states = self.words[HEADER_WORDS::RECORD_WORDS].tolist()
        if states != self._states:
            self._live = tuple(compress(_FIRSTS, states))
            self._states = states
        return self._live

    # ---------------------------------------------------------------- lock

    def locked(self, timeout_s: float = 1.0) -> Locked:
        """The words, for changes; LedgerError if the lock cannot be had within the timeout."""
        return Locked(self, timeout_s)

    def acquire(self, timeout_s: float = 1.0) -> None:
        if self._fd < 0:
            raise LedgerError(f"{self.path} was closed, or opened by a parent process")
        if not self._threads.acquire(timeout=timeout_s):
            raise LedgerBusy(f"{self.path}: another thread has held the lock for {timeout_s} s")
        try:
            if self._grant.take():
                return
            until = time.monotonic() + timeout_s
            tries = 0
            while not self._grant.take():
                tries += 1
                if tries > _SPINS:
                    if time.monotonic() > until:
                        raise LedgerBusy(
                            f"{self.path}: another process has held the lock for {timeout_s} s "
                            "(is one of the engines stopped? it must run on, or end)"
                        )
                    time.sleep(_NAP_S)
        except BaseException:
            self._threads.release()
            raise

    def give(self) -> None:
        self._grant.give()
        self._threads.release()

    def note(self, event: str, slot: int, nbytes: int) -> None:
        """Count a change, and write it into the event log if there is one. Under the lock."""
        self.words[Head.EPOCH] += 1
        if self._events >= 0:
            self._write_event(event, slot, nbytes)

    # ---------------------------------------------------------------- life

    def is_in_place(self) -> bool:
        """False once the file's name is gone or means another file: newcomers do not see us."""
        try:
            named, mine = self.path.stat(), os.fstat(self._fd)
        except OSError:
            return False
        return (named.st_ino, named.st_dev) == (mine.st_ino, mine.st_dev)

    def close(self) -> None:
        """Let go of the file; a second call does nothing."""
        if self._fd < 0:
            return
        _OPEN.discard(self)
        self.words.release()
        self._map.close()
        self._close_descriptors()

    def forget(self) -> None:
        """In a forked child: the parent's locks are not ours, and must end with the parent."""
        self._close_descriptors()

    # ---------------------------------------------------------------- parts

    def _close_descriptors(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
        if self._events >= 0:
            os.close(self._events)
        self._fd = self._events = -1

    def _open(self) -> int:
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            fd = os.open(self.path, flags, 0o600)
        except OSError as error:
            raise LedgerError(f"{self.path} cannot be opened: {error.strerror}") from None
        try:
            found = os.fstat(fd)
            _refuse_foreign(self.path, found, stat.S_ISREG(found.st_mode), "file")
        except BaseException:
            os.close(fd)
            raise
        return fd

    def _open_events(self) -> int:
        """A file NAME.events beside the ledger asks for a line about every change."""
        try:
            return os.open(
                self.path.with_suffix(".events"), os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC
            )
        except FileNotFoundError:
            return -1

    def _write_event(self, event: str, slot: int, nbytes: int) -> None:
        words = self.words
        live = self.live()
        held = sum(words[first + Word.HELD] for first in live)
        reserved = sum(words[first + Word.RESERVED] for first in live)
        line = (
            f"{words[Head.EPOCH]} {os.getpid()} {slot} {event} {nbytes} "
            f"{held} {reserved} {words[Head.BUDGET]}\n"
        )
        os.write(self._events, line.encode())

    def _renew(self, device: str, budget: int | None) -> None:
        """Nobody else uses the file: whatever it holds is left over. Start afresh."""
        fault = self._fault()
        if fault:
            log.warning("ledger renewed path=%s reason=%s", self.path, fault)
        if budget is None:
            raise LedgerError(f"{self.path}: no engine shares this device now")
        if budget <= 0:
            raise ConfigError(f"ledger budget {budget} bytes: above 0")
        os.ftruncate(self._fd, 0)  # no byte of the old file is left
        os.ftruncate(self._fd, SIZE)
        with mmap.mmap(self._fd, SIZE) as fresh, memoryview(fresh) as raw:
            words = raw.cast("q")
            words[Head.VERSION] = VERSION
            words[Head.SIZE] = SIZE
            words[Head.UID] = os.geteuid()
            words[Head.PID_SPACE] = _pid_space()
            words[Head.BUDGET] = budget
            name = device.encode()[:DEVICE_BYTES].ljust(DEVICE_BYTES, b"\0")
            words[Head.DEVICE : Head.DEVICE + DEVICE_BYTES // 8] = memoryview(name).cast("q")
            words[Head.CRC] = _crc(words)
            words[Head.MAGIC] = MAGIC
            words.release()

    def _fault(self) -> str:
        """What is wrong with the bytes in the file; "" for a good or an empty one."""
        size = os.fstat(self._fd).st_size
        raw = os.pread(self._fd, SIZE, 0)
        if size == 0 or not any(raw):
            return ""
        if size != SIZE or len(raw) != SIZE:
            if len(raw) >= 16 and memoryview(raw[:16]).cast("q")[Head.MAGIC] == MAGIC:
                version = memoryview(raw[:16]).cast("q")[Head.VERSION]
                if version != VERSION:
                    return f"version {version}, this tiermem writes {VERSION}"
            return f"{size} bytes instead of {SIZE}"
        words = memoryview(raw).cast("q")
        if words[Head.MAGIC] != MAGIC:
            return "not a ledger"
        if words[Head.VERSION] != VERSION:
            return f"version {words[Head.VERSION]}, this tiermem writes {VERSION}"
        if words[Head.CRC] != _crc(words):
            return "a damaged header"
        return ""

    def _refuse_damage(self) -> None:
        size = os.fstat(self._fd).st_size
        fault = self._fault() or ("" if size == SIZE else "empty")
        if fault:
            raise LedgerError(f"{self.path}: {fault}, and in use; {_WAY_OUT}")

    def _refuse_other(self, device: str, budget: int | None) -> None:
        """Others use the file: it must mean what we mean."""
        words = self.words
        if words[Head.PID_SPACE] != _pid_space():
            raise LedgerError(
                f"{self.path} is used from another container (pid namespace), whose processes "
                "cannot be watched from here; start the containers with a common one, such as "
                "docker run --pid=host"
            )
        found = self.text(Head.DEVICE, DEVICE_BYTES)
        if device and found != device:
            raise LedgerError(f"{self.path} is of device {found}, not {device}; {_WAY_OUT}")
        if budget is not None and words[Head.BUDGET] != budget:
            raise ConfigError(
                f"share.total = {budget} bytes, and the engines that run already share "
                f"{words[Head.BUDGET]}; give all engines of a group the same"
            )


@contextmanager
def exclusive(directory: Path) -> Iterator[None]:
    """One process at a time opens or makes ledgers in a directory."""
    try:
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise LedgerError(f"{directory} cannot be opened: {error.strerror}") from None
    try:
        until = time.monotonic() + 5
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > until:
                    raise LedgerError(f"{directory} is locked for 5 s by another process") from None
                time.sleep(0.002)
        yield
    finally:
        os.close(fd)


def _crc(words: memoryview) -> int:
    device = bytes(words[Head.DEVICE : Head.DEVICE + DEVICE_BYTES // 8])
    return zlib.crc32(bytes(words[Head.VERSION : Head.CRC]) + device)


def _pid_space() -> int:
    return os.stat("/proc/self/ns/pid").st_ino


_OPEN: weakref.WeakSet[LedgerFile] = weakref.WeakSet()


def _after_fork() -> None:
    for file in list(_OPEN):
        file.forget()
    _OPEN.clear()


os.register_at_fork(after_in_child=_after_fork)
