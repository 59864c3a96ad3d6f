"""Class queues by hit density: the default for GPU and host memory.

Units are queued by class, least recently used first. A class says what is known of the request
that used a unit last: how it ended, its turn, the usual gap of its session, whether other sessions
use the unit too, and whether the unit is the request's last (mostly partial, so never used again).
For each class the ages at which its units are used again are learnt online; the victim is the
oldest unit of the class whose oldest unit earns the fewest hits for its time (`density`). Until
enough is known, and for an engine that never says that requests end, this is leaf-first LRU.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import numpy.typing as npt

from tiermem.policies.base import Candidates, EvictionBase, Ids, Keys, RequestFacts
from tiermem.policies.density import Densities, bucket_of
from tiermem.policies.queue import Lineage, Queues, first_width, grown, joined
from tiermem.policies.sessions import Sessions
from tiermem.table import span

I64 = npt.NDArray[np.int64]

REASONS = {None: 0, "": 0, "tool_use": 1, "tool_calls": 1}
OTHER_REASON = 2

RUNNING = 0
"""The queue of units whose request has not ended."""


class ClassQueues(EvictionBase):
    """Leaf-first LRU within a class, hit density between classes."""

    name: ClassVar[str] = "classq"
    leaf_first: ClassVar[bool] = True

    def __init__(
        self,
        capacity: int,
        seed: int = 0,
        turns: int = 4,
        gaps: int = 5,
        prior: float = 0.0,
        learn: int = 4096,
        decay: float = 0.998,
    ) -> None:
        """turns, gaps: classes of a session's turn and of its mean gap; learn: samples before
        densities decide; prior: see `Densities`."""
        super().__init__(capacity, seed)
        self._turns, self._gaps, self._learn = turns, gaps, learn
        classes = 1 + 3 * turns * gaps * 4
        self._queues = Queues(classes)
        self._densities = Densities(classes, prior=prior, decay=decay)
        self._lineage = Lineage()
        self._sessions = Sessions()
        self._last: I64 = np.zeros(0, np.int64)
        self._class: npt.NDArray[np.int16] = np.zeros(0, np.int16)
        """Of the sample that runs for a unit; 0: none."""
        self._samples = 0
        self._filled = np.zeros(classes, np.bool_)
        self._head: Ids = np.zeros(classes, np.int32)
        self._head_stamp: I64 = np.full(classes, -1, np.int64)
        """Each queue's oldest unit as last seen; its stamp says whether it still is."""

    def inserted(self, units: Ids, parents: Ids, depths: Ids, keys: Keys | None, now: int) -> None:
        rows = self._queues.fit(units)
        self._lineage.note(units, parents, depths, rows)
        self._last, self._class = grown(self._last, rows), grown(self._class, rows)
        fresh = self._sessions.enter(units, parents, depths, keys, rows)
        if fresh.any():
            self._class[units[fresh]] = RUNNING
        self._use(units, now)

    def accessed(self, units: Ids, now: int) -> None:
        self._use(self._queues.known(units), now)

    def removed(self, units: Ids, now: int) -> None:
        self._queues.remove(units)

    def finished(self, units: Ids, facts: RequestFacts, now: int) -> None:
        units = self._queues.known(units)
        if not len(units):
            return
        turn, gap_s = self._sessions.end(units, facts.session, now)
        reason = REASONS.get(facts.reason, OTHER_REASON)
        turn = min(turn if facts.turn is None else facts.turn, self._turns)
        gap = 0 if gap_s < 0 else 1 + min(self._gaps - 2, int(np.log2(1 + gap_s) / 2))
        base = ((reason * self._turns + max(turn, 1) - 1) * self._gaps + max(gap, 0)) * 4
        classes = 1 + base + 2 * (self._sessions.users[units] > 1).astype(np.int64)
        classes[0] += 1
        self._densities.begin(classes)
        self._samples += len(units)
        self._class[units] = classes
        self._last[units] = now
        for queue in range(1 + base, 5 + base):  # those that it may be; to ask which takes longer
            here = classes == queue
            if n := np.count_nonzero(here):
                self._filled[queue] = True
                self._queues.append(queue, units if n == len(units) else units[here])

    def victims(self, candidates: Candidates, n: int, now: int) -> Ids:
        if self._samples < self._learn or not self._densities.refreshes:
            answer = self._oldest(candidates, n, now)
        else:
            answer = self._least_dense(candidates, n, now)
        return self._lineage.children_first(answer)

    def _use(self, units: Ids, now: int) -> None:
        where = span(units)
        classes = self._class[where]
        if np.count_nonzero(classes):  # some are not RUNNING
            again = classes != RUNNING
            back = units[again]
            self._densities.hit(classes[again].astype(np.int64), now - self._last[back])
            self._class[back] = RUNNING
        self._densities.count(len(units))
        self._last[where] = now
        self._filled[RUNNING] = True
        self._queues.append(RUNNING, units)

    def _oldest(self, candidates: Candidates, n: int, now: int) -> Ids:
        """Plain LRU over all queues."""
        queues = self._heads()[0].tolist()
        parts = [self._queues.oldest(queue, candidates, n) for queue in queues]
        units = joined(parts)
        if len(parts) < 2:
            return units
        return units[np.argsort(self._queues.stamp[units])][:n]

    def _least_dense(self, candidates: Candidates, n: int, now: int) -> Ids:
        queues, heads = self._heads()
        density = self._density(queues, heads, now)
        stamps = self._queues.stamp[heads]
        after = [0] * len(queues)
        width = first_width(n)
        found: list[Ids] = []
        parts: dict[int, tuple[Ids, I64, npt.NDArray[np.float64], int]] = {}
        while n > 0 and len(queues):
            least = density.min()
            if least == np.inf:
                break
            low = np.flatnonzero(density == least)
            at = int(low[0] if len(low) == 1 else low[stamps[low].argmin()])
            if at in parts:
                units, ranks, earned, end = parts.pop(at)
            else:
                queue = int(queues[at])
                units, ranks, end = self._queues.read(queue, after[at], width)
                if not len(units):
                    density[at] = np.inf
                    continue
                allowed = np.flatnonzero(candidates.keep(units))
                if not len(allowed):
                    after[at] = end
                    width *= 2
                    continue
                units, ranks = units[allowed], ranks[allowed]
                earned = self._density(queue, units, now)
            # Units at the old end that earn as little as the head leave as one run.
            more = np.flatnonzero(earned > least)
            run = min(int(more[0]) if len(more) else len(units), n)
            found.append(units[:run])
            n -= run
            if run == len(units):
                after[at] = end
            else:
                # The next one is the head now.
                parts[at] = units[run:], ranks[run:], earned[run:], end
                density[at], stamps[at] = earned[run], ranks[run]
        return joined(found)

    def _density(
        self, classes: npt.NDArray[np.int64] | int, units: Ids, now: int
    ) -> npt.NDArray[np.float64]:
        table = self._densities.table
        found: npt.NDArray[np.float64] = table[classes, bucket_of(now - self._last[units])]
        return found

    def _heads(self) -> tuple[I64, Ids]:
        """The queues that are not empty, and the oldest unit of each."""
        stamp = self._queues.stamp
        invalid = self._filled & (stamp[self._head] != self._head_stamp)
        for queue in np.flatnonzero(invalid).tolist():
            units, stamps, _ = self._queues.read(queue, 0, 8)
            if len(units):
                self._head[queue], self._head_stamp[queue] = units[0], stamps[0]
            else:
                self._filled[queue] = False
        queues = np.flatnonzero(self._filled)
        return queues, self._head[queues]
