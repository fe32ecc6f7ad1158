"""PTX text to kernels: parameters, registers, shared memory, and instructions in basic blocks."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass, field
from pathlib import PurePath

from tests.helpers.ptx.arithmetic import BITS, DTYPES

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
    registers: dict = field(default_factory=dict)  # types of their bits, by name
    symbols: dict[str, int] = field(default_factory=dict)  # addresses within their spaces
    params: tuple[int, ...] = ()  # addresses of the parameters, in order
    sizes: dict[str, int] = field(default_factory=lambda: {"param": 0, "shared": 0, "local": 0})  # of spaces, in bytes
    blocks: list[list[Instruction]] = field(default_factory=lambda: [[]])
    labels: dict[str, int] = field(default_factory=dict)


@functools.lru_cache(64)
def parse(text: str, name: str) -> Kernel:
    """A kernel of a PTX module."""
    files = {number: PurePath(path).name for number, path in re.findall(r'\.file\s+(\d+)\s+"([^"]+)"', text)}
    params, body = re.search(rf"\.entry\s+{re.escape(name)}\s*\((.*?)\)(.*?)(?=\.entry|\Z)", text, re.DOTALL).groups()
    kernel = Kernel(name)
    pattern = r"\.param\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+(?:\.ptr\s[^,]*?\s)?([\w$]+)(?:\[(\d+)\])?(?=\s*(?:,|$))"
    for align, kind, param, count in re.findall(pattern, params.strip()):
        _place(kernel, "param", align, kind, param, count or 1)
    kernel.params = tuple(kernel.symbols.values())
    pattern = r"\.(shared|local)\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+([\w$]+)(\[\d*\])?\s*;"
    arrays = [x for x in re.findall(pattern, text.partition(".entry")[0] + body) if x[3] in body]
    for *which, count in sorted(arrays, key=lambda x: x[-1] == "[]"):  # one of any size is behind the others
        _place(kernel, *which, (count or "[1]").strip("[]") or 0)
    _fill(kernel, body, files)
    return kernel


def _place(kernel, space, align, kind, symbol, count):
    """Put `count` numbers behind what is in a space."""
    size, end = DTYPES[kind].itemsize, kernel.sizes[space]
    kernel.symbols[symbol] = end + -end % int(align or size)
    kernel.sizes[space] = kernel.symbols[symbol] + size * int(count)


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
        kernel.registers |= {f"{name}{i}": BITS[kind[1:]] for i in numbers}


def _instruction(text, where):
    negated, guard, opcode, operands = re.match(r"(?:@(!?)(%\w+)\s+)?([\w.:]+)\s*(.*)", text).groups()
    parts = (part.strip() for part in re.split(r",(?![^{\[]*[}\]])", operands))
    return Instruction(text, tuple(opcode.split(".")), guard or "", negated == "!", tuple(filter(None, parts)), where)
