"""Policies by name: built in, from the entry point group `tiermem.policies`, or `module:Class`."""

from __future__ import annotations

import ast
import difflib
import importlib
import logging
from collections.abc import Callable, Mapping
from importlib.metadata import entry_points
from typing import cast

from tiermem.errors import BadPolicy
from tiermem.policies.base import Eviction

log = logging.getLogger(__name__)

GROUP = "tiermem.policies"

BUILT_IN = {
    "2q": "tiermem.policies.twoqueue:TwoQueue",
    "arc": "tiermem.policies.arc:ARC",
    "belady": "tiermem.policies.belady:Belady",
    "classq": "tiermem.policies.classq:ClassQueues",
    "clock": "tiermem.policies.clock:Clock",
    "fifo": "tiermem.policies.fifo:FIFO",
    "lfu": "tiermem.policies.lfu:LFU",
    "lfuda": "tiermem.policies.lfu:LFUDA",
    "lru": "tiermem.policies.lru:LRU",
    "retained": "tiermem.policies.retention:Retained",
    "s3fifo": "tiermem.policies.s3fifo:S3FIFO",
    "sieve": "tiermem.policies.sieve:Sieve",
    "wtinylfu": "tiermem.policies.wtinylfu:WTinyLFU",
}

FREEZES = frozenset({"lfu", "sieve"})
"""Frequency without ageing: keeps dead sessions for ever (agent trace, 5 %: .19 against .95)."""


def names() -> list[str]:
    """Every policy that can be named without a colon."""
    return sorted({*BUILT_IN, *(entry.name for entry in entry_points(group=GROUP))})


def load(
    name: str,
    capacity: int,
    seed: int = 0,
    params: Mapping[str, object] | None = None,
    offline: bool = False,
) -> Eviction:
    """An instance of the policy called `name` for a tier of `capacity` units.

    params: further arguments of its constructor, which may also stand within the name, as in
    "s3fifo(small=0.2)". Raises BadPolicy, naming the nearest known name, or what is wrong with
    the class. offline: also policies that must be told the future.
    """
    name, within = parse(name)
    params = {**within, **(params or {})}
    cls = find(name)
    if getattr(cls, "offline", False) and not offline:
        raise BadPolicy(
            f"policy {name!r} must be told the future: `tiermem simulate` without --tiers only"
        )
    make = cast(Callable[..., Eviction], cls)
    if name in FREEZES:
        log.warning(
            "policy=%s freezes on dead sessions: for comparison only; use classq or lru", name
        )
    try:
        policy = make(capacity, seed, **params)
    except (TypeError, ValueError) as error:
        raise BadPolicy(
            f"policy {name!r}: {cls.__name__}({capacity}, {seed}, {params}) failed: {error}"
        ) from error
    _check(name, policy)
    return policy


def parse(text: str) -> tuple[str, dict[str, object]]:
    """Name and arguments of "s3fifo(small=0.2,promote=1)"; raises BadPolicy."""
    name, opened, rest = text.partition("(")
    if not opened:
        return text, {}
    try:
        call = ast.parse(f"f({rest}", mode="eval").body
        if not isinstance(call, ast.Call) or call.args:
            raise ValueError("write name(key=value, ...)")
        return name, {word.arg or "": ast.literal_eval(word.value) for word in call.keywords}
    except (SyntaxError, ValueError) as error:
        raise BadPolicy(f"policy {text!r}: arguments cannot be read: {error}") from None


def find(name: str) -> type[Eviction]:
    """The class behind a name, arguments left out; raises BadPolicy."""
    name = parse(name)[0]
    where = BUILT_IN.get(name)
    if where is None and ":" in name:
        where = name
    if where is None:
        for entry in entry_points(group=GROUP, name=name):
            where = entry.value
    if where is None:
        near = difflib.get_close_matches(name, names(), n=1)
        raise BadPolicy(
            f"no policy {name!r}{f'; did you mean {near[0]!r}' if near else ''}; "
            f"known: {', '.join(names())}, or module:Class"
        )
    return cast(type[Eviction], import_class(name, where))


def import_class(name: str, where: str) -> type:
    """The class at "module:Class", for the policy called `name`; raises BadPolicy."""
    module, _, attribute = where.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise BadPolicy(f"policy {name!r}: cannot import {where}: {error}") from error
    if not isinstance(found, type):
        raise BadPolicy(f"policy {name!r}: {where} is a {type(found).__name__}, not a class")
    return found


def _check(name: str, policy: Eviction) -> None:
    verbs = ("inserted", "accessed", "removed", "finished", "victims")
    missing = [verb for verb in verbs if not callable(getattr(policy, verb, None))]
    missing += [word for word in ("name", "leaf_first") if not hasattr(policy, word)]
    if missing:
        raise BadPolicy(
            f"policy {name!r}: {type(policy).__name__} lacks {', '.join(missing)}; "
            "derive it from tiermem.policies.EvictionBase"
        )
