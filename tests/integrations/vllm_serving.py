"""A real vLLM engine in a child process: what to serve, how it is configured, and its answer."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.integrations.children import python, run_child

CHILD = Path(__file__).with_name("vllm_child.py")
BLOCK = 131072
"""Bytes of a block of the child's model: 32 tokens, 4 layers, K and V of 2 heads of 64 float32."""
EVERY_LOAD_IS_WAITED_FOR = "every load is waited for"
HYBRID_BLOCK = 65536
"""Of the hybrid one: a block holds two of its six layers."""
MIXED_UP = "loads bring other blocks"
NO_ORDERS = "orders are not carried out"


@dataclass(frozen=True, slots=True)
class Round:
    """So many requests at once, of 200 to 899 tokens drawn from a seed."""

    seed: int = 1
    count: int = 16
    new: int = 24


@dataclass(frozen=True, slots=True)
class Scenario:
    """toml: tiermem's configuration; None: without tiermem. kill: SIGKILL at the end.

    apart: the engine in a process of its own. changes: what tiermem is made to do otherwise.
    limits: (step, bytes) at which the GPU budget changes. kind: of model (`vllm_child.CONFIGS`).
    """

    rounds: Sequence[Round]
    options: Mapping[str, object] = field(default_factory=dict)
    toml: str | None = None
    apart: bool = False
    kill: bool = False
    changes: Sequence[str] = ()
    limits: Sequence[tuple[int, int]] = ()
    kind: str = "llama"


@dataclass(frozen=True, slots=True)
class Ended:
    """How a child ended. counted: by the director and the scheduler's side, up to the last step."""

    status: int
    log: str
    rounds: list[dict[str, Any]]
    counted: dict[str, int]
    pid: int

    def tokens(self) -> list[list[list[int]]]:
        """Of each round and request; fails if the engine did not serve to its end."""
        assert self.rounds, self.log[-3000:]
        return [round_["tokens"] for round_ in self.rounds]

    def cached(self) -> list[int]:
        """Prompt tokens of each round that were not computed."""
        return [round_["cached"] for round_ in self.rounds]


def release() -> tuple[int, int]:
    """Of the engine that is run, (0, 32) for 0.32.0."""
    command = "from tiermem.integrations.vllm_seams import installed; print(*installed())"
    engine = python("TIERMEM_VLLM_PYTHON", "test-engines")
    env = {k: v for k, v in os.environ.items() if not k.startswith("TIERMEM")}
    said = subprocess.run(
        [engine, "-c", command], env=env, capture_output=True, text=True, check=True
    )
    major, minor = said.stdout.split()
    return int(major), int(minor)


def run(scenario: Scenario, folder: Path, model: Path) -> Ended:
    """Serve a scenario in `folder`, which may hold what an earlier run left there."""
    folder.mkdir(parents=True, exist_ok=True)
    told = folder / "told.json"
    told.unlink(missing_ok=True)
    given = {
        "model": str(model / scenario.kind),
        "kind": scenario.kind,
        "options": dict(scenario.options),
        "rounds": [{"seed": r.seed, "count": r.count, "new": r.new} for r in scenario.rounds],
        "kill": scenario.kill,
    }
    env = {
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_ENABLE_V1_MULTIPROCESSING": str(int(scenario.apart)),
        "VLLM_NO_USAGE_STATS": "1",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TOLD": str(told),
        "LIMITS": json.dumps(list(scenario.limits)),
        "CHANGES": json.dumps(list(scenario.changes)),
        "TIERMEM": "0",
    }
    if scenario.toml is not None:
        config = folder / "tiermem.toml"
        config.write_text(scenario.toml)
        env |= {"TIERMEM": "1", "TIERMEM_CONFIG": str(config)}
    command = [python("TIERMEM_VLLM_PYTHON", "test-engines"), str(CHILD)]
    child = run_child(command, folder, given, env)
    counted = json.loads(told.read_text()) if told.exists() else {}
    answer = child.answer
    return Ended(child.status, child.log, answer.get("rounds", []), counted, answer.get("pid", 0))
