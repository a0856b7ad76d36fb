"""Calls of the Python API as people write them: paths, sizes and runs in the forms that they have them in."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest
from transformers import GenerationConfig

import strop
from strop.adapters import Model
from strop.chat import Session
from strop.engine.answers.text import Sampling
from strop.errors import InputError
from tests.support.running import run

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


def test_a_chat_ends_where_the_model_does(tiny_folder: Path) -> None:
    model = strop.load(tiny_folder)
    with pytest.raises(InputError, match="the model was made for 512"):
        for _ in range(60):
            model.chat("what is 3 and 4 and 5", max_new_tokens=40)
    assert len(model.renderer.prompt(model.history)) > 400
    model.history.clear()
    assert model.chat("what is 3", max_new_tokens=4)


def test_each_adapter_is_asked_as_in_its_training(adapter_folders: list[Path]) -> None:
    calm, bold = map(str, adapter_folders)
    model, alone = strop.load(calm), strop.load(bold)
    model.add(bold)
    model.use(bold)
    assert model.default_system == alone.default_system is not None
    assert model.generate("what is 3", max_new_tokens=8) == alone.generate("what is 3", max_new_tokens=8)
    model.use(calm)
    assert model.default_system == strop.load(calm).default_system is None


def test_a_persons_chat_goes_on_after_a_fault(
    tiny_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    lines = ["what is 3\r", "what is " + "9 " * 600, "/help\r", "and \udcff", "what is 3"]
    for stdin, ends in ((Terminal, 0), (io.StringIO, 2)):
        monkeypatch.setattr(sys, "stdin", stdin("\n".join(lines) + "\n"))
        code, out, err = run("chat", tiny_folder, "--max-new-tokens", "4", capsys=capsys)
        assert code == ends and "the model was made for 512" in " ".join(err.split())
        assert (len(out.splitlines()) == (3 if ends == 0 else 1) and "this list" in err) or ends


def test_what_a_generation_config_asks_for_and_is_not_done_is_said() -> None:
    assert Sampling.passed_over(GenerationConfig(do_sample=True, top_p=0.9, repetition_penalty=1.1)) == []
    [note] = Sampling.passed_over(GenerationConfig(do_sample=True, min_p=0.1, no_repeat_ngram_size=3))
    assert "min_p 0.1, no_repeat_ngram_size 3: left out" in note
