"""Many sessions on one vLLM engine as a trace has them arrive, with and without tiermem.

    python bench/vllm_mixed.py MODE --trace FILE --out DIR [--size 8b|tiny] [--device cuda|cpu]
    python bench/vllm_mixed.py merge --out DIR

Modes, all with the same room for KV on the GPU, a part of what the trace comes to:
  stock     vLLM alone, which computes again what has left its cache; `stock2` the same once more,
            to see how far it differs from itself
  offload   its OffloadingConnector, the rest in host memory
  host      tiermem, the rest in host memory        nvme   most of the rest on a drive
Requests arrive at the trace's times, `--speed` times as fast, whether or not the engine keeps up;
each of the trace's blocks of 512 tokens becomes `--tokens` tokens that follow from its id, and
answers shrink in proportion. With `--apart` the engine is in a process of its own, as under
`vllm serve`; else its thread also makes the requests. A mode whose JSON is there is not run again.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import sys
import time
from collections import deque
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np

from bench.side_by_side import turn
from bench.vllm_engines import ON_CPU, SHAPES, Shape, machine, model, surroundings, turn_on
from bench.vllm_gpu import GRAPHS, Hooks, connector, counts, digest
from tiermem.bench.traces import read

MODES = ("stock", "stock2", "offload", "host", "nvme")
WHOLE = 512  # tokens of a block of the trace


@dataclass(frozen=True, slots=True)
class Asked:
    """A request: seconds after the start, its prompt, and tokens to generate."""

    at_s: float
    prompt: list[int]
    new: int


def load_of(given: argparse.Namespace, shape: Shape) -> list[Asked]:
    """The first requests of the trace, shrunk."""
    part = given.tokens / WHOLE
    asked = []
    for request in islice(read(given.trace), given.requests):
        tokens = [_tokens(int(block), given.tokens, shape.vocabulary) for block in request.blocks]
        prompt = np.concatenate(tokens)[: max(1, round(request.input_tokens * part))]
        new = max(1, round(request.output_tokens * part))
        if len(prompt) + new < given.longest:
            asked.append(Asked(request.time_ms / 1000 / given.speed, prompt.tolist(), new))
    return asked


def _tokens(block: int, n: int, vocabulary: int) -> np.ndarray:
    return np.random.default_rng(block).integers(3, vocabulary - 100, n)


def options(given: argparse.Namespace, shape: Shape) -> dict[str, Any]:
    """The engine's arguments; what tiermem is to do goes into the environment."""
    more = surroundings(given.device)
    folder = model(shape)
    block = shape.block_bytes(given.block)
    room = given.gpu_blocks * block
    rest = given.below * room
    if given.mode in ("host", "nvme"):
        toml = f"[gpu]\nbudget = {room}\n[host]\n"
        toml += f"capacity = {rest if given.mode == 'host' else room}\n"
        if given.mode == "nvme":
            toml += f'[nvme]\npath = "{given.drive.absolute()}"\ncapacity = {rest}\n'
        (folder / f"mixed-{given.mode}.toml").write_text(toml)
        turn_on(folder / f"mixed-{given.mode}.toml")
        if given.device == "cpu":
            more |= {"num_gpu_blocks_override": given.below * given.gpu_blocks}
    else:
        more["num_gpu_blocks_override"] = given.gpu_blocks
    if given.device == "cpu":
        more["kv_cache_memory_bytes"] = rest if given.mode in ("host", "nvme") else room
    else:
        more |= {"compilation_config": {"cudagraph_capture_sizes": GRAPHS}}
        more |= {"gpu_memory_utilization": 0.3, "kv_cache_memory_bytes": room}
    if given.mode == "offload":
        more["kv_transfer_config"] = {
            "kv_connector": "OffloadingConnector", "kv_role": "kv_both",
            "kv_connector_extra_config": {"cpu_bytes_to_use": rest},
        }  # fmt: skip
    return {
        "model": str(folder), "load_format": "dummy", "skip_tokenizer_init": True, "seed": 0,
        "max_model_len": given.longest, "max_num_seqs": 64, "max_num_batched_tokens": 8192,
        "block_size": given.block, "disable_log_stats": True, **more,
    }  # fmt: skip


def params_of(asked: Asked) -> Any:
    from vllm import SamplingParams

    return SamplingParams(temperature=0, max_tokens=asked.new, ignore_eos=True, detokenize=False)


class Watch:
    """When the tokens of each request came, and what they were."""

    def __init__(self, load: list[Asked]) -> None:
        self._load = load
        self.start = time.perf_counter()
        self._last: dict[str, float] = {}
        self._ttft_ms: list[float] = []
        self._gaps_ms: list[float] = []
        self._answers: dict[str, list[int]] = {}
        self._cached = 0

    def saw(self, output: Any) -> None:
        """One output of the engine, for the request whose number is its name."""
        name, came = output.request_id, time.perf_counter()
        if name in self._last:
            self._gaps_ms.append((came - self._last[name]) * 1000)
        else:
            self._ttft_ms.append((came - self.start - self._load[int(name)].at_s) * 1000)
            self._cached += output.num_cached_tokens or 0
        self._last[name] = came
        if output.finished:
            self._answers[name] = list(output.outputs[0].token_ids)

    def told(self) -> dict[str, Any]:
        seconds = time.perf_counter() - self.start
        load, answers = self._load, self._answers
        asked_tokens = sum(len(asked.prompt) for asked in load)
        return {
            "requests": len(load),
            "seconds": seconds,
            "arrivals_s": load[-1].at_s,
            "prompt_tokens": asked_tokens,
            "cached_part": self._cached / asked_tokens,
            "tokens_per_s": (asked_tokens + sum(asked.new for asked in load)) / seconds,
            "ttft_ms": spread(self._ttft_ms),
            "inter_token_ms": spread(self._gaps_ms),
            "answers": digest([answers[str(i)] for i in range(len(load))]),
        }


def serve(llm: Any, load: list[Asked]) -> dict[str, Any]:
    """Ask everything at its time, and note when each token came."""
    waiting = deque(enumerate(load))
    watch = Watch(load)
    while waiting or llm.llm_engine.has_unfinished_requests():
        now = time.perf_counter() - watch.start
        while waiting and waiting[0][1].at_s <= now:
            number, asked = waiting.popleft()
            prompt = {"prompt_token_ids": asked.prompt}
            llm.llm_engine.add_request(str(number), prompt, params_of(asked))
        if not llm.llm_engine.has_unfinished_requests():
            time.sleep(min(0.001, waiting[0][1].at_s - now))
            continue
        for output in llm.llm_engine.step():
            watch.saw(output)
    return watch.told()


async def serve_apart(engine: Any, load: list[Asked]) -> dict[str, Any]:
    """The same of an engine in another process, a task for each request."""
    watch = Watch(load)

    async def ask(number: int, asked: Asked) -> None:
        await asyncio.sleep(max(0.0, watch.start + asked.at_s - time.perf_counter()))
        prompt = {"prompt_token_ids": asked.prompt}
        async for output in engine.generate(prompt, params_of(asked), str(number)):
            watch.saw(output)

    await asyncio.gather(*(ask(number, asked) for number, asked in enumerate(load)))
    return watch.told()


WARM_UP = [Asked(0.0, [5] * 600, 8), Asked(0.0, [7] * 90, 8)]


def here(given: argparse.Namespace, shape: Shape, load: list[Asked]) -> dict[str, Any]:
    more = options(given, shape)
    from vllm import LLM

    llm = LLM(**more)
    with turn():
        serve(llm, WARM_UP)
        with Hooks(llm) as hooks:
            served = serve(llm, load)
    found = {"counts": counts(llm), "hooks": hooks.summary(len(load))} if connector(llm) else {}
    return {**served, **found}


async def apart(given: argparse.Namespace, shape: Shape, load: list[Asked]) -> dict[str, Any]:
    more = options(given, shape)
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1"
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    engine = AsyncLLM.from_engine_args(AsyncEngineArgs(**more))
    try:
        with turn():
            await serve_apart(engine, WARM_UP)
            return await serve_apart(engine, load)
    finally:
        engine.shutdown()


def spread(values: list[float]) -> dict[str, float]:
    p50, p90, p99 = np.percentile(values, [50, 90, 99]).tolist() if values else (0.0, 0.0, 0.0)
    return {"n": len(values), "p50": p50, "p90": p90, "p99": p99}


def merged(out: Path) -> dict[str, Any]:
    """All modes side by side; same: part of the answers that are those of `stock`."""
    found = {one["mode"]: one for one in map(_read, sorted(out.glob("vllm-mixed-*.json")))}
    stock = found.get("stock", {}).get("answers")
    rows = {}
    for mode, one in found.items():
        same = None
        if stock is not None and len(stock) == len(one["answers"]):
            same = statistics.mean(a == b for a, b in zip(stock, one["answers"], strict=True))
        rows[mode] = {"same": same, **{k: v for k, v in one.items() if k != "answers"}}
    return {"schema": "tiermem.vllm_mixed.merged.v1", "rows": rows}


def _read(file: Path) -> dict[str, Any]:
    one: dict[str, Any] = json.loads(file.read_text())
    return one


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("mode", choices=[*MODES, "merge"])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--trace", type=Path)
    parser.add_argument("--size", choices=SHAPES, default="8b")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--speed", type=float, default=10.0)
    parser.add_argument("--tokens", type=int, default=32, help="of a block of the trace")
    parser.add_argument("--block", type=int, default=64, help="tokens of an engine's block")
    parser.add_argument("--gpu-blocks", type=int, default=1024)
    parser.add_argument("--below", type=int, default=8, help="times that, for all that left it")
    parser.add_argument("--longest", type=int, default=16384)
    parser.add_argument("--apart", action="store_true", help="the engine in a process of its own")
    parser.add_argument("--drive", type=Path, default=Path("kv-bench"))
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    if given.mode == "merge":
        print(json.dumps(merged(given.out), indent=1))
        return
    if given.trace is None:
        parser.error("--trace FILE: a trace of requests, such as Mooncake's conversation trace")
    file = given.out / f"vllm-mixed-{given.mode}.json"
    if file.exists():
        print(f"{file} is there")
        return
    shape = ON_CPU if given.device == "cpu" else SHAPES[given.size]
    load = load_of(given, shape)
    served = asyncio.run(apart(given, shape, load)) if given.apart else here(given, shape, load)
    how = {key: value for key, value in vars(given).items() if isinstance(value, str | int | float)}
    result = {
        "schema": "tiermem.vllm_mixed.v1", "mode": given.mode, "machine": machine(), "given": how,
        **served,
    }  # fmt: skip
    file.write_text(json.dumps(result, indent=1))
    print(json.dumps({k: v for k, v in result.items() if k != "answers"}, indent=1))


if __name__ == "__main__":
    main()
