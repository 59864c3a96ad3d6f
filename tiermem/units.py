"""Sizes and rates as people write them: "40GiB", "500 MB", "25%", "400MiB/s", and back again.

Binary units (KiB, MiB, GiB, TiB) are powers of 1,024, decimal ones (kB, MB, GB, TB) powers of
1,000. A bare letter ("40G") is refused, since the two differ by 7 % at that size.
"""

from __future__ import annotations

import re
from fractions import Fraction

BYTES_OF = {
    "B": 1,
    "kB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KiB": 2**10,
    "MiB": 2**20,
    "GiB": 2**30,
    "TiB": 2**40,
}
_BINARY = ("TiB", "GiB", "MiB", "KiB", "B")
_UNIT = {name.lower(): factor for name, factor in BYTES_OF.items()}
_AMBIGUOUS = {"k", "m", "g", "t"}
_NUMBER = re.compile(r"\s*([+-]?(?:\d+(?:\.\d+)?|\.\d+)(?:e[+-]?\d+)?)\s*([A-Za-z%]*)\s*")


def parse_bytes(text: str | int) -> int:
    """Bytes of "40GiB", "500 MB", "1.5MiB", "4096" or a plain int; parts of a byte are cut off.

    Raises ValueError for anything else: negative, a fraction, an unknown or ambiguous unit.
    """
    size = parse_size(text)
    if isinstance(size, float):
        raise ValueError(f"{text!r} is a fraction; a size in bytes is needed, such as '2MiB'")
    return size


def parse_size(text: str | int | float) -> int | float:
    """A size: int bytes ("40GiB", 4096), or a float fraction of a whole ("25%", 0.25).

    A fraction lies within 0 and 1. Raises ValueError with what was read and what would do.
    """
    if isinstance(text, bool) or not isinstance(text, str | int | float):
        raise ValueError(f"{text!r} is not a size; write '40GiB', or a fraction such as 0.25")
    if isinstance(text, int):
        return _at_least_nothing(text, text)
    if isinstance(text, float):
        return _within_one(text, text)
    number, unit = _split(text)
    if unit == "%":
        return _within_one(float(number / 100), text)
    if not unit and not text.strip().lstrip("+-").isdecimal():
        return _within_one(float(number), text)
    return _at_least_nothing(int(number * _factor(unit, text)), text)


def parse_rate(text: str | int) -> int:
    """Bytes per second of "400MiB/s" (or a plain int). Raises ValueError as parse_bytes does."""
    if isinstance(text, str):
        size, slash, per = text.partition("/")
        if not slash or per.strip() != "s":
            raise ValueError(f"{text!r} is not a rate; write it per second, such as '400MiB/s'")
        return parse_bytes(size)
    return parse_bytes(text)


def format_bytes(nbytes: int | float) -> str:
    """For people, rounded to one decimal: 1536 -> "1.5KiB", 2**30 -> "1.0GiB", 12 -> "12B"."""
    for name in _BINARY[:-1]:
        if abs(nbytes) >= BYTES_OF[name]:
            return f"{nbytes / BYTES_OF[name]:,.1f}{name}"
    return f"{nbytes:.0f}B"


def format_rate(bytes_per_s: int | float) -> str:
    """As format_bytes, per second: 400 * 2**20 -> "400.0MiB/s"."""
    return f"{format_bytes(bytes_per_s)}/s"


def format_exactly(size: int | float) -> str:
    """The shortest text that parse_size reads back as the same value: "40GiB", "4097B", "25%"."""
    if isinstance(size, float):
        percent = f"{size * 100:.10g}%"
        return percent if parse_size(percent) == size else repr(size)
    for name in _BINARY:
        if size and size % BYTES_OF[name] == 0:
            return f"{size // BYTES_OF[name]}{name}"
    return "0"


def _split(text: str) -> tuple[Fraction, str]:
    match = _NUMBER.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is not a size; write a number and a unit, such as '40GiB'")
    return Fraction(match[1]), match[2]


def _factor(unit: str, text: str) -> int:
    if not unit:
        return 1
    if unit.lower() in _AMBIGUOUS:
        letter = unit.upper()
        raise ValueError(
            f"{text!r} could be {letter}iB (powers of 1,024) or {letter}B (of 1,000); say which"
        )
    if unit.lower() not in _UNIT:
        raise ValueError(f"{text!r}: no unit {unit!r}; known are {', '.join(BYTES_OF)} and %")
    return _UNIT[unit.lower()]


def _at_least_nothing(nbytes: int, text: object) -> int:
    if nbytes < 0:
        raise ValueError(f"{text!r} is negative")
    return nbytes


def _within_one(fraction: float, text: object) -> float:
    if not 0 <= fraction <= 1:  # also refuses NaN
        raise ValueError(
            f"{text!r} is a fraction outside 0 to 1; for a number of bytes write '40GiB'"
        )
    return fraction
