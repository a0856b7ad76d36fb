"""Rows of train.keep: the model's own answers to general prompts."""

from __future__ import annotations

import gc
import io
import json
import re
import shutil
import weakref
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from rich.console import Console
from safetensors.numpy import load_file

import strop
from strop.config.load import Choice, resolve
from strop.config.schema import KEEP_SHARE, Recipe
from strop.data.prepare import prepare
from strop.data.store import JoinedItems
from strop.data.types import Example
from strop.errors import DataError, RecipeError
from strop.evaluation.general import load_questions
from strop.models.source import Source
from strop.planning import keep as planning_keep
from strop.planning.plan import print_plan
from strop.runs.events import read_events
from strop.training import build, keep
from strop.training.keep import _choose
from tests.support import tiny, tool_templates
from tests.support.runs import run
from tests.support.slow import slow_except

QUICK: dict[str, Any] = {"train.max_steps": 4, "model.dtype": "fp32", "train.micro_batch_tokens": 512}


@pytest.fixture(scope="module")
def talker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a tiny model that ends its answers."""
    folder = tmp_path_factory.mktemp("talker")
    rows = [{"prompt": text, "completion": "yes"} for text in ("who?", "Where is it?", "Say: a", "1 + 2", "List it.")]
    options: dict[str, Any] = {"train.max_steps": 60, "train.learning_rate": 0.02, "model.dtype": "fp32"}
    tuned = strop.train(model=tiny.save_tiny(folder / "tiny"), data=rows, out=folder / "run", **options)
    strop.merge(tuned.folder, folder / "model", dtype="fp32", measure=False)
    return folder / "model"


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    lines = [json.dumps({"prompt": f"count to {n}", "completion": f"{n} and {n + 1}"}) + "\n" for n in range(24)]
    (tmp_path / "rows.jsonl").write_text("".join(lines), encoding="utf-8")
    return tmp_path / "rows.jsonl"


def read(file: Path) -> list[list[dict[str, Any]]]:
    return [json.loads(line)["messages"] for line in file.read_text(encoding="utf-8").split("\n")[:-1]]


def test_answers_before_training_are_mixed_in(talker: Path, rows: Path, tmp_path: Path) -> None:
    model = strop.load(talker)
    events: list[dict[str, Any]] = []
    done = strop.train(
        model=talker, data=rows, out=tmp_path / "run", callback=events.append, **{**QUICK, "train.keep": 0.5}
    )
    kept = read(done.folder / "kept.jsonl")
    assert len(kept) >= keep.MIN_ROWS
    single = [turns for turns in kept if len(turns) == 2][:8]
    assert model.generate([turns[0]["content"] for turns in single], max_new_tokens=keep.MAX_NEW_TOKENS) == [
        turns[1]["content"] for turns in single
    ]
    for *_, answer in kept:
        assert answer["role"] == "assistant" and "weight" not in answer
    assert all(turn.get("weight") == 0 for turns in kept for turn in turns[:-1] if turn["role"] == "assistant")
    (note,) = [event["text"] for event in events if event["event"] == "note" and "train.keep" in event["text"]]
    assert "general prompts, 5" in note and note.endswith("% of the tokens")  # 50 to 59 %


def test_resumed_run_has_the_same_rows_without_its_cache(
    talker: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {**QUICK, "train.keep": 0.15, "train.save_steps": 2}
    whole = strop.train(model=talker, data=rows, out=tmp_path / "whole", **options)

    def stop(event: dict[str, Any]) -> None:
        if event["event"] == "save" and event["step"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(BaseException):  # noqa: B017
        strop.train(model=talker, data=rows, out=tmp_path / "cut", callback=stop, **options)
    monkeypatch.setattr(keep, "_load", lambda *_: pytest.fail("loaded again"))
    monkeypatch.setenv("STROP_CACHE", str(tmp_path / "empty"))
    resumed = strop.resume(tmp_path / "cut")
    assert resumed.report["steps"] == whole.report["steps"] == 4
    adapters = [(tmp_path / name / "adapter" / "adapter_model.safetensors").read_bytes() for name in ("whole", "cut")]
    assert adapters[0] == adapters[1]


def test_second_run_reads_the_answers_of_the_first(
    talker: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STROP_CACHE", str(tmp_path / "cache"))
    options = {**QUICK, "train.keep": 0.15}
    first = strop.train(model=talker, data=rows, out=tmp_path / "first", **options)
    monkeypatch.setattr(keep, "_load", lambda *_: pytest.fail("loaded again"))
    second = strop.train(model=talker, data=rows, out=tmp_path / "second", **options)
    for name in ("kept.jsonl", "kept.safetensors"):
        assert (first.folder / name).read_bytes() == (second.folder / name).read_bytes()


def test_model_that_answered_is_gone_when_training_loads_its_own(
    talker: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answered: list[weakref.ref[Any]] = []

    def load(recipe: Recipe, source: Source) -> Any:
        model = load_answering(recipe, source)
        answered.append(weakref.ref(model.module))
        return model

    def load_to_train(*args: Any, **options: Any) -> Any:
        assert len(answered) == 1 and answered[0]() is None
        return load_base(*args, **options)

    load_answering, load_base = keep._load, build.load_base
    monkeypatch.setattr(keep, "_load", load)
    monkeypatch.setattr(build, "load_base", load_to_train)
    monkeypatch.setenv("STROP_CACHE", str(tmp_path / "cache"))
    thresholds = gc.get_threshold()
    gc.set_threshold(0)  # no collection by chance
    try:
        strop.train(model=talker, data=rows, out=tmp_path / "run", **{**QUICK, "train.keep": 0.5})
    finally:
        gc.set_threshold(*thresholds)


def test_steps_count_the_kept_rows(talker: Path, rows: Path, tmp_path: Path) -> None:
    options = {"model.dtype": "fp32", "train.epochs": 1, "train.keep": 0.5}
    done = strop.train(model=talker, data=rows, out=tmp_path / "run", **options)
    (start,) = [event for event in read_events(done.folder / "events.jsonl") if event["event"] == "start"]
    assert done.report["steps"] == start["steps"] > 24 / 8


def test_plan_counts_kept_rows(talker: Path, rows: Path, capsys: pytest.CaptureFixture[str]) -> None:
    planned = []
    for more in ([], ["--train.keep", "0.5"]):
        code, out, err = run("plan", "--model", talker, "--data", rows, *more, "--json", capsys=capsys)
        assert code == 0, err
        planned.append(json.loads(out))
    assert planned[0]["data"]["rows"] == planned[1]["data"]["rows"] == 24
    assert planned[1]["seconds"] - planned[1]["data"]["answer_seconds"] > planned[0]["seconds"] > 0


def test_kept_rows_are_refused_where_they_cannot_help(
    tiny_folder: Path, talker: Path, rows: Path, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=r"train.keep: objective reward"):
        strop.train(model=talker, data=rows, **{"train.keep": 0.15, "train.objective": "reward"})
    short = [{"prompt": "a", "completion": "b"}] * 8
    with pytest.raises(RecipeError, match="1 of 409 answered prompts can be rows of this recipe"):
        strop.train(model=talker, data=short, out=tmp_path / "run", max_length=16, **{**QUICK, "train.keep": 0.15})
    assert not (tmp_path / "run").exists()
    text = tmp_path / "text.jsonl"
    text.write_text('{"text": "once upon a time"}\n' * 8, encoding="utf-8")
    bare = tmp_path / "bare"
    tiny.save_tiny(bare)
    (bare / "chat_template.jinja").unlink()
    with pytest.raises(RecipeError, match="need a chat template"):
        strop.train(model=bare, data=text, out=tmp_path / "run", **{**QUICK, "train.keep": 0.15})


def test_loss_is_that_of_the_own_rows(talker: Path, rows: Path, tmp_path: Path) -> None:
    """Kept rows do not change the shown loss, and do not look like steps that went wrong."""
    options = {"model.dtype": "fp32", "train.epochs": 2, "train.batch_size": 1}
    steps = {}
    for share in (None, 0.5):
        done = strop.train(model=talker, data=rows, out=tmp_path / str(share), **options, **{"train.keep": share})
        events = list(read_events(done.folder / "events.jsonl"))
        steps[share] = [event for event in events if event["event"] == "step"]
        assert not [event for event in events if event["event"] in ("rollback", "doubt", "skip")]
    only_kept = [event for event in steps[0.5] if event.get("kept") == event["loss"]]
    assert only_kept and all(0 <= event["kept"] < 1 for event in only_kept)
    own = next(event for event in steps[0.5] if "kept" not in event)
    assert own["loss"] == pytest.approx(steps[None][0]["loss"], abs=2)
    options = {**QUICK, "train.max_steps": 1, "train.batch_size": 500}  # all rows in one step
    losses = [
        strop.train(model=talker, data=rows, out=tmp_path / f"all-{share}", **options, **{"train.keep": share}).report[
            "loss"
        ]["first"]
        for share in (None, 0.5)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.parametrize("objective", slow_except(["dpo", "kto", "orpo"], ["dpo"]))
def test_preferences_keep_too(talker: Path, tmp_path: Path, objective: str) -> None:
    """The loss is that of the pairs, and a model that has not changed has no divergence."""
    pairs = [
        {"prompt": f"count to {n}", "chosen": f"{n} and {n + 1}", "rejected": f"no {n} and {2 * n + 3}"}
        for n in range(8)
    ]
    options = {"objective": objective, "max_steps": 3, "batch_size": 100, "save_steps": 1, "lr": 0.01}
    results = {}
    for share in (None, 0.3):
        out = tmp_path / str(share)
        done = strop.train(model=talker, data=pairs, out=out, dtype="fp32", **options, **{"train.keep": share})
        results[share] = [event for event in read_events(done.folder / "events.jsonl") if event["event"] == "step"]
    plain, kept = results[None][0], results[0.3][0]
    assert kept["loss"] == pytest.approx(plain["loss"], rel=1e-5) and abs(kept["kept"]) < 1e-5
    assert kept["accuracy"] == plain["accuracy"] and results[0.3][2]["kept"] > 1e-5

    def stop(event: dict[str, Any]) -> None:
        if event["event"] == "save" and event["step"] == 1:
            raise KeyboardInterrupt

    with pytest.raises(BaseException):  # noqa: B017
        strop.train(
            model=talker,
            data=pairs,
            out=tmp_path / "cut",
            dtype="fp32",
            callback=stop,
            **options,
            **{"train.keep": 0.3},
        )
    strop.resume(tmp_path / "cut")
    adapters = [(tmp_path / name / "adapter" / "adapter_model.safetensors").read_bytes() for name in ("0.3", "cut")]
    assert adapters[0] == adapters[1]


def test_prompts_with_new_tokens_are_left_out(talker: Path, rows: Path, tmp_path: Path) -> None:
    """The model has no probabilities of a token that is added."""
    options = {**QUICK, "train.keep": 0.5}
    done = strop.train(model=talker, data=rows, out=tmp_path / "run", new_tokens=["What"], **options)
    assert done.report["steps"] == 4
    with pytest.raises(RecipeError, match="0 of 409 answered prompts can"):  # each answer has an "s"
        strop.train(model=talker, data=rows, out=tmp_path / "none", new_tokens=["es"], **options)


def test_rows_of_training_are_recognised(talker: Path, rows: Path, tmp_path: Path) -> None:
    done = strop.train(model=talker, data=rows, out=tmp_path / "run", **{**QUICK, "train.keep": 0.5})
    assert strop.evaluate(done, rows, max_new_tokens=2)["train_rows"] == 24


def test_answers_are_of_the_adapter_that_training_starts_from(talker: Path, rows: Path, tmp_path: Path) -> None:
    """Another adapter at the same path has other probabilities."""
    start = tmp_path / "start"
    for seed in (1, 2):
        shutil.rmtree(start, ignore_errors=True)
        strop.train(model=talker, data=rows, out=start, seed=seed, **QUICK)
        options = {**QUICK, "train.keep": 0.5, "adapter": start}
        strop.train(model=talker, data=rows, out=tmp_path / f"{seed}", **options)
    files = [(tmp_path / name / "kept.safetensors").read_bytes() for name in ("1", "2")]
    assert files[0] != files[1]


def test_base_is_that_of_the_run_and_not_that_of_the_adapter(talker: Path, rows: Path, tmp_path: Path) -> None:
    """An adapter of another tool names the path of its base on the machine where it was trained."""
    options = {**QUICK, "train.keep": 0.5, "train.save_steps": 100}
    started = strop.train(model=talker, data=rows, out=tmp_path / "first", **QUICK).folder / "adapter"
    for n, base in enumerate(("/home/someone/model", str(tiny.save_tiny(tmp_path / "other")))):
        foreign = tmp_path / f"foreign-{n}"
        foreign.mkdir()
        config = json.loads((started / "adapter_config.json").read_text(encoding="utf-8"))
        shutil.copy(started / "adapter_model.safetensors", foreign)
        (foreign / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": base}))
        run = strop.train(model=talker, data=rows, adapter=foreign, out=tmp_path / f"run-{n}", **options)
        assert next(event["kept"] for event in read_events(run.folder / "events.jsonl") if "kept" in event) < 1e-4


def test_damaged_probabilities_are_computed_again(talker: Path, rows: Path, tmp_path: Path) -> None:

    def stop(event: dict[str, Any]) -> None:
        if event["event"] == "save" and event["step"] == 2:
            raise KeyboardInterrupt

    options = {**QUICK, "train.keep": 0.5, "train.save_steps": 2}
    with pytest.raises(BaseException):  # noqa: B017
        strop.train(model=talker, data=rows, out=tmp_path / "run", callback=stop, **options)
    file = tmp_path / "run" / "kept.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:1000])
    assert strop.resume(tmp_path / "run").report["steps"] == 4
    assert file.read_bytes() == whole


@pytest.mark.parametrize(("tokens", "share", "rows"), [(90, 0.1, 1), (90, 0.5, 9), (200, 0.5, 20), (10, 0.01, 1)])
def test_rows_are_chosen_by_their_tokens(tokens: int, share: float, rows: int) -> None:
    chosen = _choose(np.full(10, 10), tokens, share)
    assert len(chosen) == rows and chosen.tolist() == [i % 10 for i in range(rows)]


def test_each_epoch_has_the_next_rows() -> None:
    examples = [Example(np.array([n, n]), np.array([0, 1], np.float32), "", n) for n in range(7)]

    class Own(list[Example]):
        lengths = supervised = labels = np.ones(1, np.int64)

    joined = JoinedItems(Own(examples[:1]), examples, np.arange(3))  # type: ignore[arg-type]
    lines = [[joined.item(i, epoch).line for i in range(len(joined))] for epoch in range(3)]
    assert lines == [[0, 0, 1, 2], [0, 3, 4, 5], [0, 6, 0, 1]]


def test_no_prompt_resembles_a_general_question() -> None:
    """No prompt shares four words in a row with a question, or 60 % of the words of both."""

    def words(text: str) -> list[str]:
        return [re.sub("s$", "", word) for word in re.findall(r"\w+", text.lower())]

    def grams(text: str) -> set[tuple[str, ...]]:
        return {tuple(words(text)[i : i + 4]) for i in range(len(words(text)) - 3)}

    prompts = (Path(keep.__file__).parent / "general_prompts.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
    asked = [json.loads(line)["messages"][-1]["content"] for line in prompts]
    assert len(asked) > 250
    prompt_parts = [(prompt, set(words(prompt)), grams(prompt)) for prompt in asked]
    for question in load_questions():
        text = question.messages[-1].content
        own_words, own_grams = set(words(text)), grams(text)
        for prompt, prompt_words, prompt_grams in prompt_parts:
            common, both = own_words & prompt_words, own_words | prompt_words
            assert not own_grams & prompt_grams and len(common) < 0.6 * len(both), (text, prompt)


def test_labels_are_the_probabilities_before_training(talker: Path, rows: Path, tmp_path: Path) -> None:
    """The answers are greedy, so the answer's token has the largest probability of the ids."""
    done = strop.train(model=talker, data=rows, out=tmp_path / "run", **{**QUICK, "train.keep": 0.5})
    saved = load_file(done.folder / "kept.safetensors")
    ids, probs = saved["ids"], saved["probs"]
    assert ids.shape == probs.shape and ids.shape[1] == keep.TOP_K
    assert (np.diff(probs, axis=1) <= 0).all() and (probs.sum(1) < 1.001).all()
    module, tokenizer = strop.load(talker, dtype="fp32").module, strop.load(talker).tokenizer
    first = json.loads((done.folder / "kept.jsonl").read_text(encoding="utf-8").split("\n")[:-1][0])["messages"]
    prompt = tokenizer.apply_chat_template(first[:-1], add_generation_prompt=True, return_tensors="pt")
    prompt = getattr(prompt, "input_ids", prompt)
    with torch.no_grad():
        expected = torch.softmax(module(input_ids=prompt).logits[0, -1].float(), -1)
    np.testing.assert_allclose(probs[0], expected[torch.from_numpy(ids[0]).long()].numpy(), rtol=1e-3)


def with_system(file: Path, number: int, *, without: int = 0) -> Path:
    """Write rows with a system prompt, of which the last `without` have none."""
    turns = [
        {"role": "user", "content": "count to nine, please"},
        {"role": "assistant", "content": "1 2 3 4 5 6 7 8 9"},
    ]
    system = {"role": "system", "content": "Count."}
    rows = [{"messages": [system, *turns]}] * (number - without) + [{"messages": turns}] * without
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def decided(model: Path, data: Path, **options: Any) -> Choice:
    return strop.plan(model=model, data=data, **options).resolved.choices["train.keep"]


def test_long_runs_on_rows_with_system_prompts_keep_by_default(talker: Path, tmp_path: Path) -> None:
    data = with_system(tmp_path / "rows.jsonl", 2000)
    assert decided(talker, data).value == KEEP_SHARE
    plan = strop.plan(model=talker, data=data)
    off = strop.plan(model=talker, data=data, **{"train.keep": "off"})
    assert plan.data["rows"] == off.data["rows"] == 2000
    assert plan.seconds is not None and off.seconds is not None
    assert plan.seconds - plan.data["answer_seconds"] > 1.1 * off.seconds
    plan.data["answer_seconds"] = 75.0
    console = Console(width=120, record=True, file=io.StringIO())
    print_plan(plan, console)
    text = console.export_text()
    assert "train.keep = 0.15  the rows have a system prompt" in text
    assert "of which 1 min 15 s once to answer general prompts" in " ".join(text.split())
    assert re.search(r"added to short runs: this one has [\d,]+ tokens", decided(talker, data, epochs=0.1).why)
    assert decided(talker, data, **{"train.max_steps": 2}).value == "off"
    assert decided(talker, data, **{"train.keep": "off"}).origin == "option"
    assert decided(talker, data, **{"train.keep": None}).value == "off"  # the recipe.yaml of an earlier version
    mixed = with_system(tmp_path / "mixed.jsonl", 2000, without=20)
    assert "may be meant to change all answers" in decided(talker, mixed).why
    text_rows = tmp_path / "text.jsonl"
    text_rows.write_text(json.dumps({"text": "all about counting " * 20}) + "\n", encoding="utf-8")
    assert decided(talker, text_rows, epochs=2000).why == "the rows are plain text"
    sharded = {"train.keep": "auto", "model.placement": "sharded"}
    assert "sharded" in strop.plan(model=talker, data=data, devices=2, **sharded).resolved.choices["train.keep"].why


def test_prompts_of_a_file(talker: Path, rows: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    system = {"role": "system", "content": "Be\u2028brief."}  # a separator of lines, but not in JSON Lines
    lines = [{"messages": [system, {"role": "user", "content": f"Say: {n}"}]} for n in range(10)]
    lines += [
        {"messages": [{"role": "user", "content": f"{n} + 1"}, {"role": "assistant", "content": "x"}]}
        for n in range(10)
    ]
    mine = tmp_path / "mine.jsonl"
    mine.write_text("".join(json.dumps(line) + "\n" for line in lines))
    options = {**QUICK, "train.keep": 0.5, "train.keep_prompts": str(mine)}
    done = strop.train(model=talker, data=rows, out=tmp_path / "run", **options)
    kept = read(done.folder / "kept.jsonl")
    assert {turns[-2]["content"] for turns in kept} <= {f"Say: {n}" for n in range(10)} | {
        f"{n} + 1" for n in range(10)
    }
    assert len(kept) >= keep.MIN_ROWS and not any(turns[-1]["content"] == "x" for turns in kept)
    assert sum(turns[0]["role"] == "system" for turns in kept) >= 8
    with mine.open("a") as file:
        file.write(json.dumps({"messages": [{"role": "user", "content": "long " * 3000}]}) + "\n")
    caplog.set_level("INFO", logger="strop")
    strop.train(model=talker, data=rows, out=tmp_path / "long", **options)
    assert any("1 of 21 prompts of" in record.getMessage() for record in caplog.records)
    (tmp_path / "few.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines[:8]))
    with pytest.raises(RecipeError, match=r"8 of 8 answered prompts can be.*\n.*give 16 prompts") as caught:
        strop.train(model=talker, data=rows, **{**options, "train.keep_prompts": str(tmp_path / "few.jsonl")})
    assert "max_length" not in str(caught.value)
    with pytest.raises(RecipeError, match=r"train.keep_prompts: needs a share"):
        strop.train(model=talker, data=rows, **{"train.keep_prompts": str(mine)})
    with pytest.raises(DataError, match=r"nope.jsonl"):
        strop.train(model=talker, data=rows, **{**options, "train.keep_prompts": "nope.jsonl"})


def test_prompts_of_a_file_keep_their_tools(rows: Path, tmp_path: Path) -> None:
    """The model answers, and the kept rows show, what the template makes of the tools and of earlier calls."""
    model = tiny.save_tiny(tmp_path / "tiny")
    encoder = tool_templates.tokenizer("qwen3")
    tiny.model(vocab_size=len(encoder)).save_pretrained(model)
    encoder.save_pretrained(model)
    tools = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}]
    call = {"id": "c", "type": "function", "function": {"name": "add", "arguments": {"x": 1}}}
    asked = {"role": "assistant", "content": "", "tool_calls": [call], "weight": 0}
    lines = [
        {"messages": [{"role": "user", "content": f"sum {n}"}, *more], "tools": tools}
        for n in range(12)
        for more in ([], [asked, {"role": "tool", "content": f"{n}", "name": "add", "tool_call_id": "c"}])
    ]
    mine = tmp_path / "mine.jsonl"
    mine.write_text("".join(json.dumps(line) + "\n" for line in lines))
    options = {**QUICK, "train.keep": 0.5, "train.keep_prompts": str(mine), "data.max_length": 2000}
    done = strop.train(model=model, data=rows, out=tmp_path / "run", **options)
    kept = [json.loads(line) for line in (done.folder / "kept.jsonl").read_text("utf-8").splitlines()]
    assert [{**row, "messages": row["messages"][:-1]} for row in kept] == lines
    shown = prepare(resolve(None, {"model": "x", "data": str(done.folder / "kept.jsonl")}).recipe.data, encoder)
    assert all("<tools>" in encoder.decode(row.ids) for row in shown.train)
    assert sum("<tool_response>" in encoder.decode(row.ids) for row in shown.train) == 12


def test_prompts_without_an_answer_are_counted(
    rows: Path, talker: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = keep._answer
    monkeypatch.setattr(keep, "_answer", lambda *arguments: answer(*arguments)[3:])
    mine = tmp_path / "mine.jsonl"
    mine.write_text("".join(json.dumps({"prompt": f"{n} + 1"}) + "\n" for n in range(18)))
    caplog.set_level("INFO", logger="strop")
    with pytest.raises(RecipeError, match="give 16 prompts that the model answers"):
        options = {**QUICK, "train.keep": 0.5, "train.keep_prompts": str(mine)}
        strop.train(model=talker, data=rows, out=tmp_path / "run", **options)
    assert any("3 of 18 prompts are left out: no answer" in record.getMessage() for record in caplog.records)


def test_rows_are_checked_at_random(talker: Path, tmp_path: Path) -> None:
    data = with_system(tmp_path / "rows.jsonl", 2000, without=1000)
    lines = data.read_text().splitlines(keepends=True)
    data.write_text("".join(line for pair in zip(lines[:1000], lines[1000:], strict=True) for line in pair))
    assert "may be meant to change all answers" in decided(talker, data).why


def test_default_is_off_where_general_prompts_cannot_be_used(
    talker: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning_keep, "MIN_TOKENS", 100)
    data = with_system(tmp_path / "rows.jsonl", 24)
    assert decided(talker, data, max_length=100).why == "data.max_length 100 is too short for general prompts"
    monkeypatch.setattr(keep, "MIN_ROWS", 10**6)
    done = strop.train(model=talker, data=data, out=tmp_path / "run", **QUICK)
    chosen = yaml.safe_load((done.folder / "recipe.yaml").read_text())["train"]["keep"]
    assert chosen in ("off", False)
    with pytest.raises(RecipeError, match="answered prompts can be rows"):
        strop.train(model=talker, data=data, out=tmp_path / "asked", **QUICK, **{"train.keep": 0.15})


def test_answers_are_those_of_the_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names: list[str] = []
    monkeypatch.setattr("strop.engine.decode.model.load", lambda name, **_: names.append(name))
    for model in ({"name": "me/m", "revision": "old"}, {"name": "me/m"}):
        recipe = resolve(None, {"model": model["name"], "data": "d", "model.revision": model.get("revision")}).recipe
        keep._load(recipe, Source("me/m", "folder", tmp_path))
    assert names == ["me/m@old", "me/m"]


def test_run_keeps_by_default_and_records_the_share(
    talker: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning_keep, "MIN_TOKENS", 100)
    data = with_system(tmp_path / "rows.jsonl", 24)
    events: list[dict[str, Any]] = []
    done = strop.train(model=talker, data=data, out=tmp_path / "run", callback=events.append, **QUICK)
    assert any(event["event"] == "note" and "general prompts, 1" in event["text"] for event in events)
    assert yaml.safe_load((done.folder / "recipe.yaml").read_text())["train"]["keep"] == KEEP_SHARE
    again = strop.train(
        model=talker, data=data, out=tmp_path / "run", resume_existing=True, **QUICK
    )  # the same command, which leaves train.keep out
    assert again.folder == done.folder


def test_run_without_the_option_in_its_recipe_is_resumed_without_kept_rows(
    talker: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = with_system(tmp_path / "rows.jsonl", 24)

    def stop(event: dict[str, Any]) -> None:
        if event["event"] == "save" and event["step"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(BaseException):  # noqa: B017
        strop.train(model=talker, data=data, out=tmp_path / "run", callback=stop, **{**QUICK, "train.save_steps": 2})
    file = tmp_path / "run" / "recipe.yaml"
    lines = [line for line in file.read_text().splitlines(keepends=True) if not line.strip().startswith("keep:")]
    file.write_text("".join(lines))
    monkeypatch.setattr(planning_keep, "MIN_TOKENS", 100)
    assert strop.resume(tmp_path / "run").report["steps"] == 4


def test_load_of_the_answers_is_that_of_the_prompts() -> None:
    prompts = (files(keep.__package__) / "general_prompts.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
    assert (planning_keep.ANSWERS.completions, planning_keep.ANSWERS.answer) == (len(prompts), keep.MAX_NEW_TOKENS)
