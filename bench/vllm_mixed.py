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
answers shrink in proportion. A mode whose JSON is there is not run again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
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
from bench.vllm_gpu import GRAPHS, connector, counts
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


def engine(given: argparse.Namespace, shape: Shape) -> Any:
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
    from vllm import LLM

    return LLM(
        model=str(folder), load_format="dummy", skip_tokenizer_init=True, seed=0,
        max_model_len=given.longest, max_num_seqs=64, max_num_batched_tokens=8192,
        block_size=given.block, disable_log_stats=True, **more,
    )  # fmt: skip


def serve(llm: Any, load: list[Asked]) -> dict[str, Any]:
    """Ask everything at its time, and note when each token came."""
    from vllm import SamplingParams

    waiting = deque(enumerate(load))
    due: dict[str, float] = {}
    last: dict[str, float] = {}
    ttft_ms: list[float] = []
    gaps_ms: list[float] = []
    answers: dict[str, list[int]] = {}
    cached = 0
    start = time.perf_counter()
    while waiting or llm.llm_engine.has_unfinished_requests():
        now = time.perf_counter() - start
        while waiting and waiting[0][1].at_s <= now:
            number, asked = waiting.popleft()
            params = SamplingParams(
                temperature=0, max_tokens=asked.new, ignore_eos=True, detokenize=False
            )
            name = str(number)
            due[name] = start + asked.at_s
            llm.llm_engine.add_request(name, {"prompt_token_ids": asked.prompt}, params)
        if not llm.llm_engine.has_unfinished_requests():
            time.sleep(min(0.001, waiting[0][1].at_s - now))
            continue
        for output in llm.llm_engine.step():
            name, came = output.request_id, time.perf_counter()
            if name in last:
                gaps_ms.append((came - last[name]) * 1000)
            else:
                ttft_ms.append((came - due[name]) * 1000)
                cached += output.num_cached_tokens or 0
            last[name] = came
            if output.finished:
                answers[name] = list(output.outputs[0].token_ids)
    seconds = time.perf_counter() - start
    asked_tokens = sum(len(asked.prompt) for asked in load)
    return {
        "requests": len(load),
        "seconds": seconds,
        "arrivals_s": load[-1].at_s,
        "prompt_tokens": asked_tokens,
        "cached_part": cached / asked_tokens,
        "tokens_per_s": (asked_tokens + sum(asked.new for asked in load)) / seconds,
        "ttft_ms": spread(ttft_ms),
        "inter_token_ms": spread(gaps_ms),
        "answers": [
            hashlib.sha256(json.dumps(answers[str(i)]).encode()).hexdigest()[:12]
            for i in range(len(load))
        ],
    }


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
    llm = engine(given, shape)
    with turn():
        serve(llm, [Asked(0.0, [5] * 600, 8), Asked(0.0, [7] * 90, 8)])  # warm-up
        served = serve(llm, load)
    how = {key: value for key, value in vars(given).items() if isinstance(value, str | int | float)}
    result = {
        "schema": "tiermem.vllm_mixed.v1", "mode": given.mode, "machine": machine(), "given": how,
        **served, "counts": counts(llm) if connector(llm) else {},
    }  # fmt: skip
    file.write_text(json.dumps(result, indent=1))
    print(json.dumps({k: v for k, v in result.items() if k != "answers"}, indent=1))


if __name__ == "__main__":
    main()
