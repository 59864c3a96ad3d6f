"""Tensors and arrays over addresses whose bytes come and go.

Both are made from the address alone: nothing is read, so pages need not be shown, and neither owns
memory. `data_ptr()` never changes. Touching a part that is not shown ends the process (CPU) or the
context (CUDA); keep the pages in use while they are touched, and the reservation while they live.
"""

from __future__ import annotations

import ctypes
import importlib.util
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from tiermem.errors import DriverError, NotOurs

if TYPE_CHECKING:
    import torch


def tensor(
    address: int,
    nbytes: int,
    dtype: torch.dtype | str,
    shape: Sequence[int],
    strides: Sequence[int] | None = None,
    device: str = "cpu",
) -> torch.Tensor:
    """A torch tensor over [address, address + nbytes), without a copy; its storage is the range.

    shape, strides: in elements; strides are row-major unless given. dtype: of torch, or its name
    ("bfloat16"). device: "cpu", or the CUDA device whose addresses these are ("cuda:0").
    Raises NotOurs if the tensor would reach past the range, DriverError if torch is missing or
    lacks the call that makes a CUDA storage from an address.
    """
    _refuse_without_torch()
    import torch

    kind: torch.dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    steps = tuple(strides) if strides is not None else _row_major(shape)
    _refuse_outside(nbytes, kind.itemsize, shape, steps)
    if address % kind.itemsize:
        raise NotOurs(f"tensor: {address:#x} is not a multiple of {kind.itemsize} bytes ({kind})")
    place = torch.device(device)
    blank = torch.empty(0, dtype=kind, device=place)  # starts CUDA in this process if need be
    if place.type == "cpu":
        # The public way: a buffer that only knows where it is.
        storage = torch.frombuffer(_buffer(address, nbytes), dtype=torch.uint8).untyped_storage()
    else:
        storage = _cuda_storage(address, nbytes, place)
    return blank.set_(storage, 0, tuple(shape), steps)


def view(
    address: int, nbytes: int, dtype: npt.DTypeLike, shape: Sequence[int]
) -> npt.NDArray[np.generic]:
    """A numpy array over [address, address + nbytes) in this process, row-major, without a copy.

    Raises NotOurs if the array would reach past the range.
    """
    kind = np.dtype(dtype)
    _refuse_outside(nbytes, kind.itemsize, shape, _row_major(shape))
    return np.ndarray(tuple(shape), kind, memoryview(_buffer(address, nbytes)))


def _refuse_outside(
    nbytes: int, itemsize: int, shape: Sequence[int], strides: Sequence[int]
) -> None:
    if len(shape) != len(strides):
        raise NotOurs(f"tensor: {len(shape)} dimensions and {len(strides)} strides")
    if any(n < 0 for n in (*shape, *strides)):
        raise NotOurs(f"tensor: negative shape {tuple(shape)} or strides {tuple(strides)}")
    if math.prod(shape) == 0:
        return
    last = sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
    if (last + 1) * itemsize > nbytes:
        raise NotOurs(
            f"tensor: shape {tuple(shape)} with strides {tuple(strides)} needs "
            f"{(last + 1) * itemsize} bytes; the range has {nbytes}"
        )


def _row_major(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))


def _buffer(address: int, nbytes: int) -> ctypes.Array[ctypes.c_ubyte]:
    if address <= 0 or nbytes <= 0:
        raise NotOurs(f"tensor: {nbytes} bytes at {address:#x} are no range")
    return (ctypes.c_ubyte * nbytes).from_address(address)


def _cuda_storage(address: int, nbytes: int, device: torch.device) -> torch.UntypedStorage:
    """The one call of torch that takes an address on faith: others ask the driver what is mapped.

    Used by torch's own CUDA-graph trees (2.1 and later).
    """
    import torch

    make = getattr(torch._C, "_construct_storage_from_data_pointer", None)
    if make is None:
        raise DriverError(
            f"tensor: torch {torch.__version__} cannot make a CUDA storage from an address; "
            "use torch 2.6 to 2.14"
        )
    storage: torch.UntypedStorage = make(address, device, nbytes)
    return storage


def _refuse_without_torch() -> None:
    if importlib.util.find_spec("torch") is None:
        raise DriverError(
            "tensor: torch is not installed; `pip install tiermem[torch]`, or use the numpy view"
        )
