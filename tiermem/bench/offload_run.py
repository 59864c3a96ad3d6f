"""One run of `tiermem bench offload`: what it was asked for, and what it has measured."""

from __future__ import annotations

import ctypes
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Protocol

import msgspec

from tiermem.bench import ends
from tiermem.bench.doctor_disk import mount_of
from tiermem.bench.machine import Machine, machine
from tiermem.bench.paging import Laps, alone_per_s
from tiermem.bench.result import (
    Beside,
    Check,
    Direction,
    Figure,
    PageTime,
    Result,
    Row,
    Spread,
    Work,
)
from tiermem.bench.rig import Lap
from tiermem.bench.survey import Topology
from tiermem.errors import DriverError, TierMemError
from tiermem.tier import Place

LEAST = 3
"""Rounds that are always measured: `compare` gives no interval for fewer."""
STEADY = 0.02
"""Rounds that lie this close together are enough. Of two made runs with a spread of 2 % a round,
2 of 100 rows are then called different, as with a fixed count; at 0.03 it is 3 (`compare`)."""
HURRY_S = 90.0
"""A run that has taken so long has three rounds of everything else: a slow or busy machine makes
rounds lie apart, and the whole is to end within three minutes."""
WARM_UP = 0.3
"""Length of the round that does not count, as a part of one that does."""


def gpus() -> int:
    """Visible GPUs; 0 without a driver."""
    from tiermem.gpu.driver import load

    count = ctypes.c_int()
    try:
        load().call("cuDeviceGetCount", ctypes.byref(count))
    except DriverError:
        return 0
    return count.value


class Interrupted(Exception):
    """The user wants no further measurement."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What to measure, and how long. pages: bytes of a page; nvme: a directory that is ours."""

    device: str
    pages: tuple[int, ...]
    rounds: int
    """At most; see `take`."""
    seconds: float
    """Of one round of a bare route; rounds of the pager move a working set, however long."""
    work_bytes: int
    """Of the working set, per page size at most; at least 128 pages are used."""
    nvme: Path | None
    quick: bool = False
    verify: bool = True
    """Compare with independent tools."""

    @property
    def cuda(self) -> bool:
        return self.device != "cpu"

    @property
    def index(self) -> int:
        """Of the GPU."""
        return int(self.device.partition(":")[2] or 0)

    def count(self, page: int) -> int:
        """Pages of the working set."""
        return max(128, self.work_bytes // page)

    @property
    def cell_s(self) -> float:
        """How long a bare route takes as a rule: steady, as links are when nobody else is there."""
        return self.seconds * (WARM_UP + min(LEAST, self.rounds))


class Told(Protocol):
    """Who shows how far the run is."""

    def begin(self, title: str) -> None:
        """A measurement begins; the one before it has ended. Raises Interrupted to end the run."""

    def measured(self, row: Row) -> None: ...


@dataclass
class Run:
    """Collects rows, figures, checks and notes."""

    settings: Settings
    topology: Topology
    told: Told
    rows: list[Row] = field(default_factory=list)
    figures: dict[str, Figure] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)
    theirs: dict[tuple[str, str], tuple[str, tuple[float, ...]]] = field(default_factory=dict)
    """By ends: who else copied large pieces one way, and at what rates."""
    sections: dict[str, float] = field(default_factory=dict)
    written: int = 0
    """Bytes that went to the drive."""
    hurry_at: float = field(default_factory=lambda: time.perf_counter() + HURRY_S)
    """From then on three rounds are enough."""

    def note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)

    def figure(self, name: str, unit: str, samples: Sequence[float]) -> None:
        if samples:
            self.figures[name] = Figure.of(unit, samples)

    @cached_property
    def alone_per_s(self) -> float:
        """What a thread of pure Python gets done here in a second, measured once."""
        return alone_per_s()

    def take(self, laps: Laps, least: int = LEAST) -> list[Lap]:
        """As many rounds as are needed: see `take`."""
        return take(laps, self._most, least)

    def for_a_while(self, lap: Callable[[float], Lap]) -> list[Lap]:
        """Rounds of something that can be done for any number of seconds."""
        return for_a_while(lap, self.settings.seconds, self._most)

    @property
    def _most(self) -> int:
        late = time.perf_counter() > self.hurry_at
        return min(LEAST, self.settings.rounds) if late else self.settings.rounds

    def end_name(self, place: Place, gpu: int | None = None) -> str:
        """How a result file writes an end; the CPU device's frames are "gpu" without a number.

        gpu: which one; by default the one that is measured.
        """
        if place is Place.GPU:
            which = self.settings.index if gpu is None else gpu
            return f"gpu:{which}" if self.settings.cuda else "gpu"
        if place is Place.NVME and self.settings.nvme is not None:
            drive = drive_of(self.settings.nvme)
            return f"nvme:{drive}" if drive else "nvme"
        return place.name.lower()

    def add(
        self,
        ends_: tuple[str, str],
        page: int,
        group: int,
        laps: Sequence[Lap],
        path: str,
        *,
        route: str | None = None,
        direction: Direction = "one-way",
        gpus: int = 1,
        beside: Beside = "",
        work: Work = "",
        page_us: PageTime | None = None,
    ) -> None:
        """Add a row; beside other work the process's own time says nothing about the route."""
        src, dst = ends_
        spread = Spread.of([lap.gbps for lap in laps])
        link, relation = self._link(src, dst)
        if link is not None:
            link *= gpus * (2 if direction == "both" else 1)
        gib = sum(lap.nbytes for lap in laps) / 2**30
        row = Row(
            route=route or f"{src.partition(':')[0]}-{dst.partition(':')[0]}",
            src=src,
            dst=dst,
            page_bytes=page,
            group=group,
            direction=direction,
            gpus=gpus,
            beside=beside,
            work=work,
            gbps=spread,
            page_us=page_us,
            cpu_s_per_gib=None if beside else sum(lap.cpu_s for lap in laps) / gib,
            percent_of_link=None if link is None else 100 * spread.median / link,
            relation=relation,
            path=path,
        )
        self.rows.append(row)
        self.told.measured(row)

    def _link(self, src: str, dst: str) -> tuple[float | None, str]:
        if "gpu" in (src, dst):  # the CPU device has no link
            return None, "unknown"
        known = ends.link_gbps(self.topology, src, dst)
        return known, str(ends.relation(self.topology, src, dst))

    @contextmanager
    def section(self, name: str) -> Iterator[None]:
        """A part of the run that may be left out, and how long it took."""
        began = time.perf_counter()
        try:
            with self.leaving_out(name):
                yield
        finally:
            self.sections[name] = time.perf_counter() - began

    @contextmanager
    def leaving_out(self, name: str) -> Iterator[None]:
        """What fails for a reason that we know becomes a note, and the run goes on."""
        try:
            yield
        except (TierMemError, OSError) as error:
            self.note(f"{name} left out: {error}")

    def result(self, started: datetime, began_s: float, *, complete: bool) -> Result:
        if self.written:
            self.figure("disk-written", "GiB", [self.written / 2**30])
        return Result(
            started=started.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            took_s=time.perf_counter() - began_s,
            complete=complete,
            device="cuda" if self.settings.cuda else "cpu",
            machine=self._machine(),
            rows=tuple(self.rows),
            notes=tuple(self.notes),
            figures=self.figures,
            checks=tuple(self.checks),
            sections=self.sections,
        )

    def _machine(self) -> Machine:
        """With the GPUs as the CUDA driver names them where NVML does not say."""
        found = machine()
        if found.gpus or not self.settings.cuda:
            return found
        from tiermem.gpu.driver import Context, load

        driver = load()
        names = []
        for index in range(gpus()):
            context = Context(driver, index)
            names.append(context.name)
            context.close()
        return msgspec.structs.replace(found, gpus=tuple(names), cuda=driver.version_text)


def take(laps: Laps, most: int, least: int = LEAST) -> list[Lap]:
    """A round of warm-up, then rounds until they agree, at least `least` and at most `most`."""
    with closing(laps):
        next(laps)
        found: list[Lap] = []
        while len(found) < min(least, most) or (len(found) < most and not _steady(found)):
            found.append(next(laps))
    return found


def for_a_while(lap: Callable[[float], Lap], seconds: float, most: int) -> list[Lap]:
    """Rounds of something that can be done for any number of seconds, after a short warm-up."""

    def laps() -> Laps:
        yield lap(WARM_UP * seconds)
        while True:
            yield lap(seconds)

    return take(laps(), most)


def _steady(laps: Sequence[Lap]) -> bool:
    rates = [lap.gbps for lap in laps]
    return max(rates) - min(rates) <= STEADY * statistics.median(rates)


@dataclass(frozen=True, slots=True)
class Section:
    """A part of the run. steps: measurements that it announces; seconds: how long it may take."""

    name: str
    steps: int
    seconds: float
    work: Callable[[Run], None]


def drive_of(folder: Path, root: Path = Path("/")) -> str | None:
    """The disk that a folder is on, such as nvme0n1; None where the system does not say."""
    mount = mount_of(folder, root)
    block = None if mount is None else root / "sys/dev/block" / mount.device
    if block is None or not block.exists():
        return None
    real = block.resolve()
    return real.name if (real / "queue").is_dir() else real.parent.name
