"""Readers of traces: what they yield, and what they say about files that are broken."""

import gzip
import json
import lzma
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from tiermem.bench import traces
from tiermem.errors import BadTrace

CHAT = {"timestamp": 27, "input_length": 700, "output_length": 9, "hash_ids": [5, 6]}
BAILIAN = {
    "chat_id": 159, "parent_chat_id": -1, "timestamp": 61.114, "input_length": 40,
    "output_length": 132, "type": "text", "turn": 1, "hash_ids": [1089, 1090, 1091],
}  # fmt: skip


def write(path: Path, rows: Sequence[object], opened: Callable[..., object] = open) -> Path:
    text = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    data = text.encode()
    if opened is gzip.open:
        data = gzip.compress(data)
    elif opened is lzma.open:
        data = lzma.compress(data)
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(("suffix", "opened"), [("", open), (".gz", gzip.open), (".xz", lzma.open)])
def test_a_mooncake_trace_is_read_plain_and_compressed(
    tmp_path: Path, suffix: str, opened: Callable[..., object]
) -> None:
    path = write(tmp_path / f"t.jsonl{suffix}", [CHAT, "", CHAT], opened)
    first, second = traces.read(path)
    assert (first.time_ms, first.input_tokens, first.output_tokens) == (27, 700, 9)
    assert first.blocks.tolist() == second.blocks.tolist() == [5, 6]


@pytest.mark.parametrize(
    "bad",
    [
        "{",
        "[1, 2]",
        '{"timestamp": 1}',
        json.dumps({**CHAT, "hash_ids": "5"}),
        json.dumps({**CHAT, "hash_ids": [1, None]}),
        json.dumps({**CHAT, "input_length": -1}),
        json.dumps({**CHAT, "timestamp": 1e300}),
        "\udcff\udcfe".encode("utf-8", "surrogateescape").decode("latin-1"),
    ],
)
def test_a_bad_line_is_refused_with_its_number_or_skipped(tmp_path: Path, bad: str) -> None:
    path = write(tmp_path / "t.jsonl", [CHAT, bad, CHAT])
    with pytest.raises(BadTrace, match="line 2"):
        list(traces.read_mooncake(path))
    assert len(list(traces.read_mooncake(path, on_bad="skip"))) == 2


def test_skipped_lines_are_counted_in_the_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(tmp_path / "t.jsonl", [CHAT, *["x"] * 20])
    assert len(list(traces.read(path, "skip"))) == 1
    assert "lines=20" in caplog.text
    assert "line=2 " in caplog.text
    assert len(caplog.records) == traces.REPORTED + 1


def test_a_file_cut_off_in_the_middle_says_after_which_line(tmp_path: Path) -> None:
    rows = [{**CHAT, "timestamp": i, "hash_ids": list(range(i, i + 50))} for i in range(3000)]
    whole = write(tmp_path / "t.jsonl.gz", rows, gzip.open).read_bytes()
    path = tmp_path / "cut.jsonl.gz"
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(BadTrace, match=r"after line [1-9]\d+"):
        list(traces.read(path))


def test_an_absent_and_an_empty_file_and_an_unknown_format_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(BadTrace, match="no such file"):
        list(traces.read(tmp_path / "none"))
    with pytest.raises(BadTrace, match="empty"):
        list(traces.read(write(tmp_path / "e", [])))
    with pytest.raises(BadTrace, match="fields a, b; known are"):
        list(traces.read(write(tmp_path / "u", [{"b": 1, "a": 2}])))


def test_chats_of_a_bailian_trace_belong_to_their_parents_session(tmp_path: Path) -> None:
    rows = [
        BAILIAN,
        {**BAILIAN, "chat_id": 160},
        {**BAILIAN, "chat_id": 161, "parent_chat_id": 159, "turn": 2},
        {**BAILIAN, "chat_id": 162, "parent_chat_id": 161, "turn": 3, "hash_ids": [2**63 + 5]},
    ]
    found = list(traces.read(write(tmp_path / "t.jsonl", rows)))
    assert [(r.session, r.turn) for r in found] == [(159, 1), (160, 1), (159, 2), (159, 3)]
    assert found[0].time_ms == 61114
    assert found[3].blocks.tolist() == [5 - 2**63]


def call(t: float, ids: Sequence[int], **more: object) -> dict[str, object]:
    return {
        "t": t,
        "type": "n",
        "in": 9,
        "out": 3,
        "hash_ids": list(ids),
        "stop": "tool_use",
    } | more


def test_agent_sessions_are_merged_in_time_without_repeats_and_blocks_are_per_session(
    tmp_path: Path,
) -> None:
    nested = {"t": 70.0, "type": "subagent", "requests": [call(1.5, range(100, 108), stop="")]}
    one = {"id": "a", "requests": [call(0, range(17)), nested, call(90, range(24)), call(91, [1])]}
    two = {"id": "b", "requests": [call(5.0004, range(8))]}
    path = write(tmp_path / "t.jsonl", [one, {**one, "id": "again"}, two])
    found = list(traces.read(path))
    assert [(r.time_ms, r.session, r.turn, r.reason) for r in found] == [
        (0, 0, 0, "tool_use"),
        (65_000, 1, 0, "tool_use"),
        (71_500, 0, 1, ""),
        (90_000, 0, 2, "tool_use"),
    ]
    first, other, inner, last = (r.blocks.tolist() for r in found)
    assert len(first) == 2
    assert last[:2] == first
    assert not set(first + inner + last) & set(other)


def test_sessions_with_ids_of_a_global_scope_share_blocks(tmp_path: Path) -> None:
    rows = [
        {"hash_id_scope": "global", "requests": [call(0, range(8))]},
        {"hash_id_scope": "global", "requests": [call(1, range(8))]},
    ]
    first, second = traces.read(write(tmp_path / "t.jsonl", rows))
    assert first.blocks.tolist() == second.blocks.tolist()


LOG = [
    {"schema": "tiermem.log.v1", "tiers": {"gpu": {"policy": "lru", "capacity": 4}}},
    {"e": "inserted", "tier": "gpu", "units": [3, 2], "parents": [2, -1], "depths": [1, 0],
     "keys": None, "now": 7},
    {"e": "accessed", "tier": "gpu", "units": [2], "now": 9},
    {"e": "victims", "tier": "gpu", "n": 1, "units": [3], "refused": [], "now": 9},
    {"e": "removed", "tier": "gpu", "units": [3], "now": 9},
    {"e": "inserted", "tier": "gpu", "units": [3], "parents": [2], "depths": [1], "now": 12},
]  # fmt: skip


def test_tiermems_own_log_is_read_as_events_and_as_requests(tmp_path: Path) -> None:
    path = write(tmp_path / "t.jsonl", LOG)
    header, events = traces.read_log(path)
    assert header.tiers["gpu"].capacity == 4
    assert [event.e for event in events][:2] == ["inserted", "accessed"]
    found = list(traces.read(path))
    assert [(r.time_ms, len(r.blocks)) for r in found] == [(7, 2), (9, 1), (12, 1)]
    assert found[0].blocks[0] == found[1].blocks[0]
    assert found[2].blocks[0] not in found[0].blocks


def test_a_log_that_knows_the_ends_of_requests_is_read_by_them(tmp_path: Path) -> None:
    end = {"e": "finished", "tier": "gpu", "units": [3, 2], "now": 20, "session": 5, "turn": 1,
           "reason": "stop", "output_tokens": 8}  # fmt: skip
    (found,) = traces.read(write(tmp_path / "t.jsonl", [*LOG[:3], end]))
    assert (found.session, found.turn, found.reason, found.output_tokens) == (5, 1, "stop", 8)
    assert len(found.blocks) == 2


def test_the_conversation_trace_has_the_published_counts(conversation_trace: Path) -> None:
    found = list(traces.read(conversation_trace))
    assert len(found) == 12_031
    assert sum(len(r.blocks) for r in found) == 288_500
    assert len({block for r in found for block in r.blocks.tolist()}) == 182_790


@pytest.mark.slow
def test_the_agent_trace_has_the_published_counts(agent_trace: Path) -> None:
    requests = accesses = 0
    blocks: set[int] = set()
    for found in traces.read(agent_trace):
        requests += 1
        accesses += len(found.blocks)
        blocks.update(found.blocks.tolist())
    assert (requests, accesses, len(blocks)) == (46_218, 10_655_473, 399_146)
