"""vLLM over tiermem under pressure, every reused block compared with what was written into it.

    python bench/vllm_checked.py --out checked.json [--device cpu] [--size tiny|8b] [--steps 400]

Sessions with shared prefixes arrive, grow, end and are aborted while the GPU holds a twelfth of
their blocks, so that requests are preempted and prefixes go down and come back. When a step has
filled a block, a weighted sum of its bytes is taken behind that step's work on the engine's own
stream; when a later request finds the block in the prefix cache, the sum is taken again before its
step, once everything is in its place. Nothing waits for the device, so the engine goes on as it
does without us: two steps deep where it schedules asynchronously.

At the end one block that is about to be reused is spoiled on purpose: it must be found.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench.vllm_engines import ON_CPU, SHAPES, machine, model, surroundings, turn_on
from bench.vllm_gpu import connector

BLOCKS = {"gpu": 100, "all": 1600}  # of 32 tokens; all sessions together come to 1,250
SESSIONS = 24
COMMON = 256  # tokens that all sessions begin with
MOST = 1400  # tokens of a prompt; then the session begins anew
RUNNING = 12
ABORTED = 0.0375  # chance that a step begins with an abort
GATHERED = 16  # blocks summed at a time


class Checker:
    """Seals blocks that steps have filled, and verifies those that later steps find."""

    def __init__(self, llm: Any) -> None:
        from vllm.distributed.kv_transfer import get_kv_transfer_group

        self._scheduler = llm.llm_engine.engine_core.engine_core.scheduler
        self._side = connector(llm)
        self._rank = get_kv_transfer_group().rank
        self._sums = Sums(self._rank)
        self._written: dict[int, tuple[Any, int]] = {}  # by block: whose, and which of its blocks
        self._verify: dict[int, list[int]] = {}  # blocks by step
        self._seal: dict[int, list[int]] = {}
        self._blocks: dict[str, list[int]] = {}
        self._step = 0
        self.spoil = False
        self.counts = dict.fromkeys(
            ("sealed", "verified", "same_step", "of_others", "spoiled", "resumed"), 0
        )
        self._orders, self._side.orders = self._side.orders, self._note
        self._carry, self._rank.carry = self._rank.carry, self._before
        self._mark, self._rank.mark = self._rank.mark, self._after

    def wrong(self) -> int:
        """Blocks that were not as they had been written; waits for the device."""
        return self._sums.wrong()

    def different(self) -> float:
        """Sums among the blocks that were written, a part of these: equal ones prove nothing."""
        return self._sums.different(list(self._written))

    # ---------------------------------------------------------------- the scheduler's side

    def _note(self, output: Any) -> Any:
        """What the step that has just been put together will read, and what it will fill."""
        tokens = output.num_scheduled_tokens
        found: list[int] = []
        filled: list[int] = []
        for new in output.scheduled_new_reqs:
            self._blocks[new.req_id] = list(new.block_ids[0])
            found += self._found(new.req_id, new.num_computed_tokens)
            filled += self._filled(new.req_id, new.num_computed_tokens, tokens[new.req_id])
        cached = output.scheduled_cached_reqs
        for name, more, computed in zip(
            cached.req_ids, cached.new_block_ids, cached.num_computed_tokens, strict=True
        ):
            if name in cached.resumed_req_ids:
                self._blocks[name] = list(more[0])
                found += self._found(name, computed)
                self.counts["resumed"] += 1
            elif more is not None:
                self._blocks[name] += more[0]
            filled += self._filled(name, computed, tokens[name])
        orders = self._orders(output)
        # What a step fills, others may find in that very step: nothing to compare yet.
        self.counts["same_step"] += len(found) - len(kept := [b for b in found if b not in filled])
        self._verify[orders.step] = kept
        self._seal[orders.step] = filled
        return orders

    def _found(self, name: str, computed: int) -> list[int]:
        """Blocks of a request's prefix that were written before, under the same hash."""
        request = self._scheduler.requests[name]
        same = []
        for i, block in enumerate(self._blocks[name][: computed // self._side._block_tokens]):
            writer, at = self._written.get(block, (None, 0))
            hashes = () if writer is None else writer.block_hashes
            if at < len(hashes) and hashes[at] == request.block_hashes[i]:
                same.append(block)
            else:
                self.counts["of_others"] += 1
        return same

    def _filled(self, name: str, computed: int, tokens: int) -> list[int]:
        size = self._side._block_tokens
        request = self._scheduler.requests[name]
        first, last = computed // size, (computed + tokens) // size
        blocks = self._blocks[name][first:last]
        for i, block in enumerate(blocks, first):
            self._written[block] = request, i
        return blocks

    # ---------------------------------------------------------------- the worker's side

    def _before(self, orders: Any) -> None:
        self._carry(orders)
        self._step = orders.step
        blocks = self._verify.pop(orders.step)
        if self.spoil and blocks:
            self._sums.spoil(blocks[0])
            self.spoil = False
            self.counts["spoiled"] += 1
        self._sums.verify(blocks)
        self.counts["verified"] += len(blocks)

    def _after(self) -> None:
        blocks = self._seal.pop(self._step)
        self._sums.seal(blocks)
        self.counts["sealed"] += len(blocks)
        self._mark()


class Sums:
    """A 64-bit sum of every block, each of its words times an odd number, kept on the device."""

    def __init__(self, rank: Any) -> None:
        import torch

        from tiermem.gpu.tensor import tensor

        layout, base, device = rank.layout, rank._base, str(rank._device)
        words = layout.stride // 8
        self._pieces = [
            tensor(base + at, layout.nbytes - at, torch.int64, (layout.blocks, words), None, device)
            for at in layout.offsets
        ]
        drawn = torch.Generator().manual_seed(0)
        odd = torch.randint(1 << 62, (len(self._pieces), words), generator=drawn) * 2 + 1
        self._weights = odd.to(device)
        self._kept = torch.zeros(layout.blocks, dtype=torch.int64, device=device)
        self._wrong = torch.zeros((), dtype=torch.int64, device=device)

    def seal(self, blocks: list[int]) -> None:
        for some, sums in self._of(blocks):
            self._kept[some] = sums

    def verify(self, blocks: list[int]) -> None:
        for some, sums in self._of(blocks):
            self._wrong += (self._kept[some] != sums).sum()

    def spoil(self, block: int) -> None:
        """Change one bit of a block where it is."""
        self._pieces[-1][block, 0] ^= 1

    def wrong(self) -> int:
        return int(self._wrong.item())

    def different(self, blocks: list[int]) -> float:
        return len(self._kept[blocks].unique()) / len(blocks)

    def _of(self, blocks: list[int]) -> Any:
        import torch

        for first in range(0, len(blocks), GATHERED):
            part = blocks[first : first + GATHERED]
            some = torch.tensor(part, device=self._kept.device)
            parts = [
                (piece[some] * weights).sum(1)
                for piece, weights in zip(self._pieces, self._weights, strict=True)
            ]
            yield some, torch.stack(parts).sum(0)


class Load:
    """Requests of sessions that grow by what was said, with a few aborted in the midst."""

    def __init__(self, llm: Any, seed: int) -> None:
        self._engine = llm.llm_engine
        self._random = random.Random(seed)
        self._said: list[list[int]] = [[] for _ in range(SESSIONS)]
        self._open: dict[str, int] = {}
        self._begun = 0
        self.counts = dict.fromkeys(("ended", "aborted"), 0)

    def step(self) -> None:
        """One step of the engine, with new requests before it and perhaps an abort."""
        while len(self._open) < RUNNING:
            self._ask()
        if self._random.random() < ABORTED:
            name = self._random.choice(list(self._open))
            self._engine.abort_request([name])
            del self._open[name]
            self.counts["aborted"] += 1
        for output in self._engine.step():
            if output.finished and output.request_id in self._open:
                session = self._open.pop(output.request_id)
                self._said[session] += list(output.outputs[0].token_ids)
                self.counts["ended"] += 1

    def drain(self) -> None:
        while self._engine.has_unfinished_requests():
            for output in self._engine.step():
                self._open.pop(output.request_id, None)

    def _ask(self) -> None:
        from vllm import SamplingParams

        rnd = self._random
        free = [s for s in range(SESSIONS) if s not in self._open.values()]
        session = rnd.choice(free)
        said = self._said[session]
        if len(said) + COMMON > MOST:
            said.clear()
        said += [rnd.randrange(3, 900) for _ in range(rnd.randrange(20, 200))]
        name = f"r{self._begun}"
        self._begun += 1
        common = [3 + i * 7 % 800 for i in range(COMMON)]
        params = SamplingParams(
            temperature=0, max_tokens=rnd.randrange(1, 80), ignore_eos=True, detokenize=False
        )
        self._engine.add_request(name, {"prompt_token_ids": common + said}, params)
        self._open[name] = session


def engine(device: str, size: str, drive: Path | None) -> Any:
    """An engine in this process, whose GPU holds a part of what the sessions come to.

    drive: a directory; host memory then holds a quarter, and the rest goes there.
    """
    more = surroundings(device)
    shape = ON_CPU if device == "cpu" else SHAPES[size]
    folder, block = model(shape), shape.block_bytes(32)
    on = "cpu" if device == "cpu" else "cuda:0"
    everything = BLOCKS["all"] * block
    toml = f'[gpu]\ndevice = "{on}"\nbudget = {BLOCKS["gpu"] * block}\n'
    toml += f"[host]\ncapacity = {everything if drive is None else everything // 4}\n"
    if drive is not None:
        toml += f'[nvme]\npath = "{drive.absolute()}"\ncapacity = {everything}\n'
    (folder / "checked.toml").write_text(toml)
    turn_on(folder / "checked.toml")
    if device == "cpu":
        more |= {"kv_cache_memory_bytes": everything, "num_gpu_blocks_override": BLOCKS["all"]}
    from vllm import LLM

    return LLM(
        model=str(folder), load_format="dummy", skip_tokenizer_init=True, seed=0, block_size=32,
        max_model_len=2048, max_num_seqs=RUNNING, max_num_batched_tokens=1024,
        gpu_memory_utilization=0.5, disable_log_stats=True, **more,
    )  # fmt: skip


def run(llm: Any, steps: int, seed: int) -> dict[str, Any]:
    checker = Checker(llm)
    load = Load(llm, seed)
    start = time.perf_counter()
    for step in range(steps):
        load.step()
        if step % 100 == 99:
            print(f"step {step + 1} {checker.counts} wrong {checker.wrong()}", flush=True)
    load.drain()
    wrong = checker.wrong()
    checker.spoil = True
    while checker.spoil and time.perf_counter() - start < 600:
        load.step()
    load.drain()
    config = llm.llm_engine.vllm_config
    return {
        "schema": "tiermem.vllm_checked.v1",
        "machine": machine(),
        "async_scheduling": bool(config.scheduler_config.async_scheduling),
        "size": f"{config.model_config.get_hidden_size()}",
        "block_tokens": config.cache_config.block_size,
        "steps": steps,
        "seconds": time.perf_counter() - start,
        "wrong": wrong,
        "wrong_after_one_was_spoiled": checker.wrong(),
        "different": checker.different(),
        "blocks": checker.counts,
        "requests": load.counts,
        "tiermem": connector(llm).director.statistics(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--size", choices=("tiny", "8b"), default="tiny")
    parser.add_argument("--drive", type=Path, help="a directory: host memory holds a quarter only")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    result = run(engine(given.device, given.size, given.drive), given.steps, given.seed)
    given.out.write_text(json.dumps(result, indent=1))
    print(json.dumps(result, indent=1))
    if result["wrong"] or not result["wrong_after_one_was_spoiled"]:
        raise SystemExit("wrong blocks, or the check finds none where there is one")


if __name__ == "__main__":
    main()
