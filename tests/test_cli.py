"""The command line: what it offers, what it prints, and how it fails."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import tiermem
from tiermem import cli
from tiermem.errors import TierMemError


def run(*arguments: str, code: int = 0) -> None:
    with pytest.raises(SystemExit) as left:
        cli.main(arguments)
    assert (left.value.code or 0) == code


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TIERMEM", "TIERMEM_CONFIG", "TIERMEM_LOG"):
        monkeypatch.delenv(name, raising=False)


def in_a_fresh_interpreter(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    return done.stdout


def test_help_names_the_commands_without_importing_any(
    capsys: pytest.CaptureFixture[str],
) -> None:
    run("--help")
    assert "config" in capsys.readouterr().out
    imported = in_a_fresh_interpreter(
        "import sys\n"
        "from tiermem import cli\n"
        "try: cli.main(['--help'])\n"
        "except SystemExit: pass\n"
        "print('IMPORTED', [n for n in sys.modules if n.startswith('tiermem.bench.')])\n"
    )
    assert "IMPORTED []" in imported


def test_only_commands_that_are_there_are_offered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(cli.COMMANDS, "absent", cli.Command("tiermem.bench.not_there", "Nothing."))
    run("absent", code=2)


def test_the_help_of_a_group_names_the_commands_that_are_there(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    group: cli.Group = {
        "here": cli.Command("tiermem.bench.report", "Something."),
        "absent": cli.Command("tiermem.bench.not_there", "Nothing."),
    }
    monkeypatch.setitem(cli.COMMANDS, "group", group)
    run("--help")
    said = capsys.readouterr().out
    assert "Group: here." in said


def test_config_shows_every_value_with_its_source(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "a.toml"
    file.write_text('[gpu]\nbudget = "1GiB"\n')
    run("config", str(file), "--set", "gpu.page=64KiB")
    out = capsys.readouterr().out
    assert 'gpu.budget = "1GiB"' in out
    assert f"# {file}:2" in out
    assert "# override" in out
    run("config", "--json", "--set", "host.capacity=0")
    told = json.loads(capsys.readouterr().out)
    assert told["settings"]["host.capacity"] == {"value": 0, "source": "override"}


def test_config_writes_a_file_that_it_reads_again(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "new.toml"
    run("config", "--set", "gpu.budget=3GiB", "--set", "gpu.guard=true", "--write", str(file))
    run("config", str(file))
    assert 'gpu.budget = "3GiB"' in capsys.readouterr().out
    run("config", "--write", str(file), code=2)
    assert "--force" in capsys.readouterr().err
    run("config", "--write", str(file), "--force")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["config", "--set", "gpu.bugdet=1GiB"], "did you mean gpu.budget?"),
        (["config", "--set", "gpu.budget"], "KEY=VALUE"),
        (["config", "/nowhere/at/all.toml"], "cannot be read"),
        (["config", "--write", "/nowhere/at/all.toml"], "cannot be written"),
    ],
)
def test_an_error_is_one_clear_line_and_exit_code_2(
    capsys: pytest.CaptureFixture[str], arguments: list[str], says: str
) -> None:
    run(*arguments, code=2)
    err = capsys.readouterr().err
    assert says in err
    assert err.startswith("error: ")
    assert "Traceback" not in err


def test_debug_logging_keeps_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIERMEM_LOG", "debug")
    with pytest.raises(TierMemError):
        cli.main(["config", "--set", "nothing=1"])


def test_a_wrong_log_level_is_an_error_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TIERMEM_LOG", "loud")
    run("config", code=2)
    assert "$TIERMEM_LOG" in capsys.readouterr().err


def test_a_missing_library_names_the_extra_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "needs_numba.py").write_text("import numba.not_there\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, "numba", None)
    monkeypatch.setitem(cli.COMMANDS, "needy", cli.Command("needs_numba", "Needs a library."))
    run("needy", code=2)
    assert "pip install 'tiermem[sim]'" in capsys.readouterr().err


def test_the_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    run("--version")
    assert capsys.readouterr().out == f"tiermem {tiermem.__version__}\n"


def test_the_module_runs_like_the_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tiermem", "config"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={},
    )
    assert done.returncode == 0
    assert "gpu.budget" in done.stdout
