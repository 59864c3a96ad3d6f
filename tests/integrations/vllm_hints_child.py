"""Runs in an environment with vLLM, not under pytest: asks one thing after the other.

usage: vllm_hints_child.py SCENARIO.json      (test_vllm_hints_engine.py makes it, and the answer)
"""

from __future__ import annotations

import faulthandler
import importlib
import json
import os
import random
import sys
import threading
from pathlib import Path
from typing import Any

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 256,
    "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 1024, "rms_norm_eps": 1e-5,
    "max_position_embeddings": 4096, "hidden_act": "silu", "bos_token_id": 1, "eos_token_id": 2,
    "tie_word_embeddings": False, "dtype": "bfloat16",
}  # fmt: skip


def slow_down(page_s: float) -> None:
    """Pages from the drive arrive so late, each after the one before."""
    from tiermem.testing import DelayedRoute
    from tiermem.tier import Done, Fence, Place, Slots

    class Slow(DelayedRoute):
        def submit(self, src: Slots, dst: Slots, after: Fence) -> Done:
            done = super().submit(src, dst, after)
            held = self._held.pop()
            timer = threading.Timer(page_s * len(src), lambda: setattr(held, "let_go", True))
            timer.daemon = True
            timer.start()
            return done

    vllm_worker: Any = importlib.import_module("tiermem.integrations.vllm_worker")
    right = vllm_worker.assemble

    def assemble(*args: Any) -> Any:
        parts = right(*args)
        up = (Place.NVME, Place.GPU)
        parts.routes[up] = Slow(parts.routes[up])
        return parts

    vllm_worker.assemble = assemble


def prompt(seed: int, length: int) -> list[int]:
    drawn = random.Random(seed)
    return [drawn.randrange(3, 1000) for _ in range(length)]


def serve(llm: Any, asks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """All at once. An ask: parts [(seed, tokens)] of its prompt, and its hints."""
    from vllm import SamplingParams

    given = [{"prompt_token_ids": [t for p in a["parts"] for t in prompt(*p)]} for a in asks]
    params = [
        SamplingParams(
            temperature=0, max_tokens=4, ignore_eos=True, detokenize=False,
            extra_args={"kv_transfer_params": {"tiermem": a["hints"]}} if a["hints"] else None,
        )
        for a in asks
    ]  # fmt: skip
    return [
        {"tokens": list(one.outputs[0].token_ids), "cached": one.num_cached_tokens or 0}
        for one in llm.generate(given, params, use_tqdm=False)
    ]


class Watched:
    """An engine in this process: its KV events, and what was counted."""

    def __init__(self, llm: Any) -> None:
        scheduler = llm.llm_engine.engine_core.engine_core.scheduler
        self._events: list[Any] = []
        scheduler.kv_event_publisher.publish = lambda batch: self._events.extend(batch.events)
        self._engine = scheduler.connector.engine

    def found(self) -> dict[str, Any]:
        self._engine.check()
        stored, removed = self._hashes("BlockStored"), self._hashes("BlockRemoved")
        return {
            "counts": self._engine.counts,
            "events": self._engine.director.events(),
            "stored": len(stored),
            "removed": len(removed),
            "removed_unknown": len(set(removed) - set(stored)),
        }

    def _hashes(self, kind: str) -> list[str]:
        mine = [event for event in self._events if type(event).__name__ == kind]
        return [str(one) for event in mine for one in event.block_hashes]


def main() -> None:
    scenario = json.loads(Path(sys.argv[1]).read_text())
    model = Path(scenario["model"])
    model.mkdir(parents=True, exist_ok=True)
    (model / "config.json").write_text(json.dumps(CONFIG))
    if scenario["page_s"]:
        slow_down(scenario["page_s"])
    from prometheus_client import REGISTRY, generate_latest
    from vllm import LLM
    from vllm.config import KVEventsConfig

    llm = LLM(
        model=str(model), load_format="dummy", skip_tokenizer_init=True, enforce_eager=True,
        max_model_len=1024, max_num_seqs=8, max_num_batched_tokens=2048, block_size=32, seed=0,
        kv_cache_memory_bytes=256 << 20, disable_log_stats=False, num_gpu_blocks_override=768,
        kv_events_config=KVEventsConfig(enable_kv_cache_events=True, publisher="null"),
    )  # fmt: skip
    watched = Watched(llm) if os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0" else None
    answer: dict[str, Any] = {"rounds": [serve(llm, asks) for asks in scenario["rounds"]]}
    if watched is not None:
        answer |= watched.found()
    answer["metrics"] = generate_latest(REGISTRY).decode()
    Path(scenario["answer"]).write_text(json.dumps(answer))


if __name__ == "__main__":
    faulthandler.enable()
    main()
