"""Ctrl-C while work is handed to the device: nothing is handed over twice, nothing is forgotten."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator

import numpy as np
import pytest

from tests.waiting import host_slots
from tiermem.config import Config, Gpu, Host
from tiermem.interrupts import Uninterrupted
from tiermem.space import Space
from tiermem.tier import Addresses, Done, Fence, Place, Route, Slots, Window

PAGE = 65536


class Interrupting:
    """A window and a route that are interrupted just after they have taken work from the main
    thread, in which Python runs handlers; the mover may come first."""

    def __init__(self, window: Window, route: Route) -> None:
        self._window, self._route = window, route
        self.src, self.dst = route.src, route.dst
        self.at: str | None = None
        self.shows = self.copies = 0

    def _made(self, what: str) -> None:
        if self.at == what and threading.current_thread() is threading.main_thread():
            self.at = None
            signal.raise_signal(signal.SIGINT)

    def show(self, addresses: Addresses, frames: Slots) -> Done:
        self.shows += 1
        done = self._window.show(addresses, frames)
        self._made("show")
        return done

    def hide(self, addresses: Addresses) -> Done:
        done = self._window.hide(addresses)
        self._made("hide")
        return done

    def submit(self, src: Slots, dst: Slots, after: Fence) -> Done:
        self.copies += 1
        done = self._route.submit(src, dst, after)
        self._made("copy")
        return done

    def close(self) -> None:
        self._route.close()


@pytest.fixture
def parts() -> Iterator[tuple[Space, Interrupting]]:
    from tiermem.assemble import assemble

    gpu = Gpu(device="cpu", budget=4 * PAGE, page=PAGE, high=1.0, low=1.0, hide="eager")
    config = Config(gpu=gpu, host=Host(capacity=16 * PAGE, high=1.0, low=1.0))
    made = assemble(config)
    up = Place.HOST, Place.GPU
    between = Interrupting(made.device.window, made.routes[up])
    made.routes[up] = between
    made.device.window = between  # type: ignore[misc]  # a protocol's property
    with Space(config, made) as space:
        host_slots(space, 16)
        yield space, between


@pytest.mark.parametrize("at", ["copy", "show", "hide"])
def test_an_interrupt_during_a_hand_over_comes_after_it(
    parts: tuple[Space, Interrupting], at: str
) -> None:
    space, between = parts
    region = space.reserve(8 * PAGE)
    pages, view = region.allocate(3), region.view()
    with region.use(pages, "write"):
        view[pages] = np.arange(1, 4)[:, None]
    for _ in range(100):
        try:
            if at == "hide":
                between.at = at
            region.hint(pages, "cold")
            space.drain()
            between.at, between.shows, between.copies = at, 0, 0
            with region.use(pages, "read"):
                between.at = None
        except KeyboardInterrupt:
            break
        with region.use(pages, "write"):
            pass
    else:
        raise AssertionError("the main thread never came first")
    space.drain()
    space.check()
    with region.use(pages, "read"):
        assert view[pages].max(axis=1).tolist() == [1, 2, 3]
    if at != "hide":
        assert (between.shows, between.copies) == (1, 1), "handed over twice"
    space.drain()
    space.check()
    region.close()


def test_the_handler_runs_once_on_leaving_and_is_put_back() -> None:
    before = signal.getsignal(signal.SIGINT)
    reached: list[bool] = []

    def run() -> None:
        with Uninterrupted():
            signal.raise_signal(signal.SIGINT)
            reached.append(True)

    with pytest.raises(KeyboardInterrupt):
        run()
    assert reached
    assert signal.getsignal(signal.SIGINT) is before


def test_elsewhere_than_in_the_main_thread_nothing_changes() -> None:
    before = signal.getsignal(signal.SIGINT)
    seen: list[object] = []

    def run() -> None:
        with Uninterrupted():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [before]


def test_an_ignored_signal_stays_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Uninterrupted():
            signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
