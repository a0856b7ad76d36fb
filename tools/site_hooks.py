"""What `make site` does to pages on their way into the site.

The first page is the repository's README. Links to files that are no pages (tests, code) become text.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
_LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(((?!https?://|#)[^)\s]+)\)")


def on_files(files: Files, config: Any) -> Files:
    readme = (ROOT / "README.md").read_text(encoding="utf-8").replace("](docs/", "](")
    files.append(File.generated(config, "index.md", content=readme))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Links that lead out of docs/ lose their target."""
    here = Path(config["docs_dir"]) / Path(page.file.src_path).parent
    pages = Path(config["docs_dir"]).resolve()

    def kept(match: re.Match[str]) -> str:
        target = (here / match[2].partition("#")[0]).resolve()
        return match[0] if target.is_relative_to(pages) and target.exists() else match[1]

    return _LINK.sub(kept, markdown)
