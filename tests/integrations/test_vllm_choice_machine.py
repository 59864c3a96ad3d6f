"""Requests that say what they like, and prefixes cut anywhere: what is read is what was written."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest

pytest.importorskip("torch")

from tests.directed_ranks import Ranks
from tests.integrations.test_vllm_scheduler import serve
from tests.integrations.vllm_machine import Machine
from tiermem.config import Prefetch
from tiermem.integrations import vllm_scheduler
from tiermem.integrations.vllm_choice import Choice
from tiermem.integrations.vllm_hints import Hints
from tiermem.policies.recompute import Places


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("persist", [False, True])
def test_random_hints_and_cuts_serve_the_same_bytes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, persist: bool, lag: int
) -> None:
    folders = [tmp_path / str(seed) for seed in range(4)]
    for folder in folders:
        folder.mkdir(mode=0o700)
    runs = [run(monkeypatch, folder, seed, persist, lag) for seed, folder in enumerate(folders)]
    assert sum(runs) > 0, "something was cut"


def run(monkeypatch: pytest.MonkeyPatch, folder: Path, seed: int, persist: bool, lag: int) -> int:
    """Requests of which something was computed again."""
    drawn = Random(seed)

    def cut(choice: Choice, places: Places, *rest: object) -> int:
        return drawn.choice((len(places), len(places), drawn.randint(0, len(places))))

    def hints(request: object) -> Hints:
        return Hints(
            priority=drawn.choice((0, 0, 50)),
            retain_s=drawn.choice((0.0, 0.0, 0.05)),
            session=drawn.choice((None, "a", "b", "c")),
            expected_s=drawn.choice((None, 0.0, 0.01)),
            closed=drawn.random() < 0.2,
            keep=drawn.random() < 0.8,
        )

    monkeypatch.setattr(Choice, "cut", cut)
    monkeypatch.setattr(vllm_scheduler, "hints_of", hints)
    monkeypatch.setattr(vllm_scheduler, "SMALL_BYTES", drawn.choice((0, 32 << 20)))
    ranks = Ranks(
        ranks=1 + seed % 2, units=60, pieces=1 + seed % 2, budget=12, host=8, nvme=24,
        path=folder, persist=persist, seed=seed, queued=True,
        prefetch=Prefetch(name="hint", budget=0.3),
    )  # fmt: skip
    monkeypatch.setattr(vllm_scheduler, "load", lambda: ranks.config)
    machine = Machine(ranks, seed, lag=lag)
    serve(machine, 150)
    machine.engine.check()
    assert machine.seen["finished"] > 5
    assert machine.seen["hits"] > 0
    ranks.close()
    return machine.engine.counts["recomputed"]
