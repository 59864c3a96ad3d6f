"""Engines take one another's content out of the one host pool: verified bytes, or none."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest

from tests.directed_ranks import PAGE, Ranks, ids
from tests.test_directed import told_back
from tests.waiting import until
from tiermem import Share
from tiermem.board import board_bytes
from tiermem.host.reading import Reader, Reading, Words
from tiermem.host.shared import SharedChunks
from tiermem.keyindex import Keys
from tiermem.peers import Peers
from tiermem.pooling import Pooling
from tiermem.tier import AT_HOST, AT_NVME, Mask

POOL = 96  # pages; a chunk is a sixth of them
UNITS = 40
SCOPE = b"a model"


@pytest.fixture(autouse=True)
def home(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="tm-") as name:
        monkeypatch.setenv("XDG_RUNTIME_DIR", name)
        monkeypatch.setattr("tiermem.peers.LOOK_EVERY_S", 0.0)
        yield Path(name)


@contextmanager
def engine(
    name: str,
    scope: bytes = SCOPE,
    *,
    pieces: int = 1,
    queued: bool = False,
    path: Path | None = None,
) -> Iterator[Ranks]:
    """All the GPU memory that it can use, and a part of the pool; with a path, a drive as well."""
    unit = PAGE * pieces
    share = Share(group="peers", name=name, total=24 * unit, floor=12 * unit, host=POOL * unit)
    ranks = Ranks(
        ranks=1, units=UNITS, pieces=pieces, budget=12, host=44, share=share, scope=scope,
        queued=queued, path=path, nvme=12, persist=path is not None,
    )  # fmt: skip
    try:
        yield ranks
        ranks.director.check()
    finally:
        ranks.close()


def keys_of(*numbers: int) -> Keys:
    return np.array([[n, n * 7 + 1] for n in numbers], np.uint64)


def go_down(ranks: Ranks, units: list[int], keys: Keys) -> None:
    """These units get content with a key, and then rest in host memory."""
    for i in range(0, len(units), 4):
        part = units[i : i + 4]
        ranks.director.make_room(len(part))
        while ranks.director.room() < len(part):
            ranks.settle()
        ranks.write(*part)
        ranks.settle()
        ranks.director.label(ids(*part), keys[i : i + 4])
        ranks.leave(*part)
    ranks.settle()
    while ranks.director.look(ids(*units)).here.any():
        ranks.director.make_room(11)
        ranks.settle()


def shows(ranks: Ranks, count: int) -> None:
    """Steps until so many pages have been shown."""

    def enough() -> bool:
        ranks.settle()
        return ranks.director.events().get("peers_shown", 0) >= count

    until(enough)


def take(ranks: Ranks, units: list[int], keys: Keys) -> list[int]:
    """Adopt contents, and step until the request is told back; rows without content."""
    ranks.director.make_room(len(units))
    while ranks.director.room() < len(units):
        ranks.settle()
    parents = ids(*[-1] * len(units))
    depths = ids(*range(len(units)))
    ranks.director.adopt(ids(*units), keys, "request", parents=parents, depths=depths)
    return told_back(ranks, "request")


@pytest.mark.parametrize("pieces", [1, 3])
@pytest.mark.parametrize("queued", [False, True])
def test_content_in_the_host_memory_of_one_is_taken_by_another(pieces: int, queued: bool) -> None:
    keys = keys_of(1, 2, 3, 4, 5, 6)
    with engine("a", pieces=pieces) as a, engine("b", pieces=pieces, queued=queued) as b:
        go_down(a, [1, 2, 3, 4, 5, 6], keys)
        shows(a, 6 * pieces)
        assert b.director.find(keys).tolist() == [AT_HOST] * 6
        assert take(b, [11, 12, 13, 14, 15, 16], keys) == []
        b.model = {10 + unit: a.model[unit] for unit in range(1, 7)}
        b.step(read=ids(11, 12, 13, 14, 15, 16))
        b.run()
        assert b.director.events()["peers_taken"] == 6 * pieces
        b.leave(11, 12, 13, 14, 15, 16)
        b.settle()
        a.bring(1, 2, 3, 4, 5, 6)
        a.step(read=ids(1, 2, 3, 4, 5, 6))


def test_a_chain_is_adopted_from_the_drive_and_from_another_engine(tmp_path: Path) -> None:
    keys = keys_of(1, 2, 3, 4, 5)
    with engine("b", path=tmp_path) as before:
        go_down(before, [1, 2], keys[:2])
        values = [before.model[1], before.model[2]]
    with engine("a") as a, engine("b", path=tmp_path) as b:
        go_down(a, [1, 3, 4], keys[1:4])
        shows(a, 3)
        assert b.director.find(keys).tolist() == [AT_NVME, AT_NVME, AT_HOST, AT_HOST]
        assert take(b, [11, 12, 13, 14, 15], keys) == [15], "no one has that"
        b.model = {11: values[0], 12: values[1], 13: a.model[3], 14: a.model[4]}
        b.step(read=ids(11, 12, 13, 14))
        assert b.director.events()["adopted"] == 2
        assert b.director.events()["peers_taken"] == 2


def test_what_is_found_is_the_first_part_of_a_chain() -> None:
    keys = keys_of(1, 2, 3, 4)
    with engine("a") as a, engine("b") as b:
        go_down(a, [1, 2, 4], keys[[0, 1, 3]])
        shows(a, 3)
        assert b.director.find(keys).tolist() == [AT_HOST] * 2
        assert take(b, [11, 12, 13, 14], keys) == [13]
        assert b.director.events()["peers_taken"] == 3


def test_other_bytes_than_were_shown_are_a_miss(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever shows them may overwrite them, or give their memory back, at any moment."""
    keys = keys_of(1, 2, 3)
    with engine("a") as a, engine("b") as b:
        go_down(a, [1, 2, 3], keys)
        shows(a, 3)
        fd, offsets = pool_of(a), places(b, keys)
        os.pwrite(fd, b"spoiled!", offsets[0] + 16)
        os.pwrite(fd, bytes(PAGE), offsets[2])
        assert take(b, [11, 12, 13], keys) == [11, 13]
        b.model[12] = a.model[2]
        b.step(read=ids(12))
        events = b.director.events()
        assert (events["peers_taken"], events["peers_missed"]) == (1, 2)


def pool_of(ranks: Ranks) -> int:
    pooling = ranks.ranks[0].leases.pooling
    assert isinstance(pooling, Pooling)
    return pooling.chunks.fd


def places(ranks: Ranks, keys: Keys) -> list[int]:
    """Where in the pool's file contents are said to be."""
    pooling = ranks.ranks[0].leases.pooling
    assert isinstance(pooling, Pooling)
    scope = np.frombuffer(hashlib.sha256(SCOPE).digest()[:16], np.uint64)
    board = pooling.board()
    try:
        return [int(offset) for offset in board.find(keys ^ scope).offsets]
    finally:
        board.close()


def test_engines_with_another_scope_find_nothing() -> None:
    keys = keys_of(1, 2)
    with engine("a") as a, engine("b", b"another model") as b:
        go_down(a, [1, 2], keys)
        shows(a, 2)
        assert not len(b.director.find(keys))
        assert take(b, [11, 12], keys) == [11, 12]


def test_what_has_left_the_host_tier_is_shown_no_more() -> None:
    keys = keys_of(*range(1, 5))
    with engine("a") as a, engine("b") as b:
        go_down(a, [1, 2, 3, 4], keys)
        shows(a, 4)
        a.director.give_up(ids(1, 2))
        a.settle()
        assert not len(b.director.find(keys))
        assert len(b.director.find(keys[2:])) == 2


def test_after_new_weights_nothing_is_shown_or_taken() -> None:
    keys = keys_of(1, 2)
    with engine("a") as a, engine("b") as b:
        go_down(a, [1, 2], keys)
        go_down(b, [5, 6], keys_of(5, 6))
        shows(a, 2)
        shows(b, 2)
        b.director.forget_content()
        assert not len(b.director.find(keys))
        assert not len(a.director.find(keys_of(5, 6)))
        assert take(b, [11, 12], keys) == [11, 12]
        go_down(b, [7], keys_of(7))
        assert not len(a.director.find(keys_of(7)))


def test_a_request_that_ends_meanwhile_leaves_no_frame_that_is_still_written() -> None:
    """Units of a request that was aborted stay in use until the copies into their frames end."""
    keys = keys_of(1, 2, 3)
    with engine("a") as a, engine("b") as b:
        go_down(a, [1, 2, 3], keys)
        shows(a, 3)
        units = ids(11, 12, 13)
        b.director.adopt(units, keys, "r", parents=ids(-1, -1, -1), depths=ids(0, 1, 2))
        b.director.leave(units, worthless=units)
        assert b.director.in_use(units).all()
        assert told_back(b, "r") == []
        assert not b.director.in_use(units).any()
        b.settle()
        assert not b.director.look(units).here.any(), "nobody will ask for them"


def test_an_engine_alone_hashes_nothing_and_shows_it_once_another_comes() -> None:
    with engine("a") as a:
        go_down(a, [1, 2], keys_of(1, 2))
        for _ in range(5):
            a.settle()
        assert a.director.events().get("peers_shown", 0) == 0
        with engine("b") as b:
            shows(a, 2)
            assert len(b.director.find(keys_of(1, 2))) == 2


VICTIM = """
import sys
import tiermem.peers
tiermem.peers.LOOK_EVERY_S = 0.0
from tests.test_peers import engine, go_down, keys_of, shows
with engine("victim") as ranks:
    go_down(ranks, [1, 2, 3], keys_of(1, 2, 3))
    shows(ranks, 3)
    print("shown", flush=True)
    sys.stdin.read()
"""


def test_what_a_killed_engine_showed_is_a_miss_and_is_swept() -> None:
    keys = keys_of(1, 2, 3)
    with engine("b") as b:
        with subprocess.Popen(
            [sys.executable, "-c", VICTIM],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=Path(__file__).parents[1],
        ) as victim:
            assert victim.stdout is not None
            assert victim.stdout.readline() == b"shown\n"
            assert len(b.director.find(keys)) == 3
            units, none = ids(11, 12, 13), ids(-1, -1, -1)
            b.director.adopt(units, keys, "r", parents=none, depths=ids(0, 1, 2))
            victim.send_signal(signal.SIGKILL)
            victim.wait()
            until(lambda: not len(b.director.find(keys)))
        assert told_back(b, "r") == [11, 12, 13]
        assert b.director.events()["peers_missed"] == 3


def test_the_file_has_the_table_behind_its_chunks() -> None:
    with engine("a") as a:
        pooling = a.ranks[0].leases.pooling
        assert isinstance(pooling, Pooling)
        chunks: SharedChunks = pooling.chunks
        tail = board_bytes(POOL * PAGE)
        assert os.fstat(chunks.fd).st_size == chunks.chunks * chunks.chunk_bytes + tail
        assert chunks.chunks * chunks.chunk_bytes == POOL * PAGE


class Held(Reading):
    """A reading of what is there when the test says so, and that ends when it says so."""

    held: ClassVar[list[Held]] = []

    def __init__(self, look: Callable[[Words], Reading], offsets: Words) -> None:
        self.look = look
        self.offsets = offsets.tolist()
        self.has_ended = False
        Held.held.append(self)

    def go_on(self) -> None:
        self.reading = self.look(np.array(self.offsets, np.uint64))
        assert self.reading.wait(20)

    def ready(self) -> bool:
        return self.has_ended

    @property
    def failed(self) -> Mask | None:
        return self.reading.failed

    def checksums(self) -> Words:
        return self.reading.checksums()


class LateReader(Reader):
    def look(self, offsets: Words) -> Reading:
        return Held(super().look, offsets)


def test_bytes_that_were_another_content_while_they_were_hashed_are_not_shown(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Their slot is given up, gets other bytes, and then those of the key again."""
    monkeypatch.setattr("tiermem.peers.Reader", LateReader)
    monkeypatch.setattr(Peers, "busy", False)  # steps come to rest while something is hashed
    Held.held.clear()
    with engine("a") as a, engine("b"):
        go_down(a, [1], keys_of(1))
        a.settle()
        (first,) = Held.held
        a.director.give_up(ids(1))
        go_down(a, [2], keys_of(2))
        first.go_on()
        a.director.give_up(ids(2))
        go_down(a, [1], keys_of(1))
        first.has_ended = True
        a.settle()
        _, second = Held.held
        assert second.offsets == first.offsets, "it is the same slot"
        assert a.director.events().get("peers_shown", 0) == 0
        second.go_on()
        second.has_ended = True
        shows(a, 1)
