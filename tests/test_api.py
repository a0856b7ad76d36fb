"""The Python API: argument forms, errors, threads, and isolation from the program that calls it."""

from __future__ import annotations

import doctest
import hashlib
import importlib
import inspect
import io
import json
import multiprocessing
import re
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import datasets
import numpy
import numpy as np
import pandas
import pyarrow
import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

import strop
from strop.api import flatten_options
from strop.cli.chat import Session
from strop.config.names import SHORT_FORMS
from strop.config.options import Options
from strop.config.schema import option_fields
from strop.data.types import Message
from strop.engine.decode.model import Model
from strop.engine.decode.sampling import Sampling
from strop.errors import InputError, MemoryLimitError, in_python
from strop.machine.memory import MemoryWatch
from strop.runs.events import Event
from tests.support.runs import run
from tests.support.tiny import write_rows

QUICK = {"train.max_steps": 3, "lora.r": 2, "model.dtype": "fp32"}


def test_runs_paths_and_sizes_are_accepted_in_all_forms(tiny_folder: Path, rows_file: Path, tmp_path: Path) -> None:
    run = strop.train(model=tiny_folder, data=rows_file, out=tmp_path / "run", memory="8GB", **QUICK)
    assert strop.load(run).adapter == run.folder / "adapter"
    rows = [strop.evaluate(run, data, max_new_tokens=2)["rows"] for data in (rows_file, [rows_file], str(rows_file))]
    assert rows == [24, 24, 24]
    planned = [strop.plan(model=tiny_folder, data=rows_file, memory=size).memory_bytes for size in ("8GB", 8 * 10**9)]
    assert planned[0] == planned[1] == 8 * 10**9


def test_options_are_completed() -> None:
    """Type checkers know each field by its last name, and a shell completes the common ones."""
    from IPython.core.completer import IPCompleter, provisionalcompleter

    fields = {field.rpartition(".")[2] for field, _ in option_fields()} | {"model", "data", "lora", "train"}
    assert set(Options.__annotations__) == fields | {name.replace("-", "_") for name in SHORT_FORMS}
    completer = IPCompleter(namespace={"strop": strop}, use_jedi=False)
    for function in ("train", "plan", "check", "compare_methods"):
        with provisionalcompleter():
            found = completer.completions(text := f"strop.{function}(ep", len(text))
            assert "epochs=" in {completion.text for completion in found}


def test_invalid_arguments_raise_input_errors(tiny_folder: Path) -> None:
    for arguments in ({"memory": "much"}, {"devices": 0}, {"nodes": 0}):
        with pytest.raises(InputError):
            strop.plan(model=tiny_folder, **arguments)
    with pytest.raises(InputError):
        strop.load(tiny_folder).generate(["hi"], max_new_tokens=0)


ROWS = [{"prompt": f"what is {number}", "completion": f"number {number}"} for number in range(12)]
TABLES: dict[str, Callable[[list[dict[str, Any]]], Any]] = {
    "list": list,
    "pandas": pandas.DataFrame,
    "datasets": datasets.Dataset.from_list,
    "pyarrow": pyarrow.Table.from_pylist,
}


@pytest.mark.parametrize("table", TABLES)
def test_rows_in_memory_are_read_as_their_file_would_be(table: str, tiny_folder: Path, tmp_path: Path) -> None:
    file, rows = tmp_path / "rows.jsonl", TABLES[table](ROWS)
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    reports = [strop.check(model=tiny_folder, data=data) for data in (file, rows)]
    assert [[*report.pop("formats").values()] for report in reports] == [["prompt-completion"]] * 2
    assert reports[0] == reports[1]
    assert strop.check(model=tiny_folder, data=[file, rows])["rows"]["read"] == 24
    assert strop.plan(model=tiny_folder, data={"train": rows}).data["rows"] == 12


def test_frame_trains_and_evaluates_as_its_file_does(tiny_folder: Path, tmp_path: Path) -> None:
    file, rows = tmp_path / "rows.jsonl", pandas.DataFrame(ROWS)
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    runs = [
        strop.train(model=tiny_folder, data=data, eval=data, out=tmp_path / name, **QUICK)
        for name, data in (("a", file), ("b", rows))
    ]
    assert runs[0].report["loss"] == runs[1].report["loss"]
    assert strop.resume(runs[1], allow_changed="schedule").folder == runs[1].folder
    scores = [strop.evaluate(runs[1], data, regression_data=data, max_new_tokens=2) for data in (file, rows)]
    assert scores[0]["tuned"]["loss"] == scores[1]["tuned"]["loss"] and scores[1]["regression"]["rows"] == 12
    assert strop.merge(runs[1], tmp_path / "merged", data=rows).parity is not None


def test_interrupted_run_on_rows_in_memory_resumes(tiny_folder: Path, tmp_path: Path) -> None:
    rows = pandas.DataFrame(ROWS)
    run = strop.train(model=tiny_folder, data=rows, out=tmp_path / "run", **QUICK, max_time="0s")
    assert run.report["steps"] < 3
    del rows
    report = run.report
    report["memory"]["measured_peak_bytes"] = 1 << 50
    (run.folder / "report.json").write_text(json.dumps(report), encoding="utf-8")
    resumed = strop.resume(run, allow_changed="max_time", max_time=None).report
    assert resumed["steps"] == 3 and resumed["memory"]["measured_peak_bytes"] == 1 << 50  # of both sessions


def test_errors_in_rows_in_memory_name_the_row_and_no_file(tiny_folder: Path) -> None:
    with pytest.raises(InputError) as raised:
        strop.train(model=tiny_folder, data=[*ROWS, {"prompt": "", "completion": "yo"}])
    assert re.match(rf"rows in memory \([0-9a-f]{{6}}\):{len(ROWS) + 1}: ", str(raised.value)), raised.value


def test_rows_in_memory_can_be_named_as_they_are_shown(adapter_folders: list[Path]) -> None:
    options: dict[str, Any] = {"max_new_tokens": 4, "progress": False}
    first = strop.evaluate(adapter_folders[0], ROWS, **options)
    name = str(first["samples"][0]["place"]).rpartition(":")[0]
    again = strop.evaluate(adapter_folders[0], name, **options)
    assert name.startswith("rows in memory (") and again["samples"] == first["samples"]
    with pytest.raises(InputError, match="no such file"):
        strop.evaluate(adapter_folders[0], "rows in memory (000000)", **options)


def test_missing_cells_dates_and_nan_in_memory(tiny_folder: Path) -> None:
    day = pandas.Timestamp("2026-11-29")
    texts = {"prompt": ["when", "what", "how"], "completion": [day, "b", None]}
    frame = pandas.DataFrame(texts | {"score": [0.5, float("nan"), 1.0]})
    report = strop.check(model=tiny_folder, data=frame)
    assert report["rows"]["used"] == 2 and report["dropped"][0]["line"] == 3
    listed = strop.check(model=tiny_folder, data=[{**ROWS[0], "score": float("nan")}, ROWS[1]])
    assert listed["dropped"][0]["line"] == 1 and "NaN" in str(listed["dropped"])
    messages = [{"role": role, "content": "hi", "name": None} for role in ("user", "assistant")]
    nested = pandas.DataFrame({"messages": [numpy.array(messages)] * 2, "number": numpy.arange(2)})
    assert strop.check(model=tiny_folder, data=nested)["rows"]["used"] == 2


def test_memory_limit_below_the_weights_is_refused_before_they_load(
    tiny_folder: Path, rows_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    events: list[Event] = []
    options: dict[str, Any] = {"model": tiny_folder, "data": rows_file, "out": tmp_path / "run", "device": "cpu"}
    with pytest.raises(MemoryLimitError, match="memory: the weights of the base need"):
        strop.train(**options, memory="10MB", callback=events.append)
    words = ("--model", tiny_folder, "--data", rows_file, "--out", tmp_path / "run", "--device", "cpu")
    code, _, err = run("train", *words, "--memory", "10MB", capsys=capsys)
    assert code == 1 and "--memory: the weights" in err and not events and not (tmp_path / "run").exists()


def test_run_that_fails_before_its_first_step_leaves_its_folder_free(
    tiny_folder: Path, rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STROP_CACHE", str(tmp_path / "cache"))  # where a run stores what memory it needed
    options: dict[str, Any] = {"model": tiny_folder, "data": rows_file, "out": tmp_path / "run", **QUICK}

    def fail(self: MemoryWatch) -> None:
        raise MemoryError("out of memory: a test")

    with monkeypatch.context() as patch:
        patch.setattr(MemoryWatch, "__call__", fail)
        with pytest.raises(MemoryLimitError):
            strop.train(**options)
    assert not (tmp_path / "run").exists()
    assert strop.train(**options).report["steps"] == 3


def test_values_that_are_not_rows_raise_an_input_error(tiny_folder: Path) -> None:
    for source in ({"prompt": "hi"}.keys(), (row for row in ROWS), 3):
        for name in ("data", "eval"):
            with pytest.raises(InputError, match=f"a DataFrame.*not {type(source).__name__}"):
                strop.check(model=tiny_folder, **{"data": "rows.jsonl", name: [source]})
        with pytest.raises(InputError, match="data: a file, a list of files, a DataFrame"):
            strop.evaluate(tiny_folder, source)
        with pytest.raises(InputError, match="data: a file, a list of files, a DataFrame"):
            strop.merge(tiny_folder, "out", data=source)
    for rows, what in (
        ([{"prompt": "a", "completion": {1, 2}}], "data.train: row 1: a set has no form in JSON"),
        ([ROWS[0], "rows.jsonl"], "row is a string"),
        (pandas.DataFrame([["a", "b"]], columns=["prompt", "prompt"]), "same name"),
    ):
        with pytest.raises(InputError, match=what):
            strop.train(model=tiny_folder, data=rows)


@pytest.mark.parametrize("given", [0.1, "0.1", ".25", 10])
def test_share_without_percent_sign_raises(given: Any, tiny_folder: Path) -> None:
    with pytest.raises(InputError) as raised:
        strop.check(model=tiny_folder, data="rows.jsonl", eval=given)
    assert raised.value.lines()[0].startswith("data.eval: write a share with %")


def test_reward_function_object_raises(tiny_folder: Path) -> None:
    for source in (len, [len]):
        with pytest.raises(InputError, match=r"train\.rewards: len: not at the top of one Python file"):
            strop.train(model=tiny_folder, data="rows.jsonl", train={"objective": "grpo", "rewards": source})


@pytest.mark.parametrize("name", ["train", "eval"])
def test_empty_list_of_files_raises(name: str, tiny_folder: Path) -> None:
    with pytest.raises(InputError, match=f"data.{name}: the list has no rows and no files"):
        strop.train(model=tiny_folder, data={"train": "rows.jsonl", name: []})


def test_wrong_arguments_are_refused_at_once(tiny_folder: Path, tmp_path: Path) -> None:
    columns = {"prompt": ["a"], "completion": ["b"]}
    for options, message in (
        ({"callback": 3, "data": "rows.jsonl"}, "callback is 3"),
        ({"callback": lambda: None, "data": "rows.jsonl"}, r"callback\(\): .*\nFix: it gets one event"),
        ({"progress": "yes", "data": "rows.jsonl"}, "progress is 'yes'"),
        ({"data": columns}, "a dictionary of columns \\(prompt, completion\\), not rows"),
        ({"data": []}, "no rows and no files"),
        ({"data": np.array(["rows.jsonl"])}, "a file, a list of files, a DataFrame"),
    ):
        with pytest.raises(InputError, match=f"(?s){message}"):
            strop.train(model=tiny_folder, out=tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()
    with pytest.raises(InputError, match="no rows and no files"):
        strop.evaluate(tiny_folder, [])


def test_wrong_arguments_of_a_model_are_refused(bold: Model) -> None:
    wrong: list[tuple[Callable[[], Any], str]] = [
        (lambda: bold.generate(3), "generate: prompt is a number, not a string"),  # type: ignore[arg-type]
        (lambda: bold.use("nope"), "nope: not loaded"),
        (lambda: bold.chat("hi", temperature=-1), "temperature -1: below 0"),
        (lambda: bold.chat(" "), "the message is empty"),
        (lambda: bold.chat("hi", repetition_penalty=0), "repetition_penalty: must be above 0"),
        (lambda: bold.chat("hi", stream=True), "chat: unknown argument stream .did you mean on_text"),
        (lambda: bold.chat("hi", sampling={"top_p": 1}), "sampling is .*temperature=0.7"),  # type: ignore[arg-type]
        (lambda: bold.generate("hi", system=3), "generate: system is 3"),  # type: ignore[arg-type]
        (lambda: bold.chat("hi", history=()), "history is .*a list"),  # type: ignore[arg-type]
        (lambda: bold.chat("hi", on_text="x"), "on_text is 'x'"),  # type: ignore[arg-type]
        (lambda: strop.load("demo", dtype=torch.bfloat16), "did you mean bf16"),  # type: ignore[arg-type]
        (lambda: strop.Run(None), "a path or a name, not NoneType"),  # type: ignore[arg-type]
    ]
    for call, message in wrong:
        with pytest.raises(InputError, match=f"(?s){message}"):
            call()


def test_unknown_keys_name_a_command_that_exists(tiny_folder: Path) -> None:
    with pytest.raises(InputError) as raised:
        strop.train(model=tiny_folder, data="rows.jsonl", nonsense=1)
    assert raised.value.fix.endswith("see `help(strop.train)` for all keys")


def test_check_writes_a_cleaned_copy(tmp_path: Path) -> None:
    """Errors about rows suggest this call."""
    rows = [{"prompt": "a", "completion": "b"}, {"prompt": "a"}]
    report = strop.check(data=rows, fix=tmp_path / "clean.jsonl")
    shown = " ".join(str(report).split())
    assert "clean.jsonl: 1 rows, 1 dropped (see " in shown and "Fix" not in shown
    assert report["rows"]["dropped"] == 1 and "dropped" in repr(report) and "{" not in repr(report)
    assert strop.check(data=tmp_path / "clean.jsonl")["rows"] == {**report["rows"], "read": 1, "dropped": 0}


@pytest.fixture(scope="module")
def bold(adapter_folders: list[Path]) -> Model:
    """Return a model that was trained with a system prompt in every row."""
    model = strop.load(adapter_folders[1])
    assert model.default_system
    return model


def test_merged_model_keeps_the_system_prompt_of_training(
    bold: Model, adapter_folders: list[Path], tmp_path: Path
) -> None:
    strop.merge(adapter_folders[1], tmp_path / "merged", measure=False)
    assert strop.load(tmp_path / "merged").default_system == bold.default_system
    notes = strop.export("gguf", tmp_path / "merged", tmp_path / "m.gguf", type="f16", measure=False).notes
    assert any(str(bold.default_system) in note and "send it in chats" in note for note in notes)


def test_scores_of_a_model_without_an_adapter_are_not_those_of_a_base(tiny_folder: Path) -> None:
    shown = " ".join(str(strop.evaluate(tiny_folder, ROWS, max_new_tokens=2, progress=False)).split())
    assert "┃ model ┃" in shown and "answers generated at" in shown


def test_generate_uses_the_system_prompt_of_training(bold: Model) -> None:
    answers = bold.generate(["what is 3"], system=bold.default_system, max_new_tokens=8)
    assert bold.generate(["what is 3"], max_new_tokens=8) == answers != bold.generate(["what is 3"], system="")
    assert bold.generate("what is 3", max_new_tokens=8) == answers  # a string is one prompt
    assert bold.generate([]) == []


def test_reset_keeps_the_first_system_prompt(bold: Model) -> None:
    session = Session(bold, "tuned", "talk like a cook", 4, Sampling())

    def first_message() -> str:
        session.answer("what is 3", lambda text: None)
        return str(session.history[0]["content"])

    assert first_message() == "talk like a cook"
    assert session.run_command("/reset") and first_message() == "talk like a cook"
    assert session.run_command("/system talk like a king") and first_message() == "talk like a king"
    assert session.run_command("/reset") and first_message() == "talk like a king"


def test_chat_beyond_the_context_raises(tiny_folder: Path) -> None:
    model = strop.load(tiny_folder)
    history: list[Any] = []
    with pytest.raises(InputError, match="512"):
        for _ in range(60):
            model.chat("what is 3 and 4 and 5", max_new_tokens=40, history=history)
    messages = [Message(turn["role"], turn["content"]) for turn in history]
    assert len(model.renderer.prompt(messages)) > 400
    assert model.chat("what is 3", max_new_tokens=4)


def test_generate_ends_at_the_context(tiny_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = strop.load(tiny_folder)
    room = 512 - len(model.renderer.prompt([Message("user", "9 " * 150)]))
    with pytest.raises(InputError, match="the model supports 512"):
        model.generate(["what is 3", "9 " * 600])
    [short, long] = model.answer(
        [model.renderer.prompt([Message("user", text)]) for text in ("what is 3", "9 " * 150)], max_new_tokens=400
    )
    assert long.stopped or long.tokens == room < 400
    assert short.stopped or short.tokens == 400
    caplog.clear()
    model.generate("9 " * 150, max_new_tokens=400)
    assert long.stopped or caplog.messages == [f"the answer was cut at {room} tokens; the model supports no more"]


def test_weights_that_are_rounded_without_being_asked_are_noted(tiny_folder: Path, tmp_path: Path) -> None:
    note = "stored in fp32, loaded in bf16, which is faster here: --dtype fp32 loads it as stored"
    model = strop.load(tiny_folder)  # which is stored in fp32
    assert list(model.notes) == ([note] if model.dtype == "bf16" else [])
    assert not strop.load(tiny_folder, dtype="bf16").notes and not strop.load(tiny_folder, dtype="fp32").notes
    AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.bfloat16).save_pretrained(tmp_path / "bf16")
    model.tokenizer.save_pretrained(tmp_path / "bf16")
    assert not strop.load(tmp_path / "bf16").notes


def test_base_is_the_base_until_the_end_of_the_block(adapter_folders: list[Path]) -> None:
    calm, bold = map(str, adapter_folders)
    model = strop.load(calm)
    model.add(bold)
    with model.base():
        plain = model.generate("what is 3", max_new_tokens=8)
        with pytest.raises(InputError, match=f"use {bold}: inside `base`"):
            model.use(bold)
        with model.base():
            assert model.generate("what is 3", max_new_tokens=8) == plain
        assert model.generate("what is 3", max_new_tokens=8) == plain
    tuned = model.generate("what is 3", max_new_tokens=8)
    assert tuned == strop.load(calm).generate("what is 3", max_new_tokens=8) != plain


def test_each_adapter_uses_the_system_prompt_of_its_training(adapter_folders: list[Path]) -> None:
    calm, bold = map(str, adapter_folders)
    model, alone = strop.load(calm), strop.load(bold)
    model.add(bold)
    model.use(bold)
    assert f"in use: {bold!r}" in repr(model)
    assert model.default_system == alone.default_system is not None
    assert model.generate("what is 3", max_new_tokens=8) == alone.generate("what is 3", max_new_tokens=8)
    model.use(calm)
    assert "in use" not in repr(model)
    assert model.default_system == strop.load(calm).default_system is None


def test_interactive_chat_continues_after_an_error(
    tiny_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    lines = ["what is 3\r", "what is " + "9 " * 600, "/help\r", "and \udcff", "what is 3"]
    for stdin, expected in ((Terminal, 0), (io.StringIO, 2)):
        monkeypatch.setattr(sys, "stdin", stdin("\n".join(lines) + "\n"))
        code, out, err = run("chat", tiny_folder, "--max-new-tokens", "4", capsys=capsys)
        assert code == expected and "512" in " ".join(err.split())
        assert (len(out.splitlines()) == (3 if expected == 0 else 1) and "/quit" in err) or expected


def test_unsupported_generation_config_fields_are_noted() -> None:
    assert Sampling.notes_on_ignored_settings(GenerationConfig(do_sample=True, top_p=0.9, repetition_penalty=1.1)) == []
    [note] = Sampling.notes_on_ignored_settings(GenerationConfig(do_sample=True, min_p=0.1, no_repeat_ngram_size=3))
    assert "min_p 0.1, no_repeat_ngram_size 3" in note


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


HOST_SETTINGS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "bf16": lambda: default_dtype(torch.bfloat16),
    "fp64": lambda: default_dtype(torch.float64),
    "no gradients": torch.no_grad,
    "inference": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "meta": lambda: torch.device("meta"),
    "warnings": warnings_are_errors,
}


def run_everything(tiny_folder: Path, rows: Path, folder: Path) -> tuple[Any, ...]:
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
def expected_results(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, ...]:
    folder = tmp_path_factory.mktemp("quiet")
    return run_everything(tiny_folder, write_rows(folder / "rows.jsonl", 24), folder)


@pytest.mark.parametrize("host", HOST_SETTINGS)
def test_torch_settings_of_the_program_change_no_number(
    host: str, tiny_folder: Path, rows_file: Path, tmp_path: Path, expected_results: tuple[Any, ...]
) -> None:
    with HOST_SETTINGS[host]():
        assert run_everything(tiny_folder, rows_file, tmp_path) == expected_results
        model = strop.load(tmp_path / "run", dtype="fp32")
        model.add(str(tmp_path / "run" / "adapter"))
        model.use(str(tmp_path / "run" / "adapter"))
        assert model.generate(["what is 3"], max_new_tokens=4) == expected_results[-1]


def test_torch_settings_of_the_program_are_restored(tiny_folder: Path, rows_file: Path, tmp_path: Path) -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    with default_dtype(torch.float64):
        run_everything(tiny_folder, rows_file, tmp_path)
        with pytest.raises(InputError):
            strop.load(tmp_path / "nothing")
        assert torch.get_default_dtype() is torch.float64
    assert torch.equal(torch.rand(3), expected)


def test_threads_give_the_results_of_one_thread(
    tiny_folder: Path, rows_file: Path, tmp_path: Path, expected_results: tuple[Any, ...]
) -> None:
    with ThreadPoolExecutor(3) as threads:
        results = list(
            threads.map(lambda number: run_everything(tiny_folder, rows_file, tmp_path / str(number)), range(3))
        )
    assert results == [expected_results] * 3


def test_threads_can_share_a_model(bold: Model) -> None:
    prompts = [f"what is {number}" for number in range(6)]
    expected = [bold.generate(text, max_new_tokens=8) for text in prompts]
    with bold.base():
        base = bold.generate(prompts[0], max_new_tokens=8)
    assert base != expected[0]

    def ask(text: str) -> list[list[str]]:
        return [bold.generate(text, max_new_tokens=8) for _ in range(8)]

    def ask_base() -> list[list[str]]:
        answers = []
        for _ in range(8):
            with bold.base():
                answers.append(bold.generate(prompts[0], max_new_tokens=8))
        return answers

    with ThreadPoolExecutor(7) as threads:
        base_answers = threads.submit(ask_base)
        assert list(threads.map(ask, prompts)) == [[answer] * 8 for answer in expected]
        assert base_answers.result() == [base] * 8


def load_in_fork(folder: Path, results: Any) -> None:
    try:
        strop.load(folder)
        results.put("loaded")
    except strop.RunError as error:
        results.put("; ".join(error.lines()))


@pytest.mark.skipif(sys.platform != "linux", reason="fork is the default on Linux only")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_load_in_a_forked_process_raises(tiny_folder: Path) -> None:
    strop.load(tiny_folder)
    context = multiprocessing.get_context("fork")
    results: Any = context.SimpleQueue()
    child = context.Process(target=load_in_fork, args=(tiny_folder, results))
    child.start()
    child.join()
    assert "spawn" in results.get()


def test_paths_and_runs_are_accepted_in_sections_and_lists(tiny_folder: Path, rows_file: Path, tmp_path: Path) -> None:
    data = {"train": [rows_file], "eval": rows_file}
    run = strop.train(model={"name": tiny_folder}, data=data, out=tmp_path / "a", **QUICK)
    again = strop.train(model={"name": tiny_folder, "adapter": run}, data=rows_file, out=tmp_path / "b", **QUICK)
    assert again.report["loss"]["first"] < run.report["loss"]["first"]
    assert strop.resume(run, allow_changed="schedule").folder == run.folder


def test_duplicate_option_raises(tiny_folder: Path, rows_file: Path) -> None:
    for options in ({"lora": {"r": 2}, "lora.r": 4}, {"model.name": "demo"}):
        with pytest.raises(InputError, match="given twice"):
            strop.check(model=tiny_folder, data=rows_file, **options)


def test_long_invalid_value_is_shortened(tiny_folder: Path) -> None:
    with pytest.raises(InputError) as caught:
        strop.check(model=tiny_folder, data="rows.jsonl", columns=[{"prompt": "a", "completion": "b"}] * 1000)
    assert len("".join(caught.value.lines())) < 400


@pytest.mark.parametrize("prompts", [{"role": "user"}, [{"role": "assistant", "content": "hi"}], [3], [["hi"]], None])
def test_prompt_that_is_no_text_and_no_conversation_raises(prompts: Any, bold: Model) -> None:
    with pytest.raises(InputError, match="generate: "):
        bold.generate(prompts)


def test_generate_answers_conversations(bold: Model) -> None:
    first, second = {"role": "user", "content": "what is 3"}, {"role": "user", "content": "and 4"}
    long = [first, {"role": "assistant", "content": "it is 3"}, second]
    answers = bold.generate([long, "what is 3"], max_new_tokens=8)
    assert answers == [
        bold.chat(long, max_new_tokens=8, temperature=0),
        bold.chat([first], max_new_tokens=8, temperature=0),
    ]
    assert bold.generate(long, max_new_tokens=8) == answers[:1]  # one conversation
    with pytest.raises(InputError, match="generate: images next to messages"):
        bold.generate([long], images=["a.png"])
    with pytest.raises(InputError, match="generate: system is given twice"):
        bold.generate([[{"role": "system", "content": "be short"}, first]], system="be long")


def test_functions_are_metrics_and_judges(adapter_folders: list[Path], rows_file: Path) -> None:
    scored, judged = list[tuple[str, str]](), list[tuple[str, ...]]()

    def starts_alike(right: str, answer: str) -> bool:
        scored.append((right, answer))
        return answer[:1] == right[:1]

    def shorter(*texts: str) -> int:
        judged.append(texts)
        return len(texts[3]) - len(texts[2])

    result = strop.evaluate(adapter_folders[0], rows_file, metric=starts_alike, judge=shorter, max_new_tokens=4)
    assert result["metric"] == "starts_alike" and json.loads(json.dumps(result)) == result
    hits = [sample["tuned"][:1] == sample["gold"][:1] for sample in result["samples"]]
    assert [sample["tuned_hit"] for sample in result["samples"]] == hits
    assert {(sample["gold"], sample["tuned"]) for sample in result["samples"]} <= {*scored}
    assert result["judge"]["name"] == "shorter" and {texts[1] for texts in judged} == {gold for gold, _ in scored}
    assert strop.evaluate(adapter_folders[0], rows_file, metric=lambda gold, text: True)["tuned"]["lambda"] == 1.0

    def exact(right: str, answer: str) -> bool:
        return True

    for wrong, what in (
        (exact, "exact: a function with the name"),
        (lambda answer: True, "lambda"),
        (3, "a name or a function, not 3"),
    ):
        with pytest.raises(InputError, match=what):
            strop.evaluate(adapter_folders[0], rows_file, metric=wrong)  # type: ignore[arg-type]


NAMED = """
import functools

def scaled(function):
    @functools.wraps(function)
    def inner(completion, row):
        return 10 * function(completion, row)
    return inner

def one(completion, row):
    return 1.0

ten = scaled(one)
first = one

def one(completion, row):
    return 2.0

constant = lambda completion, row: 5.0
part = functools.partial(one, row=None)

class Reward:
    def __call__(self, completion, row):
        return 0.0

reward = Reward()
"""


def test_the_function_that_is_given_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not another one whose `__name__` it has: a decorated function has that of the function in it."""
    (tmp_path / "named_for_test.py").write_text(NAMED, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    module = importlib.import_module("named_for_test")
    for name in ("ten", "first", "one", "constant", "reward"):
        spec = f"{tmp_path / 'named_for_test.py'}:{name}"
        assert flatten_options({"rewards": getattr(module, name)}) == {"train.rewards": [spec]}
    pair = flatten_options({"rewards": (module.ten, "exact")})["train.rewards"]
    assert pair == [f"{tmp_path / 'named_for_test.py'}:ten", "exact"]
    assert flatten_options({"rewards": None}) == {"train.rewards": None}
    for nowhere in (module.scaled(module.one), module.part, lambda completion, row: 1.0, module.Reward()):
        with pytest.raises(InputError, match="not at the top of one Python file"):
            flatten_options({"rewards": nowhere})
    program = tmp_path / "program.py"
    program.write_text(
        """import strop
def early(completion, row): return 1.0
if __name__ == "__main__":
    def late(completion, row): return 1.0
    from strop.api import flatten_options
    print(flatten_options({"rewards": early}))
    try: flatten_options({"rewards": late})
    except strop.InputError as error: print(error)
""",
        encoding="utf-8",
    )
    done = subprocess.run([sys.executable, str(program)], capture_output=True, text=True, check=True)
    assert f"{program}:early" in done.stdout and "late: not at the top of one Python file" in done.stdout


def test_a_judge_that_returns_a_truth_value_is_refused(adapter_folders: list[Path], rows_file: Path) -> None:
    """False would be a tie, so each row would be one."""
    with pytest.raises(strop.RunError, match=r"returns (True|False).*\n.*above 0 if the first is better"):
        strop.evaluate(adapter_folders[0], rows_file, judge=lambda *texts: len(texts[2]) > len(texts[3]), limit=2)

    async def waits(right: str, answer: str) -> bool:
        return True

    with pytest.raises(InputError, match="waits: an async function"):
        strop.evaluate(adapter_folders[0], rows_file, metric=waits)  # type: ignore[arg-type]


def test_a_history_may_be_dictionaries(bold: Model) -> None:
    turns = [{"role": "user", "content": "what is 3"}, {"role": "assistant", "content": "it is 3"}]
    history: list[Any] = [*turns]
    last = {"role": "user", "content": "and 4"}
    answer = bold.chat("and 4", history=history, max_new_tokens=8, temperature=0)
    assert answer == bold.generate([[*turns, last]], max_new_tokens=8)[0]
    assert history[1:] == [*turns, last, {"role": "assistant", "content": answer}] and history[0]["role"] == "system"
    stored = json.loads(json.dumps(history))
    further = [bold.chat("and 5", history=one, max_new_tokens=8, temperature=0) for one in (history, stored)]
    assert further[0] == further[1] == bold.generate([history[:-1]], max_new_tokens=8)[0] and history == stored
    assert bold.chat("and 6", history=[*history, last, history[2]], max_new_tokens=8)  # messages of both kinds
    with pytest.raises(InputError, match="a message has prompt, completion, and no role"):
        bold.generate([{"prompt": "hello", "completion": "yo"}])


def test_a_function_of_the_program_is_a_reward(tiny_folder: Path, tmp_path: Path) -> None:
    """The program is not run twice; a later run of its recipe runs the file as a module."""
    (tmp_path / "rows.jsonl").write_text('{"prompt": "hi"}\n' * 8, encoding="utf-8")
    program = tmp_path / "program.py"
    program.write_text(
        f"""print("started")
import strop

def short(completion, row):
    return -float(len(completion))

if __name__ == "__main__":
    options = dict(objective="grpo", answer_tokens=4, group=2, batch_size=2, max_steps=1)
    run = strop.train(model={str(tiny_folder)!r}, data="rows.jsonl", out="run", rewards=short, **options)
    print(run.report["objective"]["options"]["rewards"])
""",
        encoding="utf-8",
    )
    done = subprocess.run([sys.executable, str(program)], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["started", f"['{program}:short']"]
    again = strop.train(tmp_path / "run" / "recipe.yaml", data=tmp_path / "rows.jsonl", out=tmp_path / "again")
    first, second = strop.Run(tmp_path / "run").report, again.report
    assert first["loss"] == second["loss"] and first["objective"]["last"] == second["objective"]["last"]


def test_list_of_runs_gives_a_leaderboard(adapter_folders: list[Path], rows_file: Path) -> None:
    board = strop.evaluate(adapter_folders, rows_file, max_new_tokens=2)
    assert [result["run"] for result in board["runs"]] == list(map(str, adapter_folders))
    assert {line["run"] for line in board["leaderboard"]} == set(map(str, adapter_folders))


def test_evaluate_and_merge_report_progress(adapter_folders: list[Path], rows_file: Path, tmp_path: Path) -> None:
    counts: list[tuple[str, int, int]] = []
    strop.evaluate(adapter_folders[0], rows_file, max_new_tokens=2, progress=lambda *count: counts.append(count))
    assert counts[-1] == ("base and tuned", 24, 24)
    steps: list[str] = []
    strop.merge(adapter_folders[0], tmp_path / "merged", measure=False, progress=steps.append)
    assert any(str(tmp_path / "merged") in step for step in steps)


def test_log_has_a_line_now_and_then_unless_progress_is_off(
    tiny_folder: Path,
    rows_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("strop.display.progress.LOG_SECONDS", 0.1)
    monkeypatch.setattr("strop.display.terminal.TICK_SECONDS", 0.1)
    monkeypatch.setattr("strop.display.terminal.STILL_SECONDS", 0.0)
    options: dict[str, Any] = {
        "model": tiny_folder,
        "data": rows_file,
        "callback": lambda event: time.sleep(0.3),
        **QUICK,
    }
    strop.train(out=tmp_path / "a", **options)
    strop.evaluate(tmp_path / "a", rows_file, max_new_tokens=2)
    log = capsys.readouterr().err
    assert "still    " in log and re.search(r"training: step 2 of 3, loss \d", log)
    strop.train(out=tmp_path / "b", progress=False, **options)
    assert not capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "function"),
    [("fit", "train"), ("eval", "evaluate"), ("chat", "load(...).chat"), ("predict", "load(...).generate")],
)
def test_other_names_of_functions_are_explained(name: str, function: str) -> None:
    with pytest.raises(AttributeError, match=re.escape(f"(did you mean strop.{function}?)")):
        getattr(strop, name)
    with pytest.raises(AttributeError, match=r"'nothing'$"):
        strop.nothing  # noqa: B018


def test_missing_file_suggests_no_other_name_with_a_similar_suffix(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("e.json").write_text("{}")
    with pytest.raises(InputError) as raised:
        strop.train(model="demo", data="nope.jsonl")
    assert "did you mean" not in str(raised.value)
    Path("rows.json").write_text("{}")
    with pytest.raises(InputError, match=r"did you mean rows\.json"):
        strop.train(model="demo", data="rows.jsonl")


def test_import_is_fast_and_needs_no_torch() -> None:
    code = "import sys; before = len(sys.modules); import strop; print(len(sys.modules) - before, *sys.modules)"
    count, *modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.split()
    assert not {"torch", "numpy", "pydantic", "rich", "transformers"} & set(modules)
    assert int(count) < 120


def test_text_of_an_error_has_the_location_and_the_fix(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a"\n')
    with pytest.raises(strop.InputError) as raised:
        strop.train(model="demo", data=rows, out=tmp_path / "run", progress=False)
    assert f"{rows}:2" in str(raised.value)
    with pytest.raises(strop.InputError) as raised:
        strop.train(model="demo", data=rows, out=tmp_path / "run", lora={"ranks": 3})
    assert "did you mean lora.r?" in str(raised.value) and "see `help(strop.train)` for all keys" in str(raised.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("or leave such rows out with --data.bad_rows drop", 'or leave such rows out with bad_rows="drop"'),
        ("resume it with `strop resume 'my runs/a'`, or", 'resume it with `strop.resume("my runs/a")`, or'),
        ("see `strop runs`", "see `strop runs` in a terminal"),
        ("see `strop resume --help`", "see `help(strop.resume)`"),
        ("`strop export gguf X --type f16 --data ...`", '`strop.export("gguf", "X", type="f16", data=...)`'),
        ("give it with --data rows.jsonl", 'give it with data="rows.jsonl"'),
        (
            "--data.columns 'prompt=a b,completion=c' (no header)",
            'columns={"prompt": "a b", "completion": "c"} (no header)',
        ),
        ("--data.max_length 512, with --train.exact true", "max_length=512, with exact=True"),
        ("give another folder with --out, or leave --type out", "give another folder with out=..., or leave type out"),
        ("for example --train.epochs 3 --lora.r 8", "for example epochs=3, r=8"),
        ("choose --data.overlong drop or split (1 is)", 'choose overlong="drop" or "split" (1 is)'),
        ("or choose --data.overlong drop or leave it out", 'or choose overlong="drop" or leave it out'),
        ("give --model.name and --data.train", "give model=... and data=..."),
        ("compare: --over lora.r=8,16,32", 'compare: over={"lora.r": [8, 16, 32]}'),
        ("--over train.learning_rate=1e-4..1e-3", 'over={"train.learning_rate": (1e-4, 1e-3)}'),
        ("more memory, or --no-parity, which", "more memory, or measure=False, which"),
        ("`pip install --force-reinstall torch`", "`pip install --force-reinstall torch`"),
        ("--memory much: not a size", 'memory="much": not a size'),
        ("--lora.lora_alpha", "lora.lora_alpha"),
    ],
)
def test_messages_are_written_in_python(text: str, expected: str) -> None:
    assert in_python(text) == in_python(expected) == expected


def test_error_attributes_are_in_python_and_in_the_terminal_as_options(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a"\n')
    with pytest.raises(InputError) as raised:
        strop.train(model=tiny_folder, data=rows, lora={"r": "x"})
    assert raised.value.where[0].file == raised.value.as_json()["where"][0]["file"] == "lora.r"
    with pytest.raises(InputError) as raised:
        strop.train(model=tiny_folder, data=rows)
    assert 'bad_rows="drop"' in raised.value.fix and "--" not in str(raised.value)
    code, out, err = run("train", "--model", tiny_folder, "--data", rows, "--json", capsys=capsys)
    assert code == 2 and "--data.bad_rows drop" in err and "--data.bad_rows drop" in json.loads(out)["error"]["fix"]
    assert "⟦" not in str(strop.check(model=tiny_folder, data=rows))
    shown = strop.check(model=tiny_folder, data=rows, show=1)
    assert "⟦" in str(shown) and "⟦" in shown._repr_html_() and shown["rows"]
    table = strop.check(model=tiny_folder, data=rows)._repr_html_()
    assert "bad_rows=&quot;drop&quot;" in table and "--data" not in table


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: strop.evaluate(None, "rows.jsonl"), "run: a path or a name, not NoneType"),
        (lambda: strop.evaluate([3], "rows.jsonl"), "run: a path or a name, not int"),
        (lambda: strop.load(3), "name: a path or a name, not int"),
        (lambda: strop.merge(3, "x"), "run: a path or a name, not int"),
        (lambda: strop.load("demo", load_in_4bit=True), "load_in_4bit (did you mean quantization='nf4'?)"),
        (lambda: strop.evaluate([], "rows.jsonl"), "the list of runs is empty"),
        (lambda: strop.evaluate("demo", "rows.jsonl", model="demo"), "did you mean run?"),
        (lambda: strop.evaluate("demo", "rows.jsonl", "contains"), 'by name, such as metric="contains"'),
        (lambda: strop.load(model="demo"), "did you mean name?"),
        (lambda: strop.export(format="gguf", run="demo", out="x"), "did you mean target?"),
        (lambda: strop.export("gguf", "demo", "x", quant="f16"), "did you mean type?"),
        (lambda: strop.train(model="demo", data="rows.jsonl", resume_existing="yes"), "resume_existing is 'yes'"),
        (lambda: strop.plan(model="demo", memory=8), 'memory 8: only 8 bytes\nFix: write memory="8GB"'),
        (lambda: strop.Sampling(temperature=-1), "temperature: must be at least 0 (got -1)"),
        (lambda: strop.Sampling(top_p=2), "top_p: must be above 0 and at most 1 (got 2)"),
        (lambda: strop.Sampling(top_k=-1), "top_k: must be at least 0 (got -1)"),
        (lambda: strop.Sampling(temperature="hot"), "temperature: must be a number (got 'hot')"),
        (lambda: strop.train("demo", "rows.jsonl"), "2 arguments by position"),
        (lambda: strop.merge("runs/mine"), "missing a required argument: 'out'"),
        (lambda: strop.evaluate("demo", "rows.jsonl", metrics="exact"), "did you mean metric?"),
        (lambda: strop.evaluate("demo", "rows.jsonl", max_tokens=8), "did you mean max_new_tokens?"),
        (lambda: strop.evaluate("demo", "rows.jsonl", batch_size=8), "unknown argument batch_size"),
        (lambda: strop.train(model="demo", data="rows.jsonl", callbacks=[print]), "did you mean callback?"),
        (
            lambda: strop.train(model="demo", train_dataset="rows.jsonl"),
            'train_dataset: unknown key (did you mean data="rows.jsonl"?)',
        ),
        (lambda: strop.train(model="demo", task="classify"), 'unknown key (did you mean objective="classify"?)\nFix: '),
        (lambda: strop.train(model="demo", lora_r=8), "lora_r: unknown key (did you mean rank=8?)\nFix: "),
        (lambda: strop.train(model="demo", load_in_4bit=True), '(did you mean quantization="nf4"?)'),
        (lambda: strop.train(model="demo", data="rows.jsonl", eval=0.2), '(got 0.2)\nFix: for example eval="20%"'),
        (lambda: strop.train(), "model and data are required\nFix: give model=... and data=..., or a recipe file"),
        (lambda: strop.train(model="demo", data=None), "data is required\nFix: give data=..., or a recipe file"),
        (lambda: strop.train(model=3, data="rows.jsonl"), "model: must be text (got 3)\nFix: correct it"),
        (lambda: strop.plan(model="demo", gpu="RTX 4091"), 'or give memory="24GB" and device="cuda"'),
        (lambda: strop.sweep(model="demo", data="rows.jsonl"), 'over={"lora.r": [8, 16, 32]}'),
        (lambda: strop.sweep(model="demo", data="rows.jsonl", over=[8]), "over: a dictionary of fields"),
        (lambda: strop.sweep(model="demo", data="rows.jsonl", over={"lr": 1e-4}), "a tuple such as (1e-4, 1e-3)"),
        (lambda: strop.train(model="demo", lora=8), 'lora: a dictionary such as {"r": 8}, not 8'),
    ],
)
def test_arguments_that_do_not_fit_raise_input_errors(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(InputError) as raised:
        call()
    assert message in str(raised.value)


@pytest.mark.parametrize(
    "settings", [{"temperature": "hot"}, {"max_new_tokens": 2.5}, {"top_k": None}, {"temprature": 1}]
)
def test_sampling_settings_that_are_no_numbers_raise_input_errors(settings: dict[str, Any], bold: Model) -> None:
    for answer in (bold.generate, bold.chat):
        with pytest.raises(InputError, match=next(iter(settings))):
            answer("hi", **settings)


def test_missing_run_next_to_others_is_no_hub_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("runs/mine").mkdir(parents=True)
    for name in ("recipe.yaml", "lock.json"):
        Path("runs/mine", name).touch()
    with pytest.raises(InputError, match=re.escape("(did you mean runs/mine?)")) as raised:
        strop.load("runs/min")
    assert "Hub" not in str(raised.value).partition("Fix")[0] and "OFFLINE" not in str(raised.value)


def test_results_are_short_in_a_prompt_and_tables_when_printed(
    tiny_folder: Path, rows_file: Path, tmp_path: Path
) -> None:
    run = strop.train(model=tiny_folder, data=rows_file, out=tmp_path / "run", **QUICK)
    plan, model = strop.plan(model=tiny_folder, data=rows_file), strop.load(run)
    assert all(len(repr(result)) < 400 and "\n" not in repr(result) for result in (run, plan, model))
    assert repr(str(run.folder)) in repr(run) and "steps=3, finished=True" in repr(run) and "fits=True" in repr(plan)
    assert repr(model).startswith("Model(") and str(run.folder / "adapter") in repr(model)
    evaluated = strop.evaluate(run, rows_file, max_new_tokens=2)
    checked, compared = strop.check(model=tiny_folder, data=rows_file), strop.compare_methods(gpu="RTX 3060")
    tables = (run, plan, evaluated, checked, compared)
    texts = ("loss ", "peak memory in MiB", "not a fair test, because", "24 rows read", "QLoRA (nf4)")
    for result, text in zip(tables, texts, strict=True):
        assert text in str(result) and "\x1b" not in str(result) and len(str(result).splitlines()) > 4
    assert json.loads(json.dumps(evaluated)) == evaluated and json.loads(json.dumps(checked)) == checked


def test_fields_are_accepted_by_short_name_and_by_their_last_part(tiny_folder: Path) -> None:
    forms: list[dict[str, Any]] = [
        {"train": {"learning_rate": 1e-3, "epochs": 2}, "lora": {"r": 4}},
        {"train": {"lr": 1e-3, "epochs": 2}, "lora": {"rank": 4}},
        {"lr": 1e-3, "epochs": 2, "r": 4},
        {"learning_rate": 1e-3, "train.epochs": 2, "rank": 4},
    ]
    recipes = [strop.plan(model=tiny_folder, **form).resolved.recipe for form in forms]
    assert all(recipe == recipes[0] for recipe in recipes)
    assert (recipes[0].train.learning_rate, recipes[0].train.epochs, recipes[0].lora.r) == (1e-3, 2, 4)
    with pytest.raises(InputError, match="given twice"):
        strop.plan(model=tiny_folder, lr=1, train={"learning_rate": 1})


def test_examples_of_the_public_functions_run(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The examples share one folder and run in the order of a user's work; pushing is tested elsewhere."""
    monkeypatch.chdir(tmp_path)
    row = {"prompt": "lunch with Ana, 12.50 eur", "completion": "food"}
    for name in ("rows.jsonl", "held_out.jsonl"):
        Path(name).write_text("".join(json.dumps(row | {"completion": f"food {n}"}) + "\n" for n in range(12)))
    names = ("check", "plan", "compare_methods", "train", "resume", "evaluate", "load", "merge", "export")
    namespace: dict[str, Any] = {"strop": strop}
    for name in names:
        examples = doctest.DocTestParser().get_examples(inspect.getdoc(getattr(strop, name)) or "")
        assert examples, name
        for example in examples:
            exec(example.source.replace('"demo"', repr(str(tiny_folder))), namespace)
    assert Path("mine-merged/config.json").is_file() and Path("mine.gguf").is_file()


def test_first_rows_are_checked_once_a_command(
    tiny_folder: Path,
    rows_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    checked: list[str] = []
    monkeypatch.setattr("strop.data.prepare.has_bad_rows", lambda data, data_kind: bool(checked.append(data.train)))
    words = ("--model", tiny_folder, "--data", rows_file, "--out", tmp_path / "run", "--max-steps", 1)
    code, _, err = run("train", *words, capsys=capsys)
    assert code == 0 and checked == [str(rows_file)], err


def test_adapter_is_chosen_by_its_folder_name(adapter_folders: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    model = strop.load(str(adapter_folders[0]))
    model.add(str(adapter_folders[1]))
    session = Session(model, "tuned", None, 4, Sampling())
    assert session.run_command(f"/adapter {adapter_folders[1].name}")
    assert model.module.active_adapter == model.others[str(adapter_folders[1])]
    assert session.run_command("/adapter nothing")
    error = "".join(capsys.readouterr().err.split())
    assert f"nothing: not loaded; loaded: {adapter_folders[0]}, {adapter_folders[1]}".replace(" ", "") in error
