"""The command `tiermem`. A subcommand's module is imported only when that subcommand is called.

Each subcommand but `config` lives in a module of `tiermem.bench` that has a function `command` with
typer's annotations. A command whose module is not part of this installation is not offered.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import logging
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, NamedTuple

import typer

import tiermem
from tiermem.config import load
from tiermem.errors import ConfigError, TierMemError

FAILED = 2
"""Exit code of every error that tiermem raises on purpose; the same as for wrong usage."""


class Command(NamedTuple):
    """A subcommand: where its function is, and its line in the help."""

    module: str
    help: str


Group = dict[str, "Command | Group"]

COMMANDS: Group = {
    "demo": Command(
        "tiermem.bench.demo", "Replay requests over three tiers and verify every page."
    ),
    "doctor": Command("tiermem.bench.doctor", "Say what works on this machine, and what to do."),
    "bench": {
        "offload": Command("tiermem.bench.offload", "Measure every route between the tiers."),
        "nvme": Command("tiermem.bench.nvme", "Measure the NVMe tier against fio."),
        "breakeven": Command(
            "tiermem.bench.breakeven", "From how many tokens on loading beats computing."
        ),
        "report": Command("tiermem.bench.report", "Write a result as one HTML page."),
        "control": Command("tiermem.bench.control", "Measure the control plane, without bytes."),
    },
    "topo": Command("tiermem.bench.topology", "Draw GPUs, drives and NUMA nodes on their links."),
    "compare": Command("tiermem.bench.compare", "Compare two results of bench offload."),
    "simulate": Command("tiermem.bench.simulate", "Replay a trace against eviction policies."),
    "tune": Command("tiermem.bench.tune", "Choose policies for a recorded trace."),
    "top": Command("tiermem.bench.top", "Watch the engines that share this GPU."),
    "limit": Command("tiermem.bench.limit", "Change what an engine may hold, while it runs."),
    "release": Command("tiermem.bench.release", "Put an engine's cache to sleep in lower tiers."),
    "yield": Command("tiermem.bench.yielding", "Leave room on the GPU for a foreign process."),
    "fsck": Command("tiermem.bench.fsck", "Verify a slab file."),
    "stat": Command("tiermem.bench.stat", "Show a running space's figures once."),
    "config": Command("tiermem.cli", "Show the configuration in force, or write one."),
}

_EXTRA_OF = {
    "cryptography": "crypt",
    "cuda": "cuda",
    "kvikio": "gds",
    "matplotlib": "plot",
    "numba": "sim",
    "pynvml": "topo",
    "torch": "torch",
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit: 0 on success, 2 for an error, what a command chose else."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        start_logging(os.environ)
        build(given)(given, prog_name="tiermem")
    except TierMemError as error:
        if os.environ.get("TIERMEM_LOG", "").lower() == "debug":
            raise
        typer.secho(f"error: {error}", fg="red", err=True)
        sys.exit(FAILED)


def build(arguments: Sequence[str]) -> typer.Typer:
    """The application, with the one command loaded that `arguments` call."""
    app = _group(COMMANDS, arguments, "KV-cache memory at stable addresses, over three tiers.")
    app.callback()(_options)
    return app


def start_logging(env: Mapping[str, str]) -> None:
    """Log to standard error at the level of $TIERMEM_LOG; warnings and above if it is unset."""
    level = load(env={"TIERMEM_LOG": env.get("TIERMEM_LOG", "")}).log.level
    logging.basicConfig(format="%(levelname)s %(name)s %(message)s")
    logging.getLogger("tiermem").setLevel(level.upper())


def command(
    file: Annotated[
        Path | None, typer.Argument(help="TOML file; else the one of $TIERMEM_CONFIG.")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Such as gpu.budget=8GiB."),
    ] = None,
    write: Annotated[
        Path | None, typer.Option(metavar="PATH", help="Write it as commented TOML.")
    ] = None,
    force: Annotated[bool, typer.Option(help="Replace a file that is there.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print values and sources as JSON.")
    ] = False,
) -> None:
    """Show the configuration in force with the source of each value, or write one."""
    config = load(file, overrides=dict(_setting(text) for text in settings or ()))
    if write is not None:
        _write(write, config.toml(), force)
        typer.echo(f"written: {write}")
    elif as_json:
        values = {
            key: {"value": value, "source": config.source(key)}
            for key, value in config.settings().items()
        }
        typer.echo(
            json.dumps({"schema": "tiermem.config.v1", "settings": values}, indent=2, default=str)
        )
    else:
        typer.echo("\n".join(config.describe()))


def _group(commands: Group, arguments: Sequence[str], about: str) -> typer.Typer:
    app = typer.Typer(
        help=about, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False
    )
    called = arguments[0] if arguments else None
    for name, entry in commands.items():
        if isinstance(entry, dict):
            there = (sub for sub, each in entry.items() if isinstance(each, dict) or _exists(each))
            inner = _group(
                entry,
                arguments[1:] if called == name else (),
                f"{name.capitalize()}: {', '.join(there)}.",
            )
            if inner.registered_commands:
                app.add_typer(inner, name=name)
        elif name == called and _exists(entry):
            app.command(name, help=entry.help)(_function(name, entry))
        elif _exists(entry):
            app.command(name, help=entry.help)(_not_called)
    return app


def _exists(entry: Command) -> bool:
    return importlib.util.find_spec(entry.module) is not None


def _function(name: str, entry: Command) -> Callable[..., object]:
    try:
        module = importlib.import_module(entry.module)
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in _EXTRA_OF:
            raise
        extra = _EXTRA_OF[missing]
        raise ConfigError(
            f"tiermem {name} needs {missing}: pip install 'tiermem[{extra}]'"
        ) from None
    function: Callable[..., object] = module.command
    return function


def _not_called() -> None:
    """Stands in for a command in the help."""


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"tiermem {tiermem.__version__}")
        raise typer.Exit


def _options(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Print it.")
    ] = False,
) -> None:
    """KV-cache memory at stable addresses, over GPU memory, pinned host memory and NVMe."""


def _setting(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals:
        raise ConfigError(f"--set {text}: write KEY=VALUE, such as gpu.budget=8GiB")
    return key.strip(), value.strip()


def _write(path: Path, text: str, force: bool) -> None:
    try:
        with path.open("w" if force else "x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise ConfigError(f"{path} is there already; --force replaces it") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}") from None
