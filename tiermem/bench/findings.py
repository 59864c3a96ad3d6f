"""What a check of the doctor finds: one line, how bad it is, and the way out."""

from __future__ import annotations

from typing import Literal

import msgspec

Level = Literal["ok", "note", "problem"]


class Line(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """problem: something that was asked for will not work. note: it works, but could do better."""

    level: Level
    area: str
    text: str
    way_out: str = ""


def ok(area: str, text: str) -> Line:
    return Line("ok", area, text)


def note(area: str, text: str, way_out: str = "") -> Line:
    return Line("note", area, text, way_out)


def problem(area: str, text: str, way_out: str) -> Line:
    return Line("problem", area, text, way_out)
