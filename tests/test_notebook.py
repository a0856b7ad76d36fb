"""The notebook has the text of the lesson, and each code cell is a block that the lesson's test runs."""

from __future__ import annotations

import ast
import json
import re
import shlex

from tests import ROOT
from tests.support.commands import find_error
from tests.support.pages import blocks
from tests.support.scripts import script


def test_notebook_is_generated_from_the_lesson() -> None:
    notebook = script(ROOT / "tools" / "notebook.py")
    assert notebook.NOTEBOOK.read_text(encoding="utf-8") == notebook.written(), "run python tools/notebook.py"
    cells = [(cell["cell_type"], "".join(cell["source"])) for cell in json.loads(notebook.written())["cells"]]
    code = [text for kind, text in cells if kind == "code"][1:]  # the first one installs
    ran = [block.text.strip() for block in blocks(notebook.LESSON) if "run" in block.marks]
    assert len(code) > 15 and [re.sub(r"^!", "", text, flags=re.M) for text in code] == [
        text for text in ran if text in {re.sub(r"^!", "", cell, flags=re.M) for cell in code}
    ]
    for text in code:
        if text.startswith("!"):
            assert all(find_error(shlex.split(line[1:], comments=True)[1:]) is None for line in text.splitlines())
        else:
            ast.parse(text)
    headings = re.findall(r"^## (.*)$", notebook.LESSON.read_text(encoding="utf-8"), re.M)
    words = "\n".join(text for kind, text in cells if kind == "markdown")
    assert re.findall(r"^## (.*)$", words, re.M) == headings and " run\n" not in words
    assert words.count("<details>") == words.count("</details>") == 15
