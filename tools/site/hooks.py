"""Hooks of `make site`: adapt pages that are written for GitHub to the site.

The first page is the repository's README, and the command reference is generated from the command line. Links to files
outside of docs/ become text. Words after a block's language are marks for the tests and are removed.
"""

from __future__ import annotations

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
    "comparison.md": 0.2,
    "api.md": 0.5,
}
_MARKS = re.compile(r"^(```\w+) [^\n]+$", re.M)
_EXAMPLES = re.compile(r"^[\b]?\n?(Examples|Start with):\n((?:  .*\n)+)", re.M)
_LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(((?!https?://|#)[^)\s]+)\)")


def command_reference() -> str:
    """Return a Markdown page of all commands and options, as Typer writes it."""
    sys.path.insert(0, str(ROOT / "src"))
    import typer.main
    from typer.cli import get_docs_for_click

    from strop.cli.app import COMMANDS, build

    command = typer.main.get_command(build([*COMMANDS]))
    context = command.make_context("strop", [], resilient_parsing=True)
    page = get_docs_for_click(obj=command, ctx=context, name="strop", title="Commands")
    return _EXAMPLES.sub(lambda match: f"**{match[1]}**:\n\n```console\n{dedent(match[2])}```\n\n", page)


def on_files(files: Files, config: Any) -> Files:
    from mkdocs.structure.files import File

    pages = {
        "index.md": (ROOT / "README.md").read_text(encoding="utf-8").replace("](docs/", "]("),
        "contributing.md": (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").replace("](docs/", "]("),
        "cli.md": command_reference(),
    }
    for name, content in pages.items():
        files.append(File.generated(config, name, content=content))
    for asset in ("iframe-worker.js", "extra.css", "search.js"):
        files.append(File.generated(config, f"assets/{asset}", abs_src_path=str(ROOT / "tools" / "site" / asset)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Turn links to files outside of docs/ into text, remove the marks of blocks, and render Markdown in <details>."""
    if page.file.src_path.startswith("log/"):
        page.meta["search"] = {"exclude": True}  # a third of all words
    elif boost := BOOSTS.get(page.file.src_path):
        page.meta["search"] = {"boost": boost}
    folder = Path(config["docs_dir"]) / Path(page.file.src_path).parent
    docs = Path(config["docs_dir"]).resolve()

    def resolve(match: re.Match[str]) -> str:
        name = match[2].partition("#")[0]
        target = (folder / name).resolve()
        is_page = files.get_file_from_path(name) is not None or (target.is_relative_to(docs) and target.exists())
        return match[0] if is_page else match[1]

    return _MARKS.sub(r"\1", _LINK.sub(resolve, markdown)).replace("<details>", '<details markdown="1">')
