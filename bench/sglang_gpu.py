"""SGLang on a GPU: time to first token by where the prefix is, with tiermem and with its peers.

    python bench/sglang_gpu.py OUT [--shape tiny|8b] [--part host,nvme,...] [--left SECONDS]
    python bench/sglang_gpu.py OUT --shape 8b --bars      run nothing, show what is there

Each part is an engine of its own over the same prompts, with the same room for KV on the GPU:

    plain    SGLang alone: a prefix that no longer fits is computed again
    resident SGLang alone, with room for everything: what a hit on the GPU costs at best
    hicache  HiCache, page_first layout, kernel I/O
    file     HiCache over its file backend, host pool as small as it may be
    host     tiermem, all prompts fit into host memory
    nvme     tiermem, host memory for a few pages only

and writes OUT/SHAPE-PART.json; a part whose file is there is not run again. No part is begun with
less than its --each seconds left (240), so run the same command until nothing is left to do; the
table, and the bars as far as their parts are there, are printed and written to OUT/SHAPE.json each
time. Parts that `bench/side_by_side.py` starts together take turns prompt by prompt. Needs SGLang
and torch with CUDA; models are shapes with random weights. `--shape check` is a very small one that
also runs on a CPU, without the HiCache parts, and so is `pages`, which has as many pages as 8b.
"hooks" in the results are what tiermem's hooks took of a request (`bench/sglang_hook_times.py`).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench import sglang_hook_times as hook_times
from bench.side_by_side import turn

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("resident", "plain", "hicache", "file", "host", "nvme")
OURS = ("host", "nvme")
SPREAD = 0.05
"""Of random weights; SGLang's own 0.001 makes every context give the same tokens."""

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {
        "hidden_size": 1024, "intermediate_size": 2048, "num_hidden_layers": 8,
        "num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 32000,
        "page_size": 256, "lengths": {4096: 16, 16384: 4},
    },
    "8b": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
        "vocab_size": 128256, "page_size": 64, "lengths": {4096: 16, 16384: 4},
    },
    "check": {
        "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 32000,
        "page_size": 16, "lengths": {256: 8, 512: 2},
    },
    "pages": {
        "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 32000,
        "page_size": 16, "lengths": {1024: 16, 4096: 4},
    },
}  # fmt: skip


def resident_tokens(shape: dict[str, Any]) -> int:
    """Room for KV on the GPU: two and a half of the longest prompts."""
    return 5 * max(shape["lengths"]) // 2


NEW = 16

if os.environ.get("SGLANG_GPU_BENCH"):
    # In the scheduler's process too, which imports this file.
    from sglang.srt.model_loader import weight_utils

    weight_utils.initialize_dummy_weights.__defaults__ = (-SPREAD, SPREAD, 1234)
    hook_times.watch()


def token_bytes(shape: dict[str, Any]) -> int:
    heads: int = shape["num_key_value_heads"] * shape["head_dim"]
    return 2 * 2 * heads * int(shape["num_hidden_layers"])


def make_model(shape: dict[str, Any], folder: Path) -> Path:
    """A folder with the config of a Llama of this shape; the engine makes random weights."""
    config = {k: v for k, v in shape.items() if k not in ("page_size", "lengths")}
    config |= {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
        "max_position_embeddings": 32768, "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
        "tie_word_embeddings": False, "torch_dtype": "bfloat16", "bos_token_id": 1,
        "eos_token_id": 2,
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def entry_point(folder: Path) -> Path:
    """What an installed tiermem has: the metadata by which SGLang finds its plugin."""
    about = folder / "tiermem-0.1.0.dist-info"
    about.mkdir(parents=True, exist_ok=True)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: tiermem\nVersion: 0.1.0\n")
    (about / "entry_points.txt").write_text(
        "[sglang.srt.plugins]\ntiermem = tiermem.integrations.sglang_plugin:register\n"
    )
    return folder


def options(part: str, shape: dict[str, Any], work: Path) -> dict[str, Any]:
    """The engine's arguments; every part has the same room on the GPU but `resident`."""
    import torch

    total = sum(length * count for length, count in shape["lengths"].items())
    given: dict[str, Any] = {
        "model_path": str(make_model(shape, work / "model")), "load_format": "dummy",
        "skip_tokenizer_init": True, "dtype": "bfloat16", "attention_backend": "triton",
        "sampling_backend": "pytorch", "grammar_backend": "none", "random_seed": 1,
        "page_size": shape["page_size"], "mem_fraction_static": 0.9, "context_length": 32768,
        "max_running_requests": 16, "chunked_prefill_size": 16384, "log_level": "warning",
        "cuda_graph_max_bs_decode": 16, "disable_prefill_cuda_graph": True,  # minutes to capture
    }  # fmt: skip
    if not torch.cuda.is_available():
        given |= {
            "device": "cpu", "attention_backend": "torch_native", "disable_cuda_graph": True,
            "dtype": "float32", "mem_fraction_static": 0.3,
        }  # fmt: skip
    if part == "resident":
        given["max_total_tokens"] = 2 * total
    elif part in ("plain", "hicache", "file"):
        given["max_total_tokens"] = resident_tokens(shape)
    if part in ("hicache", "file"):
        given |= {
            "enable_hierarchical_cache": True, "hicache_write_policy": "write_through",
            "hicache_io_backend": "kernel", "hicache_mem_layout": "page_first",
            "hicache_ratio": 4.0 if part == "hicache" else 1.25,
        }  # fmt: skip
    if part == "file":
        given |= {
            "hicache_storage_backend": "file",
            "hicache_storage_prefetch_policy": "wait_complete",
        }
    return given


def configuration(part: str, shape: dict[str, Any], work: Path) -> str:
    """tiermem's file: the same tokens on the GPU, one page more for padding."""
    import torch

    page = token_bytes(shape) * shape["page_size"] * (1 if torch.cuda.is_available() else 2)
    frames = resident_tokens(shape) // shape["page_size"] + 1
    total = sum(length * count for length, count in shape["lengths"].items())
    pages = 5 * total // 4 // shape["page_size"]
    host = pages if part == "host" else max(16, frames // 4)
    text = f"[gpu]\nbudget = {frames * page}\n[host]\ncapacity = {host * page}\n"
    text += f"[metrics]\nport = {free_port()}\n"
    if part == "nvme":
        text += f'[nvme]\npath = "{work / "slab"}"\ncapacity = {pages * page * 11 // 10}\n'
    return text


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def moved() -> dict[str, float]:
    """Pages that arrived on each route of tiermem since it began; empty where it is not on."""
    config = os.environ.get("TIERMEM_CONFIG")
    if config is None:
        return {}
    port = re.findall(r"port = (\d+)", Path(config).read_text())[0]
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=20) as reply:
        text = reply.read().decode()
    found = re.findall(r'tiermem_route_pages_total\{dst="(\w+)",src="(\w+)"\} (\S+)', text)
    return {f"{src}->{dst}": float(pages) for dst, src, pages in found if float(pages)}


def prompt(seed: int, length: int) -> list[int]:
    return [3 + (seed * 7919 + i * 7 + i // 13 + i * i % 1009) % 31000 for i in range(length)]


def told(asked: list[tuple[float, dict[str, Any]]]) -> dict[str, Any]:
    """Requests of one length in one phase, one after another."""
    took = [seconds for seconds, _ in asked]
    about = [answer["meta_info"] for _, answer in asked]
    return {
        "n": len(took), "ttft_s": took, "median_s": statistics.median(took), "p99_s": max(took),
        "cached_tokens": [meta["cached_tokens"] for meta in about],
        "cached_from": [meta.get("cached_tokens_details") for meta in about],
    }  # fmt: skip


class Bench:
    """One engine and what it was seen to do."""

    def __init__(self, engine: Any, shape: dict[str, Any]) -> None:
        self._engine = engine
        self._shape = shape
        self.tokens: dict[str, list[int]] = {}
        self.different: list[str] = []

    def ask(self, seed: int, length: int, new: int = 1) -> tuple[float, dict[str, Any]]:
        """Seconds and the answer, nobody else measuring."""
        with turn():
            return self.answer(seed, length, new)

    def answer(self, seed: int, length: int, new: int) -> tuple[float, dict[str, Any]]:
        start = time.perf_counter()
        answer = self._engine.generate(
            input_ids=prompt(seed, length),
            sampling_params={"temperature": 0, "max_new_tokens": new, "ignore_eos": True},
        )
        return time.perf_counter() - start, answer

    def phase(self, name: str, note: Callable[[str, dict[str, Any]], None]) -> dict[str, Any]:
        """Every prompt once, one at a time: seconds to the first token, and tokens cached."""
        found: dict[str, Any] = {}
        for length, count in self._shape["lengths"].items():
            asked = []
            before = hook_times.told()
            for seed in range(count):
                asked.append(self.ask(length + seed, length))
                note(f"{name} {length} {seed}", asked[-1][1])
            hooks = hook_times.between(before, hook_times.told(), count)
            found[str(length)] = told(asked) | {"hooks": hooks}
        return found

    def again(self) -> dict[str, Any]:
        """Each prompt twice in a row: the second time its prefix is on the GPU."""
        found: dict[str, Any] = {}
        for length, count in self._shape["lengths"].items():
            asked = []
            spent: list[dict[str, dict[str, float]]] = []
            for seed in range(count):
                self.ask(length + seed, length)
                before = hook_times.told()
                asked.append(self.ask(length + seed, length))
                spent.append(hook_times.between(before, hook_times.told(), 1))
            found[str(length)] = told(asked) | {"hooks": hook_times.mean(spent)}
        return found

    def remember(self, name: str, answer: dict[str, Any]) -> None:
        self.tokens[name.partition(" ")[2]] = list(answer["output_ids"])

    def compare(self, name: str, answer: dict[str, Any]) -> None:
        if self.tokens.get(name.partition(" ")[2]) != list(answer["output_ids"]):
            self.different.append(name)

    def decode(self) -> dict[str, Any]:
        """Seconds for 128 tokens of eight requests at once, all of them on the GPU: the cost of
        being there when nothing needs to move."""
        least = min(self._shape["lengths"])
        params = {"temperature": 0, "max_new_tokens": least // 32, "ignore_eos": True}
        inputs = [prompt(900 + seed, least // 4) for seed in range(8)]
        took = []
        for _ in range(5):
            with turn():
                start = time.perf_counter()
                self._engine.generate(input_ids=inputs, sampling_params=params)
                took.append(time.perf_counter() - start)
        return {"n": 5, "took_s": took, "median_s": statistics.median(took[1:])}

    def outputs(self) -> dict[str, list[int]]:
        """Longer answers after everything has moved, to be compared between parts."""
        found = {}
        for length, count in self._shape["lengths"].items():
            for seed in range(min(count, 4)):
                _, answer = self.ask(length + seed, length, NEW)
                found[f"{length} {seed}"] = list(answer["output_ids"])
        return found


def serve(part: str, shape: dict[str, Any], work: Path) -> dict[str, Any]:
    """One part, in a process of its own."""
    import torch
    from sglang.srt.entrypoints.engine import Engine

    start = time.perf_counter()
    engine = Engine(**options(part, shape, work))
    ready_s = time.perf_counter() - start
    bench = Bench(engine, shape)
    for length in shape["lengths"]:
        bench.answer(77, length, 4)  # compiles
    result: dict[str, Any] = {
        "schema": "tiermem.sglang_gpu.v1",
        "part": part,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "sglang": metadata.version("sglang"),
        "resident_tokens": resident_tokens(shape),
        "page_size": shape["page_size"],
        "token_bytes": token_bytes(shape),
        "ready_s": ready_s,
    }
    result["cold"] = bench.phase("cold", bench.remember)
    result["moved"] = {"cold": moved()}
    result["flushed"] = bench.phase("flushed", bench.compare)
    result["moved"]["flushed"] = moved()
    result["flushed_again"] = bench.phase("flushed_again", bench.compare)
    result["moved"]["flushed_again"] = moved()
    result["on_gpu"] = bench.again()
    result["decode"] = bench.decode()
    result["outputs"] = bench.outputs()
    result["first_tokens_differ"] = bench.different
    engine.shutdown()
    return result


def run_part(part: str, name: str, out: Path, disk: Path | None, timeout_s: float) -> bool:
    """In a child, so that a part that dies or hangs costs itself only."""
    with tempfile.TemporaryDirectory(dir=disk) as folder:
        work = Path(folder)
        path = os.pathsep.join(
            [str(entry_point(work / "site")), str(ROOT), os.environ.get("PYTHONPATH", "")]
        )
        env = {
            **{k: v for k, v in os.environ.items() if not k.startswith("TIERMEM")},
            "PYTHONPATH": path, "SGLANG_GPU_BENCH": "1", "HF_HUB_OFFLINE": "1",
            "SGLANG_HICACHE_FILE_BACKEND_STORAGE_DIR": str(work / "hicache"),
            hook_times.PATH: str(work / "hooks.json"),
        }  # fmt: skip
        if part in OURS:
            config = work / "tiermem.toml"
            config.write_text(configuration(part, SHAPES[name], work))
            env |= {"TIERMEM": "1", "TIERMEM_CONFIG": str(config)}
        log = out / f"{name}-{part}.log"
        with log.open("wb") as lines:
            child = subprocess.Popen(
                [sys.executable, __file__, str(out), "--shape", name, "--serve", part,
                 "--work", str(work), "--page-size", str(SHAPES[name]["page_size"])],
                env=env, stdout=lines, stderr=lines, start_new_session=True,
            )  # fmt: skip
            try:
                child.wait(timeout_s)
            except subprocess.TimeoutExpired:
                print(f"{name} {part}: not done after {timeout_s:.0f} s")
            finally:
                _end(child)
        shutil.rmtree(work / "slab", ignore_errors=True)
    return (out / f"{name}-{part}.json").exists()


def _end(child: subprocess.Popen[bytes]) -> None:
    try:
        os.killpg(child.pid, 9)
    except ProcessLookupError:
        return
    finally:
        child.wait()


def read(out: Path, name: str) -> dict[str, dict[str, Any]]:
    """The parts that are there."""
    return {p: json.loads(f.read_text()) for p in PARTS if (f := out / f"{name}-{p}.json").exists()}


def table(found: dict[str, dict[str, Any]], name: str) -> None:
    """What the parts took, beside one another."""
    for length in SHAPES[name]["lengths"]:
        print(f"\n{name}, prompts of {length} tokens: median ms to the first token (cached tokens)")
        for phase in ("cold", "flushed", "flushed_again", "on_gpu"):
            cells = []
            for part, result in found.items():
                one = result[phase][str(length)]
                cached = statistics.median(one["cached_tokens"])
                cells.append(f"{part} {one['median_s'] * 1e3:7.1f} ({cached:.0f})")
            print(f"  {phase:14}", "  ".join(cells))
    for part, result in found.items():
        same = result["outputs"] == next(iter(found.values()))["outputs"]
        decode, ready = result["decode"]["median_s"], result["ready_s"]
        print(
            f"{part:9} decode {decode:.3f} s, ready {ready:.0f} s, "
            f"outputs {'equal' if same else 'DIFFER'}, "
            f"{len(result['first_tokens_differ'])} first tokens differ after moves"
        )


def bars(found: dict[str, dict[str, Any]], name: str) -> Iterator[dict[str, Any]]:
    """Each bar whose parts are there: what was compared, the figure, and whether it is met."""
    first = next(iter(found.values()), None)
    for part in OURS:
        if part in found and first is not None:
            differ = len(found[part]["first_tokens_differ"])
            same = found[part]["outputs"] == first["outputs"]
            yield bar(
                f"{part}: the same tokens as {first['part']}", float(differ), same and not differ
            )
    for length in SHAPES[name]["lengths"]:
        yield from bars_of_length(found, length)
    for part in OURS:
        if {"plain", part} <= found.keys():
            cost = found[part]["decode"]["median_s"] / found["plain"]["decode"]["median_s"]
            yield bar(f"{part}: all resident, decode / plain's, at most 1.02", cost, cost <= 1.02)


def bars_of_length(found: dict[str, dict[str, Any]], length: int) -> Iterator[dict[str, Any]]:
    def median(part: str, phase: str) -> float:
        seconds: float = found[part][phase][str(length)]["median_s"]
        return seconds

    if {"hicache", "host"} <= found.keys():
        ratio = median("host", "flushed") / median("hicache", "flushed")
        yield bar(f"{length}: host hit / HiCache's, at most 1", ratio, ratio <= 1)
    if {"file", "nvme"} <= found.keys():
        ratio = median("file", "flushed") / median("nvme", "flushed")
        yield bar(f"{length}: HiCache's file hit / NVMe hit, at least 3", ratio, ratio >= 3)
    if {"plain", "nvme"} <= found.keys():
        ratio = median("nvme", "flushed") / median("plain", "flushed")
        cached = statistics.median(found["nvme"]["flushed"][str(length)]["cached_tokens"])
        text = f"{length}: NVMe hit / computed again, below 1 or declined ({cached:.0f} cached)"
        yield bar(text, ratio, ratio < 1 or cached < length // 2)
    for part in OURS:
        if {"plain", part} <= found.keys():
            ratio = median(part, "on_gpu") / median("plain", "on_gpu")
            yield bar(
                f"{length}: {part}: hit on the GPU / plain's, at most 1.02", ratio, ratio <= 1.02
            )


def bar(text: str, figure: float, met: bool) -> dict[str, Any]:
    return {"bar": text, "figure": figure, "met": met}


def report(out: Path, name: str) -> None:
    """Print what is there, and keep it in one file."""
    found = read(out, name)
    if not found:
        return
    table(found, name)
    print()
    judged = list(bars(found, name))
    for one in judged:
        print(f"{'met   ' if one['met'] else 'NOT MET'} {one['figure']:8.3f}  {one['bar']}")
    (out / f"{name}.json").write_text(json.dumps({"bars": judged, "parts": found}))
    missing = [part for part in PARTS if part not in found]
    print("every part is there" if not missing else f"still to run: {', '.join(missing)}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="8b")
    parser.add_argument("--part", default=",".join(PARTS))
    parser.add_argument("--left", type=float, default=480.0, help="seconds that may be used")
    parser.add_argument("--each", type=float, default=240.0, help="seconds for one part at most")
    parser.add_argument("--disk", type=Path, help="folder for what goes to a drive (default: /tmp)")
    parser.add_argument("--page-size", type=int, help="tokens in a page, instead of the shape's")
    parser.add_argument("--bars", action="store_true", help="run nothing")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    parts = args.part.split(",")
    if not set(parts) <= set(PARTS):
        parser.error(f"--part {args.part}: of {', '.join(PARTS)}")
    if args.page_size:
        SHAPES[args.shape]["page_size"] = args.page_size
    args.out.mkdir(parents=True, exist_ok=True)
    if args.serve:
        result = serve(args.serve, SHAPES[args.shape], args.work)
        file = args.out / f"{args.shape}-{args.serve}.json"
        file.with_suffix(".tmp").write_text(json.dumps(result))
        file.with_suffix(".tmp").rename(file)
        return
    end = time.monotonic() + args.left
    for part in [] if args.bars else parts:
        if (args.out / f"{args.shape}-{part}.json").exists():
            continue
        left = end - time.monotonic()
        if left < args.each:
            print(f"{part}: {left:.0f} s left; run the same command again")
            break
        made = run_part(part, args.shape, args.out, args.disk, args.each)
        log = args.out / f"{args.shape}-{part}.log"
        print(f"{args.shape} {part}:", "done" if made else f"failed, see {log}", flush=True)
        if not made:
            print(log.read_text(errors="replace")[-2000:], flush=True)
    report(args.out, args.shape)


if __name__ == "__main__":
    main()
