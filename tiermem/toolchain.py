"""Compiles `native.c` at first use into a private cache, with whatever C compiler there is.

The file's name is a hash of source, flags, machine and compiler, so an edit or an upgrade makes a
new file and an old one is never loaded for it. Two processes that build at once each write a
temporary file and rename it: the last one wins with equal content.
"""

from __future__ import annotations

import atexit
import hashlib
import importlib.util
import logging
import os
import platform
import shutil
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

from tiermem.errors import DriverError

log = logging.getLogger(__name__)

FLAGS = ("-O2", "-std=gnu11", "-fPIC", "-shared", "-pthread")
COMPILERS = ("cc", "gcc", "clang")
TIMEOUT_S = 300.0
"""Generous: ziglang compiles its own C library first (7 s, 2-core machine, 2026-11)."""


def compiler() -> list[str]:
    """The command that compiles C: cc, gcc or clang of the system, else the ziglang package."""
    for name in COMPILERS:
        if found := shutil.which(name):
            return [found]
    if importlib.util.find_spec("ziglang") is not None:
        # zig turns undefined-behaviour traps on by default; system compilers do not.
        return [sys.executable, "-m", "ziglang", "cc", "-fno-sanitize=undefined"]
    raise DriverError(
        f"no C compiler: none of {', '.join(COMPILERS)} on PATH and no package ziglang; "
        "install one: `apt install gcc`, or `pip install ziglang` (no root needed)"
    )


def cache_directory() -> Path:
    """Where compiled code is kept: ours alone (0700), made if missing.

    $XDG_CACHE_HOME/tiermem, else ~/.cache/tiermem, else (not writable, not ours, or open to
    others) a fresh temporary directory of this process.
    """
    base = os.environ.get("XDG_CACHE_HOME", "")
    root = Path(base) if os.path.isabs(base) else Path.home() / ".cache"
    path = root / "tiermem"
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        if _private(path) and os.access(path, os.W_OK | os.X_OK):
            return path
        reason = f"not ours, or open to others (mode must be 0700, owner {os.geteuid()})"
    except OSError as error:
        reason = str(error)
    fallback = Path(tempfile.mkdtemp(prefix="tiermem-"))
    atexit.register(shutil.rmtree, fallback, ignore_errors=True)
    log.warning("cache directory=%s unusable reason=%s using=%s", path, reason, fallback)
    return fallback


def _private(path: Path) -> bool:
    found = path.lstat()
    kind = stat.S_ISDIR(found.st_mode) or stat.S_ISREG(found.st_mode)
    return kind and found.st_uid == os.geteuid() and not found.st_mode & 0o022


def build(source: Path) -> Path:
    """The shared library made from one C file, compiled now if the cache has none.

    Raises DriverError when there is no compiler, or with the compiler's own words.
    """
    command = compiler()
    text = source.read_bytes()
    target = "\0".join((*command, *FLAGS, platform.machine(), *platform.libc_ver()))
    name = hashlib.sha256(text + target.encode()).hexdigest()[:32]
    directory = cache_directory()
    library = directory / f"{source.stem}-{name}.so"
    if library.exists() and _private(library):
        return library
    handle, draft = tempfile.mkstemp(dir=directory, prefix=f".{source.stem}-", suffix=".so")
    os.close(handle)
    try:
        _compile([*command, *FLAGS, "-o", draft, str(source)])
        os.chmod(draft, 0o700)
        os.replace(draft, library)
    finally:
        Path(draft).unlink(missing_ok=True)
    return library


def _compile(command: list[str]) -> None:
    # zig builds its own C library beside our file: 49 MB that are never asked for again.
    with tempfile.TemporaryDirectory(prefix="tiermem-zig-") as scratch:
        caches = {"ZIG_GLOBAL_CACHE_DIR": scratch, "ZIG_LOCAL_CACHE_DIR": scratch}
        try:
            done = subprocess.run(
                command,
                capture_output=True,
                text=True,
                timeout=TIMEOUT_S,
                env={**os.environ, **caches},
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise DriverError(f"compiling native code with {command[0]}: {error}") from error
    if done.returncode != 0:
        raise DriverError(
            f"{' '.join(command)} ended with {done.returncode}: {done.stderr.strip()[-2000:]}; "
            "install a working compiler (`apt install gcc libc6-dev`, or `pip install ziglang`)"
        )
