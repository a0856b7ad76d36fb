"""Calls of the Python API as people write them: paths, sizes and runs in the forms that they have them in."""

from __future__ import annotations

from pathlib import Path

import pytest

import strop
from strop.adapters import Model
from strop.chat import Session
from strop.engine.answers.text import Sampling
from strop.errors import InputError

QUICK = {"train.max_steps": 3, "lora.r": 2, "model.dtype": "fp32"}


def test_a_run_a_path_and_a_size_are_taken_as_they_are(tiny_folder: Path, rows_file: Path, tmp_path: Path) -> None:
    run = strop.train(model=tiny_folder, data=rows_file, out=tmp_path / "run", memory="8GB", **QUICK)
    assert strop.load(run).adapter == run.folder / "adapter"
    found = [strop.evaluate(run, data, max_new_tokens=2)["rows"] for data in (rows_file, [rows_file], str(rows_file))]
    assert found == [24, 24, 24]
    planned = [strop.plan(model=tiny_folder, data=rows_file, memory=size).memory_bytes for size in ("8GB", 8 * 10**9)]
    assert planned[0] == planned[1] == 8 * 10**9


def test_what_cannot_be_is_said(tiny_folder: Path) -> None:
    for wrong in ({"memory": "much"}, {"devices": 0}, {"nodes": 0}):
        with pytest.raises(InputError):
            strop.plan(model=tiny_folder, **wrong)
    with pytest.raises(InputError, match="an answer has at least one"):
        strop.load(tiny_folder).generate(["hi"], max_new_tokens=0)


@pytest.fixture(scope="module")
def bold(adapter_folders: list[Path]) -> Model:
    """It was trained with a system prompt in every row."""
    model = strop.load(adapter_folders[1])
    assert model.default_system
    return model


def test_prompts_are_asked_with_the_system_prompt_of_the_training_rows(bold: Model) -> None:
    own = bold.generate(["what is 3"], system=bold.default_system, max_new_tokens=8)
    assert bold.generate(["what is 3"], max_new_tokens=8) == own != bold.generate(["what is 3"], system="")
    assert bold.generate("what is 3", max_new_tokens=8) == own  # one text is one prompt
    assert bold.generate([]) == []


def test_reset_keeps_the_system_prompt_that_the_chat_began_with(bold: Model) -> None:
    session = Session(bold, "tuned", "talk like a cook", 4, Sampling())

    def opening() -> str:
        session.turn("what is 3", lambda text: None)
        return bold.history[0].content

    assert opening() == "talk like a cook"
    assert session.command("/reset") and opening() == "talk like a cook"
    assert session.command("/system talk like a king") and opening() == "talk like a king"
    assert session.command("/reset") and opening() == "talk like a king"
