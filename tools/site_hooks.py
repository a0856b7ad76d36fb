"""Change pages for `make site`.

The first page is the repository's README. Pages that are opened as local files need another script for search. Links to
files that are not pages (tests, code) become text. Blocks and collapsed sections are converted from GitHub's syntax.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mkdocs.structure.files import Files

ROOT = Path(__file__).resolve().parents[1]
_MARKS = re.compile(r"^(```\w+) [^\n]+$", re.M)  # marks of blocks for the tests, which the site does not support
_LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(((?!https?://|#)[^)\s]+)\)")


def on_files(files: Files, config: Any) -> Files:
    from mkdocs.structure.files import File

    readme = (ROOT / "README.md").read_text(encoding="utf-8").replace("](docs/", "](")
    files.append(File.generated(config, "index.md", content=readme))
    files.append(
        File.generated(config, "assets/iframe-worker.js", abs_src_path=str(ROOT / "tools" / "iframe-worker.js"))
    )
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Remove targets of links that leave docs/ and marks of blocks, and render collapsed sections as Markdown."""
    here = Path(config["docs_dir"]) / Path(page.file.src_path).parent
    pages = Path(config["docs_dir"]).resolve()

    def keep_or_unlink(match: re.Match[str]) -> str:
        target = (here / match[2].partition("#")[0]).resolve()
        return match[0] if target.is_relative_to(pages) and target.exists() else match[1]

    return _MARKS.sub(r"\1", _LINK.sub(keep_or_unlink, markdown)).replace("<details>", '<details markdown="1">')
