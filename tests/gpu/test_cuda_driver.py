"""Errors of the CUDA driver: each names the call, the cause and the way out."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator

import pytest

from tests.gpu.standin import StandIn, library
from tiermem.errors import DriverError, TierFailed
from tiermem.gpu.driver import Context, CudaError, DeviceLost, Driver


@pytest.fixture
def standin() -> Iterator[StandIn]:
    fake = StandIn()
    yield fake
    fake.reset()


def test_a_machine_without_the_driver_gets_a_clear_error() -> None:
    with pytest.raises(DriverError, match=r"cannot load libcuda-not-there.*use the CPU device"):
        Driver("libcuda-not-there.so.1")


def test_a_library_that_is_older_than_cuda_12_is_refused() -> None:
    with pytest.raises(DriverError, match=r"lacks cuGetProcAddress_v2.*driver 525"):
        Driver("libc.so.6")


def test_a_driver_without_a_needed_call_is_refused_by_the_calls_name(standin: StandIn) -> None:
    standin.lack("cuMemMap")
    with pytest.raises(DriverError, match=r"12\.8.* lacks cuMemMap.*CPU device still works"):
        standin.driver()


def test_a_driver_without_an_optional_call_starts_and_says_what_is_missing(
    standin: StandIn,
) -> None:
    standin.lack("cuMemcpyBatchAsync")
    driver = standin.driver()
    assert driver.missing == ("cuMemcpyBatchAsync",)
    assert not driver.has("cuMemcpyBatchAsync")


def test_a_failed_call_names_itself_its_code_and_what_to_do(standin: StandIn) -> None:
    driver = standin.driver()
    standin.fail("cuDeviceGetCount", 1, 2)
    with pytest.raises(CudaError, match=r"cuDeviceGetCount: CUDA_ERROR_OUT_OF_MEMORY.*budget") as e:
        driver.call("cuDeviceGetCount", ctypes.byref(ctypes.c_int()))
    assert (e.value.call, e.value.code) == ("cuDeviceGetCount", 2)


def test_a_lost_device_is_a_failed_tier(standin: StandIn) -> None:
    error = standin.driver().error("cuMemcpyAsync", 700)
    assert isinstance(error, DeviceLost)
    assert isinstance(error, TierFailed)
    assert "restart the process" in str(error)


def test_a_device_that_is_not_there_is_refused(standin: StandIn) -> None:
    with pytest.raises(CudaError, match="asked for 3, 1 visible"):
        Context(standin.driver(), 3)


def test_a_context_is_current_inside_its_block_alone(standin: StandIn) -> None:
    driver = standin.driver()
    context = Context(driver, 0)
    free, total = ctypes.c_uint64(), ctypes.c_uint64()
    assert driver.attempt("cuMemGetInfo", ctypes.byref(free), ctypes.byref(total)) == 201
    with context:
        driver.call("cuMemGetInfo", ctypes.byref(free), ctypes.byref(total))
    assert context.free_bytes() == (free.value, total.value)
    assert driver.attempt("cuMemGetInfo", ctypes.byref(free), ctypes.byref(total)) == 201
    context.close()
    context.close()


def test_a_child_forked_after_cuda_started_gets_a_clear_error(standin: StandIn) -> None:
    driver = standin.driver()
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            driver.call("cuDeviceGetCount", ctypes.byref(ctypes.c_int()))
            answer = "no error"
        except DriverError as error:
            answer = str(error)
        os.write(write, answer.encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        answer = pipe.read()
    assert os.waitpid(child, 0)[1] == 0
    assert "forked" in answer
    assert "spawn" in answer
    assert library()
