"""What `make site` does to pages on their way into the site.

The first page is the repository's README. Search on pages that are opened as files has a script of its own. Links to
files that are no pages (tests, code) become text. Blocks and folded parts are written for GitHub, and read by the
site's own rules.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mkdocs.structure.files import Files

ROOT = Path(__file__).resolve().parents[1]
_MARKS = re.compile(r"^(```\w+) [^\n]+$", re.M)  # what the tests are told about a block; the site knows no such words
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
    """Links that lead out of docs/ lose their target; blocks their marks; what is folded up is Markdown too."""
    here = Path(config["docs_dir"]) / Path(page.file.src_path).parent
    pages = Path(config["docs_dir"]).resolve()

    def kept(match: re.Match[str]) -> str:
        target = (here / match[2].partition("#")[0]).resolve()
        return match[0] if target.is_relative_to(pages) and target.exists() else match[1]

    return _MARKS.sub(r"\1", _LINK.sub(kept, markdown)).replace("<details>", '<details markdown="1">')
