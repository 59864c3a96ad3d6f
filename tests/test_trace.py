"""The event log's format on disk."""

from __future__ import annotations

import gzip
import threading
from pathlib import Path

import msgspec
import pytest

from tiermem.trace import SCHEMA, EventLog

TIERS = {"gpu": {"policy": "lru", "capacity": 4}}


def test_a_log_is_a_header_and_one_object_a_line(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    with EventLog(path, TIERS) as log:
        log.write({"e": "removed", "tier": "gpu", "units": [1, 2], "now": 7})
        assert log.events == 2
    lines = [msgspec.json.decode(line) for line in path.read_bytes().splitlines()]
    assert lines == [
        {"schema": SCHEMA, "tiers": TIERS},
        {"e": "removed", "tier": "gpu", "units": [1, 2], "now": 7},
    ]


def test_a_path_that_ends_in_gz_is_compressed(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl.gz"
    with EventLog(path, TIERS):
        pass
    assert msgspec.json.decode(gzip.decompress(path.read_bytes()))["schema"] == SCHEMA


def test_a_closed_log_writes_no_more_and_closes_twice(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    log = EventLog(path, TIERS)
    log.close()
    log.write({"e": "late"})
    log.close()
    assert len(path.read_bytes().splitlines()) == 1


def test_events_of_many_threads_do_not_mix(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    with EventLog(path, TIERS) as log:

        def work(number: int) -> None:
            for i in range(500):
                log.write({"e": "x", "from": number, "i": i, "units": list(range(number * 10))})

        threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    _, *events = [msgspec.json.decode(line) for line in path.read_bytes().splitlines()]
    assert len(events) == 2000
    for number in range(4):
        assert [e["i"] for e in events if e["from"] == number] == list(range(500))


def test_a_place_that_cannot_be_written_is_an_error_at_once(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No such file"):
        EventLog(tmp_path / "absent" / "events.jsonl", TIERS)
