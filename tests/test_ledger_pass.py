"""A file is passed from process to process, to nobody else, and never waited for for long."""

from __future__ import annotations

import os
import socket
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.waiting import until
from tiermem import ledger_pass
from tiermem.ledger_pass import Porter, receive

LABEL = b"a pool of 4 chunks"


@pytest.fixture
def ledger() -> Iterator[Path]:
    """A ledger's path; what is passed lies beside it."""
    with tempfile.TemporaryDirectory(prefix="tm-") as name:
        yield Path(name) / "host-default.ledger"


@contextmanager
def offered(ledger: Path, content: bytes) -> Iterator[Porter]:
    """A file with this content, offered by this process."""
    fd = os.memfd_create("offered")
    os.write(fd, content)
    porter = Porter(ledger, LABEL, lambda: os.open(f"/proc/self/fd/{fd}", os.O_RDWR))
    try:
        yield porter
    finally:
        porter.close()
        os.close(fd)


def descriptors() -> set[str]:
    return set(os.listdir("/proc/self/fd"))


def test_whoever_asks_gets_the_very_file_and_an_opening_of_its_own(ledger: Path) -> None:
    with offered(ledger, b"here"):
        one, two = receive(ledger, LABEL), receive(ledger, LABEL)
        assert one is not None
        assert two is not None
        assert os.fstat(one).st_ino == os.fstat(two).st_ino
        assert os.pread(two, 4, 0) == b"here"
        os.lseek(one, 2, os.SEEK_SET)
        assert os.lseek(two, 0, os.SEEK_CUR) == 0, "locks would be shared as well"
        os.close(one)
        os.close(two)
    assert receive(ledger, LABEL) is None
    assert list(ledger.parent.iterdir()) == []


def test_another_file_is_not_taken_for_ours(ledger: Path) -> None:
    with offered(ledger, b"here"):
        before = descriptors()
        assert receive(ledger, b"a pool of 8 chunks") is None
        until(lambda: len(descriptors()) == len(before))  # the porter lets go of its own, too


def test_a_foreign_user_is_given_nothing_and_believed_nothing(
    ledger: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def is_from_us(uid: int) -> bool:
        asked.append(uid)
        return threading.current_thread() is threading.main_thread() and len(asked) > 2

    monkeypatch.setattr(ledger_pass, "is_from_us", is_from_us)
    with offered(ledger, b"here"):
        assert receive(ledger, LABEL) is None  # the newcomer does not believe
        while len(asked) < 2:
            pass
        assert receive(ledger, LABEL) is None  # the holder does not give
    assert set(asked) == {os.geteuid()}


def test_the_socket_of_a_dead_process_is_removed(ledger: Path) -> None:
    left = ledger.with_name("host-default.1.pool")
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as dead:
        dead.bind(str(left))
    with offered(ledger, b"here"):
        fd = receive(ledger, LABEL)
        assert fd is not None
        os.close(fd)
    assert not left.exists()


def test_a_holder_that_does_not_answer_is_passed_over(
    ledger: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(ledger_pass, "ANSWER_S", 0.05)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as stopped:
        stopped.bind(str(ledger.with_name("host-default.1.pool")))
        stopped.listen(1)
        assert receive(ledger, LABEL) is None
        with offered(ledger, b"here"):
            got: list[int] = []

            def answers() -> bool:  # it has 50 ms too, and may be off the CPU for longer
                fd = receive(ledger, LABEL)
                got.extend([] if fd is None else [fd])
                return bool(got)

            until(answers)
            os.close(got[0])
    assert "host pool not received" in caplog.text


def test_a_directory_without_room_for_a_socket_is_said_and_survived(
    ledger: Path, caplog: pytest.LogCaptureFixture
) -> None:
    in_the_way = ledger.with_name(f"host-default.{os.getpid()}.pool")
    in_the_way.mkdir()
    (in_the_way / "something").touch()
    with offered(ledger, b"here"):
        assert receive(ledger, LABEL) is None
    assert "host pool not offered" in caplog.text
