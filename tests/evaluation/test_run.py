"""`strop eval`: several models, metrics, regression rows, interruption, training rows, and the model card."""

from __future__ import annotations

import errno
import io
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

import strop
from strop import testing
from strop.data.rendering.render import Renderer
from strop.data.types import Conversation, Message
from strop.engine.decode.batch import Batch
from strop.engine.decode.generate import Completion
from strop.engine.decode.model import Model
from strop.errors import DataError, InputError, RecipeError
from strop.evaluation import compare as comparing
from strop.evaluation import run as evaluation
from strop.evaluation.run import EvalOptions, evaluate_models, rank_models, read_conversations
from strop.evaluation.train_rows import find_train_rows
from tests.support.families import tokenizer
from tests.support.runs import QUICK, run
from tests.support.templates import tokenizer as of_trait
from tests.support.tiny import model as tiny


def rows(path: Path, pairs: list[tuple[str, str]]) -> Path:
    path.write_text("".join(json.dumps({"prompt": p, "completion": c}) + "\n" for p, c in pairs), encoding="utf-8")
    return path


COLOURS = [(f"what is {n}", ("green", "green", "red", "blue")[n % 4]) for n in range(12)]


@pytest.fixture(scope="module")
def trained_runs(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with colours.jsonl and runs/ of it: short and long."""
    folder = tmp_path_factory.mktemp("trained")
    data = rows(folder / "colours.jsonl", COLOURS)
    options: dict[str, Any] = {"train.batch_size": 4, "train.learning_rate": 0.02, "lora.r": 4, "model.dtype": "fp32"}
    for name, steps in (("short", 1), ("long", 40)):
        strop.train(model=tiny_folder, data=data, out=folder / "runs" / name, **options, **{"train.max_steps": steps})
    return folder


@pytest.fixture
def runs(trained_runs: Path, tmp_path: Path) -> list[Path]:
    shutil.copytree(trained_runs, tmp_path, dirs_exist_ok=True)
    return [tmp_path / "runs" / name for name in ("short", "long")]


def test_check_from_python_equals_the_command(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = rows(tmp_path / "colours.jsonl", COLOURS)
    _, out, _ = run("check", "--model", tiny_folder, "--data", data, "--json", capsys=capsys)
    result = strop.check(model=str(tiny_folder), data=str(data))
    assert result == json.loads(out) and result["rows"]["used"] == 12


def test_choice_takes_the_answer_with_the_highest_likelihood(runs: list[Path], tmp_path: Path) -> None:
    """The likelihoods are those of the model's own forward pass."""
    result = strop.evaluate(runs[1], str(tmp_path / "colours.jsonl"), metric="choice")
    model = strop.load(runs[1])
    for sample in result["samples"]:
        likely = {}
        for answer in ("red", "green", "blue"):
            turns = Message("user", sample["prompt"]), Message("assistant", answer)
            example = model.renderer.render(Conversation("f", 1, turns))[0]
            ids = torch.tensor(example.ids.tolist())
            with torch.no_grad():
                logs = model.module(ids[None]).logits[0, :-1].float().log_softmax(-1)
            likely[answer] = float((logs.gather(1, ids[1:, None])[:, 0] * torch.tensor(example.weights[1:])).sum())
        assert sample["tuned"] == max(likely, key=lambda answer: likely[answer])
    right = [sample["tuned"] == sample["gold"] for sample in result["samples"]]
    assert result["tuned"]["choice"] == sum(right) / 12 and "stop_rate" not in result["tuned"]
    wrong = next(n for n, sample in enumerate(result["samples"]) if sample["tuned"] != sample["gold"])
    rotated = rows(tmp_path / "rotated.jsonl", [*COLOURS[wrong:], *COLOURS[:wrong]])
    limited = strop.evaluate(runs[1], str(rotated), metric="choice", limit=1)  # among the right answers of all rows
    assert limited["samples"][0]["tuned"] == result["samples"][wrong]["tuned"] and limited["tuned"]["choice"] == 0
    # A gold that differs in white space does not stand for the others, whichever row is first.
    spaced = [(*COLOURS[0][:1], "green        tea"), (COLOURS[1][0], "green tea"), (COLOURS[2][0], "red    red red")]
    hits = []
    for order in (spaced, spaced[::-1]):
        answers = strop.evaluate(runs[1], str(rows(tmp_path / "spaced.jsonl", order)), metric="choice")["samples"]
        hits.append({sample["prompt"]: sample["tuned_hit"] for sample in answers})
    assert hits[0] == hits[1]
    with pytest.raises(DataError, match="1 different right answers"):
        strop.evaluate(runs[1], str(rows(tmp_path / "one.jsonl", COLOURS[:1])), metric="choice")


def test_loss_from_generation_equals_the_training_step(
    runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows have one to three turns."""
    turns = [[{"role": "user", "content": text}, {"role": "assistant", "content": answer}] for text, answer in COLOURS]
    data = tmp_path / "turns.jsonl"
    lines = [json.dumps({"messages": [turn for both in turns[:n] for turn in both]}) for n in (1, 2, 3)]
    data.write_text("\n".join(lines), encoding="utf-8")
    model = strop.load(runs[1])
    expected = comparing._compute_loss(model, comparing.make_questions(read_conversations(str(data))), [])
    monkeypatch.setattr(comparing, "summed_loss", None)  # the training step is not used
    result = strop.evaluate(runs[1], str(data))
    assert result["tuned"]["loss"] == pytest.approx(expected, rel=0.02)
    assert result["base"]["loss"] > result["tuned"]["loss"] + 1


@pytest.fixture(scope="module")
def alphabet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of run/, which has learned rows.jsonl: four rows whose answers have 95 tokens."""
    folder = tmp_path_factory.mktemp("alphabet")
    answer = "".join(map(chr, range(33, 127)))
    data = rows(folder / "rows.jsonl", [(f"say {n}", answer) for n in range(4)])
    testing.tiny_run(folder, data=data, **{"train.max_steps": 60, "train.learning_rate": 0.03, "lora.r": 16})
    return folder


def test_answers_may_be_longer_than_the_longest_reference(alphabet: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run("eval", alphabet / "run", "--data", alphabet / "rows.jsonl", "--json", capsys=capsys)
    result = json.loads(out)
    assert code == 0 and result["tuned"]["exact"] == 1 and "reference answers are longer" not in err
    assert result["answers"] == {"max_tokens": 119, "references_cut": 0, "base_cut": 4, "tuned_cut": 0}
    assert "4 of 4 base answers were cut at 119 tokens" in " ".join(err.split())


def test_references_longer_than_the_limit_are_reported(
    alphabet: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    words = ["--data", alphabet / "rows.jsonl", "--max-new-tokens", "80", "--json"]
    cut = "4 of 4 reference answers are longer than the limit of 80 tokens"
    code, out, err = run("eval", alphabet / "run", *words, "--regression-data", words[1], capsys=capsys)
    assert code == 0 and json.loads(out)["tuned"]["exact"] == 0
    text = " ".join(err.split())
    assert "4 of 4 reference answers are longer than an answer may be (80 tokens)" in caplog.text  # before answering
    assert f"not a fair test, because {cut}" in text and f"regression rows: {cut}" in text
    assert f"- {cut}" in (alphabet / "run" / "adapter" / "README.md").read_text()
    assert cut in (alphabet / "run" / "report.html").read_text()
    metric = [*words[:-1], "--metric", "regex", "--json"]
    data = rows(alphabet / "patterns.jsonl", [("say 0", "(?:" + "|".join("abcdefghi" * 10) + ")")])
    code, out, _ = run("eval", alphabet / "run", "--data", data, *metric[2:], capsys=capsys)
    assert json.loads(out)["answers"]["references_cut"] == 0  # the length of a pattern is not that of an answer


def test_model_reports_cut_answers(alphabet: Path, capsys: pytest.CaptureFixture[str], caplog: Any) -> None:
    model = strop.load(alphabet / "run")
    model.chat("say 0")
    assert not caplog.messages
    model.chat("say 0", max_new_tokens=20)
    model.generate(["say 0", "say 1"], max_new_tokens=30)
    assert caplog.messages == [
        f"{number} cut at {tokens} tokens; max_new_tokens sets the limit"
        for number, tokens in (("the answer was", 20), ("2 of 2 answers were", 30))
    ]


def test_json_answers_that_are_compared_as_text_are_noted(alphabet: Path) -> None:
    def notes(*answers: str, **options: str) -> list[str]:
        data = rows(alphabet / "json.jsonl", [(f"say {n}", answer) for n, answer in enumerate(answers)])
        evaluation = strop.evaluate(alphabet / "model", data, max_new_tokens=2, **options)
        return [note for note in evaluation["notes"] if "--metric exact_json" in note]

    (note,) = notes('{"a": 1}', '{"a": 2}', '{"a": 3}')
    assert note.startswith("all right answers are JSON objects")
    assert not notes('{"a": 1}', '{"a": 2}', "three") and not notes("1", "2", "3")
    assert not notes('{"a": 1}', '{"a": 2}', '{"a": 3}', metric="exact")  # given, not the default


def test_repeated_rows_are_noted(alphabet: Path) -> None:
    data = rows(alphabet / "repeated.jsonl", [("say 0", "no"), ("say 1", "no"), ("say 0", "no")])
    notes = strop.evaluate(alphabet / "model", data, max_new_tokens=2)["notes"]
    assert "1 of 3 rows repeat an earlier one: the intervals are too narrow, as they assume different rows" in notes
    notes = strop.evaluate(alphabet / "run", rows(data, COLOURS[:2]), max_new_tokens=2)["notes"]
    assert "no difference is claimed on fewer than 3 rows" in notes and not any("repeat" in note for note in notes)


def test_learned_positions_limit_each_row(tmp_path: Path) -> None:
    folder = testing.tiny_model(tmp_path / "model")
    size = len(AutoTokenizer.from_pretrained(folder))
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=size, n_positions=128, n_embd=32, n_layer=2, n_head=2, eos_token_id=256)
    GPT2LMHeadModel(config).save_pretrained(folder)
    (folder / "generation_config.json").unlink()
    data = rows(tmp_path / "rows.jsonl", [("x" * 60, "yes"), ("hi", "no")])
    result = strop.evaluate(folder, data)
    model = strop.load(folder)
    prompts = [model.renderer.prompt([Message("user", text)]) for text in ("x" * 60, "hi")]
    tokens = [answer.tokens for answer in model.answer(prompts, max_new_tokens=80)]
    assert tokens == [128 - len(prompts[0]), 80] and result["base"]["tokens_per_answer"] == sum(tokens) / 2
    result = strop.evaluate(folder, rows(data, [("hi", "y" * 90)]), max_new_tokens=80)
    assert result["answers"]["references_cut"] == 1
    with pytest.raises(DataError, match="1 rows have more tokens than the 128 positions"):
        strop.evaluate(folder, rows(data, [("hi", "no"), ("x" * 60, "y" * 60)]))


def test_chat_reports_a_cut_answer(
    alphabet: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for limit, is_cut in (("20", True), ("120", False)):
        monkeypatch.setattr(sys, "stdin", io.StringIO("say 0\n"))
        code, out, err = run("chat", alphabet / "run", "--max-new-tokens", limit, capsys=capsys)
        assert code == 0 and out.startswith('!"#$%') and ("cut at its maximum length" in err) == is_cut


def test_rows_without_a_right_answer_are_left_out_and_listed(
    runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    question, answer, follow_up = ({"role": role, "content": role} for role in ("user", "assistant", "user"))
    rest = [[question, answer, follow_up], [question, answer, follow_up, {**answer, "weight": 0}]]
    data, both = tmp_path / "colours.jsonl", tmp_path / "both.jsonl"
    words = ["--max-new-tokens", "2", "--json"]
    both.write_text("".join(json.dumps({"messages": turns}) + "\n" for turns in rest))
    code, out, err = run("eval", runs[0], "--data", data, "--data", both, *words, capsys=capsys)
    result = json.loads(out)
    assert code == 0 and result["rows"] == 12 and "left out: 2 rows: " in err
    whys = ["does not end with an answer", "its answer has weight 0"]
    assert result["left_out"] == [{"file": str(both), "line": n, "what": why} for n, why in enumerate(whys, 1)]
    alone = strop.evaluate(runs[0], str(data), max_new_tokens=2)
    assert alone["left_out"] == [] and alone["tuned"]["loss"] == result["tuned"]["loss"]
    code, _, err = run("eval", runs[0], "--data", both, *words, capsys=capsys)
    assert code == 2 and f"{both}:1: does not end with an answer" in err
    text = tmp_path / "poem.txt"
    text.write_text("one\n\ntwo\n")
    code, _, err = run("eval", runs[0], "--data", text, "--data.format", "auto", *words, capsys=capsys)
    assert code == 2 and err.count("poem.txt") == 1 and "the loss on text is in the report" in err, err


def test_rows_are_read_with_the_options_of_the_run(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table, usual = tmp_path / "table.csv", rows(tmp_path / "usual.jsonl", COLOURS)
    table.write_text("Frage,Antwort\n" + "".join(f"été {n},grün\n" for n in range(4)), encoding="cp1252")
    columns = ["--data.columns", "prompt=Frage,completion=Antwort"]
    short, run_folders = [*QUICK, "--train.max_steps", "1"], [tmp_path / "table", tmp_path / "usual"]
    words = ["train", "--model", tiny_folder, "--data", table, "--out", run_folders[0], *short, *columns]
    code, _, err = run(*words, "--data.encoding", "cp1252", capsys=capsys)
    assert code == 0, err
    ask = ["--max-new-tokens", "2", "--json"]
    code, out, err = run("eval", run_folders[0], "--data", table, *ask, capsys=capsys)
    result = json.loads(out)
    assert code == 0 and result["rows"] == result["train_rows"] == 4 and result["samples"][0]["gold"] == "grün"
    assert any("data.columns, prompt=Frage,completion=Antwort" in note for note in result["notes"])
    assert any("data.encoding, cp1252; for others give --data.encoding utf-8" in note for note in result["notes"])
    code, _, err = run("eval", run_folders[0], "--data", usual, *ask, capsys=capsys)
    assert code == 2 and "for others give --data.columns none" in err
    code, out, err = run("eval", run_folders[0], "--data", usual, "--data.columns", "none", *ask, capsys=capsys)
    assert code == 0 and json.loads(out)["rows"] == 12
    code, _, err = run("train", "--model", tiny_folder, "--data", usual, "--out", run_folders[1], *short, capsys=capsys)
    assert code == 0, err
    code, _, err = run("eval", *run_folders, "--data", table, *ask, capsys=capsys)
    assert code == 2 and "different data.columns: prompt=Frage,completion=Antwort, none" in err
    options = {"data.columns": {"prompt": "Frage", "completion": "Antwort"}, "data.encoding": "cp1252"}
    assert strop.evaluate(run_folders[1], str(table), max_new_tokens=2, **options)["rows"] == 4
    assert strop.evaluate(run_folders[0], str(usual), max_new_tokens=2, columns="none")["rows"] == 12
    with pytest.raises(RecipeError, match=r"data\.columns"):
        strop.evaluate(run_folders[0], str(usual), columns="prompt=prompt")
    with pytest.raises(InputError, match=r"data\.column \(did you mean columns"):
        strop.evaluate(run_folders[1], str(table), **{"data.column": {}})


def test_several_models_are_ranked_and_share_their_base(
    runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    compare = evaluation.compare
    monkeypatch.setattr(evaluation, "compare", lambda *a, **k: calls.append(str(k["base"] is None)) or compare(*a, **k))
    data = tmp_path / "colours.jsonl"
    code, out, err = run("eval", *runs, "--data", data, "--metric", "choice", "--json", capsys=capsys)
    result = json.loads(out)
    assert code == 0 and [line["run"] for line in result["leaderboard"]] == [str(runs[1]), str(runs[0])]
    best, last = result["leaderboard"]
    assert best["behind"]["value"] == 0 and last["behind"]["value"] == pytest.approx(best["score"] - last["score"])
    assert (best["behind"], best["verdict"]) == ({"value": 0, "low": 0, "high": 0}, "best")
    assert last["verdict"] in ("worse", "unclear")
    assert last["low"] <= last["score"] <= last["high"] and "gap to the best" in err
    assert calls == ["True", "False"]  # the base is evaluated once
    single = strop.evaluate(runs[0], str(data), metric="choice")
    assert result["runs"][0]["base"] == single["base"] and result["runs"][0]["tuned"] == single["tuned"]


@pytest.mark.parametrize("flag", ["--general", "--judge"])
def test_ctrl_c_in_the_general_set_or_the_judge_keeps_the_scores_of_the_rows(
    runs: list[Path], tmp_path: Path, flag: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stopped(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluation, "compare_general", stopped)
    monkeypatch.setattr(evaluation, "compare_by_judge", stopped)
    file = tmp_path / "own.py"
    file.write_text("def own(asked, gold, first, second):\n    return 0\n")
    words = ["eval", runs[0], "--data", tmp_path / "colours.jsonl", "--max-new-tokens", "2", "--json"]
    further = [flag] if flag == "--general" else [flag, f"{file}:own"]
    code, out, err = run(*words, *further, capsys=capsys)
    part = "the general set" if flag == "--general" else "the judge"
    assert code == 130 and json.loads(out)["unfinished"] == part and json.loads(out)["rows"] == 12
    assert f"interrupted in {part}; the scores of the rows are complete" in err and (
        "tuned minus base" in err or "not a fair test" in err
    )
    report = json.loads((runs[0] / "report.json").read_text())
    assert report["evaluation"]["rows"] == 12 and "judge" not in report["evaluation"]


@pytest.mark.parametrize("metric", ["exact", "choice"])
def test_base_after_its_runs_is_not_evaluated_again(
    runs: list[Path], tiny_folder: Path, tmp_path: Path, metric: str
) -> None:
    names, data = [str(runs[0]), str(tiny_folder)], str(tmp_path / "colours.jsonl")
    first, last = evaluate_models(names, data, EvalOptions(metric=metric, max_new_tokens=4))
    assert last["base"] == first["base"] and "tuned" not in last
    assert {line["run"] for line in rank_models([first, last])} == set(names)


def test_equal_models_have_no_clear_difference(runs: list[Path], tmp_path: Path) -> None:
    names, options = [str(runs[1])] * 2, EvalOptions(metric="choice")
    results = evaluate_models(names, str(tmp_path / "colours.jsonl"), options)
    assert [line["verdict"] for line in rank_models(results)] == ["best", "unclear"]


def test_unfair_evaluations_have_no_verdict(alphabet: Path, tiny_folder: Path) -> None:
    names = [str(alphabet / "run"), str(tiny_folder)]
    rows(alphabet / "many.jsonl", [(f"say {n % 4}", "".join(map(chr, range(33, 127)))) for n in range(20)])
    results = evaluate_models(names, str(alphabet / "many.jsonl"), EvalOptions())
    for result in results:
        result.pop("train_rows", None)
    assert [line["verdict"] for line in rank_models(results)] == ["best", "worse"]
    results[1]["answers"]["references_cut"] = 1
    assert [line["verdict"] for line in rank_models(results)] == ["best", "unclear"]


def test_losses_of_other_tokens_are_not_compared(tiny_folder: Path, tmp_path: Path) -> None:
    data = rows(tmp_path / "rows.jsonl", [("hi", "x y"), ("you", "z")])
    own = testing.tiny_run(tmp_path, model=tiny_folder, data=data, **{"lora.new_tokens": ["x y"]}).folder
    compared = strop.evaluate([own, tiny_folder], data)
    assert [result["supervised_tokens"] for result in compared["runs"]] == [4, 6]
    assert [entry["loss"] for entry in compared["leaderboard"]] == [None, None]
    same = strop.evaluate([tiny_folder, str(tiny_folder)], data)
    assert all(entry["loss"] > 0 for entry in same["leaderboard"])


def interrupt_comparison(monkeypatch: pytest.MonkeyPatch, here: Callable[[dict[str, Any]], bool]) -> None:
    """Interrupt the fourth decoder pass of comparisons with certain options."""
    step, compare, passes = Batch.step, evaluation.compare, iter(range(99))

    def interrupted(self: Batch) -> Any:
        if next(passes) == 3:
            raise KeyboardInterrupt
        return step(self)

    def comparing(*args: Any, **options: Any) -> Any:
        if here(options):
            monkeypatch.setattr(Batch, "step", interrupted)
        return compare(*args, **options)

    monkeypatch.setattr(evaluation, "compare", comparing)
    monkeypatch.setattr("strop.engine.decode.batch.MAX_SEQUENCES", 4)


def test_interrupted_run_is_not_ranked(
    runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    interrupt_comparison(monkeypatch, lambda options: options["base"] is not None)  # the second run
    words = ["--data", tmp_path / "colours.jsonl", "--max-new-tokens", "2", "--json"]
    code, out, err = run("eval", *runs, *words, capsys=capsys)
    assert code == 130, err
    result = json.loads(out)
    assert result["runs"][0]["rows"] == 12 > result["runs"][1]["rows"] > 0
    second = result["runs"][1]
    alone = strop.evaluate(runs[1], str(rows(tmp_path / "first.jsonl", COLOURS[: second["rows"]])), max_new_tokens=2)
    for name in ("exact", "loss"):  # of the answered rows, as those of the tuned model
        assert second["base"][name] == pytest.approx(alone["base"][name], rel=1e-3)
        assert second["tuned"][name] == pytest.approx(alone["tuned"][name], rel=1e-3)
    assert [line["run"] for line in result["leaderboard"]] == [str(runs[0])]


@pytest.mark.parametrize("name", ["loss", "stop_rate"])
def test_metric_with_the_name_of_another_figure_is_refused(name: str, tiny_folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "own.py"
    file.write_text(f"def {name}(gold, answer):\n    return True\n")
    with pytest.raises(RecipeError, match="another score"):
        strop.evaluate(tiny_folder, str(rows(tmp_path / "rows.jsonl", COLOURS)), metric=f"{file}:{name}")


def test_regression_rows_and_general_set_are_in_report_and_card(
    runs: list[Path], tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    card = runs[1] / "adapter" / "README.md"
    before = card.read_text()
    assert "| chat template | an answer ends with <\\|im_end\\|> |" in before
    assert "fingerprint" in before and "vllm serve" in before and "| held-out rows |" not in before
    assert "was not evaluated on held-out rows" in before
    other = rows(tmp_path / "other.jsonl", [("say a", "a"), ("say b", "b")])
    data = tmp_path / "colours.jsonl"
    words = ["eval", runs[1], "--data", data, "--metric", "choice", "--regression-data", other, "--json"]
    code, out, err = run(*words, "--regression-metric", "contains", "--general", capsys=capsys)
    result = json.loads(out)
    assert code == 0 and result["regression"]["rows"] == 2 and result["regression"]["metric"] == "contains"
    assert "rows that should not get worse" in err
    report = json.loads((runs[1] / "report.json").read_text())
    assert report["regression"]["difference"] == result["regression"]["difference"]
    after = card.read_text()
    assert "was not evaluated on held-out rows" not in after and "was not measured" not in after
    assert "12 rows: choice" in after and "2 rows: contains" in after and "340 rows" in after
    assert "should not get worse" in (runs[1] / "report.html").read_text()
    words = ["eval", runs[1], "--data", data, "--metric", "choice", "--quantization", "nf4", "--json"]
    code, out, err = run(*words, capsys=capsys)  # its base is another one
    note = "removed from the report: earlier scores of the general set and the regression rows, measured with"
    assert code == 0 and note in " ".join(err.split()) and note in json.loads(out)["notes"][-1]
    report = json.loads((runs[1] / "report.json").read_text())
    assert not {"general", "regression"} & {*report} and "340 rows" not in card.read_text()
    code, out, err = run(*words, "--regression-data", other, capsys=capsys)
    assert "removed" not in err and "regression" in json.loads((runs[1] / "report.json").read_text())
    code, _, err = run(*words[:-3], "--regression-data", other, capsys=capsys)
    assert code == 0 and "removed" not in err  # measured again
    code, _, err = run("eval", tiny_folder, "--data", data, "--regression-data", other, capsys=capsys)
    assert code == 2 and "no adapter" in err
    weights, identity = (runs[1] / "adapter" / name for name in ("adapter_model.safetensors", "strop.json"))
    save_file({name: value * 1.5 for name, value in load_file(weights).items()}, weights, {"format": "pt"})
    identity.unlink()
    code, out, err = run(*words[:-3], "--json", capsys=capsys)
    note = json.loads(out)["notes"][-1]
    assert code == 0 and note.startswith("removed from the report: earlier scores of the regression rows")
    assert note.endswith("another adapter")


HARNESS_DATA = """
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
"""
TASK = (
    HARNESS_DATA
    + """task: colours
output_type: multiple_choice
doc_to_text: "{{{{prompt}}}}"
doc_to_target: "{{{{completion}}}}"
doc_to_choice: ["red", "green", "blue"]
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""
)


def test_harness_tasks_are_compared(runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("lm_eval")
    data = tmp_path / "colours.jsonl"
    (tmp_path / "task.yaml").write_text(TASK.format(file=data), encoding="utf-8")
    words = ["eval", runs[1], "--data", data, "--metric", "choice", "--tasks", tmp_path / "task.yaml", "--json"]
    code, out, err = run(*words, capsys=capsys)
    result = json.loads(out)["tasks"]["colours"]["acc"]
    assert code == 0 and result["documents"] == 12 and result["difference"]["low"] <= result["tuned"] - result["base"]
    assert "colours" in err and "colours" in (runs[1] / "report.html").read_text()
    code, _, err = run("eval", runs[1], "--data", data, "--tasks", "no_such_task", capsys=capsys)
    assert code == 2 and "no such task" in err


FILTERED_TASK = (
    HARNESS_DATA
    + """task: filtered
output_type: generate_until
doc_to_text: "{{{{prompt}}}}"
doc_to_target: "{{{{completion}}}}"
generation_kwargs: {{until: ["\\n"], max_gen_toks: 2}}
filter_list:
  - {{name: nothing, filter: [{{function: regex, regex_pattern: "(never)"}}, {{function: take_first}}]}}
  - {{name: anything, filter: [{{function: regex, regex_pattern: "(.*)"}}, {{function: take_first}}]}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""
)
PERPLEXITY_TASK = (
    HARNESS_DATA
    + """task: perplexity
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{prompt}}}} {{{{completion}}}}"
metric_list: [{{metric: byte_perplexity}}]
"""
)


def test_harness_filters_documents_and_groups(
    runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One metric with two filters has two rows; documents are counted where samples have no scores, and in groups."""
    pytest.importorskip("lm_eval")
    data, files = tmp_path / "colours.jsonl", {"filtered": FILTERED_TASK, "perplexity": PERPLEXITY_TASK}
    for name, text in files.items():
        (tmp_path / f"{name}.yaml").write_text(text.format(file=data), encoding="utf-8")
    (tmp_path / "group.yaml").write_text("group: both\ntask: [filtered, perplexity]\n", encoding="utf-8")
    words = ["eval", runs[1], "--data", data, "--metric", "choice", "--tasks", tmp_path / "filtered.yaml"]
    code, out, _ = run(*words, "--tasks", tmp_path / "perplexity.yaml", "--json", capsys=capsys)
    tasks = json.loads(out)["tasks"]
    assert code == 0 and set(tasks["filtered"]) == {"exact_match,nothing", "exact_match,anything"}
    assert tasks["filtered"]["exact_match,nothing"]["tuned"] == 0
    assert {name: value["documents"] for name, value in tasks["perplexity"].items()} == {"byte_perplexity": 12}
    code, _, err = run(*words, "--tasks", tmp_path / "group.yaml", capsys=capsys)
    assert code == 2 and "a task or a group that has it, not both" in err


def test_missing_harness_is_an_error_with_its_install_command(
    runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    code, _, err = run("eval", runs[0], "--data", tmp_path / "colours.jsonl", "--tasks", "arc_easy", capsys=capsys)
    assert code == 2 and "pip install lm-eval" in err


def test_ctrl_c_keeps_the_answered_rows(
    runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    step, passes = Batch.step, iter(range(99))

    def interrupted(self: Batch) -> Any:
        if next(passes) == 5:
            raise KeyboardInterrupt
        return step(self)

    held_out = rows(tmp_path / "held.jsonl", COLOURS)
    monkeypatch.setattr(Batch, "step", interrupted)
    monkeypatch.setattr("strop.engine.decode.batch.MAX_SEQUENCES", 4)
    words = ["--data", held_out, "--max-new-tokens", "2", "--general", "--json"]
    code, out, err = run("eval", runs[0], *words, capsys=capsys)
    result = json.loads(out)
    assert code == 130 and 0 < result["rows"] < 12 and len(result["samples"]) == result["rows"]
    assert result["interrupted"] == f"after {result['rows']} of 12 rows" and result["interrupted"] in err
    assert "general" not in result and result["error"]["kind"] == "Stopped"  # one object, which a script can read
    assert json.loads((runs[0] / "report.json").read_text())["evaluation"]["rows"] == result["rows"]


def test_interrupted_evaluation_does_not_replace_a_complete_one(
    runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "colours.jsonl"
    words = ["eval", runs[0], "--data", data, "--regression-data", data, "--max-new-tokens", "2", "--json"]
    page, card, report = runs[0] / "report.html", runs[0] / "adapter" / "README.md", runs[0] / "report.json"
    with monkeypatch.context() as partly:
        interrupt_comparison(partly, lambda _: True)
        when = json.loads(run(*words, capsys=capsys)[1])["interrupted"]
    assert f"rows (interrupted {when})" in page.read_text() and f"rows (interrupted {when})" in card.read_text()
    assert run(*words, capsys=capsys)[0] == 0  # a complete one replaces it
    whole = [file.read_bytes() for file in (page, report, runs[0] / "answers.json")]
    assert b'"interrupted"' not in whole[1]
    with monkeypatch.context() as partly:
        interrupt_comparison(partly, lambda _: True)
        code, out, err = run(*words, capsys=capsys)
    assert code == 130 and f"{report.parent} keeps the earlier evaluation, of 12 rows" in json.loads(out)["notes"][-1]
    assert "keeps the earlier evaluation" in err
    assert [file.read_bytes() for file in (page, report, runs[0] / "answers.json")] == whole
    with monkeypatch.context() as partly:  # the same for regression rows
        interrupt_comparison(partly, lambda options: "base" not in options)
        assert run(*words, capsys=capsys)[0] == 130
    assert json.loads(report.read_text())["regression"]["rows"] == 12


def test_evaluation_of_a_read_only_run_is_printed(
    runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def read_only(path: Path, value: Any) -> None:
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    monkeypatch.setattr(evaluation, "write_json", read_only)
    words = ["--data", tmp_path / "colours.jsonl", "--max-new-tokens", "2", "--json"]
    code, out, err = run("eval", runs[0], *words, capsys=capsys)
    result = json.loads(out)
    assert code == 0 and result["rows"] == 12
    assert result["notes"][-1] == f"not stored in the report of {runs[0]}: read-only file system"
    assert "not stored in the report" in err


def test_ctrl_c_in_the_regression_rows_is_reported(
    runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    interrupt_comparison(monkeypatch, lambda options: "base" not in options)  # the second evaluation
    data, unchanged = tmp_path / "colours.jsonl", rows(tmp_path / "kept.jsonl", COLOURS)
    words = ["--data", data, "--regression-data", unchanged, "--max-new-tokens", "2", "--json"]
    code, out, err = run("eval", runs[0], *words, capsys=capsys)
    result = json.loads(out)
    assert code == 130 and result["rows"] == 12 > result["regression"]["rows"] > 0
    assert f"interrupted {result['regression']['interrupted']}" in err


TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
ASKED = Message("user", "three?")


@pytest.fixture(scope="module")
def thinker(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """Return a tiny model whose template shows reasoning and calls."""
    folder, its = tmp_path_factory.mktemp("thinker"), tokenizer("qwen3")
    tiny(vocab_size=len(its)).save_pretrained(folder)
    its.save_pretrained(folder)
    return strop.load(folder)


def ending(content: str, *, calls: bool = False, reasoning: str | None = None, number: int = 3) -> Conversation:
    call = {"type": "function", "function": {"name": "f", "arguments": {"a": number}}}
    last = Message("assistant", content, reasoning, (call,) if calls else ())
    return Conversation("rows.jsonl", 1, (ASKED, last), (TOOL,) if calls else ())


def generated_text(model: Model, row: Conversation) -> str:
    """Return the text of a model that has memorized a row."""
    [example], turns = model.renderer.render(row), row.messages
    start = len(model.renderer.prompt(turns[:-1], row.tools, options=model.renderer.options_for(turns)))
    return str(model.tokenizer.decode(example.ids[start:-1], skip_special_tokens=True))


def scored(
    model: Model, rows: list[Conversation], texts: list[str], metric: str, monkeypatch: pytest.MonkeyPatch
) -> float:
    monkeypatch.setattr(comparing, "generate_answers", lambda *_, **__: [Completion(text, 1, True) for text in texts])
    return float(comparing.compare(model, rows, metric=metric)["base"][metric])


def test_calls_and_reasoning_are_judged_as_generated(thinker: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        ending("3"), ending("", calls=True), ending("so:", calls=True),
        ending("3", reasoning="one more"), ending("", calls=True, reasoning="one more"),
    ]  # fmt: skip
    texts = [generated_text(thinker, row) for row in rows]
    assert texts[1].startswith("<tool_call>") and texts[3] == "<think>\none more\n</think>\n\n3"
    assert scored(thinker, rows, texts, "exact", monkeypatch) == 1
    assert scored(thinker, rows, texts, "contains", monkeypatch) == 1
    others = [ending("3", reasoning="by heart"), ending("", calls=True)]  # other reasoning, or none
    for row, other in zip(rows[3:], others, strict=True):
        assert scored(thinker, [row], [generated_text(thinker, other)], "exact", monkeypatch) == 1
    wrong = [ending("", calls=True, number=4), ending("4", reasoning="3")]
    for row, other in zip([rows[1], rows[3]], wrong, strict=True):
        assert scored(thinker, [row], [generated_text(thinker, other)], "contains", monkeypatch) == 0


def test_judge_gets_answers_without_reasoning(thinker: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = {"role": "assistant", "content": "3", "reasoning_content": "one more"}
    data, file = tmp_path / "rows.jsonl", tmp_path / "own.py"
    data.write_text(json.dumps({"messages": [{"role": "user", "content": "three?"}, row]}), encoding="utf-8")
    file.write_text("def own(asked, gold, first, second):\n    return (first == gold) - (second == gold)\n")
    sample = {
        "prompt": "three?",
        "gold": "3",
        "base": "<think>\nso\n</think>\n\n4",
        "tuned": "<think>\n1\n</think>\n\n3",
    }
    actual = {"rows": 1, "base": {}, "tuned": {}, "samples": [sample | {"base_hit": False, "tuned_hit": True}]}
    for name, value in (
        ("compare", actual), ("load", thinker), ("adapter_folder", tmp_path),
        ("adapter_kind", "text"), ("check_adapter_kind", None), ("find_train_rows", None), ("is_tuned", True)
    ):  # fmt: skip
        monkeypatch.setattr(evaluation, name, lambda *_, value=value, **__: value)
    (result,) = evaluate_models(["demo"], str(data), EvalOptions(judge=f"{file}:own"))
    assert (result["judge"]["wins"], result["judge"]["ties"]) == (1, 0)


def test_rows_without_reasoning_are_judged_by_their_text(thinker: Model) -> None:
    row = ending(" <think>as a text</think> three  ")
    assert [question.gold for question in comparing.make_questions([row], thinker.renderer)] == [row.answer]
    text = "<think>\nanswers are not changed\n</think>\n\n3"
    assert thinker.renderer.without_reasoning(text, row.messages[-1]) == text


@pytest.mark.parametrize(
    ("chat_tokenizer", "reasoning_ends"),
    [(tokenizer("qwen3"), ["</think>"]), (of_trait("opens-with-switch"), []), (tokenizer("chatml"), [])],
)
def test_end_of_reasoning_is_found_unless_it_is_a_special_token(chat_tokenizer: Any, reasoning_ends: list[str]) -> None:
    assert Renderer(chat_tokenizer).reasoning_ends == reasoning_ends


def test_choice_does_not_see_the_right_reasoning(thinker: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, prompts, render = [ending(word, reasoning=f"it is {word}") for word in ("red", "blue")], [], Renderer.render
    monkeypatch.setattr(Renderer, "render", lambda self, row: prompts.append(row.messages[-1]) or render(self, row))
    comparing.compare(thinker, rows, metric="choice")
    options = [turn for turn in prompts if turn not in [row.messages[-1] for row in rows]]
    assert [turn.content for turn in options] == ["red", "blue"] * 2 and not any(turn.reasoning for turn in options)


def test_calls_are_refused_by_choice_and_exact_json(thinker: Model, tmp_path: Path) -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": {"a": [3]}}}
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    data = tmp_path / "calls.jsonl"
    data.write_text(json.dumps({"tools": [TOOL], "messages": turns}), encoding="utf-8")
    for metric, message in (("choice", "choice: tool calls"), ("exact_json", "cannot be scored")):
        with pytest.raises(DataError, match=message) as raised:
            evaluate_models([thinker.name], str(data), EvalOptions(metric=metric))
        assert raised.value.where[0].line == 1


ROWS = [{"prompt": f"what is {n}", "completion": f"it is {n}"} for n in range(8)]
NEW = {"prompt": "what is nine", "completion": "it is 9"}


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def train(folder: Path, data: Path, out: str, **options: Any) -> str:
    small = {"train.max_steps": 1, "train.batch_size": 4, "lora.r": 2, "model.dtype": "fp32"}
    strop.train(model=str(folder), data=str(data), out=str(data.parent / out), **{**small, **options})
    return str(data.parent / out)


@pytest.fixture
def trained(tiny_folder: Path, tmp_path: Path) -> str:
    return train(tiny_folder, write(tmp_path / "train.jsonl", ROWS), "trained")


def known(name: str, path: Path, rows: list[dict[str, Any]]) -> list[bool] | None:
    return find_train_rows(name, read_conversations(str(write(path, rows))))


def test_train_rows_are_recognized_in_any_format(trained: str, tmp_path: Path) -> None:
    turns = [{"role": "user", "content": ROWS[3]["prompt"]}, {"role": "assistant", "content": ROWS[3]["completion"]}]
    assert known(trained, tmp_path / "a.jsonl", [ROWS[0], NEW]) == [True, False]
    assert known(f"{trained}/adapter", tmp_path / "b.jsonl", [{"messages": turns}]) == [True]


def test_unknown_training_rows_return_none(trained: str, tiny_folder: Path, tmp_path: Path) -> None:
    train_file, elsewhere = tmp_path / "train.jsonl", tmp_path / "elsewhere"
    shutil.copytree(Path(trained) / "adapter", elsewhere)
    for name in (str(elsewhere), str(tiny_folder)):
        assert known(name, tmp_path / "a.jsonl", [NEW]) is None
    write(train_file, ROWS[1:])  # the training data has changed
    assert known(trained, tmp_path / "a.jsonl", ROWS[:1]) is None
    train_file.unlink()
    assert known(trained, tmp_path / "a.jsonl", [NEW]) is None


def test_held_out_share_is_not_trained_on(tiny_folder: Path, tmp_path: Path) -> None:
    name = train(tiny_folder, write(tmp_path / "train.jsonl", ROWS), "trained", eval="50%")
    result = known(name, tmp_path / "a.jsonl", ROWS)
    number = json.loads((Path(name) / "report.json").read_text())["data_report"]["held_out"]
    assert result is not None and 0 < number == result.count(False) < len(ROWS)


def test_rows_of_the_run_it_started_from_count(trained: str, tiny_folder: Path, tmp_path: Path) -> None:
    pair = {"prompt": NEW["prompt"], "chosen": NEW["completion"], "rejected": "no"}
    options = {"model.adapter": trained, "train.objective": "dpo"}
    further = train(tiny_folder, write(tmp_path / "pairs.jsonl", [pair]), "further", **options)
    other = {"prompt": "what is ten", "completion": "it is 10"}
    assert known(further, tmp_path / "a.jsonl", [ROWS[0], NEW, other]) == [True, True, False]


@pytest.mark.parametrize("way", ["full", "full again", "merged", "merged and moved"])
def test_rows_of_the_run_that_its_base_comes_from_count(way: str, tiny_folder: Path, tmp_path: Path) -> None:
    def start(model: str | Path, rows: list[dict[str, Any]], out: str, method: str) -> str:
        data = write(tmp_path / f"{out}.jsonl", rows)
        options = {"train.max_steps": 1, "model.dtype": "fp32", "train.method": method}
        strop.train(model=str(model), data=str(data), out=str(tmp_path / out), **options)
        return str(tmp_path / out)

    base = first = start(tiny_folder, ROWS, "first", "full" if "full" in way else "lora")
    if "merged" in way:
        base = str(tmp_path / "merged")
        strop.merge(first, base)
        assert known(base, tmp_path / "a.jsonl", [ROWS[0], NEW]) == [True, False]
    second = start(base, [NEW] * 4, "second", "full" if way == "full again" else "lora")
    if "moved" in way:
        Path(first).rename(tmp_path / "elsewhere")
    other = {"prompt": "what is ten", "completion": "it is 10"}
    expected = None if "moved" in way else [True, True, False]
    assert known(second, tmp_path / "a.jsonl", [ROWS[0], NEW, other]) == expected


def test_train_rows_are_counted_in_result_report_card_and_page(
    trained: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    card, page = Path(trained) / "adapter" / "README.md", Path(trained) / "report.html"

    def evaluated(rows: list[dict[str, Any]]) -> tuple[Any, str]:
        data = write(tmp_path / "asked.jsonl", rows)
        code, out, err = run("eval", trained, "--data", data, "--max-new-tokens", "2", "--json", capsys=capsys)
        assert code == 0, err
        count = json.loads(out)["train_rows"]
        assert json.loads((Path(trained) / "report.json").read_text())["evaluation"]["train_rows"] == count
        return count, err

    count, err = evaluated([*ROWS[:3], NEW])
    assert count == 3 and "3 of 4 rows are also train rows" in err and "held-out" not in err
    assert "3 of the 4 rows that it was evaluated on are also train rows" in card.read_text()
    assert "| held-out rows |" not in card.read_text() and "3 of them also train rows" in page.read_text()
    count, err = evaluated([NEW])
    assert count == 0 and "1 held-out row" in err and "| held-out rows | 1 row: " in card.read_text()
    assert "train rows" not in card.read_text() + page.read_text()
    (tmp_path / "train.jsonl").unlink()
    count, err = evaluated([NEW])
    assert count is None and "1 row" in err and "held-out" not in err
    assert "| rows | 1 row: " in card.read_text() and "is unknown" in card.read_text()


@pytest.mark.parametrize("metric", ["exact", "choice"])
def test_the_tuned_model_alone_has_the_scores_that_it_has_next_to_the_base(
    metric: str, runs: list[Path], tmp_path: Path
) -> None:
    data, names = str(tmp_path / "colours.jsonl"), [str(runs[1])]
    (both,) = evaluate_models(names, data, EvalOptions(metric=metric, max_new_tokens=4))
    (alone,) = evaluate_models(names, data, EvalOptions(metric=metric, max_new_tokens=4, base=False))
    assert alone["tuned"][metric] == both["tuned"][metric] > 0
    assert alone["tuned"]["loss"] == pytest.approx(both["tuned"]["loss"], rel=1e-6)
    assert [row["tuned_hit"] for row in alone["samples"]] == [row["tuned_hit"] for row in both["samples"]]
    assert not {"base", "difference", "changed"} & alone.keys() and "base" not in alone["samples"][0]
    assert (runs[1] / "report.html").is_file() and strop.evaluate(runs[1], data, metric=metric, max_new_tokens=4)[
        "base"
    ]


def test_limit_takes_rows_evenly(runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [json.dumps({"prompt": f"say {number}", "completion": str(number)}) for number in range(7)]
    data, extra = tmp_path / "seven.jsonl", tmp_path / "two.jsonl"
    data.write_text("\n".join(lines))
    extra.write_text("\n".join(lines[:2]))
    words = ["eval", runs[0], "--data", data, "--regression-data", extra, "--max-new-tokens", "2", "--json"]
    code, out, err = run(*words, "--limit", "3", capsys=capsys)
    result = json.loads(out)
    assert code == 0 and result["rows"] == 3 and result["regression"]["rows"] == 2
    assert [sample["gold"] for sample in result["samples"]] == ["0", "2", "4"]
    assert "3 of 7 rows, evenly chosen (--limit)" in result["notes"] and "evenly chosen" in err
    assert not any("evenly" in note for note in strop.evaluate(runs[0], data, limit=7, max_new_tokens=2)["notes"])
    with pytest.raises(strop.InputError, match="limit 0: below 1"):
        strop.evaluate(runs[0], data, limit=0)
