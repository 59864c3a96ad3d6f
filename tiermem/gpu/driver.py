"""Checked calls of the CUDA driver, by address, on a device's primary context.

Every call is fetched with cuGetProcAddress, so its address can also stand in a native program
(`tiermem.native`), and nothing but the driver itself is needed: no toolkit, no Python package.
The primary context is the one that torch uses, so both work in one process and in any thread.
"""

from __future__ import annotations

import ctypes
import os
import threading
from dataclasses import dataclass
from types import TracebackType
from typing import Final

from tiermem.errors import DriverError, TierFailed

SUCCESS: Final = 0
OUT_OF_MEMORY: Final = 2
NOT_READY: Final = 600
RELAXED: Final = 2  # CUstreamCaptureMode
_HOST_NUMA_ID: Final = 134  # CUdevice_attribute

# Codes after which nothing on the context works again: the device fell off the bus, or a kernel
# left it with an error that only a new process clears.
_LOST: Final = frozenset(
    {4, 46, 214, 220, 226, 700, 702, 709, 710, 714, 715, 716, 717, 718, 719, 721, 802, 810, 911}
)
_WAY_OUT: Final = {
    1: "an argument was refused: page size, address range, or a page that shows nothing",
    2: "lower gpu.budget, or end other processes on this device",
    3: "the driver was not initialised in this process",
    100: "no CUDA device is visible: check nvidia-smi, CUDA_VISIBLE_DEVICES; or use the CPU device",
    101: "no such device index: check CUDA_VISIBLE_DEVICES",
    201: "the context is gone: was the device reset, or CUDA used before a fork?",
    712: "this host memory is registered already",
    801: "this device or driver does not do that",
    803: "the driver and its kernel module differ: reload the module or restart the machine",
}


@dataclass(frozen=True, slots=True)
class _Call:
    """One driver call: i int32, I uint32, Q uint64 (handle, size, address), P pointer."""

    args: str
    short: bool = True  # returns within microseconds: keeps the interpreter lock
    version: int = 12000  # asked for; the driver answers with the newest not above it
    optional: bool = False  # there is another way when it is missing


_CALLS: Final[dict[str, _Call]] = {
    "cuInit": _Call("I", short=False),
    "cuDriverGetVersion": _Call("P"),
    "cuDeviceGetCount": _Call("P"),
    "cuDeviceGet": _Call("Pi"),
    "cuDeviceGetName": _Call("Pii"),
    "cuDeviceGetUuid": _Call("Pi"),
    "cuDeviceGetAttribute": _Call("Pii"),
    "cuDeviceTotalMem": _Call("Pi"),
    "cuDevicePrimaryCtxRetain": _Call("Pi", short=False),
    "cuDevicePrimaryCtxRelease": _Call("i", short=False),
    "cuCtxSetCurrent": _Call("Q"),
    "cuCtxPushCurrent": _Call("Q"),
    "cuCtxPopCurrent": _Call("P"),
    "cuThreadExchangeStreamCaptureMode": _Call("P"),
    "cuMemGetInfo": _Call("PP"),
    "cuMemAddressReserve": _Call("PQQQQ", short=False),
    "cuMemAddressFree": _Call("QQ", short=False),
    "cuMemGetAllocationGranularity": _Call("PPI"),
    "cuMemCreate": _Call("PQPQ"),
    "cuMemRelease": _Call("Q"),
    "cuMemMap": _Call("QQQQQ"),
    "cuMemSetAccess": _Call("QQPQ"),
    "cuMemUnmap": _Call("QQ"),
    "cuMemExportToShareableHandle": _Call("PQIQ", short=False),
    "cuMemcpyAsync": _Call("QQQQ"),
    "cuMemcpyBatchAsync": _Call("PPPQPPQPQ", version=12080, optional=True),
    "cuMemsetD32Async": _Call("QIQQ"),
    "cuMemHostRegister": _Call("QQI", short=False),
    "cuMemHostUnregister": _Call("Q", short=False),
    "cuMemHostAlloc": _Call("PQI", short=False),
    "cuMemFreeHost": _Call("Q", short=False),
    "cuEventCreate": _Call("PI"),
    "cuEventRecord": _Call("QQ"),
    "cuEventQuery": _Call("Q"),
    "cuEventSynchronize": _Call("Q", short=False),
    "cuEventDestroy": _Call("Q"),
    "cuStreamCreateWithPriority": _Call("PIi", short=False),
    "cuStreamDestroy": _Call("Q", short=False),
    "cuStreamSynchronize": _Call("Q", short=False),
    "cuStreamWaitEvent": _Call("QQI"),
    "cuStreamWriteValue64": _Call("QQQI"),
    "cuStreamWaitValue64": _Call("QQQI"),
    "cuStreamIsCapturing": _Call("QP"),
    "cuStreamGetId": _Call("QP"),
    "cuModuleLoadData": _Call("PP", short=False),
    "cuModuleUnload": _Call("Q", short=False),
    "cuModuleGetFunction": _Call("PQP"),
    "cuLaunchKernel": _Call("QIIIIIIIQPP"),
    "cuGetErrorName": _Call("iP"),
    "cuGetErrorString": _Call("iP"),
}
_CTYPES: Final = {
    "i": ctypes.c_int32,
    "I": ctypes.c_uint32,
    "Q": ctypes.c_uint64,
    "P": ctypes.c_void_p,
}

_started = False  # cuInit was called in this process, or in the one it was forked from
_forked = False


def _after_fork() -> None:
    global _forked
    _forked = _started


os.register_at_fork(after_in_child=_after_fork)


class CudaError(DriverError):
    """A driver call that failed; `code` is the CUresult, `call` the function's name."""

    def __init__(self, message: str, call: str, code: int) -> None:
        super().__init__(message)
        self.call = call
        self.code = code


class DeviceLost(CudaError, TierFailed):
    """The device or its context is gone; the process has to start again."""


class Driver:
    """The CUDA driver of this process.

    Raises DriverError without a driver, without a device, or when the driver lacks a call that
    we cannot do without (the message names it). `missing` lists optional calls that are not there.
    """

    def __init__(self, library: str = "libcuda.so.1") -> None:
        try:
            lib = ctypes.CDLL(library)
        except OSError as error:
            raise DriverError(
                f"cannot load {library}: {error}; install the NVIDIA driver, or use the CPU device"
            ) from None
        if not hasattr(lib, "cuGetProcAddress_v2"):
            raise DriverError(
                f"{library} lacks cuGetProcAddress_v2: it needs driver 525 (CUDA 12.0) or newer"
            )
        get = lib.cuGetProcAddress_v2
        self._library = lib  # keeps the library loaded
        self._addresses: dict[str, int] = {}
        self._functions: dict[str, ctypes._CFunctionType] = {}
        for name, call in _CALLS.items():
            address = ctypes.c_void_p()
            status = ctypes.c_int()
            code = get(
                name.encode(),
                ctypes.byref(address),
                ctypes.c_int(call.version),
                ctypes.c_uint64(0),
                ctypes.byref(status),
            )
            if code == SUCCESS and address.value:
                kind = ctypes.PYFUNCTYPE if call.short else ctypes.CFUNCTYPE
                prototype = kind(ctypes.c_int, *(_CTYPES[c] for c in call.args))
                self._addresses[name] = address.value
                self._functions[name] = prototype(address.value)
        self.missing = tuple(n for n in _CALLS if n not in self._addresses)
        self.version = self._version()
        self._refuse_old()
        self.call("cuInit", 0)
        global _started
        _started = True

    def _version(self) -> int:
        number = ctypes.c_int()
        if "cuDriverGetVersion" in self._functions:
            self._functions["cuDriverGetVersion"](ctypes.byref(number))
        return number.value

    def _refuse_old(self) -> None:
        lacking = [n for n in self.missing if not _CALLS[n].optional]
        if lacking:
            raise DriverError(
                f"the CUDA driver ({self.version_text}) lacks {', '.join(lacking)}: paging needs "
                "driver 525 (CUDA 12.0) or newer; the CPU device still works"
            )

    @property
    def version_text(self) -> str:
        """The CUDA version that the driver speaks, such as "13.0"."""
        return f"{self.version // 1000}.{self.version % 1000 // 10}"

    def has(self, name: str) -> bool:
        return name in self._addresses

    def address(self, name: str) -> int:
        """The function's address, for a native program."""
        return self._addresses[name]

    def attempt(self, name: str, *args: object) -> int:
        """Call and return the CUresult, whatever it is."""
        self.refuse_forked(name)
        return int(self._functions[name](*args))

    def refuse_forked(self, name: str) -> None:
        """Raise DriverError in a child that was forked after CUDA had started."""
        if _forked:
            raise DriverError(
                f"{name}: CUDA was started before this process was forked and does not work in "
                "the child; start workers with 'spawn', or open the space after the fork"
            )

    def call(self, name: str, *args: object) -> None:
        """Call; raises CudaError (DeviceLost) unless the result is CUDA_SUCCESS."""
        code = self.attempt(name, *args)
        if code != SUCCESS:
            raise self.error(name, code)

    def error(self, call: str, code: int, detail: str = "") -> CudaError:
        """The exception for a CUresult that somebody else has received from `call`."""
        way_out = _WAY_OUT.get(code, "")
        lost = code in _LOST
        if lost:
            way_out = "the device or its context is lost; restart the process"
        parts = [f"{call}: {self._text('Name', code)} ({code}, {self._text('String', code)})"]
        parts += [part for part in (detail, way_out) if part]
        return (DeviceLost if lost else CudaError)("; ".join(parts), call, code)

    def _text(self, kind: str, code: int) -> str:
        text = ctypes.c_char_p()
        self._functions[f"cuGetError{kind}"](code, ctypes.byref(text))
        return text.value.decode() if text.value else f"unknown {kind.lower()}"


class _Modes(threading.local):
    """The capture modes that nested `with context:` blocks of a thread found."""

    def __init__(self) -> None:
        self.found: list[int] = []


class Context:
    """The primary context of one device, retained; `with context:` makes it current here.

    Inside the block our calls are also no concern of a graph that an engine is capturing in
    another stream: without that, a query of an event would end the engine's capture in error.
    """

    def __init__(self, driver: Driver, index: int) -> None:
        count = ctypes.c_int()
        driver.call("cuDeviceGetCount", ctypes.byref(count))
        if not 0 <= index < count.value:
            raise driver.error("cuDeviceGet", 101, f"asked for {index}, {count.value} visible")
        device, handle = ctypes.c_int(), ctypes.c_uint64()
        driver.call("cuDeviceGet", ctypes.byref(device), index)
        driver.call("cuDevicePrimaryCtxRetain", ctypes.byref(handle), device)
        self.driver = driver
        self.index = index
        self.device = device.value
        self.handle = handle.value
        self._modes = _Modes()
        self._closed = False

    def __enter__(self) -> Context:
        self.driver.call("cuCtxPushCurrent", self.handle)
        mode = ctypes.c_int(RELAXED)
        self.driver.attempt("cuThreadExchangeStreamCaptureMode", ctypes.byref(mode))
        self._modes.found.append(mode.value)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        mode = ctypes.c_int(self._modes.found.pop())
        self.driver.attempt("cuThreadExchangeStreamCaptureMode", ctypes.byref(mode))
        self.driver.attempt("cuCtxPopCurrent", ctypes.byref(ctypes.c_uint64()))

    def attribute(self, number: int) -> int:
        """A device attribute (CUdevice_attribute); 0 when the driver does not know it."""
        value = ctypes.c_int()
        code = self.driver.attempt("cuDeviceGetAttribute", ctypes.byref(value), number, self.device)
        return value.value if code == SUCCESS else 0

    @property
    def numa_node(self) -> int | None:
        """The node of host memory that is nearest to the device; None where none is known."""
        node = ctypes.c_int(-1)
        code = self.driver.attempt(
            "cuDeviceGetAttribute", ctypes.byref(node), _HOST_NUMA_ID, self.device
        )
        return node.value if code == SUCCESS and node.value >= 0 else None

    @property
    def name(self) -> str:
        text = ctypes.create_string_buffer(128)
        self.driver.call("cuDeviceGetName", text, len(text), self.device)
        return text.value.decode()

    @property
    def uuid(self) -> str:
        raw = ctypes.create_string_buffer(16)
        self.driver.call("cuDeviceGetUuid", raw, self.device)
        return raw.raw.hex()

    def free_bytes(self) -> tuple[int, int]:
        """(free, total) bytes of the device, as the driver sees them now."""
        free, total = ctypes.c_uint64(), ctypes.c_uint64()
        with self:
            self.driver.call("cuMemGetInfo", ctypes.byref(free), ctypes.byref(total))
        return free.value, total.value

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self.driver.attempt("cuDevicePrimaryCtxRelease", self.device)


_driver: Driver | None = None
_lock = threading.Lock()


def load() -> Driver:
    """The driver of this process, loaded once; DriverError says what is missing."""
    global _driver
    with _lock:
        if _driver is None:
            _driver = Driver()
        return _driver
