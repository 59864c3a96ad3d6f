"""The one engine of this process, between the hooks that make it and those that use it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tiermem.integrations.sglang_engine import Engine

_engine: list[Engine] = []


class NotLive(RuntimeError):
    """A hook that should have run has not: the engine must not go on without tiermem."""


def engine() -> Engine:
    """The engine; NotLive if its KV cache was not made over our memory."""
    if not _engine:
        raise NotLive(
            "tiermem: TIERMEM is on and SGLang made no KV cache over it: this model's pool is not "
            "an ordinary MHA or MLA one, or this SGLang makes it in another way; set TIERMEM=0 to "
            "serve without tiermem"
        )
    return _engine[0]


def begin(made: Engine) -> None:
    """There is one pool in a process; a second one (a draft model's) is refused."""
    if _engine:
        raise NotLive("tiermem: a second KV pool in one process (speculative decoding?); one only")
    _engine.append(made)


def end() -> None:
    """There is none any more."""
    _engine.clear()
