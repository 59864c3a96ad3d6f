"""Whole spaces under latch kernels: nothing is hidden, overwritten or reused before its fence.

A latch is a kernel that spins until it is released, so "still queued" lasts as long as the test
wants. Every test asks for something that must wait for the queued work, sees that it does not
happen, releases, and sees that the queued work had the right bytes.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
import pytest

from tests.gpu.device_contract import LONG_S, Engine
from tiermem.config import Config, Gpu, Host
from tiermem.region import ReadInPlace
from tiermem.slices import Arriving
from tiermem.space import Space
from tiermem.tier import Place

FRAMES = 4
WATCH_S = 0.2  # how long a test looks for what must not happen
BYTES = 256


class Held:
    """A space whose engine has a stream that a latch holds."""

    def __init__(self, space: Space, engine: Engine, in_place: ReadInPlace) -> None:
        self.space = space
        self.engine = engine
        self.region = space.reserve(16 * space.page_bytes, in_place=in_place)
        self.stream = engine.stream()
        self.release: Callable[[], None] = lambda: None

    def hold(self) -> None:
        self.release = self.engine.hold(self.stream)

    def address(self, page: int) -> int:
        return self.region.address + page * self.space.page_bytes

    def written(self, value: int) -> int:
        """A new page, filled with a value by the caller and not in use."""
        page = int(self.region.allocate(1)[0])
        with self.region.use(page, "fresh"):
            self.engine.fill(None, self.address(page), value, self.space.page_bytes)
        return page

    def queue_read(self, page: int) -> Callable[[], bytes]:
        """A read queued on the stream, in a use that has ended when this returns."""
        with self.region.use([page], "read", self.stream):
            return self.engine.see(self.stream, self.address(page), BYTES)

    def value(self, page: int) -> bytes:
        with self.region.use([page]):
            return self.engine.see(None, self.address(page), BYTES)()

    def place(self, page: int) -> int:
        return int(self.region.where([page])[0])


def started(work: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def stays_alive(thread: threading.Thread) -> bool:
    thread.join(WATCH_S)
    return thread.is_alive()


def ends(thread: threading.Thread) -> bool:
    thread.join(LONG_S)
    return not thread.is_alive()


class PagerContract:
    """Subclass and implement `engine_of` and `config`."""

    device: str
    page: int
    hide: Literal["lazy", "eager"] = "lazy"

    def engine_of(self, space: Space) -> Engine:
        raise NotImplementedError

    @contextmanager
    def held(self, frames: int = FRAMES, read_in_place: bool = False) -> Iterator[Held]:
        config = Config(
            gpu=Gpu(
                device=self.device, budget=frames * self.page, page=self.page, high=1.0, low=1.0,
                hide=self.hide,
            ),
            host=Host(
                capacity=32 * self.page, high=1.0, low=1.0, read_in_place=read_in_place
            ),
        )  # fmt: skip
        space = Space.open(config)
        self.await_capacity(space, 32, Place.HOST)
        engine = self.engine_of(space)
        held = Held(space, engine, "always" if read_in_place else "pays")
        try:
            yield held
        finally:
            held.release()
            space.close()
            engine.close()

    def test_a_page_is_not_evicted_before_a_queued_write(self) -> None:
        with self.held() as h:
            page = h.written(1)
            h.hold()
            with h.region.use([page], "write", h.stream):
                h.engine.fill(h.stream, h.address(page), 2, h.space.page_bytes)
            h.region.hint([page], "cold")
            assert not h.space.drain(WATCH_S)
            assert h.place(page) == Place.GPU
            h.release()
            assert h.space.drain(LONG_S)
            assert h.place(page) == Place.HOST
            assert h.value(page) == bytes([2]) * BYTES
            h.space.check()

    def test_a_page_used_again_while_it_leaves_stays(self) -> None:
        """The request came before the latch."""
        with self.held() as h:
            page = h.written(1)
            h.region.hint([page], "cold")
            h.hold()
            read = h.queue_read(page)
            others = [h.written(10 + i) for i in range(FRAMES - 1)]
            taker = started(lambda: h.written(99))
            for other in others[1:]:
                assert h.value(other)[0] >= 10
            h.release()
            assert ends(taker)
            assert read() == bytes([1]) * BYTES
            h.space.drain(LONG_S)
            h.space.check()

    def test_a_frame_is_not_stolen_under_a_queued_read(self) -> None:
        """Clean pages with spares leave without a copy: only the fence keeps their frames."""
        with self.held() as h:
            pages = [h.written(i + 1) for i in range(FRAMES)]
            for page in pages:
                h.region.hint([page], "cold")
            h.space.drain(LONG_S)
            h.hold()
            reads = [h.queue_read(page) for page in pages]
            for page in pages:
                h.region.hint([page], "cold")  # steps down at once, frames retired
            taker = started(lambda: h.written(77))
            assert stays_alive(taker)
            h.release()
            assert ends(taker)
            assert [read()[0] for read in reads] == [1, 2, 3, 4]
            assert [h.value(page)[0] for page in pages] == [1, 2, 3, 4]
            h.space.check()

    def test_a_freed_page_is_not_given_away_under_a_queued_read(self) -> None:
        with self.held(frames=1) as h:
            page = h.written(5)
            h.hold()
            read = h.queue_read(page)
            h.region.free([page])
            taker = started(lambda: h.written(6))
            assert stays_alive(taker)
            h.release()
            assert ends(taker)
            assert read() == bytes([5]) * BYTES
            h.space.check()

    def test_a_region_is_not_closed_under_a_queued_write(self) -> None:
        with self.held() as h:
            page = h.written(1)
            h.hold()
            with h.region.use([page], "write", h.stream):
                h.engine.fill(h.stream, h.address(page), 3, h.space.page_bytes)
                read = h.engine.read(h.stream, h.address(page), BYTES)
            closer = started(h.region.close)
            assert stays_alive(closer)
            h.release()
            assert ends(closer)
            assert read() == bytes([3]) * BYTES

    def test_a_smaller_limit_waits_for_queued_reads(self) -> None:
        with self.held() as h:
            pages = [h.written(i + 1) for i in range(FRAMES)]
            h.hold()
            reads = [h.queue_read(page) for page in pages]
            h.space.limit(self.page)
            shrunk = started(lambda: self.await_capacity(h.space, 1))
            assert stays_alive(shrunk)
            h.release()
            assert ends(shrunk)
            assert [read()[0] for read in reads] == [1, 2, 3, 4]
            assert [h.value(page)[0] for page in pages] == [1, 2, 3, 4]
            h.space.limit(FRAMES * self.page)
            self.await_capacity(h.space, FRAMES)
            assert [h.value(page)[0] for page in pages] == [1, 2, 3, 4]
            h.space.drain(LONG_S)
            h.space.check()

    def test_a_stream_reads_a_page_that_comes_while_it_is_held(self) -> None:
        """A load is ordered before the stream's later work, also behind a running kernel."""
        with self.held() as h:
            page = h.written(9)
            h.region.hint([page], "cold")
            h.space.drain(LONG_S)
            for i in range(FRAMES):
                h.written(20 + i)  # the frame is another's by now
            h.hold()
            read = h.queue_read(page)
            h.release()
            assert read() == bytes([9]) * BYTES
            h.space.drain(LONG_S)
            h.space.check()

    def test_kernels_are_queued_before_their_pages_have_come(self) -> None:
        """Whoever promises kernels waits for nothing; the stream waits for loads and mappings."""
        with self.held(frames=8) as h:
            pages = [h.written(i + 1) for i in range(16)]
            for turn in range(18):
                first = 5 * (turn % 3)
                group = pages[first : first + 6]
                with h.region.use(group, "read", h.stream, kernels_only=True):
                    reads = [h.engine.see(h.stream, h.address(page), BYTES) for page in group]
                found = [read() for read in reads]
                assert found == [bytes([first + i + 1]) * BYTES for i in range(6)]
            h.space.drain(LONG_S)
            h.space.check()

    def test_kernels_read_the_front_of_pages_of_which_the_rest_is_still_coming(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Hinted or not: what the stream was let wait for is there, and no more is waited for."""
        with self.held(frames=8) as h:
            quarter = self.page // 4
            for module in ("copy", "emulated_streams"):
                monkeypatch.setattr(f"tiermem.gpu.{module}._SLICE", quarter)
                monkeypatch.setattr(f"tiermem.gpu.{module}._SLICED", 0)
            pages = [h.written(i + 1) for i in range(16)]
            route, sliced = h.space.pager.executor._routes[Place.HOST, Place.GPU], list[int]()
            submit = route.submit_slices  # type: ignore[attr-defined]

            def counted(*args: Any) -> Any:
                sliced.append(1)
                return submit(*args)

            monkeypatch.setattr(route, "submit_slices", counted)
            for turn in range(18):
                first = 5 * (turn % 3)
                group = pages[first : first + 6]
                if turn % 2:
                    h.region.hint(group, "soon")
                arriving = Arriving()
                h.region.pin(group, "read", h.stream, kernels_only=True, arriving=arriving)
                reads = []
                for part in range(4):
                    arriving.order(h.stream, (part + 1) * quarter)
                    ends = group[part % 3], group[5 - part % 3]  # 8 reads at once at most
                    at = [h.address(page) + (part + 1) * quarter - BYTES for page in ends]
                    reads.append([h.engine.see(h.stream, address, BYTES) for address in at])
                assert not len(arriving)
                h.region.unpin(group, h.stream)
                for part, read in enumerate(reads):
                    found = [see() for see in read]
                    i = part % 3
                    assert found == [bytes([first + n + 1]) * BYTES for n in (i, 5 - i)]
            assert sliced, "loads come slice by slice"
            h.space.drain(LONG_S)
            h.space.check()

    def test_random_work_on_two_streams_finds_its_own_bytes(self) -> None:
        rng = np.random.default_rng(7)
        with self.held() as h:
            streams = [h.stream, h.engine.stream()]
            pages = [h.written(i + 1) for i in range(12)]
            values = {page: i + 1 for i, page in enumerate(pages)}
            reads = []
            for step in range(150):
                page = int(rng.choice(pages))
                stream = streams[page % 2]  # one page's work goes to one stream
                if rng.random() < 0.4:
                    values[page] = step % 250 + 1
                    with h.region.use([page], "write", stream):
                        h.engine.fill(stream, h.address(page), values[page], h.space.page_bytes)
                else:
                    with h.region.use([page], "read", stream):
                        read = h.engine.read(stream, h.address(page), BYTES)
                        reads.append((values[page], read()))
                if rng.random() < 0.3:
                    h.region.hint([int(rng.choice(pages))], rng.choice(["cold", "soon"]))
            assert [value for value, _ in reads] == [seen[0] for _, seen in reads]
            h.space.drain(LONG_S)
            h.space.check()

    def test_a_page_read_in_place_is_neither_loaded_nor_freed_under_a_queued_read(self) -> None:
        with self.held(read_in_place=True) as h:
            pages = [h.written(value) for value in (1, 2)]
            h.region.hint(pages, "cold")
            assert h.space.drain(LONG_S)
            for i in range(FRAMES):
                h.written(20 + i)  # their frames are others' by now
            h.hold()
            reads = [h.queue_read(page) for page in pages]
            assert [h.place(page) for page in pages] == [Place.HOST] * 2
            h.region.free(pages[1:])
            writer = started(lambda: self.write(h, pages[0], 9))
            assert stays_alive(writer)
            h.release()
            assert [read() for read in reads] == [bytes([v]) * BYTES for v in (1, 2)]
            assert ends(writer)
            assert h.place(pages[0]) == Place.GPU
            assert h.value(pages[0]) == bytes([9]) * BYTES
            assert h.space.drain(LONG_S)
            assert h.space.statistics().counts["read_in_place"] == 2
            h.space.check()

    def test_a_region_read_in_place_is_not_closed_under_a_queued_read(self) -> None:
        with self.held(read_in_place=True) as h:
            page = h.written(5)
            h.region.hint([page], "cold")
            assert h.space.drain(LONG_S)
            for i in range(FRAMES):
                h.written(20 + i)
            h.hold()
            read = h.queue_read(page)
            assert h.place(page) == Place.HOST
            closer = started(h.region.close)
            assert stays_alive(closer)
            h.release()
            assert ends(closer)
            assert read() == bytes([5]) * BYTES

    def write(self, h: Held, page: int, value: int) -> None:
        with h.region.use([page], "write"):
            h.engine.fill(None, h.address(page), value, h.space.page_bytes)

    def await_capacity(self, space: Space, slots: int, place: Place = Place.GPU) -> None:
        stop = threading.Event()
        while space.statistics().tier(place).capacity != slots:
            stop.wait(0.001)
