from __future__ import annotations

import os
from html.parser import HTMLParser
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from tests.bench import chromium
from tests.bench.fixtures.results import MADE, result, row
from tiermem.bench.report import command, html
from tiermem.bench.result import Check, Result, write

MIB = 1 << 20
STEADY = (0.985, 1.0, 1.01, 0.99, 1.015)


def rounds(rate: float) -> list[float]:
    return [rate * factor for factor in STEADY]


def full() -> Result:
    """A made result with every kind of row that the report draws."""
    rows = []
    for nbytes, part in ((MIB // 4, 0.9), (2 * MIB, 1.0), (8 * MIB, 1.01)):
        for group, share in ((16, 0.93), (64, 1.0)):
            rate = part * share
            pair = (nbytes, group)
            rows += [
                row("host-gpu", "host", "gpu:0", rounds(54 * rate), *pair, percent=97.0 * rate),
                row("gpu-host", "gpu:0", "host", rounds(54.5 * rate), *pair, percent=98.0 * rate),
                row("nvme-host", "nvme", "host", rounds(3.1 * rate), *pair, path="posix O_DIRECT"),
                row("host-nvme", "host", "nvme", rounds(2.4 * rate), *pair, path="posix O_DIRECT"),
            ]
    rows += [
        row("in-place", "host", "gpu:0", rounds(52), page_us=None, path="shown in place"),
        row("host-gpu", "host", "gpu:0", rounds(91), direction="both"),
        row("host-gpu", "host", "gpu:0", rounds(53), beside="disk"),
        row("host-gpu", "host", "gpu:0", rounds(31), beside="python-thread"),
    ]
    checks = (Check.of("loads from host", "another tool", rounds(54), rounds(55.3)),)
    return result(rows, notes=("made for a test",), checks=checks)


class Page(HTMLParser):
    """Tags and every attribute that could fetch something."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.fetches: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.fetches += [name for name, _ in attrs if name in ("src", "href", "srcset", "data")]


def test_the_page_has_no_script_and_nothing_to_fetch() -> None:
    text = html(full())
    page = Page(text)
    assert page.fetches == []
    assert not {"script", "link", "img", "iframe", "object"} & set(page.tags)
    assert "@import" not in text
    assert "url(" not in text
    assert page.tags.count("svg") == 5


def test_figures_of_the_result_stand_on_the_page() -> None:
    text = html(full(), "Slot 3")
    assert "<h1>Slot 3</h1>" in text
    assert "54.5 GB/s" in text
    assert "Made GPU" in text
    assert "made for a test" in text
    assert text.count("<tr>") == 2 + len(full().rows) + len(full().checks)
    assert "another tool" in text
    assert "0.976" in text


def test_names_cannot_break_out_of_the_page() -> None:
    evil = "<script>alert(1)</script>"
    machine = type(MADE)(
        cpu=evil, cores=1, memory_bytes=1 << 30, kernel=evil, numa_nodes=1, virtual=None
    )
    rows = [row("host-gpu", evil, "gpu:0", rounds(1), path=evil)]
    page = Page(html(result(rows, machine=machine, notes=(evil,)), evil))
    assert "script" not in page.tags


def test_an_interrupted_run_and_an_emulated_device_are_said_first() -> None:
    text = html(result([row("host-gpu", "host", "gpu:0", [5.0])], complete=False, device="cpu"))
    assert "interrupted" in text
    assert "nothing about a GPU" in text


def test_a_result_without_rows_or_optional_figures_still_makes_a_page() -> None:
    assert "<h1>" in html(result([]))
    bare = row("in-place", "host", "gpu:0", [5.0], page_us=None)
    assert "svg" in Page(html(result([bare]))).tags


VISIBLE = """
[...document.querySelectorAll('figure svg')].filter(chart => {
  const box = chart.getBoundingClientRect();
  const bars = [...chart.querySelectorAll('rect')].slice(1).filter(
    bar => bar.getBoundingClientRect().width > 2 && getComputedStyle(bar).fill !== 'none');
  return box.width > 300 && box.height > 80 && bars.length > 0;
}).length
"""
CLIPPED = """
[...document.querySelectorAll('figure svg')].flatMap(chart => {
  const box = chart.getBoundingClientRect();
  return [...chart.querySelectorAll('text')].filter(text => {
    const own = text.getBoundingClientRect();
    return own.left < box.left - 0.5 || own.right > box.right + 0.5
      || own.top < box.top - 0.5 || own.bottom > box.bottom + 0.5;
  }).map(text => text.textContent);
})
"""
OVERFLOW = "document.documentElement.scrollWidth - document.documentElement.clientWidth"

needs_browser = pytest.mark.skipif(
    chromium.find() is None, reason="no chromium (Debian: apt-get install chromium)"
)


def artefacts(fallback: Path) -> Path:
    """Where pictures are kept: $TEST_ARTEFACTS, or pytest's own folder."""
    folder = Path(os.environ.get("TEST_ARTEFACTS", fallback))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@needs_browser
@pytest.mark.parametrize("dark", [False, True])
def test_a_browser_shows_every_chart_without_an_error_or_a_request(
    tmp_path: Path, dark: bool
) -> None:
    page = tmp_path / "report.html"
    page.write_text(html(full()))
    asked = {"visible": VISIBLE, "clipped": CLIPPED, "overflow": OVERFLOW}
    seen = chromium.open_page(chromium.find() or "", page, asked, dark)
    name = f"report-{'dark' if dark else 'light'}.png"
    (artefacts(tmp_path) / name).write_bytes(seen.screenshot)
    assert seen.errors == []
    assert seen.requests == [page.resolve().as_uri()]
    assert seen.values == {"visible": 5, "clipped": [], "overflow": 0}
    assert seen.screenshot.startswith(b"\x89PNG")


@needs_browser
def test_the_browser_would_see_an_error_and_a_request_if_there_were_one(tmp_path: Path) -> None:
    page = tmp_path / "bad.html"
    page.write_text('<img src="other.png"><script>console.error("x"); f()</script>')
    seen = chromium.open_page(chromium.find() or "", page, {"visible": VISIBLE})
    assert [url.rsplit("/", 1)[1] for url in seen.requests] == ["bad.html", "other.png"]
    assert len(seen.errors) >= 2
    assert seen.values == {"visible": 0}


def test_the_command_writes_the_page(tmp_path: Path) -> None:
    write(full(), tmp_path / "r.json")
    app = typer.Typer()
    app.command()(command)
    ran = CliRunner().invoke(app, [str(tmp_path / "r.json"), str(tmp_path / "r.html")])
    assert ran.exit_code == 0, ran.output
    assert (tmp_path / "r.html").read_text() == html(full())
