"""Engines run in a child process, so that a stray access kills only it: its status, log, answer."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

LONG_S = 600
_NAMED = dict(os.environ)
"""As it was before the session's fixture removes our variables."""


@dataclass(frozen=True, slots=True)
class Child:
    """How a child ended. answer: what it wrote, empty if it died before."""

    status: int
    log: str
    answer: dict[str, Any]


def python(variable: str, target: str) -> str:
    """The interpreter that a variable names (`make TARGET` sets it), or the test is skipped."""
    named = _NAMED.get(variable, "")
    if not named or not Path(named).exists():
        pytest.skip(f"${variable} names no environment with the engine: make {target}")
    return named


def run_child(
    command: list[str], folder: Path, scenario: Mapping[str, object], env: Mapping[str, str]
) -> Child:
    """Run `command SCENARIO.json` in `folder`, where it writes answer.json.

    env: beside the variables of this process, of which TIERMEM* are left out.
    """
    answer, log = folder / "answer.json", folder / "log.txt"
    answer.unlink(missing_ok=True)
    given = folder / "scenario.json"
    given.write_text(json.dumps({**scenario, "answer": str(answer)}))
    mine = {k: v for k, v in os.environ.items() if not k.startswith("TIERMEM")}
    with log.open("wb") as out:
        child = subprocess.Popen(
            [*command, str(given)],
            stdout=out, stderr=out, cwd=folder, env={**mine, **env}, start_new_session=True,
        )  # fmt: skip
        try:
            status = child.wait(LONG_S)
        finally:
            _end_group(child.pid)
    made = json.loads(answer.read_text()) if answer.exists() else {}
    return Child(status, log.read_text(errors="replace"), made)


def _end_group(group: int) -> None:
    """The scheduler and others that the child may have left behind."""
    try:
        os.killpg(group, signal.SIGKILL)
    except ProcessLookupError:
        return
