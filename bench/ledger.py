"""How long the ledger's verbs take, uncontended and beside another process.

    python bench/ledger.py [--members 8] [--json PATH]

Prints median and p99 in microseconds, and writes JSON. The bar: under 20 us uncontended.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing.synchronize import Event
from pathlib import Path

from tiermem.ledger import Lease, Ledger

PAGE = 2 << 20
BUDGET = 64 << 30
ROUNDS = 5000


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--members", type=int, default=4, help="processes' records in the ledger")
    parser.add_argument("--json", type=Path, help="write the figures here")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        ledgers = [Ledger.open("bench", BUDGET, directory=directory) for _ in range(given.members)]
        leases = [
            ledger.join(f"member-{i}", page_bytes=PAGE, floor=1 << 30)
            for i, ledger in enumerate(ledgers)
        ]
        rows = measure(leases[0])
        stop = multiprocessing.get_context("spawn").Event()
        other = multiprocessing.get_context("spawn").Process(
            target=contend, args=(directory, stop), daemon=True
        )
        other.start()
        while len(ledgers[0].snapshot().members) == given.members:
            time.sleep(0.01)
        rows |= {f"{verb}, contended": row for verb, row in measure(leases[0]).items()}
        stop.set()
        other.join()
        for lease, ledger in zip(leases, ledgers, strict=True):
            lease.leave()
            ledger.close()
    print(f"{platform.machine()}, Python {platform.python_version()}, {given.members} members")
    for verb, (n, median, p99) in rows.items():
        print(f"{verb:<32} n={n:<6} median {median:7.1f} us   p99 {p99:7.1f} us")
    if given.json:
        figures = {
            verb: dict(zip(("n", "median_us", "p99_us"), row, strict=True))
            for verb, row in rows.items()
        }
        given.json.write_text(
            json.dumps(
                {
                    "schema": "tiermem.ledger.v1",
                    "machine": platform.machine(),
                    "python": platform.python_version(),
                    "members": given.members,
                    "verbs": figures,
                },
                indent=2,
            )
            + "\n"
        )
    sys.exit(int(any(row[1] >= 20 for verb, row in rows.items() if "contended" not in verb)))


def measure(lease: Lease) -> dict[str, tuple[int, float, float]]:
    """(n, median us, p99 us) of each verb."""
    took: dict[str, list[float]] = {}

    def timed(verb: str, call: Callable[[], object]) -> None:
        start = time.perf_counter()
        call()
        took.setdefault(verb, []).append((time.perf_counter() - start) * 1e6)

    for _ in range(ROUNDS):
        timed("is anything changed", lease.is_changed)
        timed("reserve", lambda: lease.reserve(PAGE))
        timed("commit", lambda: lease.commit(lease.reserved))
        timed("dues", lease.dues)
        timed("release", lambda: lease.release(lease.held))
        lease.want(0)
    return {
        verb: (len(us), statistics.median(us), sorted(us)[len(us) * 99 // 100])
        for verb, us in took.items()
    }


def contend(directory: Path, stop: Event) -> None:
    """Another process that takes and gives as fast as it can."""
    with Ledger.open("bench", BUDGET, directory=directory) as ledger:
        lease = ledger.join("contender", page_bytes=PAGE)
        while not stop.is_set():
            lease.reserve(PAGE)
            lease.commit(lease.reserved)
            lease.release(lease.held)
        lease.leave()


if __name__ == "__main__":
    main()
