"""Calls of the Python API as people write them: paths, sizes and runs in the forms that they have them in."""

from __future__ import annotations

import hashlib
import io
import multiprocessing
import sys
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

import strop
from strop.cli.chat import Session
from strop.engine.decode.model import Model
from strop.engine.decode.sampling import Sampling
from strop.errors import InputError
from tests.support.runs import run
from tests.support.tiny import write_rows

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


def test_rows_in_memory_are_refused_by_a_word(tiny_folder: Path) -> None:
    rows = [{"prompt": "hi", "completion": "yo"}]
    for given in ({"prompt": "hi"}.keys(), rows, (row for row in rows)):  # a table's rows are its columns' names
        for name in ("data", "eval"):
            with pytest.raises(InputError, match=f"a list of files, not ({type(given).__name__}|dict)") as told:
                strop.check(model=tiny_folder, **{"data": "rows.jsonl", name: given})
            assert "give its path" in told.value.fix
        with pytest.raises(InputError, match="data: a file or a list of files"):
            strop.evaluate(tiny_folder, given)
        with pytest.raises(InputError, match="data: a file or a list of files"):
            strop.merge(tiny_folder, "out", data=given)


@pytest.mark.parametrize("given", [0.1, "0.1", ".25", 10])
def test_a_share_without_its_sign_is_told(given: Any, tiny_folder: Path) -> None:
    with pytest.raises(InputError) as told:
        strop.check(model=tiny_folder, data="rows.jsonl", eval=given)
    assert "data.eval: a share is written with %" in told.value.lines()[0]


def test_a_function_in_place_of_its_name_is_refused(tiny_folder: Path) -> None:
    for given in (len, [len]):
        with pytest.raises(InputError, match=r"train\.rewards: a function is given by its name"):
            strop.train(model=tiny_folder, data="rows.jsonl", train={"objective": "grpo", "rewards": given})


@pytest.mark.parametrize("name", ["train", "eval"])
def test_an_empty_list_of_files_is_refused(name: str, tiny_folder: Path) -> None:
    with pytest.raises(InputError, match="recipe is not valid") as told:
        strop.train(model=tiny_folder, data={"train": "rows.jsonl", name: []})
    assert f"data.{name}: names no file" in told.value.lines()[0]


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
    assert Sampling.notes_on_ignored_settings(GenerationConfig(do_sample=True, top_p=0.9, repetition_penalty=1.1)) == []
    [note] = Sampling.notes_on_ignored_settings(GenerationConfig(do_sample=True, min_p=0.1, no_repeat_ngram_size=3))
    assert "min_p 0.1, no_repeat_ngram_size 3: left out" in note


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def warnings_are_errors() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


HOSTS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "bf16": lambda: default_dtype(torch.bfloat16),
    "fp64": lambda: default_dtype(torch.float64),
    "no gradients": torch.no_grad,
    "inference": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "meta": lambda: torch.device("meta"),
    "warnings": warnings_are_errors,
}


def story(tiny_folder: Path, rows: Path, folder: Path) -> tuple[Any, ...]:
    run = strop.train(model=tiny_folder, data=rows, out=folder / "run", **QUICK)
    tuned = strop.evaluate(run, rows, max_new_tokens=2)["tuned"]
    merged = strop.merge(run, folder / "merged", dtype="fp32").out / "model-00001.safetensors"
    answers = strop.load(run, dtype="fp32").generate(["what is 3"], max_new_tokens=4)
    files = (run.folder / "adapter" / "adapter_model.safetensors", merged)
    return (
        *(hashlib.sha256(file.read_bytes()).hexdigest() for file in files),
        run.report["loss"],
        tuned["loss"],
        answers,
    )


@pytest.fixture(scope="module")
def quiet_story(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, ...]:
    folder = tmp_path_factory.mktemp("quiet")
    return story(tiny_folder, write_rows(folder / "rows.jsonl", 24), folder)


@pytest.mark.parametrize("host", HOSTS)
def test_how_a_program_uses_torch_changes_no_number(
    host: str, tiny_folder: Path, rows_file: Path, tmp_path: Path, quiet_story: tuple[Any, ...]
) -> None:
    with HOSTS[host]():
        assert story(tiny_folder, rows_file, tmp_path) == quiet_story
        model = strop.load(tmp_path / "run", dtype="fp32")
        model.add(str(tmp_path / "run" / "adapter"))
        model.use(str(tmp_path / "run" / "adapter"))
        assert model.generate(["what is 3"], max_new_tokens=4) == quiet_story[-1]


def test_a_programs_own_settings_are_there_behind_a_call(tiny_folder: Path, rows_file: Path, tmp_path: Path) -> None:
    torch.manual_seed(7)
    own = torch.rand(3)
    torch.manual_seed(7)
    with default_dtype(torch.float64):
        story(tiny_folder, rows_file, tmp_path)
        with pytest.raises(InputError):
            strop.load(tmp_path / "nothing")
        assert torch.get_default_dtype() is torch.float64
    assert torch.equal(torch.rand(3), own)


def test_several_threads_train_and_load_what_one_does(
    tiny_folder: Path, rows_file: Path, tmp_path: Path, quiet_story: tuple[Any, ...]
) -> None:
    with ThreadPoolExecutor(3) as threads:
        told = list(threads.map(lambda number: story(tiny_folder, rows_file, tmp_path / str(number)), range(3)))
    assert told == [quiet_story] * 3


def test_several_threads_ask_one_model(bold: Model) -> None:
    asked = [f"what is {number}" for number in range(6)]
    alone = [bold.generate(text, max_new_tokens=8) for text in asked]
    with bold.base():
        base = bold.generate(asked[0], max_new_tokens=8)
    assert base != alone[0]

    def ask(text: str) -> list[list[str]]:
        return [bold.generate(text, max_new_tokens=8) for _ in range(8)]

    def ask_base() -> list[list[str]]:
        found = []
        for _ in range(8):
            with bold.base():
                found.append(bold.generate(asked[0], max_new_tokens=8))
        return found

    with ThreadPoolExecutor(7) as threads:
        others = threads.submit(ask_base)
        assert list(threads.map(ask, asked)) == [[answer] * 8 for answer in alone]
        assert others.result() == [base] * 8


def load_in_a_fork(folder: Path, said: Any) -> None:
    try:
        strop.load(folder)
        said.put("loaded")
    except strop.RunError as error:
        said.put("; ".join(error.lines()))


@pytest.mark.skipif(sys.platform != "linux", reason="fork is Linux's way")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_fork_of_a_process_that_has_used_strop_is_refused(tiny_folder: Path) -> None:
    strop.load(tiny_folder)
    context = multiprocessing.get_context("fork")
    said: Any = context.SimpleQueue()
    child = context.Process(target=load_in_a_fork, args=(tiny_folder, said))
    child.start()
    child.join()
    assert "spawn" in said.get()


def test_paths_and_runs_are_taken_inside_a_section_and_a_list(
    tiny_folder: Path, rows_file: Path, tmp_path: Path
) -> None:
    data = {"train": [rows_file], "eval": rows_file}
    run = strop.train(model={"name": tiny_folder}, data=data, out=tmp_path / "a", **QUICK)
    again = strop.train(model={"name": tiny_folder, "adapter": run}, data=rows_file, out=tmp_path / "b", **QUICK)
    assert again.report["loss"]["first"] < run.report["loss"]["first"]
    assert strop.resume(run, allow_changed="schedule").folder == run.folder


def test_an_option_that_is_given_twice_is_refused(tiny_folder: Path, rows_file: Path) -> None:
    for twice in ({"lora": {"r": 2}, "lora.r": 4}, {"model.name": "demo"}):
        with pytest.raises(InputError, match="given twice"):
            strop.check(model=tiny_folder, data=rows_file, **twice)


def test_a_long_value_is_not_printed_whole(tiny_folder: Path) -> None:
    with pytest.raises(InputError) as caught:
        strop.check(model=tiny_folder, data=[{"prompt": "a", "completion": "b"}] * 1000)
    assert len("".join(caught.value.lines())) < 400


@pytest.mark.parametrize("prompts", [{"role": "user"}, [{"role": "user", "content": "hi"}], [3]])
def test_a_prompt_that_is_no_text_is_refused(prompts: Any, bold: Model) -> None:
    with pytest.raises(InputError, match="a prompt is a text"):
        bold.generate(prompts)
