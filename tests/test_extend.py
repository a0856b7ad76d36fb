"""The code changes on docs/extend.md work in a copy of the code."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tests import ROOT

PAGE = (ROOT / "docs" / "extend.md").read_text(encoding="utf-8")
EDIT = re.compile(
    r"^ *<!-- edit: (\S+) \| (before|replace) \| (.+?) -->\n( *)```\w+\n(.*?)^ *```$", re.MULTILINE | re.DOTALL
)
CHECKS = {
    "src/strop/data/formats.py": """
        from strop.data.formats import FORMATS
        entry = FORMATS["ask-reply"]
        (parsed,) = entry.convert(entry.example, entry.matching_keys(entry.example))
        assert [message.content for message in parsed.messages] == ["hi", "yo"], parsed
    """,
    "src/strop/objectives/table.py": """
        import torch
        from strop.config.load import resolve
        from strop.objectives.preferences import AnswerLogprobs, PreferenceBatch
        from strop.objectives.table import default_options, objective_of
        recipe = resolve(None, {"model.name": "m", "data.train": "d", "train.objective": "slic"}).recipe
        options = recipe.train.model_copy(update={"beta": 2.0})
        assert {field: value for field, value, _ in default_options(recipe.train)}["train.beta"] == 1.0
        one, none = torch.ones(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
        chosen, rejected = (
            AnswerLogprobs(torch.tensor(sums).double(), one, none) for sums in ([-1.0, -1.0], [-1.25, -9.0])
        )
        result = objective_of(recipe.train).compute(PreferenceBatch((chosen, rejected), one > 0), options)
        assert result.losses.tolist() == [0.5, 0.0], result
    """,
    "src/strop/models/families/table.py": """
        from strop.models.families.table import FAMILIES
        from strop.engine.step import step_for
        from tests.support.random_models import adapted
        assert step_for(adapted("helium")).name == "fast"
    """,
}


def edits() -> list[tuple[str, str, str, str]]:
    """Return (file, before or replace, anchor, text) of each edit on the page."""
    return [
        (file, how, anchor, textwrap.dedent(text))
        for file, how, anchor, _, text in (result.groups() for result in EDIT.finditer(PAGE))
    ]


def apply(root: Path, file: str, how: str, anchor: str, text: str) -> None:
    source = (root / file).read_text(encoding="utf-8")
    pattern = r"\s*".join(re.escape(part) for part in re.split(r"(?<=\()", anchor))
    (match,) = re.finditer(pattern, source)
    indent = re.search(r"[ \t]*$", source[: match.start()])
    assert indent is not None
    if how == "replace":
        new = text.strip() + source[match.end() :]
    else:
        new = textwrap.indent(text, indent[0]).lstrip() + indent[0] + source[match.start() :]
    (root / file).write_text(source[: match.start()] + new, encoding="utf-8")


@pytest.fixture(scope="module")
def changed_copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a copy of the code with all edits of the page. The family that the page adds is removed first.

    Compiled kernels are copied with their sources, which have the same times, so that numba finds them.
    """
    root = tmp_path_factory.mktemp("copy")
    unwanted = shutil.ignore_patterns("*.pyc*", "*.tmp.*", "*.lock", "*.egg-info", "fixtures")
    for folder in ("src", "tests"):
        shutil.copytree(ROOT / folder, root / folder, ignore=unwanted)
    table = root / "src/strop/models/families/table.py"
    without = re.sub(r'^    "helium": .*\n', "", table.read_text(encoding="utf-8"), flags=re.MULTILINE)
    table.write_text(without, encoding="utf-8")
    for edit in edits():
        apply(root, *edit)
    return root


def test_page_changes_a_format_an_objective_and_a_family() -> None:
    assert set(CHECKS) <= {file for file, *_ in edits()}


@pytest.mark.parametrize("file", CHECKS)
def test_change_works_in_a_copy_of_the_code(file: str, changed_copy: Path) -> None:
    environment = {
        **os.environ,
        "PYTHONPATH": f"{changed_copy / 'src'}{os.pathsep}{changed_copy}",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-c", textwrap.dedent(CHECKS[file])]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=changed_copy)
    assert done.returncode == 0, done.stderr[-3000:]
