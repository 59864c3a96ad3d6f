"""The interface of eviction policies: facts in, ranked units out.

A policy ranks; it owns no pages, reads no clock and draws no randomness of its own, so a recorded
log replays with the same class and gives the same answers. One instance serves one tier. All calls
arrive under the space's lock, from any thread; they must not block.

`now` is logical time in milliseconds, given by the caller, never decreasing. A unit is named by
the row of its first page: a small non-negative integer that may be used again for other content
after `removed`; `keys` carry the content's identity where the engine knows it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int32]
Keys = npt.NDArray[np.uint64]
Mask = npt.NDArray[np.bool_]


class Candidates(Protocol):
    """Which units may leave the tier at this moment."""

    def keep(self, units: Ids) -> Mask:
        """bool[n]: which of these units may leave; cheap, to be asked for a window of units."""

    def all(self) -> Ids:
        """Every unit that may leave, in no order; costs a pass over the page table."""


class Eviction(Protocol):
    """Ranks the units of one tier. Subclass `EvictionBase` to implement only what you need."""

    name: ClassVar[str]
    leaf_first: ClassVar[bool]
    """True if the policy promises never to name a parent before its child; then it is checked."""

    def inserted(self, units: Ids, parents: Ids, depths: Ids, keys: Keys | None, now: int) -> None:
        """Units that entered the tier, deepest first. parents: unit or -1; depths: 0 = first.

        keys: uint64[n], or None where the content is not known by name.
        """

    def accessed(self, units: Ids, now: int) -> None:
        """Units of this tier that a request used, deepest first."""

    def removed(self, units: Ids, now: int) -> None:
        """Units that left the tier, whether or not this policy named them."""

    def finished(self, units: Ids, facts: RequestFacts, now: int) -> None:
        """A request ended; `units` are the ones of it that are in this tier, deepest first."""

    def victims(self, candidates: Candidates, n: int, now: int) -> Ids:
        """Up to n units to take out of the tier, first to leave first; all in `candidates`.

        Fewer than n means that no other candidate exists.
        """


class Admission(Protocol):
    """Decides what is written to NVMe."""

    def used(self, units: Ids, depths: Ids, now: int) -> None:
        """A request used these units; each once. depths: 0 = first of the chain."""

    def gone(self, units: Ids) -> None:
        """The content of these units is lost everywhere; their numbers may be used again."""

    def admit(self, units: Ids, now: int) -> Mask:
        """bool[n]: which of these leaving units to write, most valuable last (as they leave)."""

    def ahead(self, now: int, *, last: bool) -> int | None:
        """Units that may be on their way to NVMe before they must leave; None: any number.

        What leaves because it must is dropped where it is not admitted, so some is kept for it;
        last: nothing will.
        """


class PrefetchGauge(Protocol):
    """Told what becomes of pages (rows, not units) that were loaded before they were asked for."""

    def loaded(self, pages: Ids) -> None:
        """Loads of these have begun that nobody asked for."""

    def pushed_out(self, pages: Ids) -> None:
        """These leave the GPU so that others can be loaded ahead."""

    def arrived(self, pages: Ids) -> None:
        """These are on the GPU now, whoever loaded them."""

    def needed(self, pages: Ids, absent: Ids) -> None:
        """Somebody uses `pages`; those of them in `absent` have to be loaded now."""

    def dropped(self, pages: Ids) -> None:
        """These left the GPU, or their load came to nothing."""

    def gone(self, pages: Ids) -> None:
        """The content of these is lost everywhere; their numbers may be used again."""


@dataclass(frozen=True, slots=True)
class PrefetchQuality:
    """How good prefetch was so far, in pages.

    needed: loads that somebody needed, ahead or on demand. loaded: ahead. Of these used: asked
    for later; late: used, and still on their way; wasted: left the GPU unused; waiting: neither
    so far. polluting: loads on demand of what had been pushed out for prefetch.
    """

    needed: int
    loaded: int
    used: int
    late: int
    wasted: int
    waiting: int
    polluting: int
    page_bytes: int

    @property
    def coverage(self) -> float:
        """Of the loads that were needed, the part that prefetch did."""
        return self.used / self.needed if self.needed else 0.0

    @property
    def accuracy(self) -> float:
        """Of the pages loaded ahead whose fate is known, the part that was used."""
        known = self.used + self.wasted
        return self.used / known if known else 0.0

    @property
    def timeliness(self) -> float:
        """Of the used, the part that was there in time."""
        return 1 - self.late / self.used if self.used else 0.0

    @property
    def pollution(self) -> float:
        """Loads of what prefetch had pushed out, for each load ahead."""
        return self.polluting / self.loaded if self.loaded else 0.0

    @property
    def wasted_bytes(self) -> int:
        """Loaded ahead and never used."""
        return self.wasted * self.page_bytes


class Onlooker(Protocol):
    """Follows whole requests beside the tiers, for policies on trial. Units of all regions."""

    def named(self, units: Ids, keys: Keys | None) -> None:
        """These units hold other content from now on: uint64[n] its names, if it has any."""

    def finished(self, units: Ids, facts: RequestFacts, now: int) -> None:
        """A request ended that used these units, deepest first."""


@dataclass(frozen=True, slots=True)
class ShadowReport:
    """What one policy on trial would have done, over the sampled requests, in units.

    running: it is the one that the space runs, on trial beside the others. prefix_hits: before the
    first miss of each request; written: passed down; stall_s: to load what was missed, 0 where
    nothing is below and it would be computed. failed: why the trial ended, or nothing.
    """

    policy: str
    running: bool
    requests: int
    accesses: int
    hits: int
    prefix_hits: int
    written: int
    written_bytes: int
    stall_s: float
    failed: str = ""


class Retaining(Eviction, Protocol):
    """A policy around another that lets marked units leave later."""

    inner: Eviction

    def retain(self, units: Ids, priority: int, until: int) -> None:
        """Mark units of the tier. priority: 0 (none) to 100; until: logical ms, 0: no time."""


class RequestFacts(Protocol):
    """What is known of a request when it ends; a field that the engine does not pass is None."""

    @property
    def session(self) -> int | None: ...
    @property
    def turn(self) -> int | None: ...
    @property
    def reason(self) -> str | None: ...
    @property
    def output_tokens(self) -> int | None: ...


class EvictionBase:
    """Does nothing on every fact, so that a policy states only what it looks at."""

    name: ClassVar[str] = ""
    leaf_first: ClassVar[bool] = False

    def __init__(self, capacity: int, seed: int = 0) -> None:
        """capacity: units that the tier holds at most (a hint; it may change while running)."""
        self.capacity = capacity
        self.seed = seed

    def coming(self, units: Ids, keys: Keys | None, now: int) -> None:
        """Optional: units that `inserted` will name next, told before room is made for them.

        Policies that learn from misses (ARC, 2Q, S3-FIFO, W-TinyLFU) choose the victim knowing
        what it makes room for; without this call they learn at `inserted`, one step later.
        """

    def inserted(self, units: Ids, parents: Ids, depths: Ids, keys: Keys | None, now: int) -> None:
        pass

    def accessed(self, units: Ids, now: int) -> None:
        pass

    def removed(self, units: Ids, now: int) -> None:
        pass

    def finished(self, units: Ids, facts: RequestFacts, now: int) -> None:
        pass
