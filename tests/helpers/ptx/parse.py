"""PTX text to kernels: parameters, registers, shared memory, and instructions in basic blocks."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass, field
from pathlib import PurePath

SIZES = {"pred": 1, "f16x2": 4, "bf16": 2, "bf16x2": 4, "tf32": 4} | {
    f"{kind}{bits}": bits // 8 for kind in "busf" for bits in (8, 16, 32, 64)
}
"""Bytes of each type."""
# What a thread may be alone at, or wait at: the next instruction begins a block.
_ENDS = ("bra", "ret", "bar")


def listed(operand: str) -> list[str]:
    """Names within braces, or the only one."""
    return [x.strip() for x in operand.strip("{} ").split(",")]


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
    params: dict[str, int] = field(default_factory=dict)  # offsets
    registers: dict[str, str] = field(default_factory=dict)  # types, by name
    symbols: dict[str, int] = field(default_factory=dict)  # addresses in shared or local memory
    shared: int = 0  # bytes of the arrays whose size is known
    local: int = 0
    blocks: list[list[Instruction]] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)


@functools.lru_cache(64)
def parse(text: str, name: str) -> Kernel:
    """A kernel of a PTX module."""
    files = {number: PurePath(path).name for number, path in re.findall(r'\.file\s+(\d+)\s+"([^"]+)"', text)}
    params, body = re.search(rf"\.entry\s+{re.escape(name)}\s*\((.*?)\)(.*?)(?=\.entry|\Z)", text, re.DOTALL).groups()
    kernel, at = Kernel(name), 0
    pattern = r"\.param\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+(?:\.ptr\s[^,]*?\s)?([\w$]+)(?:\[(\d+)\])?(?=\s*(?:,|$))"
    for align, kind, param, count in re.findall(pattern, params.strip()):
        kernel.params[param] = at + -at % int(align or SIZES[kind])
        at = kernel.params[param] + SIZES[kind] * int(count or 1)
    for declared in (text.partition(".entry")[0], body):
        _declare(kernel, declared)
    _fill(kernel, body, files)
    return kernel


def _declare(kernel, text):
    """Arrays in shared and local memory, of a module or a kernel."""
    pattern = r"\.(shared|local)\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+([\w$]+)(\[\d*\])?\s*;"
    for space, align, kind, name, count in re.findall(pattern, text):
        at = getattr(kernel, space)
        at += -at % int(align or SIZES[kind])
        kernel.symbols[name] = at
        setattr(kernel, space, at + SIZES[kind] * int(count.strip("[]") or not count))


def _fill(kernel, body, files):
    """Instructions and registers of a kernel's body."""
    block = []
    where = statement = ""
    for raw in body.partition("{")[2].splitlines():
        line = raw.partition("//")[0].strip()
        if line.startswith((".section", ".file")):  # debugging information follows
            break
        if found := re.match(r"\.loc\s+(\d+)\s+(\d+)", line):
            where = f"{files.get(found[1], '?')}:{found[2]}"
            continue
        if found := re.match(r"([$\w]+):\s*(.*)", line):
            if block:
                kernel.blocks.append(block)
                block = []
            kernel.labels[found[1]] = len(kernel.blocks)
            line = found[2]
        statement += " " + line
        *complete, statement = statement.split(";")
        for text in complete:
            text = " ".join(text.lstrip(" {}\t").split())
            if text.startswith(".reg"):
                _registers(kernel, text)
            elif text and not text.startswith("."):
                block.append(_instruction(text, where))
                if block[-1].opcode[0] in _ENDS:
                    kernel.blocks.append(block)
                    block = []
    if block:
        kernel.blocks.append(block)


def _registers(kernel, text):
    _, kind, names = text.split(maxsplit=2)
    for name in names.replace(" ", "").split(","):
        if found := re.match(r"(.*)<(\d+)>", name):
            kernel.registers.update((f"{found[1]}{i}", kind[1:]) for i in range(int(found[2])))
        else:
            kernel.registers[name] = kind[1:]


def _instruction(text, where):
    negated, guard, opcode, operands = re.match(r"(?:@(!?)(%\w+)\s+)?([\w.:]+)\s*(.*)", text).groups()
    parts = (part.strip() for part in re.split(r",(?![^{\[]*[}\]])", operands))
    return Instruction(text, tuple(opcode.split(".")), guard or "", negated == "!", tuple(filter(None, parts)), where)
