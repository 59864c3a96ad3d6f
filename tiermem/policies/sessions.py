"""Whose block is it, and how does its session behave? Answered from the blocks alone.

A request that extends a known chain continues the session that used the chain last: its turn is
one more, and the time between is that session's gap. So a policy has session features even where
the engine passes none; where it does, `finished` says more (the reason).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from tiermem.policies.base import Ids, Keys, Mask
from tiermem.policies.queue import grown
from tiermem.table import span

COMMON = 8
"""A block that so many sessions used does not tell whose request it is in."""

MANY = 255


class Sessions:
    """What is known of the session that used each unit last, in columns by unit."""

    def __init__(self) -> None:
        self.owner: npt.NDArray[np.int64] = np.zeros(0, np.int64)
        self.users: npt.NDArray[np.uint8] = np.zeros(0, np.uint8)
        self.turn: npt.NDArray[np.uint8] = np.zeros(0, np.uint8)
        self.ended: npt.NDArray[np.int64] = np.zeros(0, np.int64)
        self.gap_s: npt.NDArray[np.float32] = np.zeros(0, np.float32)
        self._key: Keys = np.zeros(0, np.uint64)
        self._place: npt.NDArray[np.int64] = np.zeros(0, np.int64)
        self._opened = 0

    def enter(self, units: Ids, parents: Ids, depths: Ids, keys: Keys | None, rows: int) -> Mask:
        """Units come in; bool[n]: which hold other content than when they were last here."""
        if rows > len(self.owner):
            self.owner, self.users = grown(self.owner, rows, -1), grown(self.users, rows)
            self.turn, self.ended = grown(self.turn, rows), grown(self.ended, rows)
            self.gap_s, self._key = grown(self.gap_s, rows), grown(self._key, rows)
            self._place = grown(self._place, rows, -1)
        if len(units) == 1:
            return self._enter_one(units, parents, depths, keys)
        # Without keys, a unit at another place in its chain is taken for other content.
        place, where = (parents.astype(np.int64) << 32) | depths, span(units)
        fresh: Mask = self._place[where] != place
        self._place[where] = place
        if keys is not None:
            fresh = self._key[where] != keys
            self._key[where] = keys
        if fresh.any():
            new = units[fresh]
            self.owner[new] = -1
            self.users[new] = 0
        return fresh

    def _enter_one(self, units: Ids, parents: Ids, depths: Ids, keys: Keys | None) -> Mask:
        """The same for one unit, a third of the time."""
        unit, place = units.item(), (parents.item() << 32) | depths.item()
        fresh = self._place.item(unit) != place
        self._place[unit] = place
        if keys is not None:
            fresh = self._key.item(unit) != keys.item()
            self._key[unit] = keys.item()
        if fresh:
            self.owner[unit] = -1
            self.users[unit] = 0
        return np.array([fresh])

    def end(self, units: Ids, session: int | None, now: int) -> tuple[int, float]:
        """A request ended; units deepest first. Its turn (1 = first) and mean gap in s, or -1.

        session: the engine's own name of it, if it has one.
        """
        owner = self.owner[units]
        if session is None:
            session, last = self._guess(units, owner)
        else:
            mine = np.flatnonzero(owner == session)
            last = int(units[mine[0]]) if len(mine) else -1
        turn, gap_s = 1, -1.0
        if last >= 0:
            turn = min(int(self.turn[last]) + 1, MANY)
            gap_s = (now - int(self.ended[last])) / 1000
            before = float(self.gap_s[last])
            gap_s = gap_s if before < 0 else (gap_s + before) / 2
        others = units[owner != session]
        self.users[others] = np.minimum(self.users[others], MANY - 1) + 1
        self.owner[units], self.turn[units] = session, turn
        self.ended[units], self.gap_s[units] = now, gap_s
        return turn, gap_s

    def _guess(self, units: Ids, owner: npt.NDArray[np.int64]) -> tuple[int, int]:
        """(session, the unit that tells): by the deepest unit that was known before."""
        known = np.flatnonzero(owner >= 0)
        if len(known) and known[0] < len(units) - 1:
            unit = int(units[known[0]])
            if self.users[unit] < COMMON:
                return int(owner[known[0]]), unit
        self._opened += 1
        return self._opened, -1
