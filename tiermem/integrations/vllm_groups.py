"""KV cache groups: vLLM's block tables of a request, and how many blocks stand in them.

Layers that attend alike share a table, and each kind has one of its own, over one pool of block
ids: a block holds the layers of the group that got it. A group with a window gives blocks back
while its request runs, once no token to come looks at them; block 0 stands in their place.

    full    0 1 2 3 4 5 6      all that a request has
    window  . . . . 4 5 6      what the next token looks at, and what is computed right now
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from tiermem.errors import ConfigError

WHOLE = frozenset({"FullAttentionSpec", "MLAAttentionSpec"})
WINDOW = "SlidingWindowSpec"
OTHERS_THAT_GIVE_BACK = frozenset(
    {"ChunkedLocalAttentionSpec", "RSWASpec", "MambaSpec", "SlidingWindowMLASpec"}
)
"""Kinds whose blocks do not stay with their request either, by rules that we do not follow."""

Tables = Sequence[Sequence[int]]


@dataclass(frozen=True, slots=True)
class Groups:
    """windows: for each group, how many tokens one looks at, itself included; 0 is all of them.

    most: blocks of a group with a window that a request holds at a time, at most.
    """

    block_tokens: int
    windows: tuple[int, ...] = (0,)
    most: tuple[int, ...] = (0,)

    @property
    def is_plain(self) -> bool:
        """One table, and a request keeps what is in it."""
        return self.windows == (0,)

    def first(self, group: int, blocks: int) -> int:
        """Where a group's table begins, when so many blocks have been computed."""
        window = self.windows[group]
        return max(0, blocks * self.block_tokens - window + 1) // self.block_tokens if window else 0

    def kept(self, blocks: int) -> Iterator[tuple[int, int]]:
        """(block of the request, group): what a request holds that has found so many blocks,
        the first block first."""
        begins = [self.first(group, blocks) for group in range(len(self.windows))]
        for block in range(min(begins), blocks):
            for group, begin in enumerate(begins):
                if block >= begin:
                    yield block, group

    def held(self, tokens: int) -> int:
        """Blocks of all groups that a request of so many tokens holds at a time, at most."""
        blocks = -(-tokens // self.block_tokens)
        return sum(
            min(blocks, most) if window else blocks
            for window, most in zip(self.windows, self.most, strict=True)
        )

    def longest(self, blocks: int, tokens: int) -> int:
        """How many tokens, of so many at most, a request may have that holds so many blocks."""
        while tokens > 0 and self.held(tokens) > blocks:
            tokens = (tokens - 1) // self.block_tokens * self.block_tokens
        return tokens


def in_order(tables: Tables) -> list[int]:
    """All blocks that stand in a request's tables, the first block of each group first."""
    if len(tables) == 1:
        return [block for block in tables[0] if block]
    length = max(map(len, tables))
    return [table[i] for i in range(length) for table in tables if i < len(table) and table[i]]


def groups_of(vllm_config: Any, kv_cache_config: Any) -> Groups:
    """The groups of an engine. Raises ConfigError for kinds of attention that are not followed."""
    tokens = int(vllm_config.cache_config.block_size)
    specs = [_spec(group) for group in kv_cache_config.kv_cache_groups]
    names = [type(spec).__name__ for spec in specs]
    if len(specs) == 1 and names[0] != WINDOW:
        if names[0] in OTHERS_THAT_GIVE_BACK:
            raise ConfigError(f"tiermem: {names[0]} is not supported; set TIERMEM=0")
        return Groups(tokens)
    unknown = sorted(set(names) - WHOLE - {WINDOW})
    unlike = sorted({int(spec.block_size) for spec in specs} - {tokens})
    more = any(getattr(spec, "extra_retained_tokens", 0) for spec in specs)
    if unknown or unlike or more:
        what = f"{', '.join(unknown)} among its kinds of attention" if unknown else ""
        what = what or (f"blocks of {unlike} tokens beside {tokens}" if unlike else "")
        raise ConfigError(
            f"tiermem: this model has {len(specs)} groups of KV cache, with "
            f"{what or 'windows that keep more than they look at'}, which is not supported; "
            "use --disable-hybrid-kv-cache-manager, or set TIERMEM=0"
        )
    scheduler = vllm_config.scheduler_config
    step = int(scheduler.max_num_batched_tokens)
    in_flight = int(getattr(vllm_config, "max_in_flight_tokens", 2 * step))
    windows = tuple(int(getattr(spec, "sliding_window", None) or 0) for spec in specs)
    windows = tuple(w if name == WINDOW else 0 for w, name in zip(windows, names, strict=True))
    longest = int(vllm_config.model_config.max_model_len)
    # As `SlidingWindowSpec.max_admission_blocks_per_request`, by which vLLM admits.
    most = tuple(-(-min(w - 1 + in_flight, longest) // tokens) + 1 if w else 0 for w in windows)
    return Groups(tokens, windows, most)


def _spec(group: Any) -> Any:
    """What the layers of a group have in common; of several that differ in size only, the first."""
    spec = group.kv_cache_spec
    several = getattr(spec, "kv_cache_specs", None)
    return next(iter(several.values())) if several else spec
