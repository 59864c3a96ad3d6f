"""The scheduler's side beside a small vLLM scheduler, over real ranks on the CPU device."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")

from tests.directed_ranks import PAGE, Ranks, ids, spoil
from tests.integrations.vllm_fakes import BLOCK_TOKENS
from tests.integrations.vllm_machine import Machine, Step
from tests.waiting import LONG_S, until
from tiermem import Share, peers
from tiermem.directed.director import Director, Look, Units
from tiermem.errors import TierFull
from tiermem.integrations import vllm_metrics, vllm_scheduler
from tiermem.integrations.vllm_scheduler import EngineSide
from tiermem.integrations.vllm_worker import RANKS
from tiermem.plan import Access
from tiermem.policies.recompute import RouteSpeed
from tiermem.testing import LateRoute
from tiermem.tier import GPU, HOST, NVME


def serve(machine: Machine, steps: int) -> None:
    """Random requests, aborts, and budgets; then everything is served to its end."""
    for _ in range(steps):
        serve_step(machine)
    finish(machine)


def serve_step(machine: Machine) -> None:
    drawn = machine.random
    frames, unit = machine.frames, machine.ranks.layout.unit_bytes
    if len(machine.requests) < 8 and drawn.random() < 0.5:
        prompt = drawn.randint(1, machine.longest - 2)
        machine.ask(drawn.randrange(4), prompt, drawn.randint(1, machine.longest - prompt))
    if machine.requests and drawn.random() < 0.05:
        live = [*machine.running, *machine.waiting]
        if live:
            machine.abort(drawn.choice(live))
    if drawn.random() < 0.05:
        machine.engine.limit(drawn.randint(frames // 2 + 1, frames) * unit)
    machine.step()


def finish(machine: Machine) -> None:
    machine.engine.limit(machine.frames * machine.ranks.layout.unit_bytes)
    machine.drain()


def come_when_waited_for(ranks: Ranks) -> None:
    """From now on what comes from the host is there once a stream or a thread waits for it."""
    for rank in ranks.ranks:
        host, frames = (rank._parts.tiers[place] for place in (HOST, GPU))
        rank._executor._routes[HOST, GPU] = LateRoute(host, frames)  # type: ignore[arg-type]


def random_requests(
    monkeypatch: pytest.MonkeyPatch, folder: Path, seed: int, *, lag: int
) -> Machine:
    """With a drive, and two ranks, at every other seed; at some, loads that come no sooner than
    they are waited for."""
    nvme = 16 if seed % 2 else 0
    ranks = Ranks(
        ranks=1 + seed % 2, units=40, pieces=1 + seed % 3, budget=12, host=14,
        nvme=nvme, path=folder if nvme else None, seed=seed, queued=True,
    )  # fmt: skip
    monkeypatch.setattr(vllm_scheduler, "load", lambda: ranks.config)
    if seed % 3 == 2:
        come_when_waited_for(ranks)
    machine = Machine(ranks, seed, lag=lag, whole=seed % 2 == 0)
    serve(machine, 150)
    ranks.close()
    return machine


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("small", [0, 32 << 20], ids=["deferred", "at once"])
@pytest.mark.parametrize("seed", range(6))
def test_random_requests_read_what_was_written_and_all_end(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, seed: int, small: int, lag: int
) -> None:
    monkeypatch.setattr(vllm_scheduler, "SMALL_BYTES", small)
    machine = random_requests(monkeypatch, tmp_path, seed, lag=lag)
    assert machine.seen["finished"] > 5
    assert machine.seen["hits"] > 0


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("small", [0, 32 << 20], ids=["deferred", "at once"])
@pytest.mark.parametrize("windows", [(6, 0), (9, 9, 0), (0, 5, 12), (7,)], ids=str)
def test_tables_with_windows_give_blocks_back_and_read_what_was_written(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, windows: Sequence[int], small: int, lag: int
) -> None:
    monkeypatch.setattr(vllm_scheduler, "SMALL_BYTES", small)
    hits = 0
    for seed in range(3):
        machine = hybrid_requests(monkeypatch, tmp_path / str(seed), seed, windows, lag)
        assert machine.seen["finished"] > 5
        assert machine.seen["given back"] > 20
        hits += machine.seen["hits"]
    assert hits > 0


def hybrid_requests(
    monkeypatch: pytest.MonkeyPatch, folder: Path, seed: int, windows: Sequence[int], lag: int
) -> Machine:
    nvme = 24 if seed % 2 else 0
    ranks = Ranks(
        ranks=1 + seed % 2, units=90, budget=12 * len(windows) + 12, host=40,
        nvme=nvme, path=folder if nvme else None, seed=seed, queued=True,
    )  # fmt: skip
    monkeypatch.setattr(vllm_scheduler, "load", lambda: ranks.config)
    machine = Machine(
        ranks, seed, lag=lag, whole=seed % 2 == 0, windows=windows, sparse=seed % 3 == 1
    )
    serve(machine, 120)
    ranks.close()
    return machine


def _whole_prefix(side: Any, hashes: Sequence[bytes], hits: int) -> list[Any] | None:
    found = [side._pool.get_cached_block(block_hash, [0]) for block_hash in hashes[:hits]]
    return [blocks[0] for blocks in found if blocks] if all(found) else None


FAULTS: dict[str, tuple[str, Callable[..., object]]] = {
    "as many free blocks as there are virtual ones": (
        "_free_blocks",
        lambda side: side._pool.free_block_queue.num_free_blocks,
    ),
    "blocks taken since the last orders have frames": ("_note_taken", lambda side: None),
    "hits of a waiting request are not looked at": (
        "_is_held_back",
        lambda side, request, prefix, hits: False,
    ),
    "what another waits for is here": ("_awaits_another", lambda side, prefix: False),
    "blocks of preempted requests stay in use": ("_leave_preempted", lambda side: None),
    "lost content stays in the prefix cache": ("_evict", lambda side, units: None),
}
WINDOW_FAULTS: dict[str, tuple[str, Callable[..., object]]] = {
    "what windows give back stays in use": ("_leave_given_back", lambda side: None),
    "a table with a window is found from its begin on": ("_prefix", _whole_prefix),
    "new blocks of one table are enough": ("_step_blocks", lambda side: 1),
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_the_machine_finds_a_planted_fault(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, fault: str
) -> None:
    method, wrong = FAULTS[fault]
    monkeypatch.setattr(vllm_scheduler, "SMALL_BYTES", 0)
    monkeypatch.setattr(vllm_scheduler.EngineSide, method, wrong)
    with pytest.raises((AssertionError, TierFull, ValueError)):
        hunt(monkeypatch, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("fault", WINDOW_FAULTS)
def test_the_machine_finds_a_planted_fault_of_windows(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, fault: str
) -> None:
    method, wrong = WINDOW_FAULTS[fault]
    monkeypatch.setattr(vllm_scheduler, "SMALL_BYTES", 0)
    monkeypatch.setattr(vllm_scheduler.EngineSide, method, wrong)
    with pytest.raises((AssertionError, TierFull, ValueError, IndexError)):
        hunt_windows(monkeypatch, tmp_path)


def hunt_windows(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    for seed in range(60):
        hybrid_requests(monkeypatch, folder / str(seed), seed, (9, 9, 0), lag=seed // 2 % 2)


def hunt(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    for seed in range(200):
        random_requests(monkeypatch, folder / str(seed), seed, lag=seed // 2 % 2)


@pytest.mark.parametrize("lag", [0, 1])
def test_random_requests_after_a_restart_read_what_the_run_before_has_left(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, lag: int
) -> None:
    """Under pressure, with more on the drive than the GPU holds; nobody waits for ever."""
    adopted = 0
    for seed in range(5):
        for _ in range(2):
            ranks = Ranks(
                ranks=1 + seed % 2, units=40, budget=12, host=8, nvme=60,
                path=tmp_path / str(seed), persist=True, seed=seed, queued=True,
            )  # fmt: skip
            monkeypatch.setattr(vllm_scheduler, "load", lambda ranks=ranks: ranks.config)
            if seed % 2 == 0:  # asked at once, so what a step's report says is heard later
                monkeypatch.setitem(RANKS, "machine", ranks.ranks[0])
            else:
                RANKS.pop("machine", None)
            machine = Machine(ranks, seed, lag=lag, whole=seed % 2 == 0)
            serve(machine, 80)
            ranks.settle()
            machine.engine.close()
            ranks.close()
        adopted += machine.seen["outside"]
    assert adopted > 10, "hardly anything was on the drive"


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("spoiled", [0.3, 1.0])
def test_content_of_an_earlier_run_that_was_spoiled_is_computed_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, spoiled: float, lag: int
) -> None:
    """spoiled: part of the slab's pages that hold other bytes than were written. Requests are
    aborted meanwhile, and the limit falls; blocks that nothing was computed into are not kept as
    content."""
    seen: Counter[str] = Counter()
    for seed in range(4):
        path = tmp_path / str(seed)
        for run in range(2):
            ranks = Ranks(
                ranks=1 + seed % 2, units=48, pieces=1 + seed % 3, budget=40, host=14, nvme=60,
                path=path, persist=True, seed=seed, queued=True,
            )  # fmt: skip
            monkeypatch.setattr(vllm_scheduler, "load", lambda ranks=ranks: ranks.config)
            machine = Machine(ranks, seed, lag=lag, whole=seed % 2 == 0)
            serve(machine, 100)
            ranks.settle()
            ranks.close()
            if run == 0:
                spoil(path, spoiled, machine.random)
        seen.update(machine.seen)
    assert seen["outside"] > 0, "nothing was on the drive, at any seed"
    assert seen["failed"] > 0


@pytest.mark.parametrize("lag", [0, 1])
def test_schedulers_whose_host_tiers_are_one_pool_read_what_was_written(
    monkeypatch: pytest.MonkeyPatch, lag: int
) -> None:
    """Both want more of it than there is; either is idle for a while, and then the other has it.

    They are asked the same: each takes from the other what it has, and it is the right content.
    """
    monkeypatch.setattr(peers, "LOOK_EVERY_S", 0.0)
    with tempfile.TemporaryDirectory(prefix="tm-") as home, ExitStack() as opened:
        monkeypatch.setenv("XDG_RUNTIME_DIR", home)
        machines = [pooled(monkeypatch, opened, seed, lag) for seed in range(2)]
        most = [0, 0]
        for turn in range(6):
            for _ in range(40):
                serve_step(machines[turn % 2])
                for machine in machines if turn > 3 else machines[:1]:
                    serve_step(machine)
            for i, machine in enumerate(machines):
                host = machine.engine.director.statistics()["host_used"]
                most[i] = max(most[i], host)
        for machine in machines:
            finish(machine)
            assert machine.seen["hits"] > 0
        assert max(most) > POOL // 2, "one had more than half of the pool"
        assert sum(m.engine.director.statistics()["host_used"] for m in machines) <= POOL
        events = [machine.engine.director.events() for machine in machines]
        assert sum(seen.get("peers_taken", 0) for seen in events) > 0


@pytest.mark.parametrize("adapter", [None, "a LoRA adapter"])
def test_content_of_an_adapter_is_neither_shown_nor_taken(
    monkeypatch: pytest.MonkeyPatch, adapter: object
) -> None:
    monkeypatch.setattr(peers, "LOOK_EVERY_S", 0.0)
    with tempfile.TemporaryDirectory(prefix="tm-") as home, ExitStack() as opened:
        monkeypatch.setenv("XDG_RUNTIME_DIR", home)
        one, two = (pooled(monkeypatch, opened, seed, 0) for seed in range(2))
        for family in range(6):  # more than the GPU holds
            one.ask(family, one.longest - 4, 2)
            one.requests[f"r{family + 1}"].lora_request = adapter
            one.drain()
        shown = one.engine.director._peers
        assert shown is not None
        until(lambda: adapter is not None or (_shown(one) > 0 and not shown.busy))
        assert (_shown(one) > 0) == (adapter is None)
        for family in range(3):
            two.ask(family, two.longest - 4, 2)
            two.requests[f"r{family + 1}"].lora_request = adapter
            two.drain()
        taken = two.engine.director.events().get("peers_taken", 0)
        assert (taken > 0) == (adapter is None)


def _shown(machine: Machine) -> int:
    for _ in range(5):
        machine.step()
    return machine.engine.director.events().get("peers_shown", 0)


POOL = 48  # pages; a chunk is a third of them


def pooled(monkeypatch: pytest.MonkeyPatch, opened: ExitStack, seed: int, lag: int) -> Machine:
    """A scheduler with all the GPU memory that it can use, and a part of POOL pages."""
    share = Share(
        group="machines", name=f"m{seed}", total=24 * PAGE, floor=12 * PAGE, idle_s=0.05,
        host=POOL * PAGE,
    )  # fmt: skip
    ranks = Ranks(
        ranks=1, units=60, budget=12, host=44, seed=seed, queued=True, share=share,
        scope=b"a model", directed=False,
    )  # fmt: skip
    opened.callback(ranks.close)
    monkeypatch.setattr(vllm_scheduler, "load", lambda: ranks.config)
    monkeypatch.setitem(RANKS, f"m{seed}", ranks.ranks[0])
    machine = Machine(ranks, seed, lag=lag, name=f"m{seed}")
    opened.callback(machine.engine.close)
    return machine


def test_what_is_kept_for_one_who_waits_gives_way_to_one_before_it_that_needs_all(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As when content of the one before has failed: it waits again, ahead of who came later."""
    ranks = Ranks(ranks=1, units=60, budget=12, host=2, nvme=60, path=tmp_path, queued=True)
    monkeypatch.setattr(vllm_scheduler, "load", lambda: ranks.config)
    machine = Machine(ranks, 0)
    machine.random.random = lambda: 1.0  # type: ignore[method-assign]  # nobody forks
    for family in range(4):
        machine.ask(family, machine.longest - 4, 2)
        machine.drain()
    ranks.settle()
    machine.ask(0, 9, 2)
    kept = machine.waiting[0]
    machine.step()
    assert machine.waiting, "its prefix is on the drive, and on its way"
    machine.ask(9, machine.longest - 2, 2)
    machine.waiting.rotate(1)
    machine.drain()
    assert kept.status.name == "FINISHED"
    ranks.close()


def test_blocks_that_vllm_frees_do_not_hide_those_that_it_took(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As when content from the drive has failed: blocks go back in the midst of a step."""
    ranks = Ranks(ranks=1, units=40, budget=12, host=8, queued=True)
    monkeypatch.setattr(vllm_scheduler, "load", lambda: ranks.config)
    pool = Machine(ranks, 0).pool
    others = pool.get_new_blocks(2)
    free = pool.get_num_free_blocks()
    pool.get_new_blocks(2)
    pool.free_blocks(others)
    assert pool.get_num_free_blocks() == free - 2, "frames come back with the next orders only"
    ranks.close()


def test_vllm_may_empty_its_prefix_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ranks = Ranks(
        ranks=1, units=40, budget=12, host=8, nvme=60, path=tmp_path, persist=True, queued=True
    )
    monkeypatch.setattr(vllm_scheduler, "load", lambda: ranks.config)
    machine = Machine(ranks, 0)
    machine.ask(0, machine.longest // 2, 4)
    machine.step()
    assert not machine.pool.reset_prefix_cache(), "a request holds blocks"
    machine.drain()
    ranks.settle()
    assert machine.pool.get_num_free_blocks() < 39, "of these only some could have frames at once"
    assert machine.pool.reset_prefix_cache()
    machine.ask(0, machine.longest // 2, 4)
    machine.drain()
    assert (machine.seen["hits"], machine.seen["outside"]) == (0, 0)
    ranks.close()


def test_new_blocks_of_all_that_a_step_admits_are_entered_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    entered: list[int] = []
    enter = Director.enter

    def counted(self: Director, units: Units, access: Access = "read", **more: Any) -> None:
        if access == "fresh":
            entered.append(len(units))
        enter(self, units, access, **more)

    monkeypatch.setattr(Director, "enter", counted)
    ranks = Ranks(ranks=1, units=40, budget=20, host=14, queued=True)
    monkeypatch.setattr(vllm_scheduler, "load", lambda: ranks.config)
    machine = Machine(ranks, 0, lag=0)
    for family in range(3):
        machine.ask(family, 4, 3)
    machine.step()
    assert len(machine.running) == 3
    assert len(entered) == 1
    assert entered[0] >= 3
    machine.drain()
    ranks.close()


def looked_at_anyway(
    monkeypatch: pytest.MonkeyPatch, folder: Path, seeds: int, small: int
) -> tuple[int, int]:
    """Random requests; each that is held back at a glance is looked at in full as well. How many
    were, and how many of them would not have been held back."""
    seen, wrong = [0], [0]
    glance, running = EngineSide._is_still_far, list[Machine]()

    def both(side: EngineSide, name: str, hits: int) -> bool:
        if not glance(side, name, hits):
            return False
        seen[0] += 1
        far = side._far.pop(name)
        told, _ = side.match(running[-1].requests[name], hits * BLOCK_TOKENS)
        wrong[0] += told is not None and side._others_run  # a step of nobody else's is not delayed
        side._far[name] = far
        return True

    monkeypatch.setattr(vllm_scheduler, "SMALL_BYTES", small)
    monkeypatch.setattr(EngineSide, "_is_still_far", both)
    for seed in range(seeds):
        nvme = 40 if seed % 2 else 0
        ranks = Ranks(
            ranks=1, units=60, budget=12, host=40, nvme=nvme,
            path=folder / str(seed) if nvme else None, seed=seed, queued=True,
        )  # fmt: skip
        monkeypatch.setattr(vllm_scheduler, "load", lambda ranks=ranks: ranks.config)
        machine = Machine(ranks, seed, lag=seed // 2 % 2)
        running.append(machine)
        serve(machine, 120)
        ranks.close()
    return seen[0], wrong[0]


@pytest.mark.parametrize("small", [0, 2 * PAGE], ids=["any", "three blocks"])
def test_who_is_held_back_at_a_glance_would_be_held_back_by_a_look(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, small: int
) -> None:
    seen, wrong = looked_at_anyway(monkeypatch, tmp_path, 6, small)
    assert seen > 20, "hardly anybody was"
    assert not wrong


def test_a_glance_that_does_not_see_blocks_come_up_is_found(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(Director, "is_below", lambda self, unit, place: True)
    _, wrong = looked_at_anyway(monkeypatch, tmp_path, 6, 0)
    assert wrong


def test_units_are_seen_one_by_one_as_together(tmp_path: Path) -> None:
    ranks = Ranks(ranks=1, units=40, budget=8, host=10, nvme=40, path=tmp_path, seed=3, queued=True)
    director, every = ranks.director, np.arange(1, 40, dtype=np.int32)
    seen: Counter[str] = Counter()
    for turn in range(60):
        unit = 1 + turn * 7 % 39
        if unit in ranks.model:
            director.make_room(1)
            if director.fetch(ids(unit)):
                ranks.leave(unit)
        else:
            ranks.ensure(1)
            ranks.write(unit)
            ranks.leave(unit)
        look = director.look(every)
        for i, unit in enumerate(every.tolist()):
            assert director.is_coming(unit) == look.coming[i]
            assert director.is_below(unit, HOST) == (look.below[i] or look.deep[i])
            assert director.is_below(unit, NVME) == look.deep[i]
        frameless = look.shown | look.below | look.deep
        assert director.frameless(every[~look.gone]) == np.count_nonzero(frameless)
        here = every[look.here]
        assert director.are_here(here)
        assert len(here) == len(every) or not director.are_here(every)
        seen.update(
            name for name in ("here", "below", "deep", "coming") if getattr(look, name).any()
        )
        if turn % 3 == 0:
            ranks.step()
            ranks.run()
            ranks.hear()
    assert len(seen) == 4, seen
    ranks.settle()
    ranks.close()


def test_what_all_that_a_step_admits_have_found_below_comes_up_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With so little below that nobody waits for it, and room for all of it."""
    entered: list[int] = []
    enter = Director.enter

    def counted(self: Director, units: Units, access: Access = "read", **more: Any) -> None:
        if access == "read":
            entered.append(int((~self.look(units).here).sum()))
        enter(self, units, access, **more)

    monkeypatch.setattr(Director, "enter", counted)
    ranks = Ranks(ranks=1, units=60, budget=20, host=40, queued=True)
    monkeypatch.setattr(vllm_scheduler, "load", lambda: ranks.config)
    machine = Machine(ranks, 0)
    machine.random.random = lambda: 1.0  # type: ignore[method-assign]  # nobody forks
    for family in range(4):  # the last one has all frames, so that the others are below
        machine.ask(family, 17 if family < 3 else machine.longest - 4, 2)
        machine.drain()
    ranks.ensure(17)
    ranks.settle()
    for family in range(3):
        machine.ask(family, 17, 2)
    entered.clear()
    machine.step()
    assert len(machine.running) == 3
    assert [units for units in entered if units] == [12], "four blocks of each, together"
    machine.drain()
    ranks.close()


def with_prefixes_below(
    monkeypatch: pytest.MonkeyPatch, prompts: Sequence[int], budget: int, lag: int = 0
) -> Machine:
    """A scheduler that has served one prompt of each family. Two blocks of the first are on the
    GPU, and what one request has that runs. More than four blocks to load are waited for."""
    monkeypatch.setattr(vllm_scheduler, "SMALL_BYTES", 4 * PAGE)
    ranks = Ranks(ranks=1, units=90, budget=budget, host=80, queued=True)
    monkeypatch.setattr(vllm_scheduler, "load", lambda: ranks.config)
    machine = Machine(ranks, 0, lag=lag)
    machine.random.random = lambda: 1.0  # type: ignore[method-assign]  # nobody forks
    for family, prompt in enumerate([*prompts, machine.longest - 3]):  # the last has all frames
        machine.ask(family, prompt, 1)
        machine.drain()
    machine.ask(0, 9, 1)
    machine.drain()
    ranks.ensure(budget - 3)
    machine.ask(99, 2, machine.longest - 3)
    machine.step()
    assert len(machine.running) == 1
    for family, prompt in enumerate(prompts):
        machine.ask(family, prompt, 2)
    return machine


def test_once_nobody_else_runs_a_step_waits_for_what_was_fetched(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Rather than begin after it has come: who comes then has a step at once, behind its load."""
    monkeypatch.setattr(Director, "speeds", lambda director: {HOST: RouteSpeed()})
    machine = with_prefixes_below(monkeypatch, (53, 53), budget=40)
    come_when_waited_for(machine.ranks)
    (running,), (first, second) = machine.running, machine.waiting
    machine.step()
    assert machine.running == [running], "it would have to wait for both"
    machine.abort(running)
    machine.step()
    assert machine.running == [first, second]
    machine.drain()
    machine.ranks.close()


@pytest.mark.parametrize("patience_s", [LONG_S, 0.0])
def test_who_has_little_to_compute_begins_with_others_whose_prefixes_come(
    monkeypatch: pytest.MonkeyPatch, patience_s: float
) -> None:
    monkeypatch.setattr(vllm_scheduler, "GATHER_S", patience_s)
    machine = with_prefixes_below(monkeypatch, (53, 49), budget=40)
    come_when_waited_for(machine.ranks)
    (running,), (first, second) = machine.running, machine.waiting
    machine.step()
    (rank,) = machine.ranks.ranks
    flights = {flight.plan.id: flight for flight in rank._flights.values()}
    assert len(flights) == 2, "both are fetched"
    flights[min(flights)].wait()
    for _ in range(3):
        machine.step()
    if patience_s:
        assert machine.running == [running]
        flights[max(flights)].wait()
        machine.step()
        machine.step()
        assert machine.running == [running, first, second]
    else:
        assert first.num_computed_tokens
        assert not second.num_computed_tokens
    machine.drain()
    machine.ranks.close()


def test_who_has_much_to_compute_waits_for_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_scheduler, "GATHER_S", LONG_S)
    monkeypatch.setattr(vllm_scheduler, "LEAST_TOKENS", 1)
    machine = with_prefixes_below(monkeypatch, (53, 49), budget=40)
    come_when_waited_for(machine.ranks)
    first, second = machine.waiting
    machine.step()
    (rank,) = machine.ranks.ranks
    min(rank._flights.items())[1].wait()
    for _ in range(3):
        machine.step()
    assert first.num_computed_tokens
    assert not second.num_computed_tokens
    machine.drain()
    machine.ranks.close()


@pytest.mark.parametrize(
    ("gbps", "little", "both"), [(1000.0, 256, True), (1e-6, 256, False), (1000.0, 1, False)]
)
def test_who_begins_with_others_does_not_keep_them_long(
    monkeypatch: pytest.MonkeyPatch, gbps: float, little: int, both: bool
) -> None:
    monkeypatch.setattr(vllm_scheduler, "LEAST_TOKENS", little)
    machine = with_prefixes_below(monkeypatch, (53, 53), budget=40)
    come_when_waited_for(machine.ranks)
    monkeypatch.setattr(Director, "speeds", lambda director: {HOST: RouteSpeed(gbps)})
    (running,), (first, second) = machine.running, machine.waiting
    machine.abort(running)
    machine.step()
    assert machine.running == ([first, second] if both else [first])
    machine.drain()
    machine.ranks.close()


def test_a_prefix_is_fetched_only_beside_what_was_found_in_this_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The first of two is admitted, and its blocks have no frames yet; beside it the second one's
    do not fit. Meanwhile each frame counts once."""
    machine = with_prefixes_below(monkeypatch, (17, 53), budget=20)
    first, second = machine.waiting
    pool, director = machine.pool, machine.engine.director
    machine.seq += 1
    step, cached = Step(machine.seq), SimpleNamespace(req_ids=[], new_block_ids=[])
    machine.waiting.remove(second)
    machine._schedule_waiting(step, cached)
    assert first in machine.running
    free, in_use = pool.get_num_free_blocks(), director.units_in_use()
    told, _ = machine.engine.match(second, 13 * BLOCK_TOKENS)
    assert told is None
    assert director.units_in_use() == in_use + 4, "what the first has found, and nothing else"
    assert not director.coming()
    assert pool.get_num_free_blocks() == free
    machine.ranks.close()


def test_a_glance_is_for_the_prefix_that_was_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = with_prefixes_below(monkeypatch, (53, 53), budget=20)
    engine, pool = machine.engine, machine.pool
    first, second = machine.waiting
    looks: list[int] = []
    look = Director.look

    def counted(self: Director, units: Units) -> Look:
        looks.append(len(units))
        return look(self, units)

    monkeypatch.setattr(Director, "look", counted)
    assert engine.match(first, 13 * BLOCK_TOKENS)[0] is None, "it is fetched"
    assert engine.match(second, 13 * BLOCK_TOKENS)[0] is None, "there is no room beside it"
    looks.clear()
    assert engine.match(second, 13 * BLOCK_TOKENS)[0] is None
    assert not looks, "nothing has changed"
    engine.match(second, 12 * BLOCK_TOKENS)
    assert looks, "another prefix"
    engine.match(second, 13 * BLOCK_TOKENS)
    waited = engine.counts["waited"]
    found = pool.get_cached_block(second.block_hashes[12], [0])
    assert found is not None
    pool.evict_blocks({found[0].block_id})
    engine.match(second, 13 * BLOCK_TOKENS)
    assert engine.counts["waited"] == waited, "it waits for nothing: vLLM finds less"
    machine.ranks.close()


def test_requests_of_one_step_share_what_is_on_its_way_for_one_before_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And each holds it until it has ended itself: the machine looks after each step."""
    machine = with_prefixes_below(monkeypatch, (17, 17), budget=20, lag=1)
    for request in list(machine.waiting):
        machine.abort(request)
    machine.ask(1, 9, 12)
    machine.step()
    assert len(machine.running) == 2
    for new in (1, 2, 5):
        machine.ask(1, 17, new)
    machine.step()
    assert len(machine.running) == 5
    machine.drain()
    machine.ranks.close()


def test_the_metrics_page_is_told_at_once_when_the_last_request_has_ended(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(vllm_metrics, "EVERY_S", 1000.0)
    ranks = Ranks(ranks=1, units=40, budget=20, host=14, queued=True)
    monkeypatch.setattr(vllm_scheduler, "load", lambda: ranks.config)
    machine = Machine(ranks, 0)
    machine.ask(0, 9, 2)
    machine.ask(1, 9, 12)
    machine.step()
    assert machine.engine.take_stats() is not None, "the first time"
    while len(machine.requests) > 1:
        machine.step()
    assert machine.engine.take_stats() is None, "another one runs"
    machine.drain()
    assert machine.engine.take_stats() is not None
    ranks.close()
