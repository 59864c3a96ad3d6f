"""vLLM's scheduler (vllm/v1/core/sched/scheduler.py, 0.32) in small, over `EngineSide` and ranks.

Every step reads all blocks that attention would read and compares them, on real pages of the CPU
device: a block that is not shown is refused there, one with other bytes is found.
"""

from __future__ import annotations

import pickle
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from random import Random
from types import SimpleNamespace

import numpy as np

from tests.directed_ranks import Ranks
from tests.integrations.vllm_fakes import (
    BLOCK_TOKENS,
    Block,
    FullAttentionSpec,
    Pool,
    Request,
    SlidingWindowSpec,
    Status,
)
from tests.waiting import LONG_S
from tiermem.directed.orders import Report
from tiermem.integrations.vllm_groups import groups_of
from tiermem.integrations.vllm_scheduler import EngineSide

STEP_TOKENS = 24
MOST_RUNNING = 5
LONGEST = 120


@dataclass
class Step:
    """What is under way: tokens of each request, what the ranks said, what has arrived."""

    seq: int
    tokens: dict[str, int] = field(default_factory=dict)
    sampled: list[Request] = field(default_factory=list)
    reports: list[Report] = field(default_factory=list)
    arrived: set[str] = field(default_factory=set)
    failed: set[int] = field(default_factory=set)


class Machine:
    """lag: steps that are under way when the next is put together (1: async scheduling).

    windows: of each KV cache group; 0 looks at all tokens. sparse: few blocks of windows are found
    again (vLLM's prefix_cache_retention_interval=0).
    """

    def __init__(
        self,
        ranks: Ranks,
        seed: int,
        *,
        lag: int = 0,
        whole: bool = True,
        name: str = "machine",
        windows: Sequence[int] = (0,),
        sparse: bool = False,
    ) -> None:
        self.random = Random(seed)
        self.ranks = ranks
        self.lag = lag
        self.whole = whole
        self.sparse = sparse
        self.pool = Pool(ranks.layout.blocks)
        budget = ranks.config.gpu.budget
        assert isinstance(budget, int)
        self.frames = budget // ranks.layout.unit_bytes
        model = SimpleNamespace(max_model_len=LONGEST)
        config = SimpleNamespace(
            kv_transfer_config=SimpleNamespace(engine_id=name),
            cache_config=SimpleNamespace(block_size=BLOCK_TOKENS),
            scheduler_config=SimpleNamespace(max_num_batched_tokens=STEP_TOKENS),
            model_config=model,
            max_in_flight_tokens=(1 + lag) * STEP_TOKENS,
        )
        specs = [SlidingWindowSpec(w) if w else FullAttentionSpec() for w in windows]
        cache = SimpleNamespace(kv_cache_groups=[SimpleNamespace(kv_cache_spec=s) for s in specs])
        self.groups = groups_of(config, cache)
        self.longest = model.max_model_len = self.groups.longest(self.frames - 1, LONGEST)
        self.engine = EngineSide(config, cache)
        self.engine.see_tables(lambda name: self.requests[name].tables)
        self.engine.bind(self.pool)
        self.engine.meet(ranks.hellos, ranks.layout)
        ranks.director = self.engine.director
        self.requests: dict[str, Request] = {}
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.in_flight: deque[Step] = deque()
        self.deferred: deque[tuple[int, list[Block]]] = deque()
        self.arrived: set[str] = set()
        self.failed: set[str] = set()
        self.heard: Counter[str] = Counter()
        self.seq = self.processed = self.made = 0
        self.seen = dict.fromkeys(
            ("preempted", "hits", "outside", "failed", "finished", "given back"), 0
        )

    # ------------------------------------------------------------ requests

    def ask(self, family: int, prompt: int, new: int) -> None:
        """A request that shares its first tokens with others of its family."""
        base = Random(family)
        shared = [base.randrange(1000) for _ in range(self.longest)]
        self.made += 1
        stream = shared[: prompt + new]
        if self.random.random() < 0.3:
            fork = self.random.randint(1, prompt)
            own = Random(f"{family} {self.made}")
            stream[fork:] = [own.randrange(1000) for _ in stream[fork:]]
        request = Request(f"r{self.made}", stream, prompt)
        self.requests[request.request_id] = request
        self.waiting.append(request)

    def abort(self, request: Request) -> None:
        loading = request.status is Status.WAITING_FOR_REMOTE_KVS
        if request in self.running:
            self.running.remove(request)
        else:
            self.waiting.remove(request)
        self._finish(request, keep=loading and request.request_id not in self.arrived)

    def _finish(self, request: Request, *, keep: bool = False) -> None:
        request.status = Status.FINISHED
        self._give_back(request)
        self.engine.finish(request)
        if not keep:
            self._free(request)
            del self.requests[request.request_id]

    def _free(self, request: Request) -> None:
        blocks = [block for table in request.tables for block in table][::-1]
        request.tables = []
        if request.last_seq <= self.processed:
            self.pool.free_blocks(blocks)
        else:
            self.deferred.append((self.seq, blocks))

    # ------------------------------------------------------------ a step

    def step(self) -> None:
        """Put a step together, have the ranks do it, and hear of the one before the last."""
        self.seq += 1
        step = Step(self.seq)
        cached = SimpleNamespace(req_ids=[], new_block_ids=[], resumed_req_ids=set())
        before = self.seen["preempted"]
        self._schedule_running(step, cached)
        if self.seen["preempted"] == before:
            self._schedule_waiting(step, cached)
        output = SimpleNamespace(scheduled_cached_reqs=cached, num_scheduled_tokens=step.tokens)
        orders = self.engine.orders(output)
        self.engine.check()
        self._check_frames()
        reads, writes = self._work(step)
        self.ranks.carry_out(orders, writes, reads)
        self._advance(step)
        self.ranks.run(1.0 if self.lag == 0 else self.random.random())
        for rank in self.ranks.ranks:
            step.reports.append(pickle.loads(pickle.dumps(rank.report())))
        self._receive(step)
        self.in_flight.append(step)
        while len(self.in_flight) > self.lag:
            self._update(self.in_flight.popleft())
        if not step.tokens:
            self.ranks.run()
            for rank in self.ranks.ranks:
                rank.wait(0.01)

    def _schedule_running(self, step: Step, cached: SimpleNamespace) -> None:
        for request in list(self.running):
            if request not in self.running:
                continue  # preempted for one before it
            left = STEP_TOKENS - sum(step.tokens.values())
            known = request.num_tokens + request.pending
            count = min(known - request.num_computed_tokens, left)
            if known >= len(request.stream) and request.num_computed_tokens >= known - 1:
                count = 0  # its last token is on its way
            if count <= 0:
                continue
            new = None
            while True:
                new = self._allocate(request, count)
                if new is not None or self.engine.is_making_room():
                    break
                victim = self.running[-1]
                if victim.last_seq > self.processed:
                    break
                self.running.pop()
                self._preempt(victim, step, cached)
                if victim is request:
                    break
            if new is None:
                break
            step.tokens[request.request_id] = count
            cached.req_ids.append(request.request_id)
            cached.new_block_ids.append(_ids(new) if any(new) else None)

    def _preempt(self, victim: Request, step: Step, cached: SimpleNamespace) -> None:
        if victim.request_id in step.tokens:
            del step.tokens[victim.request_id]
            at = cached.req_ids.index(victim.request_id)
            del cached.req_ids[at], cached.new_block_ids[at]
        self._free(victim)
        victim.status = Status.PREEMPTED
        victim.num_computed_tokens = victim.pending = 0
        victim.preemptions += 1
        self.waiting.appendleft(victim)
        self.seen["preempted"] += 1

    def _schedule_waiting(self, step: Step, cached: SimpleNamespace) -> None:
        holding = [request for request in self.waiting if request.tables]
        others = [request for request in self.waiting if not request.tables]
        self.waiting = deque([*holding, *others])  # who holds blocks is looked at first
        skipped: list[Request] = []
        while self.waiting and len(self.running) < MOST_RUNNING:
            left = STEP_TOKENS - sum(step.tokens.values())
            request = self.waiting[0]
            if left <= 0:
                break
            if request.status is Status.WAITING_FOR_REMOTE_KVS and not self._promote(request):
                skipped.append(self.waiting.popleft())
                continue
            found: list[list[Block]] = [[] for _ in self.groups.windows]
            external, loads = 0, False
            if request.num_computed_tokens == 0:
                found = self._hits(request)
                told, loads = self.engine.match(request, len(found[0]) * BLOCK_TOKENS)
                if told is None:
                    skipped.append(self.waiting.popleft())
                    continue
                external = told
            computed = request.num_computed_tokens + len(found[0]) * BLOCK_TOKENS + external
            count = 0 if loads else min(request.num_tokens - computed, left)
            new = self._allocate(request, count, found, external, admission=True, loads=loads)
            if new is None:
                break
            ids = _ids(request.tables)
            self.engine.admit(request, ids, external)
            request.num_computed_tokens = computed
            self.seen["hits"] += len(found[0])
            self.waiting.popleft()
            if loads:
                self.seen["outside"] += external // BLOCK_TOKENS
                request.status = Status.WAITING_FOR_REMOTE_KVS
                skipped.append(request)
                continue
            if request.preemptions and request.status is Status.PREEMPTED:
                cached.req_ids.append(request.request_id)
                cached.new_block_ids.append(ids)
                cached.resumed_req_ids.add(request.request_id)
            request.status = Status.RUNNING
            self.running.append(request)
            step.tokens[request.request_id] = count
        self.waiting.extendleft(reversed(skipped))

    def _hits(self, request: Request) -> list[list[Block]]:
        """The most blocks of which every table has what it needs; the null block elsewhere."""
        hashes = request.block_hashes
        for hits in range((request.num_tokens - 1) // BLOCK_TOKENS, 0, -1):
            tables = [[self.pool.null_block] * hits for _ in self.groups.windows]
            for i, group in self.groups.kept(hits):
                found = self.pool.get_cached_block(hashes[i], [group])
                if not found:
                    break
                tables[group][i] = found[0]
            else:
                return tables
        return [[] for _ in self.groups.windows]

    def _give_back(self, request: Request) -> None:
        """Blocks that no token to come looks at, of steps that have ended, go back at once."""
        flying = sum(step.tokens.get(request.request_id, 0) for step in self.in_flight)
        computed = max(0, request.num_computed_tokens - flying)
        for window, table in zip(self.groups.windows, request.tables, strict=False):
            freed = []
            for i in range(min(len(table), _passed(window, computed)) - 1, -1, -1):
                if table[i] is self.pool.null_block:
                    break
                freed.append(table[i])
                table[i] = self.pool.null_block
            self.seen["given back"] += len(freed)
            if freed:
                self.pool.free_blocks(freed)

    def _promote(self, request: Request) -> bool:
        """A request whose content was to come from the drive is an ordinary one again."""
        name = request.request_id
        if name not in self.arrived:
            return False
        self.arrived.remove(name)
        if name in self.failed and not request.num_computed_tokens:
            self._free(request)
        else:
            self._cache(request, request.num_computed_tokens)
        self.failed.discard(name)
        request.status = Status.PREEMPTED if request.preemptions else Status.WAITING
        return True

    def _allocate(
        self,
        request: Request,
        count: int,
        found: Sequence[Sequence[Block]] = (),
        external: int = 0,
        *,
        admission: bool = False,
        loads: bool = False,
    ) -> list[list[Block]] | None:
        """`KVCacheManager.allocate_slots`: new blocks of each table, or None where they are not to
        be had."""
        several = range(len(self.groups.windows))
        found = found or [[] for _ in several]
        mine = request.tables or [[] for _ in several]
        computed = request.num_computed_tokens + len(found[0]) * BLOCK_TOKENS + external
        have = len(mine[0]) + len(found[0])
        null = self.pool.null_block
        idle = sum(b.ref_cnt == 0 for table in found for b in table if b is not null)
        if admission and self.whole:
            blocks = _blocks(request.num_tokens)
            caps = zip(self.groups.windows, self.groups.most, strict=True)
            needed = sum(max(0, (min(blocks, most) if w else blocks) - have) for w, most in caps)
            if needed + idle > self.pool.get_num_free_blocks():
                return None
        self._give_back(request)
        needed = max(0, _blocks(computed + count) - have)
        free = self.pool.get_num_free_blocks() - (self._reserved() if loads else 0)
        if needed * len(several) + idle > free:
            return None
        request.tables = mine
        for table, hits in zip(mine, found, strict=True):
            self.pool.touch(hits)
            table += hits
        outside = max(0, _blocks(computed) - have)
        new = [self.pool.get_new_blocks(outside) if outside else [] for _ in several]
        more = needed - outside
        for table, blocks_of in zip(mine, new, strict=True):
            blocks_of += self.pool.get_new_blocks(more) if more else []
            table += blocks_of
        if not loads:
            self._cache(request, min(computed + count, request.num_tokens))
        return new

    def _reserved(self) -> int:
        """Blocks that prefills under way, and those whose content is to come, will still take."""
        under_way = [
            request
            for request in self.requests.values()
            if request.tables
            and request.status is not Status.FINISHED
            and request.num_computed_tokens < request.prompt
        ]
        return sum(max(0, _blocks(r.num_tokens) - len(r.tables[0])) for r in under_way)

    def _cache(self, request: Request, tokens: int) -> None:
        """Of windows, where vLLM is sparing with them, only what the prompt is found again by."""
        hashes = request.block_hashes[: tokens // BLOCK_TOKENS]
        last = (request.prompt - 1) // BLOCK_TOKENS
        for group, table in enumerate(request.tables):
            first = self.groups.first(group, last)
            for i, (block, block_hash) in enumerate(zip(table, hashes, strict=False)):
                if first <= i < last or not (self.sparse and self.groups.windows[group]):
                    self.pool.cache(block, block_hash, group)

    # ------------------------------------------------------------ what a step does

    def _work(self, step: Step) -> tuple[dict[int, int], dict[int, int]]:
        """Values that blocks must have before, and values that they get."""
        reads: dict[int, int] = {}
        writes: dict[int, int] = {}
        others: dict[int, int] = {}
        for name, count in step.tokens.items():
            request = self.requests[name]
            first, end = request.num_computed_tokens, request.num_computed_tokens + count
            for i, group, block in self._looked_at(request, first, end):
                if (i + 1) * BLOCK_TOKENS <= first:
                    others[block.block_id] = request.value(i, first, group)
                    continue
                assert block.block_id not in writes, "two requests write one block"
                assert block.ref_cnt == 1 or block.block_hash, "a shared block is written"
                writes[block.block_id] = request.value(i, end, group)
                if i * BLOCK_TOKENS < first:
                    reads[block.block_id] = request.value(i, first, group)
        reads |= {block: value for block, value in others.items() if block not in writes}
        return reads, writes

    def _looked_at(
        self, request: Request, first: int, end: int
    ) -> Iterator[tuple[int, int, Block]]:
        """(block of the request, group, block) of what its tokens from `first` to `end` look at."""
        for group, table in enumerate(request.tables):
            begin = _passed(self.groups.windows[group], first)
            for i, block in enumerate(table[: _blocks(end)]):
                if i >= begin:
                    assert block is not self.pool.null_block, "what is looked at was given back"
                    yield i, group, block

    def _advance(self, step: Step) -> None:
        for name, count in step.tokens.items():
            request = self.requests[name]
            request.num_computed_tokens += count
            request.last_seq = step.seq
            if request.num_computed_tokens == request.num_tokens + request.pending:
                request.pending += 1
                step.sampled.append(request)

    def _receive(self, step: Step) -> None:
        """As `get_finished` and `get_block_ids_with_load_errors` of all ranks, together."""
        done = []
        for rank in self.ranks.ranks:
            names, rows = rank.received()
            done.append(names)
            units = np.unique(rows // self.ranks.layout.unit_pages).astype(np.int32)
            step.failed |= set(self.ranks.layout.blocks_of(units).tolist())
        for names in done:
            for name in names:
                self.heard[name] += 1
                if self.heard[name] == len(self.ranks.ranks):
                    del self.heard[name]
                    step.arrived.add(name)

    def _update(self, step: Step) -> None:
        self.processed = step.seq
        while self.deferred and self.deferred[0][0] <= self.processed:
            self.pool.free_blocks(self.deferred.popleft()[1])
        self._take_failed(step.failed)
        for request in step.sampled:
            if request.status is Status.FINISHED:
                continue
            request.num_tokens += 1
            if request.status is Status.RUNNING and request.pending:
                request.pending -= 1
            if request.num_tokens >= len(request.stream):
                (self.running if request in self.running else self.waiting).remove(request)
                self.seen["finished"] += 1
                self._finish(request)
        self.engine.hear(step.reports)
        for name in step.arrived:
            request = self.requests[name]
            if request.status is Status.FINISHED:
                self._free(request)
                del self.requests[name]
            else:
                self.arrived.add(name)

    def _take_failed(self, blocks: set[int]) -> None:
        """Requests that wait for blocks whose load failed are computed from there on."""
        if not blocks:
            return
        self.seen["failed"] += len(blocks)
        for request in self.waiting:
            if request.status is Status.WAITING_FOR_REMOTE_KVS:
                for i, block in enumerate(request.tables[0]):
                    if block.block_id in blocks and i * BLOCK_TOKENS < request.num_computed_tokens:
                        request.num_computed_tokens = i * BLOCK_TOKENS
                        self.failed.add(request.request_id)
                        break
        self.pool.evict_blocks(blocks)

    def _check_frames(self) -> None:
        """Never more blocks in anybody's hands than there are frames.

        A request that was aborted while its content was on its way keeps its blocks until that
        has come, and nobody touches them: they need no frames.
        """
        aborted = [r for r in self.requests.values() if r.status is Status.FINISHED]
        idle = Counter(b.block_id for r in aborted for table in r.tables for b in table)
        idle.update(b.block_id for _, blocks in self.deferred for b in blocks)
        held = sum(block.ref_cnt > idle[block.block_id] for block in self.pool.blocks)
        assert held <= self.frames - 1, f"{held} blocks are held, {self.frames - 1} have frames"
        in_use = self.engine.director.in_use(np.arange(len(self.pool.blocks), dtype=np.int32))
        for name, request in self.requests.items():
            if request.status is Status.RUNNING:
                ids = [i for table in _ids(request.tables) for i in table]
                assert in_use[ids].all(), f"{name} has blocks that are not in use: {ids}"

    # ------------------------------------------------------------ to the end

    def drain(self, most: int = 1500) -> None:
        """Until every request has ended. Fails where one waits for ever: for so many steps, and
        for longer than threads may take."""
        deadline, steps = time.monotonic() + LONG_S, 0
        while steps < most or time.monotonic() < deadline:
            steps += 1
            if not self.requests and not self.in_flight:
                return
            self.step()
            if not self.requests:
                while self.in_flight:
                    self._update(self.in_flight.popleft())
        raise AssertionError(
            f"requests wait for ever: {[(r.request_id, r.status.name) for r in self.waiting]}, "
            f"running {[r.request_id for r in self.running]}, {self.engine.counts}, "
            f"{self.engine.director.statistics()}"
        )


def _blocks(tokens: int) -> int:
    return -(-tokens // BLOCK_TOKENS)


def _passed(window: int, computed: int) -> int:
    """The first block that the next token looks at."""
    return max(0, computed - window + 1) // BLOCK_TOKENS if window else 0


def _ids(tables: Sequence[Sequence[Block]]) -> tuple[list[int], ...]:
    return tuple([block.block_id for block in table] for table in tables)
