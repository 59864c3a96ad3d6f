"""vLLM over tiermem on one GPU, beside vLLM as it is and vLLM's own offloading.

    python bench/vllm_gpu.py MODE --out DIR [--size 8b|tiny]      one engine, one JSON
    python bench/vllm_gpu.py merge --out DIR                      table, bars, picture

Modes, all with Llama-3.1-8B's shape and random weights, FLASH_ATTN and CUDA graphs:
  resident   vLLM alone, everything fits        small    vLLM alone, a quarter fits: it recomputes
  offload    its OffloadingConnector, a quarter fits, the rest in host memory
  fits       tiermem, everything fits           host     tiermem, a quarter fits, the rest in host
  nvme       tiermem, a quarter fits, host memory holds little, the rest is on the drive
Each measures prompts of 4,096 and 16,384 tokens whose KV is 12 GiB in all: cold, then again one at
a time (time to first token), then all at once, and what the routes moved. Tokens of the same
prompts are kept, and `merge` compares them. A mode whose JSON is there is not run again. Modes that
`bench/side_by_side.py` starts together take turns prompt by prompt.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench.side_by_side import turn
from bench.vllm_engines import SHAPES, machine, model, surroundings, turn_on
from bench.vllm_report import merged

MODES = ("resident", "fits", "small", "offload", "host", "nvme")
BLOCK = 16
LENGTHS = {4096: 24, 16384: 6}  # tokens of a prompt, and how many: 6,144 blocks each
QUARTER = 1536  # blocks on the GPU, of 6,144
EVERYTHING = 13312
NEW = 16
GRAPHS = [1, 2, 4, 8, 16, 32, 64, 128]
"""Tokens of a step that runs as a CUDA graph. A cached prompt computes its last block again, and
without a graph of a block's size that step is launched kernel by kernel."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=_Raw)
    parser.add_argument("mode", choices=[*MODES, "merge"])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--size", choices=SHAPES, default="8b")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--block-size", type=int, help="tokens; default: vLLM's, or tiermem's")
    parser.add_argument("--nvme-path", type=Path, default=Path("kv-bench"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.mode == "merge":
        print(json.dumps(merged(args.out, [str(length) for length in LENGTHS]), indent=1))
        return
    file = args.out / f"vllm-{args.size}-{args.mode}.json"
    if file.exists():
        print(f"{file} is there")
        return
    result = measure(args.mode, args.size, args.rounds, args.nvme_path, args.block_size)
    file.write_text(json.dumps(result, indent=1))
    print(json.dumps({k: v for k, v in result.items() if k != "tokens"}), flush=True)


class _Raw(argparse.RawDescriptionHelpFormatter):
    pass


def engine(mode: str, size: str, nvme_path: Path, block_size: int | None) -> Any:
    """The engine of one mode, in this process."""
    more = surroundings("cuda")
    folder = model(SHAPES[size])
    if block_size is not None:
        more["block_size"] = block_size
    blocks = EVERYTHING if mode in ("resident", "fits") else QUARTER
    # vLLM would look at what is free, which others may change meanwhile.
    more["kv_cache_memory_bytes"] = SHAPES[size].block_bytes(blocks * BLOCK)
    if mode in ("resident", "small", "offload"):
        more["num_gpu_blocks_override"] = blocks * BLOCK // (block_size or BLOCK)
    if mode == "offload":
        more["kv_transfer_config"] = dict(
            kv_connector="OffloadingConnector",
            kv_role="kv_both",
            kv_connector_extra_config={"cpu_bytes_to_use": 32 << 30},
        )
    if mode in ("fits", "host", "nvme"):
        toml = folder / f"gpu-{mode}.toml"
        host = "4GiB" if mode == "nvme" else "32GiB"
        text = f'[gpu]\nbudget = {more["kv_cache_memory_bytes"]}\n[host]\ncapacity = "{host}"\n'
        if mode == "nvme":
            text += f'[nvme]\npath = "{nvme_path.absolute()}"\ncapacity = "20GiB"\n'
        toml.write_text(text + '[log]\nlevel = "info"\n')
        turn_on(toml)
    from vllm import LLM

    return LLM(
        model=str(folder), load_format="dummy", skip_tokenizer_init=True, max_model_len=16640,
        max_num_seqs=32, max_num_batched_tokens=8192, seed=0, gpu_memory_utilization=0.2,
        disable_log_stats=True,
        compilation_config={"cudagraph_capture_sizes": GRAPHS}, **more,
    )  # fmt: skip


def measure(
    mode: str, size: str, rounds: int, nvme_path: Path, block_size: int | None
) -> dict[str, Any]:
    start = time.perf_counter()
    llm = engine(mode, size, nvme_path, block_size)
    started_s = time.perf_counter() - start
    with turn():
        ceilings = link()
        generate(llm, prompts(512, 2, seed=99), 4)  # warm-up
    result: dict[str, Any] = {
        "schema": "tiermem.vllm_gpu.v1", "mode": mode, "size": size, "start_s": started_s,
        "machine": machine(), "ceilings_gbps": ceilings, "lengths": {}, "tokens": {},
        "block_tokens": llm.llm_engine.vllm_config.cache_config.block_size,
    }  # fmt: skip
    for length, count in LENGTHS.items():
        batch = prompts(length, count, seed=length)
        cold = [one_by_one(llm, batch)]
        before = moved(llm)
        with Hooks(llm) as hooks:
            hot = [one_by_one(llm, batch) for _ in range(rounds)]
        after = moved(llm)
        n = 16 if length == 4096 else count
        at_once = []
        with Hooks(llm) as busy:
            for i in range(rounds):
                some = (batch * 2)[(i * n) % count :][:n]
                with turn():
                    at_once.append(timed(lambda some=some: generate(llm, some, 1)))
        last = moved(llm)
        with turn():
            with_new = timed(lambda batch=batch: generate(llm, batch[:4], NEW))
            result["tokens"][length] = digest(generate(llm, batch, NEW))
        result["lengths"][length] = {
            "cold_ttft_ms": summary(cold[0]),
            "cold_rounds_ms": cold,
            "ttft_ms": summary([x for one in hot for x in one]),
            "ttft_rounds_ms": hot,
            "at_once_s": at_once,
            "at_once_hooks": busy.summary(rounds),
            "at_once_moved": between(after, last),
            "hooks": hooks.summary(rounds * count),
            "four_with_new_s": with_new,
            "moved": between(before, after),
        }
        print(mode, length, json.dumps(result["lengths"][length]), flush=True)
    result["counts"] = counts(llm)
    return result


def prompts(length: int, count: int, seed: int) -> list[list[int]]:
    rnd = random.Random(seed)
    return [[rnd.randrange(3, 31000) for _ in range(length)] for _ in range(count)]


def generate(llm: Any, batch: list[list[int]], new: int) -> list[list[int]]:
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False)
    inputs = [{"prompt_token_ids": prompt} for prompt in batch]
    return [list(o.outputs[0].token_ids) for o in llm.generate(inputs, params, use_tqdm=False)]


def timed(work: Any) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def one_by_one(llm: Any, batch: list[list[int]]) -> list[float]:
    """Milliseconds to the first token of each prompt, nothing else running."""
    took = []
    for prompt in batch:
        with turn():
            took.append(timed(lambda prompt=prompt: generate(llm, [prompt], 1)) * 1000)
    return took


def summary(values: list[float]) -> dict[str, float]:
    ordered = sorted(values)
    return {
        "n": len(values),
        "median": statistics.median(values),
        "p99": ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))],
        "best": ordered[0],
    }


class Hooks:
    """How long tiermem's part of the scheduler and of the worker takes, while open."""

    NAMES = ("match", "admit", "orders", "hear", "finish")

    def __init__(self, llm: Any) -> None:
        self._times: dict[str, list[float]] = {}
        self._objects: list[tuple[Any, str]] = []
        side = connector(llm)
        if side is not None:
            self._objects = [(side, name) for name in self.NAMES]
            from tiermem.integrations.vllm_worker import RANKS

            self._objects += [(rank, name) for rank in RANKS.values() for name in ("carry",)]

    def __enter__(self) -> Hooks:
        for owner, name in self._objects:
            setattr(owner, name, self._timing(name, getattr(owner, name)))
        return self

    def __exit__(self, *error: object) -> None:
        for owner, name in self._objects:
            delattr(owner, name)

    def _timing(self, name: str, right: Any) -> Any:
        times = self._times.setdefault(name, [])

        def timing(*args: Any, **more: Any) -> Any:
            start = time.perf_counter()
            try:
                return right(*args, **more)
            finally:
                times.append((time.perf_counter() - start) * 1000)

        return timing

    def summary(self, requests: int) -> dict[str, dict[str, float]]:
        """Milliseconds and calls a request, or whatever else there were so many of."""
        return {
            name: {"calls": len(times) / requests, "ms": sum(times) / requests}
            for name, times in self._times.items()
        }


def link() -> dict[str, float]:
    """GB/s of large copies each way, before anything else runs."""
    import torch

    host = torch.empty(1 << 29, dtype=torch.uint8, pin_memory=True)
    device = torch.empty(1 << 29, dtype=torch.uint8, device="cuda")
    found = {}
    for name, dst, src in (("h2d", device, host), ("d2h", host, device)):
        times = []
        for _ in range(7):
            torch.cuda.synchronize()
            times.append(timed(lambda dst=dst, src=src: _copy(dst, src)))
        found[name] = (1 << 29) / statistics.median(times) / 1e9
    return found


def _copy(dst: Any, src: Any) -> None:
    import torch

    dst.copy_(src, non_blocking=True)
    torch.cuda.synchronize()


def connector(llm: Any) -> Any:
    core = llm.llm_engine.engine_core.engine_core
    found = core.scheduler.connector
    return found.engine if hasattr(found, "engine") else None


def moved(llm: Any) -> dict[str, list[float]]:
    """Bytes and busy seconds of each route so far."""
    from tiermem.integrations.vllm_worker import RANKS

    result = {}
    for rank in RANKS.values():
        for (src, dst), count in rank.routes().items():
            name = f"{src.name}-{dst.name}".lower()
            result[name] = [count.pages * float(rank.page_bytes), count.busy_s]
    return result


def between(then: dict[str, list[float]], now: dict[str, list[float]]) -> dict[str, list[float]]:
    """Of two answers of `moved`, what the later one has more."""
    return {key: [b - a for a, b in zip(then[key], now[key], strict=True)] for key in now}


def counts(llm: Any) -> dict[str, Any]:
    side = connector(llm)
    return {} if side is None else {**side.director.statistics(), **side.counts}


def digest(tokens: list[list[int]]) -> list[str]:
    return [hashlib.sha256(json.dumps(one).encode()).hexdigest()[:12] for one in tokens]


if __name__ == "__main__":
    main()
