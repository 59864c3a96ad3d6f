"""Opens a page in headless Chromium over the DevTools pipe and says what happened to it."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import shutil
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--hide-scrollbars",
    "--remote-debugging-pipe",
)
NAMES = ("chromium", "chromium-browser", "google-chrome")


def find() -> str | None:
    return next((path for name in NAMES if (path := shutil.which(name))), None)


@dataclass
class Seen:
    """What a page did: console messages that are errors or warnings, addresses it asked for."""

    errors: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    values: dict[str, Any] = field(default_factory=dict)
    screenshot: bytes = b""


class Pipe:
    """The DevTools protocol: JSON messages that end in a zero byte, over two pipes."""

    def __init__(self, to_browser: int, from_browser: int) -> None:
        self.to_browser, self.from_browser = to_browser, from_browser
        self.buffer = b""
        self.next_id = 0
        self.session: str | None = None
        self.events: list[dict[str, Any]] = []

    def receive(self) -> dict[str, Any]:
        while b"\0" not in self.buffer:
            data = os.read(self.from_browser, 1 << 20)
            if not data:
                raise EOFError("the browser ended")
            self.buffer += data
        message, self.buffer = self.buffer.split(b"\0", 1)
        decoded: dict[str, Any] = json.loads(message)
        return decoded

    def call(self, method: str, **params: object) -> dict[str, Any]:
        """Send a command and return its result; events that come first are kept."""
        self.next_id += 1
        message = {"id": self.next_id, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.to_browser, json.dumps(message).encode() + b"\0")
        while True:
            got = self.receive()
            if got.get("id") != self.next_id:
                self.events.append(got)
                continue
            if "error" in got:
                raise RuntimeError(f"{method}: {got['error']}")
            result: dict[str, Any] = got["result"]
            return result

    def until(self, method: str) -> None:
        while not any(event.get("method") == method for event in self.events):
            self.events.append(self.receive())


@contextmanager
def browser(program: str) -> Iterator[Pipe]:
    """A fresh headless browser; its pipe for as long as the block lasts."""
    ends = [*os.pipe(), *os.pipe()]
    # out of the way of 3 and 4, from which the browser reads and to which it writes
    in_read, in_write, out_read, out_write = (
        fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 10) for fd in ends
    )
    for fd in ends:
        os.close(fd)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        nothing = [(os.POSIX_SPAWN_OPEN, fd, os.devnull, os.O_RDWR, 0) for fd in (0, 1, 2)]
        pipes = [(os.POSIX_SPAWN_DUP2, in_read, 3), (os.POSIX_SPAWN_DUP2, out_write, 4)]
        arguments = [program, *FLAGS, f"--user-data-dir={profile}"]
        pid = os.posix_spawn(program, arguments, os.environ, file_actions=[*nothing, *pipes])
        os.close(in_read)
        os.close(out_write)
        try:
            pipe = Pipe(in_write, out_read)
            yield pipe
            pipe.session = None
            pipe.call("Browser.close")
        finally:
            os.close(in_write)
            os.close(out_read)
            _reap(pid)


def _reap(pid: int, timeout_s: float = 10) -> None:
    watch = os.pidfd_open(pid)
    if not select.select([watch], [], [], timeout_s)[0]:
        os.kill(pid, signal.SIGKILL)
    os.close(watch)
    os.waitpid(pid, 0)


def open_page(program: str, page: Path, expressions: dict[str, str], dark: bool = False) -> Seen:
    """Load a file, evaluate JavaScript expressions in it, take a picture of all of it."""
    with browser(program) as pipe:
        target = pipe.call("Target.createTarget", url="about:blank")["targetId"]
        attached = pipe.call("Target.attachToTarget", targetId=target, flatten=True)
        pipe.session = attached["sessionId"]
        for domain in ("Page", "Network", "Log", "Runtime"):
            pipe.call(f"{domain}.enable")
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        pipe.call("Emulation.setEmulatedMedia", features=[scheme])
        metrics = {"width": 1160, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        pipe.call("Emulation.setDeviceMetricsOverride", **metrics)
        pipe.events.clear()
        pipe.call("Page.navigate", url=page.resolve().as_uri())
        pipe.until("Page.loadEventFired")
        seen = Seen()
        for name, expression in expressions.items():
            answer = pipe.call("Runtime.evaluate", expression=expression, returnByValue=True)
            seen.values[name] = answer["result"].get("value")
        picture = pipe.call("Page.captureScreenshot", captureBeyondViewport=True)
        seen.screenshot = base64.b64decode(picture["data"])
        for event in pipe.events:
            _note(seen, event.get("method", ""), event.get("params", {}))
    return seen


def _note(seen: Seen, method: str, params: dict[str, Any]) -> None:
    if method == "Network.requestWillBeSent":
        seen.requests.append(params["request"]["url"])
    elif method == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
        seen.errors.append(params["entry"]["text"])
    elif method == "Runtime.exceptionThrown":
        seen.errors.append(params["exceptionDetails"]["text"])
    elif method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
        seen.errors.append(str(params["args"]))
