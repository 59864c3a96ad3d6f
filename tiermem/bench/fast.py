"""The policies' rules for a flat stream of accesses, compiled by numba (extra `sim`).

Only the simulator uses them, in stream mode; tests hold them against the runtime's classes, hit
for hit. Blocks are dense numbers, so all state is arrays: a list is doubly linked through `after`
and `before`, with a sentinel row behind the blocks. Each kernel fills `hit`, one byte an access.
Without numba the same functions run interpreted: correct, and some hundred times slower.
"""

from __future__ import annotations

import heapq
import importlib.util
from collections.abc import Callable
from typing import TypeVar, cast

import numpy as np
import numpy.typing as npt

I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]
Bytes = npt.NDArray[np.uint8]
F = TypeVar("F", bound=Callable[..., object])

_NUMBA = importlib.util.find_spec("numba") is not None


def compiled() -> bool:
    """Whether numba is there."""
    return _NUMBA


def jit(function: F) -> F:
    """The function, compiled at its first call; kept on disk between processes."""
    if not _NUMBA:
        return function
    import numba

    return cast(F, numba.njit(cache=True)(function))


@jit
def _lists(distinct: int, count: int) -> tuple[I32, I32]:
    """(after, before) of `count` empty lists; list i's sentinel is row distinct + i."""
    after = np.arange(distinct + count).astype(np.int32)
    return after, after.copy()


@jit
def _push(after: I32, before: I32, sentinel: int, x: int) -> None:
    """Put x at the new end: just behind the sentinel."""
    first = after[sentinel]
    after[sentinel] = x
    before[x] = sentinel
    after[x] = first
    before[first] = x


@jit
def _cut(after: I32, before: I32, x: int) -> None:
    """Take x out of its list."""
    left, right = before[x], after[x]
    after[left] = right
    before[right] = left


@jit
def _ghost_put(ring: I32, slot_of: I32, at: int, x: int) -> int:
    """Put x into the ring's slot `at`; the slot after it."""
    old = ring[at]
    if old >= 0 and slot_of[old] == at:
        slot_of[old] = -1
    ring[at] = x
    slot_of[x] = at
    return at + 1 if at + 1 < len(ring) else 0


@jit
def _ghost_take(ring: I32, slot_of: I32, x: int) -> bool:
    at = slot_of[x]
    if at < 0:
        return False
    ring[at] = -1
    slot_of[x] = -1
    return True


@jit
def fifo(blocks: I32, distinct: int, c: int, hit: Bytes) -> None:
    ring = np.full(c, -1, np.int32)
    held = np.zeros(distinct, np.uint8)
    at = 0
    for i in range(len(blocks)):
        x = blocks[i]
        if held[x]:
            hit[i] = 1
            continue
        if ring[at] >= 0:
            held[ring[at]] = 0
        ring[at] = x
        held[x] = 1
        at = at + 1 if at + 1 < c else 0


@jit
def clock(blocks: I32, distinct: int, c: int, hit: Bytes) -> None:
    ring = np.full(c, -1, np.int32)
    held = np.zeros(distinct, np.uint8)  # 0 out, 1 in, 2 in and used
    at = 0
    for i in range(len(blocks)):
        x = blocks[i]
        if held[x]:
            hit[i] = 1
            held[x] = 2
            continue
        while ring[at] >= 0 and held[ring[at]] == 2:
            held[ring[at]] = 1
            at = at + 1 if at + 1 < c else 0
        if ring[at] >= 0:
            held[ring[at]] = 0
        ring[at] = x
        held[x] = 1
        at = at + 1 if at + 1 < c else 0


@jit
def lru(blocks: I32, distinct: int, c: int, hit: Bytes) -> None:
    after, before = _lists(distinct, 1)
    held = np.zeros(distinct, np.uint8)
    size = 0
    for i in range(len(blocks)):
        x = blocks[i]
        if held[x]:
            hit[i] = 1
            if after[distinct] != x:
                _cut(after, before, x)
                _push(after, before, distinct, x)
            continue
        if size == c:
            victim = before[distinct]
            _cut(after, before, victim)
            held[victim] = 0
        else:
            size += 1
        held[x] = 1
        _push(after, before, distinct, x)


@jit
def sieve(blocks: I32, distinct: int, c: int, hit: Bytes) -> None:
    after, before = _lists(distinct, 1)
    held = np.zeros(distinct, np.uint8)
    size, hand = 0, distinct
    for i in range(len(blocks)):
        x = blocks[i]
        if held[x]:
            hit[i] = 1
            held[x] = 2
            continue
        if size == c:
            if hand == distinct:
                hand = before[distinct]
            while held[hand] == 2:
                held[hand] = 1
                hand = before[hand]
                if hand == distinct:
                    hand = before[distinct]
            victim = hand
            hand = before[victim]
            _cut(after, before, victim)
            held[victim] = 0
        else:
            size += 1
        held[x] = 1
        _push(after, before, distinct, x)


@jit
def s3fifo(blocks: I32, distinct: int, c: int, hit: Bytes) -> None:
    target = max(1, c // 10)
    small, main = distinct, distinct + 1
    after, before = _lists(distinct, 2)
    held = np.zeros(distinct, np.uint8)  # 0 out, else uses + 1
    ring, slot_of = np.full(max(1, c - target), -1, np.int32), np.full(distinct, -1, np.int32)
    at, smalls, mains = 0, 0, 0
    for i in range(len(blocks)):
        x = blocks[i]
        if held[x]:
            hit[i] = 1
            if held[x] < 4:
                held[x] += 1
            continue
        back = _ghost_take(ring, slot_of, x)
        while smalls + mains == c:
            if smalls >= target or mains == 0:
                y = before[small]
                _cut(after, before, y)
                smalls -= 1
                if held[y] >= 3:
                    held[y] = 1
                    _push(after, before, main, y)
                    mains += 1
                else:
                    held[y] = 0
                    at = _ghost_put(ring, slot_of, at, y)
            else:
                y = before[main]
                _cut(after, before, y)
                if held[y] >= 2:
                    held[y] -= 1
                    _push(after, before, main, y)
                else:
                    held[y] = 0
                    mains -= 1
        held[x] = 1
        if back:
            _push(after, before, main, x)
            mains += 1
        else:
            _push(after, before, small, x)
            smalls += 1


@jit
def twoqueue(blocks: I32, distinct: int, c: int, hit: Bytes) -> None:
    kin = max(1, c // 4)
    a1in, am = distinct, distinct + 1
    after, before = _lists(distinct, 2)
    held = np.zeros(distinct, np.uint8)  # 1 in A1in, 2 in Am
    ring, slot_of = np.full(max(1, c // 2), -1, np.int32), np.full(distinct, -1, np.int32)
    at, ins, ams = 0, 0, 0
    for i in range(len(blocks)):
        x = blocks[i]
        if held[x]:
            hit[i] = 1
            if held[x] == 2:
                _cut(after, before, x)
                _push(after, before, am, x)
            continue
        back = _ghost_take(ring, slot_of, x)
        if ins + ams == c:
            first = ins > kin or ams == 0
            y = before[a1in] if first else before[am]
            _cut(after, before, y)
            held[y] = 0
            if first:
                at = _ghost_put(ring, slot_of, at, y)
                ins -= 1
            else:
                ams -= 1
        if back:
            held[x] = 2
            _push(after, before, am, x)
            ams += 1
        else:
            held[x] = 1
            _push(after, before, a1in, x)
            ins += 1


@jit
def arc(blocks: I32, distinct: int, c: int, hit: Bytes) -> None:
    after, before = _lists(distinct, 4)
    where = np.full(distinct, -1, np.int8)  # 0 T1, 1 T2, 2 B1, 3 B2
    size = np.zeros(4, np.int64)
    p = 0.0
    for i in range(len(blocks)):
        x = blocks[i]
        at = where[x]
        forget = False
        if at == 0 or at == 1:
            hit[i] = 1
        elif at == 2:
            p = min(float(c), p + max(1.0, size[3] / size[2]))
        elif at == 3:
            p = max(0.0, p - max(1.0, size[2] / size[3]))
        else:
            total = size[0] + size[1] + size[2] + size[3]
            if size[0] + size[2] == c:
                if size[2] > 0:
                    y = before[distinct + 2]
                    _cut(after, before, y)
                    where[y] = -1
                    size[2] -= 1
                else:
                    forget = True
            elif total == 2 * c:
                y = before[distinct + 3]
                _cut(after, before, y)
                where[y] = -1
                size[3] -= 1
        if hit[i] == 0 and size[0] + size[1] == c:
            first = size[0] > 0 and (size[0] > p or (at == 3 and size[0] == p))
            source = 0 if first or forget else 1
            y = before[distinct + source]
            _cut(after, before, y)
            size[source] -= 1
            if forget:
                where[y] = -1
            else:
                where[y] = source + 2
                size[source + 2] += 1
                _push(after, before, distinct + source + 2, y)
        if at >= 0:
            _cut(after, before, x)
            size[at] -= 1
        to = 1 if at >= 0 else 0
        where[x] = to
        size[to] += 1
        _push(after, before, distinct + to, x)


@jit
def wtinylfu(blocks: I32, distinct: int, c: int, hit: Bytes) -> None:
    window = max(1, c // 100)
    main = c - window
    protected = int(0.8 * main)
    after, before = _lists(distinct, 3)
    where = np.full(distinct, -1, np.int8)  # 0 window, 1 probation, 2 protected
    size = np.zeros(3, np.int64)
    uses = np.zeros(distinct, np.int64)
    seen = 0
    for i in range(len(blocks)):
        x = blocks[i]
        uses[x] += 1
        seen += 1
        if seen == 10 * c:
            seen = 0
            uses >>= 1
        at = where[x]
        to = 0
        if at >= 0:
            hit[i] = 1
            _cut(after, before, x)
            size[at] -= 1
            to = 2 if at > 0 else 0
        where[x] = to
        size[to] += 1
        _push(after, before, distinct + to, x)
        if size[2] > protected:
            y = before[distinct + 2]
            _cut(after, before, y)
            size[2] -= 1
            where[y] = 1
            size[1] += 1
            _push(after, before, distinct + 1, y)
        if size[0] > window:
            y = before[distinct]
            _cut(after, before, y)
            size[0] -= 1
            room = size[1] + size[2] < main
            if not room and main > 0:
                source = 1 if size[1] > 0 else 2
                z = before[distinct + source]
                if uses[y] > uses[z]:
                    _cut(after, before, z)
                    size[source] -= 1
                    where[z] = -1
                    room = True
            if room:
                where[y] = 1
                size[1] += 1
                _push(after, before, distinct + 1, y)
            else:
                where[y] = -1


@jit
def _frequency(blocks: I32, distinct: int, c: int, hit: Bytes, ageing: bool) -> None:
    uses = np.zeros(distinct, np.int64)
    rank = np.zeros(distinct, np.int64)
    last = np.zeros(distinct, np.int64)
    heap = [(np.int64(0), np.int64(0), np.int64(0))]
    heap.pop()
    size = 0
    age = np.int64(0)
    for i in range(len(blocks)):
        x = blocks[i]
        if uses[x] > 0:
            # Its entry in the heap is renewed when it comes up: ranks only grow.
            hit[i] = 1
            uses[x] += 1
            rank[x] = age + uses[x]
            last[x] = i
            continue
        while size == c:
            r, t, y64 = heap[0]
            y = np.int64(y64)
            if r == rank[y] and t == last[y]:
                heapq.heappop(heap)
                uses[y] = 0
                size -= 1
                if ageing:
                    age = r
            else:
                heapq.heapreplace(heap, (rank[y], last[y], y))
        uses[x] = 1
        rank[x] = age + 1
        last[x] = i
        size += 1
        heapq.heappush(heap, (rank[x], last[x], np.int64(x)))


@jit
def lfu(blocks: I32, distinct: int, c: int, hit: Bytes) -> None:
    _frequency(blocks, distinct, c, hit, False)


@jit
def lfuda(blocks: I32, distinct: int, c: int, hit: Bytes) -> None:
    _frequency(blocks, distinct, c, hit, True)


@jit
def _following(blocks: I32, distinct: int) -> I64:
    """For each access the next one to its block; past the end, all different, if there is none."""
    n = len(blocks)
    following = np.empty(n, np.int64)
    later = np.full(distinct, -1, np.int64)
    for j in range(n):
        i = n - 1 - j
        following[i] = later[blocks[i]] if later[blocks[i]] >= 0 else n
        later[blocks[i]] = i
    return following


@jit
def belady(blocks: I32, distinct: int, c: int, hit: Bytes) -> None:
    following = _following(blocks, distinct)
    use = np.full(distinct, -1, np.int64)
    heap = [(np.int64(0), np.int64(0))]
    heap.pop()
    size = 0
    for i in range(len(blocks)):
        x = blocks[i]
        if use[x] >= 0:
            hit[i] = 1
        else:
            while size == c:
                when, y = heapq.heappop(heap)
                if use[y] == -when:
                    use[y] = -1
                    size -= 1
            size += 1
        use[x] = following[i]
        heapq.heappush(heap, (-following[i], np.int64(x)))


KERNELS: dict[str, Callable[[I32, int, int, Bytes], None]] = {
    "2q": twoqueue,
    "arc": arc,
    "belady": belady,
    "clock": clock,
    "fifo": fifo,
    "lfu": lfu,
    "lfuda": lfuda,
    "lru": lru,
    "s3fifo": s3fifo,
    "sieve": sieve,
    "wtinylfu": wtinylfu,
}


def warm(name: str) -> None:
    """Compile this policy's kernel now, so that a measured run does not pay for it."""
    KERNELS[name](np.zeros(1, np.int32), 1, 1, np.zeros(1, np.uint8))


def hits(name: str, blocks: I32, distinct: int, capacity: int) -> Bytes:
    """uint8[accesses]: 1 where the policy called `name` hits."""
    hit = np.zeros(len(blocks), np.uint8)
    KERNELS[name](blocks, distinct, capacity, hit)
    return hit


@jit
def optimum(
    blocks: I32, start: I64, key: I64, never: int, distinct: int, c: int, hit: Bytes
) -> None:
    """Request mode: after each request the c blocks with the least key stay, of all at hand.

    key: int64[accesses], the block's next request times a power of two, plus its depth; `never`
    for a block that no later request uses.
    """
    held = np.full(distinct, -1, np.int64)
    heap = [(np.int64(0), np.int64(0))]
    heap.pop()
    size = 0
    for r in range(len(start) - 1):
        for i in range(start[r], start[r + 1]):
            if held[blocks[i]] >= 0:
                hit[i] = 1
        for i in range(start[r], start[r + 1]):
            x = blocks[i]
            if held[x] >= 0:
                size -= 1
                held[x] = -1
            if key[i] != never:
                held[x] = key[i]
                size += 1
                heapq.heappush(heap, (-key[i], np.int64(x)))
        while size > c:
            k, y = heapq.heappop(heap)
            if held[y] == -k:
                held[y] = -1
                size -= 1
