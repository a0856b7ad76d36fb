"""Hooks of `make site`: adapt pages that are written for GitHub to the site.

The first page is the repository's README, and the command reference is generated from the command line. Links to files
outside of docs/ become text. Words after a block's language are marks for the tests and are removed.
"""

from __future__ import annotations

import html
import itertools
import json
import re
import sys
from pathlib import Path
from textwrap import dedent
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mkdocs.structure.files import Files

ROOT = Path(__file__).resolve().parents[2]
# pages that answer a search best, and pages that name everything
BOOSTS = {
    "troubleshooting.md": 4,
    "recipe.md": 3,
    "classify.md": 0.5,
    "howto.md": 2,
    "models.md": 0.3,
    "base_models.md": 0.3,
    "comparison.md": 0.2,
    "api.md": 0.5,
    "hunting.md": 0.2,
    "release.md": 0.2,
    "design.md": 0.2,
    "extend.md": 0.5,
    "contributing.md": 0.2,
    "measured.md": 0.3,
}
# pages whose tables are not searched: they match every search, or (the recipe) have an entry for each row
TABLES_NOT_SEARCHED = ("comparison.md", "recipe.md")
TITLES = {"index.md": "Fine-tune language models on your own computer"}  # of the browser's tab
LONG = 60  # characters: a table of few columns with a longer cell is shown as a list on a narrow screen
_MARKS = re.compile(r"^(```\w+) [^\n]+$", re.M)
_INDENTED = re.compile(r"^(\S[^\n]*?):\n((?:  .*\n)+)", re.M)
_TABLE = re.compile(r"<table>.*?</table>", re.S)
_CELL = re.compile(r"<(t[hd])\b([^>]*)>(.*?)</\1>", re.S)
_OPTION = re.compile(r'<td[^>]*><a id="([\w.]+)"></a>(.*?)</td>.*?<td[^>]*>.*?</td>.*?<td[^>]*>(.*?)</td>', re.S)
_IMAGE = re.compile(r'<img [^>]*?src="([\w/.-]+)\.png"[^>]*>')
_LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(((?!https?://|#)[^)\s]+)\)")


def command_reference() -> str:
    """Return a Markdown page of all commands, as Typer writes it. The options of a recipe are named once, as a link."""
    sys.path.insert(0, str(ROOT / "src"))
    import typer.main
    from typer.cli import get_docs_for_click

    from strop.cli.app import COMMANDS, build
    from strop.config.names import SHORT_FORMS
    from strop.config.schema import option_fields

    command = typer.main.get_command(build([*COMMANDS]))
    context = command.make_context("strop", [], resilient_parsing=True)
    page = get_docs_for_click(obj=command, ctx=context, name="strop", title="Commands")
    options = "|".join(re.escape(name) for name, _ in option_fields())
    short = ", ".join(f"`--{name}`" for name in SHORT_FORMS)
    link = f"* The options of a [recipe](recipe.md), such as {short}.\n"
    page = re.sub(rf"(?:^\* `--(?:{options}) .*\n){{9,}}", link, page, flags=re.M)
    page = re.sub(r"^ +$|\x08\n?", "", page, flags=re.M)  # the marks of Click against rewrapping
    page = _INDENTED.sub(lambda match: f"**{match[1]}**:\n\n```text\n{dedent(match[2])}```\n", page)
    return re.sub(r"\*\*(.*)( )(\{.*\})\*\*", r"**\1**\2`\3`", page)


def on_files(files: Files, config: Any) -> Files:
    from mkdocs.structure.files import File

    pages = {
        "index.md": (ROOT / "README.md").read_text(encoding="utf-8").replace("](docs/", "]("),
        "contributing.md": (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").replace("](docs/", "]("),
        "cli.md": command_reference(),
    }
    for name, content in pages.items():
        files.append(File.generated(config, name, content=content))
    for asset in ("iframe-worker.js", "extra.css", "site.js"):
        files.append(File.generated(config, f"assets/{asset}", abs_src_path=str(ROOT / "tools" / "site" / asset)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Turn links to files outside of docs/ into text, remove the marks of blocks, and render Markdown in <details>."""
    if page.file.src_path.startswith("log/"):
        page.meta["search"] = {"exclude": True}  # a third of all words
    elif boost := BOOSTS.get(page.file.src_path):
        page.meta["search"] = {"boost": boost}
    if title := TITLES.get(page.file.src_path):
        page.meta["title"] = title
    folder = Path(config["docs_dir"]) / Path(page.file.src_path).parent
    docs = Path(config["docs_dir"]).resolve()

    def resolve(match: re.Match[str]) -> str:
        name = match[2].partition("#")[0]
        target = (folder / name).resolve()
        is_page = files.get_file_from_path(name) is not None or (target.is_relative_to(docs) and target.exists())
        return match[0] if is_page else match[1]

    return _MARKS.sub(r"\1", _LINK.sub(resolve, markdown)).replace("<details>", '<details markdown="1">')


def on_page_content(content: str, page: Any, config: Any, files: Files) -> str:
    """Show the narrow version of a picture on a phone, wrap tables, mark long cells, and name the column in each cell.

    The names of columns are for tables that may be shown as a list.
    """

    def choose(match: re.Match[str]) -> str:
        phone = f"{match[1]}-phone.png"
        if not (Path(config["docs_dir"]) / phone).is_file():
            return match[0]
        return f'<picture><source media="(max-width: 600px)" srcset="{phone}">{match[0]}</picture>'

    content = _IMAGE.sub(choose, content)
    exclude = " data-search-exclude" * (page.file.src_path in TABLES_NOT_SEARCHED)
    return _TABLE.sub(lambda match: f'<div class="table"{exclude}>{_mark_cells(match[0])}</div>', content)


def on_post_build(config: Any) -> None:
    """Add an entry for each recipe option to the search, which has one for each heading."""
    site = Path(config["site_dir"])
    index = site / "search" / "search_index.json"
    search = json.loads(index.read_text(encoding="utf-8"))
    for name, option, meaning in _OPTION.findall((site / "recipe.html").read_text(encoding="utf-8")):
        words = name.rpartition(".")[2].replace("_", " ")  # "early stopping" finds train.early_stopping
        text = f"{html.unescape(_text(option))}, {words}: {html.unescape(_text(meaning))}"
        entry = {"location": f"recipe.html#{name}", "title": name.rpartition(".")[2], "text": text, "boost": 0.5}
        search["docs"].append(entry)
    index.write_text(json.dumps(search), encoding="utf-8")


def _mark_cells(table: str) -> str:
    cells = _CELL.findall(table)
    names = [_text(content) for kind, _, content in cells if kind == "th"]
    columns = itertools.cycle(names)
    is_list = 2 <= len(names) <= 6 and any(_is_long(content) for kind, _, content in cells if kind == "td")

    def mark(match: re.Match[str]) -> str:
        if match[1] == "th":
            return match[0]
        long, column = " data-long" * _is_long(match[3]), next(columns)
        column = f' data-column="{column}"' if is_list and len(names) > 2 else ""
        return f"<td{match[2]}{long}{column}>{match[3]}</td>"

    return _CELL.sub(mark, table).replace("<table>", "<table data-list>" if is_list else "<table>", 1)


def _is_long(content: str) -> bool:
    return len(_text(content)) > LONG


def _text(content: str) -> str:
    return re.sub(r"<[^>]+>", "", content).replace('"', "&quot;")
