"""The policies' rules in plain Python, one access at a time: what the classes are held against.

Each takes the accesses and a capacity C and gives the number of hits. Every miss inserts; the
victim is chosen before the insertion when C blocks are held. Slow and obvious on purpose.
"""

import heapq
from collections import OrderedDict
from collections.abc import Callable, Sequence

Rule = Callable[[Sequence[int], int], int]


def fifo(accesses: Sequence[int], c: int) -> int:
    held: OrderedDict[int, None] = OrderedDict()
    hits = 0
    for x in accesses:
        if x in held:
            hits += 1
            continue
        if len(held) == c:
            held.popitem(last=False)
        held[x] = None
    return hits


def lru(accesses: Sequence[int], c: int) -> int:
    held: OrderedDict[int, None] = OrderedDict()
    hits = 0
    for x in accesses:
        if x in held:
            hits += 1
            held.move_to_end(x)
            continue
        if len(held) == c:
            held.popitem(last=False)
        held[x] = None
    return hits


def clock(accesses: Sequence[int], c: int) -> int:
    held: OrderedDict[int, bool] = OrderedDict()
    hits = 0
    for x in accesses:
        if x in held:
            hits += 1
            held[x] = True
            continue
        while len(held) == c:
            oldest, used = held.popitem(last=False)
            if used:
                held[oldest] = False
        held[x] = False
    return hits


def _frequency(accesses: Sequence[int], c: int, ageing: bool) -> int:
    rank: dict[int, tuple[int, int]] = {}
    count: dict[int, int] = {}
    heap: list[tuple[int, int, int]] = []
    hits = age = 0
    for t, x in enumerate(accesses):
        if x in rank:
            hits += 1
            count[x] += 1
        else:
            while len(rank) == c:
                key, used, victim = heapq.heappop(heap)
                if rank.get(victim) == (key, used):
                    del rank[victim], count[victim]
                    age = key if ageing else 0
            count[x] = 1
        rank[x] = (age + count[x], t)
        heapq.heappush(heap, (*rank[x], x))
    return hits


def lfu(accesses: Sequence[int], c: int) -> int:
    return _frequency(accesses, c, ageing=False)


def lfuda(accesses: Sequence[int], c: int) -> int:
    return _frequency(accesses, c, ageing=True)


def sieve(accesses: Sequence[int], c: int) -> int:
    newer: dict[int, int | None] = {}
    older: dict[int, int | None] = {}
    used: dict[int, bool] = {}
    head: int | None = None
    tail: int | None = None
    hand: int | None = None
    hits = 0
    for x in accesses:
        if x in used:
            hits += 1
            used[x] = True
            continue
        if len(used) == c:
            at = hand if hand is not None else tail
            assert at is not None
            while used[at]:
                used[at] = False
                step = newer[at]
                at = step if step is not None else tail
                assert at is not None
            up, down = newer.pop(at), older.pop(at)
            del used[at]
            hand = up
            if up is not None:
                older[up] = down
            else:
                head = down
            if down is not None:
                newer[down] = up
            else:
                tail = up
        newer[x], older[x], used[x] = None, head, False
        if head is not None:
            newer[head] = x
        head = x
        if tail is None:
            tail = x
    return hits


def arc(accesses: Sequence[int], c: int) -> int:
    t1: OrderedDict[int, None] = OrderedDict()
    t2: OrderedDict[int, None] = OrderedDict()
    b1: OrderedDict[int, None] = OrderedDict()
    b2: OrderedDict[int, None] = OrderedDict()
    hits, p = 0, 0.0

    def replace(in_b2: bool) -> None:
        if t1 and ((in_b2 and len(t1) == p) or len(t1) > p):
            b1[t1.popitem(last=False)[0]] = None
        else:
            b2[t2.popitem(last=False)[0]] = None

    for x in accesses:
        if x in t1 or x in t2:
            hits += 1
            t1.pop(x, None)
            t2.pop(x, None)
            t2[x] = None
        elif x in b1:
            p = min(float(c), p + max(1.0, len(b2) / len(b1)))
            replace(False)
            del b1[x]
            t2[x] = None
        elif x in b2:
            p = max(0.0, p - max(1.0, len(b1) / len(b2)))
            replace(True)
            del b2[x]
            t2[x] = None
        else:
            l1 = len(t1) + len(b1)
            both = l1 + len(t2) + len(b2)
            if l1 == c:
                if len(t1) < c:
                    b1.popitem(last=False)
                    replace(False)
                else:
                    t1.popitem(last=False)
            elif both >= c:
                if both == 2 * c:
                    b2.popitem(last=False)
                replace(False)
            t1[x] = None
    return hits


class _Ring:
    def __init__(self, slots: int) -> None:
        self.slots: list[int | None] = [None] * slots
        self.at = 0

    def put(self, x: int) -> None:
        self.slots[self.at] = x
        self.at = (self.at + 1) % len(self.slots)

    def take(self, x: int) -> bool:
        if x not in self.slots:
            return False
        self.slots[self.slots.index(x)] = None
        return True


class _FastRing(_Ring):
    """The same with an index, for long traces."""

    def __init__(self, slots: int) -> None:
        super().__init__(slots)
        self.where: dict[int, int] = {}

    def put(self, x: int) -> None:
        old = self.slots[self.at]
        if old is not None:
            self.where.pop(old, None)
        self.where[x] = self.at
        super().put(x)

    def take(self, x: int) -> bool:
        at = self.where.pop(x, None)
        if at is None:
            return False
        self.slots[at] = None
        return True


def twoqueue(accesses: Sequence[int], c: int) -> int:
    kin = max(1, c // 4)
    a1in: OrderedDict[int, None] = OrderedDict()
    am: OrderedDict[int, None] = OrderedDict()
    out = _FastRing(max(1, c // 2))
    hits = 0
    for x in accesses:
        if x in am:
            hits += 1
            am.move_to_end(x)
            continue
        if x in a1in:
            hits += 1
            continue
        back = out.take(x)
        if len(a1in) + len(am) == c:
            if len(a1in) > kin or not am:
                out.put(a1in.popitem(last=False)[0])
            else:
                am.popitem(last=False)
        (am if back else a1in)[x] = None
    return hits


def s3fifo(accesses: Sequence[int], c: int) -> int:
    s = max(1, c // 10)
    small: OrderedDict[int, int] = OrderedDict()
    main: OrderedDict[int, int] = OrderedDict()
    ghost = _FastRing(max(1, c - s))
    hits = 0
    for x in accesses:
        if x in small or x in main:
            hits += 1
            queue = small if x in small else main
            queue[x] = min(3, queue[x] + 1)
            continue
        back = ghost.take(x)
        while len(small) + len(main) == c:
            if len(small) >= s or not main:
                tail, count = small.popitem(last=False)
                if count >= 2:
                    main[tail] = 0
                else:
                    ghost.put(tail)
            else:
                tail, count = main.popitem(last=False)
                if count >= 1:
                    main[tail] = count - 1
        (main if back else small)[x] = 0
    return hits


def wtinylfu(accesses: Sequence[int], c: int) -> int:
    window_size = max(1, c // 100)
    main_size = c - window_size
    protected_size = int(0.8 * main_size)
    window: OrderedDict[int, None] = OrderedDict()
    probation: OrderedDict[int, None] = OrderedDict()
    protected: OrderedDict[int, None] = OrderedDict()
    count: dict[int, int] = {}
    hits = seen = 0
    for x in accesses:
        count[x] = count.get(x, 0) + 1
        seen += 1
        if seen == 10 * c:
            count = {y: n // 2 for y, n in count.items() if n > 1}
            seen = 0
        if x in window:
            hits += 1
            window.move_to_end(x)
        elif x in protected:
            hits += 1
            protected.move_to_end(x)
        elif x in probation:
            hits += 1
            del probation[x]
            protected[x] = None
            if len(protected) > protected_size:
                probation[protected.popitem(last=False)[0]] = None
        else:
            window[x] = None
            if len(window) > window_size:
                y = window.popitem(last=False)[0]
                if len(probation) + len(protected) < main_size:
                    probation[y] = None
                    continue
                queue = probation or protected
                if queue and count.get(y, 0) > count.get(next(iter(queue)), 0):
                    queue.popitem(last=False)
                    probation[y] = None
    return hits


def belady(accesses: Sequence[int], c: int) -> int:
    following = [len(accesses) + 1] * len(accesses)
    last: dict[int, int] = {}
    for t in range(len(accesses) - 1, -1, -1):
        following[t] = last.get(accesses[t], len(accesses))
        last[accesses[t]] = t
    held: dict[int, int] = {}
    heap: list[tuple[int, int]] = []
    hits = 0
    for t, x in enumerate(accesses):
        if x in held:
            hits += 1
        else:
            while len(held) == c:
                when, victim = heapq.heappop(heap)
                if held.get(victim) == -when:
                    del held[victim]
        held[x] = following[t]
        heapq.heappush(heap, (-following[t], x))
    return hits


RULES: dict[str, Rule] = {
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
