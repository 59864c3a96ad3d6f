"""vLLM's block pool and requests as its connectors see them (vllm/v1/core/block_pool.py, 0.32)."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import Enum

BLOCK_TOKENS = 4


Name = tuple[bytes, int]
"""A block's hash, and the group whose layers it holds."""


class Status(Enum):
    WAITING = 1
    WAITING_FOR_REMOTE_KVS = 2
    RUNNING = 3
    PREEMPTED = 4
    FINISHED = 5


@dataclass(frozen=True)
class FullAttentionSpec:
    block_size: int = BLOCK_TOKENS


@dataclass(frozen=True)
class SlidingWindowSpec:
    sliding_window: int
    block_size: int = BLOCK_TOKENS


@dataclass(eq=False)
class Block:
    block_id: int
    ref_cnt: int = 0
    block_hash: Name | None = None


class FreeQueue:
    """Blocks nobody uses, the next to be taken first."""

    def __init__(self, blocks: Iterable[Block]) -> None:
        self.order = list(blocks)

    @property
    def num_free_blocks(self) -> int:
        return len(self.order)


class Pool:
    """Block 0 is the null block and never given out."""

    def __init__(self, blocks: int) -> None:
        self.blocks = [Block(i) for i in range(blocks)]
        self.null_block = self.blocks[0]
        self.free_block_queue = FreeQueue(self.blocks[1:])
        self.cached_block_hash_to_block: dict[Name, list[Block]] = {}

    def get_num_free_blocks(self) -> int:
        return self.free_block_queue.num_free_blocks

    def get_usage(self) -> float:
        return 1.0 - self.get_num_free_blocks() / (len(self.blocks) - 1)

    def get_cached_block(self, block_hash: bytes, groups: list[int]) -> list[Block] | None:
        found = [self.cached_block_hash_to_block.get((block_hash, group)) for group in groups]
        return [same[0] for same in found if same] if all(found) else None

    def get_new_blocks(self, count: int) -> list[Block]:
        if count > self.get_num_free_blocks():
            raise ValueError(f"Cannot get {count} free blocks from the pool")
        order = self.free_block_queue.order
        taken, self.free_block_queue.order = order[:count], order[count:]
        for block in taken:
            assert block.ref_cnt == 0
            self._uncache(block)
            block.ref_cnt = 1
        return taken

    def touch(self, blocks: Sequence[Block]) -> None:
        for block in blocks:
            if block is self.null_block:
                continue
            if block.ref_cnt == 0:
                self.free_block_queue.order.remove(block)
            block.ref_cnt += 1

    def free_blocks(self, ordered: Iterable[Block]) -> None:
        """Those without a hash are taken first again, those with one last."""
        first: list[Block] = []
        last: list[Block] = []
        for block in ordered:
            if block is self.null_block:
                continue
            block.ref_cnt -= 1
            assert block.ref_cnt >= 0, f"block {block.block_id} was freed twice"
            if block.ref_cnt == 0:
                (first if block.block_hash is None else last).append(block)
        self.free_block_queue.order = [*first, *self.free_block_queue.order, *last]

    def evict_blocks(self, block_ids: set[int]) -> None:
        for block_id in block_ids:
            self._uncache(self.blocks[block_id])

    def cache(self, block: Block, block_hash: bytes, group: int = 0) -> None:
        if block.block_hash is None and block is not self.null_block:
            block.block_hash = block_hash, group
            self.cached_block_hash_to_block.setdefault(block.block_hash, []).append(block)

    def reset_prefix_cache(self) -> bool:
        if self.get_num_free_blocks() != len(self.blocks) - 1:
            return False
        self.cached_block_hash_to_block = {}
        for block in self.blocks:
            block.block_hash = None
        return True

    def _uncache(self, block: Block) -> None:
        if block.block_hash is not None:
            same = self.cached_block_hash_to_block[block.block_hash]
            same.remove(block)
            if not same:
                del self.cached_block_hash_to_block[block.block_hash]
            block.block_hash = None


@dataclass(eq=False)
class Request:
    """stream: the prompt and all that will be generated, known from the start. pending: tokens
    that steps in flight are computing."""

    request_id: str
    stream: list[int]
    prompt: int
    num_tokens: int = 0
    num_computed_tokens: int = 0
    pending: int = 0
    status: Status = Status.WAITING
    tables: list[list[Block]] = field(default_factory=list)
    last_seq: int = 0
    preemptions: int = 0
    lora_request: object = None

    def __post_init__(self) -> None:
        self.num_tokens = self.prompt
        self._hashes: list[bytes] = []

    @property
    def num_output_tokens(self) -> int:
        return self.num_tokens - self.prompt

    def get_finished_reason(self) -> None:
        """As of a request that was aborted before vLLM knew why."""

    @property
    def block_hashes(self) -> list[bytes]:
        """Of the whole blocks of the tokens that are there by now."""
        while len(self._hashes) < len(self.stream) // BLOCK_TOKENS:
            self._hashes.append(self.content((len(self._hashes) + 1) * BLOCK_TOKENS))
        return self._hashes[: self.num_tokens // BLOCK_TOKENS]

    def content(self, tokens: int) -> bytes:
        """Names the first tokens."""
        return hashlib.sha256(repr(self.stream[:tokens]).encode()).digest()

    def value(self, block: int, tokens: int, group: int = 0) -> int:
        """What a block of it holds when so many tokens of the request have been computed."""
        known = min((block + 1) * BLOCK_TOKENS, tokens)
        return int.from_bytes(self.content(known)[:7], "little") + (group << 56)
