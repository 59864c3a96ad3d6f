"""Runs PTX text on a processor: the few instructions that our kernels without branches use.

One block at a time, a numpy array over its threads for each register. Memory is this process's: a
kernel reads and writes at the addresses that it is given. An instruction that is not known here is
an error, so a kernel that runs is understood whole; whether a driver accepts it, a GPU says.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

Lanes = npt.NDArray[np.uint64]

_WORD = np.uint64(0xFFFF_FFFF)
_32 = np.uint64(32)


def _high(a: Lanes, b: Lanes) -> Lanes:
    """Upper halves of the 128-bit products."""
    low_a, high_a, low_b, high_b = a & _WORD, a >> _32, b & _WORD, b >> _32
    middle = (low_a * low_b >> _32) + (high_a * low_b & _WORD) + low_a * high_b
    high: Lanes = high_a * high_b + (high_a * low_b >> _32) + (middle >> _32)
    return high


def _select(a: Lanes, b: Lanes, which: Lanes) -> Lanes:
    chosen: Lanes = np.where(which != 0, a, b)
    return chosen


def _narrow(fn: Callable[..., Lanes]) -> Callable[..., Lanes]:
    return lambda *given: fn(*given) & _WORD


_PLAIN: dict[str, Callable[..., Lanes]] = {
    "mov.u32": lambda a: a,
    "mov.u64": lambda a: a,
    "cvt.u32.u64": lambda a: a & _WORD,
    "and.b32": lambda a, b: a & b,
    "and.pred": lambda a, b: a & b,
    "xor.b64": lambda a, b: a ^ b,
    "add.u64": lambda a, b: a + b,
    "sub.u32": _narrow(lambda a, b: a - b),
    "min.u32": np.minimum,
    "shr.u32": lambda a, b: a >> b,
    "shr.u64": lambda a, b: a >> b,
    "mul.lo.u64": lambda a, b: a * b,
    "mul.hi.u64": _high,
    "mul.wide.u32": lambda a, b: a * b,
    "mad.lo.u32": _narrow(lambda a, b, c: a * b + c),
    "setp.lt.u32": lambda a, b: (a < b).astype(np.uint64),
    "setp.eq.u32": lambda a, b: (a == b).astype(np.uint64),
    "selp.b64": _select,
}


@dataclass
class Kernel:
    """One entry of a PTX text."""

    params: list[str]
    body: list[str]
    arrays: dict[str, npt.NDArray[np.uint64]] = field(default_factory=dict)

    def __call__(self, grid: tuple[int, int], threads: int, *args: int) -> None:
        """Run all blocks; parameters are 64-bit."""
        given = dict(zip(self.params, args, strict=True))
        for y in range(grid[1]):
            for x in range(grid[0]):
                _Block(self, given, (x, y), threads).run()


class _Block:
    def __init__(
        self, kernel: Kernel, given: dict[str, int], at: tuple[int, int], threads: int
    ) -> None:
        self.kernel, self.given, self.threads = kernel, given, threads
        self.registers: dict[str, Lanes] = {
            "%ctaid.x": self._all(at[0]),
            "%ctaid.y": self._all(at[1]),
            "%tid.x": np.arange(threads, dtype=np.uint64),
        }

    def run(self) -> None:
        with np.errstate(over="ignore"):
            for line in self.kernel.body:
                self._step(line)

    def _step(self, line: str) -> None:
        if line == "ret":
            return
        mask = np.ones(self.threads, np.bool_)
        if line.startswith("@"):
            guard, line = line[1:].split(maxsplit=1)
            mask = self.registers[guard] != 0
        op, rest = line.split(maxsplit=1)
        operands = [o.strip() for o in re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+", rest)]
        match op:
            case "ld.param.u64":
                self.registers[operands[0]] = self._all(self.given[operands[1][1:-1]])
            case "ld.global.u64":
                self.registers[operands[0]] = self._read(self._address(operands[1]))
            case "ld.global.v2.u64":
                at = self._address(operands[1])
                assert not (at % np.uint64(16)).any(), "a misaligned vector load"
                for i, name in enumerate(_names(operands[0])):
                    self.registers[name] = self._read(at + np.uint64(8 * i))
            case "st.global.u64":
                values = self._value(operands[1])
                for at, value in zip(self._address(operands[0])[mask], values[mask], strict=True):
                    ctypes.c_uint64.from_address(int(at)).value = int(value)
            case "mov.b64" if operands[0].startswith("{"):
                low, high = _names(operands[0])
                value = self._value(operands[1])
                self.registers[low], self.registers[high] = value & _WORD, value >> _32
            case "mov.b64":
                halves = [self._value(name) for name in _names(operands[1])]
                self.registers[operands[0]] = halves[0] | halves[1] << _32
            case "shfl.sync.bfly.b32":
                out, value, distance, clamp, members = operands
                assert (clamp, members) == ("0x1f", "0xffffffff")
                lanes = np.arange(self.threads) ^ int(distance)
                self.registers[out] = self._value(value)[lanes]
            case _:
                self.registers[operands[0]] = _PLAIN[op](*map(self._value, operands[1:]))

    def _all(self, value: int) -> Lanes:
        return np.full(self.threads, value, np.uint64)

    def _value(self, operand: str) -> Lanes:
        if operand.startswith("%"):
            return self.registers[operand]
        if operand in self.kernel.arrays:
            return self._all(self.kernel.arrays[operand].ctypes.data)
        return self._all(int(operand, 0))

    def _address(self, operand: str) -> Lanes:
        base, _, offset = operand[1:-1].partition("+")
        return self._value(base) + np.uint64(int(offset or 0))

    def _read(self, addresses: Lanes) -> Lanes:
        found = [ctypes.c_uint64.from_address(at).value for at in addresses.tolist()]
        return np.array(found, np.uint64)


def _names(group: str) -> list[str]:
    return [name.strip() for name in group[1:-1].split(",")]


def entry(text: str, name: str) -> Kernel:
    """The kernel of that name; labels, branches and local memory are refused."""
    found = re.search(rf"\.visible \.entry {name}\((.*?)\)\s*\{{(.*?)\n\}}", text, re.DOTALL)
    assert found is not None, f"no entry {name}"
    params = re.findall(r"\.param \.u64 (\w+)", found[1])
    lines = [line.strip() for line in found[2].split(";")]
    body = [line for line in lines if line and not line.startswith(".reg")]
    assert not any(line.endswith(":") or "bra" in line for line in body)
    arrays = {
        name: np.array([int(word) for word in words.split(",")], np.uint64)
        for name, words in re.findall(r"\.global \.align 16 \.u64 (\w+)\[\d+\] = \{(.*?)\}", text)
    }
    return Kernel(params, body, arrays)
