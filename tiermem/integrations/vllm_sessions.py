"""What hints come to: marks, facts and expectations for the policies, and blocks given up.

A block belongs to the session whose request computed it, until a request of anybody else has used
it. When a session is closed its own blocks are given up; what others share with it stays.
"""

from __future__ import annotations

import heapq
import itertools
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from tiermem.directed.director import Director, Units
from tiermem.facts import Ended, Expected
from tiermem.integrations.vllm_hints import NO_HINTS, Hints

MOST = 10_000
"""Sessions that are remembered; those not seen for longest are forgotten."""
FIRST = 1 << 32
"""Number of the first session: policies number those that they guess from 1 on."""
AHEAD_S = 2.0
"""How long before a session is due the prefetch policy hears of it, where it does not say."""


@dataclass(frozen=True, slots=True)
class Facts:
    """`RequestFacts` of a request that ended."""

    session: int | None
    turn: int | None
    reason: str | None
    output_tokens: int | None


@dataclass(eq=False, slots=True)
class Session:
    """number: among all of this process. hashes: of the blocks of its last request."""

    number: int
    turns: int = 0
    due: int = 0
    probability: float = 1.0
    hashes: Sequence[bytes] = field(default_factory=tuple)


class Sessions:
    """Sessions of one engine. For the scheduler's thread."""

    def __init__(self, ahead_s: float = AHEAD_S) -> None:
        """ahead_s: what the prefetch policy wants to hear so long before it is due."""
        self._ahead_s = ahead_s
        self._sessions: OrderedDict[str, Session] = OrderedDict()
        self._owner: dict[int, int] = {}
        self._numbers = itertools.count(FIRST)
        self._due: list[tuple[float, int, str]] = []
        self._expectations = itertools.count(1)

    # ---------------------------------------------------------------- whose blocks

    def used(self, hints: Hints, hits: Iterable[int]) -> None:
        """A request found these blocks; those of another session are shared from now on."""
        if self._owner:
            mine = self._number(hints)
            for block in hits:
                if self._owner.get(block, mine) != mine:
                    del self._owner[block]

    def computes(self, hints: Hints, blocks: Iterable[int]) -> None:
        """Blocks have been given to a request, for content that it computes."""
        mine = self._number(hints)
        if mine is not None:
            self._owner.update(dict.fromkeys(blocks, mine))
        elif self._owner:
            for block in blocks:
                self._owner.pop(block, None)

    def given_up(self, hints: Hints, blocks: Sequence[int], hits: int) -> list[int]:
        """Of the blocks of a request that has ended, those that nobody will want.

        hits: so many of them, the first ones, it did not compute itself.
        """
        if hints.closed and hints.session is not None:
            mine = self._number(hints)
            return [block for block in blocks if self._owner.get(block) == mine]
        return [] if hints.keep else list(blocks[hits:])

    # ---------------------------------------------------------------- ends and expectations

    def end(
        self, request: Any, hints: Hints, units: Units, director: Director, now_s: float
    ) -> None:
        """A request has ended, and its units (deepest first) are cached: tell the policies."""
        if hints.priority or hints.retain_s:
            director.retain(units, hints.priority, hints.retain_s)
        session = self._session(hints)
        if session is not None:
            session.turns += 1
        reason = request.get_finished_reason()
        director.finished(
            units,
            Facts(
                session=None if session is None else session.number,
                turn=None if session is None else session.turns,
                reason=None if reason is None else reason.name.lower(),
                output_tokens=int(request.num_output_tokens),
            ),
        )
        if session is None or hints.session is None:
            return
        session.due, session.hashes = 0, ()
        if hints.closed:
            del self._sessions[hints.session]
            director.foresee(Ended(session.number), units[:0])
        elif hints.expected_s is not None:
            session.due = next(self._expectations)
            session.probability = hints.probability
            session.hashes = request.block_hashes
            heapq.heappush(self._due, (now_s + hints.expected_s, session.due, hints.session))

    def look_ahead(
        self, director: Director, units_of: Callable[[Sequence[bytes]], Units], now_s: float
    ) -> None:
        """Tell the prefetch policy which sessions are due soon, and what is kept of them.

        units_of: what holds a chain of hashes by now, as far as it goes, first first.
        """
        while self._due and self._due[0][0] <= now_s + self._ahead_s:
            at_s, due, name = heapq.heappop(self._due)
            session = self._sessions.get(name)
            if session is None or session.due != due:
                continue  # it came back meanwhile, or was closed
            chain = units_of(session.hashes)
            session.due, session.hashes = 0, ()
            in_s = max(0.0, at_s - now_s)
            director.foresee(Expected(session.number, chain, in_s, session.probability), chain)

    def came(self, hints: Hints) -> None:
        """A request of a session is here: it is not expected any more."""
        session = self._session(hints)
        if session is not None:
            session.due, session.hashes = 0, ()

    # ---------------------------------------------------------------- parts

    def _number(self, hints: Hints) -> int | None:
        session = self._session(hints)
        return None if session is None else session.number

    def _session(self, hints: Hints) -> Session | None:
        name = hints.session
        if hints is NO_HINTS or name is None:
            return None
        session = self._sessions.get(name)
        if session is None:
            if len(self._sessions) >= MOST:
                self._sessions.popitem(last=False)
            session = self._sessions[name] = Session(next(self._numbers))
        else:
            self._sessions.move_to_end(name)
        return session
