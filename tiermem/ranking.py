"""The boundary between the planner and one tier's policy: facts in, checked answers out.

Facts are passed on in order; every answer is checked. A wrong one is replaced by leaf-first LRU
from the table's own access order and counted; a policy that is late eight times in a row, or fails
on a fact, is retired for good. Everything that crosses the boundary can be recorded and replayed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

from tiermem.policies.base import Eviction, Keys, RequestFacts, Retaining
from tiermem.table import PageTable, Rows, span
from tiermem.tier import Mask, Place

log = logging.getLogger(__name__)

LATE_S = 1e-3
LATE_A_UNIT_S = 5e-6
"""More for each unit that is asked for: an eighth of what one of 2 MiB takes on its way."""
LATE_IN_A_ROW = 8

_UNNAMED: Mapping[str, object] = MappingProxyType({})

_NO_ROWS = np.empty(0, np.int32)

I64 = npt.NDArray[np.int64]
Recorder = Callable[[Mapping[str, object]], None]


class TableCandidates:
    """The units of one tier that may leave now, as the table knows them."""

    def __init__(self, table: PageTable, place: Place, recording: bool = False) -> None:
        self._table = table
        self._place = place
        self._recording = recording
        self.refused: list[int] = []

    def keep(self, units: Rows) -> Mask:
        kept = self._table.movable(units, self._place)
        if self._recording:
            self.refused.extend(units[~kept].tolist())
        return kept

    def all(self) -> Rows:
        table = self._table
        here = np.flatnonzero(table.at == self._place).astype(np.int32)
        if table.max_unit_pages > 1:
            here = here[table.unit[here] == here]
        return here[table.movable(here, self._place)]


class Ranking:
    """One tier's policy, guarded. All calls are made under the space's lock."""

    def __init__(
        self,
        place: Place,
        policy: Eviction,
        table: PageTable,
        record: Recorder | None = None,
        clock: Callable[[], float] | None = None,
    ) -> None:
        self.place = place
        self.fallbacks = 0
        self.late = 0
        self._policy: Eviction | None = policy
        self._name = policy.name
        self._table = table
        self._retaining: Retaining | None = None
        self._record = record
        self._clock = clock
        self._late_in_a_row = 0
        self._touched: list[Rows] = []
        self._touched_at = 0
        self._tier = place.name.lower()

    @property
    def name(self) -> str:
        """The policy that answers now."""
        return self._name if self._policy is not None else "lru (fallback)"

    def swap(self, policy: Eviction, now: int, named: Mapping[str, object] = _UNNAMED) -> None:
        """Another policy takes over; it is told what is in the tier, oldest access first.

        named: for the log, what makes it again: policy, capacity and params.
        """
        self._flush()
        table = self._table
        here = np.flatnonzero((table.at == self.place) & (table.unit >= 0)).astype(np.int32)
        here = here[table.unit[here] == here]
        here = here[np.argsort(table.stamp[here], kind="stable")]
        self._name, self._late_in_a_row = policy.name, 0
        if self._retaining is not None and self._policy is not None:
            self._retaining.inner = policy  # marks outlive the policy under them
        else:
            self._policy, self._retaining = policy, None
        if self._record:
            self._write("swap", _NO_ROWS, now, **named)
        if len(here):
            self.inserted(here, None, now)

    def retain(
        self,
        units: Rows,
        priority: int,
        until: int,
        now: int,
        around: Callable[[Eviction], Retaining],
    ) -> None:
        """Units of the tier leave later. around: puts such marks over the policy that runs."""
        self._flush()
        if self._policy is None or not len(units):
            return
        if self._retaining is None:
            self._policy = self._retaining = around(self._policy)
        self._retaining.retain(units, priority, until)
        if self._record:
            self._write("retain", units, now, priority=priority, until=until)

    def inserted(self, units: Rows, keys: Keys | None, now: int) -> None:
        self._flush()
        where = span(units)
        parents, depths = self._table.parent[where].copy(), self._table.depth[where].copy()
        if self._record:
            self._write(
                "inserted", units, now, parents=parents.tolist(), depths=depths.tolist(),
                keys=None if keys is None else keys.tolist(),
            )  # fmt: skip
        self._tell("inserted", now, units, parents, depths, keys)

    def accessed(self, units: Rows, now: int) -> None:
        """Buffered: passed on, in order, before the next other call."""
        if self._touched and now != self._touched_at:
            self._flush()
        self._touched.append(units)
        self._touched_at = now

    def removed(self, units: Rows, now: int) -> None:
        self._flush()
        if self._record:
            self._write("removed", units, now)
        self._tell("removed", now, units)

    def finished(self, units: Rows, facts: RequestFacts, now: int) -> None:
        self._flush()
        if self._record:
            self._write(
                "finished", units, now, session=facts.session, turn=facts.turn,
                reason=facts.reason, output_tokens=facts.output_tokens,
            )  # fmt: skip
        self._tell("finished", now, units, facts)

    def victims(self, n: int, now: int) -> Rows:
        """Up to n units that may leave, first to leave first; fewer only if there are no more."""
        self._flush()
        candidates = TableCandidates(self._table, self.place, self._record is not None)
        answer = self._ask(candidates, n, now)
        if answer is None:
            answer = self._oldest(candidates.all(), n)
        if self._record:
            self._write("victims", answer, now, n=n, refused=candidates.refused)
        if self._late_in_a_row >= LATE_IN_A_ROW:
            why = f"{LATE_IN_A_ROW} answers over {LATE_S * 1e3:.0f} ms and 5 us a unit in a row"
            self._late_in_a_row = 0
            self._retire(why, now)
        return answer

    def _ask(self, candidates: TableCandidates, n: int, now: int) -> Rows | None:
        if self._policy is None:
            return None
        start = self._clock() if self._clock else 0.0
        try:
            answer = np.asarray(self._policy.victims(candidates, n, now), np.int32)
            fault = self._fault(answer, n)
        except Exception as error:  # a policy's bug must not cost its engine a request
            answer, fault = np.empty(0, np.int32), f"raised {type(error).__name__}: {error}"
        if self._clock:
            self._judge_time(self._clock() - start, n)
        if fault is None and not len(answer) and len(candidates.all()):
            fault = "no victim, though units may leave"
        if fault is None:
            return answer
        self.fallbacks += 1
        if self.fallbacks == 1:
            log.warning(
                "policy fallback tier=%s policy=%s reason=%s", self._tier, self._name, fault
            )
        if self._record:
            self._write("fallback", answer, now, reason=fault)
        return None

    def _tell(self, fact: str, now: int, *what: object) -> None:
        """Pass a fact on. A policy that fails on one has lost count, and answers no more."""
        if self._policy is None:
            return
        try:
            getattr(self._policy, fact)(*what, now)
        except Exception:
            log.exception("policy failed tier=%s policy=%s", self._tier, self._name)
            self.fallbacks += 1
            self._retire(f"failed on {fact}", now)

    def _fault(self, answer: Rows, n: int) -> str | None:
        """Why an answer breaks the rules, or None."""
        table = self._table
        if answer.ndim != 1 or len(answer) > n:
            return f"{answer.size} victims in an array of {answer.ndim} dimensions, {n} asked for"
        if not len(answer):
            return None
        order = np.argsort(answer, kind="stable")
        ranked = answer[order]
        if ranked[0] < 0 or ranked[-1] >= table.rows:
            return f"unit {int(ranked[0])}..{int(ranked[-1])} of {table.rows} rows"
        if np.count_nonzero(ranked[1:] == ranked[:-1]):
            return "a unit twice"
        if not ((table.unit[answer] == answer) & table.movable(answer, self.place)).all():
            return "a unit that may not leave"
        leaf_first = self._policy is not None and self._policy.leaf_first
        if leaf_first and self._parent_first(answer, order, ranked):
            return "a parent before its child"
        return None

    def _parent_first(self, answer: Rows, order: I64, ranked: Rows) -> bool:
        """order: that sorts the answer, to `ranked`."""
        parents, depths = self._table.parent[answer], self._table.depth[answer]
        at = order[np.minimum(np.searchsorted(ranked, parents), len(answer) - 1)]
        first = (answer[at] == parents) & (at < np.arange(len(answer)))
        # A parent that has left may have given its row to a block that is not nearer to the root.
        stale = (depths > 0) & (self._table.depth[parents] >= depths)
        return bool(np.count_nonzero(first & ~stale))

    def _judge_time(self, took_s: float, n: int) -> None:
        is_late = took_s > LATE_S + n * LATE_A_UNIT_S
        self._late_in_a_row = self._late_in_a_row + 1 if is_late else 0
        self.late += is_late

    def _retire(self, why: str, now: int) -> None:
        """From now on leaf-first LRU answers; the log says since when."""
        log.warning(
            "policy replaced tier=%s policy=%s by=lru reason=%s", self._tier, self._name, why
        )
        self._policy = None
        if self._record:
            self._write("retired", _NO_ROWS, now, reason=why)

    def _oldest(self, units: Rows, n: int) -> Rows:
        stamps = self._table.stamp[units]
        if n < len(units):
            first = np.argpartition(stamps, n)[:n]
            units, stamps = units[first], stamps[first]
        return units[np.argsort(stamps, kind="stable")]

    def _flush(self) -> None:
        if not self._touched:
            return
        units = self._touched[0] if len(self._touched) == 1 else np.concatenate(self._touched)
        self._touched.clear()
        if self._record:
            self._write("accessed", units, self._touched_at)
        self._tell("accessed", self._touched_at, units)

    def _write(self, event: str, units: Rows, now: int, **more: object) -> None:
        assert self._record is not None
        self._record({"e": event, "tier": self._tier, "units": units.tolist(), "now": now, **more})
