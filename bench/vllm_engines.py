"""What the vLLM benches start from: a model of some shape with random weights, and surroundings."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any, NamedTuple


class Shape(NamedTuple):
    """Of a Llama, bf16."""

    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    head: int = 128
    vocabulary: int = 32000

    def block_bytes(self, tokens: int) -> int:
        """KV of so many tokens, all layers."""
        return 2 * self.layers * self.kv_heads * self.head * 2 * tokens


SHAPES = {"tiny": Shape(1024, 2048, 32, 8, 8), "8b": Shape(4096, 14336, 32, 32, 8)}
ON_CPU = Shape(256, 512, 4, 4, 2, 64, 1024)


def model(shape: Shape) -> Path:
    """A folder with nothing but the config.json that vLLM makes random weights from.

    The same for the same shape: what vLLM has compiled is found again by its path.
    """
    folder = Path(tempfile.gettempdir()) / ("tiermem-llama-" + "-".join(map(str, shape)))
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama",
        "hidden_size": shape.hidden, "intermediate_size": shape.inner,
        "num_hidden_layers": shape.layers, "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads, "head_dim": shape.head,
        "vocab_size": shape.vocabulary, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0, "hidden_act": "silu", "bos_token_id": 1, "eos_token_id": 2,
        "tie_word_embeddings": False, "dtype": "bfloat16",
    }  # fmt: skip
    folder.mkdir(exist_ok=True)
    (new := folder / f"config.{os.getpid()}").write_text(json.dumps(config))
    new.rename(folder / "config.json")
    return folder


def surroundings(device: str) -> dict[str, Any]:
    """Set vLLM's variables for an engine in this process; the options that its device needs."""
    os.environ.update(
        VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_NO_USAGE_STATS="1", HF_HUB_OFFLINE="1",
        VLLM_USE_FLASHINFER_SAMPLER="0",
    )  # fmt: skip
    if device == "cpu":
        os.environ.update(VLLM_CPU_OMP_THREADS_BIND="nobind", OMP_NUM_THREADS="1")
        return {"enforce_eager": True}
    return {"attention_config": {"backend": "FLASH_ATTN"}}


def turn_on(toml: Path) -> None:
    """TIERMEM=1 with this configuration, for the engine that is made next in this process."""
    os.environ.update(TIERMEM="1", TIERMEM_CONFIG=str(toml))
    from tiermem.integrations.plugin import activate

    activate()


def machine() -> dict[str, str]:
    import platform

    import torch
    import vllm

    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "none"
    return {
        "gpu": gpu, "vllm": vllm.__version__, "torch": torch.__version__,
        "python": platform.python_version(),
    }  # fmt: skip
