"""Made-up requests of multi-turn chats and agent loops, for when no trace is at hand.

Times and ends of sessions follow the coding-agent trace that docs/benchmarks.md describes: after a
tool call 99.2 % come back (median 17 s, p95 164 s), after an answer 12.9 % never do (median 195 s).
Lengths of prompts are assumptions, chosen so that a demo ends within a minute.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from tiermem.bench.traces import Blocks, Request

BLOCK_TOKENS = 512
REQUESTS = 1_500
SESSIONS = 96
"""Sessions that run at one time; when one ends, another begins."""

AGENTS = 0.4
"""The part of the sessions that are agent loops."""

PROMPTS = 6
"""Different system prompts; the sessions of one share its blocks."""

COMES_BACK = {"tool_use": 0.992, "end_turn": 0.871}
MEDIAN_S = {"tool_use": 17.0, "end_turn": 195.0}
SPREAD = {"tool_use": math.log(164 / 17) / 1.645, "end_turn": 1.2}
"""Sigma of the logarithm of the pause; the first from median and p95, the second assumed."""

LONGEST_TOKENS = 64 * 1024
SHARED_TOKENS = {"chat": (512, 2_048), "agent": (6_144, 14_336)}
FIRST_TOKENS = {"chat": 3_000, "agent": 2_000}
ADDED_TOKENS = {"chat": 900, "agent": 700}
ANSWER_TOKENS = {"chat": 350, "agent": 250}
TOOL_CALLS = 0.88
"""How often an agent's answer is a tool call rather than the end of its turn."""


@dataclass(slots=True)
class _Session:
    number: int
    kind: str
    prompt: int
    shared: int
    tokens: int
    turn: int = 0


def generate(seed: int = 0, requests: int = REQUESTS) -> Iterator[Request]:
    """Requests in order of time; the same seed gives the same ones.

    A block is named by its session, or by the system prompt that it belongs to whole; only whole
    blocks are named. A prompt holds all that was said before in its session.
    """
    random = np.random.default_rng(seed)
    shared = _shared_tokens(random)
    waiting: list[tuple[float, int, _Session]] = []
    for number in range(SESSIONS):
        start_s = float(random.uniform(0, MEDIAN_S["end_turn"]))
        heapq.heappush(waiting, (start_s, number, _open(number, shared, random)))
    opened = SESSIONS
    for _ in range(requests):
        now_s, _, session = heapq.heappop(waiting)
        answer = _length(ANSWER_TOKENS[session.kind], random)
        tools = session.kind == "agent" and random.random() < TOOL_CALLS
        reason = "tool_use" if tools else "end_turn"
        yield Request(
            round(1000 * now_s), session.tokens, answer, _blocks(session), session.number,
            session.turn, reason,
        )  # fmt: skip
        session.turn += 1
        session.tokens += answer + _length(ADDED_TOKENS[session.kind], random)
        pause_s = float(random.lognormal(math.log(MEDIAN_S[reason]), SPREAD[reason]))
        if random.random() >= COMES_BACK[reason] or session.tokens > LONGEST_TOKENS:
            session = _open(opened, shared, random)
            opened += 1
        heapq.heappush(waiting, (now_s + pause_s, session.number, session))


def _shared_tokens(random: np.random.Generator) -> dict[str, list[int]]:
    """The lengths of the system prompts of each kind of session."""
    return {
        kind: [int(random.integers(low, high)) for _ in range(PROMPTS)]
        for kind, (low, high) in SHARED_TOKENS.items()
    }


def _open(number: int, shared: dict[str, list[int]], random: np.random.Generator) -> _Session:
    kind = "agent" if random.random() < AGENTS else "chat"
    prompt = int(random.integers(PROMPTS))
    tokens = shared[kind][prompt]
    return _Session(number, kind, prompt, tokens, tokens + _length(FIRST_TOKENS[kind], random))


def _length(mean: int, random: np.random.Generator) -> int:
    return 1 + int(random.exponential(mean))


def _blocks(session: _Session) -> Blocks:
    """Names of the prompt's whole blocks: the system prompt's own first, then the session's."""
    count = max(1, session.tokens // BLOCK_TOKENS)
    common = min(count, session.shared // BLOCK_TOKENS)
    owner = np.full(count, session.number + 2 * PROMPTS, np.int64)
    owner[:common] = session.prompt + (PROMPTS if session.kind == "agent" else 0)
    return owner << 32 | np.arange(count)
