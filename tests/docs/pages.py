"""README.md and docs/*.md, and the code that they show.

A block ```` ```python ```` runs by itself; ```` ```python continues ```` goes on where the page's block before it
ended; ```` ```python file=NAME ```` is also a file that the page's later commands name.
"""

import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


class Block(NamedTuple):
    page: Path
    line: int
    info: str
    code: str

    @property
    def file(self):
        """The name of the file that it is, or None."""
        return self.info.partition("file=")[2] or None

    def __str__(self):
        return f"{self.page.name}:{self.line}"


def blocks(page, language):
    """Fenced blocks of a page in a language; "" for those without one."""
    text = page.read_text()
    for match in re.finditer(r"^```([^\n]*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        if match[1].partition(" ")[0] == language:
            yield Block(page, text.count("\n", 0, match.start()) + 1, match[1], match[2])


def commands(page):
    """Commands that a page shows, in blocks and in running text, without what stands for options as [such]."""
    shown = "".join(block.code for block in blocks(page, "")).replace("\\\n", " ").splitlines()
    running = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for line in (*shown, *re.findall(r"`([^`\n]+)`", running)):
        line = re.sub(r"\[.*?\]|\s#.*", "", line).strip()
        if re.match(r"python -m |make |torchrun .*-m ", line):
            yield " ".join(line.split())


def write_files(page, folder):
    """Write the files that a page shows."""
    for block in blocks(page, "python"):
        if block.file:
            (folder / block.file).write_text(block.code)
