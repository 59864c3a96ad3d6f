"""Driver calls in one go: the same as in a `with context:` block, and taken back as a whole."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

import numpy as np
import pytest

from tests.gpu.standin import StandIn
from tiermem.gpu.driver import Context, CudaError
from tiermem.gpu.frames import DEVICE, Arena, Backing, reserve
from tiermem.gpu.routine import A, B, C, D, Routine

PAGE = 2 << 20


@pytest.fixture
def standin() -> Iterator[StandIn]:
    fake = StandIn()
    yield fake
    fake.reset()


@pytest.fixture
def context(standin: StandIn) -> Iterator[Context]:
    context = Context(standin.driver(), 0)
    yield context
    context.close()


def memory_of(context: Context) -> tuple[int, int]:
    """(CUresult, free bytes) of a call that needs a current context."""
    free, total = ctypes.c_uint64(), ctypes.c_uint64()
    code = context.driver.attempt("cuMemGetInfo", ctypes.byref(free), ctypes.byref(total))
    return code, free.value


def test_the_context_is_current_in_a_routine_alone(context: Context) -> None:
    out = np.zeros(2, np.uint64)
    ask = Routine(context, (("cuMemGetInfo", out.ctypes.data, out.ctypes.data + 8),))
    ask.run()
    assert (int(out[0]), int(out[1])) == context.free_bytes()
    assert memory_of(context)[0] == 201
    with context:
        ask.run()
        assert memory_of(context)[0] == 0
    assert memory_of(context)[0] == 201


def test_the_capture_mode_of_the_thread_is_what_it_was(context: Context) -> None:
    def exchange(mode: int) -> int:
        word = ctypes.c_int(mode)
        context.driver.call("cuThreadExchangeStreamCaptureMode", ctypes.byref(word))
        return word.value

    seen = np.zeros(1, np.uint64)
    look = Routine(context, (("cuThreadExchangeStreamCaptureMode", seen.ctypes.data),))
    was = exchange(1)
    look.run()
    assert int(seen[0]) == 2, "relaxed while it runs"
    assert exchange(was) == 1


@pytest.mark.parametrize("call", ["cuMemMap", "cuMemSetAccess"])
def test_a_step_that_fails_takes_back_those_before_it(
    standin: StandIn, context: Context, call: str
) -> None:
    arena = Arena(context, Backing(context, DEVICE, 0), PAGE, 1)
    arena.back(np.zeros(1, np.int32))
    start = reserve(context, 2 * PAGE, PAGE)
    desc = arena.backing.access
    unmap = ("cuMemUnmap", A, PAGE)
    let = ("cuMemSetAccess", A, PAGE, C, D)
    show = Routine(context, (("cuMemMap", A, PAGE, 0, B, 0), let), (unmap, None))
    before = standin.mappings()
    standin.fail(call, 1, 2)
    with pytest.raises(CudaError, match=f"{call}: CUDA_ERROR_OUT_OF_MEMORY") as error:
        show.run(start, arena.handles[0], desc.ctypes.data, 1)
    assert (error.value.call, error.value.code) == (call, 2)
    assert standin.mappings() == before
    assert memory_of(context)[0] == 201
    for page in (start + PAGE, start):  # every run with its own values
        show.run(page, arena.handles[0], desc.ctypes.data, 1)
        ctypes.memset(page, 7, PAGE)
    assert standin.mappings() == before + 2
    hide = Routine(context, (unmap,))
    hide.run(start)
    hide.run(start + PAGE)
    assert standin.mappings() == before
    arena.close()
