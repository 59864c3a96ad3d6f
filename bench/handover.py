"""Memory that changes hands between processes: how fast, beside what driver and link allow.

    python bench/handover.py [--device cuda:0] [--page 2MiB ...] [--total 110GiB] [--json PATH]
    python bench/handover.py --device cpu --page 64KiB --total 16MiB --host 16MiB  # without a GPU

Every engine is a process with a space of its own; they share one ledger in a directory that is
made for the run. For each page size:

floor     what a page costs that changes hands: the donor's driver calls, the copy, the newcomer's
          driver calls, each measured alone, and the calls once more beside another process's copies
handover  an idle engine holds the whole card, a newcomer takes half of it: its first page, all of
          them; the donor's part ends when the last byte is free, the rest is the newcomer's
limit     `tiermem limit` to a half of what is held, beside the link's time and the driver calls'
job       a process that is not ours grows twice in room from `tiermem yield`, shrinks and ends
pinned    `tiermem limit` below what is pinned: how soon down to that, and to the cap once let go

Pages are read back afterwards and must be as they were written. The output is
{"schema": "tiermem.handover.v1", "machine": {...}, "pages": [one object a page size]}; seconds,
bytes and GB/s (1e9). `serial_s` of the floor is the sum of its three parts for the bytes moved,
`piped_s` the largest of them: parts that overlap can be faster than the first, not than the second.
`calls_s` leaves the copy out: a donor that has been idle has copies of its pages in host memory
already, as many as fit there (`copied_meanwhile` says how many had none).
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import msgspec

from tiermem import units
from tiermem.bench.machine import machine
from tiermem.ledger import Ledger, Member

ROOT = Path(__file__).parents[1]
Answer = dict[str, Any]
LOOK_S = 0.001
PARTS = ["limit", "job", "pinned"]


class Child:
    """One process of `handover_engine.py`, asked and answered line by line."""

    def __init__(self, role: str, given: Answer) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(ROOT / "bench" / "handover_engine.py"), role, json.dumps(given)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.pid = self._process.pid
        self.answer()

    def send(self, verb: str, **arguments: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"do": verb, **arguments}) + "\n")
        self._process.stdin.flush()

    def answer(self) -> Answer:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"a process of the run ended with {self._process.wait()}")
        found: Answer = json.loads(line)
        return found

    def ask(self, verb: str, **arguments: object) -> Answer:
        self.send(verb, **arguments)
        return self.answer()

    def close(self) -> None:
        if self._process.poll() is None:
            try:
                self.ask("end")
                self._process.wait(60)
            except (OSError, RuntimeError, subprocess.TimeoutExpired):
                self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()


@contextmanager
def child(role: str, **given: object) -> Iterator[Child]:
    made = Child(role, given)
    try:
        yield made
    finally:
        made.close()


class Watch:
    """What each member holds, about every millisecond, until `stop`."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._stop = threading.Event()
        self.seen: list[tuple[float, dict[str, int]]] = []
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.wait(LOOK_S):
            self._look()

    def _look(self) -> None:
        members = self._ledger.snapshot().members
        self.seen.append((time.monotonic(), {m.name: m.held for m in members}))

    def stop(self) -> None:
        """Look once more, so that what held until now was seen."""
        self._stop.set()
        self._thread.join()
        self._look()

    def first_at_most(self, name: str, nbytes: int) -> float | None:
        """When this member was first seen to hold no more than that."""
        return next((at for at, held in self.seen if held.get(name, 0) <= nbytes), None)


def floor(device: str, page: int) -> Answer:
    """The three parts of a hand-over for one page, and the calls beside another process's copies
    and beside its calls."""
    with child("floor", device=device, page=page) as one:
        calls = one.ask("calls")
        copy = one.ask("copy", rounds=4)
        with child("floor", device=device, page=page) as two:
            two.ask("copy", rounds=1)  # opens what takes long, so that the next starts at once
            two.send("copy", rounds=40)
            beside = one.ask("calls")
            two.answer()
            two.send("calls", rounds=200 if device != "cpu" else 20)  # 2 s on an H200
            beside_calls = one.ask("calls", rounds=21)
            two.answer()
    return {
        "device": device,
        "donor_us": calls["donor_us"],
        "copy_us": page / copy["gbps"] / 1e3,
        "copy_gbps": copy["gbps"],
        "newcomer_us": calls["newcomer_us"],
        "calls_us": calls["us"],
        "calls_beside_copies_us": beside["us"],
        "calls_beside_calls_us": beside_calls["us"],
    }


def least(base: Answer, pages: int) -> Answer:
    """What so many pages take at the floor: part after part, all at once, driver calls alone."""
    parts = [base["donor_us"], base["copy_us"], base["newcomer_us"]]
    return {
        "serial_s": sum(parts) * pages / 1e6,
        "piped_s": max(parts) * pages / 1e6,
        "calls_s": (base["donor_us"] + base["newcomer_us"]) * pages / 1e6,
    }


def handover(ledger: Ledger, donor: Child, newcomer: Child, page: int, base: Answer) -> Answer:
    """The newcomer takes half of the card from a donor that holds it all and is idle."""
    start = newcomer.ask("state")
    n = ledger.budget // page - start["gpu"]
    donor.ask("fill", n=n)
    before = donor.ask("drain")
    half = ledger.budget // page // 2
    asked = half - start["used"]
    donor_keeps = ledger.budget - half * page
    watch = Watch(ledger)
    took = newcomer.ask("take", n=asked, group=256)
    watch.stop()
    times = took["times"]
    t0, first, end = times[0], times[1], times[-1]
    seen = watch.first_at_most("donor", donor_keeps)
    freed = None if seen is None else min(seen, end)  # the last look comes after the end
    after = donor.ask("state")
    moved = before["gpu"] - after["gpu"]
    floors = least(base, moved)
    newcomer.ask("write")
    checks = [donor.ask("verify", n=1024), newcomer.ask("verify", n=1024)]
    return {
        "card_bytes": ledger.budget,
        "donor_held_before": before["gpu"] * page,
        "donor_used_before": before["used"] * page,
        "pages_moved": moved,
        "pages_taken": asked,
        "first_page_s": first - t0,
        "all_s": end - t0,
        "donor_part_s": None if freed is None else freed - t0,
        "newcomer_part_s": None if freed is None else end - freed,
        "gbps": moved * page / (end - t0) / 1e9,
        "floor": floors,
        "of_serial_floor": floors["serial_s"] / (end - t0),
        "of_piped_floor": floors["piped_s"] / (end - t0),
        "of_calls_floor": floors["calls_s"] / (end - t0),
        "copied_meanwhile": after["counts"].get("gpu_host", 0)
        - before["counts"].get("gpu_host", 0),
        "verified": sum(check["verified"] for check in checks),
        "wrong": sum(check["wrong"] for check in checks),
        "donor_counts": [before["counts"], after["counts"]],
    }


def grown(ledger: Ledger, donor: Child) -> int:
    """Bytes that the donor holds once it has written its pages with nobody beside it.

    It takes back what the newcomer had while it writes; what a cap of half of that leaves over then
    fits into its host tier.
    """
    for _ in range(8):
        wanted = donor.ask("write")["pages"]
        donor.ask("drain")
        member = _member(ledger, "donor")
        if member.held >= min(wanted * member.page_bytes, ledger.budget):
            return member.held
    raise RuntimeError(f"the donor holds {member.held} of {ledger.budget} bytes and grows no more")


def limit(ledger: Ledger, donor: Child, page: int, base: Answer) -> Answer:
    """A cap of half of what is held."""
    held = grown(ledger, donor)
    cap = held // page // 2 * page
    plain = _tiermem("limit", "donor", "--cap", str(cap), "--wait", "30", "--json", "-")
    link_s = (plain["held_before"] - cap) / base["copy_gbps"] / 1e9
    check = donor.ask("verify", n=512)
    _tiermem("limit", "donor", "--cap", "100%", "--json", "-")
    return {
        "held": plain["held_before"],
        "cap": cap,
        "took_s": plain["took_s"],
        "link_s": link_s,
        "calls_s": base["donor_us"] * ((plain["held_before"] - cap) // page) / 1e6,
        "beyond_link_s": plain["took_s"] - link_s,
        "verified": check["verified"],
        "wrong": check["wrong"],
    }


def below_pinned(ledger: Ledger, donor: Child, page: int, base: Answer) -> Answer:
    """A cap below what is pinned, of a half of the pages, so that the host pool holds the rest."""
    donor.ask("free", n=donor.ask("write")["pages"] // 2)
    donor.ask("write")
    donor.ask("drain")
    held = _member(ledger, "donor").held
    pinned = held // page // 4
    donor.send("pin", n=pinned)
    donor.answer()
    cap = pinned * page // 2
    below = _tiermem("limit", "donor", "--cap", str(cap), "--wait", "2", "--json", "-", code=1)
    watch = Watch(ledger)
    let_go = time.monotonic()
    donor.ask("unpin")
    while (freed := watch.first_at_most("donor", cap)) is None and time.monotonic() < let_go + 30:
        time.sleep(LOOK_S)
    watch.stop()
    _tiermem("limit", "donor", "--cap", "100%", "--json", "-")
    check = donor.ask("verify", n=512)
    return {
        "held": held,
        "cap": cap,
        "pinned": below["engine"]["pinned"],
        "held_after": below["engine"]["held"],
        "to_pinned_s": below["pinned_s"],
        "to_pinned_link_s": (held - pinned * page) / base["copy_gbps"] / 1e9,
        "after_unpin_s": None if freed is None else freed - let_go,
        "after_unpin_link_s": (pinned * page - cap) / base["copy_gbps"] / 1e9,
        "verified": check["verified"],
        "wrong": check["wrong"],
    }


def job(ledger: Ledger, donor: Child, page: int, base: Answer) -> Answer:
    """Room for a process that is not ours, twice; it shrinks, it ends, the engine has it again."""
    first, second = ledger.budget // 4, ledger.budget // 8
    donor.ask("write")
    held = _member(ledger, "donor").held
    found: Answer = {"held_before": held}
    with child("job", device=base["device"]) as plain, _room(first, plain.pid) as room:
        found["room_s"] = room["took_s"]
        found["first_byte_s"] = room["first_s"]
        found["grew"] = plain.ask("grow", nbytes=first)
        found["held_beside"] = _member(ledger, "donor").held
        with _room(second, plain.pid) as more:
            found["more_room_s"] = more["took_s"]
            found["grew_more"] = plain.ask("grow", nbytes=second)
            found["held_beside_more"] = _member(ledger, "donor").held
            found["checks"] = [donor.ask("verify", n=256)]
            found["job_right"] = plain.ask("check")["right"]
            found["shrank"] = plain.ask("shrink")
        found["job_right"] &= plain.ask("check")["right"]
        found["checks"].append(donor.ask("verify", n=256))
    began = time.monotonic()
    while _member(ledger, "donor").held < held - page and time.monotonic() < began + 30:
        donor.ask("write")
    found["held_after"] = _member(ledger, "donor").held
    found["regrown_s"] = time.monotonic() - began
    found["wrong"] = sum(check["wrong"] for check in found.pop("checks"))
    return found


@contextmanager
def _room(nbytes: int, pid: int) -> Iterator[Answer]:
    """`tiermem yield` while the block runs; what it said."""
    given = ["yield", "--bytes", str(nbytes), "--for", str(pid), "--json", "-"]
    process = subprocess.Popen(
        [sys.executable, "-m", "tiermem", *given], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert process.stdout is not None
    text = ""
    while not text.rstrip().endswith("}"):
        line = process.stdout.readline()
        if not line:
            raise RuntimeError(f"tiermem yield ended with {process.wait()}")
        text += line
    try:
        yield json.loads(text)
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(30)
        process.stdout.close()


def _tiermem(*arguments: str, code: int = 0) -> Answer:
    done = subprocess.run(
        [sys.executable, "-m", "tiermem", *arguments],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        check=False,
    )
    if done.returncode != code:
        raise RuntimeError(f"tiermem {' '.join(arguments)} ended with {done.returncode}")
    found: Answer = json.loads(done.stdout)
    return found


def _member(ledger: Ledger, name: str) -> Member:
    return next(member for member in ledger.snapshot().members if member.name == name)


def measure(
    device: str, page: int, total: int, host: int, pool: int | None, only: list[str]
) -> Answer:
    """All of it for one page size."""
    found: Answer = {"page_bytes": page, "floor": floor(device, page)}
    base = found["floor"]
    print(json.dumps({"page": page, "floor": base}), flush=True)
    card = {"device": device, "page": page, "total": total, "pool": pool}
    with (
        child("engine", name="newcomer", host=total // 8, **card) as newcomer,
        child("engine", name="donor", host=host, **card) as donor,
    ):
        (ledger,) = Ledger.found()
        with ledger:
            found["handover"] = handover(ledger, donor, newcomer, page, base)
            print(json.dumps(found["handover"]), flush=True)
            newcomer.close()
            for name, part in (("limit", limit), ("job", job), ("pinned", below_pinned)):
                if name in only:
                    found[name] = part(ledger, donor, page, base)
                    print(json.dumps({name: found[name]}), flush=True)
    return found


def size(text: str) -> int:
    return units.parse_bytes(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--page", type=size, nargs="*", default=[2 << 20, 8 << 20])
    parser.add_argument("--total", type=size, default=110 << 30, help="bytes of the whole card")
    parser.add_argument("--host", type=size, help="the donor's host pool; default: 5/8 of the card")
    parser.add_argument("--pool", type=size, help="one host pool of so many bytes for both engines")
    parser.add_argument("--only", nargs="*", choices=PARTS, default=PARTS)
    parser.add_argument("--json", type=Path, help="write the result here, page size by page size")
    given = parser.parse_args()
    host = given.host or given.total // 8 * 5
    result: Answer = {
        "schema": "tiermem.handover.v1",
        "device": given.device,
        "host_bytes": host,
        "pool_bytes": given.pool,
        "machine": msgspec.to_builtins(machine()),
        "pages": [],
    }
    for page in given.page:
        with tempfile.TemporaryDirectory(prefix="tm-") as directory:
            os.environ["XDG_RUNTIME_DIR"] = directory
            card = given.total // page * page
            result["pages"].append(measure(given.device, page, card, host, given.pool, given.only))
        if given.json:
            given.json.write_text(json.dumps(result, indent=1) + "\n")
    parts = [row[name] for row in result["pages"] for name in ("handover", *given.only)]
    wrong = sum(part["wrong"] for part in parts)
    print(f"{len(result['pages'])} page sizes, {wrong} wrong pages")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
