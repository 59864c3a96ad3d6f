"""Groups that are copied slice by slice, and who waits for which slice."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tiermem.slices import MOST, Arriving, Sliced, cuts
from tiermem.tier import Mask


class Load:
    """A Done that notes which streams wait for it."""

    def __init__(self, failed: Mask | None = None) -> None:
        self.streams: list[int | None] = []
        self.ended = False
        self.failed = failed
        self.error = None if failed is None else OSError("it broke")

    def ready(self) -> bool:
        return self.ended

    def wait(self, timeout_s: float | None = None) -> bool:
        return self.ended

    def order(self, stream: int | None) -> None:
        self.streams.append(stream)


@given(
    n=st.integers(1, 300),
    slot=st.integers(1, 1 << 23),
    least=st.integers(1, 1 << 21),
    group=st.integers(0, 1 << 28),
)
def test_slices_cover_a_slot_once_and_none_is_small(
    n: int, slot: int, least: int, group: int
) -> None:
    found = list(cuts(n, slot, least, group))
    assert found[0][0] == 0
    assert found[-1][1] == slot
    assert all(end == first for (_, end), (first, _) in itertools.pairwise(found))
    assert all(first < end for first, end in found)
    assert len(found) <= MOST
    if len(found) > 1:
        assert n * slot >= group
        assert all(end - first >= least for first, end in found[:-1])


def test_a_small_group_is_one_slice_and_a_large_one_is_eight() -> None:
    mib = 1 << 20
    assert list(cuts(3, 8 * mib, mib, 32 * mib)) == [(0, 8 * mib)]
    assert len(list(cuts(4, 8 * mib, mib, 32 * mib))) == 8
    assert len(list(cuts(64, 2 * mib, mib, 32 * mib))) == 2


def test_a_stream_waits_for_each_slice_once_and_for_none_too_early() -> None:
    loads = [Load() for _ in range(4)]
    whole = Load()
    arriving = Arriving()
    arriving.add(Sliced([0, 100, 200, 300], loads))
    arriving.add(whole)
    asked = {50: (1, 1), 100: (1, 1), 101: (2, 1), 90: (2, 1), 300: (3, 1), 400: (4, 1)}
    for nbytes, (slices, wholes) in asked.items():
        arriving.order(7, nbytes)
        assert [load.streams for load in loads] == [[7]] * slices + [[]] * (4 - slices)
        assert whole.streams == [7] * wholes
    assert not len(arriving)


def test_what_is_added_later_is_waited_for_from_its_front() -> None:
    first, second = Load(), Load()
    arriving = Arriving()
    arriving.add(Sliced([0, 100], [Load(), first]))
    arriving.order(None, 100)
    arriving.add(second)
    arriving.order(None, 1)
    assert (first.streams, second.streams) == ([], [None])
    arriving.order(None)
    assert first.streams == [None]
    assert not len(arriving)


def test_a_sliced_group_ends_with_its_last_slice_and_fails_with_any() -> None:
    broken = np.array([False, True])
    loads = [Load(), Load(broken), Load()]
    done = Sliced([0, 10, 20], loads)
    loads[0].ended = loads[1].ended = True
    assert not done.ready()
    loads[2].ended = True
    assert done.ready()
    assert done.wait()
    with pytest.raises(OSError, match="broke"):
        raise done.error or AssertionError
    assert done.failed is not None
    assert done.failed.tolist() == [False, True]
    done.order(3)
    assert loads[2].streams == [3]
    assert Sliced([0], [Load()]).failed is None
