"""Shapes of well-known models: how many bytes of KV cache a token has.

The figures are the models' published configurations (config.json). A 16-token block of each shape
has the bytes that vLLM 0.33 shows for it; tests/bench/test_breakeven.py holds the two together.
"""

from __future__ import annotations

from dataclasses import dataclass

from tiermem.errors import TierMemError


class UnknownModel(TierMemError):
    """A name that is not in the table; the message names those that are."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """What decides the size of the cache. Bytes per value: 2 (bf16) unless told otherwise."""

    name: str
    layers: int
    """Layers whose cache grows with the whole prompt."""
    row_values: int
    """Values a token leaves in one layer: 2 x KV heads x head size; for MLA the latent and rope."""
    sharded: bool = True
    """KV heads are divided between tensor-parallel ranks; MLA's latent is held whole by each."""
    kv_heads: int = 1
    window_layers: int = 0
    """Layers with sliding-window attention: their cache stops growing at `window` tokens."""
    window: int = 0
    active_billions: float
    """Parameters that a token passes through."""
    attention_width: int
    """Query heads x head size (mean of the two head sizes for MLA)."""

    @property
    def attention_share(self) -> float:
        """Floating-point work of attention over that of all else, per token of prompt.

        A prompt of n tokens costs 2 x parameters x n, and 2 x width x layers x n^2 for attention
        that is causal; window layers add too little to count.
        """
        return self.attention_width * self.layers / (self.active_billions * 1e9)

    def token_bytes(self, value_bytes: int = 2) -> int:
        """Bytes of one token in the layers that keep the whole prompt."""
        return self.layers * self.row_values * value_bytes

    def prompt_bytes(self, tokens: int, value_bytes: int = 2) -> int:
        """Bytes that a prompt leaves in the cache, all layers, all ranks, each byte once."""
        windowed = self.window_layers * self.row_values * value_bytes * min(tokens, self.window)
        return tokens * self.token_bytes(value_bytes) + windowed

    def rank_bytes(self, tokens: int, ranks: int, value_bytes: int = 2) -> int:
        """Bytes that each of `ranks` tensor-parallel ranks loads over its own link."""
        shards = min(ranks, self.kv_heads) if self.sharded else 1
        return -(-self.prompt_bytes(tokens, value_bytes) // shards)


def _grouped(
    name: str,
    layers: int,
    heads: int,
    kv_heads: int,
    head: int,
    active_billions: float,
    window_layers: int = 0,
    window: int = 0,
) -> Model:
    return Model(
        name=name,
        layers=layers,
        row_values=2 * kv_heads * head,
        kv_heads=kv_heads,
        active_billions=active_billions,
        attention_width=heads * head,
        window_layers=window_layers,
        window=window,
    )


MODELS = {
    model.name: model
    for model in (
        _grouped("Llama-3.1-8B", 32, 32, 8, 128, 8.03),
        _grouped("Llama-3.1-70B", 80, 64, 8, 128, 70.6),
        _grouped("Qwen3-8B", 36, 32, 8, 128, 8.19),
        _grouped("Qwen3-32B", 64, 64, 8, 128, 32.8),
        _grouped("gpt-oss-20b", 12, 64, 8, 64, 3.6, window_layers=12, window=128),
        # 512 latent and 64 rope values in each of 61 layers, the same for all 128 heads, whose
        # sizes are 192 for queries and keys, 128 for values
        Model(
            name="DeepSeek-V3",
            layers=61,
            row_values=512 + 64,
            sharded=False,
            active_billions=37.0,
            attention_width=128 * (192 + 128) // 2,
        ),
    )
}


def model(name: str) -> Model:
    """The shape of that name, in any case."""
    for known in MODELS.values():
        if known.name.lower() == name.lower():
            return known
    raise UnknownModel(f"no shape {name!r}; known are {', '.join(MODELS)}")
