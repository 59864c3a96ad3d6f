"""Memory of what has left: names of units' contents, and rings of them (ghost queues)."""

from __future__ import annotations

from typing import cast

import numpy as np

from tiermem.policies.base import Ids, Keys, Mask
from tiermem.policies.queue import grown


class Names:
    """What the content of each unit is called: its key, or the unit's own number without keys."""

    def __init__(self) -> None:
        self._key: Keys = np.zeros(0, np.uint64)
        self.evicting: Mask = np.zeros(0, np.bool_)
        """Units that the policy has named as victims and that have not been used since."""

    def note(self, units: Ids, keys: Keys | None, rows: int) -> list[int]:
        """The units have entered; their names."""
        self._key, self.evicting = grown(self._key, rows), grown(self.evicting, rows)
        names = units.astype(np.uint64) if keys is None else keys
        self._key[units] = names
        self.evicting[units] = False
        return _listed(names)

    def of(self, units: Ids) -> list[int]:
        return _listed(self._key[units])


def named(units: Ids, keys: Keys | None) -> list[int]:
    """Names of units that are about to come."""
    return _listed(units if keys is None else keys)


def _listed(names: Ids | Keys) -> list[int]:
    return cast("list[int]", names.tolist())


class Ring:
    """A ghost queue of a fixed number of slots; the oldest slot's content is forgotten first.

    A slot whose content was taken stays empty until its turn.
    """

    def __init__(self, slots: int) -> None:
        self._slots: list[int | None] = [None] * slots
        self._slot_of: dict[int, int] = {}
        self._next = 0

    def put(self, name: int) -> None:
        at = self._next
        old = self._slots[at]
        if old is not None and self._slot_of.get(old) == at:
            del self._slot_of[old]
        self._slots[at] = name
        self._slot_of[name] = at
        self._next = at + 1 if at + 1 < len(self._slots) else 0

    def take(self, name: int) -> bool:
        """True if it was there; its slot is emptied."""
        at = self._slot_of.pop(name, None)
        if at is None:
            return False
        self._slots[at] = None
        return True


class Returning:
    """Which coming units a ghost queue remembers, from when they are announced until they enter."""

    def __init__(self, ring: Ring) -> None:
        self.ring = ring
        self._found: set[int] = set()

    def coming(self, names: list[int]) -> None:
        self._found = {name for name in names if self.ring.take(name)}

    def entered(self, names: list[int]) -> Mask:
        """bool[n]: which of these came back."""
        found, take = self._found, self.ring.take
        return np.array([name in found or take(name) for name in names], np.bool_)
