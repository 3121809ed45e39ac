"""The fenced blocks of README.md and docs, and the commands in them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
_FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```", re.DOTALL | re.MULTILINE)


class Block(NamedTuple):
    """A fenced block: its page (relative to the project), language and text."""

    page: str
    language: str
    text: str


def blocks(*languages: str) -> list[Block]:
    """Return the blocks of all pages in ``languages``, or in any."""
    found = [
        Block(str(page.relative_to(ROOT)), *match.groups())
        for page in PAGES
        for match in _FENCE.finditer(page.read_text(encoding="utf-8"))
    ]
    return [block for block in found if not languages or block.language in languages]


def commands(block: Block) -> Iterator[list[str]]:
    """Yield the words of every command of a console ``block``."""
    text = block.text.replace("\\\n", " ")
    for line in text.splitlines():
        if line.startswith("$ "):
            words = shlex.split(line[2:], comments=True)
            while "&&" in words:
                cut = words.index("&&")
                yield words[:cut]
                words = words[cut + 1 :]
            yield words
