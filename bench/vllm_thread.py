"""What tiermem costs the thread of vLLM's scheduler: engines whose model computes nothing.

    python bench/vllm_thread.py --out thread.json [--rounds 8] [--only one decode once mixed]

Real engines with their schedulers and connectors; in place of the model, every request that is
through its prompt gets the same token after `--step-ms`. So the time that the engine's thread has
on a processor is vLLM's and tiermem's own. Works, with blocks of 64 tokens of 16 KiB each:
  one      cached prompts of 4,096 tokens, one at a time, all resident
  decode   64 cached prompts of 448 tokens, and 64 steps, all resident
  once     24 prompts of 4,096 tokens, 16 and 8 at once, a quarter resident
  mixed    sessions whose prompts grow, all at once, a part resident
Each engine is a child, and they take turns (which goes first changes). Prints for each work the
median of milliseconds a round and of the ratio to the stock engine's, and what part of it is in
which hook. The stock engine has the same room on its "GPU", and "computes" what has left it.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import Future
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench import vllm_step
from bench.vllm_gpu import Hooks, connector

CONFIG = {
    **vllm_step.CONFIG, "hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 32768,
}  # fmt: skip
BLOCK_TOKENS = 64
BLOCK = BLOCK_TOKENS * 2 * 64 * 2
KINDS = ("stock", "nothing", "tiermem")
WORKS = {"one": 3328, "decode": 3328, "once": 384, "mixed": 1024}
"""Blocks that the "GPU" has."""
BELOW = 8192
Batch = tuple[list[list[int]], int]
"""Prompts that are asked at once, and tokens to generate for each."""


class NoModel:
    """Stands for an engine's executor: connectors are called as by vLLM's model runners."""

    def __init__(self, core: Any, step_s: float) -> None:
        from vllm.distributed.kv_transfer import get_kv_transfer_group, has_kv_transfer_group

        self._requests = core.scheduler.requests
        self._step_s = step_s
        self._rank = get_kv_transfer_group() if has_kv_transfer_group() else None
        core.model_executor.execute_model = self.execute_model

    def execute_model(self, output: Any, non_block: bool = False) -> Future[Any]:
        from vllm.v1.outputs import ModelRunnerOutput

        told = None if self._rank is None else self._carried_out(output, self._rank)
        if self._step_s and output.num_scheduled_tokens:
            time.sleep(self._step_s)
        names = list(output.num_scheduled_tokens)
        requests = [self._requests[name] for name in names]
        done: Future[Any] = Future()
        done.set_result(
            ModelRunnerOutput(
                req_ids=names,
                req_id_to_index={name: i for i, name in enumerate(names)},
                sampled_token_ids=[
                    [7] if one.num_computed_tokens >= one.num_tokens else [] for one in requests
                ],
                kv_connector_output=told,
            )
        )
        return done

    def _carried_out(self, output: Any, rank: Any) -> Any:
        from vllm.v1.outputs import KVConnectorOutput

        rank.handle_preemptions(output.kv_connector_metadata)
        rank.bind_connector_metadata(output.kv_connector_metadata)
        rank.start_load_kv(None)
        rank.wait_for_save()
        told = KVConnectorOutput()
        finished = rank.get_finished(output.finished_req_ids)
        told.finished_sending, told.finished_recving = finished
        told.invalid_block_ids = rank.get_block_ids_with_load_errors()
        told.kv_connector_worker_meta = rank.build_connector_worker_meta()
        rank.clear_connector_metadata()
        return told


def batches(work: str) -> list[Batch]:
    """What a round of a work asks, one batch after the other."""
    rnd = random.Random(work)

    def prompts(length: int, count: int) -> list[list[int]]:
        return [[rnd.randrange(3, 900) for _ in range(length)] for _ in range(count)]

    if work == "one":
        return [([prompt], 1) for prompt in prompts(4096, 24)]
    if work == "decode":
        return [(prompts(448, 64), 64)]
    if work == "once":
        every = prompts(4096, 24)
        return [(every[:16], 1), (every[16:], 1)]
    sessions = prompts(1600, 60)
    turns = [session[: 200 + 140 * turn] for turn in range(10) for session in sessions]
    return [(turns, 6)]


def serve(folder: Path, kind: str, work: str, step_ms: float) -> None:
    """A child: one line in, one round, its seconds out: by the clock, and on a processor."""
    llm = engine(folder, kind, WORKS[work])
    from vllm import SamplingParams

    if kind == "tiermem":
        from tiermem.integrations import vllm_scheduler

        vllm_scheduler.SMALL_BYTES = 4 * BLOCK  # as many blocks as of 8 MiB, a GPU's

    NoModel(llm.llm_engine.engine_core.engine_core, step_ms / 1000)
    asked = [
        (
            [{"prompt_token_ids": prompt} for prompt in some],
            SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False),
        )
        for some, new in batches(work)
    ]
    requests = sum(len(some) for some, _ in asked)
    for line in sys.stdin:
        with Hooks(llm) as hooks:
            begun, used = time.perf_counter(), time.thread_time()
            for some, params in asked:
                llm.generate(some, params, use_tqdm=False)  # type: ignore[arg-type]
            used, took = time.thread_time() - used, time.perf_counter() - begun
        found = hooks.summary(requests) if connector(llm) is not None else {}
        print("took", json.dumps([took, used, found, line.strip()]), flush=True)


def engine(folder: Path, kind: str, blocks: int) -> Any:
    toml = folder / f"{blocks}.toml"
    toml.write_text(
        f'[gpu]\ndevice = "cpu"\nbudget = {blocks * BLOCK}\n[host]\ncapacity = {BELOW * BLOCK}\n'
    )
    os.environ.update(TIERMEM=str(int(kind == "tiermem")), TIERMEM_CONFIG=str(toml))
    from vllm import LLM
    from vllm.config import KVTransferConfig

    nothing = KVTransferConfig(
        kv_connector="NothingConnector", kv_connector_module_path="bench.vllm_nothing",
        kv_role="kv_consumer",
    )  # fmt: skip
    virtual = max(blocks, BELOW) if kind == "tiermem" else blocks
    return LLM(
        model=str(folder), load_format="dummy", skip_tokenizer_init=True, enforce_eager=True,
        max_model_len=16640, max_num_seqs=64, max_num_batched_tokens=8192,
        block_size=BLOCK_TOKENS, seed=0, num_gpu_blocks_override=virtual,
        kv_cache_memory_bytes=virtual * BLOCK, disable_log_stats=True,
        kv_transfer_config=nothing if kind == "nothing" else None,
    )  # fmt: skip


def start(folder: Path, kind: str, work: str, step_ms: float) -> subprocess.Popen[str]:
    env = {
        **os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "ERROR",
    }  # fmt: skip
    given = ["--serve", str(folder), "--kind", kind, "--only", work, "--step-ms", str(step_ms)]
    return subprocess.Popen(
        [sys.executable, __file__, *given],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env,
    )  # fmt: skip


def ask(child: subprocess.Popen[str]) -> tuple[float, float, dict[str, Any]]:
    assert child.stdin is not None
    assert child.stdout is not None
    child.stdin.write("go\n")
    child.stdin.flush()
    for line in child.stdout:
        if line.startswith("took "):
            took, used, hooks, _ = json.loads(line.removeprefix("took "))
            return took, used, hooks
    raise SystemExit(f"the engine ended with {child.wait()}")


def measured(folder: Path, work: str, rounds: int, step_ms: float) -> dict[str, Any]:
    children = {kind: start(folder, kind, work, step_ms) for kind in KINDS}
    try:
        for _ in range(2):  # fills the caches of all
            for child in children.values():
                ask(child)
        seen: dict[str, list[tuple[float, float, dict[str, Any]]]] = {kind: [] for kind in KINDS}
        for turn in range(rounds):
            for kind in KINDS[:: -1 if turn % 2 else 1]:
                seen[kind].append(ask(children[kind]))
    finally:
        for child in children.values():
            child.terminate()
            child.wait()
    found: dict[str, Any] = {}
    for kind, samples in seen.items():
        ratios = [one[1] / stock[1] for one, stock in zip(samples, seen["stock"], strict=True)]
        found[kind] = {
            "n": rounds,
            "thread_ms": statistics.median(one[1] for one in samples) * 1000,
            "wall_ms": statistics.median(one[0] for one in samples) * 1000,
            "of_stock": statistics.median(ratios),
            "hooks": sorted(samples, key=lambda one: one[1])[rounds // 2][2],
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("vllm_thread.json"))
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--step-ms", type=float, default=2.0)
    parser.add_argument("--only", nargs="*", choices=WORKS, default=list(WORKS))
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--kind", choices=KINDS, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.serve:
        serve(given.serve, given.kind, given.only[0], given.step_ms)
        return
    result: dict[str, Any] = {"schema": "tiermem.vllm_thread.v1", "cpus": os.cpu_count()}
    with tempfile.TemporaryDirectory() as scratch:
        (Path(scratch) / "config.json").write_text(json.dumps(CONFIG))
        for work in given.only:
            found = result[work] = measured(Path(scratch), work, given.rounds, given.step_ms)
            for kind, one in found.items():
                print(
                    f"{work:8}{kind:9}{one['thread_ms']:9.2f} ms a round on a processor,"
                    f"{one['of_stock']:6.2f} of stock; {one['wall_ms']:9.2f} ms by the clock"
                )
            for name, hook in found["tiermem"]["hooks"].items():
                print(f"{'':17}{name:8}{hook['calls']:7.2f} calls a request, {hook['ms']:.3f} ms")
    given.out.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
