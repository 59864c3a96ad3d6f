"""The commands top, limit, release and yield, on spaces that run in this process."""

from __future__ import annotations

import io
import json
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tests.test_sharing import PAGE, PAGES, config, engine, fill, held, members, verify
from tests.waiting import until
from tiermem import cli
from tiermem.bench import top
from tiermem.ledger import Kind
from tiermem.sharing import Sharing


@pytest.fixture(autouse=True)
def home(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="tm-") as name:
        monkeypatch.setenv("XDG_RUNTIME_DIR", name)
        monkeypatch.setenv("COLUMNS", "250")
        yield Path(name) / "tiermem"


def run(*arguments: str, code: int = 0) -> None:
    with pytest.raises(SystemExit) as left:
        cli.main(arguments)
    assert (left.value.code or 0) == code


Printed = Callable[[], Any]


@pytest.fixture
def printed(capsys: pytest.CaptureFixture[str]) -> Printed:
    """The JSON that the last command wrote."""

    def read() -> Any:
        return json.loads(capsys.readouterr().out)

    return read


def test_top_shows_a_row_for_every_engine(capsys: pytest.CaptureFixture[str]) -> None:
    with engine(config("chat", floor=8)) as (_, region), engine(config("agents")):
        fill(region, 30)
        run("top", "--once")
        out = capsys.readouterr().out
        assert "chat" in out
        assert "agents" in out
        assert "512.0KiB" in out, "the floor"
        assert "#####" in out, "a bar"


def test_top_without_engines_says_so(capsys: pytest.CaptureFixture[str], printed: Printed) -> None:
    run("top", "--once")
    assert "no engine shares" in capsys.readouterr().out
    run("top", "--json", "-")
    assert printed() == {"schema": "tiermem.top.v1", "cards": []}


def test_top_as_json_has_what_scripts_need(home: Path, printed: Printed) -> None:
    with engine(config("chat", floor=8)) as (space, region):
        fill(region, 30)
        mark = 32  # with so many, 30 are below the high mark: the mover gets no more
        until(lambda: held(space) * PAGE == members(home)["chat"].held == mark * PAGE)
        until(lambda: members(home)["chat"].movable == 30 * PAGE)
        run("top", "--json", "-")
        (card,) = printed()["cards"]
        assert (card["device"], card["budget"]) == ("cpu", PAGES * PAGE)
        (row,) = card["engines"]
        assert row["name"] == "chat"
        assert row["held"] == held(space) * PAGE
        assert row["floor"] == 8 * PAGE
        assert row["cap"] is None
        assert card["free"] == card["budget"] - row["held"] - row["reserved"]


def test_the_bar_is_to_scale_and_never_longer_than_the_card() -> None:
    with engine(config("a", floor=16)), engine(config("b", floor=48)):
        (card,) = top.look().cards
        text = top.bar(card).plain
        assert len(text) == top.BAR + 2
        charged = card.budget - card.free
        assert text.count("#") == round(top.BAR * charged / card.budget)


def test_rates_come_from_two_looks(home: Path) -> None:
    with engine(config("a", cap=16)) as (_, region):
        before = top.look()
        pages = fill(region, 10) + fill(region, 10) + fill(region, 10)
        verify(region, pages)
        until(lambda: members(home)["a"].moved_up > 0)
        shown = top.screen(top.look(), before, 1.0)
        console = Console(width=250, record=True, file=io.StringIO())
        console.print(shown)
        assert " / " in console.export_text()


def test_a_limit_moves_pages_down_at_once(home: Path, printed: Printed) -> None:
    with engine(config("chat")) as (space, region):
        pages = fill(region, 40)
        until(lambda: members(home)["chat"].held >= 40 * PAGE)
        run("limit", "chat", "--cap", f"{10 * PAGE}", "--weight", "2", "--json", "-")
        result = printed()
        assert result["reached"]
        assert result["held_before"] >= 40 * PAGE
        assert result["engine"]["held"] <= 10 * PAGE
        assert result["engine"]["weight"] == 2
        assert held(space) <= 10
        verify(region, pages)


def test_a_limit_below_what_is_pinned_says_what_is_held(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with engine(config("chat")) as (space, region):
        pages = fill(region, 40)
        with region.use(pages[:20]):
            until(lambda: members(home)["chat"].held >= 40 * PAGE)
            run("limit", "chat", "--cap", f"{10 * PAGE}", "--wait", "1", code=1)
            out = capsys.readouterr().out
            assert "pinned 1.2MiB" in out
            assert "in use" in out
            until(lambda: held(space) == 20)
        until(lambda: held(space) <= 10)


def test_a_limit_below_what_is_pinned_says_how_soon_the_rest_was_gone(printed: Printed) -> None:
    with engine(config("chat")) as (_, region):
        pages = fill(region, 40)
        with region.use(pages[:20]):
            run("limit", "chat", "--cap", f"{PAGE}", "--wait", "1", "--json", "-", code=1)
            result = printed()
        assert not result["reached"]
        assert result["engine"]["held"] == result["engine"]["pinned"] == 20 * PAGE
        assert 0 < result["pinned_s"] <= result["took_s"]


def test_pages_above_a_limit_come_down_when_they_are_let_go_also_if_nobody_wakes_the_mover(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("tiermem.mover.IDLE_S", 3600.0)
    with engine(config("chat")) as (space, region):
        pages = fill(region, 40)
        with region.use(pages[:20]):
            run("limit", "chat", "--cap", f"{PAGE}", "--wait", "0.5", code=1)
            until(lambda: held(space) == 20)
        until(lambda: held(space) == 1)


def test_a_floor_and_a_part_of_the_card_can_be_given(printed: Printed) -> None:
    with engine(config("chat")):
        run("limit", "chat", "--floor", "25%", "--json", "-")
        assert printed()["engine"]["floor"] == PAGES * PAGE // 4


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("limit", "nobody", "--cap", "1MiB"), "no engine nobody.*twin"),
        (("limit", "twin", "--cap", "1MiB"), "2 engines, give a pid"),
        (("limit", "twin"), "give --cap, --floor or --weight"),
        (("release", "nobody"), "no engine nobody"),
        (("yield", "--bytes", "1MiB", "--for", "999999999"), "no such process"),
        (("yield", "--bytes", "1MiB", "--device", "cuda"), "0 fit.*cpu-default"),
        (("yield", "--bytes", "100GiB"), "floor"),
    ],
)
def test_what_cannot_be_done_is_an_error_with_the_way_out(
    arguments: tuple[str, ...], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with engine(config("twin")), engine(config("twin")):
        run(*arguments, code=2)
        assert re.search(says, capsys.readouterr().err)


def test_a_released_engine_wakes_at_its_next_use(home: Path, printed: Printed) -> None:
    with engine(config("chat", floor=20)) as (_, region):
        pages = fill(region, 40)
        run("release", "chat", "--json", "-")
        result = printed()
        assert result["reached"]
        assert result["engine"]["held"] == PAGE
        assert members(home)["chat"].asleep
        verify(region, pages)
        until(lambda: not members(home)["chat"].asleep)


def test_what_was_pinned_before_is_not_what_a_released_engine_comes_down_to(
    home: Path, printed: Printed, monkeypatch: pytest.MonkeyPatch
) -> None:
    with engine(config("chat")) as (_, region):
        pages = fill(region, 40)
        with region.use(pages):
            until(lambda: members(home)["chat"].pinned == 40 * PAGE)
            monkeypatch.setattr(Sharing, "is_report_due", lambda sharing: False)
        run("release", "chat", "--json", "-")
        assert printed()["engine"]["held"] == PAGE
        verify(region, pages)


def test_room_is_made_and_taken_back_when_the_process_ends(home: Path) -> None:
    with engine(config("chat")) as (space, region):
        pages = fill(region, PAGES)
        with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as job:
            given = ["yield", "--bytes", f"{24 * PAGE}", "--for", str(job.pid)]
            code = f"from tiermem.cli import main; main({given!r})"
            with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as made:
                assert made.stdout is not None
                assert b"are free on cpu" in made.stdout.readline()
                room = members(home)[f"room for {job.pid}"]
                assert (room.kind, room.held) == (Kind.ROOM, 24 * PAGE)
                assert held(space) <= PAGES - 24
                verify(region, pages)
                job.communicate(b"\n")
                assert made.wait(10) == 0
        until(lambda: members(home).keys() == {"chat"})
        with region.use(pages):
            assert held(space) == PAGES


def test_room_ends_with_ctrl_c(home: Path) -> None:
    with engine(config("chat")):
        code = f"from tiermem.cli import main; main(['yield', '--bytes', '{PAGE}'])"
        with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as made:
            assert made.stdout is not None
            made.stdout.readline()
            made.send_signal(signal.SIGINT)
            assert made.wait(10) == 0
        assert members(home).keys() == {"chat"}


def test_room_that_cannot_be_had_says_who_holds_what(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with engine(config("chat")) as (_, region):
        pages = fill(region, PAGES)
        with region.use(pages):
            until(lambda: members(home)["chat"].pinned == PAGES * PAGE)
            run("yield", "--bytes", f"{PAGE}", "--wait", "0.3", code=2)
        assert "0B after 0.3 s; chat holds 4.0MiB (4.0MiB pinned)" in capsys.readouterr().err


def test_room_for_a_while_ends_by_itself(home: Path, printed: Printed) -> None:
    with engine(config("chat")):
        run("yield", "--bytes", f"{PAGE}", "--seconds", "0.05", "--json", "-")
        assert printed()["nbytes"] == PAGE
        assert members(home).keys() == {"chat"}


def test_pages_in_use_are_what_a_released_engine_still_holds(printed: Printed) -> None:
    with engine(config("chat")) as (_, region):
        pages = fill(region, 40)
        with region.use(pages[:5]):
            run("release", "chat", "--json", "-")
            result = printed()
        assert result["reached"]
        assert result["engine"]["held"] == 5 * PAGE
