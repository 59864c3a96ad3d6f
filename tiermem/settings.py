"""What the sections of a configuration are made of: keys with a reader and a line of help.

A reader turns whatever was given (text, number, flag) into the value that is kept, and raises
ValueError with a reason otherwise. The same readers serve TOML, overrides and constructors, so
`Gpu(budget="64MiB")`, `budget = "64MiB"` and `gpu.budget=64MiB` mean the same and fail the same.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, NamedTuple, TypeVar

import msgspec

from tiermem import units
from tiermem.errors import ConfigError

Size = int | float
"""int: bytes. float: a fraction of a whole that is known later."""

Reader = Callable[[object], object]
T = TypeVar("T")

if TYPE_CHECKING:

    class Setting(Generic[T]):
        """A field that is given as T or as text, and read as T."""

        def __get__(self, section: object, owner: type | None = None) -> T: ...
        def __set__(self, section: object, value: T | str) -> None: ...
else:

    class Setting:
        def __class_getitem__(cls, item: object) -> object:
            return item


class Key(NamedTuple):
    """How a setting is read and written, and the line of help above it in a written file."""

    read: Reader
    help: str
    write: Callable[[object], str] | None = None
    """None: `literal`."""


class BadValue(ConfigError):
    """A setting whose value cannot be meant; `key` is its dotted name."""

    def __init__(self, key: str, value: object, reason: str, source: str = "") -> None:
        self.key, self.value, self.reason = key, value, reason
        where = f" ({source})" if source else ""
        super().__init__(f"{key} = {literal(value)}{where}: {reason}")


def default(value: object) -> Any:  # Any: the one way to give a descriptor-typed field a default
    """The default of a `Setting` field."""
    return value


class Section(msgspec.Struct, frozen=True, kw_only=True):
    """A group of settings: every field is read by the reader of its key in `keys`."""

    keys: ClassVar[dict[str, Key]] = {}

    def __post_init__(self) -> None:
        for key, kind in self.keys.items():
            value = getattr(self, key)
            try:
                msgspec.structs.force_setattr(self, key, kind.read(value))
            except ValueError as error:
                raise BadValue(self.dotted(key), value, str(error)) from None
        self.agree()

    def agree(self) -> None:
        """Raise BadValue if the settings contradict one another."""

    @classmethod
    def dotted(cls, key: str) -> str:
        return f"{cls.__name__.lower()}.{key}"

    def written(self, key: str) -> str:
        """`key = value` as TOML."""
        write = self.keys[key].write or literal
        return f"{key} = {write(getattr(self, key))}"

    @classmethod
    def default_of(cls, key: str) -> object:
        (field,) = (each for each in msgspec.structs.fields(cls) if each.name == key)
        return {} if field.default is msgspec.NODEFAULT else field.default

    def ordered(self, low: str, high: str) -> None:
        """Refuse a low mark above the high one."""
        below, above = getattr(self, low), getattr(self, high)
        if below > above:
            raise BadValue(
                self.dotted(low), below, f"above {self.dotted(high)} = {above}; set both"
            )


# Readers ------------------------------------------------------------------------------------------


def size(given: object) -> Size:
    """Bytes, or a float fraction of a whole."""
    return units.parse_size(given)  # type: ignore[arg-type]  # it refuses what is no size


def at_least(least: int, unit: str = "one page") -> Reader:
    """A size that is not 0 and, in bytes, not under `least`."""

    def read(given: object) -> Size:
        value = size(given)
        if value == 0 or (isinstance(value, int) and value < least):
            raise ValueError(
                f"less than {unit} ({units.format_exactly(least)}); write '40GiB', or '50%'"
            )
        return value

    return read


def page(given: object) -> int | str:
    """Bytes of a page, a multiple of 4 KiB, or "auto"."""
    if given == "auto":
        return "auto"
    value = _whole_bytes(given)
    if value == 0 or value % 4096:
        raise ValueError("a page is a multiple of 4KiB above 0, or 'auto'")
    return value


def rate(given: object) -> int:
    """Bytes per second, above 0."""
    if isinstance(given, bool) or not isinstance(given, str | int):
        raise ValueError("is not a rate; write it per second, such as '400MiB/s'")
    value = units.parse_rate(given)
    if value == 0:
        raise ValueError("would never write; write 'off' for no limit, or nvme.mode = 'off'")
    return value


def mark(given: object) -> float:
    """A part of a tier, above 0 and up to 1."""
    value = units.parse_size(given) if isinstance(given, str) else given
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:
        raise ValueError("a mark is a part of the tier: above 0, up to 1")
    return float(value)


def positive(given: object) -> float:
    """A number above 0."""
    try:
        value = float(given) if not isinstance(given, bool) else -1.0  # type: ignore[arg-type]
    except (TypeError, ValueError):
        value = -1.0
    if not 0 < value < float("inf"):
        raise ValueError("must be a number above 0")
    return value


def seconds(given: object) -> float:
    """A time of 0 or more."""
    return 0.0 if given in (0, "0") and not isinstance(given, bool) else positive(given)


def port(given: object) -> int:
    """A TCP port."""
    value = int(given) if isinstance(given, str) and given.isdecimal() else given
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 65536:
        raise ValueError("a port is within 1 to 65535; 'off' for none")
    return value


def flag(given: object) -> bool:
    """true or false."""
    value = {"true": True, "false": False}.get(given.lower()) if isinstance(given, str) else given
    if not isinstance(value, bool):
        raise ValueError("must be true or false")
    return value


def path(given: object) -> Path:
    """A path; ~ is the home directory."""
    if not isinstance(given, str | Path) or not str(given).strip() or "\0" in str(given):
        raise ValueError("must be a path")
    return Path(given).expanduser()


def choice(*names: str) -> Reader:
    """One of these words."""

    def read(given: object) -> str:
        if given not in names or not isinstance(given, str):
            near = get_close_matches(str(given), names, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"must be one of {', '.join(names)}{hint}")
        return given

    return read


def text(pattern: str, example: str) -> Reader:
    """Text that matches `pattern` as a whole."""

    def read(given: object) -> str:
        if not isinstance(given, str) or not re.fullmatch(pattern, given):
            raise ValueError(f"must be such as {example}")
        return given

    return read


def arguments(given: object) -> Mapping[str, object]:
    """Named arguments, each a number, text or flag."""
    plain = isinstance(given, Mapping) and all(
        isinstance(name, str)
        and name.isidentifier()
        and isinstance(value, bool | int | float | str)
        for name, value in given.items()
    )
    if not isinstance(given, Mapping) or not plain:
        raise ValueError("must be a table of numbers, text and flags, such as { decay = 0.5 }")
    return dict(given)


def texts(pattern: str, example: str) -> Reader:
    """Texts that match `pattern` each: an array, or one text with commas outside parentheses."""
    one = text(pattern, example)

    def read(given: object) -> tuple[str, ...]:
        if isinstance(given, str):
            given = [part.strip() for part in re.split(r",(?![^()]*\))", given) if part.strip()]
        if not isinstance(given, list | tuple):
            raise ValueError(f"must be an array such as [{example}]")
        return tuple(str(one(part)) for part in given)

    return read


def optional(read: Reader, word: str = "off") -> Reader:
    """None where nothing or `word` was given, else what `read` makes of it."""
    return lambda given: None if given is None or given == word else read(given)


def _whole_bytes(given: object) -> int:
    value = size(given)
    if isinstance(value, float):
        raise ValueError("is a fraction; a number of bytes is needed, such as '2MiB'")
    return value


# Text ---------------------------------------------------------------------------------------------


def literal(value: object) -> str:
    """A value as TOML would have it."""
    if value is None:
        return '"off"'
    if isinstance(value, str | Path):
        return json.dumps(str(value), ensure_ascii=False)
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return f"[{', '.join(map(literal, value))}]"
    if isinstance(value, Mapping):
        inner = ", ".join(f"{name} = {literal(each)}" for name, each in value.items())
        return f"{{ {inner} }}" if inner else "{}"
    return str(value)


def sized(value: object) -> str:
    """A size as TOML: "40GiB", "25%"."""
    return literal(units.format_exactly(value) if isinstance(value, int | float) else value)


def rated(value: object) -> str:
    """A rate as TOML: "400MiB/s"."""
    return literal(f"{units.format_exactly(value)}/s" if isinstance(value, int) else value)


def nearest(key: str, known: Iterable[str]) -> str:
    """ "; did you mean ...?" with the closest known dotted key, or nothing."""
    known = tuple(known)
    leaf = key.rpartition(".")[2]
    same_leaf = [name for name in known if name.rpartition(".")[2] == leaf]
    near = get_close_matches(key, known, n=1, cutoff=0.7) or same_leaf
    near = near or get_close_matches(key, known, n=1, cutoff=0.5)
    return f"; did you mean {near[0]}?" if near else ""


_HEADER = re.compile(r"\s*\[+\s*([^\]#]+?)\s*\]+\s*(?:#.*)?")
_ENTRY = re.compile(r"\s*([A-Za-z0-9_.\-\"' ]+?)\s*=")


def find_lines(toml: str) -> Mapping[str, int]:
    """Line number (from 1) of each dotted key and each section of a TOML text."""
    lines: dict[str, int] = {}
    section = ""
    for number, line in enumerate(toml.splitlines(), start=1):
        if header := _HEADER.fullmatch(line):
            section = _bare(header[1])
            lines.setdefault(section, number)
        elif entry := _ENTRY.match(line):
            name = _bare(entry[1])
            lines.setdefault(f"{section}.{name}" if section else name, number)
    return lines


def _bare(name: str) -> str:
    return ".".join(part.strip(" \"'") for part in name.split("."))
