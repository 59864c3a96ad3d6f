"""Where a command's JSON goes: `--json PATH`, or `-` for standard output and nothing else there."""

from __future__ import annotations

import sys
from pathlib import Path

import msgspec

from tiermem.errors import TierMemError


class NotWritten(TierMemError):
    """A file that a command was asked to write and could not."""


def emit(record: msgspec.Struct, to: str | None) -> bool:
    """Write the record as JSON. True when standard output took it: print nothing else then."""
    if to is None:
        return False
    text = msgspec.json.format(msgspec.json.encode(record), indent=2).decode() + "\n"
    if to == "-":
        sys.stdout.write(text)
        return True
    save(Path(to), text)
    return False


def save(path: Path, text: str) -> None:
    """Write a picture, a report or JSON; NotWritten says why it could not be."""
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise NotWritten(f"{path} cannot be written: {error.strerror}") from None
