"""What a request may say about its blocks, and where it says so.

In the field that vLLM has for connectors, `kv_transfer_params`, under the key "tiermem"; or, one by
one, as `vllm_xargs` whose names begin with "tiermem_". The session may also be vLLM's own (its
`session_id` field, the header X-Session-ID). A value that makes no sense is left out, with one
warning; a request never fails for it. docs/vllm.md has the table.
"""

from __future__ import annotations

import difflib
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from tiermem.policies.retention import HIGHEST

log = logging.getLogger(__name__)

KEY = "tiermem"
PREFIX = "tiermem_"
MOST_WARNINGS = 20
"""Kinds of mistakes that are warned of in a process; what clients send must not fill the log."""


@dataclass(frozen=True, slots=True)
class Hints:
    """What a request says. Times count from its end.

    priority: 0 to 100, blocks of a lower one leave first. retain_s: for so long they leave after
    all others. session: whose turn this is; expected_s: when its next one is due, this probably.
    closed: there will be none. keep: False, nobody will ask for these blocks again.
    """

    priority: int = 0
    retain_s: float = 0.0
    session: str | None = None
    expected_s: float | None = None
    probability: float = 1.0
    closed: bool = False
    keep: bool = True


NO_HINTS = Hints()


def hints_of(request: Any) -> Hints:
    """The hints of a vLLM request: those that make sense."""
    found: dict[str, Any] = {}
    own = getattr(request, "session_id", None)
    if own:
        found["session"] = str(own)
    for name, value in _given(request):
        check = CHECKS.get(name)
        if check is None:
            near = difflib.get_close_matches(name, CHECKS, 1)
            _warn(name, f"there is no hint {name!r}" + (f"; {near[0]!r}?" if near else ""))
            continue
        try:
            found[name] = check(value)
        except ValueError as error:
            _warn(name, f"{name}={value!r:.60}: {error}")
    if not found:
        return NO_HINTS
    if "session" not in found and not {"closed", "expected_s"}.isdisjoint(found):
        _warn("session", "closed and expected_s are of a session, and none is named")
    return Hints(**found)


def _given(request: Any) -> Iterator[tuple[str, Any]]:
    params = getattr(request, "kv_transfer_params", None)
    given = params.get(KEY) if isinstance(params, Mapping) else None
    sampling = getattr(request, "sampling_params", None)
    flat = getattr(sampling, "extra_args", None)
    if isinstance(flat, Mapping):
        for name, value in flat.items():
            if isinstance(name, str) and name.startswith(PREFIX):
                yield name.removeprefix(PREFIX), value
    if isinstance(given, Mapping):
        yield from ((str(name), value) for name, value in given.items())
    elif given is not None:
        _warn(KEY, f"{KEY}={given!r:.60}: an object with hints")


def _number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError("a number")
    return float(value)


def _priority(value: object) -> int:
    number = _number(value)
    if not (0 <= number <= HIGHEST and number == int(number)):
        raise ValueError(f"a whole number from 0 to {HIGHEST}")
    return int(number)


def _seconds(value: object) -> float:
    number = _number(value)
    if not 0 <= number < math.inf:
        raise ValueError("seconds, 0 or more")
    return number


def _probability(value: object) -> float:
    number = _number(value)
    if not 0 <= number <= 1:
        raise ValueError("a number from 0 to 1")
    return number


def _name(value: object) -> str:
    if isinstance(value, bool) or not isinstance(value, (str, int)) or value == "":
        raise ValueError("a name")
    return str(value)


def _flag(value: object) -> bool:
    if value not in (0, 1):
        raise ValueError("true or false")
    return bool(value)


CHECKS: Mapping[str, Callable[[object], object]] = {
    "priority": _priority,
    "retain_s": _seconds,
    "session": _name,
    "expected_s": _seconds,
    "probability": _probability,
    "closed": _flag,
    "keep": _flag,
}

_warned: set[str] = set()


def _warn(kind: str, what: str) -> None:
    if kind not in _warned and len(_warned) < MOST_WARNINGS:
        _warned.add(kind)
        log.warning("vllm hint left out, as others like it will be: %s", what)
