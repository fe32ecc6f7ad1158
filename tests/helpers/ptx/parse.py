"""PTX text to kernels: parameters, registers, shared memory, and instructions in basic blocks."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass, field
from pathlib import PurePath

from tests.helpers.ptx.arithmetic import DTYPES

# What a thread may be alone at, or wait at: the next instruction begins a block.
_ENDS = ("bra", "ret", "bar")


@dataclass(frozen=True)
class Instruction:
    text: str
    opcode: tuple[str, ...]  # split at its dots
    guard: str  # register of the predicate, or ""
    negated: bool
    operands: tuple[str, ...]
    where: str  # file and line of the kernel's source

    def __str__(self):
        return f"`{self.text}`" + (f" ({self.where})" if self.where else "")


@dataclass(eq=False)
class Kernel:
    name: str
    registers: dict[str, str] = field(default_factory=dict)  # types, by name
    symbols: dict[str, int] = field(default_factory=dict)  # addresses of parameters and in shared and local memory
    params: tuple[int, ...] = ()  # addresses of the parameters, in order
    arrays: dict[str, int] = field(default_factory=lambda: {"shared": 0, "local": 0})  # bytes of those of known size
    blocks: list[list[Instruction]] = field(default_factory=lambda: [[]])
    labels: dict[str, int] = field(default_factory=dict)


@functools.lru_cache(64)
def parse(text: str, name: str) -> Kernel:
    """A kernel of a PTX module."""
    files = {number: PurePath(path).name for number, path in re.findall(r'\.file\s+(\d+)\s+"([^"]+)"', text)}
    params, body = re.search(rf"\.entry\s+{re.escape(name)}\s*\((.*?)\)(.*?)(?=\.entry|\Z)", text, re.DOTALL).groups()
    kernel, end = Kernel(name), 0
    pattern = r"\.param\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+(?:\.ptr\s[^,]*?\s)?([\w$]+)(?:\[(\d+)\])?(?=\s*(?:,|$))"
    for align, kind, param, count in re.findall(pattern, params.strip()):
        kernel.symbols[param], end = _place(end, align, kind, count or 1)
    kernel.params = tuple(kernel.symbols.values())
    arrays = r"\.(shared|local)\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+([\w$]+)(?:\[(\d*)\])?\s*;"
    for space, align, kind, symbol, count in re.findall(arrays, text.partition(".entry")[0] + body):
        kernel.symbols[symbol], kernel.arrays[space] = _place(kernel.arrays[space], align, kind, count or 0)
    _fill(kernel, body, files)
    return kernel


def _place(end, align, kind, count):
    """Where `count` numbers begin and end that follow what ends at `end`."""
    size = DTYPES[kind].itemsize
    at = end + -end % int(align or size)
    return at, at + size * int(count)


def _fill(kernel, body, files):
    """Instructions and registers of a kernel's body."""
    where = statement = ""
    for raw in body.partition("{")[2].splitlines():
        line = raw.partition("//")[0].strip()
        if line.startswith((".section", ".file")):  # debugging information follows
            break
        if found := re.match(r"\.loc\s+(\d+)\s+(\d+)", line):
            where = f"{files.get(found[1], '?')}:{found[2]}"
            continue
        if found := re.match(r"([$\w]+):\s*(.*)", line):
            if kernel.blocks[-1]:
                kernel.blocks.append([])
            kernel.labels[found[1]] = len(kernel.blocks) - 1
            line = found[2]
        *complete, statement = f"{statement} {line}".split(";")
        for text in complete:
            text = " ".join(text.lstrip(" {}\t").split())
            if text.startswith(".reg"):
                _registers(kernel, text)
            elif text and not text.startswith("."):
                kernel.blocks[-1].append(_instruction(text, where))
                if kernel.blocks[-1][-1].opcode[0] in _ENDS:
                    kernel.blocks.append([])


def _registers(kernel, text):
    _, kind, names = text.split(maxsplit=2)
    for name, count in re.findall(r"([%\w]+)(?:<(\d+)>)?", names):
        numbers = range(int(count)) if count else [""]
        kernel.registers |= {f"{name}{i}": kind[1:] for i in numbers}


def _instruction(text, where):
    negated, guard, opcode, operands = re.match(r"(?:@(!?)(%\w+)\s+)?([\w.:]+)\s*(.*)", text).groups()
    parts = (part.strip() for part in re.split(r",(?![^{\[]*[}\]])", operands))
    return Instruction(text, tuple(opcode.split(".")), guard or "", negated == "!", tuple(filter(None, parts)), where)
