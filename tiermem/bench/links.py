"""PCIe arithmetic: what a link of a generation and width can carry."""

from __future__ import annotations

from typing import TypeVar

import msgspec

N = TypeVar("N", int, float)

GENERATION = {2.5: 1, 5.0: 2, 8.0: 3, 16.0: 4, 32.0: 5, 64.0: 6}
"""PCIe generation by transfer rate in GT/s per lane."""

ENCODING = {1: 8 / 10, 2: 8 / 10, 3: 128 / 130, 4: 128 / 130, 5: 128 / 130, 6: 242 / 256}
"""Payload bits per bit on the wire (PCIe base specification; 6 = FLIT mode)."""

USABLE = 0.878
"""Share of the theoretical rate that large copies reach: 55.3 of 63.0 GB/s, one 4 GiB copy over
Gen5 x16, H200, 2026-11. Headers and flow control cost other links about as much: an estimate
there, to be replaced by a measurement (`tiermem topo --measured`)."""

NVLINK_USABLE = 0.881
"""The same of NVLink: 396.6 of 450 GB/s, median of 7 copies of 4 GiB between two H200, 2026-11."""

WIDTHS = frozenset({1, 2, 4, 8, 12, 16, 32})


class Link(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One PCIe link: transfer rate in GT/s per lane, and lanes. None: not known."""

    gts: float | None = None
    width: int | None = None

    @property
    def known(self) -> bool:
        return self.gts is not None and self.width is not None

    @property
    def generation(self) -> int | None:
        return None if self.gts is None else GENERATION.get(self.gts)

    @property
    def theoretical_gbps(self) -> float | None:
        """GB/s one way after line encoding."""
        if self.gts is None or self.width is None or self.generation is None:
            return None
        return self.gts * self.width * ENCODING[self.generation] / 8

    @property
    def usable_gbps(self) -> float | None:
        """GB/s one way that large copies can be expected to reach."""
        rate = self.theoretical_gbps
        return None if rate is None else rate * USABLE

    def at_most(self, other: Link) -> Link:
        """What two ends can agree on; a side that is not known does not limit."""
        return Link(_least(self.gts, other.gts), _least(self.width, other.width))

    def __str__(self) -> str:
        generation = "Gen?" if self.generation is None else f"Gen{self.generation}"
        width = "x?" if self.width is None else f"x{self.width}"
        return f"{generation} {width}" if self.gts or self.width else "unknown"


def parse(speed: str | None, width: str | None) -> Link:
    """sysfs's spelling ("32.0 GT/s PCIe", "16"); "Unknown speed", 0 and 255 lanes give None."""
    gts = None
    if speed and "GT/s" in speed:
        number = float(speed.split()[0])
        gts = number if number in GENERATION else None
    lanes = int(width) if width and width.strip().isdigit() else 0
    return Link(gts, lanes if lanes in WIDTHS else None)


def of_generation(generation: int | None, width: int | None) -> Link:
    """NVML's spelling: a generation and lanes."""
    gts = {number: rate for rate, number in GENERATION.items()}.get(generation or 0)
    return Link(gts, width if width in WIDTHS else None)


def _least(a: N | None, b: N | None) -> N | None:
    if a is None or b is None:
        return b if a is None else a
    return min(a, b)
