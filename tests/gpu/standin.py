"""The stand-in CUDA driver of `fake_cuda.c`, compiled once a test run, and its switches."""

from __future__ import annotations

import ctypes
import functools
import shutil
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import pytest
import xxhash

from tiermem.gpu.digest import PIECE_BYTES
from tiermem.gpu.driver import Driver

SOURCE = Path(__file__).with_name("fake_cuda.c")


@functools.cache
def library() -> str:
    """Path of the compiled library; skips the test where there is no C compiler."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler for the stand-in CUDA driver")
    out = Path(tempfile.mkdtemp(prefix="tiermem-fake-cuda-")) / "libcuda.so.1"
    flags = ["-O1", "-shared", "-fPIC", "-Wl,-Bsymbolic"]
    subprocess.run([compiler, *flags, "-o", str(out), str(SOURCE), "-lpthread"], check=True)
    return str(out)


def _digest(pages: int, addresses: int, out: int, pieces: int) -> None:
    """What the kernel of `gpu/digest.py` leaves; its text is tried in test_digest.py."""
    where = (ctypes.c_uint64 * pages).from_address(addresses)
    answers = (ctypes.c_uint64 * (pages * pieces)).from_address(out)
    for page, address in enumerate(where):
        for piece in range(pieces):
            data = ctypes.string_at(address + piece * PIECE_BYTES, PIECE_BYTES)
            answers[page * pieces + piece] = xxhash.xxh3_64_intdigest(data)


_DIGEST = ctypes.CFUNCTYPE(None, *[ctypes.c_uint64] * 4)(_digest)


class StandIn:
    """The driver and its fault switches; `reset` clears every planted fault."""

    def __init__(self) -> None:
        self._lib = ctypes.CDLL(library())
        self._lib.fake_digest(_DIGEST)
        self._lib.fake_limit.argtypes = [ctypes.c_uint64]
        self._lib.fake_in_use.restype = ctypes.c_uint64
        self._lib.fake_hold.argtypes = [ctypes.c_uint64, ctypes.c_uint64]
        self.reset()

    def reset(self) -> None:
        self.lack("")
        self.deny(0)
        self.fail("", 0, 0)
        self.limit(1 << 40)
        self.slow(0)
        self.idle(False)

    def idle(self, on: bool) -> None:
        """Let nothing be mapped or copied; to be changed while no device is open."""
        self._lib.fake_idle(int(on))

    def driver(self) -> Driver:
        return Driver(library())

    def fail(self, call: str, nth: int, code: int) -> None:
        """Let the nth call of `call` from now (1 is the next) give `code`."""
        self._lib.fake_fail(call.encode(), nth, code)

    def fail_always(self, call: str, code: int) -> None:
        """Let every call of `call` from now give `code`."""
        self._lib.fake_fail_always(call.encode(), code)

    def deny(self, attribute: int) -> None:
        """Let the device not have what this CUdevice_attribute asks for."""
        self._lib.fake_deny(attribute)

    def lack(self, call: str) -> None:
        """Answer as a driver that does not have this call."""
        self._lib.fake_lack(call.encode())

    def limit(self, nbytes: int) -> None:
        """Let the device have this many bytes."""
        self._lib.fake_limit(nbytes)

    def slow(self, microseconds: int) -> None:
        """Let each cuMemMap take so long."""
        self._lib.fake_slow(microseconds)

    def in_use(self) -> int:
        return int(self._lib.fake_in_use())

    def mappings(self) -> int:
        return int(self._lib.fake_mappings())

    def hold(self, stream: int, word: np.ndarray) -> None:
        """Queue work on `stream` that ends when word[0] (uint32) is set."""
        assert self._lib.fake_hold(stream, word.ctypes.data) == 0
