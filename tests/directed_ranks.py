"""A director over real ranks on the CPU device, beside a model that knows what every unit holds."""

from __future__ import annotations

import pickle
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from random import Random
from typing import Literal

import numpy as np
import numpy.typing as npt

from tests.waiting import LONG_S, until
from tiermem import Config, Gpu, Host, Nvme, Share
from tiermem.assemble import assemble
from tiermem.config import Prefetch
from tiermem.directed.director import NO_UNITS, Director, Units
from tiermem.directed.orders import Orders
from tiermem.directed.rank import Rank
from tiermem.gpu.emulated import EmulatedDevice
from tiermem.gpu.tensor import view
from tiermem.integrations.layout import Layout
from tiermem.leases import Leases
from tiermem.native import Ticket
from tiermem.nvme.kept import Persist
from tiermem.nvme.superblock import HEADER_BYTES
from tiermem.peers import Peers
from tiermem.table import Rows

PAGE = 4096


def ids(*units: int) -> Units:
    return np.array(units, np.int32)


def spoil(folder: Path, share: float, random: Random) -> None:
    """A share of the pages of all slabs under a folder hold other bytes than were written."""
    for slab in folder.glob("*.slab"):
        with slab.open("r+b") as file:
            for at in range(HEADER_BYTES, slab.stat().st_size, PAGE):
                file.seek(at)
                if any(file.read(PAGE)) and random.random() < share:
                    file.seek(at + 8)
                    file.write(b"spoiled!")


class Ranks:
    """Steps of an engine whose work is to write a number into fresh units and to read others."""

    def __init__(
        self,
        *,
        ranks: int = 2,
        units: int = 24,
        pieces: int = 1,
        budget: int = 6,
        host: int = 8,
        nvme: int = 0,
        path: Path | None = None,
        persist: bool = False,
        seed: int = 0,
        headroom: int = 0,
        queued: bool = False,
        page: int = PAGE,
        share: Share | None = None,
        prefetch: Prefetch | None = None,
        scope: bytes | None = None,
        directed: bool = True,
        admit: Literal["all", "second", "reuse"] = "all",
    ) -> None:
        """Sizes in units of `pieces` pages each, which lie in as many places of the range.

        queued: work runs on a stream of its rank, some time after its step. share: the one rank's
        memory is held under a lease. scope: content is shared with others of the same, out of the
        host pool that they share. directed: False if whoever calls will set `director`. admit: what
        may be written to the drive.
        """
        self.wake: Callable[[], None] = lambda: None
        self.random = Random(seed)
        self.page = page
        self.layout = Layout(units, page, tuple(i * units * page for i in range(pieces)), page)
        unit = self.layout.unit_bytes
        drive = Nvme()
        if path is not None:
            size = nvme * unit + (8 << 20)
            drive = Nvme(path=path, capacity=size, persist=persist, high=1.0, low=1.0, admit=admit)
        self.config = Config(
            gpu=Gpu(device="cpu", budget=budget * unit, page=page, high=1.0, low=1.0),
            host=Host(capacity=host * unit, high=1.0, low=1.0),
            nvme=drive,
            share=share or Share(),
            prefetch=prefetch or Prefetch(),
        )
        leases = Leases.open(self.config)
        self.bases: list[int] = []
        self.ranks: list[Rank] = []
        self.devices: list[EmulatedDevice] = []
        self.streams: list[int | None] = []
        self.gates: list[threading.Event] = []
        self.tickets: list[Ticket] = []
        self.views: list[npt.NDArray[np.generic]] = []
        for number in range(ranks):
            slab = Persist(f"r{number}", {"model": "test"})
            parts = assemble(self.config, leases.first_gpu, slab, leases.pooling)
            assert isinstance(parts.device, EmulatedDevice)
            base = parts.device.reserve(self.layout.nbytes)
            self.bases.append(base)
            addresses = partial(self.layout.addresses, base)
            peers = None
            if scope is not None and leases.pooling is not None:
                peers = Peers.open(parts, leases.pooling, scope)
            rank = Rank(
                number,
                parts,
                addresses,
                persist=persist,
                leases=leases,
                peers=peers,
                kernels_only=queued,
            )
            self.ranks.append(rank)
            self.devices.append(parts.device)
            self.streams.append(parts.device.new_stream() if queued else None)
            shape = (self.layout.nbytes // 8,)
            self.views.append(view(base, self.layout.nbytes, np.uint64, shape))
        if share is None:  # growth has tests of its own; under load it takes a while
            until(lambda: not any(rank._growing() for rank in self.ranks))
        self.gone: list[tuple[int, str]] = []
        self.model: dict[int, int] = {}
        self.next_value = 1
        self.hellos = [rank.start(units * self.layout.unit_pages) for rank in self.ranks]
        if not directed:
            return
        self.director = Director(
            self.hellos,
            units,
            self.layout.unit_pages,
            self.config,
            headroom=headroom,
            on_gone=self._on_gone,
            leases=leases,
            peers=self.ranks[0].peers,
            wake=lambda: self.wake(),
        )

    def _on_gone(self, units: Units, reason: str) -> None:
        for unit in units.tolist():
            self.gone.append((unit, reason))
            self.model.pop(unit, None)

    # ------------------------------------------------------------ steps

    def step(self, write: Units = NO_UNITS, read: Units = NO_UNITS) -> Orders:
        """Orders, then work on every rank: what was entered is written, or read and compared."""
        orders = self.director.orders()
        writes = {unit: self.model[unit] for unit in write.tolist()}
        reads = {unit: self.model[unit] for unit in read.tolist()}
        self.carry_out(orders, writes, reads)
        return orders

    def carry_out(self, orders: Orders, writes: dict[int, int], reads: dict[int, int]) -> None:
        """Orders, then work on every rank: units are read and compared, then units are written."""
        for i, rank in enumerate(self.ranks):
            rank.carry(pickle.loads(pickle.dumps(orders)), self.streams[i])
            work = partial(self._work, self.views[i], writes, reads)
            if self.streams[i] is None:
                work()
            else:
                self._queue(i, work, [*writes, *reads])
            rank.mark(orders.step, self.streams[i])

    def _work(
        self, words: npt.NDArray[np.generic], writes: dict[int, int], reads: dict[int, int]
    ) -> None:
        for unit, value in reads.items():
            found = words[self._words(unit)]
            assert (found == value).all(), f"unit {unit} reads {found[:2]}, not {value}"
        for unit, value in writes.items():
            words[self._words(unit)] = value

    def _queue(self, i: int, work: Callable[[], None], units: list[int]) -> None:
        """Work of a step on a rank's stream; it begins once its gate is open."""
        gate = threading.Event()
        self.gates.append(gate)
        stream = self.streams[i]
        assert stream is not None

        def kernel() -> None:
            gate.wait()
            work()

        rows = [np.empty(0, np.int32), *[self._rows(unit) for unit in units]]
        addresses = self.layout.addresses(self.bases[i], np.concatenate(rows))
        self.tickets.append(self.devices[i].launch(stream, kernel, addresses))

    def run(self, share: float = 1.0) -> None:
        """Let queued work go on, the oldest first; at a share of 1 all of it ends."""
        n = len(self.gates) if share == 1.0 else self.random.randint(0, len(self.gates))
        for gate in self.gates[:n]:
            gate.set()
        del self.gates[:n]
        if not self.gates:
            for ticket in self.tickets:
                ticket.wait()
                assert ticket.error is None, ticket.error
            self.tickets.clear()

    def hear(self, ranks: list[Rank] | None = None) -> None:
        """Reports of these ranks (default: all) reach the director."""
        for rank in self.ranks if ranks is None else ranks:
            self.director.settle(pickle.loads(pickle.dumps(rank.report())))

    def write(self, *units: int) -> None:
        """Enter units with new content, and write it in the same step."""
        self.assign(*units)
        self.director.enter(ids(*units), "fresh")
        self.step(write=ids(*units))
        self.hear()

    def assign(self, *units: int) -> None:
        """What these units will hold once they are written: a number each, never used before."""
        for unit in units:
            self.model[unit] = self.next_value
            self.next_value += 1

    def read(self, *units: int) -> None:
        """Enter cached units that need no fetching, and read them in the same step."""
        self.director.enter(ids(*units))
        self.step(read=ids(*units))
        self.hear()

    def leave(self, *units: int, worthless: Units = NO_UNITS) -> None:
        self.director.leave(ids(*units), worthless=worthless)

    def settle(self) -> None:
        """Empty steps until nothing is under way."""
        deadline = time.monotonic() + LONG_S
        while time.monotonic() < deadline:
            self.step()
            self.run()
            for rank in self.ranks:
                rank.wait(0.05)
            self.hear()
            self.director.check()
            if self.director.is_idle() and not self.director.unsaved():
                return
        raise AssertionError("does not come to rest")

    def ensure(self, units: int) -> None:
        """Until so many units could get frames at once."""
        deadline = time.monotonic() + LONG_S  # a host tier may have no memory yet
        while time.monotonic() < deadline:
            if self.director.room() >= units:
                return
            self.director.make_room(units)
            self.settle()
        raise AssertionError(f"no room for {units}: {self.director.statistics()}")

    def bring(self, *units: int) -> None:
        """Fetch units, making room as long as it takes; they are in use then. Some may be gone."""
        deadline = time.monotonic() + LONG_S
        while time.monotonic() < deadline:
            wanted = ids(*[unit for unit in units if unit in self.model])
            self.director.make_room(len(wanted))
            if not len(wanted) or self.director.fetch(wanted):
                break
            self._pause()
        while (look := self.director.look(wanted)).coming.any():
            self._pause()
        assert look.here.all(), f"{units} do not come up: {self.director.statistics()}"

    def _pause(self) -> None:
        self.step()
        self.run()
        for rank in self.ranks:
            rank.wait(0.05)
        self.hear()

    def _words(self, unit: int) -> slice | npt.NDArray[np.int64]:
        first = self.layout.addresses(0, self._rows(unit)).astype(np.int64) // 8
        every: npt.NDArray[np.int64] = (first[:, None] + np.arange(self.page // 8)).ravel()
        return every

    def _rows(self, unit: int) -> Rows:
        pages = self.layout.unit_pages
        return np.arange(unit * pages, (unit + 1) * pages, dtype=np.int32)

    def close(self) -> None:
        self.run()
        for rank in self.ranks:
            rank.close()
