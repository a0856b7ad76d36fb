"""Parse the pages of the docs: blocks, commands, links and headings."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests import ROOT

PAGES = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")))
SHELL = ("", "sh", "bash", "console")
_FENCE = re.compile(r"^```(.*?)\n(.*?)^```", re.M | re.S)


@dataclass(frozen=True)
class Block:
    """A block of a page. language: the first word after the fence, empty if indented. marks: the other words."""

    page: Path
    line: int
    language: str
    marks: tuple[str, ...]
    text: str

    def __str__(self) -> str:
        return f"{self.page.name}:{self.line}"

    @property
    def commands(self) -> list[list[str]]:
        """The commands as words, if this is a shell block."""
        return list(commands(self.text)) if self.language in SHELL else []


def blocks(page: Path) -> list[Block]:
    """Return fenced and indented blocks, in order."""
    text = page.read_text(encoding="utf-8")
    results = []
    for match in _FENCE.finditer(text):
        words = match[1].split()
        line = text.count("\n", 0, match.start()) + 1
        results.append(Block(page, line, words[0] if words else "", tuple(words[1:]), match[2]))
    bare = _FENCE.sub(lambda match: "\n" * match[0].count("\n"), text)
    lines = bare.split("\n")
    number = 0
    while number < len(lines):
        starts = lines[number].startswith("    ") and lines[number].strip() and not lines[number - 1].strip()
        if not starts or _in_list(lines, number):
            number += 1
            continue
        begin = number
        while number < len(lines) and (lines[number].startswith("    ") or not lines[number].strip()):
            number += 1
        body = "\n".join(line[4:] for line in lines[begin:number]).strip("\n") + "\n"
        results.append(Block(page, begin + 1, "", (), body))
    return sorted(results, key=lambda block: block.line)


def _in_list(lines: list[str], number: int) -> bool:
    """Return whether an indented line continues an item of a list."""
    before = [line for line in lines[:number] if line.strip()]
    return bool(before) and before[-1].lstrip().startswith(("- ", "* ", "1. "))


def commands(text: str) -> Iterator[list[str]]:
    """Yield the commands of a shell block as words, without comments, prompts and environment settings."""
    joined = re.sub(r"\\\n\s*", " ", text)
    for line in re.sub(r"(?m)(^|\s)#.*$", "", joined).splitlines():
        for part in re.split(r"\s(?:&&|\|)\s|;\s", line.removeprefix("$ ")):
            try:
                words = shlex.split(part, comments=True)
            except ValueError:
                raise AssertionError(f"no shell: {part}") from None
            while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                words = words[1:]
            if words:
                yield words


def inline(page: Path) -> list[str]:
    """Return texts between single backticks outside of blocks."""
    text = re.sub(r"^    .*$", "", _FENCE.sub("", page.read_text(encoding="utf-8")), flags=re.M)
    return re.findall(r"`([^`\n]+)`", text)


def links(page: Path) -> list[tuple[str, str]]:
    """Return (file, anchor) of each link within the repository; files are relative to the page."""
    text = _FENCE.sub("", page.read_text(encoding="utf-8"))
    result = re.findall(r"\]\(([^)\s]+)\)", text)
    return [(name, anchor) for name, _, anchor in (link.partition("#") for link in result) if "://" not in name]


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings as GitHub generates them, and those that the page sets."""
    text = _FENCE.sub("", page.read_text(encoding="utf-8"))
    anchors_ = set(re.findall(r'<a id="([\w.-]+)">', text))
    for heading in re.findall(r"^#+ (.*)$", text, re.M):
        slug = re.sub(r"[^\w\- ]", "", heading.replace("`", "").lower().strip())
        anchors_.add(slug.replace(" ", "-"))
    return anchors_
