"""`tiermem bench nvme`: the disk route beside fio, on the same overwritten file in the same run.

Three ways to move the same pages between the file and huge-page buffers: fio, the route without
its checksums (what the threads cost), and the route as it is (what a user gets). Each round
measures all of them one after the other, so that a drive that slows down slows all alike, and
ratios are taken within a round. Many short rounds tell more than few long ones.
"""

from __future__ import annotations

import contextlib
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated

import msgspec
import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from tiermem import units
from tiermem.bench import fio, output
from tiermem.bench.machine import Machine, machine
from tiermem.bench.nvme_gpu import GpuTable, measure
from tiermem.bench.others import Others
from tiermem.bench.paired import Ratio, ratio
from tiermem.errors import ConfigError, DriverError
from tiermem.host.pinned import HostPool
from tiermem.nvme.files import memory_at
from tiermem.nvme.kept import Persist
from tiermem.nvme.mover import Batch, Mover, native_calls
from tiermem.nvme.posix import DiskThreads
from tiermem.nvme.slab import Slab
from tiermem.tier import PASSED, Addresses, Device, Done, Mask, Memory, Place, Route, Slots

DEPTHS = (1, 8, 32)
SECONDS, ROUNDS = 0.5, 9
GPU_PAGES = 128
Sample = tuple[float, float]
"""Of one round: GB/s, and processor time a page in us."""
ABSENT = "fio is not installed: apt install fio; its columns are empty and nothing is compared"


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One direction at one depth; rates are medians over the rounds, in GB/s (1e9 bytes).

    `rounds_gbps` has the rate of every round by way (fio, bare, route), in the order of rounds.
    """

    direction: str
    depth: int
    page_bytes: int
    n: int
    fio_gbps: float | None
    bare_gbps: float
    """The route's threads without checksums."""
    route_gbps: float
    """The route as it is: every store hashed, every load verified."""
    bare_of_fio: Ratio | None
    route_of_fio: Ratio | None
    rounds_gbps: dict[str, tuple[float, ...]]
    fio_cpu_us: float | None
    bare_cpu_us: float
    route_cpu_us: float
    """Processor time a page. The route has two threads more than calls in flight."""
    page_p50_us: float
    page_p99_us: float
    """From submission of one page to its arrival, one at a time, through the route."""
    others_cores: float
    """Processors that other programs took meanwhile: what is not near 0 is noise in this row."""


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """What `--json` writes."""

    schema: str = "tiermem.nvme.v1"
    machine: Machine
    path: str
    direct: bool
    fio: str | None
    file_bytes: int
    seconds: float
    rows: tuple[Row, ...]
    notes: tuple[str, ...]
    gpu: GpuTable | None = None
    """None where there is no GPU."""


class BareMover(Mover):
    """Moves slots without looking at them: for this comparison only, never in a space."""

    def finish(
        self, batch: Batch, entries: slice, moved: Mask, *, write: bool
    ) -> dict[int, Exception]:
        """What was stored cannot be loaded: nothing is recorded of it."""
        short = np.flatnonzero(~moved) + entries.start
        return {int(i): OSError(f"entry {i} did not move whole") for i in short}


class _Few:
    """A pool seen as many slots that share few buffers: as many as fio has, which takes `depth`.

    A drive that is a file of the host's copies into memory that was used a moment ago 4-16 % faster
    than into pages all over the pool (2-core, 2026-11). What arrives is overwritten.
    """

    place = Place.HOST

    def __init__(self, pool: HostPool, buffers: int) -> None:
        self._pool, self._buffers = pool, min(buffers, pool.capacity)
        self.slot_bytes, self.capacity, self.growing = pool.slot_bytes, pool.capacity, False
        self.ready = pool.capacity

    def addresses(self, slots: Slots) -> Addresses:
        return self._pool.addresses(slots % np.int32(self._buffers))

    def resize(self, capacity: int) -> None:
        raise NotImplementedError("a view of a pool")

    def close(self) -> None:
        pass


class _Bench:
    """The file, the buffers and the settings of one run."""

    def __init__(
        self, where: Path, page: int, nbytes: int, seconds: float, engines: Sequence[str]
    ) -> None:
        self.engines = engines
        self.pages = max(1, nbytes // page)
        self.page = page
        self.seconds = seconds
        self.slab = Slab(where, page, self.pages, persist=Persist("bench"))
        self.file = where / "bench.slab"
        self.pool = HostPool(page, self.pages)
        self.slab.wait_ready(self.pages)
        self.pool.wait_ready(self.pages)
        self._order = np.random.default_rng(0)
        self._scribble()

    def close(self) -> None:
        self.pool.close()
        self.slab.close()

    def fio(self, depth: int, *, write: bool) -> Sample:
        """(GB/s, CPU us a page)."""
        start, size = self.slab.offset(0), self.pages * self.page
        found = fio.measure(
            self.file,
            start,
            size,
            self.page,
            depth,
            write=write,
            seconds=self.seconds,
            engines=self.engines,
        )
        return found.bytes_per_s / 1e9, found.cpu_us

    def route(self, depth: int, mover: type[Mover], *, write: bool) -> Sample:
        """(GB/s, CPU us a page) of one direction with `depth` reads or writes in flight."""
        with self._threads(depth, mover) as (store, load):
            route = store if write else load
            moved = 0
            half = self._half()
            cpu, began = time.process_time(), time.perf_counter()
            # Two submissions in turn: the threads never run out of work between them.
            running = [self._submit(route, part, write) for part in half]
            while time.perf_counter() - began < self.seconds:
                moved += self._end(running.pop(0))
                running.append(self._submit(route, half[0], write))
                half.reverse()
            moved += sum(self._end(one) for one in running)
            took, cpu = time.perf_counter() - began, time.process_time() - cpu
        return moved * self.page / took / 1e9, cpu / moved * 1e6

    def _scribble(self) -> None:
        """Random bytes, as fio writes them: a drive may have short ways for zeros."""
        for address in self.pool.addresses(np.arange(self.pages, dtype=np.int32)):
            memory_at(int(address), self.page)[:] = self._order.bytes(self.page)

    def fill(self) -> None:
        """Store every page, so that every load finds what it expects."""
        with self._threads(8, Mover) as (store, _):
            self._end(self._submit(store, np.arange(self.pages, dtype=np.int32), True))

    def page_times(self, *, write: bool, n: int = 64) -> tuple[float, float]:
        """(p50, p99) in us of one page at a time."""
        times = []
        with self._threads(1, Mover) as (store, load):
            for slot in self._order.integers(0, self.pages, n):
                one = np.array([slot], np.int32)
                began = time.perf_counter()
                (store if write else load).submit(one, one, PASSED).wait()
                times.append((time.perf_counter() - began) * 1e6)
        return float(np.percentile(times, 50)), float(np.percentile(times, 99))

    def _half(self) -> list[Slots]:
        """All slots in random order, in two parts."""
        return np.array_split(self._order.permutation(self.pages).astype(np.int32), 2)

    def _submit(self, route: Route, slots: Slots, write: bool) -> tuple[Done, int]:
        """Move these slots from or to the frames of the same numbers, in a new order."""
        disk = self._order.permutation(slots)
        frames = slots
        done = route.submit(frames, disk, PASSED) if write else route.submit(disk, frames, PASSED)
        return done, len(slots)

    def _end(self, submitted: tuple[Done, int]) -> int:
        done, n = submitted
        done.wait()
        if done.error is not None:
            raise done.error
        return n

    @contextlib.contextmanager
    def _threads(self, depth: int, mover: type[Mover]) -> Iterator[tuple[Route, Route]]:
        with DiskThreads(self.slab, depth=depth, mover=mover) as threads:
            memory: Memory = self.pool if mover is Mover else _Few(self.pool, depth)
            yield threads.routes(memory)


def run(
    where: Path,
    *,
    page: int = 2 << 20,
    nbytes: int = 512 << 20,
    depths: Sequence[int] = DEPTHS,
    seconds: float = SECONDS,
    rounds: int = ROUNDS,
    engines: Sequence[str] = fio.ENGINES,
    gpu: str = "off",
    told: Callable[[str], None] = lambda text: None,
) -> Result:
    """Measure in a new directory under `where`, which is removed again.

    page: bytes of a slot; nbytes: size of the file and of the host memory used; seconds: of one
    measurement, of which a round has three in each direction at each depth, in turns;
    engines: of fio, the first that works; gpu: whose ways to the drive are measured after that:
    "auto" (the first GPU, if there is one), "cuda:1", "cpu" (the CPU device) or "off"; told:
    progress.
    Raises ConfigError without native calls, for the plain way would measure the interpreter.
    """
    if native_calls() is None:
        raise ConfigError("bench nvme needs a C compiler (apt install gcc) for its native calls")
    notes = [] if fio.version() else [ABSENT]
    where.mkdir(mode=0o700, parents=True, exist_ok=True)
    place = Path(tempfile.mkdtemp(prefix="tiermem-bench-", dir=where))
    try:
        bench = _Bench(place, page, nbytes, seconds, engines)
        try:
            if not bench.slab.direct:
                notes.append("this file system has no O_DIRECT: figures show the page cache")
            rows = tuple(
                _measure(bench, depth, write=write, rounds=rounds, told=told)
                for write in (False, True)
                for depth in depths
            )
        finally:
            bench.close()
        table = _gpu_table(gpu, place / "gpu", page, seconds, rounds, told)
    finally:
        shutil.rmtree(place)
    return Result(
        machine=machine(),
        path=str(where),
        direct=bench.slab.direct,
        fio=fio.version(),
        file_bytes=bench.pages * page,
        seconds=seconds,
        rows=rows,
        notes=tuple(notes),
        gpu=table,
    )


def _gpu_table(
    gpu: str, where: Path, page: int, seconds: float, rounds: int, told: Callable[[str], None]
) -> GpuTable | None:
    """The ways between a device and the drive; None without one, or where it is not wanted."""
    device = _device(gpu, page)
    if device is None:
        return None
    try:
        return measure(device, where, pages=GPU_PAGES, seconds=seconds, rounds=rounds, told=told)
    finally:
        device.close()


def _device(gpu: str, page: int) -> Device | None:
    if gpu == "off":
        return None
    if gpu == "cpu":
        from tiermem.gpu.emulated import EmulatedDevice

        return EmulatedDevice(page, GPU_PAGES)
    from tiermem.gpu.vmm import CudaDevice

    try:
        device = CudaDevice(0 if gpu == "auto" else int(gpu.partition(":")[2]), page, GPU_PAGES)
    except DriverError:
        if gpu == "auto":
            return None
        raise
    device.frames.wait_ready(GPU_PAGES)
    return device


def _measure(
    bench: _Bench, depth: int, *, write: bool, rounds: int, told: Callable[[str], None]
) -> Row:
    name = "write" if write else "read"
    bench.fill()
    ways: dict[str, Callable[[], Sample]] = {
        "bare": lambda: bench.route(depth, BareMover, write=write),
        "route": lambda: bench.route(depth, Mover, write=write),
    }
    if fio.version():
        ways["fio"] = lambda: bench.fio(depth, write=write)
    samples: dict[str, list[Sample]] = {way: [] for way in ("fio", *ways)}
    others = Others()
    for i in range(rounds):
        told(f"{name} depth {depth}, round {i + 1} of {rounds}")
        # Turn about, so that whatever one leaves behind does not always meet the same next.
        for way in sorted(ways, reverse=i % 2 > 0):
            samples[way].append(ways[way]())
    others_cores = others.cores()
    bench.fill()
    p50, p99 = bench.page_times(write=write)
    return Row(
        direction=name,
        depth=depth,
        page_bytes=bench.page,
        n=rounds,
        fio_gbps=_median(samples["fio"], 0),
        bare_gbps=_median(samples["bare"], 0) or 0.0,
        route_gbps=_median(samples["route"], 0) or 0.0,
        bare_of_fio=_ratio(samples["bare"], samples["fio"]),
        route_of_fio=_ratio(samples["route"], samples["fio"]),
        rounds_gbps={way: tuple(rate for rate, _ in found) for way, found in samples.items()},
        fio_cpu_us=_median(samples["fio"], 1),
        bare_cpu_us=_median(samples["bare"], 1) or 0.0,
        route_cpu_us=_median(samples["route"], 1) or 0.0,
        page_p50_us=p50,
        page_p99_us=p99,
        others_cores=others_cores,
    )


def _median(found: list[Sample], which: int) -> float | None:
    return statistics.median(one[which] for one in found) if found else None


def _ratio(ours: list[Sample], theirs: list[Sample]) -> Ratio | None:
    if not theirs:
        return None
    mine, other = ([rate for rate, _ in samples] for samples in (ours, theirs))
    return ratio(mine, other)


def show(found: Result, console: Console) -> None:
    """The table; every figure is in the JSON too."""
    size = units.format_bytes(found.rows[0].page_bytes)
    title = f"{found.fio or 'no fio'} and the NVMe route, pages of {size}, GB/s"
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for heading in (
        "",
        "depth",
        "fio",
        "unchecked",
        "of fio",
        "route",
        "of fio",
        "CPU us",
    ):
        table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    for row in found.rows:
        table.add_row(
            row.direction,
            str(row.depth),
            _rates(row, "fio"),
            _rates(row, "bare"),
            _of_fio(row.bare_of_fio),
            _rates(row, "route"),
            _of_fio(row.route_of_fio),
            f"{_text(row.fio_cpu_us, '.0f')}/{row.bare_cpu_us:.0f}/{row.route_cpu_us:.0f}",
        )
    console.print(table)
    busy = max(row.others_cores for row in found.rows)
    console.print(
        f"Medians of {found.rows[0].n} rounds, lowest and highest below; of fio: median of the "
        "rounds' own ratios, 95 % interval below. CPU a page: fio / unchecked / route. Other "
        f"programs took up to {busy:.1f} of {found.machine.cores} processors: from a tenth on, "
        "repeat it when they are done.",
        style="dim",
        highlight=False,
    )
    if found.gpu is not None:
        _show_gpu(found.gpu, console)
    for note in (*found.notes, *(found.gpu.notes if found.gpu else ())):
        console.print(f"note: {note}", style="yellow", highlight=False, markup=False)


def _show_gpu(found: GpuTable, console: Console) -> None:
    size = units.format_bytes(found.page_bytes)
    table = Table(title=f"{found.device} and the drive, pages of {size}, GB/s")
    for heading in ("", "way", "rate", "rounds", "of the slower leg"):
        table.add_column(heading, justify="right" if heading == "rate" else "left")
    for way in found.ways:
        spread = f"{min(way.rounds_gbps):.2f}-{max(way.rounds_gbps):.2f}"
        ratio = _text(way.of_slower_leg, ".0%")
        table.add_row(way.direction, way.way, f"{way.gbps:.2f}", spread, ratio)
    console.print(table)
    same = "as the processor's" if found.digest_agrees else "OTHER than the processor's"
    console.print(
        f"Checksums on the device: {found.digest_gbps:.1f} GB/s, {same}. {found.probe}.",
        style="dim",
        highlight=False,
        markup=False,
    )


def _rates(row: Row, way: str) -> str:
    rates = row.rounds_gbps[way]
    if not rates:
        return "-"
    return f"{statistics.median(rates):.2f}\n{min(rates):.1f}-{max(rates):.1f}"


def _of_fio(found: Ratio | None) -> str:
    if found is None:
        return "-"
    if found.low is None or found.high is None:
        return f"{found.median:.0%}"
    return f"{found.median:.0%}\n{100 * found.low:.0f}-{found.high:.0%}"


def _text(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def command(
    where: Annotated[Path, typer.Argument(help="Directory on the drive to measure.")] = Path("."),
    size: Annotated[str, typer.Option(help="Size of the file, and of host memory.")] = "512MiB",
    page: Annotated[str, typer.Option(help="Bytes of a page.")] = "2MiB",
    depths: Annotated[str, typer.Option(help="Pages in flight.")] = "1,8,32",
    seconds: Annotated[float, typer.Option(help="Length of one measurement.")] = SECONDS,
    rounds: Annotated[int, typer.Option(help="Rounds; medians are shown.")] = ROUNDS,
    gpu: Annotated[str, typer.Option(help="Whose way to the drive: auto, cuda:0, cpu, off.")] = (
        "auto"
    ),
    json: Annotated[str | None, typer.Option(help="Write JSON to this path, or to - .")] = None,
) -> None:
    """Measure the NVMe tier against fio, on the same file in the same run."""
    console = Console(stderr=True)
    with console.status("preparing") as status:
        found = run(
            where,
            page=_bytes(page, "--page"),
            nbytes=_bytes(size, "--size"),
            depths=_numbers(depths),
            seconds=seconds,
            rounds=rounds,
            gpu=gpu,
            told=status.update,
        )
    if not output.emit(found, json):
        show(found, Console())


def _bytes(text: str, option: str) -> int:
    try:
        value = units.parse_bytes(text)
    except ValueError as error:
        raise ConfigError(f"{option} {text}: {error}") from None
    if not isinstance(value, int):
        raise ConfigError(f"{option} {text}: write a size, like 512MiB")
    return value


def _numbers(text: str) -> list[int]:
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = [0]
    if not numbers or min(numbers) < 1:
        raise ConfigError(f"--depths {text}: write numbers from 1 on, like 1,8,32")
    return numbers
