"""Tensors and arrays over addresses that show now one frame, now another, now nothing."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.gpu.device_contract import finish, pages, slots
from tiermem.errors import NotOurs
from tiermem.gpu.emulated import EmulatedDevice
from tiermem.gpu.tensor import tensor, view

torch = pytest.importorskip("torch")

PAGE = 64 * 1024


@pytest.fixture
def device() -> Iterator[EmulatedDevice]:
    with EmulatedDevice(PAGE, 8) as device:
        yield device


@pytest.mark.parametrize("dtype", [torch.bfloat16, "float8_e4m3fn", torch.int64, torch.bool])
@pytest.mark.parametrize("gib", [1, 64])
def test_a_tensor_is_made_while_nothing_is_shown(
    device: EmulatedDevice, dtype: object, gib: int
) -> None:
    nbytes = gib << 30
    start = device.reserve(nbytes)
    made = tensor(start, nbytes, dtype, (gib, 1 << 20))  # type: ignore[arg-type]
    assert made.data_ptr() == start
    assert made.untyped_storage().nbytes() == nbytes
    assert made.shape == (gib, 1 << 20)
    assert made.is_contiguous()


def test_a_tensor_keeps_its_address_and_sees_the_frame_that_is_shown(
    device: EmulatedDevice,
) -> None:
    start = device.reserve(4 * PAGE)
    made = tensor(start, 4 * PAGE, torch.float32, (4, PAGE // 4))
    array = view(start, 4 * PAGE, np.float32, (4, PAGE // 4))
    page = pages(device, start, 2)
    for frame, value in ((3, 1.5), (5, 2.5)):
        there = view(int(device.frames.addresses(slots(frame))[0]), PAGE, np.float32, (PAGE // 4,))
        there[:] = value
        finish(device.window.show(page, slots(frame)))
        assert made.data_ptr() == start == array.__array_interface__["data"][0]
        assert bool((made[2] == value).all())
        assert bool((array[2] == value).all())
        finish(device.window.hide(page))


def test_writes_through_a_tensor_reach_the_frame(device: EmulatedDevice) -> None:
    start = device.reserve(2 * PAGE)
    finish(device.window.show(pages(device, start, 0, 1), slots(6, 7)))
    made = tensor(start, 2 * PAGE, torch.uint8, (2, PAGE))
    made[1].fill_(9)
    made[0].zero_()
    alias = device.frames.addresses(slots(6, 7)).tolist()
    assert ctypes.string_at(alias[1], PAGE) == bytes([9]) * PAGE
    assert not any(ctypes.string_at(alias[0], PAGE))


def test_strides_place_elements_where_they_say(device: EmulatedDevice) -> None:
    start = device.reserve(PAGE)
    finish(device.window.show(pages(device, start, 0), slots(0)))
    flat = view(start, PAGE, np.int32, (PAGE // 4,))
    flat[:] = np.arange(PAGE // 4)
    made = tensor(start, PAGE, torch.int32, (3, 4), (1000, 7))
    assert made.tolist() == [[1000 * i + 7 * j for j in range(4)] for i in range(3)]


def test_empty_shapes_and_single_elements_are_tensors_too(device: EmulatedDevice) -> None:
    start = device.reserve(PAGE)
    finish(device.window.show(pages(device, start, 0), slots(0)))
    assert tensor(start, PAGE, torch.int32, (0, 5)).numel() == 0
    assert tensor(start, PAGE, torch.int32, ()).item() == 0
    assert view(start, PAGE, np.int8, ()).shape == ()


@pytest.mark.parametrize(
    ("shape", "strides", "says"),
    [
        ((PAGE // 4 + 1,), None, "65540 bytes; the range has 65536"),
        ((2, 4), (PAGE // 4 - 3, 1), "65540"),
        ((2, 4), (1,), "2 dimensions and 1 strides"),
        ((2, -1), None, "negative"),
        ((2,), (-1,), "negative"),
    ],
)
def test_shapes_past_the_range_are_refused(
    device: EmulatedDevice, shape: tuple[int, ...], strides: tuple[int, ...] | None, says: str
) -> None:
    start = device.reserve(PAGE)
    with pytest.raises(NotOurs, match=says):
        tensor(start, PAGE, torch.float32, shape, strides)
    if strides is None:
        with pytest.raises(NotOurs, match=says):
            view(start, PAGE, np.float32, shape)


def test_addresses_that_cannot_hold_the_type_are_refused(device: EmulatedDevice) -> None:
    start = device.reserve(PAGE)
    with pytest.raises(NotOurs, match="multiple of 4"):
        tensor(start + 2, PAGE - 2, torch.float32, (4,))
    with pytest.raises(NotOurs, match="no range"):
        view(0, PAGE, np.int8, (1,))


def test_an_array_needs_no_torch() -> None:
    code = (
        "import sys\n"
        "from tiermem.gpu.tensor import view\n"
        "from tiermem.gpu.emulated import EmulatedDevice\n"
        "device = EmulatedDevice(65536, 1)\n"
        "view(device.reserve(65536), 65536, 'u1', (65536,))\n"
        "device.close()\n"
        "print('torch' in sys.modules)\n"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root
    )
    assert done.stdout == "False\n"


@pytest.mark.gpu
def test_a_cuda_tensor_is_made_over_addresses_that_show_nothing() -> None:
    cuda = ctypes.CDLL("libcuda.so.1")
    torch.cuda.init()
    torch.empty(1, device="cuda:0")
    address, nbytes = ctypes.c_uint64(), 1 << 36
    reserve = cuda.cuMemAddressReserve
    assert reserve(ctypes.byref(address), ctypes.c_size_t(nbytes), ctypes.c_size_t(0), 0, 0) == 0
    made = tensor(address.value, nbytes, torch.bfloat16, (1 << 20, 64), (128, 2), device="cuda:0")
    assert made.data_ptr() == address.value
    assert made.device == torch.device("cuda:0")
    assert made.stride() == (128, 2)
    assert made.untyped_storage().nbytes() == nbytes
    del made
    torch.cuda.synchronize()
    assert cuda.cuMemAddressFree(address, ctypes.c_size_t(nbytes)) == 0
