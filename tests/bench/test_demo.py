"""The demo end to end: what it counts, what it notices, and how it fails."""

from __future__ import annotations

import ctypes
import json
import signal
import tempfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from tiermem import cli
from tiermem.assemble import Parts, assemble
from tiermem.bench import demo
from tiermem.bench.demo_content import HostContent, TorchContent, base_words, mixed
from tiermem.bench.demo_replay import BlockMap, Replay
from tiermem.bench.demo_report import Report
from tiermem.bench.demo_setup import configuration, slab_directory
from tiermem.bench.generate import generate
from tiermem.bench.traces import Request, read_mooncake
from tiermem.bench.workload import Workload, collect
from tiermem.config import Config, load
from tiermem.nvme.cap import bytes_for
from tiermem.space import Space
from tiermem.tier import Done, Fence, Memory, Place, Route, Slots

PAGE = 4096
Play = Callable[..., dict[str, object]]


def config_of(
    directory: Path, *, gpu: int, host: int = 0, nvme: int = 0, policy: str = "lru"
) -> Config:
    """Tiers of so many pages on the CPU device; the GPU makes room only when it must."""
    below: dict[str, object] = {"nvme.mode": "off"}
    if nvme:
        below = {"nvme.path": directory / "slab", "nvme.capacity": bytes_for(nvme, PAGE)}
    given = {
        "gpu.device": "cpu",
        "gpu.page": PAGE,
        "gpu.budget": gpu * PAGE,
        "host.capacity": host * PAGE,
        **below,
        "gpu.high": 1.0,
        "gpu.low": 1.0,
        "evict.gpu": policy,
    }
    return load(env={}, overrides=given)


def chats(requests: int = 150) -> Workload:
    return collect(generate(seed=3, requests=requests))


def write_trace(
    path: Path, requests: Sequence[Request], broken: dict[int, str] | None = None
) -> Path:
    """A Mooncake file; broken: text that stands before the request of that number."""
    lines = []
    for number, request in enumerate(requests):
        lines += [broken[number]] if broken and number in broken else []
        row = {
            "timestamp": request.time_ms,
            "input_length": request.input_tokens,
            "output_length": request.output_tokens,
            "hash_ids": request.blocks.tolist(),
        }
        lines.append(json.dumps(row))
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    return write_trace(tmp_path / "small.jsonl", list(generate(seed=3, requests=60)))


@pytest.fixture
def play(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Play:
    """Run the command; its JSON."""

    def run(*arguments: str, code: int = 0) -> dict[str, object]:
        small = ("--page", "4KiB", "--nvme-path", str(tmp_path / "nvme"))
        with pytest.raises(SystemExit) as left:
            cli.main(["demo", *small, "--json", str(tmp_path / "out.json"), *arguments])
        assert (left.value.code or 0) == code, capsys.readouterr().err
        out = tmp_path / "out.json"
        return dict(json.loads(out.read_text())) if out.exists() else {}

    return run


# -------------------------------------------------------------------- the whole of it


def test_every_page_comes_back_right_over_three_tiers(play: Play, trace: Path) -> None:
    told = play("--trace", str(trace), "--gpu", "3%", "--host", "10%", "--nvme", "60%")
    assert told["schema"] == "tiermem.demo.v1"
    assert told["complete"] is True
    assert told["requests"] == 60
    assert told["pages_wrong"] == 0
    verified, hits = told["pages_verified"], told["prefix_hits"]
    assert isinstance(verified, int)
    assert isinstance(hits, dict)
    assert verified == told["hits"]
    assert 0 < sum(hits.values()) <= verified
    assert hits["nvme"] > 0


def test_each_of_the_six_directions_moved_bytes_or_says_why_not(play: Play, trace: Path) -> None:
    told = play("--trace", str(trace), "--gpu", "3%", "--host", "10%", "--nvme", "0")
    routes = told["routes"]
    assert isinstance(routes, list)
    assert len(routes) == 6
    for route in routes:
        assert (route["pages"] > 0) == (route["why_none"] is None)
        assert route["bytes"] == route["pages"] * PAGE
        if "nvme" in (route["src"], route["dst"]):
            assert route["why_none"] == "the nvme tier is off"


def test_the_tables_and_the_picture_name_what_was_asked_for(
    capsys: pytest.CaptureFixture[str], trace: Path, tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    picture = tmp_path / "picture.png"
    small = ["--page", "4KiB", "--gpu", "64KiB", "--host", "10%", "--nvme", "50%"]
    with pytest.raises(SystemExit):
        cli.main(["demo", "--trace", str(trace), *small, "--plot", str(picture)])
    out = capsys.readouterr().out
    for words in ("prefix hits", "found in nvme", "GB/s", "p50 / p99", "held by gpu (classq)",
                  "pages verified", "pages wrong", "Residence over 60 requests"):  # fmt: skip
        assert words in out
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_json_to_standard_output_stands_alone_there(
    capsys: pytest.CaptureFixture[str], trace: Path
) -> None:
    with pytest.raises(SystemExit):
        cli.main(["demo", "--trace", str(trace), "--page", "4KiB", "--host", "0", "--nvme", "0",
                  "--gpu", "20%", "--limit", "20", "--json", "-"])  # fmt: skip
    assert json.loads(capsys.readouterr().out)["requests"] == 20


def test_an_interrupted_run_ends_with_what_it_has(
    play: Play, trace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual, before = Replay.request, signal.getsignal(signal.SIGINT)

    def interrupted(self: Replay, index: int) -> None:
        usual(self, index)
        if index == 6:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Replay, "request", interrupted)
    told = play("--trace", str(trace), "--gpu", "10%", code=demo.INTERRUPTED)
    assert told["requests"] == 7
    assert told["complete"] is False
    assert signal.getsignal(signal.SIGINT) is before


# -------------------------------------------------------------------- the rule of a request


def reference(workload: Workload, capacity: int, policy: str) -> int:
    """Prefix hits of the request-mode rule, block by block; the oldest stands first."""
    held: OrderedDict[int, None] = OrderedDict()
    prefix_hits = 0
    for request in range(workload.requests):
        blocks = workload.of(request).tolist()
        resident = [block in held for block in blocks]
        prefix_hits += resident.index(False) if False in resident else len(blocks)
        missing = [block for block in blocks if block not in held]
        if policy == "lru":
            touch(held, blocks)
        for block in reversed(missing):
            if len(held) == capacity:
                victim = next((old for old in held if old not in blocks), None)
                if victim is None:
                    continue
                del held[victim]
            held[block] = None
        if policy == "lru":
            touch(held, blocks)
    return prefix_hits


def touch(held: OrderedDict[int, None], blocks: list[int]) -> None:
    for block in reversed(blocks):
        if block in held:
            held.move_to_end(block)


@pytest.mark.parametrize("policy", ["lru", "fifo"])
@pytest.mark.parametrize("capacity", [24, 200, 600])
def test_prefix_hits_on_the_gpu_alone_are_those_of_the_rule(
    tmp_path: Path, policy: str, capacity: int
) -> None:
    workload = chats()
    with Space.open(config_of(tmp_path, gpu=capacity, policy=policy)) as space:
        told = demo.run(space, workload, "made")
    assert told.prefix_hits["gpu"] == reference(workload, capacity, policy)
    assert told.pages_wrong == 0
    assert not told.hints
    assert (told.blocks_not_stored > 0) == (capacity < np.diff(workload.start).max())


def test_a_block_that_a_request_names_twice_is_one_page(tmp_path: Path) -> None:
    blocks = np.array([7, 8, 7, 9], np.int64)
    workload = collect([Request(0, 0, 0, blocks), Request(1, 0, 0, blocks)])
    with Space.open(config_of(tmp_path, gpu=8, host=8)) as space:
        told = demo.run(space, workload, "made")
    assert told.prefix_hits["gpu"] == 4
    assert told.pages_stored == told.pages_verified == 3


def test_a_request_longer_than_the_gpu_is_served_in_parts(tmp_path: Path) -> None:
    blocks = np.arange(40)
    workload = collect([Request(time_ms, 0, 0, blocks) for time_ms in range(3)])
    with Space.open(config_of(tmp_path, gpu=8, host=64)) as space:
        told = demo.run(space, workload, "made")
    assert sum(told.prefix_hits.values()) == 2 * len(blocks)
    assert told.pages_wrong == told.blocks_not_stored == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("policy", "percent", "prefix_hits"),
    [
        ("lru", 1, 15_138),
        ("lru", 5, 56_483),
        ("lru", 10, 80_466),
        ("fifo", 1, 14_806),
        ("fifo", 5, 50_591),
        ("fifo", 10, 71_586),
    ],
)
def test_the_conversation_trace_gives_the_integers_of_the_rule(
    conversation_trace: Path, tmp_path: Path, policy: str, percent: int, prefix_hits: int
) -> None:
    workload = collect(read_mooncake(conversation_trace))
    pages = workload.capacity(percent)
    with Space.open(config_of(tmp_path, gpu=pages, policy=policy)) as space:
        told = demo.run(space, workload, "conversations")
    assert (told.accesses, told.prefix_hits["gpu"]) == (288_500, prefix_hits)
    assert told.pages_wrong == 0


@pytest.mark.slow
def test_the_conversation_trace_moves_bytes_in_all_directions(
    conversation_trace: Path, play: Play
) -> None:
    told = play("--trace", str(conversation_trace), "--page", "64KiB")
    routes = told["routes"]
    assert isinstance(routes, list)
    assert (told["requests"], told["pages_wrong"]) == (12_031, 0)
    assert all(route["pages"] for route in routes)


# -------------------------------------------------------------------- what it notices


class Flipping:
    """Flips one bit of each source slot behind everybody's back, then copies."""

    def __init__(self, route: Route, memory: Memory) -> None:
        self.src, self.dst = route.src, route.dst
        self._route, self._memory = route, memory

    def submit(self, src: Slots, dst: Slots, after: Fence) -> Done:
        for address in self._memory.addresses(src).tolist():
            ctypes.c_uint8.from_address(address + 100).value ^= 4
        return self._route.submit(src, dst, after)

    def close(self) -> None:
        self._route.close()


class FirstUnreadable:
    """A Done whose first entry failed, as one whose checksum differs does."""

    def __init__(self, done: Done, entries: int) -> None:
        self._done = done
        self.error = OSError("checksum differs")
        self.failed = np.arange(entries) == 0

    def ready(self) -> bool:
        return self._done.ready()

    def wait(self, timeout_s: float | None = None) -> bool:
        return self._done.wait(timeout_s)


class Unreadable:
    """Copies, and says that the first entry of each group cannot be read."""

    def __init__(self, route: Route) -> None:
        self.src, self.dst = route.src, route.dst
        self._route = route

    def submit(self, src: Slots, dst: Slots, after: Fence) -> Done:
        return FirstUnreadable(self._route.submit(src, dst, after), len(src))

    def close(self) -> None:
        self._route.close()


def opened_with(plant: Callable[[Parts], None]) -> Callable[[Config], Space]:
    def opened(config: Config) -> Space:
        parts = assemble(config)
        plant(parts)
        return Space(config, parts)

    return opened


def flip_on_the_way_up(parts: Parts) -> None:
    route = parts.routes[Place.HOST, Place.GPU]
    memory = parts.tiers[Place.HOST]
    parts.routes[Place.HOST, Place.GPU] = Flipping(route, memory)  # type: ignore[arg-type]


def test_a_wrong_bit_in_host_memory_is_noticed_and_fails_the_command(
    play: Play, trace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Space, "open", opened_with(flip_on_the_way_up))
    told = play("--trace", str(trace), "--gpu", "5%", "--host", "50%", "--nvme", "0", code=1)
    wrong, first = told["pages_wrong"], told["first_wrong"]
    assert isinstance(wrong, int)
    assert isinstance(first, list)
    assert wrong > 0
    assert any("found in host, does not hold the bytes of block" in said for said in first)


def test_a_page_that_cannot_be_read_back_is_a_miss_and_not_wrong(tmp_path: Path) -> None:
    def plant(parts: Parts) -> None:
        for dst in (Place.GPU, Place.HOST):
            route = parts.routes[Place.NVME, dst]
            parts.routes[Place.NVME, dst] = Unreadable(route)

    config = config_of(tmp_path, gpu=16, host=16, nvme=400)
    with opened_with(plant)(config) as space:
        told = demo.run(space, chats(60), "made", hints=False)
    assert told.requests == 60
    assert told.pages_lost > 0
    assert told.pages_wrong == 0
    assert any("lost" in note for note in told.notes)


def test_pages_of_any_two_blocks_differ_in_every_word() -> None:
    words, mix = base_words(PAGE), mixed(np.arange(10_000))
    assert len(np.unique(mix)) == 10_000
    one, other = words + mix[0], words + mix[1]
    assert (one != other).all()
    assert (one[1:] != one[:-1]).all()


def test_kernels_and_the_processor_write_and_check_the_same_bytes(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    with Space.open(config_of(tmp_path, gpu=8)) as space, space.reserve(16 * PAGE) as region:
        pages, ids = region.allocate(6), np.arange(6)
        by_kernel, by_processor = TorchContent(region), HostContent(region)
        with region.use(pages, "fresh"):
            by_kernel.fill(pages, ids)
            assert not by_processor.wrong(pages, ids).any()
            region.view()[pages[2], 17] ^= 1
            for content in (by_kernel, by_processor):
                assert content.wrong(pages, ids).tolist() == [False, False, True, *[False] * 3]


def test_a_page_that_is_told_gone_twice_leaves_its_successor_alone() -> None:
    known = BlockMap(blocks=4, pages=8)
    first, second = np.array([2], np.int32), np.array([5], np.int32)
    known.remember(np.array([1], np.int32), first)
    known.forget(first)
    known.remember(np.array([1], np.int32), second)
    known.forget_gone(first, "evicted")
    assert known.pages(np.array([1], np.int32)).tolist() == [5]
    known.forget_gone(second, "lost")
    assert known.pages(np.array([1], np.int32)).tolist() == [-1]
    assert known.take_lost().tolist() == [5]
    assert known.take_lost().tolist() == []


# -------------------------------------------------------------------- bad input and set-up


def test_a_broken_line_is_named_or_passed_over(
    tmp_path: Path, play: Play, capsys: pytest.CaptureFixture[str]
) -> None:
    requests = list(generate(seed=3, requests=10))
    broken = write_trace(tmp_path / "broken.jsonl", requests, {3: '{"timestamp": 1, "hash_'})
    sizes = ("--gpu", "20%", "--host", "0", "--nvme", "0")
    with pytest.raises(SystemExit) as left:
        cli.main(["demo", "--trace", str(broken)])
    assert left.value.code == 2
    assert "broken.jsonl, line 4" in capsys.readouterr().err
    told = play("--trace", str(broken), "--on-bad", "skip", *sizes)
    assert told["requests"] == 10


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--trace", "/nowhere/at/all.jsonl"], "no such file"),
        (["--gpu", "0"], "gpu.budget"),
        (["--gpu", "12X"], "gpu.budget"),
        (["--gpu", "300%"], "gpu.budget"),
        (["--host", "900TiB"], "host.capacity"),
        (["--nvme", "900TiB"], "nvme.capacity"),
        (["--marks", "0.9"], "HIGH,LOW"),
        (["--marks", "0.5,0.9"], "high"),
        (["--policy", "lruu"], "lruu"),
        (["--page", "auto"], "name a size"),
        (["--device", "cuda:0", "--page", "64KiB"], "2MiB"),
        (["--config", "/nowhere/at/all.toml"], "cannot be read"),
    ],
)
def test_what_cannot_be_meant_is_one_clear_line(
    capsys: pytest.CaptureFixture[str], arguments: list[str], says: str
) -> None:
    with pytest.raises(SystemExit) as left:
        cli.main(["demo", "--limit", "5", *arguments])
    err = capsys.readouterr().err
    assert left.value.code == 2
    assert err.startswith("error: ")
    assert says in err


def test_options_go_before_the_file_and_the_file_before_the_demos_sizes(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text('[gpu]\ndevice = "cpu"\nbudget = "1MiB"\nhigh = 0.9\nlow = 0.8\n')
    workload = chats(20)
    told = configuration(file, {"host.capacity": "50%"}, workload, tmp_path / "slab")
    assert (told.gpu.budget, told.gpu.high, told.gpu.page) == (1 << 20, 0.9, 64 << 10)
    assert told.host.capacity == workload.capacity(50) * (64 << 10)
    assert not told.nvme.enabled
    own = configuration(None, {}, workload, tmp_path / "slab")
    assert own.gpu.budget == workload.capacity(1) * (64 << 10)
    assert own.nvme.path == tmp_path / "slab"


def test_a_slab_without_a_named_place_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with slab_directory(None) as made:
        (made / "slab").write_bytes(b"bytes")
        assert made.exists()
    assert not made.exists()
    with slab_directory(tmp_path / "named") as named:
        assert named == tmp_path / "named"


def test_generated_requests_repeat_and_build_on_what_was_said() -> None:
    def told(requests: Iterator[Request]) -> list[tuple[int, list[int]]]:
        return [(request.time_ms, request.blocks.tolist()) for request in requests]

    assert told(generate(seed=1, requests=200)) == told(generate(seed=1, requests=200))
    last: dict[int, list[int]] = {}
    for request in generate(seed=1, requests=400):
        before = last.get(request.session, [])
        assert request.blocks[: len(before)].tolist() == before
        assert request.turn == 0 or before
        last[request.session] = request.blocks.tolist()
    times = [request.time_ms for request in generate(seed=1, requests=400)]
    assert times == sorted(times)


def test_a_report_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    import msgspec

    with Space.open(config_of(tmp_path, gpu=16, host=32)) as space:
        told = demo.run(space, chats(20), "made")
    assert msgspec.json.decode(msgspec.json.encode(told), type=Report) == told
