"""What several folders share: optional test data, and surroundings that are the same everywhere."""

import os
import signal
from pathlib import Path

import hypothesis
import pytest

hypothesis.settings.register_profile(
    "untimed", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("untimed")
"""A busy machine or drive fails no test: an index is synced in 0.3 s there."""

DATA = Path(__file__).parents[2] / "shared"
"""Optional data beside the checkout; tests that need it skip where it is absent."""


def _data(*parts: str) -> Path:
    path = DATA.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"optional test data is not there: {path}")
    return path


@pytest.fixture(scope="session")
def conversation_trace() -> Path:
    """12,031 requests of chats, Mooncake format, xz."""
    return _data("traces", "mooncake_conversation.jsonl.xz")


@pytest.fixture(scope="session")
def agent_trace() -> Path:
    """Sessions of coding agents, xz."""
    return _data("traces", "claude_code_sessions.jsonl.xz")


@pytest.fixture(scope="session")
def tiny_model() -> Path:
    """A folder with the config.json of a very small Llama; random weights are made from it."""
    return _data("engines", "tinyllama")


@pytest.fixture(autouse=True, scope="session")
def _no_variables() -> None:
    """What a user has set for their own engines must not change what is tested."""
    for name in [name for name in os.environ if name.startswith("TIERMEM")]:
        del os.environ[name]


@pytest.fixture(autouse=True, scope="session")
def _ctrl_c() -> None:
    """Ctrl-C is heard, here and in child processes, also where the tests run in the background."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
