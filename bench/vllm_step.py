"""What tiermem costs a step of vLLM when everything is resident, on a CPU.

    python bench/vllm_step.py --out step.json [--pairs 30]

Three engines serve the same rounds in turn (which goes first changes): the stock one, the stock one
with a connector that does nothing (vllm_nothing.py: vLLM's own price of any), and one under
TIERMEM=1 with room for every block on the "GPU". Each round is timed alone: `REQUESTS` prompts of
`PROMPT` tokens, cached after the first, and `NEW` steps. Prints medians, and the median and
quartiles of the rounds' ratios to the stock engine's: of wall time, and of the time that the
engine's process had on a processor, all threads together, which says more where others use the
machine too.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

REQUESTS, PROMPT, NEW = 8, 256, 64
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 256,
    "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 1024, "rms_norm_eps": 1e-5,
    "max_position_embeddings": 4096, "hidden_act": "silu", "bos_token_id": 1, "eos_token_id": 2,
    "tie_word_embeddings": False, "dtype": "bfloat16",
}  # fmt: skip
TOML = '[gpu]\ndevice = "cpu"\nbudget = "64MiB"\n[host]\ncapacity = "64MiB"\n'


def serve(folder: Path, connector: bool) -> None:
    """A child: one line in, one round, its seconds out: by the clock, and on a processor."""
    from vllm import LLM, SamplingParams
    from vllm.config import KVTransferConfig

    nothing = KVTransferConfig(
        kv_connector="NothingConnector", kv_connector_module_path="vllm_nothing",
        kv_role="kv_consumer",
    )  # fmt: skip
    llm = LLM(
        model=str(folder), load_format="dummy", skip_tokenizer_init=True, enforce_eager=True,
        max_model_len=1024, max_num_seqs=REQUESTS, max_num_batched_tokens=2048, block_size=32,
        seed=0, num_gpu_blocks_override=900, kv_cache_memory_bytes=64 << 20,
        disable_log_stats=True, kv_transfer_config=nothing if connector else None,
    )  # fmt: skip
    params = SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True, detokenize=False)
    prompts: list[Any] = [
        {"prompt_token_ids": [3 + (i * 31 + j * 7) % 900 for j in range(PROMPT)]}
        for i in range(REQUESTS)
    ]
    for line in sys.stdin:
        begun, used = time.perf_counter(), time.process_time()
        llm.generate(prompts, params, use_tqdm=False)
        used, took = time.process_time() - used, time.perf_counter() - begun
        print(f"took {took:.6f} {used:.6f} {line.strip()}", flush=True)


def start(folder: Path, name: str) -> subprocess.Popen[str]:
    (folder / "tiermem.toml").write_text(TOML)
    env = {
        **os.environ, "TIERMEM": str(int(name == "tiermem")),
        "TIERMEM_CONFIG": str(folder / "tiermem.toml"),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
    }  # fmt: skip
    return subprocess.Popen(
        [sys.executable, __file__, "--serve", str(folder), "--connector", name],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env,
    )  # fmt: skip


def ask(child: subprocess.Popen[str]) -> tuple[float, float]:
    assert child.stdin is not None
    assert child.stdout is not None
    child.stdin.write("go\n")
    child.stdin.flush()
    for line in child.stdout:
        if line.startswith("took "):
            _, took, used, *_ = line.split()
            return float(took), float(used)
    raise SystemExit(f"the engine ended with {child.wait()}")


def compared(seconds: dict[str, list[float]], name: str) -> dict[str, Any]:
    """seconds: a step, of each engine's rounds. name: of the one that is compared with stock."""
    ours, stock = seconds[name], seconds["stock"]
    ratios = [mine / theirs for mine, theirs in zip(ours, stock, strict=True)]
    return {
        "stock_step_us": statistics.median(stock) * 1e6,
        "step_us": statistics.median(ours) * 1e6,
        "median_ratio": statistics.median(ratios),
        "quartiles": statistics.quantiles(ratios, n=4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("vllm_step.json"))
    parser.add_argument("--pairs", type=int, default=30)
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--connector", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.serve:
        serve(given.serve, given.connector == "nothing")
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "config.json").write_text(json.dumps(CONFIG))
        children = {name: start(folder, name) for name in ("stock", "nothing", "tiermem")}
        took: dict[str, list[float]] = {name: [] for name in children}
        used: dict[str, list[float]] = {name: [] for name in children}
        for _ in range(2):  # fills the caches of all
            for child in children.values():
                ask(child)
        for pair in range(given.pairs):
            for name in sorted(children, reverse=bool(pair % 2)):
                wall_s, cpu_s = ask(children[name])
                took[name].append(wall_s / NEW)
                used[name].append(cpu_s / NEW)
        for child in children.values():
            child.terminate()
    result = {
        "machine": platform.processor() or platform.machine(), "cpus": os.cpu_count(),
        "pairs": given.pairs, "steps_a_round": NEW, "requests": REQUESTS,
        **{
            name: {"wall": compared(took, name), "processor": compared(used, name)}
            for name in children if name != "stock"
        },
    }  # fmt: skip
    given.out.write_text(json.dumps({**result, "wall_s": took, "processor_s": used}, indent=1))
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
