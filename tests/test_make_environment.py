"""Set-up where python3-venv is missing: what is fetched is checked, and failures are told."""

import hashlib
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import make_environment
import pytest
from make_environment import Failed

WHEEL = b"the bytes of a wheel"
DIGEST = hashlib.sha256(WHEEL).hexdigest()


class Index:
    """A package index on loopback: paths and what they answer."""

    def __init__(self) -> None:
        pages: dict[str, bytes] = {}

        class Answer(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                content = pages.get(self.path)
                self.send_response(404 if content is None else 200)
                self.end_headers()
                self.wfile.write(content or b"")

            def log_message(self, format: str, *args: object) -> None:
                """Nothing: the test's output is not a log."""

        self.pages = pages
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/simple"
        self._thread = threading.Thread(target=self.server.serve_forever, args=(0.01,))
        self._thread.start()

    def list(self, *links: str) -> None:
        anchors = (link if link.startswith("<") else f'<a href="{link}">x</a>' for link in links)
        self.pages["/simple/pip/"] = "\n".join(anchors).encode()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self._thread.join()


@pytest.fixture
def index() -> Iterator[Index]:
    made = Index()
    yield made
    made.close()


def test_the_newest_final_release_of_pip_is_taken(index: Index, tmp_path: Path) -> None:
    index.list(
        f"../../f/pip-9.0-py3-none-any.whl#sha256={DIGEST}",
        f"/f/pip-24.10-py3-none-any.whl#sha256={DIGEST}",
        f"/f/pip-24.9-py3-none-any.whl#sha256={DIGEST}",
        f"/f/pip-25.0b1-py3-none-any.whl#sha256={DIGEST}",
        f'<a href="/f/pip-26.0-py3-none-any.whl#sha256={DIGEST}" data-yanked="bad">x</a>',
    )
    index.pages["/f/pip-24.10-py3-none-any.whl"] = WHEEL
    wheel = make_environment.fetch_pip(index.url, tmp_path)
    assert wheel.name == "pip-24.10-py3-none-any.whl"
    assert wheel.read_bytes() == WHEEL


@pytest.mark.parametrize("digest", ["#sha256=" + "0" * 64, "#sha256=", "#"])
def test_a_wheel_without_the_digest_of_the_index_is_refused(
    index: Index, tmp_path: Path, digest: str
) -> None:
    index.list(f"/f/pip-1.0-py3-none-any.whl{digest}")
    index.pages["/f/pip-1.0-py3-none-any.whl"] = WHEEL
    with pytest.raises(Failed, match="does not have the digest"):
        make_environment.fetch_pip(index.url, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_an_index_without_pip_is_told(index: Index, tmp_path: Path) -> None:
    with pytest.raises(Failed, match="404"):
        make_environment.fetch_pip(index.url, tmp_path)
    index.list("/f/pip-1.0.tar.gz")
    with pytest.raises(Failed, match="lists no wheel"):
        make_environment.fetch_pip(index.url, tmp_path)


def test_when_every_way_fails_each_says_why(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setattr("sys.executable", "/nowhere/python3")
    with pytest.raises(SystemExit) as left:
        make_environment.make(tmp_path / "env")
    told = str(left.value)
    assert told.count("\n") == 6
    assert "with venv: /nowhere/python3: No such file or directory" in told
    assert "with uv: not installed" in told
    assert told.endswith("`apt install python3-venv`")


def test_a_machine_without_a_compiler_is_noticed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert not make_environment.has_compiler()


def test_a_compiler_that_cannot_compile_is_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    broken = tmp_path / "cc"
    broken.write_text("#!/bin/sh\necho 'stdio.h: No such file' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SystemExit, match=r"libc6-dev[^$]*stdio\.h: No such file"):
        make_environment.has_compiler()
