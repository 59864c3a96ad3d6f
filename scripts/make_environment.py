"""Make a virtual environment that has pip, and a C compiler if the system has none.

    python3 scripts/make_environment.py .venv

Needs nothing but Python 3.11's standard library. Where the system's `venv` cannot install pip
(Debian and Ubuntu without the package python3-venv), another tool that is there makes the
environment, and in the last resort pip's own wheel, fetched from the package index and checked
against the digest that the index gives.
"""

from __future__ import annotations

import hashlib
import html.parser
import os
import re
import shutil
import subprocess
import sys
import tempfile
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

INDEX = "https://pypi.org/simple"
COMPILERS = ("cc", "gcc", "clang")
WAY_OUT = "install the package that Debian and Ubuntu keep it in: `apt install python3-venv`"


class Failed(Exception):
    """A way of making the environment that did not work; the message says why."""


def main(folder: Path) -> None:
    if not works(folder):
        make(folder)
    if not has_compiler():
        print("no C compiler found: the package ziglang serves as one", flush=True)
        run([python_of(folder), "-m", "pip", "install", "--quiet", "ziglang"])


def make(folder: Path) -> None:
    """Try one way after the other; say what each of them said if all of them fail."""
    said = []
    ways = (with_venv, with_uv, with_virtualenv, with_pip_of_the_system, with_pip_from_the_index)
    for way in ways:
        shutil.rmtree(folder, ignore_errors=True)
        try:
            way(folder)
        except Failed as error:
            said.append(f"  {way.__name__.replace('_', ' ')}: {error}")
        else:
            if works(folder):
                return
            said.append(f"  {way.__name__.replace('_', ' ')}: made no working pip")
    shutil.rmtree(folder, ignore_errors=True)
    raise SystemExit("\n".join(["no virtual environment could be made:", *said, WAY_OUT]))


def with_venv(folder: Path) -> None:
    run([sys.executable, "-m", "venv", str(folder)])


def with_uv(folder: Path) -> None:
    run([_tool("uv"), "venv", "--quiet", "--seed", "--python", sys.executable, str(folder)])


def with_virtualenv(folder: Path) -> None:
    run([_tool("virtualenv"), "--quiet", "--python", sys.executable, str(folder)])


def with_pip_of_the_system(folder: Path) -> None:
    run([sys.executable, "-m", "venv", "--without-pip", str(folder)])
    run([sys.executable, "-m", "pip", "--python", python_of(folder), "install", "--quiet", "pip"])


def with_pip_from_the_index(folder: Path) -> None:
    run([sys.executable, "-m", "venv", "--without-pip", str(folder)])
    with tempfile.TemporaryDirectory() as scratch:
        wheel = fetch_pip(os.environ.get("PIP_INDEX_URL", INDEX), Path(scratch))
        run([python_of(folder), f"{wheel}/pip", "install", "--quiet", "--no-deps", str(wheel)])


def fetch_pip(index: str, into: Path) -> Path:
    """The newest final release of pip's wheel, checked against the digest in its link."""
    page = f"{index.rstrip('/')}/pip/"
    links = _Links(page)
    links.feed(_read(page).decode())
    if not links.wheels:
        raise Failed(f"{page} lists no wheel")
    _, url = max(links.wheels)
    address, _, digest = url.partition("#sha256=")
    content = _read(address)
    if not digest or hashlib.sha256(content).hexdigest() != digest:
        raise Failed(f"{address} does not have the digest that the index gives")
    wheel = into / address.rpartition("/")[2]
    wheel.write_bytes(content)
    return wheel


class _Links(html.parser.HTMLParser):
    """Collects (version, address) of the final releases on an index page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.page = page
        self.wheels: list[tuple[tuple[int, ...], str]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        link = dict(attrs).get("href") or ""
        version = re.search(r"/pip-([\d.]+)-py3-none-any\.whl#", link)
        if tag == "a" and version and "data-yanked" not in dict(attrs):
            numbers = tuple(int(part) for part in version[1].split("."))
            self.wheels.append((numbers, urllib.parse.urljoin(self.page, link)))


def _read(url: str) -> bytes:
    request = urllib.request.Request(url, headers={"Accept": "text/html"})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return bytes(answer.read())
    except (OSError, urllib.error.URLError) as error:
        raise Failed(f"{url}: {error}") from None


def has_compiler() -> bool:
    """Whether the system's C compiler, if there is one, makes a program with the C library."""
    found = next(filter(None, map(shutil.which, COMPILERS)), None)
    if found is None:
        return False
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch, "probe.c")
        source.write_text('#include <stdio.h>\nint main(void) { return puts("") < 0; }\n')
        done = subprocess.run(
            [found, str(source), "-o", str(source.with_suffix(""))],
            capture_output=True,
            text=True,
            check=False,
        )
    if done.returncode:
        raise SystemExit(
            f"{found} is there but cannot compile a small program: `apt install libc6-dev`\n"
            f"{done.stderr.strip()}"
        )
    return True


def works(folder: Path) -> bool:
    """Whether the environment's pip starts."""
    try:
        run([python_of(folder), "-m", "pip", "--version"])
    except Failed:
        return False
    return True


def python_of(folder: Path) -> str:
    return str(folder / "bin" / "python")


def run(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise Failed(f"{command[0]}: {error.strerror}") from None
    if done.returncode:
        lines = (done.stderr.strip() or done.stdout.strip() or "no message").splitlines()
        raise Failed(f"{' '.join(command[:4])} ended with {done.returncode}: {lines[-1]}")


def _tool(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        raise Failed("not installed")
    return found


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1] if len(sys.argv) > 1 else ".venv"))
    except Failed as error:
        raise SystemExit(str(error)) from None
