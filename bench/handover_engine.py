"""The processes of `handover.py`: an engine with a space of its own, a plain job, and the floor.

    python bench/handover_engine.py engine|job|floor '{"device": "cpu", ...}'

Each reads one JSON object a line from standard input, {"do": verb, ...}, and answers with one;
times are seconds of CLOCK_MONOTONIC, which all processes of a machine share.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np

from tiermem import Config, Gpu, Host, Region, Share, Space
from tiermem.tier import PASSED, Device, Done, Place

GROUP = 64  # pages of one driver call, in the floor
AT_ONCE = 16  # pages in use at a time
FLOOR_BYTES = 2 << 30
FLOOR_BYTES_CPU = 32 << 20
Answer = dict[str, Any]


class Engine:
    """A space that fills, takes, pins and verifies pages when it is told to."""

    def __init__(self, given: Answer) -> None:
        page, total = given["page"], given["total"]
        self.cuda = given["device"] != "cpu"
        self.pooled = given["pool"] is not None
        config = Config(
            gpu=Gpu(device=given["device"], budget=total, page=page),
            host=Host(capacity=given["host"]),
            share=Share(
                group="handover", name=given["name"], total=total, idle_s=3600.0, host=given["pool"]
            ),
        )
        began = time.monotonic()
        self.space = Space.open(config)
        self.region: Region = self.space.reserve(total + given["host"])
        self.pages: list[int] = []
        self.words: Any
        if self.cuda:
            import torch

            self.words = self.region.tensor(torch.int64, (self.region.pages, page // 8))
        else:
            self.words = self.region.view(np.int64)
        self.opened_s = time.monotonic() - began

    def state(self) -> Answer:
        seen = self.space.statistics()
        return {
            "at_s": time.monotonic(),
            "opened_s": self.opened_s,
            "gpu": seen.tier(Place.GPU).capacity,
            "used": seen.tier(Place.GPU).used,
            "host_ready": seen.tier(Place.HOST).capacity,
            "pages": len(self.pages),
            "counts": dict(seen.counts),
        }

    def fill(self, n: int) -> Answer:
        """Allocate n pages more, each written full of its own number."""
        for first in range(0, n, AT_ONCE):
            pages = self.region.allocate(min(AT_ONCE, n - first)).tolist()
            with self.region.use(pages, "fresh", stream=self._stream()):
                self._write(pages)
            self.pages += pages
        self._synchronise()
        return self.state()

    def take(self, n: int, group: int) -> Answer:
        """Allocate one page, then n - 1 more in groups, as fast as they can be had."""
        times = [time.monotonic()]
        pages = self.region.allocate(1).tolist()
        times.append(time.monotonic())
        while len(pages) < n:
            pages += self.region.allocate(min(group, n - len(pages))).tolist()
            times.append(time.monotonic())
        self.pages += pages
        return {"times": times, **self.state()}

    def write(self) -> Answer:
        """Use all pages for writing, AT_ONCE at a time."""
        for first in range(0, len(self.pages), AT_ONCE):
            pages = self.pages[first : first + AT_ONCE]
            with self.region.use(pages, "fresh", stream=self._stream()):
                self._write(pages)
        self._synchronise()
        return self.state()

    def free(self, n: int) -> Answer:
        """Free the last n pages."""
        self.pages, gone = self.pages[:-n], self.pages[-n:]
        self.region.free(gone)
        return self.state()

    def verify(self, n: int) -> Answer:
        """Read up to n pages, spread over all; how many are not as they were written."""
        some = self.pages[:: max(1, len(self.pages) // n)]
        wrong = 0
        for first in range(0, len(some), AT_ONCE):
            pages = some[first : first + AT_ONCE]
            with self.region.use(pages, stream=self._stream()):
                wrong += sum(int((self.words[p] != p + 1).any()) for p in pages)
                self._synchronise()
        return {"verified": len(some), "wrong": wrong, **self.state()}

    def pin(self, n: int) -> Answer:
        """Use n pages, all at once, until the next line, which ends that."""
        with self.region.use(self.pages[:n]):
            reply({"pinned": n, **self.state()})
            sys.stdin.readline()  # "unpin"
        return self.state()

    def drain(self) -> Answer:
        """Until no page moves and the host pool is as large as it will be."""
        while not self.pooled and self._host_slots() < self._host_most():
            time.sleep(0.05)
        self.space.drain(60.0)
        return self.state()

    def end(self) -> Answer:
        self.space.drain(60.0)
        self.space.check()
        self.region.close()
        self.space.close()
        return {"ended": True}

    def _host_slots(self) -> int:
        return self.space.statistics().tier(Place.HOST).capacity

    def _host_most(self) -> int:
        return self.space.statistics().tier(Place.HOST).configured

    def _stream(self) -> int | None:
        if not self.cuda:
            return None
        import torch

        return int(torch.cuda.current_stream().cuda_stream)

    def _synchronise(self) -> None:
        if self.cuda:
            import torch

            torch.cuda.synchronize()

    def _write(self, pages: list[int]) -> None:
        for page in pages:
            self.words[page] = page + 1


class Job:
    """A process that knows nothing of tiermem: torch on a GPU, plain memory on the CPU device."""

    def __init__(self, given: Answer) -> None:
        self.cuda = given["device"] != "cpu"
        self.tensors: list[Any] = []
        if self.cuda:
            import torch

            torch.zeros(1, device=given["device"])

    def grow(self, nbytes: int) -> Answer:
        began = time.monotonic()
        if self.cuda:
            import torch

            self.tensors.append(torch.ones(nbytes // 4, device="cuda"))
            torch.cuda.synchronize()
        else:
            self.tensors.append(np.ones(nbytes // 4, np.float32))
        return {"took_s": time.monotonic() - began, "holds": self._holds()}

    def shrink(self) -> Answer:
        """Give the last tensor back to the device."""
        self.tensors.pop()
        if self.cuda:
            import torch

            torch.cuda.empty_cache()
        return {"holds": self._holds()}

    def check(self) -> Answer:
        """Whether what it wrote is still there: the sum of every tensor is its length."""
        return {"right": all(int(t.sum()) == len(t) for t in self.tensors)}

    def end(self) -> Answer:
        return {"ended": True}

    def _holds(self) -> int:
        return sum(len(tensor) * 4 for tensor in self.tensors)


class Floor:
    """What driver and link take for a page that changes hands, with nothing of ours around it."""

    def __init__(self, given: Answer) -> None:
        self.page = given["page"]
        self.device_name = given["device"]
        self._down: list[Done] = []

    def calls(self, rounds: int = 7) -> Answer:
        """Microseconds a page of each driver call, groups of 64; medians of the rounds."""
        if self.device_name == "cpu":
            return _calls_emulated(self.page, rounds)
        return _calls_cuda(self.page, rounds)

    def copy(self, rounds: int) -> Answer:
        """GB/s to host memory: pages of this size in groups of 64, all submitted at once."""
        device, host = _open_device(self.device_name, self.page)
        down, _ = device.routes(host)
        n = host.capacity
        frames = np.arange(n, dtype=np.int32)
        rates = []
        for _ in range(rounds + 1):
            began = time.perf_counter()
            dones = [
                down.submit(frames[i : i + GROUP], frames[i : i + GROUP], PASSED)
                for i in range(0, n, GROUP)
            ]
            for done in dones:
                _end(done)
            rates.append(n * self.page / (time.perf_counter() - began) / 1e9)
        down.close()
        host.close()
        device.close()
        return {"gbps": max(rates[1:]), "rates": rates}

    def end(self) -> Answer:
        return {"ended": True}


def _open_device(name: str, page: int) -> tuple[Device, Any]:
    from tiermem.host.pinned import HostPool, Register

    n = (FLOOR_BYTES if name != "cpu" else FLOOR_BYTES_CPU) // page
    if name == "cpu":
        from tiermem.gpu.emulated import EmulatedDevice

        device: Device = EmulatedDevice(page, n)
        host = HostPool(page, n)
    else:
        from tiermem.gpu.vmm import CudaDevice

        cuda = CudaDevice(0, page, n)
        assert cuda.frames.wait_ready(60)
        device = cuda
        host = HostPool(page, n, register=Register(cuda.register, cuda.unregister), threads=4)
    assert host.wait_ready(n, 120)
    return device, host


def _calls_emulated(page: int, rounds: int) -> Answer:
    """The CPU device's calls, which do what the driver's do."""
    from tiermem.gpu.emulated import EmulatedDevice

    device = EmulatedDevice(page, GROUP)
    start = device.reserve(GROUP * page)
    at = np.arange(GROUP, dtype=np.uint64) * np.uint64(page) + np.uint64(start)
    frames = np.arange(GROUP, dtype=np.int32)
    times: dict[str, list[float]] = {}

    def timed(name: str, work: Callable[[], Done | None]) -> None:
        began = time.perf_counter()
        done = work()
        if done is not None:
            _end(done)
        times.setdefault(name, []).append((time.perf_counter() - began) / GROUP * 1e6)

    for _ in range(rounds):
        timed("show", lambda: device.window.show(at, frames))
        timed("hide", lambda: device.window.hide(at))
        timed("give", lambda: device.park(frames))
        timed("create", lambda: device.back(frames))
    device.close()
    return _sides(times, donor=("hide", "give"), newcomer=("create", "show"))


def _calls_cuda(page: int, rounds: int) -> Answer:
    from tiermem.gpu.driver import Context, load
    from tiermem.gpu.frames import DEVICE, Backing, reserve
    from tiermem.native import Kind, Program, group

    context = Context(load(), 0)
    driver = context.driver
    backing = Backing(context, DEVICE, context.device)
    times: dict[str, list[float]] = {}
    with context:
        start, alias = (reserve(context, GROUP * page, page) for _ in range(2))
        step = np.arange(GROUP, dtype=np.uint64) * np.uint64(page)
        at, under = step + np.uint64(start), step + np.uint64(alias)
        handles = np.zeros(GROUP, np.uint64)
        into = np.arange(GROUP, dtype=np.uint64) * np.uint64(8) + np.uint64(handles.ctypes.data)
        desc, prop = backing.access, backing.prop

        def call(label: str, name: str, *columns: object) -> None:
            program = Program(group(driver.address(name), Kind.STATUS, *columns))
            began = time.perf_counter()
            failure = program.run()
            times.setdefault(label, []).append((time.perf_counter() - began) / GROUP * 1e6)
            assert failure is None, f"{name}: {failure}"

        for _ in range(rounds):
            call("create", "cuMemCreate", into, page, prop.ctypes.data, 0)
            for where, what in ((under, "alias"), (at, "page")):
                call(f"map {what}", "cuMemMap", where, page, 0, handles, 0)
                descs = (desc.ctypes.data, len(desc) // 3)
                call(f"access {what}", "cuMemSetAccess", where, page, *descs)
            call("unmap page", "cuMemUnmap", at, page)
            call("map page", "cuMemMap", at, page, 0, handles, 0)
            call("access of 64", "cuMemSetAccess", at[:1].copy(), GROUP * page, *descs)
            call("unmap page", "cuMemUnmap", at, page)
            call("unmap alias", "cuMemUnmap", under, page)
            call("release", "cuMemRelease", handles)
        for address in (start, alias):
            driver.call("cuMemAddressFree", address, GROUP * page)
    context.close()
    return _sides(
        times,
        donor=("unmap page", "unmap alias", "release"),
        newcomer=("create", "map alias", "access alias", "map page", "access page"),
    )


def _sides(
    times: dict[str, list[float]], donor: tuple[str, ...], newcomer: tuple[str, ...]
) -> Answer:
    us = {name: statistics.median(rows[1:]) for name, rows in times.items()}
    return {
        "us": us,
        "donor_us": sum(us[name] for name in donor),
        "newcomer_us": sum(us[name] for name in newcomer),
    }


def _end(done: Done) -> None:
    assert done.wait(60.0), "did not end"
    if done.error is not None:
        raise done.error


def reply(answer: Answer) -> None:
    print(json.dumps(answer), flush=True)


def main() -> None:
    role, given = sys.argv[1], json.loads(sys.argv[2])
    self = {"engine": Engine, "job": Job, "floor": Floor}[role](given)
    reply({"ready": True})
    for line in sys.stdin:
        asked: Answer = json.loads(line)
        verb = asked.pop("do")
        reply(getattr(self, verb)(**asked))
        if verb == "end":
            return


if __name__ == "__main__":
    main()
