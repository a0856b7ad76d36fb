"""Write docs/comparison.md from tools/comparison.yaml, and check every cell against the files of the compared tools.

    python tools/comparison.py                    writes the page
    python tools/comparison.py --sources DIR      also checks the tools' files; fails if one differs

The head of tools/comparison.yaml describes the format of a cell.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "tools" / "comparison.yaml"
PAGE = ROOT / "docs" / "comparison.md"
TEXTS = (".py", ".md", ".mdx", ".rst", ".yaml", ".yml", ".qmd", ".sh", ".toml", ".json", ".jinja")
LARGEST = 3_000_000  # maximum size of a file in bytes
_CELL = re.compile(r"(?P<file>[^ ]+)(?: @ (?P<text>[^~!]+?))?(?: (?P<kind>[~!]) (?P<remark>.+))?")


@dataclass(frozen=True)
class Cell:
    """A cell of the table. verdict: yes, part or - (not found). file: where it was read, or empty for all files."""

    verdict: str
    file: str
    text: str
    remark: str

    @staticmethod
    def read(text: str) -> Cell:
        if text == "none":
            return Cell("-", "", "", "")
        match = _CELL.fullmatch(text)
        assert match, text
        verdict = {None: "yes", "~": "part", "!": "-"}[match["kind"]]
        return Cell(verdict, match["file"], (match["text"] or "").strip(), match["remark"] or "")


def load() -> dict[str, Any]:
    return dict(yaml.safe_load(DATA.read_text(encoding="utf-8")))


def page(data: dict[str, Any]) -> str:
    """Return the whole page."""
    tools = data["tools"]
    rows = sum(len(topic["rows"]) for topic in data["topics"])
    lines = [data["head"].replace("{rows}", str(rows)).strip(), ""]
    lines += ["| tool | version | wheel or commit that was read |", "|---|---|---|"]
    lines += [f"| {tool['name']} | {tool['version']} | {source(tool)} |" for tool in tools.values()]
    for topic in data["topics"]:
        lines += ["", f"## {topic['name']}", ""]
        lines += ["| | strop | " + " | ".join(one["name"] for one in tools.values()) + " |"]
        lines += ["|---" * (2 + len(tools)) + "|"]
        for row in topic["rows"]:
            cells = [Cell.read(row[tool]).verdict for tool in tools]
            lines.append(f"| {row['what']} | {ours(row)} | " + " | ".join(cells) + " |")
        lines += ["", "<details><summary>Where each of these was read</summary>", ""]
        for row in topic["rows"]:
            lines.append(f"- *{row['what'].replace('*', '')}*: " + "; ".join(list_cells(row, tools)) + ".")
        lines += ["", "</details>"]
    return "\n".join(lines) + "\n"


def source(tool: dict[str, Any]) -> str:
    """Return what was read of a tool: the names of its wheels, or a commit and its date."""
    if "wheels" in tool:
        return ", ".join(f"`{name}`" for name in tool["wheels"])
    return f"commit `{tool['commit']}` of {tool['date']}"


def ours(row: dict[str, Any]) -> str:
    verdict, test, *_ = row["ours"]
    word = {"yes": "yes", "part": "part", "no": "-"}[verdict]
    return f"[{word}](../{test})" if test else word


def list_cells(row: dict[str, Any], tools: dict[str, Any]) -> Iterator[str]:
    """Yield the file and the text of each cell. Tools whose files do not contain the row's pattern come last."""
    if remark := "".join(row["ours"][2:]):
        yield f"strop: {remark}"
    missing = []
    for name, tool in tools.items():
        cell = Cell.read(row[name])
        if not cell.file:
            missing.append(tool["name"])
            continue
        remark = f" ({cell.remark})" if cell.remark else ""
        yield f"{tool['name']} {'not found in ' if cell.verdict == '-' else ''}`{cell.file}`{remark}"
    if missing:
        pattern = row["look"].replace("|", "&#124;").replace("<", "&lt;")
        yield f"not found in any file of {', '.join(missing)} (looked for <code>{pattern}</code>)"


def faults(data: dict[str, Any], sources: Path) -> Iterator[str]:
    """Yield cells that the tools' files do not support."""
    for name, tool in data["tools"].items():
        folder = sources / tool["folder"]
        texts = dict(files(folder, tool["read"]))
        for topic in data["topics"]:
            for row in topic["rows"]:
                cell, look = Cell.read(row[name]), re.compile(row["look"], re.IGNORECASE)
                where = f"{tool['name']}: {row['what']}"
                if not cell.file:
                    result = [file for file, text in texts.items() if look.search(text)]
                    if result:
                        yield f"{where}: marked as not found, but is in {result[:4]}"
                elif not (folder / cell.file).is_file():
                    yield f"{where}: no file {cell.file}"
                elif cell.verdict != "-":
                    text = (folder / cell.file).read_text(encoding="utf-8", errors="replace")
                    there = cell.text.lower() in text.lower() if cell.text else look.search(text)
                    if not there:
                        yield f"{where}: {cell.file} does not hold {cell.text or row['look']}"


def files(folder: Path, read: list[str]) -> Iterator[tuple[str, str]]:
    """Yield (path, text) of the files to search: source, docs and examples, without tests."""
    for part in read:
        for file in [folder / part] if (folder / part).is_file() else sorted((folder / part).rglob("*")):
            named = file.suffix in TEXTS or file.name == "METADATA" or "Dockerfile" in file.name
            if file.is_file() and named and "tests" not in file.parts and file.stat().st_size < LARGEST:
                yield str(file.relative_to(folder)), file.read_text(encoding="utf-8", errors="replace")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sources", type=Path)
    args = parser.parse_args()
    data = load()
    wrong = list(faults(data, args.sources)) if args.sources else []
    for line in wrong:
        print(line, file=sys.stderr)
    PAGE.write_text(page(data), encoding="utf-8")
    print(PAGE.relative_to(ROOT))
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
