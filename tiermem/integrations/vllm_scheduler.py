"""The scheduler's side of the vLLM connector: block ids and requests in, a director's verbs out.

vLLM hands out block ids of a virtual pool, several times what the GPU holds, and never needs to
know where a block's bytes are. Two things make that safe. A block is entered as long as a request
holds it, and an entered block is on the GPU. And `BlockPool.get_num_free_blocks`, which vLLM asks
before it admits or grows any request, answers for this one pool how many blocks can have frames
at once.

A hybrid model has several block tables a request, over the one pool (vllm_groups.py); a block is a
block here, whichever table it stands in.

A waiting request whose prefix is below is not admitted (the answer is None) while its blocks are
fetched and others run; if nobody runs, it is admitted at once and its step waits for the copies.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tiermem import units as sizes
from tiermem.config import load
from tiermem.directed.director import Director, Look, Units
from tiermem.directed.orders import Hello, Orders, Report
from tiermem.directed.turns import Turns
from tiermem.directed.upkeep import Upkeep
from tiermem.errors import ConfigError
from tiermem.integrations.layout import Layout
from tiermem.integrations.threads import switch_sooner
from tiermem.integrations.vllm_choice import LEAST_TOKENS, Choice
from tiermem.integrations.vllm_groups import groups_of, in_order
from tiermem.integrations.vllm_hints import NO_HINTS, Hints, hints_of
from tiermem.integrations.vllm_metrics import Told, snapshot
from tiermem.integrations.vllm_sessions import AHEAD_S, Sessions
from tiermem.integrations.vllm_worker import RANKS
from tiermem.keyindex import Keys
from tiermem.leases import NO_LEASES
from tiermem.plan import Access
from tiermem.policies.recompute import Places
from tiermem.tier import AT_GPU, HOST, NVME, Place

log = logging.getLogger(__name__)

SMALL_BYTES = 32 << 20
"""A load of fewer bytes than this takes less than a step; running requests may wait for it."""
NOWHERE: Places = np.empty(0, np.uint8)
FEW = 16
"""Blocks that are looked at one by one in less time than all of a prefix together."""
FIRST_TABLE = [0]
"""The group of a model that has one."""
GATHER_S = 0.05
"""How long a request of which little is to be computed may wait for loads of others like it, to be
computed in one step with them: that takes as long for one as for all (25 ms, 8B shape, H200)."""
PATIENCE_S = 10.0
"""How long a waiting request is held back for loads; after that its prefix is computed again."""


@dataclass(eq=False)
class Tracked:
    """A request that holds blocks, in a table for each group; 0 where it holds one no more.

    begins: where in each table it may hold any. keyed: those labelled already. hits: the first
    ones of each table, whose content it found. computed: so many are full after that step.
    """

    request: Any
    hints: Hints
    tables: list[list[int]]
    begins: list[int]
    keyed: int = 0
    hits: int = 0
    computed: tuple[int, int] = (0, 0)

    @property
    def blocks(self) -> list[int]:
        """The first table: all that it holds where there is only one."""
        return self.tables[0]


@dataclass(eq=False)
class Fetch:
    """A waiting request whose prefix is kept, or on its way up. blocks: held for it; new: others
    that it will need when it is admitted. late_unit: one of theirs that was seen on its way.
    came_s: when all of them were seen to be there."""

    since_s: float
    blocks: list[int] = field(default_factory=list)
    new: int = 0
    late_unit: int = -1
    came_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Far:
    """Why a waiting request was held back that nothing is done for: blocks of its prefix below.

    They are enough for it to wait while others run, wherever the rest of the prefix is.
    hits: of the prefix; place: where they are, or further down; blocks: with their hashes.
    """

    hits: int
    place: Place
    blocks: Sequence[tuple[Any, Any]]


@dataclass(frozen=True, slots=True)
class New:
    """Blocks that a request gets to write, deepest first, with the block before each and its
    place in the chain; -1 before the first."""

    blocks: Sequence[int]
    parents: Sequence[int]
    depths: Sequence[int]


@dataclass(frozen=True)
class Match:
    """What was found of a waiting request: blocks in vLLM's prefix cache, and behind them.

    hits: how many of each table; outside: on the drive, of an earlier run, or with another engine;
    dear: more of these, which are computed sooner than they would come.
    """

    hits: int = 0
    outside: int = 0
    dear: int = 0


class EngineSide:
    """What the connector does in the scheduler's process. One thread."""

    def __init__(self, vllm_config: Any, kv_cache_config: Any) -> None:
        self._vllm = vllm_config
        self._config = load()
        self._engine_id: str = vllm_config.kv_transfer_config.engine_id
        self._block_tokens = int(vllm_config.cache_config.block_size)
        self._groups = groups_of(vllm_config, kv_cache_config)
        self._given_back = False  # groups with a window may hold less than they did
        self._tables_of: Callable[[str], Sequence[Sequence[Any]]] | None = None
        self._director: Director | None = None
        self._layout: Layout | None = None
        self._pool: Any = None
        self._reset: Callable[[], bool] | None = None
        self._free: Callable[[Iterable[Any]], None] | None = None
        self._counts_all = False
        self._has_peers = False
        self._tracked: dict[str, Tracked] = {}
        self._waiting: dict[str, Fetch] = {}
        self._fetched: set[int] = set()  # all blocks that are held for those
        self._far: dict[str, Far] = {}
        self._queue_full = False
        self._matched: dict[str, Match] = {}
        self._new: list[New] = []  # of requests admitted to the step that is being put together
        self._below: list[Units] = []  # what such requests have found further down
        self._frames = 0  # that it will take
        self._admitted = self._loading = 0  # to that step; blocks that it waits for
        self._computes_much = False
        self._later: list[Units] = []
        self._worked = 0  # the last step in which a request ran
        self._computed: deque[tuple[int, int, str]] = deque()
        self._turns = Turns()
        self._upkeep: Upkeep | None = None
        self._lost: list[Units] = []
        self._stale = True
        self._room = self._credit = self._spent = self._seen = 0
        self._choice = Choice()
        self._cut: set[str] = set()  # requests that wait, of whose prefix something is dear
        self._unread: set[str] = set()  # those whose content on the drive could not be had
        ahead_ms = self._config.prefetch.params.get("ahead_ms")
        self._sessions = Sessions(AHEAD_S if ahead_ms is None else float(str(ahead_ms)) / 1000)
        self._told = Told()
        self.counts = dict.fromkeys(("waited", "recomputed", "given_up", "adopted", "stalled"), 0)
        """What was done for requests; docs/metrics.md says what each means."""

    # ---------------------------------------------------------------- starting

    def see_tables(self, tables_of: Callable[[str], Sequence[Sequence[Any]]]) -> None:
        """tables_of(request id): vLLM's own tables of a request, which say what it holds now."""
        self._tables_of = tables_of

    def bind(self, pool: Any) -> None:
        """vLLM's block pool: from here on its free blocks are those that can have frames."""
        self._pool = pool
        self._reset, self._free = pool.reset_prefix_cache, pool.free_blocks
        pool.get_num_free_blocks = self._free_blocks
        pool.free_blocks = self._free_noted
        pool.get_usage = self._usage
        pool.reset_prefix_cache = self._reset_prefix_cache

    def meet(self, hellos: Sequence[Hello], layout: Layout) -> None:
        """All ranks are up. Raises ConfigError if the longest request could never run."""
        switch_sooner()
        self._layout = layout
        rank = RANKS.get(self._engine_id)
        assert rank is not None or not self._config.share.enabled, "refused by vllm_config"
        if rank is not None:
            self._turns = rank.turns
            self._upkeep = Upkeep(rank)
            self._has_peers = rank.peers is not None
        self._director = Director(
            hellos,
            layout.units,
            layout.unit_pages,
            self._config,
            headroom=2 * -(-self._step_blocks() // layout.blocks_per_unit),
            on_gone=self._gone,
            leases=NO_LEASES if rank is None else rank.leases,
            peers=None if rank is None else rank.peers,
            wake=(lambda: None) if self._upkeep is None else self._upkeep.wake,
        )
        longest = int(self._vllm.model_config.max_model_len)
        most = (self._director.most - 1) * layout.blocks_per_unit
        if self._groups.held(longest) > most:
            most = self._groups.longest(most, longest)
            raise ConfigError(
                f"tiermem: gpu.budget holds {most} tokens, a request may have {longest}: raise "
                f"gpu.budget, or give --max-model-len {most}"
            )
        if any(self._groups.windows) and self._tables_of is None:
            raise ConfigError(
                "tiermem: sliding windows of which vLLM frees blocks while a request runs need "
                "vLLM 0.30 or newer; set TIERMEM=0"
            )
        nvme = self._config.nvme
        if not self._groups.is_plain and (self._has_peers or (nvme.enabled and nvme.persist)):
            log.warning("vllm: content of a model with sliding windows is not kept, and not shared")
        if layout.blocks_per_unit > 1:
            log.warning(
                "vllm blocks=%s move in groups of %d, and no content is kept for the next start; "
                "with --block-size %d a block would be whole pages",
                sizes.format_bytes(layout.stride * len(layout.offsets)),
                layout.blocks_per_unit,
                self._block_tokens * layout.blocks_per_unit,
            )
        if self._upkeep is not None:
            self._upkeep.start(self._director)

    @property
    def director(self) -> Director:
        assert self._director is not None, "the ranks introduce themselves first"
        return self._director

    @property
    def layout(self) -> Layout:
        assert self._layout is not None, "the ranks introduce themselves first"
        return self._layout

    # ---------------------------------------------------------------- vLLM's block pool

    def _free_blocks(self) -> int:
        """Blocks that vLLM may take now: virtual ones that are free and can have frames at once.

        Between two orders frames only get fewer, by what vLLM has taken since; blocks that it
        gives back have frames again only after the next orders.
        """
        virtual = self._count_free()
        if self._stale:
            if self._director is None or self._counts_all:
                return virtual
            self._begin_schedule()
        elif virtual != self._seen:  # vLLM asks once for every request that runs
            self._note_taken()
        free = self._room + self._credit - self._spent
        return virtual if free > virtual else free if free > 0 else 0

    def _begin_schedule(self) -> None:
        self._begin_step()
        if self._stale:
            self._stale = False
            self._hear_here()
            self._seen = self._count_free()
            self._credit = self._spent = 0
            self._admitted = self._loading = 0
            self._computes_much = False
            self._queue_full = False
            self._room = self.director.room()

    def _begin_step(self) -> None:
        """From here to the end of the step's work, nobody else uses director or rank."""
        self._turns.begin()
        if self._upkeep is not None and self._upkeep.error is not None:
            raise self._upkeep.error
        self._evict_lost()

    def _note_taken(self) -> None:
        """Blocks that vLLM took since the last look have no frames in the table yet."""
        free = self._count_free()
        self._spent += max(0, self._seen - free)
        self._seen = free

    def _free_noted(self, blocks: Iterable[Any]) -> None:
        """Blocks that vLLM gives back in the midst of a step must not hide those it took before."""
        assert self._free is not None, "the pool is bound first"
        self._note_taken()
        self._given_back = any(self._groups.windows)
        self._free(blocks)

    def _usage(self) -> float:
        """Part of the GPU budget that requests hold."""
        if self._director is None:
            return 0.0
        return min(1.0, self.director.units_in_use() / max(1, self.director.budget))

    # ---------------------------------------------------------------- waiting requests

    def match(self, request: Any, computed: int) -> tuple[int | None, bool]:
        """What of a waiting request's prompt is to be had beyond vLLM's own prefix cache.

        (None, False) holds the request back. (n, True): n tokens come from the drive, before the
        request runs.
        """
        name = request.request_id
        self._begin_schedule()
        self._matched.pop(name, None)
        stale = self._tracked.pop(name, None)
        if stale is not None:  # none of its content could be had: vLLM has freed all its blocks
            self._leave(stale)
            self._unread.add(name)
        fetch = self._waiting.get(name)
        if fetch is not None and fetch.blocks and self._is_early(request, fetch, computed):
            self.counts["waited"] += 1
            return None, False
        hits = computed // self._block_tokens
        if self._queue_full and self._is_still_far(name, hits):
            self.counts["waited"] += 1
            return None, False
        prefix = self._prefix(request.block_hashes, hits)
        if prefix is None:
            return None, False  # some were lost since vLLM looked; it looks again, and finds less
        if self._is_held_back(request, prefix, hits):
            self.counts["waited"] += 1
            return None, False
        found = self._outside(request, hits)
        outside = self._worth(request, hits, found)
        self._matched[name] = Match(hits, outside, len(found) - outside)
        return outside * self._block_tokens, outside > 0

    def _prefix(self, hashes: Sequence[bytes], hits: int) -> list[Any] | None:
        """vLLM's blocks of a request that has found so many of each table; None: some are gone."""
        if self._groups.is_plain:
            look_up = self._pool.get_cached_block
            each = [look_up(block_hash, FIRST_TABLE) for block_hash in hashes[:hits]]
            return [blocks[0] for blocks in each] if all(each) else None
        found = []
        for i, group in self._groups.kept(hits):
            blocks = self._pool.get_cached_block(hashes[i], [group])
            if not blocks:
                return None
            found.append(blocks[0])
        return found

    def _kept(self, hashes: Sequence[bytes]) -> int:
        """How many blocks of a chain are kept, in those tables that keep all of them."""
        whole = [group for group, window in enumerate(self._groups.windows) if not window]
        for i, block_hash in enumerate(hashes):
            if not self._pool.get_cached_block(block_hash, whole):
                return i if whole else len(hashes)
        return len(hashes)

    def _is_held_back(self, request: Any, prefix: list[Any], hits: int) -> bool:
        """Look where a prefix is, and do what brings it up; True: the request waits."""
        director = self.director
        if self._awaits_another(prefix):
            return True
        idle = [block.block_id for block in prefix if block.ref_cnt == 0]
        wanted = self._units(idle)[::-1]
        new = max(0, self._groups.held(request.num_tokens) - len(prefix))
        self._note_taken()
        if new + self._spent <= self._room and director.are_here(wanted):
            self._credit = len(wanted) - int(np.count_nonzero(director.in_use(wanted)))
            return False
        look = director.look(wanted)
        need = self._frames_for(look) + new + self._spent
        # Behind one for whom there is no room, none is made for one who has to wait anyway.
        left = request.num_tokens - hits * self._block_tokens
        if need > self._room and not (self._queue_full and self._is_far(look, left)):
            need -= self._frames
            self._enter_below()
            director.make_room(need)
            self._room = director.room()
            look = director.look(wanted)
        if look.here.all():
            self._credit = len(wanted) - int(np.count_nonzero(director.in_use(wanted)))
            return False
        if look.gone.any():
            self._evict(wanted[look.gone])
            return True  # vLLM looks again, and finds less
        if self._is_far(look, left):
            self._begin_fetch(request, prefix, hits, idle, new, look)
            return True
        if look.below.any() and self._leave_dear(request, prefix, hits):
            return True
        self._credit = int((look.here & ~director.in_use(wanted)).sum())
        return False

    def _is_still_far(self, name: str, hits: int) -> bool:
        """Whether what held a request back is as it was: it waits, and behind one for whom there
        is no room nothing is done for it."""
        far = self._far.get(name)
        if far is None or far.hits != hits:
            return False
        is_below = self.director.is_below
        return all(
            block.block_hash == block_hash and is_below(block.block_id, far.place)
            for block, block_hash in far.blocks
        )

    def _note_far(self, request: Any, hits: int, wanted: Units, look: Look) -> None:
        """Remember blocks that are enough to hold a request back, where a few are."""
        far, place, enough = look.deep, NVME, 1
        if not far.any():
            far, place, enough = look.below, HOST, 1 + SMALL_BYTES // self.layout.unit_bytes
        units = wanted[far][:enough].tolist()
        self._far.pop(request.request_id, None)
        if enough <= FEW and len(units) == enough and self.layout.blocks_per_unit == 1:
            blocks = [self._pool.blocks[block] for block in units]
            named = [(block, block.block_hash) for block in blocks]
            self._far[request.request_id] = Far(hits, place, named)

    def _is_far(self, look: Look, left: int) -> bool:
        """Whether a request has to wait for what was looked at before it is admitted, with so
        many tokens left to be computed."""
        if look.deep.any() or look.coming.any():
            return True
        return self._would_disturb(int(look.below.sum()), left)

    def _frames_for(self, look: Look) -> int:
        """Frames that a prefix takes which is not all on the GPU, or on its way."""
        return 0 if look.here.all() else int((look.shown | look.below | look.deep).sum())

    def _awaits_another(self, prefix: list[Any]) -> bool:
        """Whether a part of a prefix is kept for another request that waits, and not here yet."""
        fetched = self._fetched
        if not fetched:
            return False
        shared = [block.block_id for block in prefix if block.block_id in fetched]
        return bool(shared) and not self.director.are_here(self._units(shared))

    def _begin_fetch(
        self, request: Any, prefix: list[Any], hits: int, idle: list[int], new: int, look: Look
    ) -> None:
        """Bring a waiting request's prefix up and keep it, if it is worth that and all who wait so
        fit beside all who run; in the order of the queue. look: of `idle`, the deepest first."""
        director = self.director
        fetch = self._waiting.setdefault(request.request_id, Fetch(time.monotonic()))
        units = self._units(idle)[::-1]
        if self._queue_full:
            self._note_far(request, hits, units, look)
            return
        self._enter_below()
        promised = sum(other.new for other in self._waiting.values() if other is not fetch)
        free = director.budget - director.units_in_use() - promised - self._spent
        frames = self._spent + self._frames_for(look)
        if len(units) + new > free or frames > director.room():
            self._queue_full = True
            self._note_far(request, hits, units, look)
            return
        if self._leave_dear(request, prefix, hits):
            return
        if not director.fetch(units):
            self._queue_full = True
            return
        fetch.blocks, fetch.new = fetch.blocks + idle, new
        self._fetched.update(idle)
        self._pool.touch([self._pool.blocks[block] for block in idle])
        self._seen = self._count_free()
        self._room = director.room()

    def _is_early(self, request: Any, fetch: Fetch, computed: int) -> bool:
        """Whether a request that was fetched for waits on: for its prefix, or while others run
        for some to begin with."""
        left = request.num_tokens - computed
        if self._awaits(request, fetch):
            return self._others_run or not self._hurry(request, fetch, left)
        return self._others_run and self._awaits_others(fetch, left)

    @property
    def _others_run(self) -> bool:
        """Whether anybody runs but those who begin with the step that is being put together."""
        return len(self._tracked) > self._admitted

    def _hurry(self, request: Any, fetch: Fetch, left: int) -> bool:
        """Have the step that is being put together wait for a fetched prefix: nobody else runs."""
        if self._waiting.get(request.request_id) is not fetch:
            return False  # it was given up
        units = self._units(fetch.blocks)
        coming = int(np.count_nonzero(self.director.look(units).coming))
        if self._delays_others(coming, left) or not self.director.await_fetched(units):
            return False
        self._loading += coming
        self._fetched.difference_update(fetch.blocks)
        return True

    def _delays_others(self, units: int, left: int) -> bool:
        """Whether a request that waits for so many units and has so many tokens left to be computed
        would keep those who begin with this step, or they it."""
        host = self.director.speeds().get(HOST)
        if host is None or not self._admitted:
            return host is None
        if self._computes_much or left >= LEAST_TOKENS:
            return True
        return (self._loading + units) * self.layout.unit_bytes > GATHER_S * host.gbps * 1e9

    def _awaits(self, request: Any, fetch: Fetch) -> bool:
        """Whether a fetched prefix is still on its way; what takes too long is given up."""
        late = time.monotonic() - fetch.since_s > PATIENCE_S
        if not late and fetch.late_unit >= 0 and self.director.is_coming(fetch.late_unit):
            return True
        units = self._units(fetch.blocks)
        look = self.director.look(units)
        if look.here.all():
            return False
        if late or look.gone.any():
            self.counts["given_up"] += 1
            self._end_fetch(request.request_id)
            self._evict(units[~look.here])
            return True
        coming = units[look.coming]
        fetch.late_unit = int(coming[-1]) if len(coming) else -1
        return True

    def _awaits_others(self, fetch: Fetch, left: int) -> bool:
        """Whether a request that could run is to do so in one step with others, whose prefixes
        are on their way. left: tokens of it to be computed."""
        if left >= LEAST_TOKENS or len(self._waiting) == 1:
            return False
        now_s = time.monotonic()
        fetch.came_s = fetch.came_s or now_s
        if now_s - fetch.came_s > GATHER_S:
            return False
        others = (other.blocks for other in self._waiting.values() if other is not fetch)
        return any(not self.director.are_here(self._units(blocks)) for blocks in others if blocks)

    def _end_fetch(self, name: str) -> None:
        """A request waits no more: what was kept for it is its own by now, or anybody's."""
        fetch = self._waiting.pop(name, None)
        if fetch is not None and fetch.blocks:
            self._fetched.difference_update(fetch.blocks)
            self.director.leave(self._units(fetch.blocks)[::-1])
            self._pool.free_blocks([self._pool.blocks[block] for block in fetch.blocks[::-1]])
            self._seen = self._count_free()

    def _forget_waiting(self, name: str) -> None:
        """A request has been admitted, or has ended."""
        self._cut.discard(name)
        self._unread.discard(name)
        self._far.pop(name, None)
        self._end_fetch(name)

    def _leave_dear(self, request: Any, prefix: list[Any], hits: int) -> bool:
        """Let vLLM find no more of a prefix than comes sooner than it is computed.

        True: what is behind that is out of its prefix cache, but for what is on the GPU, on its
        way or in use; vLLM looks again, and finds less. A connector cannot admit a request with
        fewer hits than the cache has, and its own blocks would stand behind the old ones there.
        Of several tables all of it is left, or nothing: what a window would need at the cut is
        seldom kept.
        """
        director, tokens = self.director, hits * self._block_tokens // len(prefix)
        units = self._units([block.block_id for block in prefix])
        places, nbytes = director.chain(units)
        nbytes //= self.layout.blocks_per_unit
        suffix = request.num_tokens - hits * self._block_tokens
        speeds, now_s = director.speeds(), time.monotonic()
        cut = self._choice.cut(places, nbytes, tokens, speeds, suffix, now_s)
        if not self._groups.is_plain:
            cut = 0 if 2 * cut < len(prefix) else len(prefix)
        if cut == len(prefix):
            return False
        idle = np.array([block.ref_cnt == 0 for block in prefix[cut:]], np.bool_)
        dear = np.flatnonzero((places[cut:] != AT_GPU) & (nbytes[cut:] > 0) & idle) + cut
        if not len(dear):
            return False
        log.debug("recompute request=%s blocks=%d", request.request_id, len(dear))
        self._pool.evict_blocks({prefix[i].block_id for i in dear.tolist()})
        if self.layout.blocks_per_unit == 1:
            director.give_up(units[dear][::-1])
        self._cut.add(request.request_id)
        self._queue_full = True  # it is admitted next: nobody behind it takes its frames
        return True

    def _worth(self, request: Any, hits: int, found: Places) -> int:
        """How many of the blocks that an earlier run or others have come sooner than computed."""
        if not len(found):
            return 0
        tokens = self._block_tokens
        suffix = request.num_tokens - (hits + len(found)) * tokens
        speeds, now_s = self.director.speeds_outside(), time.monotonic()
        return self._choice.cut(found, self.layout.unit_bytes, tokens, speeds, suffix, now_s)

    def _would_disturb(self, units: int, left: int) -> bool:
        """Whether others would have to wait for a load of so many units: who runs at all, and who
        is to begin with this step for longer than it pays to."""
        if not self._tracked or units * self.layout.unit_bytes <= SMALL_BYTES:
            return False
        return self._others_run or self._delays_others(units, left)

    def _outside(self, request: Any, hits: int) -> Places:
        """Where blocks of a prompt, behind its local prefix, are that an earlier run left on the
        drive, or another engine has in its host memory."""
        if not self._keeps or has_adapter(request):
            return NOWHERE
        if request.num_tokens <= (hits + 1) * self._block_tokens:
            return NOWHERE
        if request.request_id in self._unread:
            return NOWHERE  # it would get the same blocks, whose frames cannot be had yet, for ever
        last = (request.num_tokens - 1) // self._block_tokens
        keys = keys_of(request.block_hashes[hits:last])
        return self.director.find(keys) if len(keys) else NOWHERE

    # ---------------------------------------------------------------- admissions and ends

    def admit(self, request: Any, block_ids: tuple[Sequence[int], ...], external: int) -> None:
        """vLLM has given a waiting request these blocks; its step is being put together.

        Those that hold content are in use from now on, but for hits on blocks that another request
        has got in this very step. `orders` sees to these and to new ones, all at once; until then
        new ones count as spent.
        """
        match = self._matched.pop(request.request_id, Match())
        self._note_taken()
        self._leave_given_back()
        tracked = self._tracked.get(request.request_id)
        taken = 0
        if tracked is None:
            tracked = self._track(request, [list(table[: match.hits]) for table in block_ids])
            self._admitted += 1
            done = (match.hits + match.outside) * self._block_tokens
            self._computes_much |= request.num_tokens - done >= LEAST_TOKENS
            self.counts["recomputed"] += match.dear > 0 or request.request_id in self._cut
            taken += self._enter_hits(tracked)
            if external and match.outside:
                end = match.hits + match.outside
                self._enter_below()
                self._adopt(tracked, list(block_ids[0][match.hits : end]))
                taken += match.outside
                self._room = self.director.room()
        else:  # its content from the drive has come, or has failed to
            lost = self.director.mend(self._units(tracked.blocks))
            if lost.any():
                tracked.keyed = min(tracked.keyed, int(np.flatnonzero(lost)[0]))
        more = [table[len(mine) :] for table, mine in zip(block_ids, tracked.tables, strict=True)]
        self._new += self._add_new(tracked, more)
        self._forget_waiting(request.request_id)
        self._spent = max(0, self._spent - taken)
        self._credit = 0

    def _track(self, request: Any, tables: list[list[int]]) -> Tracked:
        """A request that holds what it has found, in each of its tables."""
        begins = [len(table) - sum(map(bool, table)) for table in tables]
        tracked = Tracked(request, hints_of(request), tables, begins)
        self._tracked[request.request_id] = tracked
        self._sessions.came(tracked.hints)
        return tracked

    def finish(self, request: Any) -> None:
        """A request has ended, or was aborted; vLLM frees its blocks next."""
        with self._turns.lock:
            self._matched.pop(request.request_id, None)
            self._forget_waiting(request.request_id)
            tracked = self._tracked.pop(request.request_id, None)
            if tracked is not None:
                self._give_up(tracked)
                units = self._each_once(self._leave(tracked))
                self._sessions.end(request, tracked.hints, units, self.director, time.monotonic())
            self._stale = True
            self._told.is_due |= not self._tracked  # while others run it is told soon enough

    def _give_up(self, tracked: Tracked) -> None:
        """Blocks that a request says nobody will want, and nobody else holds, are not kept."""
        if tracked.hints.keep and not tracked.hints.closed:
            return
        hits = len(in_order([table[: tracked.hits] for table in tracked.tables]))
        mine = self._sessions.given_up(tracked.hints, in_order(tracked.tables), hits)
        alone = {block for block in mine if self._pool.blocks[block].ref_cnt == 1}
        if alone:
            self._pool.evict_blocks(alone)

    def _leave(self, tracked: Tracked) -> Units:
        """Blocks are no longer used by a request: their units, the deepest block's first."""
        self._enter_new()
        self._label(tracked, *tracked.computed)
        return self._leave_blocks(in_order(tracked.tables)[::-1])

    def _leave_blocks(self, blocks: list[int]) -> Units:
        """Those without a hash are worth nothing."""
        units = self._units(blocks)
        if self.layout.blocks_per_unit > 1:
            for unit in units.tolist():  # blocks of one unit may be anybody's
                self.director.leave(np.array([unit], np.int32))
            return units
        pool = self._pool.blocks
        worthless = [b for b in blocks if pool[b].block_hash is None]
        self.director.leave(units, worthless=self._units(worthless))
        return units

    def _leave_given_back(self) -> None:
        """Blocks that running requests hold no more, since nothing looks back at them.

        Called before anything is entered: vLLM may have given them away again in this very step.
        """
        if not self._given_back:
            return
        self._given_back = False
        assert self._tables_of is not None, "looked for at the start"
        for name, tracked in self._tracked.items():
            tables = self._tables_of(name)  # empty where it was preempted since
            left: list[int] = []
            for group, table in enumerate(tables):
                mine, at = tracked.tables[group], tracked.begins[group]
                while at < min(len(mine), len(table)) and not table[at].block_id:
                    left.append(mine[at])
                    mine[at] = 0
                    at += 1
                tracked.begins[group] = at
            if left:  # by each request for itself: several may have held the same block
                self._leave_blocks(left)

    def _leave_preempted(self) -> None:
        """Requests that were preempted hold no blocks.

        One that was, and whose content has come from the drive since, has that status again, and
        tokens computed.
        """
        preempted = [
            name
            for name, tracked in self._tracked.items()
            if not tracked.request.num_computed_tokens  # asked first: in every step, of everyone
            and tracked.request.status.name == "PREEMPTED"
        ]
        for name in preempted:
            self._leave(self._tracked.pop(name))

    def is_making_room(self) -> bool:
        """Whether waiting a step brings frames that are lacking now, without a preemption."""
        self.counts["stalled"] += 1
        self._enter_below()
        self._leave_given_back()
        self._leave_preempted()
        for name in list(self._waiting):
            self._end_fetch(name)  # who runs goes before who waits
        self.director.make_room(self._step_blocks())
        return self.director.coming() > 0

    # ---------------------------------------------------------------- steps

    def orders(self, output: Any) -> Orders:
        """Orders of the step that vLLM has just put together."""
        director = self.director
        self._begin_step()
        self._leave_given_back()
        self._leave_preempted()
        self._grow_running(output.scheduled_cached_reqs)
        for hits in self._later:
            self._enter_units(hits, "read")
        self._later.clear()
        if not output.num_scheduled_tokens and self._worked <= director.passed:
            self._give_way()
        now_s = time.monotonic()
        self._sessions.look_ahead(director, self._units_kept, now_s)
        orders = director.orders()
        if output.num_scheduled_tokens:
            self._worked = orders.step
        tokens = output.num_scheduled_tokens.values()
        self._choice.prefill.begin(tokens, now_s, loads=orders.awaits_loads())
        self._note_computed(output, orders.step)
        self._stale = True
        return orders

    def _give_way(self) -> None:
        """Nobody runs, and nobody could be admitted: what is kept for those who wait is in the way
        of one who holds blocks already, and needs more, or of one before them who needs all."""
        blocks = [block for fetch in self._waiting.values() for block in fetch.blocks]
        refused = blocks and self._matched and not self.director.coming()
        if (self._tracked or refused) and not self.director.look(self._units(blocks)).coming.any():
            for name in list(self._waiting):
                self._end_fetch(name)
            self.director.make_room(self.director.budget)

    def hear(self, reports: Iterable[Report]) -> None:
        """What the ranks report; sent by those in other processes."""
        self._choice.prefill.end(time.monotonic())
        with self._turns.lock:
            for report in reports:
                self.director.settle(report)
            self._hear_here()
            self._label_computed()
            self._stale = True
        self._evict_lost()

    def _hear_here(self) -> None:
        """A rank in this process is asked at once."""
        rank = RANKS.get(self._engine_id)
        if rank is not None and self._director is not None and rank.has_news():
            self.director.settle(rank.report())

    def _grow_running(self, cached: Any) -> None:
        """Blocks that requests got in this step, with new content: admitted ones, and these."""
        resumed = getattr(cached, "resumed_req_ids", None)
        if resumed is None:
            flags = cached.resumed_from_preemption
            resumed = {name for name, is_so in zip(cached.req_ids, flags, strict=True) if is_so}
        for name, new in zip(cached.req_ids, cached.new_block_ids, strict=True):
            if new is None or name in resumed:
                continue
            self._new += self._add_new(self._tracked[name], new)
        self._enter_new()

    def _enter_hits(self, tracked: Tracked) -> int:
        """What a request has found is in use; how many of it nobody held before, and take no frame
        that the table does not know of."""
        tracked.keyed = tracked.hits = len(tracked.blocks)
        hits = in_order(tracked.tables)
        if not hits:
            return 0
        self._sessions.used(tracked.hints, hits)
        pool = self._pool.blocks
        alone = np.array([pool[block].ref_cnt == 1 for block in hits[::-1]], np.bool_)
        taken, units = int(np.count_nonzero(alone)), self._units(hits)[::-1]
        if taken < len(units):
            shared, units = units[~alone], units[alone]
            used = self.director.in_use(shared)
            self._enter_units(shared[used], "read")
            if np.count_nonzero(used) < len(shared):
                self._later.append(shared[~used])
        if self.layout.blocks_per_unit > 1 or self.director.are_here(units):
            self._enter_units(units, "read")
            return taken
        frames = self.director.frameless(units)
        self._loading += frames
        self._below.append(units)  # nobody else's, so that each is named once
        self._frames += frames
        return taken - frames

    def _enter_below(self) -> None:
        """What requests admitted to this step have found further down comes up, in one go.

        Called before anything else is moved, as it may be what has to leave for that.
        """
        if self._below:
            units = np.concatenate(self._below)
            self._below.clear()
            self._enter_units(units, "read")
            self._spent = max(0, self._spent - self._frames)
            self._frames = 0
            self._room = self.director.room()

    def _add_new(self, tracked: Tracked, tables: Sequence[Sequence[int]]) -> Iterator[New]:
        """Blocks that will be written, behind those that a request has in each table.

        A chain is what is found by its first blocks; of a window any stretch is, so that its
        blocks have no parents.
        """
        for group, blocks in enumerate(tables):
            mine = tracked.tables[group]
            first = len(mine)
            chain = [mine[-1] if first else -1, *blocks]
            if self._groups.windows[group]:
                chain[:-1] = [-1] * len(blocks)
            mine += blocks
            self._sessions.computes(tracked.hints, blocks)
            depths = range(first + len(blocks) - 1, first - 1, -1)
            yield New(list(blocks[::-1]), chain[-2::-1], depths)

    def _enter_new(self) -> None:
        """New blocks of all requests, in one go, after those that they have found."""
        self._enter_below()
        several, self._new = self._new, []
        blocks = [block for new in several for block in new.blocks]
        if not blocks:
            return
        units = self._units(blocks)
        if self.layout.blocks_per_unit > 1:
            for unit in units.tolist():
                self.director.enter(np.array([unit], np.int32), "write")
            return
        parents = np.array([block for new in several for block in new.parents], np.int32)
        depths = np.array([depth for new in several for depth in new.depths], np.int32)
        self.director.enter(units, "fresh", parents=parents, depths=depths)

    def _enter_units(self, units: Units, access: Access) -> None:
        """Units of blocks, so each as often as blocks of it are named."""
        if self.layout.blocks_per_unit == 1:
            self.director.enter(units, access)
            return
        for unit in units.tolist():
            self.director.enter(np.array([unit], np.int32), access)

    def _adopt(self, tracked: Tracked, blocks: list[int]) -> None:
        """Blocks whose content is on the drive, from an earlier run; vLLM waits for it."""
        first = len(tracked.blocks)
        tracked.blocks.extend(blocks)
        tracked.hits = len(tracked.blocks)
        self._sessions.computes(NO_HINTS, blocks)
        units = self._units(blocks)
        keys = keys_of(tracked.request.block_hashes[first : first + len(blocks)])
        parents = np.concatenate([self._units(tracked.blocks[first - 1 : first]), units[:-1]])
        parents = parents if first else np.concatenate([np.array([-1], np.int32), units[:-1]])
        depths = np.arange(first, first + len(blocks), dtype=np.int32)
        name = tracked.request.request_id
        found = self.director.adopt(units, keys, name, parents=parents, depths=depths)
        tracked.keyed = first + int(found.cumprod().sum())
        self.counts["adopted"] += int(found.sum())

    # ---------------------------------------------------------------- content with a name

    @property
    def _keeps(self) -> bool:
        nvme = self._config.nvme
        wanted = self._has_peers or (nvme.enabled and nvme.persist)
        return wanted and self._groups.is_plain and self.layout.blocks_per_unit == 1

    def _note_computed(self, output: Any, step: int) -> None:
        """After this step, so many tokens of each request have been computed."""
        if not self._keeps:
            return
        for name in output.num_scheduled_tokens:
            tracked = self._tracked.get(name)
            if tracked is not None:
                request = tracked.request
                tokens = request.num_computed_tokens + output.num_scheduled_tokens[name]
                tracked.computed = step, tokens // self._block_tokens
                self._computed.append((*tracked.computed, name))

    def _label_computed(self) -> None:
        while self._computed and self._computed[0][0] <= self.director.passed:
            step, blocks, name = self._computed.popleft()
            tracked = self._tracked.get(name)
            if tracked is not None:
                self._label(tracked, step, blocks)

    def _label(self, tracked: Tracked, step: int, blocks: int) -> None:
        """The first blocks of a request hold what their hashes say, once a step has passed."""
        if not self._keeps or step > self.director.passed or not tracked.hints.keep:
            return
        if has_adapter(tracked.request):
            return
        last = min(blocks, len(tracked.blocks), len(tracked.request.block_hashes))
        if last > tracked.keyed:
            units = self._units(tracked.blocks[tracked.keyed : last])
            # A rank in this process says that a step has passed before its report of it is heard.
            last -= len(units) - int((~self.director.look(units).coming).cumprod().sum())
            units = units[: last - tracked.keyed]
            keys = keys_of(tracked.request.block_hashes[tracked.keyed : last])
            self.director.label(units, keys)
            tracked.keyed = last

    def forget_content(self) -> None:
        """What is on the drive is of other weights, or whatever vLLM knows: it counts no more."""
        if self._keeps:
            with self._turns.lock:
                self.director.forget_content()

    def _reset_prefix_cache(self) -> bool:
        """vLLM empties its prefix cache, as after new weights: so is what the drive holds.

        It does so only if no block is in use, which it sees by all being free.
        """
        assert self._reset is not None, "the pool is bound first"
        for name in list(self._waiting):
            self._end_fetch(name)
        self._counts_all = self._stale = True
        try:
            done = self._reset()
        finally:
            self._counts_all = False
        if done:
            self.forget_content()
        return done

    def _gone(self, units: Units, reason: str) -> None:
        """vLLM hears of it in its own thread, before it uses what it finds in its cache."""
        log.debug("gone units=%d reason=%s", len(units), reason)
        self._lost.append(units)
        if self._turns.under_way:
            self._evict_lost()

    def _evict_lost(self) -> None:
        while self._lost:
            self._evict(self._lost.pop())

    def _evict(self, units: Units) -> None:
        """vLLM must not find these blocks in its prefix cache."""
        self._pool.evict_blocks(set(self.layout.blocks_of(units).tolist()))

    # ---------------------------------------------------------------- parts

    def take_stats(self) -> dict[str, float] | None:
        """Totals for vLLM's metrics page, now and then and once all requests have ended."""
        if self._director is None or not self._told.is_time(time.monotonic()):
            return None
        with self._turns.lock:
            return snapshot(self._director, self.layout, self.counts)

    def limit(self, nbytes: int) -> None:
        """Change the GPU budget of every rank while serving."""
        with self._turns.lock:
            self.director.limit(nbytes)
            self._stale = True

    def check(self) -> None:
        """Assert that what requests hold is in use, and every invariant below that."""
        with self._turns.lock:
            self.director.check()

    def close(self) -> None:
        """End what goes on while idle; the ranks close with their workers."""
        if self._upkeep is not None:
            self._upkeep.close()

    def _units_kept(self, hashes: Sequence[bytes]) -> Units:
        """What holds a chain by now, the first block first."""
        kept = self._prefix(hashes, self._kept(hashes)) or ()
        return self._each_once(self._units([block.block_id for block in kept][::-1]))[::-1]

    def _each_once(self, units: Units) -> Units:
        """The units of blocks, the deepest first; in their order where each block is a unit."""
        return units if self.layout.blocks_per_unit == 1 else np.unique(units)[::-1]

    def _units(self, blocks: Sequence[int] | np.ndarray) -> Units:
        return self.layout.units_of(blocks)

    def _step_blocks(self) -> int:
        """New blocks of one step, about, in all tables."""
        tokens = int(self._vllm.scheduler_config.max_num_batched_tokens)
        return -(-tokens // self._block_tokens) * len(self._groups.windows)

    def _count_free(self) -> int:
        free: int = self._pool.free_block_queue.num_free_blocks
        return free


def has_adapter(request: Any) -> bool:
    """Whether a LoRA adapter is used: block hashes have its name (0.32: and its path), and nothing
    of its weights, so they name no content outside of this engine."""
    return getattr(request, "lora_request", None) is not None


def keys_of(block_hashes: Sequence[bytes]) -> Keys:
    """uint64[n, 2]: the first 128 bits of vLLM's block hashes, which name all that comes before."""
    joined = b"".join(bytes(block_hash)[:16].ljust(16, b"\0") for block_hash in block_hashes)
    keys: Keys = np.frombuffer(joined, np.uint64).reshape(-1, 2)
    return keys
