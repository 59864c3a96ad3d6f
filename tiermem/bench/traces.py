"""Readers of request traces: Mooncake, kv-cache-tester, Qwen-Bailian and tiermem's own event log.

Each is a stream of `Request` from a file that is plain, .gz or .xz. A line that cannot be read is
refused with its number (`on_bad="refuse"`), or counted, logged and passed over ("skip").
"""

from __future__ import annotations

import gzip
import hashlib
import heapq
import logging
import lzma
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Annotated, Literal, TypeVar, cast

import msgspec
import numpy as np
import numpy.typing as npt

from tiermem.errors import BadTrace

log = logging.getLogger(__name__)

Blocks = npt.NDArray[np.int64]
OnBad = Literal["refuse", "skip"]
T = TypeVar("T")
Count = Annotated[int, msgspec.Meta(ge=0)]
Time = Annotated[float, msgspec.Meta(ge=0, le=1e15)]

SESSION_GAP_MS = 60_000
"""Sessions of a kv-cache-tester file start this far apart; it does not say when they did."""

GROUP = 8
"""64-token ids of kv-cache-tester that make one block of 512 tokens, as in Mooncake's traces."""

REPORTED = 5
"""Bad lines that are logged one by one before only their number is."""


@dataclass(frozen=True, slots=True)
class Request:
    """One request. blocks: int64[n], the content ids of its prompt, first block first."""

    time_ms: int
    input_tokens: int
    output_tokens: int
    blocks: Blocks
    session: int = -1
    turn: int = 0
    reason: str = ""


class _Mooncake(msgspec.Struct):
    timestamp: Time
    input_length: Count
    output_length: Count
    hash_ids: list[int]


class _Bailian(msgspec.Struct):
    chat_id: int
    parent_chat_id: int
    timestamp: Time
    input_length: Count
    output_length: Count
    turn: int
    hash_ids: list[int]


class _Call(msgspec.Struct):
    """A request of a coding agent, or the mark of a nested agent with requests of its own."""

    t: Time
    type: str
    inputs: int = msgspec.field(name="in", default=0)
    out: int = 0
    hash_ids: list[int] = []
    stop: str = ""
    requests: list[_Call] = []


class _Session(msgspec.Struct):
    requests: msgspec.Raw
    block_size: int = 64
    hash_id_scope: str = "local"


_MOONCAKE = msgspec.json.Decoder(_Mooncake)
_BAILIAN = msgspec.json.Decoder(_Bailian)
_SESSION = msgspec.json.Decoder(_Session)
_CALLS = msgspec.json.Decoder(list[_Call])


def read(path: Path, on_bad: OnBad = "refuse") -> Iterator[Request]:
    """The requests of a trace in any of the known formats, told apart by the first line."""
    readers = {
        "mooncake": read_mooncake,
        "sessions": read_sessions,
        "bailian": read_bailian,
        "log": read_log_requests,
    }
    return readers[kind(path)](path, on_bad)


def kind(path: Path) -> str:
    """mooncake, sessions, bailian or log; raises BadTrace for anything else."""
    for number, line in lines(path):
        try:
            first = msgspec.json.decode(line)
        except msgspec.DecodeError as error:
            raise BadTrace(f"{path}, line {number}: {error}") from None
        fields = set(first) if isinstance(first, dict) else set()
        if "schema" in fields:
            return "log"
        if "requests" in fields:
            return "sessions"
        if {"chat_id", "hash_ids"} <= fields:
            return "bailian"
        if {"timestamp", "hash_ids"} <= fields:
            return "mooncake"
        raise BadTrace(
            f"{path}, line {number}: no known trace: fields {', '.join(sorted(fields)) or 'none'}; "
            "known are Mooncake (timestamp, hash_ids), Qwen-Bailian (chat_id, hash_ids), "
            "kv-cache-tester sessions (requests) and tiermem's log (schema)"
        )
    raise BadTrace(f"{path}: empty")


def read_mooncake(path: Path, on_bad: OnBad = "refuse") -> Iterator[Request]:
    """Requests of a Mooncake jsonl: timestamp (ms), lengths (tokens), ids of 512-token blocks."""
    for row in _decoded(path, _MOONCAKE.decode, on_bad):
        blocks = _ids(row.hash_ids)
        yield Request(int(row.timestamp), row.input_length, row.output_length, blocks)


def read_bailian(path: Path, on_bad: OnBad = "refuse") -> Iterator[Request]:
    """Requests of a Qwen-Bailian jsonl: timestamp (s), ids of 16-token blocks, chat and parent.

    A chat whose parent is known belongs to its parent's session.
    """
    session_of: dict[int, int] = {}
    for row in _decoded(path, _BAILIAN.decode, on_bad):
        session = session_of.get(row.parent_chat_id, row.chat_id)
        session_of[row.chat_id] = session
        blocks = _ids(row.hash_ids)
        time_ms = round(1000 * row.timestamp)
        yield Request(time_ms, row.input_length, row.output_length, blocks, session, row.turn)


def read_sessions(path: Path, on_bad: OnBad = "refuse") -> Iterator[Request]:
    """Requests of a kv-cache-tester file, one session a line, merged in time.

    A session equal to an earlier one is dropped; the k-th that stays starts at k minutes. A block
    is 8 ids; ids of scope "local" mean something within their session only. Requests without a
    whole block are dropped.
    """
    seen: set[bytes] = set()
    waiting: list[tuple[int, int, int, Request]] = []
    names = _Names()
    k = 0
    for session, calls in _decoded(path, _decode_session, on_bad):
        digest = hashlib.blake2b(bytes(session.requests), digest_size=16).digest()
        if digest in seen:
            continue
        seen.add(digest)
        while waiting and waiting[0][0] < k * SESSION_GAP_MS:
            yield heapq.heappop(waiting)[3]
        names.enter(k, session.hash_id_scope)
        flat = sorted(_flat(calls, 0.0), key=lambda call: call[0])
        for position, (t, call) in enumerate(flat):
            blocks = names.blocks(call.hash_ids)
            if len(blocks):
                time_ms = k * SESSION_GAP_MS + round(1000 * t)
                request = Request(time_ms, call.inputs, call.out, blocks, k, position, call.stop)
                heapq.heappush(waiting, (time_ms, k, position, request))
        k += 1
    while waiting:
        yield heapq.heappop(waiting)[3]


def _decode_session(line: bytes) -> tuple[_Session, list[_Call]]:
    session = _SESSION.decode(line)
    return session, _CALLS.decode(session.requests)


def _flat(calls: list[_Call], start: float) -> Iterator[tuple[float, _Call]]:
    for call in calls:
        if call.requests or call.type == "subagent":
            yield from _flat(call.requests, start + call.t)
        else:
            yield start + call.t, call


class _Names:
    """Names for groups of ids: dense numbers, by the whole group within its scope."""

    def __init__(self) -> None:
        self._of: dict[bytes, int] = {}
        self._next = 0

    def enter(self, session: int, scope: str) -> None:
        """What follows is of this session."""
        if scope == "local":
            self._of = {}

    def blocks(self, hash_ids: list[int]) -> Blocks:
        """int64[len // 8]: the name of each whole group."""
        count = len(hash_ids) // GROUP
        raw = _ids(hash_ids[: count * GROUP]).tobytes()
        width, of = 8 * GROUP, self._of
        names = np.empty(count, np.int64)
        for i in range(count):
            group = raw[i * width : (i + 1) * width]
            name = of.get(group)
            if name is None:
                name = of[group] = self._next
                self._next += 1
            names[i] = name
        return names


class Event(msgspec.Struct, frozen=True):
    """One line of tiermem's event log: a fact told to a tier's policy, or what it answered."""

    e: str
    tier: str
    units: list[int]
    now: int
    parents: list[int] | None = None
    depths: list[int] | None = None
    keys: list[int] | None = None
    session: int | None = None
    turn: int | None = None
    reason: str | None = None
    output_tokens: int | None = None
    n: int = 0
    refused: list[int] = []
    policy: str = ""
    priority: int = 0
    until: int = 0
    capacity: int = 1
    params: dict[str, int | float | str | bool] = {}


_EVENT = msgspec.json.Decoder(Event)


class TierHeader(msgspec.Struct, frozen=True):
    policy: str
    capacity: int
    seed: int = 0
    params: dict[str, int | float | str | bool] = {}


class Header(msgspec.Struct, frozen=True):
    """First line of an event log: each tier's policy and its capacity in units."""

    schema: str
    tiers: dict[str, TierHeader]


def read_log(path: Path, on_bad: OnBad = "refuse") -> tuple[Header, Iterator[Event]]:
    """Header and events of a tiermem log, in order."""
    for number, line in lines(path):
        try:
            header = msgspec.json.decode(line, type=Header)
        except msgspec.DecodeError as error:
            raise BadTrace(f"{path}, line {number}: not the header of a log: {error}") from None
        if not header.schema.startswith("tiermem.log.v1"):
            raise BadTrace(f"{path}: schema {header.schema}, this version reads tiermem.log.v1")
        return header, _decoded(path, _EVENT.decode, on_bad, skip=number)
    raise BadTrace(f"{path}: empty")


def read_log_requests(path: Path, on_bad: OnBad = "refuse") -> Iterator[Request]:
    """What was asked of a recorded space, as requests: the `finished` facts of the log if it has
    any, else all units of a tier that were inserted or accessed at one time.

    Blocks are named by content: a unit that left every tier and came back is another block unless
    its key says otherwise. Lengths in tokens are not in the log: input 0.
    """
    _, events = read_log(path, on_bad)
    ends = any(event.e == "finished" for event in events)
    wanted = ("finished",) if ends else ("inserted", "accessed")
    contents, group = _Contents(), dict[int, int]()
    last: Event | None = None
    for event in read_log(path, on_bad)[1]:
        contents.follow(event)
        if event.e not in wanted:
            continue
        new = last is not None and (event.now, event.session) != (last.now, last.session)
        if last is not None and new:
            yield _grouped(last, group)
            group = {}
        group.update((contents.name(unit), contents.depth(unit)) for unit in event.units)
        last = event
    if last is not None and group:
        yield _grouped(last, group)


def _grouped(event: Event, depth_of: dict[int, int]) -> Request:
    blocks = np.array(sorted(depth_of, key=lambda block: depth_of[block]), np.int64)
    session = -1 if event.session is None else event.session
    return Request(
        event.now, 0, event.output_tokens or 0, blocks, session, event.turn or 0, event.reason or ""
    )


class _Contents:
    """Names the content of units as they come and go."""

    def __init__(self) -> None:
        self._tiers: dict[int, set[str]] = {}
        self._name: dict[int, int] = {}
        self._depth: dict[int, int] = {}
        self._by_key: dict[int, int] = {}
        self._next = 0

    def follow(self, event: Event) -> None:
        if event.e == "inserted":
            for i, unit in enumerate(event.units):
                fresh = not self._tiers.setdefault(unit, set())
                self._tiers[unit].add(event.tier)
                self._depth[unit] = event.depths[i] if event.depths else 0
                if event.keys is not None:
                    self._name[unit] = self._by_key.setdefault(event.keys[i], self._next)
                elif fresh or unit not in self._name:
                    self._name[unit] = self._next
                self._next += 1
        elif event.e == "removed":
            for unit in event.units:
                self._tiers.get(unit, set()).discard(event.tier)

    def name(self, unit: int) -> int:
        if unit not in self._name:
            self._name[unit] = self._next
            self._next += 1
        return self._name[unit]

    def depth(self, unit: int) -> int:
        return self._depth.get(unit, 0)


def lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Numbered lines of a file that may be compressed, without the empty ones.

    Raises BadTrace where the file cannot be read on.
    """
    number = 0
    try:
        with _open(path) as file:
            for number, line in enumerate(file, 1):
                if not line.isspace():
                    yield number, line
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        if number == 0 and isinstance(error, FileNotFoundError):
            raise BadTrace(f"{path}: no such file") from None
        raise BadTrace(f"{path}, after line {number}: {error}") from error


def _open(path: Path) -> IO[bytes]:
    if path.suffix == ".gz":
        return cast("IO[bytes]", gzip.open(path, "rb"))
    if path.suffix == ".xz":
        return lzma.open(path, "rb")
    return path.open("rb")


def _decoded(path: Path, decode: Callable[[bytes], T], on_bad: OnBad, skip: int = 0) -> Iterator[T]:
    """Each line decoded, the first `skip` lines left out; bad ones as `on_bad` says."""
    bad = 0
    for number, line in lines(path):
        if number <= skip:
            continue
        try:
            row = decode(line)
        except msgspec.DecodeError as error:
            if on_bad == "refuse":
                raise BadTrace(
                    f"{path}, line {number}: {error}; skip bad lines by on_bad='skip' (--skip-bad)"
                ) from None
            bad += 1
            if bad <= REPORTED:
                log.warning("bad line path=%s line=%d reason=%s", path, number, error)
            continue
        yield row
    if bad:
        log.warning("bad lines skipped path=%s lines=%d", path, bad)


def _ids(hash_ids: list[int]) -> Blocks:
    try:
        return np.array(hash_ids, np.int64)
    except OverflowError:
        # Unsigned 64-bit hashes: the same bits, as signed numbers.
        return np.array(hash_ids, np.uint64).view(np.int64)
