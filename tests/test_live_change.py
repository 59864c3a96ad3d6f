"""A space whose configuration came from a file follows that file; a bad edit changes nothing."""

from __future__ import annotations

import logging
import threading
from pathlib import Path

import pytest

from tiermem import Space
from tiermem.config import Config, load
from tiermem.tier import Place
from tiermem.watch import WatchedFile

LONG_S = 20.0
TOML = """
[gpu]
device = "cpu"
page = "64KiB"
budget = "512KiB"
[host]
capacity = "1MiB"
[evict]
gpu = "{policy}"
{more}
"""


class Lines(logging.Handler):
    """Log messages, and a way to wait for the next one."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []
        self._more = threading.Condition()

    def emit(self, record: logging.LogRecord) -> None:
        with self._more:
            self.lines.append(f"{record.levelname} {record.getMessage()}")
            self._more.notify_all()

    def await_line(self, words: str) -> str:
        def found() -> list[str]:
            return [line for line in self.lines if words in line]

        with self._more:
            assert self._more.wait_for(found, LONG_S), f"no {words!r} among {self.lines}"
            return found()[-1]


@pytest.fixture
def logged() -> object:
    handler, logger = Lines(), logging.getLogger("tiermem.space")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield handler
    logger.setLevel(level)
    logger.removeHandler(handler)


def configured(file: Path, policy: str = "lru", more: str = "") -> Config:
    file.write_text(TOML.format(policy=policy, more=more))
    return load(file, env={})


def test_a_rewritten_file_swaps_the_policy_and_the_marks(tmp_path: Path, logged: Lines) -> None:
    file = tmp_path / "tiermem.toml"
    with Space.open(configured(file)) as space:
        region = space.reserve("512KiB")
        region.allocate(4)
        configured(file, "fifo", "host_params = { learn = 64 }\n[nvme]\nlow = 0.5\n")
        logged.await_line("config changed evict.host_params")
        assert space.statistics().tier(Place.GPU).policy == "fifo"
        assert space.config.nvme.low == 0.5
        assert region.where(range(4)).tolist() == [Place.GPU] * 4
        space.check()


@pytest.mark.parametrize(
    ("policy", "more", "says"),
    [
        ("fiffo", "", "fifo"),
        ("lru", "gpu_parms = {}", "gpu_params"),
        ("lru", "= [", "not TOML"),
        ("lru", "[trace]\npath = '/tmp/x'", "cannot change while a space is open"),
        ("tests.no_such_module:Policy", "", "cannot import"),
    ],
)
def test_a_bad_edit_is_refused_with_one_warning_and_the_next_good_one_is_taken(
    policy: str, more: str, says: str, tmp_path: Path, logged: Lines
) -> None:
    file = tmp_path / "tiermem.toml"
    with Space.open(configured(file)) as space:
        file.write_text(TOML.format(policy=policy, more=more))
        assert says in logged.await_line("config refused")
        assert space.statistics().tier(Place.GPU).policy == "lru"
        configured(file, "fifo")
        logged.await_line("config changed evict.gpu")
        assert space.statistics().tier(Place.GPU).policy == "fifo"
        assert len([line for line in logged.lines if "WARNING" in line]) == 1


def test_what_code_overrode_stays_overridden(tmp_path: Path, logged: Lines) -> None:
    file = tmp_path / "tiermem.toml"
    configured(file)
    given = load(file, env={}, overrides={"evict.host": "fifo", "host.capacity": "2MiB"})
    with Space.open(given) as space:
        configured(file, "fifo", 'host = "lru"')
        logged.await_line("config changed evict.gpu")
        assert space.statistics().tier(Place.HOST).policy == "fifo"


def test_a_file_is_taken_once_it_has_settled_and_only_once(tmp_path: Path) -> None:
    file, clock = tmp_path / "f", iter(range(100))
    file.write_text("a")
    watched = WatchedFile(file, every_s=0.5, clock=lambda: float(next(clock)))
    looks = [watched.rewritten()]
    file.write_text("half")
    looks.append(watched.rewritten())
    file.write_text("half and half")
    looks += [watched.rewritten() for _ in range(3)]
    file.unlink()
    looks += [watched.rewritten() for _ in range(2)]
    assert looks == [False, False, False, True, False, False, False]


def test_looks_that_come_too_early_are_not_taken(tmp_path: Path) -> None:
    file, clock = tmp_path / "f", iter([0.0, 0.1, 0.2, 0.3])
    file.write_text("a")
    watched = WatchedFile(file, every_s=0.5, clock=lambda: next(clock))
    file.write_text("other")
    assert [watched.rewritten() for _ in range(3)] == [False] * 3
