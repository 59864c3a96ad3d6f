"""Two vLLM engines on one GPU with alternating bursts, each of them larger than half of the memory.

    python bench/vllm_share.py PART --out DIR [--size 8b|tiny] [--device cuda|cpu]
    python bench/vllm_share.py merge --out DIR [--size ...] [--device ...]

Parts, the same load each, both engines in processes of their own:
  halves    vLLM as it is, each engine with half of the memory for its KV cache
  tiermem   both share all of it under a ledger; what does not fit is in host memory
  ideal     vLLM as it is, each engine with all of the memory: each alone with the card
An engine is asked for its prompts once, cold; then the bursts alternate. In a burst `--clients`
clients ask for the engine's prompts in random order, each as soon as its last answer has ended.
At the end each engine answers its first prompts one by one, and `merge` compares those tokens.
In `tiermem` the ledger is sampled all the while, and `--pool` makes one pool of the two host tiers:
then one engine is also asked for prompts of the other, whose content it takes from there. A part
whose JSON is there is not run again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import subprocess
import sys
import threading
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

sys.path.insert(0, str(Path(__file__).parents[1]))

import msgspec

from bench.side_by_side import turn
from bench.vllm_engines import ON_CPU, SHAPES, Shape, model, surroundings, turn_on
from bench.vllm_gpu import summary
from tiermem.bench.machine import machine
from tiermem.ledger import Ledger, LedgerError

PARTS = ("halves", "tiermem", "ideal")
GROUP = "vllm-share"
SAMPLE_S = 0.01
SHOWN_S = 2.0
"""An engine that has shown no more of its host memory for so long has shown all of it."""
FIXED = 4
IDLE_S = {"cuda": 0.5, "cpu": 0.1}
"""Shorter than a burst, so that memory moves while it lasts."""


@dataclass(frozen=True, slots=True)
class Load:
    """Of `tokens` a block, blocks in all.

    prompts of `length` tokens an engine, asked `passes` times in a burst; `new` tokens are
    generated for each.
    """

    shape: Shape
    tokens: int
    blocks: int
    prompts: int
    length: int
    passes: int
    new: int
    batched: int
    host: str

    @property
    def block_bytes(self) -> int:
        return self.shape.block_bytes(self.tokens)

    @property
    def burst_blocks(self) -> int:
        return self.prompts * -(-(self.length + self.new) // self.tokens)


def load_of(device: str, size: str) -> Load:
    if device == "cpu":
        return Load(ON_CPU, 32, 384, 16, 600, 8, 8, 2048, "256MiB")
    return Load(SHAPES[size], 64, 3072, 38, 4096, 3, 16, 8192, "22GiB")


# One engine ---------------------------------------------------------------------------------------


def serve(name: str, args: argparse.Namespace) -> None:
    """Answer one JSON line for each on standard input, until it ends."""
    load = load_of(args.device, args.size)
    say = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # vLLM prints
    started = time.perf_counter()
    llm = engine(args, name, load)
    tell(say, {"started_s": time.perf_counter() - started})
    prompts = prompts_of(name, load)
    for line in sys.stdin:
        order = json.loads(line)
        if order["do"] == "counts":
            tell(say, counts(llm))
        elif order["do"] == "burst":
            rnd = random.Random(order["seed"])
            passes = 1 if order["cold"] else load.passes
            asked = [p for _ in range(passes) for p in rnd.sample(prompts, load.prompts)]
            tell(say, burst(llm, asked, load.new, args.clients))
        else:
            first = order.get("first", 0)
            asked = prompts_of(order.get("of", name), load)[first : first + FIXED]
            answers = [burst(llm, [p], load.new, 1) for p in asked]
            tokens = [answer["tokens"][0] for answer in answers]
            cached = sum(answer["cached"] for answer in answers)
            tell(say, {"tokens": tokens, "cached": cached, "counts": counts(llm)})


def prompts_of(name: str, load: Load) -> list[list[int]]:
    rnd = random.Random(name)
    return [
        [rnd.randrange(3, load.shape.vocabulary - 100) for _ in range(load.length)]
        for _ in range(load.prompts)
    ]


def tell(say: TextIO, what: dict[str, Any]) -> None:
    say.write(json.dumps(what) + "\n")
    say.flush()


def engine(args: argparse.Namespace, name: str, load: Load) -> Any:
    part, device, clients, pool = args.part, args.device, args.clients, args.pool
    more = surroundings(device)
    if device == "cuda":
        more["compilation_config"] = {"cudagraph_capture_sizes": [1, 2, 4, 8, 16]}
        more["gpu_memory_utilization"] = 0.3  # only looked at: the next line decides
    whole = load.blocks * load.block_bytes
    more["kv_cache_memory_bytes"] = whole if part != "halves" else whole // 2
    if part == "tiermem":
        floor = (clients + 1) * load.burst_blocks // load.prompts * load.block_bytes
        toml = args.model / f"{name}.toml"
        toml.write_text(
            f'[gpu]\nbudget = {whole}\n[host]\ncapacity = "{load.host}"\n'
            f'[share]\ngroup = "{GROUP}"\nname = "{name}"\ntotal = {whole}\n'
            f"floor = {floor}\nidle_s = {IDLE_S[args.device]}\n"
            + (f'host = "{pool}"\n' if pool else "")
        )
        turn_on(toml)
    else:
        os.environ["TIERMEM"] = "0"
        more["num_gpu_blocks_override"] = load.blocks if part == "ideal" else load.blocks // 2
    from vllm import LLM

    return LLM(
        model=str(args.model), load_format="dummy", skip_tokenizer_init=True, seed=0,
        max_model_len=load.length + 4 * load.tokens, max_num_seqs=16, block_size=load.tokens,
        max_num_batched_tokens=load.batched, disable_log_stats=True, **more,
    )  # fmt: skip


def burst(llm: Any, prompts: list[list[int]], new: int, clients: int) -> dict[str, Any]:
    """So many clients ask in turn; milliseconds to each first token, seconds in all."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False)
    waiting = deque(enumerate(prompts))
    asked: dict[str, float] = {}
    first: dict[str, float] = {}
    tokens: dict[str, list[int]] = {}
    cached = 0
    start = time.perf_counter()

    def ask() -> None:
        if waiting:
            number, prompt = waiting.popleft()
            asked[str(number)] = time.perf_counter()
            llm.llm_engine.add_request(str(number), {"prompt_token_ids": prompt}, params)

    for _ in range(clients):
        ask()
    while llm.llm_engine.has_unfinished_requests():
        for output in llm.llm_engine.step():
            name = output.request_id
            first.setdefault(name, (time.perf_counter() - asked[name]) * 1000)
            if output.finished:
                tokens[name] = list(output.outputs[0].token_ids)
                cached += output.num_cached_tokens or 0
                ask()
    took = time.perf_counter() - start
    return {
        "ttft_ms": list(first.values()),
        "took_s": took,
        "cached": cached,
        "asked": sum(map(len, prompts)),
        "tokens": [digest(tokens[str(i)]) for i in range(len(prompts))],
    }


def digest(tokens: list[int]) -> str:
    return hashlib.sha256(json.dumps(tokens).encode()).hexdigest()[:12]


def counts(llm: Any) -> dict[str, int]:
    side = getattr(llm.llm_engine.engine_core.engine_core.scheduler.connector, "engine", None)
    if side is None:
        return {}
    return {**side.director.statistics(), **side.director.events(), **side.counts}


# Both of them -------------------------------------------------------------------------------------


class Engine:
    """A child process that serves; `log` is what it said."""

    def __init__(self, args: argparse.Namespace, name: str, log: Path) -> None:
        self._log = log
        self._process = subprocess.Popen(
            [
                sys.executable, __file__, args.part, "--engine", name, "--out", str(args.out),
                "--size", args.size, "--device", args.device, "--clients", str(args.clients),
                "--model", str(args.model), *(["--pool", args.pool] if args.pool else []),
            ],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log.open("w"), text=True,
        )  # fmt: skip

    def ask(self, **order: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        return self.answer()

    def answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"an engine has ended: {self._log.read_text()[-3000:]}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        """Let it end by itself; whoever does not is killed."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


class Sampler:
    """Looks at the ledger all the while: what each holds, and whether all of it fits."""

    def __init__(self) -> None:
        self.samples: list[tuple[float, dict[str, int]]] = []
        self.over = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        ledger: Ledger | None = None
        while not self._stop.wait(SAMPLE_S):
            try:
                if ledger is None:
                    ledger = next((led for led in Ledger.found() if GROUP in led.path.name), None)
                    continue
                snapshot = ledger.snapshot()
            except LedgerError:
                continue  # it is being made, or was left by all
            self.over += sum(m.held + m.reserved for m in snapshot.members) > snapshot.budget
            held = {m.name: m.held for m in snapshot.members}
            self.samples.append((time.perf_counter(), held))
        if ledger is not None:
            ledger.close()

    def most(self, name: str, since: float, until: float) -> int:
        """Bytes that one held at most."""
        return max((h.get(name, 0) for t, h in self.samples if since <= t <= until), default=0)

    def close(self) -> None:
        self._stop.set()
        self._thread.join()


def put_to_sleep(name: str, engine: Engine) -> None:
    """As `tiermem release` does: all of its content is in host memory, and shown there."""
    (ledger,) = (one for one in Ledger.found() if GROUP in one.path.name)
    with ledger:
        (whom,) = (one for one in ledger.snapshot().members if one.name == name)
        ledger.change(whom, asleep=True)
        until = time.monotonic() + 30
        while whom.held > whom.page_bytes * 16 and time.monotonic() < until:
            time.sleep(SAMPLE_S)
            (whom,) = (one for one in ledger.snapshot().members if one.name == name)
    shown, until = -1, time.monotonic() + 60
    while time.monotonic() < until:
        before, shown = shown, engine.ask(do="counts").get("peers_shown", 0)
        if shown and shown == before:
            return
        time.sleep(SHOWN_S)


def measure(
    args: argparse.Namespace, engines: dict[str, Engine], sampler: Sampler | None
) -> tuple[dict[str, Any], list[dict[str, Any]], dict[str, Any], dict[str, Any]]:
    """What the cold burst of each engine took, the alternating ones, answers to fixed prompts one
    by one, and, with one pool, answers to prompts of the other engine."""
    cold = {name: short(one.ask(do="burst", cold=True, seed=0)) for name, one in engines.items()}
    bursts = []
    for i in range(args.bursts):
        for name, one in engines.items():
            since = time.perf_counter()
            result = {"engine": name, **short(one.ask(do="burst", cold=False, seed=i + 1))}
            if sampler is not None:
                result["most_held"] = sampler.most(name, since, time.perf_counter())
            bursts.append(result)
    fixed = {name: one.ask(do="fixed") for name, one in engines.items()}
    others: dict[str, Any] = {}
    if args.pool and args.part == "tiermem":
        # What one has in host memory, the other need not compute.
        put_to_sleep("a", engines["a"])
        others["b"] = engines["b"].ask(do="fixed", of="a", first=FIXED)
        others["a"] = engines["a"].ask(do="fixed", first=FIXED)
    return cold, bursts, fixed, others


def run(args: argparse.Namespace) -> dict[str, Any]:
    load = load_of(args.device, args.size)
    sampler = Sampler() if args.part == "tiermem" else None
    begun = time.perf_counter()
    args.model = model(load.shape)  # both have the same, so their content is the same
    engines = {name: Engine(args, name, args.out / f"{args.part}-{name}.log") for name in "ab"}
    try:
        started = {name: one.answer()["started_s"] for name, one in engines.items()}
        with turn():
            cold, bursts, fixed, others = measure(args, engines, sampler)
    finally:
        for one in engines.values():
            one.close()
        if sampler is not None:
            sampler.close()
    every = [x for one in bursts for x in one["ttft_ms"]]
    first = sorted(every)
    return {
        "schema": "tiermem.vllm_share.v1", "part": args.part, "size": args.size,
        "device": args.device, "machine": msgspec.to_builtins(machine()), "clients": args.clients,
        "budget": load.blocks * load.block_bytes,
        "burst_bytes": load.burst_blocks * load.block_bytes,
        "started_s": started, "took_s": time.perf_counter() - begun, "cold": cold,
        "bursts": bursts, "ttft_ms": {**summary(every), "p50": first[len(first) // 2]},
        "tokens_per_s": sum(b["asked"] + load.new * len(b["ttft_ms"]) for b in bursts)
        / sum(b["took_s"] for b in bursts),
        "cached": sum(b["cached"] for b in bursts) / sum(b["asked"] for b in bursts),
        "host_pool": args.pool,
        "samples": 0 if sampler is None else len(sampler.samples),
        "over_budget": None if sampler is None else sampler.over,
        "fixed": fixed,
        "others": others,
    }  # fmt: skip


def short(result: dict[str, Any]) -> dict[str, Any]:
    """Without the tokens of a burst, whose batches depend on time."""
    return {key: value for key, value in result.items() if key != "tokens"}


def merged(out: Path, size: str, device: str) -> dict[str, Any]:
    """The three ways side by side, and what issue 7 asks of them."""
    found = {
        part: json.loads(file.read_text())
        for part in PARTS
        if (file := out / f"vllm-share-{device}-{size}-{part}.json").exists()
    }
    rows = {
        part: {
            "ttft_p50_ms": one["ttft_ms"]["p50"],
            "ttft_p99_ms": one["ttft_ms"]["p99"],
            "n": one["ttft_ms"]["n"],
            "tokens_per_s": one["tokens_per_s"],
            "cached": one["cached"],
            "over_budget": one["over_budget"],
        }
        for part, one in found.items()
    }
    verdict: dict[str, Any] = {}
    if len(rows) == len(PARTS):
        ours, ideal, halves = rows["tiermem"], rows["ideal"], rows["halves"]
        same = [
            found[part]["fixed"][name]["tokens"] == found["ideal"]["fixed"][name]["tokens"]
            for part in PARTS
            for name in "ab"
        ]
        verdict = {
            "p50_of_ideal": ours["ttft_p50_ms"] / ideal["ttft_p50_ms"],
            "p99_of_ideal": ours["ttft_p99_ms"] / ideal["ttft_p99_ms"],
            "throughput_of_ideal": ours["tokens_per_s"] / ideal["tokens_per_s"],
            "p99_better_than_halves": halves["ttft_p99_ms"] / ours["ttft_p99_ms"],
            "throughput_better_than_halves": ours["tokens_per_s"] / halves["tokens_per_s"],
            "tokens_same": all(same),
        }
    return {"schema": "tiermem.vllm_share.merged.v1", "rows": rows, "verdict": verdict}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=[*PARTS, "merge"])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--size", choices=SHAPES, default="8b")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--bursts", type=int, default=2, help="of each engine, after the cold one")
    parser.add_argument("--pool", help='one host pool of so many bytes for both, as "44GiB"')
    parser.add_argument("--engine", help=argparse.SUPPRESS)
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.engine:
        serve(args.engine, args)
        return
    if args.part == "merge":
        result = merged(args.out, args.size, args.device)
        (args.out / f"vllm-share-{args.device}-{args.size}.json").write_text(json.dumps(result))
        print(json.dumps(result, indent=1))
        return
    file = args.out / f"vllm-share-{args.device}-{args.size}-{args.part}.json"
    if file.exists():
        print(f"{file} is there")
        return
    result = run(args)
    file.write_text(json.dumps(result, indent=1))
    brief = ("part", "took_s", "ttft_ms", "tokens_per_s", "cached", "samples", "over_budget")
    print(json.dumps({key: result[key] for key in brief}), flush=True)


if __name__ == "__main__":
    main()
