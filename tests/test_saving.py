"""Labelled pages that nothing forces down reach the drive: in the background, and at closing."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.test_adopt import PAGE, fill, keys_of, right, words_of
from tests.waiting import host_slots
from tiermem.config import Config, Gpu, Host, Nvme
from tiermem.errors import TierFull
from tiermem.gpu.emulated_streams import EmulatedStreams
from tiermem.nvme.cap import bytes_for
from tiermem.space import Space
from tiermem.tier import AT_GPU, AT_HOST, Place

FRAMES, SLOTS, N = 32, 128, 24


def config(where: Path, *, host: int = 0, frames: int = FRAMES, **nvme: object) -> Config:
    """Room for every page on the GPU: nothing must leave."""
    given: dict[str, object] = {"persist": True, **nvme}
    return Config(
        gpu=Gpu(device="cpu", budget=frames * PAGE, page=PAGE),
        host=Host(capacity=host * PAGE),
        nvme=Nvme(path=where, capacity=bytes_for(SLOTS, PAGE), **given),  # type: ignore[arg-type]
    )


@pytest.fixture
def where(tmp_path: Path) -> Path:
    return tmp_path / "slab"


def found_again(where: Path, numbers: range, **given: object) -> list[int]:
    """Which of these contents a new process finds; each has been read and is right."""
    with Space.open(config(where, **given)) as space:  # type: ignore[arg-type]
        region = space.reserve(SLOTS * PAGE)
        pages = region.adopt(keys_of(numbers))
        held = [n for n, page in zip(numbers, pages.tolist(), strict=True) if page >= 0]
        assert right(region, pages[pages >= 0], held)
        space.check()
        return held


def counted(space: Space, what: str) -> int:
    return space.statistics().counts.get(what, 0)


def wait_until_recorded(space: Space, n: int) -> None:
    """Let the mover work until so many pages are on record."""
    while counted(space, "recorded") < n:
        space.check()  # also raises what stopped the mover
        space.pager.wait_some(0.01)


def test_pages_that_nothing_forces_down_are_saved_where_they_are(where: Path) -> None:
    with Space.open(config(where)) as space:
        region = space.reserve(SLOTS * PAGE)
        pages = fill(region, range(1, N + 1))
        wait_until_recorded(space, N)
        assert (region.where(pages) == AT_GPU).all()
        assert counted(space, "backed_up") == N
        assert counted(space, "gpu_nvme") == 0
        assert space.statistics().tier(Place.NVME).kept == N
        written = next(r for r in space.statistics().routes if r.dst == Place.NVME)
        assert written.pages == N
        space.check()
    assert found_again(where, range(1, N + 2)) == list(range(1, N + 1))


def test_pages_in_host_memory_are_saved_there(where: Path) -> None:
    with Space.open(config(where, host=64, frames=8)) as space:
        region = space.reserve(SLOTS * PAGE)
        host_slots(space, 64)
        pages = fill(region, range(1, N + 1))
        wait_until_recorded(space, N)
        assert set(region.where(pages).tolist()) == {AT_GPU, AT_HOST}
        space.check()
    assert found_again(where, range(1, N + 1)) == list(range(1, N + 1))


def test_a_saved_page_leaves_for_nothing(where: Path) -> None:
    with Space.open(config(where)) as space:
        region = space.reserve(SLOTS * PAGE)
        pages = fill(region, range(1, 9))
        wait_until_recorded(space, 8)
        region.hint(pages, "cold")
        assert (region.where(pages) == Place.NVME).all()
        assert counted(space, "stepped_down") == 8
        assert right(region, pages, range(1, 9))


@pytest.mark.parametrize("host", [0, 64])
def test_a_process_closed_in_order_is_warm_again(where: Path, host: int) -> None:
    with Space.open(config(where, host=host, frames=8 if host else FRAMES)) as space:
        fill(space.reserve(SLOTS * PAGE), range(1, N + 1))
    assert found_again(where, range(1, N + 1)) == list(range(1, N + 1))


def test_a_region_that_closes_leaves_its_content_to_the_next(where: Path) -> None:
    with Space.open(config(where)) as space:
        first, other = space.reserve(SLOTS * PAGE), space.reserve(4 * PAGE)
        fill(first, range(1, N + 1))
        busy = fill(other, [900])
        with other.use(busy):  # what others use is not waited for
            first.close()
        second = space.reserve(SLOTS * PAGE)
        pages = second.adopt(keys_of(range(1, N + 1)))
        assert (pages >= 0).all()
        assert right(second, pages, range(1, N + 1))
        space.check()


def test_pages_that_a_stream_still_writes_are_saved_as_it_leaves_them(where: Path) -> None:
    with Space.open(config(where)) as space:
        region = space.reserve(SLOTS * PAGE)
        words = region.view(np.uint64)
        page = int(region.allocate(1)[0])
        streams = space.device.streams
        assert isinstance(streams, EmulatedStreams)
        stream, latch = streams.new(), threading.Event()

        def kernel() -> None:
            latch.wait()
            words[page] = words_of(1)

        with region.use(page, "fresh", stream):
            streams.launch(stream, kernel)
            region.label([page], keys_of([1]))
        assert space.save(timeout_s=0.05) == 1
        assert counted(space, "backed_up") == 0
        latch.set()
        assert space.save() == 0
        assert counted(space, "backed_up") == 1
    assert found_again(where, range(1, 2)) == [1]


def test_closing_takes_no_longer_than_it_may(where: Path, caplog: pytest.LogCaptureFixture) -> None:
    slow: dict[str, Any] = {
        "write_budget": 40,
        "save_s": 0.05,
    }  # the budget pays for one page, then for none
    with Space.open(config(where, **slow)) as space:
        fill(space.reserve(SLOTS * PAGE), range(1, N + 1))
        wait_until_recorded(space, 1)
    assert f"save units_left={N - 1} " in caplog.text
    assert len(found_again(where, range(1, N + 1), **slow)) == 1


def test_without_time_for_it_closing_saves_nothing(
    where: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with Space.open(config(where, save_s=0, write_budget=40)) as space:
        fill(space.reserve(SLOTS * PAGE), range(1, N + 1))
        assert space.save() >= N - 1
    assert "save units_left" not in caplog.text
    assert len(found_again(where, range(1, N + 1))) <= 1


def test_an_interrupt_ends_the_saving_and_not_the_closing(where: Path) -> None:
    class Impatient(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.getMessage().startswith("save units_left"):
                signal.raise_signal(signal.SIGINT)

    log, handler = logging.getLogger("tiermem.keeping"), Impatient()
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        space = Space.open(config(where, write_budget=40, save_s=600))
        fill(space.reserve(SLOTS * PAGE), range(1, N + 1))
        with pytest.raises(KeyboardInterrupt):
            space.close()
    finally:
        log.setLevel(level)
        log.removeHandler(handler)
    space.close()
    assert len(found_again(where, range(1, N + 1))) == 1


WORK = """
import sys
from pathlib import Path
from tests.test_saving import SLOTS, config, counted, wait_until_recorded
from tests.test_adopt import PAGE, fill
from tests.waiting import host_slots
from tiermem.space import Space
where, first, n, host, frames = Path(sys.argv[1]), *map(int, sys.argv[2:])
space = Space.open(config(where, host=host, frames=frames))
region = space.reserve(SLOTS * PAGE)
host_slots(space, host)
pages = fill(region, range(first, first + n))
wait_until_recorded(space, n)
assert not (region.where(pages) == 3).any()
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize(("host", "frames"), [(0, FRAMES), (64, 8)], ids=["gpu", "gpu and host"])
def test_an_engine_that_is_killed_is_warm_again(where: Path, host: int, frames: int) -> None:
    """Every page that was labelled and left alone is there, though none ever had to leave."""
    path = os.pathsep.join([os.getcwd(), *filter(None, [os.environ.get("PYTHONPATH")])])
    for first in (1, 101, 201):
        command = [sys.executable, "-c", WORK, str(where), *map(str, (first, N, host, frames))]
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": path},
        ) as child:  # fmt: skip
            assert child.stdout is not None
            assert child.stdout.readline() == b"ready\n"
            child.send_signal(signal.SIGKILL)
        numbers = range(first, first + N)
        assert found_again(where, numbers) == list(numbers)


BUSY_WORK = """
import sys, threading
from pathlib import Path
from tests.test_saving import busy_engine
busy_engine(Path(sys.argv[1]), int(sys.argv[2]))
"""
THREADS, EACH = 3, 20
SPAN = 1_000_000
"""Contents of one thread in one round have numbers within so many."""


def busy_engine(where: Path, first: int) -> None:
    """Threads whose kernels write labelled pages, over and over, until the process is killed."""
    space = Space.open(config(where, host=16, frames=16))
    region = space.reserve(THREADS * EACH * PAGE)
    words = region.view(np.uint64)
    streams = space.device.streams
    assert isinstance(streams, EmulatedStreams)

    def write(page: int, number: int) -> None:
        for other in range(100):  # other bytes first, so that a copy in between shows
            words[page] = other
        words[page] = words_of(number)

    def work(thread: int) -> None:
        stream, number = streams.new(), first + thread * SPAN
        rng = np.random.default_rng(number)
        pages = np.concatenate([region.allocate(1) for _ in range(EACH)])
        while True:
            page = int(pages[(number // 8 + rng.integers(4)) % EACH])  # others rest meanwhile
            number += 1
            try:
                with region.use(page, "write", stream):
                    streams.launch(stream, lambda p=page, n=number: write(p, n))  # type: ignore[misc]
                    region.label([page], keys_of([number]))
                    for _ in range(20):  # the others' turn, while this page is labelled and in use
                        space.statistics()
            except TierFull:
                continue

    threads = [
        threading.Thread(target=work, args=(thread,), daemon=True) for thread in range(THREADS)
    ]
    for thread in threads:
        thread.start()
    while all(thread.is_alive() for thread in threads):
        print(counted(space, "recorded"), flush=True)
        space.check()


def test_whatever_is_found_after_a_kill_is_what_its_kernel_wrote(where: Path) -> None:
    """Pages are saved while threads pin, rewrite and relabel them and kernels are queued."""
    path = os.pathsep.join([os.getcwd(), *filter(None, [os.environ.get("PYTHONPATH")])])
    found = 0
    for round_ in range(2):
        first = 1 + round_ * THREADS * SPAN
        command = [sys.executable, "-c", BUSY_WORK, str(where), str(first)]
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": path}
        ) as child:
            assert child.stdout is not None
            while int(child.stdout.readline()) < 150:
                pass
            child.send_signal(signal.SIGKILL)
        with Space.open(config(where, host=16, frames=16)) as space:
            region = space.reserve(SLOTS * PAGE)
            numbers = [first + t * SPAN + i for t in range(THREADS) for i in range(1, 20_000)]
            pages = region.adopt(keys_of(numbers))
            for number, page in zip(numbers, pages.tolist(), strict=True):
                if page >= 0:
                    assert right(region, np.array([page]), [number])
                    found += 1
            space.check()
    assert found > 30
