"""Runs in an environment with SGLang, not under pytest: serves prompts, prints what came of it.

usage: sglang_child.py SCENARIO.json       (`Scenario` in sglang_serving.py; the answer is a file)
"""

from __future__ import annotations

import asyncio
import importlib
import json
import os
import signal
import sys
import urllib.request
from pathlib import Path
from typing import Any

LAYERS = 2
HIDDEN, MIDDLE, HEADS, KV_HEADS, WORDS = 128, 256, 4, 2, 512
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "intermediate_size": MIDDLE,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HIDDEN // HEADS,
    "vocab_size": WORDS,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SPREAD = 0.25
"""Of the random weights: large enough that every token of a context changes what follows."""

sys.path.insert(0, str(Path(__file__).parent))
if os.environ.get("FAULT"):  # in the scheduler's process too, which imports this file
    importlib.import_module("sglang_faults").install(os.environ["FAULT"])
if os.environ.get("HICACHE_ON_CPU"):
    importlib.import_module("sglang_hicache_on_cpu").install()


def make_model(folder: Path) -> None:
    """A small Llama with random weights, the same ones every time."""
    import torch
    from safetensors.torch import save_file

    if (folder / "model.safetensors").exists():
        return
    torch.manual_seed(7)
    narrow = HIDDEN // HEADS * KV_HEADS
    shapes = {"model.embed_tokens.weight": (WORDS, HIDDEN), "lm_head.weight": (WORDS, HIDDEN)}
    norms = ["model.norm.weight"]
    for layer in range(LAYERS):
        name = f"model.layers.{layer}"
        shapes |= {
            f"{name}.self_attn.q_proj.weight": (HIDDEN, HIDDEN),
            f"{name}.self_attn.k_proj.weight": (narrow, HIDDEN),
            f"{name}.self_attn.v_proj.weight": (narrow, HIDDEN),
            f"{name}.self_attn.o_proj.weight": (HIDDEN, HIDDEN),
            f"{name}.mlp.gate_proj.weight": (MIDDLE, HIDDEN),
            f"{name}.mlp.up_proj.weight": (MIDDLE, HIDDEN),
            f"{name}.mlp.down_proj.weight": (HIDDEN, MIDDLE),
        }
        norms += [f"{name}.input_layernorm.weight", f"{name}.post_attention_layernorm.weight"]
    weights = {name: torch.randn(shape) * SPREAD for name, shape in shapes.items()}
    weights |= {name: torch.ones(HIDDEN) for name in norms}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    save_file(weights, folder / "model.safetensors")


def prompt(seed: int, length: int) -> list[int]:
    return [3 + (seed * 7919 + i * 31 + (i * i) // 7 + seed * i) % 500 for i in range(length)]


async def serve(engine: Any, round_: dict[str, Any]) -> list[dict[str, Any]]:
    """All requests of a round at once; the tokens of each, in order."""
    params = {"temperature": 0, "max_new_tokens": round_["new"], "ignore_eos": True}
    waiting = [
        engine.async_generate(
            input_ids=prompt(*request), sampling_params=params, return_logprob=True
        )
        for request in round_["prompts"]
    ]
    meanwhile = asyncio.ensure_future(run_all(round_.get("meanwhile", [])))
    answers = await asyncio.gather(*waiting, return_exceptions=True)
    await meanwhile
    return [told(answer) for answer in answers]


async def run_all(commands: list[list[str]]) -> None:
    """Run commands of tiermem one after another; each must succeed."""
    for command in commands:
        made = await asyncio.create_subprocess_exec(sys.executable, "-m", "tiermem", *command)
        if await made.wait():
            sys.exit(f"tiermem {' '.join(command)} ended with {made.returncode}")


def told(answer: Any) -> dict[str, Any]:
    if isinstance(answer, BaseException):
        return {"error": str(answer)}
    meta = answer["meta_info"]
    if meta["finish_reason"]["type"] == "abort":
        return {"error": str(meta["finish_reason"])}
    return {
        "tokens": answer["output_ids"],
        "logprobs": [round(entry[0], 3) for entry in meta["output_token_logprobs"]],
        "cached": meta["cached_tokens"],
        "from": meta.get("cached_tokens_details"),
        "reason": meta["finish_reason"],
    }


def metrics(ports: list[int]) -> list[str]:
    """What each rank's space says of itself."""
    texts = []
    for port in ports:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=20) as reply:
            texts.append(reply.read().decode())
    return texts


def main() -> None:
    scenario = json.loads(Path(sys.argv[1]).read_text())
    folder = Path(scenario["model"])
    make_model(folder)
    from sglang.srt.entrypoints.engine import Engine

    options = {
        "model_path": str(folder), "device": "cpu", "skip_tokenizer_init": True,
        "attention_backend": "torch_native", "sampling_backend": "pytorch",
        "grammar_backend": "none", "disable_cuda_graph": True, "dtype": "float32",
        "mem_fraction_static": 0.3, "page_size": 16, "log_level": "info",
        "max_running_requests": 8, "random_seed": 1, **scenario["options"],
    }  # fmt: skip
    options = {name: value for name, value in options.items() if value is not None}
    engine = Engine(**options)
    loop = asyncio.get_event_loop()
    answer: dict[str, Any] = {"rounds": [], "metrics": []}
    for round_ in scenario["rounds"]:
        if round_["truncate"]:
            for file in Path(round_["truncate"]).glob("*.slab"):
                os.truncate(file, 4096)
        answer["rounds"].append(loop.run_until_complete(serve(engine, round_)))
        if round_.get("flush"):
            engine.flush_cache()
    answer["metrics"] = metrics(scenario["ports"])
    Path(scenario["answer"]).write_text(json.dumps(answer))
    if scenario["kill"]:
        os.killpg(os.getpgrp(), signal.SIGKILL)
    engine.shutdown()


if __name__ == "__main__":
    main()
