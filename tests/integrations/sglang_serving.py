"""A real SGLang engine in a child process: what to serve, how it is configured, and its answer."""

from __future__ import annotations

import os
import re
import socket
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.integrations.children import python, run_child

ENVIRONMENT = ("TIERMEM_SGLANG_PYTHON", "test-engines-sglang")
CHILD = Path(__file__).with_name("sglang_child.py")
PAGE = 16384
"""Bytes of a page of the child's model: 16 tokens, 2 layers, 2 KV heads of 32 float32."""


@dataclass(frozen=True, slots=True)
class Round:
    """Requests (seed, length) that are sent at once.

    meanwhile: commands of tiermem, in turn. truncate: a folder whose slabs lose their bytes before.
    """

    prompts: Sequence[tuple[int, int]]
    new: int = 24
    flush: bool = False
    meanwhile: Sequence[Sequence[str]] = ()
    truncate: str = ""


@dataclass(frozen=True, slots=True)
class Scenario:
    """toml: tiermem's configuration; None: without tiermem. kill: SIGKILL at the end.

    on: SGLang serves over tiermem; else the configuration is there for its storage backend.
    """

    rounds: Sequence[Round]
    options: Mapping[str, object] = field(default_factory=dict)
    toml: str | None = None
    on: bool = True
    env: Mapping[str, str] = field(default_factory=dict)
    kill: bool = False


@dataclass(frozen=True, slots=True)
class Ended:
    """How a child ended. rounds: for each request tokens, logprobs, cached, reason (or error)."""

    status: int
    log: str
    rounds: list[list[dict[str, Any]]]
    metrics: list[str]

    def outputs(self) -> list[list[tuple[list[int], list[float]]]]:
        """Tokens and their log probabilities; fails if a request had no answer."""
        assert self.rounds, self.log[-3000:]
        return [[(r["tokens"], r["logprobs"]) for r in requests] for requests in self.rounds]

    def cached(self, round_: int) -> list[int]:
        return [request["cached"] for request in self.rounds[round_]]

    def moved(self, src: str, dst: str, rank: int = 0) -> int:
        """Pages that arrived on a route."""
        found = re.search(
            rf'tiermem_route_pages_total\{{dst="{dst}",src="{src}"\}} (\S+)', self.metrics[rank]
        )
        return int(float(found.group(1))) if found else 0

    def counted(self, event: str, rank: int = 0) -> int:
        found = re.search(rf'tiermem_events_total\{{event="{event}"\}} (\S+)', self.metrics[rank])
        return int(float(found.group(1))) if found else 0


def release() -> str:
    """The version of SGLang there."""
    ask = "from importlib.metadata import version; print(version('sglang'))"
    command = [python(*ENVIRONMENT), "-c", ask]
    told = subprocess.run(command, check=True, capture_output=True, text=True)
    return told.stdout.strip()


def run(scenario: Scenario, folder: Path, model: Path) -> Ended:
    """Serve a scenario in `folder`, which may hold what an earlier run left there."""
    folder.mkdir(parents=True, exist_ok=True)
    ranks = int(str(scenario.options.get("tp_size", 1)))
    ports = _free_ports(ranks) if scenario.toml is not None and scenario.on else []
    given = {
        "model": str(model),
        "options": dict(scenario.options),
        "rounds": [
            {
                "prompts": r.prompts,
                "new": r.new,
                "flush": r.flush,
                "meanwhile": r.meanwhile,
                "truncate": r.truncate,
            }
            for r in scenario.rounds
        ],
        "ports": ports,
        "kill": scenario.kill,
    }
    env = {
        "TRITON_INTERPRET": "1",
        "SGLANG_USE_CPU_ENGINE": "0",
        "SGLANG_ENABLE_ASYNC_ASSERT": "1",  # what its kernels on a GPU trap anyway, and more
        "SGLANG_CPU_OMP_THREADS_BIND": "|".join("0" * ranks),
        "HF_HUB_OFFLINE": "1",
        "XDG_RUNTIME_DIR": str(folder),
        **scenario.env,
    }
    if scenario.toml is not None:
        config = folder / "tiermem.toml"
        metrics = f"[metrics]\nport = {ports[0]}\n" if ports else ""
        config.write_text(f"{scenario.toml}\n{metrics}")
        env |= {"TIERMEM": str(int(scenario.on)), "TIERMEM_CONFIG": str(config)}
    command = [python(*ENVIRONMENT), str(CHILD)]
    child = run_child(command, folder, given, env)
    answer = child.answer
    return Ended(child.status, child.log, answer.get("rounds", []), answer.get("metrics", []))


def _free_ports(count: int) -> list[int]:
    """Ports next to one another that nobody listens on."""
    for first in range(20000 + os.getpid() % 20000, 60000, 10):
        ports = list(range(first, first + count))
        if all(_is_free(port) for port in ports):
            return ports
    raise AssertionError("no free ports")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0
