"""A trace as flat arrays: what the simulator replays."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from tiermem.bench.traces import Request
from tiermem.errors import BadTrace

I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]

SHARED_BY = 8
"""A block that this many sessions used says nothing about whose request it is."""


@dataclass(frozen=True, slots=True)
class Workload:
    """Requests in the order in which they are replayed.

    blocks: int32[accesses], dense names 0..distinct-1; request i has blocks[start[i]:start[i+1]].
    The other columns have one row a request; reason indexes `reasons`.
    """

    blocks: I32
    start: I64
    time_ms: I64
    session: I32
    turn: I32
    reason: I32
    input_tokens: I64
    output_tokens: I64
    reasons: tuple[str, ...]
    distinct: int

    @property
    def requests(self) -> int:
        return len(self.time_ms)

    @property
    def accesses(self) -> int:
        return len(self.blocks)

    def capacity(self, percent: float) -> int:
        """Blocks in this part of the distinct ones, rounded up; at least one."""
        # Rounded first: 7 % of 100 is 7.000000000000001 in floating point.
        return max(1, int(np.ceil(round(self.distinct * percent / 100, 6))))

    def of(self, request: int) -> I32:
        return self.blocks[self.start[request] : self.start[request + 1]]

    def part(self, first: int, last: int) -> Workload:
        """Requests [first, last), with the same names of blocks."""
        rows = slice(first, last)
        return replace(
            self,
            blocks=self.blocks[self.start[first] : self.start[last]],
            start=self.start[first : last + 1] - self.start[first],
            time_ms=self.time_ms[rows],
            session=self.session[rows],
            turn=self.turn[rows],
            reason=self.reason[rows],
            input_tokens=self.input_tokens[rows],
            output_tokens=self.output_tokens[rows],
        )


def collect(requests: Iterable[Request]) -> Workload:
    """All requests of a trace; sessions are inferred if it names none. Raises BadTrace if empty."""
    rows = [request for request in requests if len(request.blocks)]
    if not rows:
        raise BadTrace("the trace has no request with a block")
    sizes = np.array([len(row.blocks) for row in rows], np.int64)
    names, blocks = np.unique(np.concatenate([row.blocks for row in rows]), return_inverse=True)
    reasons = tuple(sorted({row.reason for row in rows}))
    found = Workload(
        blocks=blocks.astype(np.int32),
        start=np.concatenate([[0], np.cumsum(sizes)]),
        time_ms=np.maximum.accumulate(np.array([row.time_ms for row in rows], np.int64)),
        session=np.unique([row.session for row in rows], return_inverse=True)[1].astype(np.int32),
        turn=np.array([row.turn for row in rows], np.int32),
        reason=np.searchsorted(np.array(reasons), [row.reason for row in rows]).astype(np.int32),
        input_tokens=np.array([row.input_tokens for row in rows], np.int64),
        output_tokens=np.array([row.output_tokens for row in rows], np.int64),
        reasons=reasons,
        distinct=len(names),
    )
    return with_sessions(found) if all(row.session < 0 for row in rows) else found


def with_sessions(workload: Workload) -> Workload:
    """Sessions and turns guessed from the blocks, for a trace that does not say.

    A request belongs to the session that last used its deepest known block, unless that is its
    first block or was used by 8 sessions already; otherwise it opens a session.
    """
    owner = np.full(workload.distinct, -1, np.int64).tolist()
    users: list[set[int]] = [set() for _ in range(workload.distinct)]
    session = np.zeros(workload.requests, np.int32)
    turn = np.zeros(workload.requests, np.int32)
    turns: list[int] = []
    for request in range(workload.requests):
        blocks = workload.of(request).tolist()
        deepest = next((i for i in range(len(blocks) - 1, -1, -1) if owner[blocks[i]] >= 0), 0)
        known = blocks[deepest]
        if deepest > 0 and len(users[known]) < SHARED_BY:
            mine = owner[known]
        else:
            mine = len(turns)
            turns.append(0)
        for block in blocks:
            owner[block] = mine
            users[block].add(mine)
        turns[mine] += 1
        session[request], turn[request] = mine, turns[mine]
    return replace(workload, session=session, turn=turn)
