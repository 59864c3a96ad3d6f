"""Start several benches at once and let one of them measure at a time, turn about.

    python bench/side_by_side.py [--log DIR] -- COMMAND ... -- COMMAND ...

Engines take most of a minute to start, and a process has a level of its own: so they start
together, nobody measures before all are ready or have ended, and then each measures a little in
turn, so that what moves the machine moves all of them. A bench asks for its turn by `turn()`, which
does nothing when it runs by itself. The exit code is that of the first command that failed.
"""

from __future__ import annotations

import itertools
import os
import selectors
import socket
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

PATH = "BENCH_TURNS"
_ASK, _GO, _DONE = b"?", b"!", b"."
_LOOK_S = 0.2
_to_launcher: list[socket.socket] = []


@contextmanager
def turn() -> Iterator[None]:
    """Measure only in here: nobody else does at that time."""
    path = os.environ.get(PATH)
    if path is None:
        yield
        return
    if not _to_launcher:
        _to_launcher.append(socket.socket(socket.AF_UNIX))
        _to_launcher[0].connect(path)
    launcher = _to_launcher[0]
    launcher.sendall(_ASK)
    if launcher.recv(1) != _GO:
        raise SystemExit("the launcher of this bench has ended")
    try:
        yield
    finally:
        launcher.sendall(_DONE)


class Turns:
    """Gives turns to whoever asks, in order, once all commands ask or have ended."""

    def __init__(self, path: Path) -> None:
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._asking: deque[socket.socket] = deque()
        self._measuring: socket.socket | None = None
        self._begun = False

    def serve(self, children: Sequence[subprocess.Popen[bytes]]) -> None:
        """Until every command has ended."""
        while running := sum(child.poll() is None for child in children):
            for key, _ in self._selector.select(_LOOK_S):
                client = key.fileobj
                assert isinstance(client, socket.socket)
                if client is self._listener:
                    self._selector.register(client.accept()[0], selectors.EVENT_READ)
                else:
                    self._hear(client)
            self._begun |= len(self._asking) >= running
            if self._begun and self._asking and self._measuring is None:
                self._measuring = self._asking.popleft()
                self._measuring.sendall(_GO)

    def close(self) -> None:
        for key in list(self._selector.get_map().values()):
            assert isinstance(key.fileobj, socket.socket)
            key.fileobj.close()
        self._selector.close()

    def _hear(self, client: socket.socket) -> None:
        try:
            said = client.recv(16)
        except ConnectionError:
            said = b""
        if (not said or _DONE in said) and client is self._measuring:
            self._measuring = None
        if not said:
            self._selector.unregister(client)
            if client in self._asking:
                self._asking.remove(client)
            client.close()
        elif _ASK in said:
            self._asking.append(client)


def run(commands: Sequence[Sequence[str]], log: Path) -> list[int]:
    """Exit codes. What command n says goes to n.log."""
    log.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "turns"
        turns = Turns(path)
        children = []
        try:
            for n, command in enumerate(commands):
                with (log / f"{n}.log").open("wb") as lines:
                    children.append(
                        subprocess.Popen(
                            command, stdout=lines, stderr=lines, env={**os.environ, PATH: str(path)}
                        )
                    )
            turns.serve(children)
        finally:
            turns.close()
            for child in children:
                child.terminate()
        return [child.wait() for child in children]


def main() -> None:
    given = sys.argv[1:]
    log = Path("side-by-side")
    if given[:1] == ["--log"]:
        log, given = Path(given[1]), given[2:]
    groups = itertools.groupby(given, lambda word: word == "--")
    commands = [list(words) for is_dash, words in groups if not is_dash]
    if not commands:
        raise SystemExit(__doc__)
    codes = run(commands, log)
    for n, (command, code) in enumerate(zip(commands, codes, strict=True)):
        print(f"{log / f'{n}.log'}: exit code {code}: {' '.join(command)}", flush=True)
    raise SystemExit(next((code for code in codes if code), 0))


if __name__ == "__main__":
    main()
