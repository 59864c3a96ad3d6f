"""Engines in processes of their own share one device; some are killed, none may be harmed by it.

    python tests/sharing_soak.py [--seconds 200] [--engines 4] [--seed 1]

Each engine bursts, idles, verifies every page that it reads, and uses as many pages as its floor
at once, which must always be possible. Watched from outside, under the ledger's lock: the memory
that each device file really occupies against what the ledger says, and their sum against the
budget; the one file of the host pool that they share, and what its ledger says; the ledgers' own
logs of every change; how soon a killed engine's bytes are free.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

import tiermem
from tiermem.board import board_bytes
from tiermem.errors import NotOurs, TierFull
from tiermem.ledger import Ledger
from tiermem.ledger_file import Head, LedgerFile, Word

PAGE = 64 << 10
PAGES = 128  # that all may hold together
FLOOR = 12
MOST = 150  # that one engine has at a time, in all tiers
HOST_PAGES = 6 * MOST  # that all may hold together
GROUP = "soak"
START_S = 60.0
"""Until all engines have started, on a machine that others use, too."""


@dataclass(slots=True)
class Outcome:
    """What was seen. `faults` are sentences; none of them may be there."""

    faults: list[str] = field(default_factory=list)
    samples: int = 0
    changes: int = 0
    kills: int = 0
    most_held: int = 0
    most_host: int = 0
    freed_s: list[float] = field(default_factory=list)
    engines: list[dict[str, int]] = field(default_factory=list)


# One engine ---------------------------------------------------------------------------------------


def engine(name: str, seed: int) -> None:
    """Run until standard input ends, then print what was seen."""
    config = tiermem.Config(
        gpu=tiermem.Gpu(device="cpu", budget=PAGES * PAGE, page=PAGE),
        host=tiermem.Host(capacity=2 * MOST * PAGE),
        share=tiermem.Share(
            group=GROUP,
            name=name,
            total=PAGES * PAGE,
            floor=FLOOR * PAGE,
            idle_s=0.5,
            host=HOST_PAGES * PAGE,
        ),
    )
    os.set_blocking(0, False)
    seen = {"wrong": 0, "verified": 0, "below_floor": 0, "refused": 0, "dropped": 0}
    with tiermem.Space.open(config) as space:
        gone: set[int] = set()
        with space.reserve(
            2 * MOST * PAGE, on_gone=lambda pages, _: gone.update(pages.tolist())
        ) as region:
            print("ready", flush=True)
            load(space, region, random.Random(seed), seen, gone)
        space.check()
    print(json.dumps(seen), flush=True)


def load(
    space: tiermem.Space,
    region: tiermem.Region,
    rng: random.Random,
    seen: dict[str, int],
    gone: set[int],
) -> None:
    """gone: pages that were dropped, because who is at its share of a full host pool drops some."""
    view = region.view(np.uint64)
    model: dict[int, int] = {}
    version = 1
    while not is_told_to_end():
        burst = rng.choice((FLOOR, 30, 80, MOST))
        for _ in range(rng.randrange(40)):
            forget(model, gone, seen)
            if len(model) < burst:
                n = rng.randint(1, min(FLOOR, MOST - len(model)) or 1)
                for page in region.allocate(n).tolist():
                    model[page] = 0
                    gone.discard(page)  # it was dropped before it was ours again
            elif len(model) > burst or rng.random() < 0.1:
                unwanted = rng.sample(sorted(model), min(len(model), rng.randint(1, FLOOR)))
                with contextlib.suppress(NotOurs):  # dropped since we looked
                    region.free(unwanted)
                    for page in unwanted:
                        del model[page]
            n = FLOOR if rng.random() < 0.3 else rng.randint(1, 40)
            pages = rng.sample(sorted(model), min(n, len(model)))
            if not pages:
                continue
            writes = rng.random() < 0.4
            try:
                with region.use(pages, "write" if writes else "read"):
                    for page in pages:
                        if model[page]:
                            seen["verified"] += 1
                            seen["wrong"] += not (view[page] == model[page]).all()
                        if writes:
                            version += 1
                            view[page] = model[page] = version
            except NotOurs:  # dropped since we looked: the host pool is full
                continue
            except TierFull as error:
                kind = "below_floor" if len(pages) <= FLOOR else "refused"
                seen[kind] += 1
                if kind == "below_floor":
                    print(f"{os.getpid()} {error}", file=sys.stderr, flush=True)
        if rng.random() < 0.3:
            time.sleep(rng.random())
    for page, value in model.items():
        with contextlib.suppress(NotOurs), region.use(page):
            seen["verified"] += 1
            seen["wrong"] += bool(value) and not (view[page] == value).all()
    forget(model, gone, seen)


def forget(model: dict[int, int], gone: set[int], seen: dict[str, int]) -> None:
    """Pages that were dropped are no longer ours."""
    while gone:
        seen["dropped"] += model.pop(gone.pop(), None) is not None


def is_told_to_end() -> bool:
    try:
        return os.read(0, 1) == b""
    except BlockingIOError:
        return False


# Everything around them ---------------------------------------------------------------------------


class Engine:
    """A running engine, seen from outside."""

    def __init__(self, program: str, name: str, seed: int, directory: Path) -> None:
        self.name = name
        self.process = subprocess.Popen(
            [sys.executable, program, "--engine", name, "--seed", str(seed)],
            env={**os.environ, "XDG_RUNTIME_DIR": str(directory)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._files: dict[str, Path] = {}

    def frame_bytes(self) -> int:
        """Memory that the file of this engine's frames occupies now."""
        found = self._file("tiermem-frames")
        return 0 if found is None else found.st_blocks * 512

    def host_file(self) -> tuple[int, int] | None:
        """The file of the host pool that this engine has: which, and the bytes it occupies."""
        found = self._file("tiermem-host-shared")
        return None if found is None else (found.st_ino, found.st_blocks * 512)

    def _file(self, name: str) -> os.stat_result | None:
        try:
            at = self._files.get(name)
            if at is None or f"memfd:{name}" not in os.readlink(at):  # its number is another's now
                self._files.pop(name, None)
                for fd in Path(f"/proc/{self.process.pid}/fd").iterdir():
                    if f"memfd:{name}" in os.readlink(fd):
                        self._files[name] = fd
            return self._files[name].stat() if name in self._files else None
        except OSError:
            return None  # it has ended

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self._close()

    def end(self) -> dict[str, int]:
        """What it has seen; {} if it failed."""
        out, _ = self.process.communicate(timeout=60)
        lines = out.splitlines()
        self._close()
        if self.process.returncode or not lines or not lines[-1].startswith("{"):
            return {}
        seen: dict[str, int] = json.loads(lines[-1])
        return seen

    def _close(self) -> None:
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()


def soak(
    seconds: float, engines: int, seed: int, every_s: float = 2.0, program: str = __file__
) -> Outcome:
    """Let engines run for a while, and kill one every now and then.

    program: what an engine runs, with `--engine NAME --seed N`.
    """
    with tempfile.TemporaryDirectory(prefix="tm-") as name:
        directory = Path(name)
        home = directory / "tiermem"
        home.mkdir(mode=0o700)
        events = [home / f"cpu-{GROUP}.events", home / "host" / f"host-{GROUP}.events"]
        events[1].parent.mkdir(mode=0o700)
        for log in events:
            log.touch()
        # Both are kept open, or one would begin anew if all its members were killed at a time.
        pool = Ledger.open("host", HOST_PAGES * PAGE, group=GROUP, directory=events[1].parent)
        with pool, Ledger.open("cpu", PAGES * PAGE, group=GROUP, directory=home) as ledger:
            outcome = Outcome()
            start = partial(Engine, program, directory=directory)
            _run(outcome, ledger, start, seconds, engines, random.Random(seed), every_s)
            left = ledger.snapshot()
            if left.members or left.free != PAGES * PAGE:
                outcome.faults.append(f"left behind: {left}")
            if pool.snapshot().members:
                outcome.faults.append(f"left behind: {pool.snapshot()}")
        if Ledger.found(home / "host"):
            outcome.faults.append("the ledger of the host pool is still in use")
        for log in events:
            _judge_events(outcome, log.read_text())
        if outcome.most_host > HOST_PAGES * PAGE + board_bytes(HOST_PAGES * PAGE):
            outcome.faults.append(f"the host pool had {outcome.most_host} bytes")
    return outcome


def _run(
    outcome: Outcome,
    ledger: Ledger,
    start: Callable[[str, int], Engine],
    seconds: float,
    engines: int,
    rng: random.Random,
    every_s: float,
) -> None:
    file = LedgerFile(ledger.path, "", None)
    running = [start(f"e{i}", rng.randrange(1 << 30)) for i in range(engines)]
    try:
        late = time.monotonic() + START_S
        while len(ledger.snapshot().members) < engines and time.monotonic() < late:
            time.sleep(0.01)
        until = time.monotonic() + seconds
        next_kill = time.monotonic() + every_s
        while time.monotonic() < until:
            _sample(outcome, file, running)
            time.sleep(0.01)
            for i, each in enumerate(running):
                if each.process.poll() is not None:
                    outcome.faults.append(f"{each.name} ended with {each.process.returncode}")
                    each.end()
                    running[i] = start(each.name, rng.randrange(1 << 30))
            if time.monotonic() > next_kill:
                next_kill = time.monotonic() + every_s * (0.5 + rng.random())
                i = rng.randrange(engines)
                _kill(outcome, ledger, running[i])
                running[i] = start(running[i].name, rng.randrange(1 << 30))
        for each in running:
            seen = each.end()
            outcome.engines.append(seen)
            if not seen or seen["wrong"] or seen["below_floor"]:
                outcome.faults.append(f"{each.name}: {seen or each.process.returncode}")
    finally:
        for each in running:
            if each.process.poll() is None:
                each.process.send_signal(signal.SIGABRT)  # what it does now goes to stderr
                each.kill()
        file.close()


def _kill(outcome: Outcome, ledger: Ledger, engine: Engine) -> None:
    """Kill one; the others must have noticed within a second, without our help."""
    pid = engine.process.pid
    others = [m for m in ledger.snapshot().members if m.pid != pid and m.held]  # open, so it hears
    engine.kill()
    start = time.monotonic()
    outcome.kills += 1
    if not others:  # nobody is there yet to notice
        ledger.reap()
        return
    while any(member.pid == pid for member in ledger.snapshot().members):
        time.sleep(0.001)
        if time.monotonic() - start > 1.0:
            outcome.faults.append(f"pid {pid}: its bytes were not free after 1 s")
            ledger.reap()
            return
    outcome.freed_s.append(time.monotonic() - start)


def _sample(outcome: Outcome, file: LedgerFile, running: list[Engine]) -> None:
    """Under the lock no charge changes, so memory must fit into it, one by one and in all."""
    with file.locked(5.0) as words:
        charged = {
            words[first + Word.PID]: words[first + Word.HELD] + words[first + Word.RESERVED]
            for first in file.live()
        }
        budget = words[Head.BUDGET]
        real = {each.process.pid: each.frame_bytes() for each in running}
    outcome.samples += 1
    pools = {found for each in running if (found := each.host_file()) is not None}
    if len({inode for inode, _ in pools}) > 1:
        outcome.faults.append(f"more than one host pool: {pools}")
    outcome.most_host = max([outcome.most_host, *(nbytes for _, nbytes in pools)])
    outcome.most_held = max(outcome.most_held, sum(real.values()))
    if sum(charged.values()) > budget:
        outcome.faults.append(f"charged {charged} of {budget}")
    for pid, nbytes in real.items():
        if nbytes > charged.get(pid, 0):
            outcome.faults.append(f"pid {pid} occupies {nbytes}, charged {charged.get(pid)}")


def _judge_events(outcome: Outcome, text: str) -> None:
    epochs = []
    for line in text.splitlines():
        epoch, _, _, event, _, held, reserved, budget = line.split()
        epochs.append(int(epoch))
        outcome.changes += 1
        if int(held) + int(reserved) > int(budget):
            outcome.faults.append(f"event {event} {epoch}: {held} + {reserved} of {budget}")
    if epochs != sorted(epochs):
        outcome.faults.append("the event log is out of order")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=200)
    parser.add_argument("--engines", type=int, default=4)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--engine", help="be one engine of this name")
    given = parser.parse_args()
    if given.engine:
        engine(given.engine, given.seed)
        return
    outcome = soak(given.seconds, given.engines, given.seed)
    tell(outcome, given.seconds, given.engines, given.seed)
    sys.exit(bool(outcome.faults))


def tell(outcome: Outcome, seconds: float, engines: int, seed: int) -> None:
    """Print what was seen."""
    freed = sorted(outcome.freed_s)
    print(
        f"{seconds:.0f} s, {engines} engines, seed {seed}: "
        f"{outcome.kills} kills, {outcome.samples} samples, {outcome.changes} changes, memory "
        f"{outcome.most_held / PAGES / PAGE:.0%} of the budget, host "
        f"{outcome.most_host / HOST_PAGES / PAGE:.0%}"
    )
    if freed:
        print(
            f"bytes of a killed engine free after: n={len(freed)}, "
            f"median {freed[len(freed) // 2] * 1e3:.0f} ms, most {freed[-1] * 1e3:.0f} ms"
        )
    for seen in outcome.engines:
        print(f"engine: {seen}")
    for fault in outcome.faults[:20]:
        print(f"FAULT {fault}")


if __name__ == "__main__":
    main()
