"""Runs in an environment with vLLM, not under pytest: serves prompts, prints what came of it.

usage: vllm_child.py SCENARIO.json         (`Scenario` in vllm_serving.py; the answer is a file)

A separate engine process imports this file too: what is watched or changed, is so there as well.
"""

from __future__ import annotations

import dataclasses
import faulthandler
import functools
import itertools
import json
import os
import random
import signal
import sys
from pathlib import Path
from typing import Any

COMMON = {
    "hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 1024, "rms_norm_eps": 1e-5,
    "max_position_embeddings": 4096, "hidden_act": "silu", "bos_token_id": 1, "eos_token_id": 2,
    "tie_word_embeddings": False, "dtype": "float32",
}  # fmt: skip
CONFIGS = {
    "llama": {
        **COMMON, "architectures": ["LlamaForCausalLM"], "model_type": "llama",
        "num_hidden_layers": 4,
    },
    "windows": {
        **COMMON, "architectures": ["MistralForCausalLM"], "model_type": "mistral",
        "num_hidden_layers": 4, "sliding_window": 128,
    },
    "hybrid": {  # three tables of two layers each
        **COMMON, "architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text",
        "num_hidden_layers": 6, "sliding_window": 128, "query_pre_attn_scalar": 64,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2,
        "hidden_activation": "gelu_pytorch_tanh", "tie_word_embeddings": True,
    },
}  # fmt: skip


def weigh() -> None:
    """Weights by which a wrong block of KV changes the tokens.

    vLLM's own dummy weights are so small that what is attended to hardly counts: with 13 of 260
    blocks swapped all of 16 requests gave the same tokens, with these one did, and other batches
    gave the same tokens for all (0.32, bf16). On a processor without instructions for bf16 (an AMD
    EPYC) two requests at a time gave other tokens than eight for one of 16 prompts, without
    tiermem; in float32 they are the same.
    """
    import torch
    from vllm.model_executor.model_loader import dummy_loader, weight_utils

    seeds = itertools.count()

    @torch.no_grad()
    def fill(weight: Any, *others: Any, **more: Any) -> None:
        if not torch.is_floating_point(weight):
            return
        if weight.dim() < 2:  # of a norm
            weight.fill_(1.0)
            return
        drawn = torch.randn(weight.shape, generator=torch.Generator().manual_seed(next(seeds)))
        weight.copy_(drawn * 0.06)

    for module in (dummy_loader, weight_utils):
        setattr(module, "initialize_single_dummy_weight", fill)  # noqa: B010


def watch(told: Path, limits: dict[int, int]) -> None:
    """Check everything after each step's orders, and write down what was counted so far.

    limits: at these steps the GPU budget changes to so many bytes.
    """
    from tiermem.integrations.vllm_scheduler import EngineSide

    right = EngineSide.orders
    resumed = 0

    @functools.wraps(right)
    def orders(engine: EngineSide, output: Any) -> Any:
        nonlocal resumed
        if (limit := limits.pop(engine.director.step, None)) is not None:
            engine.limit(limit)
        made = right(engine, output)
        engine.check()
        again = output.scheduled_cached_reqs
        resumed += len(getattr(again, "resumed_req_ids", ()))
        director = engine.director
        told.write_text(
            json.dumps(
                {
                    **director.statistics(), **engine.counts, "steps": made.step,
                    "resumed": resumed, "budget": director.budget, "pid": os.getpid(),
                    "unit_pages": director.unit_pages,
                }
            )
        )  # fmt: skip
        return made

    setattr(EngineSide, "orders", orders)  # noqa: B010


def change(what: str) -> None:
    """Make tiermem other than it is, for one test."""
    from tiermem.integrations import vllm_scheduler

    if what == "every load is waited for":
        vllm_scheduler.SMALL_BYTES = 0
    elif what == "loads bring other blocks":
        mix_up()
    elif what == "orders are not carried out":
        pretend()
    else:
        raise ValueError(what)


def load_all() -> None:
    """Load whatever is kept: this model computes a prompt as fast as its blocks come."""
    from tiermem.integrations.vllm_choice import Choice

    setattr(Choice, "cut", lambda choice, places, *others: len(places))  # noqa: B010


def mix_up() -> None:
    """What comes up together comes to each other's places."""
    from tiermem.directed.rank import Rank
    from tiermem.plan import Copy

    right = Rank.carry

    def mixed(step: Any) -> Any:
        if isinstance(step, Copy) and step.src > step.dst:
            return dataclasses.replace(step, src_slots=step.src_slots[::-1].copy())
        return step

    def carry(rank: Rank, orders: Any, stream: Any) -> None:
        plans = tuple(
            dataclasses.replace(plan, steps=tuple(map(mixed, plan.steps))) for plan in orders.plans
        )
        right(rank, dataclasses.replace(orders, plans=plans), stream)

    setattr(Rank, "carry", carry)  # noqa: B010


def pretend() -> None:
    """Ranks report all orders as carried out, and do nothing."""
    from tiermem.directed.rank import Rank
    from tiermem.plan import Outcome

    right = Rank.report
    plans: list[Any] = []

    def report(rank: Rank) -> Any:
        outcomes = tuple(Outcome(plan.id, tuple(None for _ in plan.steps)) for plan in plans)
        plans.clear()
        return dataclasses.replace(right(rank), outcomes=outcomes)

    setattr(Rank, "carry", lambda rank, orders, stream: plans.extend(orders.plans))  # noqa: B010
    setattr(Rank, "report", report)  # noqa: B010


def prepare() -> None:
    weigh()
    if os.environ.get("TIERMEM") == "1":
        limits = json.loads(os.environ["LIMITS"])
        watch(Path(os.environ["TOLD"]), {int(step): size for step, size in limits})
        load_all()
        for what in json.loads(os.environ["CHANGES"]):
            change(what)


def prompts(seed: int, count: int) -> list[list[int]]:
    """Of 200 to 899 tokens each."""
    drawn = random.Random(seed)
    return [
        [drawn.randrange(3, 1000) for _ in range(drawn.randrange(200, 900))] for _ in range(count)
    ]


def serve(llm: Any, round_: dict[str, Any]) -> dict[str, Any]:
    """All requests of a round at once."""
    from vllm import SamplingParams

    params = SamplingParams(
        temperature=0, max_tokens=round_["new"], ignore_eos=True, detokenize=False
    )
    asked = prompts(round_["seed"], round_["count"])
    served = llm.generate([{"prompt_token_ids": p} for p in asked], params, use_tqdm=False)
    return {
        "tokens": [list(one.outputs[0].token_ids) for one in served],
        "cached": sum(one.num_cached_tokens or 0 for one in served),
        "asked": sum(map(len, asked)),
    }


def main() -> None:
    scenario = json.loads(Path(sys.argv[1]).read_text())
    model = Path(scenario["model"])
    model.mkdir(parents=True, exist_ok=True)
    (model / "config.json").write_text(json.dumps(CONFIGS[scenario["kind"]]))
    from vllm import LLM

    options = {
        "model": str(model), "load_format": "dummy", "skip_tokenizer_init": True,
        "enforce_eager": True, "max_model_len": 1024, "max_num_seqs": 8,
        "max_num_batched_tokens": 2048, "block_size": 32, "seed": 0, "dtype": "float32",
        "kv_cache_memory_bytes": 256 << 20, "disable_log_stats": True, **scenario["options"],
    }  # fmt: skip
    llm = LLM(**options)
    rounds = [serve(llm, round_) for round_ in scenario["rounds"]]
    Path(scenario["answer"]).write_text(json.dumps({"rounds": rounds, "pid": os.getpid()}))
    if scenario["kill"]:
        os.killpg(os.getpgrp(), signal.SIGKILL)


faulthandler.enable()
prepare()
if __name__ == "__main__":
    main()
